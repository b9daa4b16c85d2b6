"""PyTorch's DataLoader with torchvision's transforms, image by image: the baseline everyone knows; and one batch of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional

from harness.loaders.datasets import Split
from harness.loaders.files import Corrupt, DataError, Files
from harness.loaders.resident import ResidentLoader, zoom
from harness.loaders.sampling import LoaderConfig, SamplingPlan, draw_cuts

Job = tuple[int, int, int, bool, int]
"""Which image, y and x of its crop, whether it is flipped, side of the square that is resized or 0."""
CutJob = tuple[int, list[int], list[int], list[int], bool]
"""Which image, its box, to what that is resized, y and x of the crop in it, whether it is flipped."""


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
        images: Dataset[Any] = _Cut(split, config) if plan.cut else _Transformed(split, config)
        self._loader: DataLoader[Any] = DataLoader(
            images, batch_sampler=self._batches, num_workers=workers,
            persistent_workers=workers > 0, pin_memory=config.device.type == "cuda",
        )  # fmt: skip

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        self._batches.epoch, self._batches.first_step = epoch, first_step
        for images, labels, *unreadable in self._loader:
            if self._corrupt and (bad := [index for index in unreadable[0].tolist() if index >= 0]):
                self._corrupt.add(bad)
            images = images.to(self._device, non_blocking=True, memory_format=torch.channels_last)
            yield images, labels.to(self._device, non_blocking=True)

    def close(self) -> None:
        self._loader = DataLoader(self._loader.dataset)  # worker processes end with the last reference to theirs


class SyntheticLoader:
    """One constant batch, epoch 0's first: what training costs when loading costs nothing. A last, smaller one is cut."""

    call_steps, calls_ahead = 1, 0

    def __init__(self, split: Split, plan: SamplingPlan, config: LoaderConfig) -> None:
        self.steps = plan.steps
        sample = plan.draw(0)
        self._sizes, first = sample.batch_sizes, sample.part(0, 1).index
        if plan.cut:
            self._images, self._labels = next(TorchLoader(split, plan, replace(config, threads=1)).epoch(0))
            return
        few = split.take(first)
        once = replace(plan, images=len(few), batch_size=len(few), rank=0, world_size=1)
        self._images, self._labels = next(ResidentLoader(few, once, config).epoch(0))

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for size in self._sizes[first_step:]:
            yield self._images[:size], self._labels[:size]

    def close(self) -> None:
        self._images = self._labels = torch.empty(0)


class _Batches:
    """The batch sampler: the plan's epoch from a step on, as lists of jobs."""

    def __init__(self, split: Split, plan: SamplingPlan) -> None:
        self._split, self._plan = split, plan
        self.epoch = self.first_step = 0

    def __iter__(self) -> Iterator[list[Job] | list[CutJob]]:
        draw = self._plan.draw(self.epoch)
        for step in range(self.first_step, self._plan.steps):
            part = draw.part(step, step + 1)
            index, flip = part.index.tolist(), part.flip.tolist()
            if self._plan.cut:
                cuts = draw_cuts(self._plan, self.epoch, part.index, self._split.sizes(part.index))
                numbers = (array.tolist() for array in (cuts.box, cuts.size, cuts.offset))
                yield list(zip(index, *numbers, flip, strict=True))
            else:
                side = [0] * len(index) if part.side is None else part.side.tolist()
                yield list(zip(index, *part.offset.T.tolist(), flip, side, strict=True))

    def __len__(self) -> int:
        return self._plan.steps - self.first_step


class _Cut(Dataset[tuple[Tensor, int, int]]):
    """Images by job, each cut by its own size, with label and, where its file is corrupt, its number (else -1)."""

    def __init__(self, split: Split, config: LoaderConfig) -> None:
        self._images, self._labels = split.images, split.labels
        self._crop = config.augment.crop_size(split)
        self._mean, self._std = config.normalize.mean.tolist(), config.normalize.std.tolist()

    def __getitem__(self, job: CutJob) -> tuple[Tensor, int, int]:
        index, (y, x, *box), size, (top, left), flip = job
        pixels, unreadable = self._read(index)
        image = torch.from_numpy(pixels[y : y + box[0], x : x + box[1]].copy()).permute(2, 0, 1)
        if box != size:
            image = functional.resize(image, size, antialias=True)
        image = functional.to_dtype(functional.crop(image, top, left, *self._crop), torch.float32, scale=True)
        image = functional.normalize(image, self._mean, self._std)
        return functional.horizontal_flip(image) if flip else image, int(self._labels[index]), unreadable

    def _read(self, index: int) -> tuple[NDArray[np.uint8], int]:
        if not isinstance(self._images, Files):
            return self._images[index], -1
        try:
            return self._images.read(index), -1
        except DataError:
            return self._images.grey(index), index


class _Transformed(Dataset[tuple[Tensor, int]]):
    """Images by job. A mean image is subtracted by hand, for torchvision normalises by colour only."""

    def __init__(self, split: Split, config: LoaderConfig) -> None:
        self._images = torch.from_numpy(split.pixels).permute(0, 3, 1, 2)
        self._labels: list[int] = split.labels.tolist()
        self._augment = config.augment
        self._size = config.augment.crop_size(split)
        self._std: list[float] = config.normalize.std.tolist()
        self._normalize_first = config.augment.pad_mode == "zero"
        self._mean = torch.from_numpy(config.normalize.mean)
        if self._mean.ndim == 3:
            self._mean = self._mean.permute(2, 0, 1)
            if not self._normalize_first:
                self._mean = self._pad(self._mean)

    def __getitem__(self, job: Job) -> tuple[Tensor, int]:
        index, y, x, flip, side = job
        image, mean = self._images[index], self._mean
        if side:
            offset, size = torch.tensor([[y, x]]), self._size[0]
            square = zoom(image.permute(1, 2, 0)[None], offset, torch.tensor([side]), size)[0]
            image = self._normalize(square.permute(2, 0, 1) / 255, mean)
        elif self._normalize_first:
            image = functional.crop(self._pad(self._normalize(image, mean)), y, x, *self._size)
        else:
            mean = mean if mean.ndim == 1 else functional.crop(mean, y, x, *self._size)
            image = self._normalize(functional.crop(self._pad(image), y, x, *self._size), mean)
        return functional.horizontal_flip(image) if flip else image, self._labels[index]

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
