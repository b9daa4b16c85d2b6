"""Whether what a run uses of plug-ins fits: shapes, gradients, determinism, the plan. On the CPU, on a few images.

python -m harness.training.fit RANK FOLDER      one of two ranks, for `harness check my.py`
"""

from __future__ import annotations

import json
import math
import pickle
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.cluster.job import Worker
from harness.loaders.datasets import Dataset, limit, load_dataset
from harness.models.build import build
from harness.models.variants import find_variant
from harness.plugins import blaming, load_sources, names_of, used_by
from harness.spec import RunPaths, RunSpec
from harness.training.augment import augment
from harness.training.optim import learning_rate, make_optimizer, total_steps
from harness.training.setup import Data, assemble
from harness.training.step import set_precision

if TYPE_CHECKING:
    from harness.loaders.loader import Loader

IMAGES, BATCH = 8, 16
MOMENTS = 50  # of a schedule
NAMED = 3  # parameters that a message names


class MisfitError(ValueError):
    """What is wrong with what a plug-in gives: words that follow its name."""


def check_fit(specs: Iterable[RunSpec], dataset: Dataset, paths: RunPaths) -> None:
    """Try all that these runs use of plug-ins. Raises PluginError, one line, for the first that does not fit."""
    done = set[tuple[Any, ...]]()
    for spec in specs:
        for kind, name in names_of(spec):
            case = (kind, name, spec.network if kind == "network" else spec.recipe)
            if used_by([(kind, name)]) and case not in done:
                done.add(case)
                try_out(kind, name, spec, dataset, paths)


def try_out(kind: str, name: str, spec: RunSpec, dataset: Dataset, paths: RunPaths) -> str:
    """Try one thing; what it came to. Raises PluginError."""
    with torch.random.fork_rng(devices=[]), blaming(kind, name):
        return FITS[kind](spec, dataset, paths)


def _build(spec: RunSpec, dataset: Dataset) -> nn.Module:
    torch.manual_seed(spec.seed)
    return build(spec.network, dataset.num_classes, spec.recipe.crop or dataset.image_size)


def _noise(spec: RunSpec, dataset: Dataset) -> Tensor:
    size = spec.recipe.crop or dataset.image_size
    noise = torch.randn(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
    return noise.contiguous(memory_format=torch.channels_last)


def fit_network(spec: RunSpec, dataset: Dataset, paths: RunPaths) -> str:
    """Logits of the right shape; a gradient for each parameter; the same from the same seed."""
    network, other = _build(spec, dataset), _build(spec, dataset)
    if not isinstance(network, nn.Module):
        raise MisfitError(f"gives {type(network).__name__}, and a torch.nn.Module is expected")
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if not named:
        raise MisfitError("has no parameters to train")
    if any(
        not torch.equal(a, b)
        for a, b in zip(network.state_dict().values(), other.state_dict().values(), strict=True)
    ):
        raise MisfitError("is another each time that it is made of one seed: let torch's generator alone draw")
    images, classes = _noise(spec, dataset), dataset.num_classes

    def forward() -> Tensor:
        torch.manual_seed(1)
        logits = network(images)
        if not isinstance(logits, Tensor) or logits.shape != (IMAGES, classes):
            what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise MisfitError(
                f"gives {what} for {IMAGES} images {tuple(images.shape[1:])} of {classes} classes: "
                f"{(IMAGES, classes)} is expected"
            )
        return logits

    logits = forward()
    F.cross_entropy(logits.float(), torch.arange(IMAGES) % classes).backward()
    missed = [name for name, p in named.items() if p.grad is None]
    if missed:
        more = f" and {len(missed) - NAMED} more" if len(missed) > NAMED else ""
        raise MisfitError(f"has parameters that no gradient reaches: {', '.join(missed[:NAMED])}{more}")
    with torch.no_grad():
        same = torch.equal(forward(), logits)
        network.eval()
        if not (same and torch.equal(forward(), forward())):
            raise MisfitError("gives other logits for the same images: let torch's generator alone draw")
    count = sum(p.numel() for p in named.values())
    return f"logits {(IMAGES, classes)}, {count:,} parameters, a gradient for each, the same of the same seed"


def fit_optimizer(spec: RunSpec, dataset: Dataset, paths: RunPaths) -> str:
    """It has every parameter, and changes it; the same each time."""
    ends = []
    for _ in range(2):
        network = _build(spec, dataset)
        optimizer: Any = make_optimizer(replace(spec.recipe, warmup=0), network)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise MisfitError(f"gives {type(optimizer).__name__}, and a torch.optim.Optimizer is expected")
        wanted = {p for p in network.parameters() if p.requires_grad}
        if missed := len(wanted - {p for group in optimizer.param_groups for p in group["params"]}):
            raise MisfitError(f"lacks {missed} of the {len(wanted)} parameters: it is given them as groups")
        before = [p.detach().clone() for p in wanted]
        for _ in range(2):
            for p in wanted:
                p.grad = torch.ones_like(p)
            optimizer.step()
        if all(torch.equal(p, old) for p, old in zip(wanted, before, strict=True)):
            raise MisfitError("changes no parameter in two steps")
        ends.append([p.detach() for p in network.parameters()])
    if any(not torch.equal(a, b) for a, b in zip(*ends, strict=True)):
        raise MisfitError("ends two equal steps with other parameters each time")
    return f"all {len(wanted)} parameters, and the same each time"


def fit_schedule(spec: RunSpec, dataset: Dataset, paths: RunPaths) -> str:
    """Finite factors from 0 up, the same each time."""
    recipe, per_epoch = spec.recipe, max(1, len(dataset.train) // spec.recipe.batch_size)
    last = max(1, total_steps(recipe, per_epoch) - 1)
    for step in sorted({last * n // MOMENTS for n in range(MOMENTS + 1)}):
        rates = [learning_rate(recipe, step, per_epoch) for _ in range(2)]
        if (
            not all(isinstance(r, float | int) and math.isfinite(r) and r >= 0 for r in rates)
            or rates[0] != rates[1]
        ):
            raise MisfitError(f"makes the lr of step {step} {rates[0]!r}, and then {rates[1]!r}: numbers from 0 up, a "
                              "function of the step alone, are expected")  # fmt: skip
    return f"factors from 0 up over {last + 1} steps"


def fit_augmentation(spec: RunSpec, dataset: Dataset, paths: RunPaths) -> str:
    """Images of the same shape, the same on one rank and on two, and the given ones left as they are."""
    images = _noise(spec, dataset)
    before = images.clone()

    def change(rank: int, ranks: int) -> Tensor:
        return augment(spec.recipe, images[rank::ranks].clone(), (rank, ranks), (0, 0, 0), IMAGES)

    whole = augment(spec.recipe, images, (0, 1), (0, 0, 0), IMAGES)
    if not torch.equal(images, before):
        raise MisfitError("changes the images it is given: it must return others")
    if not torch.equal(whole, change(0, 1)) or not torch.isfinite(whole).all():
        raise MisfitError(
            "gives other images each time, or infinite ones: all that is random must come from draws"
        )
    if any(not torch.allclose(change(rank, 2), whole[rank::2], atol=1e-5) for rank in (0, 1)):
        raise MisfitError("gives other images on two ranks: each image must depend on itself and its draws alone")
    return f"{tuple(whole.shape)}, the same on one rank and on two"


def fit_loader(spec: RunSpec, dataset: Dataset, paths: RunPaths) -> str:
    """All batches of an epoch, with the plan's labels, in training and in evaluation."""
    split = limit(dataset.train, min(len(dataset.train), 4 * BATCH + 5))
    recipe = replace(spec.recipe, batch_size=BATCH, val=0)
    small = replace(spec, network=find_variant("he2015")(8).network, recipe=recipe, device="cpu", precision="fp32")
    worker = Worker(threads=torch.get_num_threads())
    made = assemble(
        small, Data(split, split, split, "test"), worker, num_classes=dataset.num_classes, flip=dataset.flip
    )
    with closing(made):
        size = made.loader_config.augment.crop_size(split)
        for what, loader, batch_size in (
            ("training", made.train_loader, BATCH), ("evaluation", made.eval_loader, made.loader_config.eval_batch_size)
        ):  # fmt: skip
            _check_epoch(what, loader, split.labels, (batch_size, size, what == "training"))
    return f"all batches of an epoch, float32 {(BATCH, 3, *size)}, with the plan's labels"


def _check_epoch(what: str, loader: Loader, labels: Any, shape: tuple[int, tuple[int, int], bool]) -> None:
    from harness.loaders.sampling import SamplingPlan

    batch_size, size, train = shape
    plan = SamplingPlan(len(labels), batch_size, train=train)
    wanted, seen = labels[plan.draw(0).index], list[Tensor]()
    for images, own in loader.epoch(0):
        if images.shape != (len(own), 3, *size) or images.dtype != torch.float32 or own.dtype != torch.int64:
            raise MisfitError(
                f"gives images {tuple(images.shape)} {images.dtype} and labels {own.dtype} for {what}: float32 "
                f"{(len(own), 3, *size)} and int64 are expected"
            )
        seen.append(own.cpu())
    if len(seen) != plan.steps or loader.steps != plan.steps:
        raise MisfitError(
            f"gives {len(seen)} of the {plan.steps} batches of an epoch of {what}, and says {loader.steps}"
        )
    if not np.array_equal(torch.cat(seen).numpy(), wanted):
        raise MisfitError(f"gives labels in another order than the plan's for {what}")


def fit_dataset(spec: RunSpec, dataset: Dataset, paths: RunPaths) -> str:
    """The same images when it is loaded again."""
    if load_dataset(spec.dataset, paths.data_dir, paths.cache_dir).fingerprint != dataset.fingerprint:
        raise MisfitError("has other images each time that it is loaded")
    train, test = dataset.train, dataset.test
    return f"{len(train):,} + {len(test):,} images {train.images.shape[1:]} of {dataset.num_classes} classes, twice the same"


FITS: dict[str, Callable[[RunSpec, Dataset, RunPaths], str]] = {
    "network": fit_network, "optimizer": fit_optimizer, "schedule": fit_schedule, "augmentation": fit_augmentation,
    "loader": fit_loader, "dataset": fit_dataset,
}  # fmt: skip


def main(rank: str, folder: str) -> None:
    """One of two ranks: load the plug-ins from their copies, train on half of each batch, compare with one rank alone."""
    import torch.distributed as dist

    from harness.training import checks

    identities, paths, changes = pickle.loads((Path(folder) / "case.pickle").read_bytes())
    load_sources(identities, paths)
    set_precision("fp32")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=2)
    figure = checks.check_ranks(checks.Bench(Worker(rank=int(rank), world_size=2)), "eager", **changes)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(figure))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
