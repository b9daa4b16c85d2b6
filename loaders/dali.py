"""NVIDIA DALI: cropping, flipping and normalising in DALI's own threads, on the GPU or on the CPU.

One call makes many batches (a macrobatch), which are handed out as views by DLPack, without a copy. The plan's
numbers are fed in, so DALI draws nothing itself: its own uniform crop positions would favour the middle, and a run
could not be resumed from an epoch and a step alone.

Crop and flip are one affine map of whole pixels. DALI's crop takes its positions as arguments of each image and checks
all of them for every image: 2,730 images at once took 110 ms of the CPU on an H200, and 128 of them 0.9 ms.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from harness.loaders.datasets import Split
from harness.loaders.files import Corrupt, DataError, Files
from harness.loaders.resident import upload, zoom
from harness.loaders.sampling import EpochSample, LoaderConfig, SamplingPlan, draw_cuts, make_padded

dali: Any = import_module("nvidia.dali")  # its types would fail mypy --strict
fn: Any = import_module("nvidia.dali.fn")
types: Any = import_module("nvidia.dali.types")
os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # its parsers print what they cannot read
nvimgcodec: Any = import_module("nvidia.nvimgcodec")

FOR_DALI = ("jpeg", "png", "webp", "bmp")  # of which it makes PIL's pixels; not of every TIFF
GPU_MACROBATCH_MIB = 16  # of float32 output: few enough calls that their cost on the host is hidden
CPU_MACROBATCH_MIB = 1.5  # what stays in the caches: 128 images of CIFAR's size; larger ones were slower
PREFETCH = 2  # macrobatches made ahead


class DaliLoader:
    """Follows the plan on `config.device`. Epochs requested in turn are made ahead, across their ends too."""

    calls_ahead = PREFETCH
    _pixels: Any = None  # of images in memory. On the CPU an array, for DALI calls CUDA for any tensor

    def __init__(self, split: Split, plan: SamplingPlan, config: LoaderConfig) -> None:
        self.steps = plan.steps
        self._split, self._plan, self._config = split, plan, config
        self._on_gpu = config.device.type == "cuda"
        self._batch = -(-plan.batch_size // plan.world_size)
        self._size = config.augment.crop_size(split)
        target = GPU_MACROBATCH_MIB if self._on_gpu else CPU_MACROBATCH_MIB
        self.call_steps = max(1, int(target * 2**20 / (12 * self._size[0] * self._size[1] * self._batch)))
        self._prepare()
        if self._on_gpu and self._pixels is not None:
            self._pixels = torch.from_numpy(self._pixels).to(config.device)
        self._start((0, 0))

    def _prepare(self) -> None:
        """Make what the pipeline is fed from."""
        padded = make_padded(self._split, self._config.augment, self._config.normalize)
        self._pixels, self._mean, self._std = padded

    def _start(self, first: tuple[int, int]) -> None:
        """Build the pipeline anew, to begin with the macrobatch of that epoch and first step."""
        self._next = first  # of the macrobatch to be fed next
        self._fed: dict[int, tuple[int, int]] = {}  # the same of those fed, by the pipeline's count of runs
        self._runs = count()
        pipeline = dali.Pipeline(
            batch_size=self._batch * self.call_steps, num_threads=self._config.threads, prefetch_queue_depth=PREFETCH,
            device_id=torch.empty(0, device=self._config.device).device.index if self._on_gpu else None,
            exec_dynamic=True,  # its outputs stay valid for as long as they are referred to
        )  # fmt: skip
        with pipeline:
            self._define()
        pipeline.build()
        self._pipeline: Any = pipeline

    def _define(self) -> None:
        """Define the current pipeline: the same graph on every device.

        DALI copies what it is fed (`no_copy` is False), in order of the stream that wrote it, and waits for the copy. With
        `no_copy` it would read GPU memory on a stream of its own at once, whether or not it has been written.
        """
        device, mean = "gpu" if self._on_gpu else "cpu", self._mean
        images = fn.external_source(
            source=self._feed_pixels, device=device, no_copy=False, layout="HWC", ndim=3,
            dtype=types.FLOAT if self._config.augment.scale_range else types.UINT8,
        )  # fmt: skip
        maps = fn.external_source(source=self._feed_maps, dtype=types.FLOAT, ndim=2)
        if mean.ndim == 3:  # before the crop: exact, and faster than cropping image and mean alike
            images = images - types.Constant(mean, layout="HWC", device=device)
        self._crop(images, maps, mean if mean.ndim == 1 else np.zeros(3), self._std)

    def _crop(self, images: Any, maps: Any, mean: NDArray[Any], std: NDArray[Any]) -> None:
        """The end of the current pipeline; `maps` are those of `make_maps`."""
        crops = fn.warp_affine(images, maps, size=self._size, interp_type=types.INTERP_NN)
        output = fn.crop_mirror_normalize(
            crops, std=std.tolist(), mean=mean.tolist(), dtype=types.FLOAT, output_layout="HWC"
        )
        dali.Pipeline.current().set_outputs(output)

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
        for run in self._runs:
            output, made = self._run(), self._sample(run)
            if self._fed.pop(run) == wanted:
                break
        labels = upload(self._split.labels[made.index], self._config.device)
        return from_dlpack(output.as_tensor()).permute(0, 3, 1, 2), labels

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
        squares = zoom(torch.as_tensor(self._pixels)[index], offset, side, self._size[0])
        return squares if self._on_gpu else squares.numpy()

    def _feed_maps(self, run: int) -> NDArray[np.float32]:
        sample = self._sample(run)
        offset = sample.offset if sample.side is None else np.zeros_like(sample.offset)  # they are cropped already
        return make_maps(offset, sample.flip, self._size[1])


class CutLoader(DaliLoader):
    """Images that are each cut by their own size, from files, which DALI decodes, or from memory.

    A file that DALI cannot decode is decoded by PIL; a corrupt one is counted, and a grey image stands for it. Both are
    given to DALI as files of pixels, and the pipeline that failed is built anew.
    """

    def _prepare(self) -> None:
        self._threads = ThreadPoolExecutor(self._config.threads)
        self._read: dict[int, Iterator[list[tuple[bytes, str]]]] = {}  # by run, of those that are not fed yet
        self._by_pil: set[int] = set()
        if isinstance(images := self._split.images, Files):
            self._corrupt = Corrupt(images, self._config.warn)
            Image.init()  # not thread-safe on first use
        else:
            self._pixels = images

    def _define(self) -> None:
        """Fed with files or with images; what it is fed is copied here too."""
        device, normalize = "gpu" if self._on_gpu else "cpu", self._config.normalize
        start, shape, resized, maps = fn.external_source(
            source=self._feed_cuts, num_outputs=4, dtype=[types.INT32] * 2 + [types.FLOAT] * 2, ndim=[1, 1, 1, 2]
        )
        if isinstance(self._split.images, Files):
            images = fn.decoders.image_slice(
                fn.external_source(source=self._feed_files, dtype=types.UINT8, ndim=1), start, shape, axis_names="HW",
                device="mixed" if self._on_gpu else "cpu", output_type=types.RGB, adjust_orientation=False,
                jpeg_fancy_upsampling=True,  # as libjpeg and PIL do, on a GPU too
            )  # fmt: skip
        else:
            images = fn.external_source(
                source=self._feed_pixels, device=device, layout="HWC", ndim=3, dtype=types.UINT8
            )
            images = fn.slice(images, start=start, shape=shape, axis_names="HW")
        images = fn.resize(images, size=resized, interp_type=types.INTERP_LINEAR, antialias=True)
        self._crop(images, maps, normalize.mean * np.float32(255), normalize.std * np.float32(255))

    def close(self) -> None:
        super().close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _take(self, epoch: int, first: int) -> tuple[Tensor, Tensor]:
        try:
            return super()._take(epoch, first)
        except RuntimeError:
            images = self._split.images
            made = self._plan.draw(epoch).part(first, first + self.call_steps)
            by_dali = set(made.index.tolist()) - self._by_pil
            if not by_dali or not isinstance(images, Files):
                raise
            bad = {index for index in by_dali if images.check(index)}
            self._by_pil |= bad or by_dali  # PIL can what DALI cannot
            self._read.clear()
            self._start((epoch, first))
        return self._take(epoch, first)

    def _feed_files(self, run: int) -> list[NDArray[np.uint8]]:
        """Threads read those of the next run meanwhile."""
        for each in (run, run + 1):
            if each not in self._read:
                parts = np.array_split(self._sample(each).index, 4 * self._config.threads)
                self._read[each] = self._threads.map(lambda part: [*map(self._read_file, part.tolist())], parts)
        read = [file for part in self._read.pop(run) for file in part]
        self._corrupt.add(self._sample(run).index[[wrong != "" for _, wrong in read]].tolist())
        return [np.frombuffer(content, np.uint8) for content, _ in read]

    def _read_file(self, index: int) -> tuple[bytes, str]:
        """What DALI decodes, and what is wrong with the file, if anything is."""
        images = self._corrupt.files
        with suppress(OSError, DataError):
            content = images.content(index)
            if index not in self._by_pil and reads_header(content, images.sizes[index]):
                return content, ""
        pixels, wrong = images.read_or_grey(index)
        return b"P6 %d %d 255\n" % pixels.shape[1::-1] + pixels.tobytes(), wrong

    def _feed_cuts(self, run: int) -> tuple[NDArray[Any], ...]:
        """Box (where, its size), size after resizing, map of the crop."""
        sample = self._sample(run)
        epoch = self._fed[run][0]
        cuts = draw_cuts(self._plan, epoch, sample.index, self._split.sizes[sample.index])
        box, size = cuts.box.astype(np.int32), cuts.size.astype(np.float32, "C")  # strides are not for DALI
        return box[:, :2].copy(), box[:, 2:].copy(), size, make_maps(cuts.offset, sample.flip, self._size[1])


def reads_header(content: bytes, size: NDArray[np.int32]) -> bool:
    """Whether DALI can be given a file of this size. In a batch of 32 or more DALI 2.4 ends the process where it cannot read
    a header: so its parsers, which are nvImageCodec's, are asked before."""
    with suppress(RuntimeError, TypeError):  # of a header, of an unknown type
        stream = nvimgcodec.CodeStream(content)
        fits = (stream.height, stream.width) == tuple(size)
        return fits and stream.codec_name in FOR_DALI and stream.dtype == np.uint8
    return False


def make_maps(offset: NDArray[np.int64], flip: NDArray[np.bool_], width: int) -> NDArray[np.float32]:
    """offset (n, 2), y and x of crops of this width, and flip (n,) -> (n, 2, 3): from a crop's x and y to the image's.

    Coordinates of pixels' centres are halves, which float32 holds exactly: the nearest pixel is always the right one.
    """
    maps = np.zeros((len(flip), 2, 3), np.float32)
    maps[:, 0, 0] = 1 - 2 * flip
    maps[:, 0, 2] = offset[:, 1] + width * flip
    maps[:, 1, 1:] = np.stack([np.ones(len(flip)), offset[:, 0]], axis=1)
    return maps


def make_loader(split: Split, plan: SamplingPlan, config: LoaderConfig) -> DaliLoader:
    """The loader for the plan's kind of crops."""
    return (CutLoader if plan.size is None else DaliLoader)(split, plan, config)
