"""PyTorch's DataLoader with torchvision's transforms, image by image: the baseline everyone knows; and one batch of it."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional

from harness.loaders.datasets import Split
from harness.loaders.files import Corrupt, Files
from harness.loaders.resident import zoom
from harness.loaders.sampling import LoaderConfig, SamplingPlan, draw_cuts

OUTLAST_SECONDS = 30  # more than a command takes to stop after SIGTERM
Job = tuple[Any, ...]
"""Which image, whether it is flipped, and where it is cut: y and x of its crop and the side of the square that is resized
(or 0), or a box, to what that is resized, and y and x of the crop in it."""


class TorchLoader:
    """Follows the plan with `config.threads` - 1 worker processes; with two threads or fewer, none is fastest."""

    call_steps = 1

    def __init__(self, split: Split, plan: SamplingPlan, config: LoaderConfig) -> None:
        self.steps = plan.steps
        self._device = config.device
        self._batches = _Batches(split, plan)
        self._corrupt = Corrupt(split.images, config.warn) if isinstance(split.images, Files) else None
        workers = 0 if config.threads <= 2 else config.threads - 1
        self.calls_ahead = 2 * workers  # DataLoader's own
        self._loader: DataLoader[Any] = DataLoader(
            _Images(split, config), batch_sampler=self._batches, num_workers=workers,
            persistent_workers=workers > 0, pin_memory=config.device.type == "cuda", worker_init_fn=_outlast,
        )  # fmt: skip

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        self._batches.epoch, self._batches.first_step = epoch, first_step
        for images, labels, unreadable in self._loader:
            if self._corrupt and (bad := [index for index in unreadable.tolist() if index >= 0]):
                self._corrupt.add(bad)
            images = images.to(self._device, non_blocking=True, memory_format=torch.channels_last)
            yield images, labels.to(self._device, non_blocking=True)

    def close(self) -> None:
        self._loader = DataLoader(self._loader.dataset)  # worker processes end with the last reference to theirs


def _outlast(_: int) -> None:
    """In a worker process: where all processes of a job receive SIGTERM, the trainer still takes batches until it stops."""
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(OUTLAST_SECONDS))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # Ray's processes begin with it blocked


class SyntheticLoader:
    """One constant batch, epoch 0's first: what training costs when loading costs nothing. A last, smaller one is cut."""

    call_steps, calls_ahead = 1, 0

    def __init__(self, split: Split, plan: SamplingPlan, config: LoaderConfig) -> None:
        self.steps, self._sizes = plan.steps, plan.draw(0).batch_sizes
        self._images, self._labels = next(TorchLoader(split, plan, replace(config, threads=1)).epoch(0))

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for size in self._sizes[first_step:]:
            yield self._images[:size], self._labels[:size]

    def close(self) -> None:
        self._images = self._labels = torch.empty(0)


class _Batches:
    """The batch sampler: the plan's epoch from a step on, as lists of jobs."""

    def __init__(self, split: Split, plan: SamplingPlan) -> None:
        self._sizes, self._plan = split.sizes, plan
        self.epoch = self.first_step = 0

    def __iter__(self) -> Iterator[list[Job]]:
        draw = self._plan.draw(self.epoch)
        for step in range(self.first_step, self._plan.steps):
            part = draw.part(step, step + 1)
            side = np.zeros_like(part.index) if part.side is None else part.side
            where: Iterable[NDArray[Any]] = (*part.offset.T, side)
            if self._plan.size is None:
                where = draw_cuts(self._plan, self.epoch, part.index, self._sizes[part.index])
            yield list(zip(*(array.tolist() for array in (part.index, part.flip, *where)), strict=True))


class _Images(Dataset[tuple[Tensor, int, int]]):
    """Images by job, with their labels, and the number of one whose file is corrupt, else -1.

    A mean image is subtracted by hand, for torchvision normalises by colour only.
    """

    def __init__(self, split: Split, config: LoaderConfig) -> None:
        self._images, self._labels, self._augment = split.images, split.labels, config.augment
        self._by_image = config.augment.by_image(split)
        self._size = config.augment.crop_size(split)
        self._std: list[float] = config.normalize.std.tolist()
        self._mean = torch.from_numpy(config.normalize.mean)
        if self._mean.ndim == 3:
            self._mean = self._mean.permute(2, 0, 1)
            if self._augment.pad_mode != "zero":
                self._mean = self._pad(self._mean)

    def __getitem__(self, job: Job) -> tuple[Tensor, int, int]:
        index, flip, *where = job
        images = self._images
        pixels, bad = images.read_or_grey(index) if isinstance(images, Files) else (images[index], "")
        image = (self._cut if self._by_image else self._crop)(pixels, *where)
        return functional.horizontal_flip(image) if flip else image, int(self._labels[index]), index if bad else -1

    def _cut(self, pixels: NDArray[np.uint8], box: list[int], size: list[int], offset: list[int]) -> Tensor:
        y, x, height, width = box
        image = torch.from_numpy(pixels[y : y + height, x : x + width].copy()).permute(2, 0, 1)
        if [height, width] != size:
            image = functional.resize(image, size, antialias=True)
        return self._normalize(functional.crop(image, *offset, *self._size), self._mean)

    def _crop(self, pixels: NDArray[np.uint8], y: int, x: int, side: int) -> Tensor:
        image, mean = torch.from_numpy(pixels), self._mean
        if side:
            square = zoom(image[None], torch.tensor([[y, x]]), torch.tensor([side]), self._size[0])[0]
            return self._normalize(square.permute(2, 0, 1) / 255, mean)
        image = image.permute(2, 0, 1)
        if self._augment.pad_mode == "zero":  # after normalisation
            padded: Tensor = functional.crop(self._pad(self._normalize(image, mean)), y, x, *self._size)
            return padded
        mean = mean if mean.ndim == 1 else functional.crop(mean, y, x, *self._size)
        return self._normalize(functional.crop(self._pad(image), y, x, *self._size), mean)

    def _pad(self, image: Tensor) -> Tensor:
        pad, mode = self._augment.pad, self._augment.pad_mode
        if mode == "mean" and pad:  # torchvision has no such mode
            return torch.from_numpy(np.pad(image.numpy(), ((0, 0), (pad, pad), (pad, pad)), mode))
        known = "reflect" if mode == "reflect" else "constant"
        return functional.pad(image, [pad], padding_mode=known) if pad else image

    def _normalize(self, image: Tensor, mean: Tensor) -> Tensor:
        image = functional.to_dtype(image, torch.float32, scale=True)
        if mean.ndim == 3:
            image, mean = image - mean, torch.zeros(3)
        normalized: Tensor = functional.normalize(image, mean.tolist(), self._std)
        return normalized
