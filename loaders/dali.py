"""NVIDIA DALI: cropping, flipping and normalising in DALI's own threads, on the GPU or on the CPU.

One call makes many batches (a macrobatch), which are handed out as views by DLPack, without a copy. The plan's
numbers are fed in, so DALI draws nothing itself: its own uniform crop positions would favour the middle, and a run
could not be resumed from an epoch and a step alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from harness.loaders.datasets import Split
from harness.loaders.sampling import LoaderConfig, SamplingPlan, make_padded

dali: Any = import_module("nvidia.dali")  # its types would fail mypy --strict
fn: Any = import_module("nvidia.dali.fn")
types: Any = import_module("nvidia.dali.types")

GPU_MACROBATCH_MIB = 32  # of float32 output: few enough calls that their cost on the host is hidden
CPU_MACROBATCH_MIB = 1.5  # what stays in the caches: 128 images of CIFAR's size; larger ones were slower
PREFETCH = 2  # macrobatches made ahead


@dataclass(frozen=True, eq=False, slots=True)
class _Macrobatch:
    """What one run of the pipeline makes."""

    position: tuple[int, int]  # epoch, first step
    images: slice  # within the epoch's draw
    index: Any  # of those images in the split: a tensor on the GPU, else an array
    labels: Tensor


class DaliLoader:
    """Follows the plan on `config.device`. Epochs asked for in turn are made ahead, across their ends too."""

    def __init__(self, split: Split, plan: SamplingPlan, config: LoaderConfig) -> None:
        augment, device = config.augment, config.device
        pixels, mean, std = make_padded(split, augment, config.normalize)
        height, width = augment.crop_size(split)
        self._plan = plan
        self._device = device
        self._channels_last = config.channels_last
        self._span = np.maximum(augment.span(split), 1).astype(np.float32)
        self._pixels, self._labels = self._resident(pixels), self._resident(split.labels)
        batch = -(-plan.batch_size // plan.world_size)
        target = GPU_MACROBATCH_MIB if device.type == "cuda" else CPU_MACROBATCH_MIB
        self._steps_each = max(1, int(target * 2**20 / (12 * height * width * batch)))

        self._next = (0, 0)  # epoch and first step of the macrobatch to be fed next
        self._fed: dict[int, _Macrobatch] = {}  # by the pipeline's own count of runs
        self._runs = 0
        self._index: tuple[int, Any] = (-1, None)  # an epoch and its draw's index, where the images are
        self._kept: deque[Any] = deque(maxlen=PREFETCH + 3)  # DALI reads these buffers where they lie

        on = "gpu" if device.type == "cuda" else "cpu"
        pipeline = dali.Pipeline(
            batch_size=batch * self._steps_each,
            num_threads=config.threads,
            device_id=None if on == "cpu" else self._pixels.device.index,
            prefetch_queue_depth=PREFETCH,
            exec_dynamic=True,  # its outputs stay valid for as long as they are referred to
        )
        with pipeline:
            images = fn.external_source(
                source=self._feed_pixels, device=on, no_copy=True, layout="HWC", dtype=types.UINT8, ndim=3
            )
            y, x, flip = fn.external_source(
                source=self._feed_numbers,
                num_outputs=3,
                dtype=[types.FLOAT, types.FLOAT, types.INT32],
                ndim=0,
            )
            if mean.ndim == 3:  # before the crop: exact, and faster than cropping image and mean alike
                images = images - types.Constant(mean, layout="HWC", device=on)
            pipeline.set_outputs(
                fn.crop_mirror_normalize(
                    images,
                    crop=(height, width),
                    crop_pos_y=y,
                    crop_pos_x=x,
                    mirror=flip,
                    mean=mean.tolist() if mean.ndim == 1 else [0.0, 0.0, 0.0],
                    std=std.tolist(),
                    dtype=types.FLOAT,
                    output_layout="HWC" if config.channels_last else "CHW",
                )
            )
        pipeline.build()
        self._pipeline: Any = pipeline

    @property
    def steps(self) -> int:
        return self._plan.steps

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = epoch if self._plan.train else 0  # evaluations are all the same
        draw = self._plan.draw(epoch)
        for first in range(first_step - first_step % self._steps_each, self.steps, self._steps_each):
            last = min(first + self._steps_each, self.steps)
            images, labels = self._take(epoch, first)
            sizes = [end - begin for begin, end in (draw.batches(step, step + 1) for step in range(first, last))]
            batches = zip(images.split(sizes), labels.split(sizes), strict=True)
            for step, batch in enumerate(batches, first):
                if step >= first_step:
                    yield batch

    def close(self) -> None:
        """The pipeline ends with the last reference to it, and must do so before the CUDA context does."""
        self._pipeline = self._pixels = None
        self._fed.clear()
        self._kept.clear()

    def _take(self, epoch: int, first: int) -> tuple[Tensor, Tensor]:
        """The macrobatch that begins there. What was made ahead and is not wanted is dropped."""
        wanted = (epoch, first)
        if all(fed.position != wanted for fed in self._fed.values()):
            self._next = wanted
        while True:
            if self._device.type == "cuda":  # the output belongs to that stream, and waits for nothing here
                (images,) = self._pipeline.run(torch.cuda.current_stream(self._device))
            else:
                (images,) = self._pipeline.run()
            fed = self._fed.pop(self._runs)
            self._runs += 1
            if fed.position == wanted:
                made = from_dlpack(images.as_tensor())
                return made.permute(0, 3, 1, 2) if self._channels_last else made, fed.labels

    def _feed(self, run: int) -> _Macrobatch:
        """Fix what run number `run` makes, whichever of its inputs DALI asks for first."""
        if run not in self._fed:
            epoch, first = self._next
            last = min(first + self._steps_each, self.steps)
            draw = self._plan.draw(epoch)
            if self._index[0] != epoch:
                self._index = epoch, self._resident(draw.index)
            images = slice(*draw.batches(first, last))
            index = self._index[1][images]
            self._fed[run] = _Macrobatch((epoch, first), images, index, torch.as_tensor(self._labels[index]))
            self._next = (epoch, last) if last < self.steps else (epoch + self._plan.train, 0)
        return self._fed[run]

    def _feed_pixels(self, run: int) -> Any:
        pixels = self._pixels[self._feed(run).index]
        self._kept.append(pixels)
        return pixels

    def _feed_numbers(self, run: int) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int32]]:
        """Crop positions as DALI wants them, k / span: it rounds position * span, which gives back k."""
        fed = self._feed(run)
        draw = self._plan.draw(fed.position[0])
        y, x = (draw.offset[fed.images] / self._span).astype(np.float32).T.copy()
        return y, x, draw.flip[fed.images].astype(np.int32)

    def _resident(self, array: NDArray[Any]) -> Any:
        """On the GPU a tensor; on the CPU the array itself, for DALI would ask CUDA about any tensor."""
        return torch.from_numpy(array).to(self._device) if self._device.type == "cuda" else array
