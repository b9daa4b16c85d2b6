"""All variants, as plain data: the network, the recipe that trains it, and where both come from.

THE place to add one. A variant is a function of depth that returns a `Variant`; put its name into `VARIANTS`
at the end of this file and the command line, the plan, the tests and the tables follow. No torch here.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Unit = Literal["epoch", "step"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """An architecture: `models.resnet.build(network, num_classes)` makes the module.

    Two networks with equal fields are the same function of their weights.
    """

    depth: int
    architecture: Literal["cifar"] = "cifar"
    shortcut: Literal["A", "identity-conv"] = "A"
    """At a change of width. A: subsample, zero-pad channels, no parameters (arXiv:1512.03385, section 4.2).
    identity-conv: 1x1 convolution of stride 2 that starts as the identity (apark263/cfmz)."""
    head_batch_norm: bool = False
    """Batch norm on the output of the final affine layer (apark263/cfmz)."""
    batch_norm_eps: float = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a network is trained. `duration`, `milestones` and `warmup` are all counted in `unit`."""

    duration: float
    unit: Unit = "epoch"
    batch_size: int = 128  # global, whatever the number of workers
    lr: float = 0.1
    schedule: Literal["multistep", "cosine", "linear"] = "multistep"
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    warmup: float = 0
    warmup_lr: float = 0.0
    warmup_shape: Literal["constant", "linear"] = "constant"  # constant at warmup_lr, or a line from it to lr
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay: Literal["all", "kernels"] = "all"  # kernels: convolution and affine weights, no biases, no batch norm
    label_smoothing: float = 0.0
    mixup: float = 0.0  # alpha; 0 is off
    normalize: Literal["pixel-mean", "channel-mean", "channel-mean-std", "imagenet"] = "pixel-mean"
    """What is subtracted from an image of range 0..1, and what it is divided by: the training set's mean
    image, its mean colour, its mean colour and standard deviation, or ImageNet's colours."""
    pad: int = 4
    pad_mode: Literal["zero", "black", "reflect"] = "zero"  # zero: after normalisation; black: before it
    crop: int | None = None  # side of the random crop; None: the image's own
    flip: bool = True
    val: int = 0  # training images held out, and evaluated in place of the test set


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A named pair of network and recipe at one depth."""

    name: str
    network: Network
    recipe: Recipe
    source: str
    summary: str


VariantFunction = Callable[[int], Variant]


def check_depth(depth: int, *, multiple: int, offset: int = 2) -> None:
    """Raise ValueError unless depth is multiple * n + offset for a positive n."""
    n = (depth - offset) / multiple
    if n < 1 or n != int(n):
        below = max(1, int(n)) * multiple + offset
        raise ValueError(f"depth {depth} is not {multiple}n+{offset}: try {below} or {below + multiple}")


def he2015(depth: int = 20) -> Variant:
    """The paper's CIFAR-10 network: arXiv:1512.03385, section 4.2."""
    check_depth(depth, multiple=6)
    return Variant(
        name="he2015",
        network=Network(depth=depth),
        recipe=Recipe(
            duration=64_000,
            unit="step",
            milestones=(32_000, 48_000),
            # the paper: 0.01 until the training error is below 80 %, "about 400 iterations", at depth 110
            warmup=400 if depth >= 110 else 0,
            warmup_lr=0.01 if depth >= 110 else 0.0,
        ),
        source="arXiv:1512.03385 section 4.2",
        summary="64k steps, lr 0.1 dropped at 32k and 48k, option A shortcuts",
    )


def msra(depth: int = 20) -> Variant:
    """apark263/cfmz, written for neon: batch norm on the output, projections that start as the identity.

    Its images are bytes less the mean colour, of range 255 where ours is 1; the batch norm after the stem
    makes the two equal. Its border is each image's own row and column means, ours the mean colour.
    """
    check_depth(depth, multiple=6)
    return Variant(
        name="msra",
        network=Network(
            depth=depth,
            shortcut="identity-conv",
            head_batch_norm=True,
            batch_norm_eps=1e-3,  # neon's
        ),
        recipe=Recipe(duration=180, milestones=(90, 135), normalize="channel-mean"),
        source="github.com/apark263/cfmz",
        summary="180 epochs, lr 0.1 dropped at 90 and 135, batch norm on the output",
    )


VARIANTS: tuple[VariantFunction, ...] = (he2015, msra)


def default_depth(function: VariantFunction) -> int:
    """The depth that a variant has when none is asked for."""
    default: int = inspect.signature(function).parameters["depth"].default
    return default


def variant_names() -> tuple[str, ...]:
    """Every name, in the order of `VARIANTS`."""
    return tuple(_BY_NAME)


def find_variant(name: str) -> VariantFunction:
    """The variant of that name. Raises ValueError where there is none."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    close = difflib.get_close_matches(name, _BY_NAME, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(_BY_NAME)}"
    raise ValueError(f"unknown variant {name!r}: {hint}")


_BY_NAME = {function(default_depth(function)).name: function for function in VARIANTS}
