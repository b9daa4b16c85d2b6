"""PyTorch's DataLoader with torchvision's transforms, image by image: the baseline everyone knows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional

from harness.loaders.datasets import Split
from harness.loaders.resident import zoom
from harness.loaders.sampling import LoaderConfig, SamplingPlan

Job = tuple[int, int, int, bool, int]
"""Which image, y and x of its crop, whether it is flipped, side of the square that is resized or 0."""


class TorchLoader:
    """Follows the plan with `config.threads` - 1 worker processes; with two threads or fewer, none is fastest."""

    call_steps = 1

    def __init__(self, split: Split, plan: SamplingPlan, config: LoaderConfig) -> None:
        self.steps = plan.steps
        self._device = config.device
        self._batches = _Batches(plan)
        workers = 0 if config.threads <= 2 else config.threads - 1
        self.calls_ahead = 2 * workers  # DataLoader's own
        self._loader: DataLoader[tuple[Tensor, int]] = DataLoader(
            _Transformed(split, config), batch_sampler=self._batches, num_workers=workers,
            persistent_workers=workers > 0, pin_memory=config.device.type == "cuda",
        )  # fmt: skip

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        self._batches.epoch, self._batches.first_step = epoch, first_step
        for images, labels in self._loader:
            images = images.to(self._device, non_blocking=True, memory_format=torch.channels_last)
            yield images, labels.to(self._device, non_blocking=True)

    def close(self) -> None:
        self._loader = DataLoader(self._loader.dataset)  # worker processes end with the last reference to theirs


class _Batches:
    """The batch sampler: the plan's epoch from a step on, as lists of jobs."""

    def __init__(self, plan: SamplingPlan) -> None:
        self._plan = plan
        self.epoch = self.first_step = 0

    def __iter__(self) -> Iterator[list[Job]]:
        draw = self._plan.draw(self.epoch)
        for step in range(self.first_step, self._plan.steps):
            part = draw.part(step, step + 1)
            side = [0] * len(part.index) if part.side is None else part.side.tolist()
            yield list(zip(part.index.tolist(), *part.offset.T.tolist(), part.flip.tolist(), side, strict=True))

    def __len__(self) -> int:
        return self._plan.steps - self.first_step


class _Transformed(Dataset[tuple[Tensor, int]]):
    """Images by job. A mean image is subtracted by hand, for torchvision normalises by colour only."""

    def __init__(self, split: Split, config: LoaderConfig) -> None:
        self._images = torch.from_numpy(split.images).permute(0, 3, 1, 2)
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
