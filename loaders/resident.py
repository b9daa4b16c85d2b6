"""The whole set as one uint8 tensor on the device, cropped and flipped there by indexing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from harness.loaders.datasets import Split
from harness.loaders.sampling import EpochSample, LoaderConfig, SamplingPlan, make_padded

MACROBATCH_MIB = 64  # of float32 output, on a GPU: so few calls that their cost on the host does not show


class ResidentLoader:
    """Follows the plan on `config.device`. On a GPU many batches are made by one call and handed out as views of it."""

    calls_ahead = 0

    def __init__(self, split: Split, plan: SamplingPlan, config: LoaderConfig) -> None:
        pixels, mean, std = make_padded(split, config.augment, config.normalize)
        self.steps = plan.steps
        self._plan = plan
        self._device = device = config.device
        self._crop = config.augment.crop_size(split)
        self._pixels = torch.from_numpy(pixels).to(device)
        self._labels = torch.from_numpy(split.labels).to(device)
        row = mean if mean.ndim == 3 else np.tile(mean, self._crop[1])  # long rows are fast, triples slow
        self._mean = torch.from_numpy(np.ascontiguousarray(row)).to(device)
        self._std = torch.from_numpy(np.tile(std, self._crop[1])).to(device)
        batch_mib = 12 * self._crop[0] * self._crop[1] * plan.batch_size / plan.world_size / 2**20
        self.call_steps = 1 if device.type == "cpu" else max(1, int(MACROBATCH_MIB / batch_mib))

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        sample = self._plan.draw(epoch)
        for first in range(first_step, self.steps, self.call_steps):
            part = sample.part(first, first + self.call_steps)
            images, labels = self._make(part)
            yield from zip(images.split(part.batch_size), labels.split(part.batch_size), strict=True)

    def _make(self, part: EpochSample) -> tuple[Tensor, Tensor]:
        index, offset, flip = (upload(array, self._device) for array in (part.index, part.offset, part.flip))
        (height, width), mean = self._crop, self._mean
        if mean.ndim == 3:
            mean = crop(mean[None], torch.zeros_like(index), offset, flip, self._crop).flatten(2)
        if part.side is None:
            images = crop(self._pixels, index, offset, flip, self._crop).float()
        else:
            images = zoom(self._pixels[index], offset, upload(part.side, self._device), height)
            images = torch.where(flip[:, None, None, None], images.flip(2), images)
        images = images.flatten(2)  # rows of width * 3
        images = images.sub_(mean).div_(self._std).view(-1, height, width, 3)
        return images.permute(0, 3, 1, 2), self._labels[index]

    def close(self) -> None:
        self._pixels = self._labels = torch.empty(0)


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array on the device. On a GPU the host does not wait: PyTorch keeps the pinned copy until it is read."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def crop(images: Tensor, index: Tensor, offset: Tensor, flip: Tensor, size: tuple[int, int]) -> Tensor:
    """images (N, H, W, C), index (n,), offset (n, 2), flip (n,) -> (n, *size, C), new memory."""
    if images.device.type != "cpu":
        return crop_by_index(images, index, offset, flip, size)
    # Row by row from a view of all crops there are: four times faster than PyTorch's indexing.
    channels = images.shape[3]
    windows = sliding_window_view(images.flatten(2).numpy(), (size[0], size[1] * channels), axis=(1, 2))
    y, x = offset.numpy().T
    crops = windows[index.numpy(), y, x * channels].reshape(-1, *size, channels)
    crops[flip.numpy()] = crops[flip.numpy(), :, ::-1]
    return torch.from_numpy(crops)


def crop_by_index(images: Tensor, index: Tensor, offset: Tensor, flip: Tensor, size: tuple[int, int]) -> Tensor:
    """One kernel that reads every pixel where it lies; a flip is columns counted backwards."""
    rows = offset[:, :1] + torch.arange(size[0], device=images.device)
    columns = torch.arange(size[1], device=images.device)
    columns = offset[:, 1:] + torch.where(flip[:, None], size[1] - 1 - columns, columns)
    return images[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def zoom(images: Tensor, offset: Tensor, side: Tensor, size: int) -> Tensor:
    """The squares at `offset` (n, 2), of `side` (n,), resized to `size`: (n, H, W, C) -> float32 (n, size, size, C).

    Each new pixel is the mean over the area that it covers, as by OpenCV's INTER_AREA, but not rounded.
    """
    rows, columns = (_areas(offset[:, axis], side, images.shape[1 + axis], size) for axis in (0, 1))
    matmul = torch.backends.cuda.matmul
    tf32, matmul.allow_tf32 = matmul.allow_tf32, False  # the images are the same whatever a network's precision is
    squares = torch.einsum("nrh,nhwk->nrwk", rows, images.float())
    resized = torch.einsum("ncw,nrwk->nrck", columns, squares).contiguous()
    matmul.allow_tf32 = tf32
    return resized


def _areas(start: Tensor, side: Tensor, old: int, new: int) -> Tensor:
    """(n, new, old): the share of each old pixel in each new one."""
    step = (side.double() / new)[:, None, None]
    first = start[:, None, None] + step * torch.arange(new, device=start.device)[:, None]
    pixel = torch.arange(old, device=start.device)
    overlap = torch.minimum(first + step, pixel + 1) - torch.maximum(first, pixel)
    return (overlap.clamp(min=0) / step).float()
