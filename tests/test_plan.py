"""From what a user typed to specs: lists, checks, overrides, widths, keys."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.models.variants import VARIANTS, find_variant
from harness.options import (
    Grid,
    ReportOptions,
    Resources,
    fill,
    parse_depths,
    parse_seeds,
    parse_variants,
    parse_words,
)
from harness.plan import (
    check_epochs,
    check_grid,
    check_images,
    check_out,
    choose_engine,
    expand,
    fallback_world_sizes,
    make_grid,
    open_out,
    override,
    pending,
)
from harness.resources import allocate, check_resources, choose_launcher
from harness.spec import RunSpec, UserError
from harness.training.checks import make_dataset

CPU = allocate(Resources(gpus=0, workers=1), have_gpus=0, have_cpus=2, precision="fp32")


def specs(**changes: Any) -> list[Any]:
    sweep = Grid(variants=("he2015",), depths=(20,), **changes)
    return expand(sweep, CPU, fingerprint="f" * 64, train_images=50_000)


def test_lists() -> None:
    assert parse_depths("20, 32,20") == (20, 32)
    assert parse_seeds("3") == (0, 1, 2)
    assert parse_seeds("0,7") == (0, 7)
    assert parse_seeds("7,") == (7,)
    assert parse_seeds("3..5") == (3, 4, 5)
    assert parse_seeds("0,3..5,4") == (0, 3, 4, 5)
    assert parse_words("msra,he2015") == ("msra", "he2015")
    assert parse_variants("msra,he2015") == ("msra", "he2015")
    assert parse_variants("all") == tuple(VARIANTS)
    assert parse_depths("20..32", ("msra", "he2015")) == (20, 26, 32), "those that the variants allow"
    assert parse_depths("8,20..26", ("msra",)) == (8, 20, 26)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: parse_depths("20,x"), "'x' is neither a whole number"),
        (lambda: parse_depths("20,,32"), "without empty items"),
        (lambda: parse_depths("21..25", ("msra",)), "no number from 21 to 25"),
        (lambda: parse_depths("32..20", ("msra",)), "an ascending range"),
        (lambda: parse_seeds("0..4000"), "at most 1000"),
        (
            lambda: check_epochs(specs(), 1437),
            "64,000 steps of he2015-20's recipe amount to 5,334 epochs of cifar10",
        ),
        (lambda: parse_seeds("0"), "from 1 to 1000"),
        (lambda: parse_seeds("-1"), "neither a whole number"),
        (lambda: check_grid(Grid(variants=("he2015",), depths=(21,))), "depth 21 is not 6n\\+2: try 20 or 26"),
        (lambda: check_grid(Grid(variants=("he2051",))), "did you mean .?he2015"),
        (lambda: check_grid(Grid(variants=("msra",), loader="dalli")), "did you mean dali"),
        (lambda: check_grid(Grid(variants=("msra",), dataset="cifar")), "did you mean cifar"),
        (lambda: check_grid(Grid(variants=("msra",), precision="fp64")), "allowed: fp32, tf32, bf16, fp16"),
        (lambda: check_grid(Grid(variants=("msra",), epochs=0)), "--epochs 0: at least 1"),
        (lambda: check_grid(Grid(seeds=())), "--seeds is empty: at least one"),
        (lambda: check_grid(make_grid({"variants": []})), "--variants is empty: at least one"),
        (lambda: open_out("s3:/bucket/x", write=False), "'s3:/bucket/x' is no URI: two slashes are needed"),
        (lambda: open_out("gs+x:/b", write=True), "is no URI"),
        (lambda: open_out(__file__, write=False), "is a file; expected a folder"),
        (lambda: specs(limit_train=50_001), "has 50000 training images"),
        (lambda: specs(val=50_000), "hold out fewer, as with --val 5000"),
    ],
)
def test_mistakes_are_one_line_that_says_what_is_allowed(call: Any, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


def width(**changes: Any) -> Any:
    resources = Resources(
        **{name: changes.pop(name) for name in ("gpus", "workers", "runs_per_gpu") if name in changes}
    )
    check_resources(resources)
    return allocate(
        resources, **({"have_gpus": 8, "have_cpus": 64, "precision": "fp32", "where": "here"} | changes)
    )


def test_widths() -> None:
    one = width()
    assert (one.gpus, one.workers, one.concurrent_runs, one.device, one.threads) == (8, 8, 1, "cuda", 8)
    four = width(workers=2)
    assert (four.workers, four.concurrent_runs) == (2, 4)
    cpu = width(gpus=0)
    assert (cpu.workers, cpu.concurrent_runs, cpu.device, cpu.threads) == (1, 1, "cpu", 64)
    assert width(gpus=0, workers=3).threads == 21
    shared = width(gpus=2, runs_per_gpu=3)
    assert (shared.workers, shared.concurrent_runs, shared.threads, shared.runs_per_gpu) == (1, 6, 10, 3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gpus": 9}, "--gpus 9: here has 8 GPUs"),
        ({"gpus": 1, "have_gpus": 0}, "here has no GPU; --gpus 0 trains on the CPU"),
        ({"gpus": 8, "workers": 3}, "--workers 3 does not divide --gpus 8 \\(allowed: 1, 2, 4, 8\\)"),
        ({"gpus": 0, "workers": 65}, "here has 64 CPU cores"),
        ({"gpus": 0, "precision": "fp16"}, "needs a GPU"),
        ({"gpus": -1}, "at least 0"),
        ({"runs_per_gpu": 0}, "--runs-per-gpu 0: at least 1"),
        ({"runs_per_gpu": 2, "workers": 2}, "runs that share a GPU have one worker, not 2"),
        ({"runs_per_gpu": 2, "gpus": 0}, "--runs-per-gpu 2 needs a GPU"),
    ],
)
def test_widths_that_cannot_be(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        width(**changes)


def test_the_engine_is_the_fastest_that_is_safe() -> None:
    assert [choose_engine(None, device) for device in ("cuda", "cpu")] == ["graph", "eager"]
    assert choose_engine("compile", "cpu") == "compile"
    with pytest.raises(UserError, match="engine graph needs a GPU; the CPU supports --engine eager and compile"):
        choose_engine("graph", "cpu")
    with pytest.raises(UserError, match="--engine 'grahp' is unknown; did you mean graph"):
        check_grid(Grid(variants=("msra",), engine="grahp"))


def test_a_width_that_does_not_divide_the_batch() -> None:
    three = replace(CPU, workers=3)
    with pytest.raises(UserError, match="does not divide the global batch of 128"):
        expand(Grid(variants=("msra",)), three, fingerprint="f", train_images=50_000)


@pytest.mark.parametrize(
    ("workers", "given", "says"),
    [
        (
            1,
            {"limit_train": 129},
            "the last of 129 images in batches of 128 has 1 (possible as --batch-size: 127, ",
        ),
        (2, {"limit_train": 35, "batch_size": 32}, "has 3 (possible as --batch-size: 30, 28, 36)"),
        (1, {"limit_train": 229, "val": 100}, "the last of 129 images"),
        (2, {"limit_train": 36, "batch_size": 32}, ""),
        (2, {"limit_train": 35, "batch_size": 32, "batch_norm": "sync"}, ""),
        (1, {"limit_train": 129, "variants": ("he2015",)}, ""),
    ],
)
def test_a_last_batch_of_one_image_is_no_batch_for_logits_that_are_normalised(
    workers: int, given: dict[str, Any], says: str
) -> None:
    grid = Grid(**{"variants": ("msra",), "depths": (8,), **given})
    wide = replace(CPU, workers=workers)
    if not says:
        assert expand(grid, wide, fingerprint="f", train_images=50_000)
        return
    with pytest.raises(UserError, match=re.escape(says)):
        expand(grid, wide, fingerprint="f", train_images=50_000)


def test_epochs_stretch_the_whole_schedule() -> None:
    recipe, changed = override(find_variant("msra")(20).recipe, Grid(variants=(), epochs=18))
    assert (recipe.duration, recipe.milestones) == (18, (9, 13.5))
    assert changed == ("epochs=18",)
    paper, changed = override(find_variant("he2015")(110).recipe, Grid(variants=(), epochs=16))
    assert (paper.unit, paper.duration, paper.milestones) == ("epoch", 16, (8, 12))
    assert paper.warmup == pytest.approx(16 * 400 / 64_000)
    same, changed = override(find_variant("msra")(20).recipe, Grid(variants=(), epochs=180, batch_size=128))
    assert (same, changed) == (find_variant("msra")(20).recipe, ())


def test_every_run_once_seeds_outermost() -> None:
    sweep = Grid(variants=("msra", "he2015"), depths=(20, 32), seeds=(0, 1))
    all_of = expand(sweep, CPU, fingerprint="f", train_images=50_000)
    assert [(s.seed, s.variant, s.network.depth) for s in all_of][:4] == [
        (0, "msra", 20), (0, "msra", 32), (0, "he2015", 20), (0, "he2015", 32)
    ]  # fmt: skip
    assert len({s.key for s in all_of}) == 8
    assert pending(all_of, {all_of[0].key}) == all_of[1:]


def test_a_key_is_the_whole_contents() -> None:
    (spec,) = specs()
    assert spec.key == specs()[0].key
    for other in (
        replace(spec, seed=1),
        replace(spec, fingerprint="0" * 64),
        replace(spec, workers=2),
        replace(spec, precision="bf16"),
        replace(spec, recipe=replace(spec.recipe, lr=0.2)),
        replace(spec, network=replace(spec.network, shortcut="identity-conv")),
    ):
        assert other.key != spec.key


def test_a_field_at_its_default_leaves_the_key_alone() -> None:
    # so that a field added to Network, Recipe or RunSpec later does not orphan what is stored
    assert specs()[0].key == "efd25de3ec8d7030"


def test_out_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        check_out(tmp_path / "file" / "runs")
    assert check_out(tmp_path / "runs").is_dir()


def test_home_is_found_in_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [open_out("~/r", write=write)[0] for write in (False, True)] == [tmp_path / "r"] * 2
    assert fill(ReportOptions, {"output": Path("~/x.csv")}).output == tmp_path / "x.csv"


def wide(workers: int, **changes: Any) -> list[Any]:
    width = allocate(Resources(gpus=0, workers=workers), have_gpus=0, have_cpus=64, precision="fp32")
    return expand(Grid(variants=("he2015",), depths=(20,), **changes), width, fingerprint="f" * 64,
                  train_images=50_000)  # fmt: skip


def test_fallback_world_sizes_divide_the_global_batch_and_change_no_key() -> None:
    assert fallback_world_sizes(None, wide(8)) == ()
    assert fallback_world_sizes(1, wide(8)) == (4, 2, 1)
    assert fallback_world_sizes(4, wide(8)) == (4,)
    assert fallback_world_sizes(2, wide(8, batch_size=120)) == (6, 5, 4, 3, 2)
    assert fallback_world_sizes(8, wide(8)) == (), "as many as were asked for: never fewer"
    assert fallback_world_sizes(1, wide(1)) == ()


@pytest.mark.parametrize(
    ("elastic", "says"),
    [
        (0, "--elastic 0: expected a number from 1 to 8"),
        (9, "--elastic 9: expected a number from 1 to 8"),
        (5, r"--elastic 5: no width from 5 to 7 divides the global batch of 128 \(allowed: 4, 2, 1\)"),
    ],
)
def test_a_width_that_cannot_be_is_refused(elastic: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        fallback_world_sizes(elastic, wide(8))


def test_a_grid_is_the_same_from_words_and_from_values() -> None:
    words = {"variants": "msra,he2015", "depths": "20..32", "seeds": "2", "settings": ["lr=0.05"], "epochs": 9}
    values = {"variants": ("msra", "he2015"), "depths": (20, 26, 32), "seeds": (0, 1), "settings": {"lr": 0.05}}
    assert make_grid(words) == make_grid(values | {"epochs": 9})
    assert make_grid({"preset": "cfmz", "depths": "8"}).networks == (("msra", 8),)


# --- --spec ---


def write_spec(path: Path, spec: RunSpec, **more: Any) -> Path:
    """As a record has it, among other things."""
    path.write_text(json.dumps({"key": spec.key, "spec": spec.to_json(), **more}))
    return path


def respec(path: Path, allocation: Any = CPU, **given: Any) -> list[RunSpec]:
    """The runs of a --spec file with some options given."""
    return expand(make_grid({"specs": [path], **given}), allocation, fingerprint="f" * 64, train_images=50_000)


@pytest.mark.parametrize("name", tuple(VARIANTS))
def test_every_variant_and_engine_comes_back_from_its_json(name: str, tmp_path: Path) -> None:
    for engine in ("eager", "compile", "graph"):
        device = allocate(Resources(workers=1), have_gpus=1, have_cpus=2, precision="fp32")
        grid = Grid(
            variants=(name,), engine=engine, settings={"lr": 0.03}, epochs=7, seeds=(4,), precision="bf16", val=100
        )
        (spec,) = expand(grid, device, fingerprint="f" * 64, train_images=50_000)
        assert RunSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
        assert respec(write_spec(tmp_path / "record.json", spec), allocation=device) == [spec]


def test_options_change_a_given_spec(tmp_path: Path) -> None:
    (spec,) = specs(epochs=10, settings={"lr": 0.05})
    path = write_spec(tmp_path / "spec.json", spec)
    assert [run.seed for run in respec(path, seeds=(3, 5))] == [3, 5]
    (changed,) = respec(path, epochs=20, batch_size=64, loader="resident", engine="compile", settings={"lr": 0.2})
    assert changed.overrides == ("lr=0.2", "epochs=20", "batch_size=64")
    assert (changed.loader, changed.engine, changed.seed) == ("resident", "compile", spec.seed)
    assert changed.recipe.milestones == tuple(2 * m for m in spec.recipe.milestones)
    (slow,) = respec(path, deterministic=True)
    assert (slow.key != spec.key, "deterministic" in spec.to_json()) == (True, False)
    assert respec(write_spec(tmp_path / "slow.json", slow)) == [slow], "kept where the option is not given"
    (other,) = respec(path, dataset="digits")
    assert (other.dataset, other.recipe) == ("digits", spec.recipe)


def test_a_changed_spec_is_the_run_of_the_command_that_names_all_changes(tmp_path: Path) -> None:
    path = write_spec(tmp_path / "spec.json", specs(epochs=10, val=100)[0])
    (direct,) = specs(epochs=10, val=100, batch_size=64, settings={"lr": 0.05, "shortcut": "identity-conv"})
    (changed,) = respec(path, settings={"shortcut": "identity-conv", "lr": 0.05}, batch_size=64)
    assert (changed, changed.key) == (direct, direct.key)
    both = write_spec(tmp_path / "both.json", specs(epochs=10, settings={"lr": 0.05})[0])
    (back,) = respec(both, settings={"lr": 0.1})
    assert back.key == specs(epochs=10)[0].key
    msra = expand(Grid(variants=("msra",), epochs=10), CPU, fingerprint="f" * 64, train_images=50_000)[0]
    (whole,) = respec(write_spec(tmp_path / "msra.json", msra), epochs=180)
    assert whole.key == expand(Grid(variants=("msra",)), CPU, fingerprint="f" * 64, train_images=50_000)[0].key


def test_a_spec_that_cannot_be_trained_is_one_line(tmp_path: Path) -> None:
    (spec,) = specs()
    path = tmp_path / "spec.json"
    whole = spec.to_json()
    broken: dict[str, tuple[Any, str]] = {
        "unknown": ({**whole, "sede": 1}, "sede: no such field; did you mean seed"),
        "nested": (
            {**whole, "recipe": {**whole["recipe"], "lrr": 1}},
            "recipe.lrr: no such field; did you mean lr",
        ),
        "missing": ({k: v for k, v in whole.items() if k != "loader"}, "loader: "),
        "type": ({**whole, "precision": "fp64"}, "precision: Input should be"),
        "other": ([1], "holds no run's specification"),
        "images": ({**whole, "fingerprint": "0" * 64}, "other images of cifar10"),
    }
    for values, says in broken.values():
        path.write_text(json.dumps(values))
        with pytest.raises(UserError, match=says) as caught:
            respec(path)
        assert "\n" not in str(caught.value)
    path.write_text("{")
    for given, says in (({"variants": "msra"}, "cannot be combined"), ({}, "holds no run's specification")):
        with pytest.raises(UserError, match=says):
            respec(path, **given)
    one, two = write_spec(tmp_path / "1", spec), write_spec(tmp_path / "2", replace(spec, dataset="digits"))
    for given in ({"specs": [one, two]}, {"runs": [{"specs": [two]}, {"seeds": "2"}]}):
        with pytest.raises(UserError, match=r"on .* and on .*; a command trains on one data set"):
            make_grid(given)
    assert make_grid({"dataset": "digits", "runs": [{"specs": [two]}, {"seeds": "2"}]}).dataset == "digits"


def test_one_run_with_one_worker_on_this_machine_needs_no_ray() -> None:
    def launcher(runs: int, address: str | None = None, launcher: str = "auto", **changes: Any) -> str:
        resources = Resources(address=address, launcher=launcher)
        return choose_launcher(resources, replace(CPU, **changes), runs).launcher

    assert launcher(1) == "local"
    assert [launcher(2), launcher(1, workers=2), launcher(1, "auto")] == ["ray"] * 3
    assert [launcher(2, launcher="local"), launcher(1, launcher="ray")] == ["local", "ray"]


def test_a_folder_of_images_is_absolute_however_it_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    typed = ("x", "x/", "./y/../x", "~/x", str(tmp_path / "x"))
    assert {make_grid({"dataset": f"folder:{path}"}).dataset for path in typed} == {f"folder:{tmp_path / 'x'}"}
    assert [make_grid({"dataset": name}).dataset for name in ("digits", "folder:")] == ["digits", "folder:"]


# --- values that no run can have ---


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"settings": {"nesterov": True, "momentum": 0.0}}, "nesterov=true: a momentum above 0"),
        ({"settings": {"label_smoothing": 1.5}}, "label_smoothing=1.5: 0 to 1"),
        ({"settings": {"batch_norm_eps": 0.0}}, "batch_norm_eps=0: above 0"),
        (
            {"variants": ("xresnext-16x2d",), "depths": (), "val": 0, "settings": {"cardinality": 0}},
            "cardinality=0: at least 1",
        ),
        ({"settings": {"scale_range": (128,)}}, "scale_range=128: two rising"),
        ({"settings": {"scale_range": (64, 40)}}, "scale_range=64,40: two rising"),
        ({"settings": {"scale_range": (40, 50, 60)}}, "scale_range=40,50,60: two rising"),
        ({"settings": {"optimizer": "adamw", "beta1": 1.0}}, "beta1=1: 0 to below 1"),
        ({"settings": {"optimizer": "adamw", "eps": -1e-8}}, "eps=-1e-08: at least 0 is required"),
        ({"settings": {"crop": 3}}, "images of 3 pixels are too small for this network: at least 4"),
        (
            {"settings": {"schedule": "cosine", "warmup": 64e3, "first_step": 1}, "epochs": 4},
            "warmup=4 with first_step",
        ),
        ({"classes": ("one",)}, "1 classes are too few: at least 2"),
        ({"limit_test": 41}, "--limit-test 41: there are 40 test images"),
        ({"settings": {"batch_size": 0}}, "batch_size=0: at least 1 is required"),
        (
            {"settings": {"optimizer": "adamw", "momentum": 0.5}},
            "--set momentum: a field of optimizer sgd; the optimizer here is adamw",
        ),
        (
            {"settings": {"schedule": "cosine", "gamma": 0.5}},
            "--set gamma: a field of schedule multistep; the schedule here is cosine",
        ),
        ({"settings": {"schedule": "cosine", "momentum": 0.5}}, ""),
        ({"settings": {"label_smoothing": 1.0, "momentum": 0.0, "warmup": 64e3}, "limit_test": 40}, ""),
    ],
)
def test_what_no_run_can_have_is_said_before_any(given: dict[str, Any], says: str) -> None:
    given = dict(given)
    data = make_dataset(count=40)
    data = replace(data, classes=given.pop("classes", data.classes))
    grid = Grid(**{"dataset": "digits", "depths": (8,), "loader": "resident"} | given)
    with pytest.raises(UserError, match=re.escape(says)) if says else nullcontext():
        check_images(expand(grid, CPU, fingerprint="f", train_images=len(data.train)), data)
