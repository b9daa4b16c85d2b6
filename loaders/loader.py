"""The `Loader` protocol, the table of loaders, and `make_loaders`, which makes one by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from harness.loaders.datasets import Split
from harness.loaders.sampling import Augment, LoaderConfig, SamplingPlan, draw_shares
from harness.words import unknown

if TYPE_CHECKING:
    import torch


class Loader(Protocol):
    """Batches of one rank, on its device."""

    steps: int  # batches of this rank in an epoch
    call_steps: int  # batches that are made by one call
    calls_ahead: int  # calls that are made before their batches are requested

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The epoch's batches from `first_step` on: images float32 (n, 3, H, W) and labels int64 (n,).

        Epochs may come in any order, and an iteration may be left early; continuing where the last one ended is
        fastest. On a GPU the tensors belong to the stream that was current when the batch was requested.
        """

    def close(self) -> None:
        """Free threads, processes and device memory."""


MakeLoader = Callable[[Split, SamplingPlan, LoaderConfig], Loader]


def _import(module: str, name: str, split: Split, plan: SamplingPlan, config: LoaderConfig) -> Loader:
    """Imported when it is used, so that DALI is loaded only then."""
    loader: Loader = getattr(import_module(f"harness.loaders.{module}"), name)(split, plan, config)
    return loader


LOADERS: dict[str, MakeLoader] = {
    "dali": partial(_import, "dali", "make_loader"),
    "resident": partial(_import, "resident", "ResidentLoader"),
    "dataloader": partial(_import, "dataloader", "TorchLoader"),
    "synthetic": partial(_import, "dataloader", "SyntheticLoader"),
}


def make_loaders(name: str, train_split: Split, eval_split: Split, config: LoaderConfig) -> tuple[Loader, Loader]:
    """The training loader and the evaluation loader of one rank.

    Raises ValueError: an unknown name, a crop larger than the padded image, fewer images than ranks.
    """
    check_crops(name, train_split, config.augment)
    plan = _make_plan(train_split, config, train=True)
    loader = LOADERS[name](train_split, plan, config)
    if config.mixup:
        loader = Mixing(loader, LOADERS[name](train_split, replace(plan, partner=True), config), plan, config)
    return loader, make_evaluation_loader(name, eval_split, config)


def check_crops(name: str, split: Split, augment: Augment, normalize: str = "imagenet") -> None:
    """Raise ValueError for an unknown loader, and where it cannot make such crops of these images."""
    if name not in LOADERS:
        raise ValueError(unknown("loader", name, LOADERS))
    augment.crop_size(split, normalize)
    if name == "resident" and augment.by_image(split):
        raise ValueError(
            "loader resident crops images of one size in memory, and cannot resize: use dali or dataloader"
        )


def make_evaluation_loader(name: str, split: Split, config: LoaderConfig) -> Loader:
    """Every image of `split` once over all ranks, in a fixed mixed order: the centre crop, never flipped.

    Where training images are scaled, the whole image at the crop's size in place of its centre.
    """
    augment, by_image = config.augment, config.augment.by_image(split)
    # The centre crop of the padded image is that of the image itself, so evaluation needs no padding.
    fits = by_image or augment.crop is None or augment.crop <= min(split.pixels.shape[1:3])
    config = replace(config, augment=replace(augment, pad=0 if fits else augment.pad, flip=False))
    if name == "synthetic":  # a bound for training only: an error is one of real images
        name = "dataloader" if by_image else "resident"
    check_crops(name, split, config.augment)
    return LOADERS[name](split, _make_plan(split, config, train=False), config)


def _make_plan(split: Split, config: LoaderConfig, *, train: bool) -> SamplingPlan:
    batch_size, augment = config.batch_size if train else config.eval_batch_size, config.augment
    size = None if augment.by_image(split) else split.size
    return SamplingPlan(len(split), batch_size, config.seed, config.rank, config.world_size, train, augment, size)


class Mixing:
    """A loader's images, each with a share of its partner: mixup over the whole training set.

    The partner has the same crop and the same flip, as if both had been mixed before.
    """

    def __init__(self, loader: Loader, partners: Loader, plan: SamplingPlan, config: LoaderConfig) -> None:
        self.steps, self.call_steps, self.calls_ahead = plan.steps, loader.call_steps, loader.calls_ahead
        self._loaders = loader, partners
        self._plan, self._config = plan, config

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        from harness.loaders.resident import upload

        shares = draw_shares(self._plan, epoch, self._config.mixup)
        size = self._plan.draw(epoch).batch_size
        pairs = zip(*(loader.epoch(epoch, first_step) for loader in self._loaders), strict=True)
        for step, ((images, labels), (partners, _)) in enumerate(pairs, first_step):
            share = upload(shares[step * size : (step + 1) * size], images.device)
            yield images.lerp(partners, share[:, None, None, None]), labels

    def close(self) -> None:
        for loader in self._loaders:
            loader.close()
