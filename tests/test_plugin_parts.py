"""Optimizers, schedules, augmentations, data sets and loaders of plug-ins, and what `harness check my.py` says of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command import harness as command
from test_plugins import EXAMPLES, NET, TINY, write
from torch import Tensor, nn

from harness import plan, plugins
from harness.cluster.job import Allocation, Worker
from harness.loaders.datasets import DataError, load_dataset
from harness.loaders.own import read_split
from harness.models.build import build
from harness.models.variants import VARIANTS, Recipe, find_variant
from harness.plugins import PluginError, load_file
from harness.results.store import load_records
from harness.search_space import parse_settings
from harness.spec import RunPaths, RunSpec, UserError
from harness.training import checks
from harness.training.fit import try_out
from harness.training.recipe import AUGMENTATIONS, augment, learning_rate, make_optimizer, set_lr

OPTIMIZER = """
import torch
from harness import plugin

class Sign(torch.optim.Optimizer):
    '''Steps of the momentum's sign; counts its steps in its group, and makes its state lazily.'''
    def __init__(self, params, lr, beta):
        super().__init__(params, {"lr": lr, "beta": beta, "count": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p)).lerp_(p.grad, 1 - group["beta"])
                p.add_(average.sign(), alpha=-group["lr"] / group["count"] ** 0.5)

@plugin.optimizer
def sign(groups, lr, momentum, beta: float = 0.9):
    return Sign(groups, lr, beta * momentum)
"""
PARTS = """
@plugin.schedule
def root(moment, floor: float = 0.25):
    return max(floor, (1 - moment.share) ** 0.5)

@plugin.augmentation
def shade(images, draws, amount: float = 0.5):
    return images + amount * draws.uniform(-1, 1, 1, 1, 1)
"""
LOADER = """
from harness import plugin
from harness.loaders.resident import ResidentLoader

@plugin.loader
class Mine(ResidentLoader):
    pass
"""


@pytest.fixture(autouse=True)
def _unloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing stays of a test's plug-ins."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in list(plugins.LOADED):
        plugins.unload(name)


def expand(device: str = "cpu", **given: Any) -> RunSpec:
    grid = plan.Grid(**{"dataset": "digits", "depths": (8,), "loader": "resident"} | given)
    allocation = Allocation(device=device, gpus=1, workers=1, concurrent_runs=1, threads=1)  # type: ignore[arg-type]
    (spec,) = plan.expand(grid, allocation, fingerprint="f", train_images=1437)
    return spec


# --- optimizers ---


def train_steps(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> list[Tensor]:
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        set_lr(optimizer, 0.01 / (step + 1))
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), torch.arange(8)).backward()
        optimizer.step()
    return [p.detach().clone() for p in network.parameters()]


def test_adamw_is_torchs_and_its_state_is_made_before() -> None:
    ends = []
    for ours in (True, False):
        torch.manual_seed(0)
        network = build(find_variant("he2015")(8).network, 10)
        if ours:
            recipe = Recipe(duration=1, optimizer="adamw", weight_decay=0.1, extra=("beta1=0.8",))
            optimizer = make_optimizer(recipe, network)
            made = [set(optimizer.state[p]) for p in network.parameters()]
            before = {id(value) for state in optimizer.state.values() for value in state.values()}
        else:
            optimizer = torch.optim.AdamW(network.parameters(), betas=(0.8, 0.999), weight_decay=0.1, fused=True)
        ends.append(train_steps(network, optimizer))
        if ours:
            after = {id(value) for state in optimizer.state.values() for value in state.values()}
            assert after == before, "a captured step would go on with those of its first"
        else:
            assert made == [set(optimizer.state[p]) for p in network.parameters()]
            shapes = [(v.shape, v.dtype) for state in optimizer.state.values() for v in state.values()]
            assert len(shapes) == 3 * len(made)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_adamw_is_captured_with_its_lr_in_a_tensor() -> None:
    network = build(find_variant("he2015")(8).network, 10)
    recipe = Recipe(duration=1, optimizer="adamw", decay="kernels")
    captured = make_optimizer(recipe, network, lr_on_device=True)
    assert [(g["capturable"], g["fused"], g["weight_decay"]) for g in captured.param_groups] == [
        (True, True, 1e-4), (True, True, 0.0),
    ]  # fmt: skip
    address = captured.param_groups[0]["lr"].data_ptr()
    set_lr(captured, 0.5)
    assert (captured.param_groups[0]["lr"].data_ptr(), float(captured.param_groups[0]["lr"])) == (address, 0.5)
    assert not make_optimizer(recipe, network).param_groups[0]["capturable"]


def test_the_default_optimizer_leaves_keys_as_they_are() -> None:
    assert expand(settings=parse_settings(["optimizer=sgd"])) == expand()
    spec = expand(settings=parse_settings(["optimizer=adamw", "beta2=0.99"]))
    assert (spec.recipe.optimizer, spec.recipe.extra, spec.plugins) == ("adamw", ("beta2=0.99",), ())
    assert spec.overrides == ("optimizer=adamw", "beta2=0.99")
    with pytest.raises(UserError, match="--set beta2: a field of optimizer"):
        expand(settings=parse_settings(["beta2=0.99"]))


def test_what_belongs_to_another_optimizer_is_dropped(tmp_path: Path) -> None:
    load_file(write(tmp_path, OPTIMIZER + "plugin.variant('signed', base='he2015', optimizer='sign', beta=0.5)\n"))
    assert expand(variants=("signed",)).recipe.extra == ("beta=0.5",)
    assert expand(variants=("signed",), settings={"optimizer": "sgd"}).recipe.extra == ()


TWO = """
from harness import plugin
@plugin.augmentation
def erase(images, draws, p: float = 0.5):
    return images
@plugin.augmentation
def noise(images, draws, p: float = 0.25):
    return images
"""


def test_a_field_of_two_augmentations_is_set_for_both(tmp_path: Path) -> None:
    load_file(write(tmp_path, TWO))
    own = {"augmentations": ("erase", "noise")}
    assert expand(settings=own).recipe.extra == ()
    for p in (0.25, 0.5, 0.75):
        spec = expand(settings=own | {"p": p})
        assert (spec.recipe.extra, spec.overrides) == ((f"p={p}",), ("augmentations=erase,noise", f"p={p}"))
    one = expand(settings={"augmentations": ("noise",), "p": 0.25})
    assert (one.recipe.extra, one.overrides) == ((), ("augmentations=noise",))


def test_an_optimizer_is_tried_at_the_recipes_lr_though_its_first_is_0(tmp_path: Path) -> None:
    load_file(write(tmp_path, OPTIMIZER + """
@plugin.schedule
def triangle(moment):
    return 1 - abs(2 * moment.share - 1)
"""))  # fmt: skip
    spec = expand(settings={"optimizer": "sign", "schedule": "triangle"}, epochs=2)
    assert "parameters" in try_out("optimizer", "sign", spec, checks.make_dataset(), RunPaths(out=tmp_path))


def test_steps_of_a_plugins_optimizer_are_captured_only_if_it_says_so(tmp_path: Path) -> None:
    load_file(write(tmp_path, OPTIMIZER))
    settings = {"optimizer": "sign"}
    assert expand("cuda", settings=settings).engine == "eager"
    for engine in ("graph", "compile"):
        with pytest.raises(
            UserError, match=f"--engine {engine}: optimizer sign cannot be captured as a CUDA graph"
        ):
            expand("cuda", settings=settings, engine=engine)
    load_file(write(tmp_path, OPTIMIZER.replace("@plugin.optimizer", "@plugin.optimizer(capturable=True)")))
    assert expand("cuda", settings=settings).engine == "graph"
    with pytest.raises(PluginError, match="makes state in a step: with capturable=True"):
        try_out("optimizer", "sign", expand(settings=settings), load_dataset("digits"), RunPaths(out=tmp_path))


def test_lazily_made_state_is_resumed_exactly(tmp_path: Path) -> None:
    """With a count in its group; and what an engine that is tried before the first step made of both is put back."""
    load_file(write(tmp_path, OPTIMIZER))
    worker = Worker()
    recipe = replace(checks.make_spec(worker).recipe, optimizer="sign", lr=0.003)
    figure, words = checks.check_resume(checks.Bench(worker), recipe=recipe)
    assert figure == 0, words
    with checks.ExitStack() as stack:
        prepared, trainer = checks.start(worker, stack, recipe=recipe)
        weights = [p.detach().clone() for p in prepared.network.parameters()]
        with trainer.step.restoring():
            trainer.step(torch.randn(4, 3, 8, 8), torch.arange(4), 4)
            assert prepared.optimizer.state
        assert not prepared.optimizer.state
        assert prepared.optimizer.param_groups[0]["count"] == 0
        assert all(torch.equal(p, w) for p, w in zip(prepared.network.parameters(), weights, strict=True))


# --- schedules ---


def test_a_schedule_is_a_factor_after_warm_up(tmp_path: Path) -> None:
    load_file(write(tmp_path, OPTIMIZER + PARTS))
    recipe = Recipe(duration=10, schedule="root", warmup=2, warmup_lr=0.01, lr=0.2)
    rates = [learning_rate(recipe, step, 5) for step in (0, 9, 10, 30, 49)]
    assert rates == pytest.approx([0.01, 0.01, 0.2, 0.2 * 0.5**0.5, 0.2 * 0.25])
    assert learning_rate(replace(recipe, extra=("floor=0.1",)), 49, 5) == pytest.approx(0.2 * (1 / 40) ** 0.5)


def former_rate(recipe: Recipe, at: int, unit: int, warmup: int, end: int) -> float:
    """As it was written before schedules were a table."""
    if recipe.schedule == "multistep":
        return recipe.lr * recipe.gamma ** sum(at >= round(milestone * unit) for milestone in recipe.milestones)
    if recipe.schedule == "linear":
        return recipe.lr * (1 - (at - warmup) / (end - warmup))
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (at - warmup) / (end - warmup)))


def test_schedules_of_ours_are_bit_for_bit_what_they_were() -> None:
    for name, variant in VARIANTS.items():
        recipe = variant().recipe  # type: ignore[call-arg]
        unit = 7 if recipe.unit == "epoch" else 1
        end, warmup = round(recipe.duration * unit), round(recipe.warmup * unit)
        for step in range(warmup, end - recipe.first_step, max(1, end // 200)):
            old = former_rate(recipe, step + recipe.first_step, unit, warmup, end)
            assert learning_rate(recipe, step, 7) == old, name


# --- augmentations ---


def test_draws_are_shared_by_any_number_of_ranks(tmp_path: Path) -> None:
    load_file(write(tmp_path, OPTIMIZER + PARTS))
    recipe = Recipe(duration=1, augmentations=("shade", "shade"))
    images = torch.zeros(6, 3, 4, 4)
    whole = augment(recipe, images, (0, 1), (3, 1, 2), 6)
    assert len(whole[:, 0, 0, 0].unique()) == 6
    for rank in range(3):
        assert torch.equal(augment(recipe, images[rank::3], (rank, 3), (3, 1, 2), 6), whole[rank::3])
    assert not torch.equal(augment(recipe, images, (0, 1), (3, 1, 3), 6), whole)
    once = augment(replace(recipe, augmentations=("shade",)), images, (0, 1), (3, 1, 2), 6)
    assert not torch.allclose(2 * once, whole), "each has draws of its own"


def test_an_augmented_run_has_other_losses_and_evaluates_plain_images(tmp_path: Path) -> None:
    load_file(write(tmp_path, OPTIMIZER + PARTS))
    worker = Worker()
    recipe = replace(checks.make_spec(worker).recipe, duration=1)
    plain, shaded = (
        checks.train(worker, recipe=replace(recipe, augmentations=names))[0] for names in ((), ("shade",))
    )
    assert plain[0].loss != shaded[0].loss
    seen: list[int] = []
    AUGMENTATIONS["count"] = lambda images: (seen.append(len(images)), images)[1]
    try:
        with checks.ExitStack() as stack:
            _, trainer = checks.start(worker, stack, recipe=replace(recipe, augmentations=("count",)))
            checks.train_epochs(trainer, 0, 1)
            from harness.training.train import run_eval

            run_eval(trainer, trainer.run.eval_loader, checks.IMAGES)
    finally:
        del AUGMENTATIONS["count"]
    assert sum(seen) == checks.IMAGES


# --- data sets ---

ARRAYS = """
import numpy as np
from harness import plugin

@plugin.dataset(flip=False)
def mine(root):
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 255, (96, 16, 16), dtype=np.uint8), np.arange(96) % 3
    return (images[:64], labels[:64]), (images[64:], {test})
"""


def pairs() -> list[tuple[Any, int]]:
    from PIL import Image

    draw = np.random.default_rng(0)
    return [(Image.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)), n % 3) for n in range(9)]


def test_every_form_of_a_data_set_is_the_same_images() -> None:
    images, labels = np.stack([np.asarray(image) for image, _ in pairs()]), np.arange(9) % 3
    tensors = [
        (torch.from_numpy(image).permute(2, 0, 1) / 255, label)
        for image, label in zip(images, labels, strict=True)
    ]
    rows = [{"img": image, "label": label, "id": 0} for image, label in pairs()]

    class Hub(list):  # type: ignore[type-arg]
        column_names = ("id", "img", "label")

    class Vision:
        __len__ = lambda _: 9  # noqa: E731
        __getitem__ = lambda _, index: pairs()[index]  # noqa: E731

    class Streamed(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        __len__ = lambda _: 9  # noqa: E731
        __iter__ = lambda _: iter(pairs())  # noqa: E731

    forms = [
        (images, labels),
        (torch.from_numpy(images), torch.from_numpy(labels)),
        pairs(),
        iter(pairs()),
        tensors,
        Hub(rows),
        Vision(),
        Streamed(),
    ]
    for form in forms:
        split = read_split(form, "train")
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int64
        assert np.array_equal(split.images, images), form
        assert np.array_equal(split.labels, labels)
    grey = read_split((images[..., 0], labels), "train")
    assert np.array_equal(grey.images, images[..., :1].repeat(3, axis=3))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ((np.zeros((4, 8, 8, 3)), np.arange(4)), r"images are float64 \(4, 8, 8, 3\), uint8"),
        ((np.zeros((4, 8, 6, 3), np.uint8), np.arange(4)), r"images are uint8 \(4, 8, 6, 3\), uint8"),
        ((np.zeros((4, 8, 8, 3), np.uint8), np.arange(3)), "4 whole numbers are expected"),
        ((np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4)), "labels are float64"),
        ([(np.zeros((8, 8), np.uint8), 0), (np.zeros((9, 9), np.uint8), 0)], r"one size are expected, here are \(8, 8\) and \(9, 9\)"),
        ([], "here are none"),
        ([(np.full((8, 8), 7.0), 0)], "values from 7 to 7"),
        (3, "arrays, a data set or pairs"),
        (SimpleNamespace(column_names=("a", "label")), "no columns image and label among a, label"),
    ],
)  # fmt: skip
def test_what_is_no_data_set(part: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_split(part, "train")


def test_a_run_on_a_data_set_of_a_plugin(tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path, ARRAYS.format(test="labels[64:]"), "data.py")
    line = f"run --plugin {path} {TINY.replace('digits', 'mine')} --depths 8 --out {tmp_path / 'runs'}"
    code, _, err = command(line, capsys)
    assert code == 0, err
    (stored,) = load_records([tmp_path / "runs"]).records
    assert (stored.record.dataset, stored.record.original) == ("mine", False)
    assert stored.record.spec["plugins"][0].startswith("data:")
    dataset = load_dataset("mine")
    assert (dataset.classes, dataset.flip, dataset.image_size) == (("0", "1", "2"), False, 16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ARRAYS.format(test="labels[64:] + 1"), "data.py:5: dataset 'mine': label 3 of test image 1 is out of range"),
        (ARRAYS.format(test="1 / 0"), "data.py:9: ZeroDivisionError"),
        ("import os\ndef mine(): return os\nDATASETS = {'mine': mine}\n", "data.py:3: dataset 'mine': (train, test) or a path"),
        ("def mine(): return 'not/there'\nDATASETS = {'mine': mine}\n", "no such folder"),
        (ARRAYS.format(test="labels[64:]").replace("(0)", "()"), "has other images each time"),
    ],
)  # fmt: skip
def test_a_bad_data_set_is_one_line(
    text: str, message: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, text, "data.py")
    code, _, err = command(f"run --plugin data.py {TINY.replace('digits', 'mine')} --depths 8 --out runs", capsys)
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
    assert "data.py:" in err
    assert not list((tmp_path / "runs").glob("mine*"))


# --- loaders, and the rest of what does not fit ---

BAD = {
    "a loader that stops early": (
        LOADER.replace("    pass", "    def epoch(self, epoch, first_step=0):\n        yield from list(super().epoch(epoch, first_step))[:1]"),
        "--loader Mine", "parts.py:5: loader 'Mine': gives 1 of the 5 batches"),
    "a loader of another order": (
        LOADER.replace("    pass", "    def epoch(self, epoch, first_step=0):\n        yield from list(super().epoch(epoch, first_step))[::-1]"),
        "--loader Mine", "labels in another order than the plan's"),
    "an optimizer of nothing": (
        OPTIMIZER.replace("return Sign(groups", "return Sign([torch.nn.Parameter(torch.ones(1))]"),
        "--set optimizer=sign", "optimizer 'sign': lacks 23 of the 23 parameters"),
    "an optimizer that does nothing": (
        OPTIMIZER.replace("p.add_(", "p.add("), "--set optimizer=sign", "leaves parameters as they are"),
    "a schedule below 0": (
        OPTIMIZER + PARTS.replace("return max(floor, ", "return -max(floor, "), "--set schedule=root", "makes the lr of step 0 -0.1"),
    "an augmentation in place": (
        OPTIMIZER + PARTS.replace("return images +", "return images.add_("). replace("1, 1, 1)\n", "1, 1, 1))\n"),
        "--set augmentations=shade", "changes its input in place"),
    "an augmentation with draws of its own": (
        OPTIMIZER + PARTS.replace("draws.uniform(-1, 1, 1, 1, 1)", "torch.rand(())"), "--set augmentations=shade", "gives other images each time"),
    "an augmentation of the batch": (
        OPTIMIZER + PARTS.replace("images + amount *", "images + amount * images.mean() *"), "--set augmentations=shade", "gives other images on two ranks"),
    "an augmentation that crops": (
        OPTIMIZER + PARTS.replace("return images +", "return images[:, :, 1:] +"), "--set augmentations=shade", "gives (8, 3, 31, 32, torch.float32) for"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_one_line(
    case: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text, words, message = BAD[case]
    write(tmp_path, text, "parts.py")
    tiny = TINY.replace("--loader resident", "") if "--loader" in words else TINY
    code, _, err = command(f"run --plugin parts.py {tiny} --depths 8 {words} --out runs", capsys)
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
    assert "parts.py:" in err
    assert not list((tmp_path / "runs").glob("digits*"))


def test_a_loader_of_a_plugin_trains(tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path, LOADER, "parts.py")
    line = f"run --plugin {path} {TINY.replace('resident', 'Mine')} --depths 8 --out {tmp_path / 'runs'}"
    code, _, err = command(line, capsys)
    assert code == 0, err
    code, _, err = command(line.replace("Mine", "Mnie"), capsys)
    assert "did you mean Mine" in err


def test_a_loader_that_stops_in_a_run_fails_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with checks.ExitStack() as stack:
        _, trainer = checks.start(Worker(), stack)
        epoch = trainer.run.train_loader.epoch
        monkeypatch.setattr(trainer.run.train_loader, "epoch", lambda *where: list(epoch(*where))[:2])
        with pytest.raises(RuntimeError, match="loader resident gave 2 of the 5 batches"):
            checks.train_epochs(trainer, 0, 1)


# --- harness check ---


def test_check_says_that_all_fits(tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path, NET + OPTIMIZER + PARTS + LOADER + ARRAYS.format(test="labels[64:]"), "parts.py")
    code, out, err = command(f"check {path}", capsys)
    lines = out.splitlines()
    assert (code, err, lines[-1]) == (0, "", "ready"), out
    assert all(line.startswith("passed") for line in lines[:-1])
    for what in ("network few:", "network few, resume:", "network few, 2 ranks of a copy:", "optimizer sign, resume:",
                 "schedule root:", "augmentation shade:", "loader Mine, plan:", "dataset mine:"):  # fmt: skip
        assert any(what in line for line in lines), what


@pytest.mark.long
def test_check_takes_a_plugin_that_builds_on_another(tmp_path: Path, capsys: Any) -> None:
    wide = 'from harness import plugin\nplugin.variant("a-wide", base="few", width=16)\n'
    code, out, _ = command(f"check {write(tmp_path, NET)} {write(tmp_path, wide, 'a_wide.py')}", capsys)
    assert code == 0, out


def test_check_of_a_data_set_reads_the_folder_that_is_given(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "seed").write_text("3")
    text = ARRAYS.format(test="labels[64:]").replace(
        "default_rng(0)", "default_rng(int((root / 'seed').read_text()))"
    )
    code, out, _ = command(f"check {write(tmp_path, text, 'parts.py')} --data-dir {tmp_path}", capsys)
    assert (code, "passed   dataset mine" in out) == (0, True), out


BESIDE = "from pathlib import Path; Path(__file__).with_name('beside.txt').read_text(); layers = ["
MIXED = "mixed = nn.Identity(); mixed.forward = lambda x: x - x.mean(0, keepdim=True); layers = [mixed, "
GLOBAL = 'import builtins; builtins.steps = getattr(builtins, "steps", 0) + 1; group["count"] = builtins.steps'


@pytest.mark.parametrize(
    ("text", "failed"),
    [
        (NET.replace("layers = [", BESIDE), "network few, 2 ranks of a copy"),
        (NET.replace("layers = [", MIXED), "network few"),
        (OPTIMIZER.replace('group["count"] += 1', GLOBAL), "optimizer sign"),
    ],
)
def test_check_says_what_does_not(text: str, failed: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "beside.txt").touch()
    code, out, _ = command(f"check {write(tmp_path, text, 'parts.py')}", capsys)
    wrong = [line for line in out.splitlines() if line.startswith("failed")]
    assert (code, bool(wrong)) == (1, True), out
    assert all(failed in line for line in wrong)


@pytest.mark.long
@pytest.mark.parametrize("file", ["cifar_resnet18", "torchvision_nets"])
def test_check_passes_the_examples(file: str, capsys: Any) -> None:
    """Batch norm on few images makes much of rounding: two ranks came to other losses within ten steps."""
    pytest.importorskip("torchvision")
    code, out, _ = command(f"check {EXAMPLES / file}.py", capsys)
    assert code == 0, out
