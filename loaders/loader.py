"""The `Loader` protocol, the names of the loaders, and `make_loaders`, which makes one by its name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from harness.loaders.datasets import Split
from harness.loaders.sampling import LoaderConfig, SamplingPlan

if TYPE_CHECKING:
    import torch

LOADERS: tuple[str, ...] = ("dali", "resident", "dataloader", "synthetic")


class Loader(Protocol):
    """Batches of one rank, on its device."""

    @property
    def steps(self) -> int:
        """Batches of this rank in an epoch."""

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The epoch's batches from `first_step` on: images float32 (n, 3, H, W) and labels int64 (n,).

        Epochs may come in any order, and an iteration may be left early; continuing where the last one ended is
        fastest. On a GPU the tensors belong to the stream that was current when the batch was requested.
        """

    def close(self) -> None:
        """Free threads, processes and device memory."""


MakeLoader = Callable[[Split, SamplingPlan, LoaderConfig], Loader]


def check_loader_name(name: str) -> None:
    """Raise ValueError unless `make_loaders` knows the name."""
    if name not in LOADERS:
        close = difflib.get_close_matches(name, LOADERS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown loader {name!r}: {hint}allowed are {', '.join(LOADERS)}")


def make_loaders(name: str, train_split: Split, eval_split: Split, config: LoaderConfig) -> tuple[Loader, Loader]:
    """The training loader and the evaluation loader of one rank.

    Raises ValueError: an unknown name, a crop larger than the padded image, fewer images than ranks.
    """
    check_loader_name(name)
    make, _ = _loader_types(name)
    plan = SamplingPlan(
        len(train_split),
        config.batch_size,
        config.augment.span(train_split),
        config.augment.flip,
        config.seed,
        config.rank,
        config.world_size,
    )
    return make(train_split, plan, config), make_evaluation_loader(name, eval_split, config)


def make_evaluation_loader(name: str, split: Split, config: LoaderConfig) -> Loader:
    """Every image of `split` once over all ranks, in a fixed mixed order: the centre crop, never flipped."""
    check_loader_name(name)
    augment = config.augment
    # The centre crop of the padded image is that of the image itself, so evaluation needs no padding.
    fits = augment.crop is None or augment.crop <= min(split.images.shape[1:3])
    centre = replace(augment, pad=0 if fits else augment.pad, flip=False)
    plan = SamplingPlan(
        len(split),
        config.eval_batch_size,
        centre.span(split),
        rank=config.rank,
        world_size=config.world_size,
        train=False,
    )
    _, make = _loader_types(name)
    return make(split, plan, replace(config, augment=centre))


def _loader_types(name: str) -> tuple[MakeLoader, MakeLoader]:
    """For training and for evaluation. Imported here, so that DALI is loaded only where it is used."""
    if name == "dali":
        from harness.loaders.dali import DaliLoader

        return DaliLoader, DaliLoader
    if name == "dataloader":
        from harness.loaders.dataloader import TorchLoader

        return TorchLoader, TorchLoader
    from harness.loaders.resident import ResidentLoader

    if name == "resident":
        return ResidentLoader, ResidentLoader
    from harness.loaders.synthetic import SyntheticLoader

    return SyntheticLoader, ResidentLoader  # a bound for training; evaluation still sees every real image
