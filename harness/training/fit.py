"""Whether what a run uses of plug-ins fits: shapes, gradients, determinism, the plan. On the CPU, on a few images."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from harness.checklist import Result, attempt
from harness.cluster.job import Worker
from harness.loaders.datasets import DATASETS, Dataset, limit, load_dataset
from harness.loaders.sampling import SamplingPlan
from harness.models.build import build
from harness.models.variants import NETWORKS, find_variant
from harness.options import Grid
from harness.plan import find_data_dir, override
from harness.plugins import Loaded, blaming, load_sources, names_of, sources, used_by
from harness.progress import load_data
from harness.spec import RunPaths, RunSpec, Source
from harness.training import checks
from harness.training.recipe import CAPTURABLE, augment, learning_rate, make_optimizer, total_steps
from harness.training.setup import assemble

IMAGES, BATCH = 8, 16
MOMENTS = 50  # of a schedule
RANDOM = "draw random numbers only from torch's generator"


def check_fit(specs: Iterable[RunSpec], dataset: Dataset, paths: RunPaths) -> None:
    """Try all that these runs use of plug-ins. Raises PluginError, one line, for the first that does not fit."""
    cases = {(kind, name, spec.network if kind == "network" else spec.recipe): spec for spec in specs
             for kind, name in names_of(spec) if used_by([(kind, name)])}  # fmt: skip
    for (kind, name, _), spec in cases.items():
        try_out(kind, name, spec, dataset, paths)


def try_out(kind: str, name: str, spec: RunSpec, dataset: Dataset, paths: RunPaths) -> str:
    """Try one thing; what it came to. Raises PluginError."""
    with torch.random.fork_rng(devices=[]), blaming(kind, name):
        return FITS[kind](spec, dataset, paths)


def need(met: bool, words: str) -> None:
    """Raise ValueError unless it is met; the words follow the name of what does not fit."""
    if not met:
        raise ValueError(words)


def equal(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    """Bit for bit."""
    return all(map(torch.equal, one, other))


def _make(spec: RunSpec, dataset: Dataset) -> tuple[Any, Tensor]:
    """The network of the run's seed, and images of noise for it."""
    size = spec.recipe.crop or dataset.image_size
    torch.manual_seed(spec.seed)
    network = build(spec.network, dataset.num_classes, size)
    noise = torch.randn(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
    return network, noise.contiguous(memory_format=torch.channels_last)


def fit_network(spec: RunSpec, dataset: Dataset, paths: RunPaths) -> str:
    """Logits of the right shape; a gradient for each parameter; the same from the same seed."""
    (network, images), (other, _) = (_make(spec, dataset) for _ in range(2))
    need(isinstance(network, nn.Module), f"gives {type(network).__name__}, and a torch.nn.Module is expected")
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    need(bool(named), "has no parameters to train")
    same = equal(network.state_dict().values(), other.state_dict().values())
    need(same, f"differs each time that it is built from the same seed: {RANDOM}")
    wanted = (IMAGES, dataset.num_classes)

    def forward() -> Any:
        torch.manual_seed(1)
        logits = network(images)
        given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        need(given == wanted, f"gives {given} for images {tuple(images.shape)}: {wanted} is expected")
        return logits

    logits = forward()
    F.cross_entropy(logits.float(), torch.arange(IMAGES) % dataset.num_classes).backward()
    missed = [name for name, p in named.items() if p.grad is None]
    need(not missed, f"has {len(missed)} parameters that no gradient reaches: {', '.join(missed[:3])}")
    with torch.no_grad():
        same = torch.equal(forward(), logits)
        network.eval()
        need(same and torch.equal(forward(), forward()), f"gives other logits for the same images: {RANDOM}")
    count = sum(p.numel() for p in named.values())
    return f"logits {wanted}, {count:,} parameters, a gradient for each, the same from the same seed"


def fit_optimizer(spec: RunSpec, dataset: Dataset, paths: RunPaths) -> str:
    """It has every parameter, and changes it; the same each time."""
    ends, constant = [], replace(spec.recipe, warmup=0, first_step=0, schedule="multistep", milestones=())
    for _ in range(2):
        network, _ = _make(spec, dataset)
        optimizer: Any = make_optimizer(constant, network)
        is_one = isinstance(optimizer, torch.optim.Optimizer)
        need(is_one, f"gives {type(optimizer).__name__}, and a torch.optim.Optimizer is expected")
        parameters = [p for p in network.parameters() if p.requires_grad]
        missed = len(set(parameters) - {p for group in optimizer.param_groups for p in group["params"]})
        need(not missed, f"lacks {missed} of the {len(parameters)} parameters: it is given them as groups")
        before = [p.detach().clone() for p in parameters]
        made, captured = _held_by(optimizer), spec.recipe.optimizer in CAPTURABLE
        for _ in range(2):
            for p in parameters:
                p.grad = torch.ones_like(p)
            optimizer.step()
        stays = [*map(id, made)] == [*map(id, _held_by(optimizer))]
        how = "with capturable=True, all of it, counts too, is tensors made at once and then changed in place"
        need(stays or not captured, f"makes state in a step: {how}")
        need(not any(map(torch.equal, parameters, before)), "leaves parameters as they are in two steps")
        ends.append(parameters)
    need(equal(*ends), "ends two equal steps with other parameters each time")
    if captured:
        with torch.device("meta"):  # not the weights', as on a GPU the host is not
            make_optimizer(constant, network, lr_on_device=True)
    return f"all {len(parameters)} parameters, and the same each time"


def _held_by(optimizer: torch.optim.Optimizer) -> list[Any]:
    holders = vars(optimizer), *optimizer.param_groups, *optimizer.state.values()
    return [value for holder in holders for value in holder.values()]


def fit_schedule(spec: RunSpec, dataset: Dataset, paths: RunPaths) -> str:
    """Finite factors from 0 up, the same each time."""
    per_epoch = max(1, len(dataset.train) // spec.recipe.batch_size)
    last = max(1, total_steps(spec.recipe, per_epoch) - 1)
    for step in sorted({last * n // MOMENTS for n in range(MOMENTS + 1)}):
        rates = [learning_rate(spec.recipe, step, per_epoch) for _ in range(2)]
        met = all(isinstance(lr, float | int) and 0 <= lr < math.inf for lr in rates) and rates[0] == rates[1]
        words = "{!r}, then {!r}: a function of the step, from 0 up, is expected".format(*rates)
        need(met, f"makes the lr of step {step} {words}")
    return f"factors from 0 up over {last + 1} steps"


def fit_augmentation(spec: RunSpec, dataset: Dataset, paths: RunPaths) -> str:
    """Images of the same shape, the same on one rank and on two, and the given ones left as they are."""
    _, images = _make(spec, dataset)
    before = images.clone()

    def change(rank: int, ranks: int) -> Tensor:
        return augment(spec.recipe, images[rank::ranks], (rank, ranks), (0, 0, 0), IMAGES)

    whole = change(0, 1)
    need(torch.equal(images, before), "changes its input in place: it must return new images")
    same = torch.equal(whole, change(0, 1)) and bool(torch.isfinite(whole).all())
    need(same, "gives other images each time, or infinite ones: all that is random must come from draws")
    shared = all(torch.allclose(change(rank, 2), whole[rank::2], atol=1e-5) for rank in (0, 1))
    need(shared, "gives other images on two ranks: each must depend on itself and its draws alone")
    return f"{tuple(whole.shape)}, the same on one rank and on two"


def fit_loader(spec: RunSpec, dataset: Dataset, paths: RunPaths) -> str:
    """All batches of an epoch, with the plan's labels, in training and in evaluation."""
    split = limit(dataset.train, min(len(dataset.train), 4 * BATCH + 5))
    small = replace(
        spec, network=find_variant("he2015")(8).network, recipe=replace(spec.recipe, batch_size=BATCH, val=0),
        limit_train=None, limit_test=None, device="cpu", engine="eager", precision="fp32",
    )  # fmt: skip
    worker, data = Worker(threads=torch.get_num_threads()), replace(dataset, train=split, test=split)
    with closing(assemble(small, data, worker)) as made:
        size, at_most = made.loader_config.augment.crop_size(split), made.loader_config.eval_batch_size
        loaders = ("training", made.train_loader, BATCH), ("evaluation", made.eval_loader, at_most)
        for what, loader, batch in loaders:
            plan, batches = SamplingPlan(len(split), batch, train=what == "training"), list(loader.epoch(0))
            steps = (
                f"gives {len(batches)} of the {plan.steps} batches of an epoch of {what}, and says {loader.steps}"
            )
            need(len(batches) == loader.steps == plan.steps, steps)
            for images, labels in batches:
                given = (*images.shape, images.dtype, labels.dtype)
                wanted = (len(labels), 3, *size, torch.float32, torch.int64)
                words = f"gives batches {given} of images and labels for {what}: {wanted} is expected"
                need(given == wanted, words)
            seen, right = torch.cat([labels for _, labels in batches]), split.labels[plan.draw(0).index]
            need(seen.tolist() == right.tolist(), f"gives labels in another order than the plan's for {what}")
    return f"all batches of an epoch, float32 {(BATCH, 3, *size)}, with the plan's labels"


def fit_dataset(spec: RunSpec, dataset: Dataset, paths: RunPaths) -> str:
    """The same images when it is loaded again."""
    again = load_dataset(spec.dataset, paths.data_dir, paths.cache_dir).fingerprint
    need(again == dataset.fingerprint, "has other images each time that it is loaded")
    return f"{len(dataset.train):,} + {len(dataset.test):,} images, {dataset.num_classes} classes, twice the same"


FITS: dict[str, Callable[[RunSpec, Dataset, RunPaths], str]] = {
    "network": fit_network, "optimizer": fit_optimizer, "schedule": fit_schedule, "augmentation": fit_augmentation,
    "loader": fit_loader, "dataset": fit_dataset,
}  # fmt: skip


# --- `harness check my.py` ---

SIDE = 32  # pixels of the images that networks are tried on, or the least that they take
MOST_LR = 0.02  # a few steps on few images are no place for a large one
LIMIT = 1e-3  # of a relative difference of losses, and of pixels
SHORT: dict[str, Any] = {"duration": 1, "batch_size": 40, "batch_norm": "sync"}  # of two ranks, two steps
RANK_LR = 2e-3  # by batch norm on few images a rounding error grows with each step
RANK_SECONDS = 120.0


def check_plugin(loaded: Loaded, console: Console, data_dir: Path | None) -> Iterator[Result]:
    """Does each thing fit, is a resumed run exact; do two ranks, which have but a copy of the source, train as one does?"""
    torch.set_num_threads(os.cpu_count() or 1)
    bench, cases = checks.Bench(Worker(threads=torch.get_num_threads())), dict[tuple[str, str], dict[str, Any]]()
    for kind, name in loaded.owned:
        if kind == "variant" and ("network", name) in loaded.owned:
            continue  # they are one
        spec, side = _make_run(bench.worker, kind, name)
        changes: dict[str, Any] = {n: getattr(spec, n) for n in ("network", "recipe", "loader")} | {"size": side}
        what, blame = f"{kind} {name}", blaming(kind, name)
        trials = [(what, partial(_fit, kind, name, spec, side, console, data_dir), 0.0)]
        if kind != "dataset":
            short = replace(spec.recipe, **SHORT, lr=min(spec.recipe.lr, RANK_LR))
            cases[kind, name] = changes | {"recipe": short}
            trials.append((f"{what}, resume", partial(checks.check_resume, bench, **changes), 0.0))
        if kind == "loader":
            trials.append((f"{what}, plan", partial(checks.check_loader, bench, name), LIMIT))
        for title, trial, most in trials:
            result = attempt(title, blame(trial), limit=most)
            yield result
            if result.state == "failed":
                cases.pop((kind, name), None)
                break
    try:
        yield from _try_ranks(loaded.source, cases) if cases else ()
    except Exception as error:  # with the rank's traceback
        reason = str(error).strip().splitlines()[-1][:200]
        yield Result(f"{loaded.source.name}, in new processes", "failed", reason)


def _fit(kind: str, name: str, spec: RunSpec, side: int, console: Console, data_dir: Path | None) -> checks.Figure:
    of = ("network", spec.network.architecture) if kind == "variant" else (kind, name)
    paths = RunPaths(out=Path(), data_dir=find_data_dir(data_dir, spec.dataset))
    dataset = load_data(spec.dataset, paths, console) if spec.dataset in DATASETS else checks.make_dataset(side)
    return 0.0, try_out(*of, spec, dataset, paths)


def _make_run(worker: Worker, kind: str, name: str) -> tuple[RunSpec, int]:
    """A small run that uses it, and the side of its images."""
    spec = checks.make_spec(worker)
    if kind in ("network", "variant"):
        variant = find_variant(name)()  # type: ignore[call-arg]
        recipe, _ = override(variant.recipe, Grid(epochs=checks.EPOCHS, batch_size=checks.BATCH, val=0))
        recipe = replace(recipe, crop=None, scale_range=(), lr=min(recipe.lr, MOST_LR))
        side = max(SIDE, NETWORKS[variant.network.architecture].smallest_image)
        return replace(spec, variant=name, network=variant.network, recipe=recipe), side
    field: dict[str, Any] = {"augmentations": (name,)} if kind == "augmentation" else {kind: name}
    if kind not in ("loader", "dataset"):
        field = {"recipe": replace(spec.recipe, **field)}
    return replace(spec, **field), checks.SIZE


def _try_ranks(source: Source, cases: dict[tuple[str, str], dict[str, Any]]) -> list[Result]:
    """Do two ranks in new processes, which have but a copy of the source, train as one does? Raises what ends one of them."""
    with tempfile.TemporaryDirectory(prefix="harness-check-") as folder:
        nowhere, known = str(Path(folder, "nowhere")), sources()  # it may build on those before it
        copies = tuple(each if each.module and each != source else replace(each, folder=nowhere) for each in known)
        paths = RunPaths(out=Path(folder), cache_dir=Path(folder), plugins=copies)
        answers: Any = get_context("spawn").SimpleQueue()
        spawn(_compare_ranks, (source.folder, paths, cases, answers), nprocs=2)
        results: list[Result] = answers.get()
        return results


def _compare_ranks(
    rank: int, original: str, paths: RunPaths, cases: dict[Any, dict[str, Any]], answers: Any
) -> None:
    """One of the two: train on half of each batch, and compare with one rank alone."""
    sys.path.remove(original)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    load_sources([source.identity for source in paths.plugins], paths)
    store, bench = (paths.out / "store").as_uri(), checks.Bench(Worker(rank=rank, world_size=2))
    dist.init_process_group("gloo", store, timedelta(seconds=RANK_SECONDS), rank=rank, world_size=2)
    results = list[Result]()
    for (kind, name), changes in cases.items():
        trial: Any = blaming(kind, name)(partial(checks.check_ranks, bench, "eager", **changes))
        results.append(attempt(f"{kind} {name}, 2 ranks of a copy", trial, limit=LIMIT))
    if rank == 0:
        answers.put(results)
    dist.destroy_process_group()
