"""How an epoch is sampled: order, crops, flips, padding and normalisation, for every loader alike.

An epoch's order, crop offsets and flips are a pure function of (seed, epoch). A loader only carries them out, so
any two loaders agree tensor by tensor, and any number of ranks trains on the same global batches.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from harness.loaders.datasets import Split
from harness.loaders.files import Files

if TYPE_CHECKING:
    import torch

PadMode = Literal["zero", "black", "reflect", "mean"]
NormalizeKind = Literal["pixel-mean", "channel-mean", "channel-mean-std", "imagenet", "imagenet-mean"]

EVALUATION_SEED = 20160627  # one mixed order for every run, so that batch statistics see mixed classes
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CONSTANT = ("imagenet", "imagenet-mean")  # kinds of normalisation for which no images are measured
ATTEMPTS = 10  # at a box of random area and aspect that fits into its image
NEON_MEAN = (126.80609131, 119.21331787, 104.41227722)  # of 0..255: what neon's batch writer stores for ImageNet


@dataclass(frozen=True, slots=True)
class Augment:
    """Pad by `pad` pixels on each side, crop at random, flip at random. The fields are a recipe's (models/variants.py)."""

    pad: int
    pad_mode: PadMode
    """black: zeros in the image; zero: in what normalisation makes of it. reflect: the image mirrored at its edge, which is
    not repeated. mean: the means of its own rows and columns, rounded (numpy.pad). A mean image is padded as the images are;
    so with one, black equals zero."""
    crop: int | None  # side in pixels; None: the image's own
    flip: bool
    scale_range: tuple[int, ...] = ()
    """An evaluated image is reduced to the crop, whole. The pixels are means over areas."""
    resize: int = 0
    area_range: tuple[float, ...] = ()  # as by arXiv:1409.4842
    aspect_range: tuple[float, ...] = (3 / 4, 4 / 3)

    def by_image(self, split: Split) -> bool:
        """Whether each image is cut by its own size: `draw_cuts`."""
        return bool(self.resize or self.area_range) or isinstance(split.images, Files)

    def crop_size(self, split: Split, normalize: str = "imagenet") -> tuple[int, int]:
        """Height and width of the output. Raises ValueError where the images need another recipe, `normalize` with it."""
        size, by_image, crop = split.size, self.by_image(split), self.crop or -(-self.resize * 7 // 8) or 32
        lacking = {
            "pad=0": by_image and self.pad, "scale_range=none": by_image and self.scale_range,
            f"crop={crop}": not self.crop and (self.resize or self.area_range or size is None),
            f"resize={crop * 8 // 7}": size is None and not self.resize,
            "normalize=imagenet": isinstance(split.images, Files) and normalize not in CONSTANT,
        }  # fmt: skip
        if needed := ", ".join(setting for setting, lacks in lacking.items() if lacks):
            sizes = [f"{width}x{height}" for height, width in (split.sizes.min(axis=0), split.sizes.max(axis=0))]
            images = f"images of {' to '.join(dict.fromkeys(sizes))} pixels"
            raise ValueError(f"{images}, which are cut one by one, need {needed}")
        for name, most in {"area_range": 1.0, "aspect_range": math.inf}.items() if by_image else ():
            if (value := getattr(self, name)) and not (len(value) == 2 and 0 < value[0] <= value[1] <= most):
                what = f"two rising numbers above 0{' and up to 1' * (most == 1)} are allowed"
                raise ValueError(f"{name}={value}: {what}")
        height, width = size or (self.resize, self.resize)
        if self.pad_mode == "reflect" and self.pad >= min(height, width):
            raise ValueError(f"padding of {self.pad} by reflection: {width}x{height} images are too small for it")
        if self.scale_range and (self.pad or height != width or not height <= min(self.scale_range)):
            least, most = self.scale_range
            what = "square ones, no padding, no reduction"
            raise ValueError(f"scales {least} to {most} of {width}x{height} images: {what}")
        if self.crop is None:
            return height, width
        shorter = (by_image and self.resize) or min(height, width)
        if not 0 < self.crop <= shorter + 2 * self.pad:
            images = f"images whose shorter side is {shorter}"
            images = images if by_image else f"{width}x{height} images padded by {self.pad}"
            raise ValueError(f"crop {self.crop} does not fit into {images}")
        return self.crop, self.crop


PLAIN = Augment(pad=0, pad_mode="zero", crop=None, flip=False)  # images as they are


def make_augment(recipe: object, *, flip: bool) -> Augment:
    """A recipe's; `flip`: whether images may be mirrored."""
    augment = Augment(*(getattr(recipe, field.name) for field in fields(Augment)))
    return replace(augment, flip=augment.flip and flip)


@dataclass(frozen=True, eq=False, slots=True)
class Normalize:
    """output = (image / 255 - mean) / std."""

    mean: NDArray[np.float32]  # (3,), or (H, W, 3): a mean image
    std: NDArray[np.float32]  # (3,)


def make_normalize(kind: NormalizeKind, train: Split) -> Normalize:
    """Measure the training images: their mean image, or their mean colour and its standard deviation.

    pixel-mean: arXiv:1512.03385, section 4.2. imagenet and imagenet-mean are constants, nothing is measured. Raises
    ValueError where the others cannot be.
    """
    check_normalize(kind, train)
    one = np.ones(3, np.float32)
    if kind == "imagenet":
        return Normalize(np.array(IMAGENET_MEAN, np.float32), np.array(IMAGENET_STD, np.float32))
    if kind == "imagenet-mean":
        return Normalize(np.array(NEON_MEAN, np.float32) / np.float32(255), one)
    total = train.pixels.sum(axis=0, dtype=np.int64)
    if kind == "pixel-mean":
        return Normalize((total / (255 * len(train))).astype(np.float32), one)
    pixels = len(train) * total.shape[0] * total.shape[1]
    mean, std = total.sum(axis=(0, 1)) / pixels, np.full(3, 255.0)
    if kind == "channel-mean-std":
        rows = train.pixels.reshape(len(train), -1)
        squares = np.einsum("np,np->p", rows, rows, dtype=np.int64).reshape(-1, 3).sum(axis=0)
        std = np.sqrt(squares / pixels - mean**2)
    if not std.all():
        raise ValueError("channel-mean-std: a channel has the same value in all training images")
    return Normalize((mean / 255).astype(np.float32), (std / 255).astype(np.float32))


def check_normalize(kind: NormalizeKind, train: Split, augment: Augment | None = None) -> None:
    """Raise ValueError where such a mean of these images cannot be taken, or cannot be subtracted from their crops."""
    if isinstance(train.images, Files) and kind not in CONSTANT:
        allowed = f"normalize={' and '.join(CONSTANT)} are allowed"
        raise ValueError(f"normalize={kind} measures images in memory; these stay in their files: {allowed}")
    if kind == "pixel-mean" and augment and (augment.by_image(train) or augment.scale_range):
        raise ValueError(f"normalize={kind} needs images that are not resized: all others are allowed")


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class LoaderConfig:
    """What the loaders of one rank need beside the images. Both batch sizes are global."""

    augment: Augment
    normalize: Normalize
    batch_size: int
    eval_batch_size: int
    device: torch.device
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    threads: int = 1  # of the CPU, that a loader may use
    mixup: float = 0.0  # alpha of mixup with a partner from the whole set; 0: the loader mixes nothing
    warn: Callable[[str], None] = warnings.warn  # of a corrupt file


@dataclass(frozen=True, eq=False, slots=True)
class EpochSample:
    """One rank's epoch, or a part of it: for each image which it is, where it is cropped, whether it is flipped."""

    index: NDArray[np.int64]  # (m,), into the split
    offset: NDArray[np.int64]  # (m, 2), y and x of the crop within the padded image
    flip: NDArray[np.bool_]  # (m,)
    side: NDArray[np.int64] | None  # (m,), of the square that is resized to the crop; None: nothing is resized
    batch_size: int  # images of each batch of this rank; the last batch may have fewer

    @property
    def batch_sizes(self) -> list[int]:
        """Images of each step."""
        images = range(0, len(self.index), self.batch_size)
        return [min(self.batch_size, len(self.index) - first) for first in images]

    def part(self, first: int, last: int) -> EpochSample:
        """Steps `first` to `last` (not included) of it, or to its end."""
        images = slice(first * self.batch_size, last * self.batch_size)
        side = None if self.side is None else self.side[images]
        return EpochSample(self.index[images], self.offset[images], self.flip[images], side, self.batch_size)


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """All randomness, as a pure function of (seed, epoch) and whatever the number of ranks.

    Global batch k is order[k * batch_size : (k + 1) * batch_size]; rank r takes every world_size-th image of it, from
    the r-th on. Training (`train`): a new order, offsets uniform over 0..span and fair flips every epoch; a last
    batch smaller than `world_size` is filled up from the epoch's start, so that no rank is without. Evaluation: one
    fixed mixed order, the centre crop, no flips, and every image exactly once over all ranks, so that a rank may
    have one step fewer than another.
    """

    images: int
    batch_size: int  # global
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    train: bool = True
    augment: Augment = PLAIN
    size: tuple[int, int] | None = None  # height and width of images; None: each is cut by its own (`draw_cuts`)
    partner: bool = False  # in place of each image another of the whole set, cropped and flipped as that one is

    def __post_init__(self) -> None:
        if min(self.images, self.batch_size) < self.world_size:
            what = f"{self.images} images in batches of {self.batch_size}"
            raise ValueError(f"{what} are fewer than one for each of {self.world_size} workers")

    @property
    def span(self) -> tuple[int, ...]:
        """Largest offset of the crop in the padded image, in y and x."""
        if self.size is None or self.augment.scale_range:
            return 0, 0
        return tuple(side + 2 * self.augment.pad - (self.augment.crop or side) for side in self.size)

    @property
    def steps(self) -> int:
        """Batches of this rank in an epoch."""
        whole, tail = divmod(self.images, self.batch_size)
        return whole + (tail > 0 if self.train else tail > self.rank)

    def draw(self, epoch: int) -> EpochSample:
        """This rank's share of the epoch, numbered from 0."""
        return _sample_epoch(self, epoch if self.train else 0)


@lru_cache(maxsize=4)
def _sample_epoch(plan: SamplingPlan, epoch: int) -> EpochSample:
    """Cached, because a loader asks again for each part of an epoch."""
    count, augment, (whole, _) = plan.images, plan.augment, plan.size or (0, 0)
    side = np.full(count, whole) if augment.scale_range else None
    if plan.train:
        generator = np.random.Generator(np.random.PCG64([plan.seed, epoch]))
        order = generator.permutation(count)
        offset = generator.integers(0, plan.span, (count, 2), endpoint=True)
        flip = generator.integers(0, 2, count, dtype=np.uint8).astype(bool) & augment.flip
        if augment.scale_range:  # as by neon 1.2: uniform over whole numbers, then the offset over those there are
            least, most = augment.scale_range
            side = (augment.crop or whole) * whole // generator.integers(least, most, count, endpoint=True)
            offset = generator.integers(0, whole - side[:, None], (count, 2), endpoint=True)
    else:
        order = np.random.Generator(np.random.PCG64(EVALUATION_SEED)).permutation(count)
        offset = np.full((count, 2), np.array(plan.span) // 2)
        flip = np.zeros(count, bool)
    if plan.size is None:  # by `draw_cuts`
        offset = np.zeros((count, 2), np.int8)
    body, last = np.split(order, [count - count % plan.batch_size])
    if plan.train and 0 < len(last) < plan.world_size:
        last = np.concatenate([last, order[: plan.world_size - len(last)]])
    shares = body.reshape(-1, plan.batch_size)[:, plan.rank :: plan.world_size]
    index = np.concatenate([shares.ravel(), last[plan.rank :: plan.world_size]])
    shown = draw_partners(plan, epoch)[index] if plan.partner else index
    return EpochSample(shown, offset[index], flip[index], None if side is None else side[index], shares.shape[1])


class Cuts(NamedTuple):
    """How images become crops: a box of each is resized, and the crop taken from that. All in whole pixels."""

    box: NDArray[np.int64]  # (n, 4): y, x, height, width, within the image
    size: NDArray[np.int64]  # (n, 2): height and width to which the box is resized
    offset: NDArray[np.int64]  # (n, 2): y and x of the crop within that


def draw_cuts(plan: SamplingPlan, epoch: int, index: NDArray[np.int64], sizes: NDArray[Any]) -> Cuts:
    """The cuts of some images of an epoch, of `sizes` (n, 2): for each a function of (seed, epoch, image) alone.

    As torchvision's RandomResizedCrop, or its Resize and a random or (evaluation) centre crop. The area's share is
    uniform and the logarithm of the aspect too; of ten draws the first counts that fits into the image, else the
    largest box in its middle.
    """
    cut, count, sizes = plan.augment, len(sizes), sizes.astype(np.int64)
    crop = np.array((cut.crop, cut.crop)) if cut.crop else sizes
    draws = np.full((count, 2 * ATTEMPTS + 2), 0.5)
    if plan.train:
        for row, image in zip(draws, index.tolist(), strict=True):
            np.random.Generator(np.random.PCG64([plan.seed, epoch, 3, image])).random(out=row)
    place = draws[:, -2:]
    if plan.train and cut.area_range:
        (least, most), (narrow, wide) = cut.area_range, cut.aspect_range
        pixels = sizes.prod(axis=1, keepdims=True) * (least + (most - least) * draws[:, :ATTEMPTS])
        ratio = np.exp(np.log(narrow) + (np.log(wide) - np.log(narrow)) * draws[:, ATTEMPTS:-2])
        tried = np.rint(np.sqrt(np.stack([pixels / ratio, pixels * ratio], axis=2))).astype(np.int64)
        fits = ((tried > 0) & (tried <= sizes[:, None])).all(axis=2)
        any_fits = fits.any(axis=1, keepdims=True)
        height, width = sizes.T
        whole = [np.minimum(height, np.rint(width / narrow)), np.minimum(width, np.rint(height * wide))]
        found = tried[np.arange(count), fits.argmax(axis=1)]
        box = np.where(any_fits, found, np.stack(whole, axis=1).astype(np.int64))
        start = np.floor(np.where(any_fits, place, 0.5) * (sizes - box + 1)).astype(np.int64)
        return Cuts(np.hstack([start, box]), np.broadcast_to(crop, (count, 2)), np.zeros((count, 2), np.int64))
    size = cut.resize * sizes // sizes.min(axis=1, keepdims=True) if cut.resize else sizes
    span = size - crop
    offset = np.floor(place * (span + 1)) if plan.train else np.rint(span / 2)
    return Cuts(np.hstack([np.zeros_like(sizes), sizes]), size, offset.astype(np.int64))


def draw_partners(plan: SamplingPlan, epoch: int) -> NDArray[np.int64]:
    """(images,): which image each one is mixed with."""
    return np.random.Generator(np.random.PCG64([plan.seed, epoch, 1])).permutation(plan.images)


def draw_shares(plan: SamplingPlan, epoch: int, alpha: float) -> NDArray[np.float32]:
    """The partner's share in each image of this rank's epoch: at most a half, so that the label stays.

    min(l, 1 - l), l ~ Beta(alpha + 1, alpha), as in iamVarunAnand/image_classification.
    """
    share = np.random.Generator(np.random.PCG64([plan.seed, epoch, 2])).beta(alpha + 1, alpha, plan.images)
    return np.minimum(share, 1 - share).astype(np.float32)[replace(plan, partner=False).draw(epoch).index]


def make_padded(
    split: Split, augment: Augment, normalize: Normalize
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """(pixels, mean, std) in units of 0..255, such that output = (crop(pixels) - crop(mean)) / std, then the flip.

    pixels (N, H + 2 pad, W + 2 pad, 3), without padding the split's own array; std (3,); mean (3,) where it is
    the same everywhere, else (H + 2 pad, W + 2 pad, 3).
    """
    pixels, mean = split.pixels, normalize.mean * np.float32(255)
    if augment.pad:
        mode: Any = augment.pad_mode if augment.pad_mode in ("reflect", "mean") else "constant"
        border = ((augment.pad, augment.pad), (augment.pad, augment.pad), (0, 0))
        pixels = np.pad(pixels, ((0, 0), *border), mode)
        if augment.pad_mode == "zero":  # the mean is zero there too, so that the difference is
            mean = np.broadcast_to(mean, split.pixels.shape[1:])
        if mean.ndim == 3:
            mean = np.pad(mean, border, mode)
    return pixels, mean, normalize.std * np.float32(255)
