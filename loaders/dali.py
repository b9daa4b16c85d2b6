"""NVIDIA DALI: cropping, flipping and normalising in DALI's own threads, on the GPU or on the CPU.

One call makes many batches (a macrobatch), which are handed out as views by DLPack, without a copy. The plan's
numbers are fed in, so DALI draws nothing itself: its own uniform crop positions would favour the middle, and a run
could not be resumed from an epoch and a step alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from harness.loaders.datasets import Split
from harness.loaders.resident import upload, zoom
from harness.loaders.sampling import EpochSample, LoaderConfig, SamplingPlan, make_padded

dali: Any = import_module("nvidia.dali")  # its types would fail mypy --strict
fn: Any = import_module("nvidia.dali.fn")
types: Any = import_module("nvidia.dali.types")

GPU_MACROBATCH_MIB = 32  # of float32 output: few enough calls that their cost on the host is hidden
CPU_MACROBATCH_MIB = 1.5  # what stays in the caches: 128 images of CIFAR's size; larger ones were slower
PREFETCH = 2  # macrobatches made ahead


class DaliLoader:
    """Follows the plan on `config.device`. Epochs requested in turn are made ahead, across their ends too."""

    calls_ahead = PREFETCH

    def __init__(self, split: Split, plan: SamplingPlan, config: LoaderConfig) -> None:
        pixels, mean, std = make_padded(split, config.augment, config.normalize)
        self.steps = plan.steps
        self._plan = plan
        self._config = config
        self._span = np.maximum(config.augment.span(split), 1).astype(np.float32)
        self._labels = split.labels
        self._on_gpu = config.device.type == "cuda"
        # On the CPU an array, for DALI calls CUDA for any tensor.
        self._pixels: Any = torch.from_numpy(pixels).to(config.device) if self._on_gpu else pixels
        batch = -(-plan.batch_size // plan.world_size)
        height, width = config.augment.crop_size(split)
        target = GPU_MACROBATCH_MIB if self._on_gpu else CPU_MACROBATCH_MIB
        self.call_steps = max(1, int(target * 2**20 / (12 * height * width * batch)))

        self._next = (0, 0)  # epoch and first step of the macrobatch to be fed next
        self._fed: dict[int, tuple[int, int]] = {}  # the same of those fed, by the pipeline's count of runs
        self._runs = 0
        pipeline = dali.Pipeline(
            batch_size=batch * self.call_steps, num_threads=config.threads, prefetch_queue_depth=PREFETCH,
            device_id=self._pixels.device.index if self._on_gpu else None,
            exec_dynamic=True,  # its outputs stay valid for as long as they are referred to
        )  # fmt: skip
        with pipeline:
            define(config, (height, width), mean, std, self._feed_pixels, self._feed_numbers)
        pipeline.build()
        self._pipeline: Any = pipeline

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = epoch if self._plan.train else 0  # evaluations are all the same
        size = self._plan.draw(epoch).batch_size
        for first in range(first_step - first_step % self.call_steps, self.steps, self.call_steps):
            images, labels = self._take(epoch, first)
            batches = zip(images.split(size), labels.split(size), strict=True)
            yield from islice(batches, max(0, first_step - first), None)

    def close(self) -> None:
        """The pipeline ends with the last reference to it, and must do so before the CUDA context does."""
        self._pipeline = self._pixels = None
        self._fed.clear()

    def _take(self, epoch: int, first: int) -> tuple[Tensor, Tensor]:
        """The macrobatch that begins there. What was made ahead and is not wanted is dropped."""
        wanted = (epoch, first)
        if wanted not in self._fed.values():
            self._next = wanted
        while True:
            output, made = self._run(), self._sample(self._runs)
            self._runs += 1
            if self._fed.pop(self._runs - 1) == wanted:
                break
        images, labels = from_dlpack(output.as_tensor()), upload(self._labels[made.index], self._config.device)
        return images.permute(0, 3, 1, 2), labels

    def _run(self) -> Any:
        """The output belongs to the current stream, which waits for it; the host does not."""
        if not self._on_gpu:
            return self._pipeline.run()[0]
        with torch.cuda.device(self._config.device):  # of its current stream DALI reads what it is fed
            return self._pipeline.run(torch.cuda.current_stream())[0]

    def _sample(self, run: int) -> EpochSample:
        """What run number `run` makes, fixed when DALI requests the first of its inputs."""
        if run not in self._fed:
            self._fed[run] = epoch, first = self._next
            last = first + self.call_steps
            self._next = (epoch, last) if last < self.steps else (epoch + self._plan.train, 0)
        epoch, first = self._fed[run]
        return self._plan.draw(epoch).part(first, first + self.call_steps)

    def _feed_pixels(self, run: int) -> Any:
        sample = self._sample(run)
        if sample.side is None:
            return self._pixels[upload(sample.index, self._config.device) if self._on_gpu else sample.index]
        index, offset, side = (upload(a, self._config.device) for a in (sample.index, sample.offset, sample.side))
        squares = zoom(torch.as_tensor(self._pixels)[index], offset, side, self._config.augment.crop or 0)
        return squares if self._on_gpu else squares.numpy()

    def _feed_numbers(self, run: int) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int32]]:
        """Crop positions as DALI wants them, k / span: it rounds position * span, which gives back k."""
        sample = self._sample(run)
        offset = sample.offset if sample.side is None else np.zeros_like(sample.offset)  # they are cropped already
        y, x = (offset / self._span).astype(np.float32).T.copy()
        return y, x, sample.flip.astype(np.int32)


def define(
    config: LoaderConfig, size: tuple[int, int], mean: NDArray[np.float32], std: NDArray[np.float32],
    feed_pixels: Callable[[int], Any], feed_numbers: Callable[[int], Any],
) -> None:  # fmt: skip
    """Define the current pipeline: the same graph on every device.

    DALI copies what it is fed (`no_copy` is False), in order of the stream that wrote it, and waits for the copy. With
    `no_copy` it would read GPU memory on a stream of its own at once, whether or not it has been written.
    """
    device = "gpu" if config.device.type == "cuda" else "cpu"
    images = fn.external_source(
        source=feed_pixels, device=device, no_copy=False, layout="HWC", ndim=3,
        dtype=types.FLOAT if config.augment.scale_range else types.UINT8,
    )  # fmt: skip
    y, x, flip = fn.external_source(
        source=feed_numbers, num_outputs=3, dtype=[types.FLOAT, types.FLOAT, types.INT32], ndim=0
    )
    if mean.ndim == 3:  # before the crop: exact, and faster than cropping image and mean alike
        images = images - types.Constant(mean, layout="HWC", device=device)
    output = fn.crop_mirror_normalize(
        images, crop=size, crop_pos_y=y, crop_pos_x=x, mirror=flip, std=std.tolist(),
        mean=mean.tolist() if mean.ndim == 1 else [0.0, 0.0, 0.0], dtype=types.FLOAT, output_layout="HWC",
    )  # fmt: skip
    dali.Pipeline.current().set_outputs(output)
