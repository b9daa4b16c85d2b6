"""All variants, as plain data: the network, the recipe that trains it, and where both come from.

THE place to add one. A variant is a function of depth that returns a `Variant`; put its name into `VARIANTS`
at the end of this file and the command line, the plan, the tests and the tables follow. No torch here.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Literal

Unit = Literal["epoch", "step"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """An architecture: `harness.models.build.build(network, num_classes)` makes the module.

    Two networks with equal fields are the same function of their weights.
    """

    depth: int
    architecture: Literal["cifar", "imagenet", "convnet", "xresnet"] = "cifar"
    block: Literal["basic", "preact", "late-stride", "bottleneck"] = "basic"
    """preact: full pre-activation (arXiv:1603.05027, figure 4(e)). late-stride: a stage's last block does what
    the next stage's first should (fattorib/ResNets-CIFAR10). bottleneck: 1x1, 3x3, 1x1."""
    shortcut: Literal["A", "identity-conv", "projection"] = "A"
    """At a change of width. A: subsample, zero-pad channels, no parameters (arXiv:1512.03385, section 4.2).
    identity-conv: 1x1 convolution of stride 2 that starts as the identity (apark263/cfmz). projection: what
    the architecture has, a 1x1 convolution with whatever stands around it."""
    head_batch_norm: bool = False
    """Batch norm on the output of the final affine layer (apark263/cfmz)."""
    batch_norm_eps: float = 1e-5
    activation: Literal["relu", "mish"] = "relu"
    squeeze_ratio: int = 0
    """Squeeze-and-excitation: width over squeezed width (arXiv:1709.01507); 0 is without."""
    cardinality: int = 1
    """Groups of a bottleneck's 3x3 convolution (arXiv:1611.05431)."""
    group_width: int = 0
    """Width of one of those groups in the first stage."""


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
    decay: Literal["all", "kernels", "kernels-but-squeeze"] = "all"
    """What has weight decay. kernels: convolution and affine weights, no biases, no batch norm; -but-squeeze: nor the
    weights of squeeze-and-excitation."""
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
    val_stratified: bool = False  # held out in equal shares of every class
    batch_norm: Literal["local", "sync"] = field(default="local", metadata={"added": True})
    """Whose images a training batch's statistics are of: each worker's own, as under DDP, or all workers'."""


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


def check_listed_depth(depth: int, depths: Collection[int]) -> None:
    """Raise ValueError unless depth is one of those."""
    if depth not in depths:
        raise ValueError(f"depth {depth} is none of {', '.join(map(str, depths))}")


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


def preact(depth: int = 20) -> Variant:
    """Full pre-activation: arXiv:1603.05027, figure 4(e)."""
    return replace(
        he2015(depth),
        name="preact",
        network=Network(depth=depth, block="preact"),
        source="arXiv:1603.05027 figure 4(e)",
        summary="he2015 with batch norm and ReLU before each convolution",
    )


def fattorib(depth: int = 20) -> Variant:
    """fattorib/ResNets-CIFAR10: its own network and split; it trained depths 20, 32, 44 and 56.

    It tests (epoch % 90) and (epoch % 135) to drop, so that its 200 epochs have a third drop at 180.
    """
    check_depth(depth, multiple=6)
    longer = depth in (44, 56)
    deep = depth >= 110  # not trained by its author: the paper's warm-up, about 400 steps
    return Variant(
        name="fattorib",
        network=Network(depth=depth, block="late-stride"),
        recipe=Recipe(
            duration=200 if longer else 180,
            milestones=(90, 135, 180) if longer else (90, 135),
            warmup=1 if deep else 0,
            warmup_lr=0.01 if deep else 0.0,
            normalize="imagenet",
            pad_mode="black",
            val=2_500,
        ),
        source="github.com/fattorib/ResNets-CIFAR10",
        summary="180 epochs (44 and 56: 200), ImageNet's mean and std, 2,500 images held out",
    )


IMAGENET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 74: (9, 9, 9, 9)}
"""Blocks in each of the four stages, by depth: arXiv:1512.03385, table 1; 74 is apark263/mpmz's own."""


def miniplaces(depth: int = 18) -> Variant:
    """Mini-Places2, images of 128 pixels cropped to 112: apark263/mpmz, written for neon.

    Its script has 9 basic blocks a stage, 74 layers, and since its published error also varies scale, aspect
    and contrast; its README, followed here, has mean subtraction, crops and flips only.
    """
    check_listed_depth(depth, IMAGENET_BLOCKS)
    return Variant(
        name="miniplaces",
        network=Network(
            depth=depth,
            architecture="imagenet",
            block="bottleneck" if depth == 50 else "basic",
            shortcut="projection",
            batch_norm_eps=1e-3,  # neon's
        ),
        recipe=Recipe(
            duration=80,
            milestones=(40, 70),
            weight_decay=5e-4,
            normalize="channel-mean",
            pad=0,
            crop=112,
        ),
        source="github.com/apark263/mpmz",
        summary="80 epochs, lr 0.1 dropped at 40 and 70, crops of 112 pixels",
    )


CONVNET_DEPTHS = (8,)


def convnet(depth: int = 8) -> Variant:
    """A programming exercise's network for the first two classes of CIFAR-10: KaushikRoy94/Work."""
    check_listed_depth(depth, CONVNET_DEPTHS)
    return Variant(
        name="convnet",
        network=Network(depth=depth, architecture="convnet", shortcut="projection"),
        recipe=Recipe(
            duration=5,
            schedule="linear",
            weight_decay=0.0,
            normalize="channel-mean-std",
            pad=0,
            flip=False,
        ),
        source="github.com/KaushikRoy94/Work",
        summary="5 epochs, lr 0.1 falling linearly to 0, no augmentation, for cifar2",
    )


LADDER = "github.com/iamVarunAnand/image_classification"

LADDER_RECIPE = Recipe(
    duration=180,
    milestones=(90, 135),
    warmup=1,
    warmup_lr=0.01,
    weight_decay=2e-4,  # Keras adds 1e-4 of the squares to the loss, without the half
    decay="kernels",
    normalize="channel-mean-std",
    pad_mode="black",
    val=5_000,
    val_stratified=True,
)


def xresnet(depth: int = 20) -> Variant:
    """The ladder's first step: pre-activation, average-pool shortcuts, average and maximum pooled together."""
    check_depth(depth, multiple=6)
    return Variant(
        name="xresnet",
        network=Network(depth=depth, architecture="xresnet", shortcut="projection", batch_norm_eps=2e-5),
        recipe=LADDER_RECIPE,
        source=LADDER,
        summary="180 epochs, lr 0.1 dropped at 90 and 135 after one at 0.01, 5,000 images held out",
    )


def mxresnet(depth: int = 20) -> Variant:
    """xresnet with Mish (arXiv:1908.08681)."""
    base = xresnet(depth)
    network = replace(base.network, activation="mish")
    return replace(base, name="mxresnet", network=network, summary="xresnet with Mish")


def se_mxresnet(depth: int = 20) -> Variant:
    """mxresnet with squeeze-and-excitation (arXiv:1709.01507)."""
    base = mxresnet(depth)
    network = replace(base.network, squeeze_ratio=16)
    recipe = replace(base.recipe, decay="kernels-but-squeeze")
    summary = "mxresnet with squeeze-and-excitation"
    return replace(base, name="se-mxresnet", network=network, recipe=recipe, summary=summary)


def se_mxresnet_cosine(depth: int = 20) -> Variant:
    """se-mxresnet with cosine decay after 5 epochs of warm-up."""
    base = se_mxresnet(depth)
    recipe = replace(base.recipe, schedule="cosine", milestones=(), warmup=5, warmup_lr=0.0, warmup_shape="linear")
    summary = "se-mxresnet with cosine decay after 5 epochs of warm-up"
    return replace(base, name="se-mxresnet-cosine", recipe=recipe, summary=summary)


def se_mxresnet_smooth(depth: int = 20) -> Variant:
    """se-mxresnet-cosine with label smoothing."""
    base = se_mxresnet_cosine(depth)
    recipe = replace(base.recipe, label_smoothing=0.1)
    summary = "se-mxresnet-cosine with label smoothing 0.1"
    return replace(base, name="se-mxresnet-smooth", recipe=recipe, summary=summary)


def se_mxresnet_mixup(depth: int = 20) -> Variant:
    """se-mxresnet-smooth with mixup: a weight of its own for each image, the label of the heavier part."""
    base = se_mxresnet_smooth(depth)
    recipe = replace(base.recipe, mixup=0.4)
    return replace(base, name="se-mxresnet-mixup", recipe=recipe, summary="se-mxresnet-smooth with mixup 0.4")


def se_mxresnet_reflect(depth: int = 20) -> Variant:
    """se-mxresnet-mixup with reflection padding: the ladder's whole recipe."""
    base = se_mxresnet_mixup(depth)
    recipe = replace(base.recipe, pad_mode="reflect")
    summary = "se-mxresnet-mixup with reflection padding"
    return replace(base, name="se-mxresnet-reflect", recipe=recipe, summary=summary)


def xresnext_16x2d(depth: int = 29) -> Variant:
    """xresnet with bottlenecks of 16 groups of width 2 (arXiv:1611.05431)."""
    check_depth(depth, multiple=9)
    return Variant(
        name="xresnext-16x2d",
        network=Network(
            depth=depth,
            architecture="xresnet",
            block="bottleneck",
            shortcut="projection",
            batch_norm_eps=2e-5,
            cardinality=16,
            group_width=2,
        ),
        recipe=LADDER_RECIPE,
        source=LADDER,
        summary="xresnet with grouped bottlenecks",
    )


def xresnet_bottleneck(depth: int = 29) -> Variant:
    """xresnext-16x2d ungrouped: the first line of its source's table of cardinalities, 1 group of width 16.

    Its source keeps no code for it, and counts 0.31M parameters where this has 0.32M.
    """
    base = xresnext_16x2d(depth)
    network = replace(base.network, cardinality=1, group_width=16)
    summary = "xresnet with bottlenecks of width 16"
    return replace(base, name="xresnet-bottleneck", network=network, summary=summary)


def se_mxresnext_16x2d(depth: int = 29) -> Variant:
    """xresnext-16x2d with Mish and squeeze-and-excitation."""
    base = xresnext_16x2d(depth)
    network = replace(base.network, activation="mish", squeeze_ratio=16)
    recipe = replace(base.recipe, decay="kernels-but-squeeze")
    summary = "xresnext-16x2d with Mish and squeeze-and-excitation"
    return replace(base, name="se-mxresnext-16x2d", network=network, recipe=recipe, summary=summary)


def se_mxresnext_16x2d_reflect(depth: int = 29) -> Variant:
    """se-mxresnext-16x2d trained by the ladder's whole recipe, as its published error was."""
    base, recipe = se_mxresnext_16x2d(depth), se_mxresnet_reflect().recipe
    summary = "se-mxresnext-16x2d with the recipe of se-mxresnet-reflect"
    return replace(base, name="se-mxresnext-16x2d-reflect", recipe=recipe, summary=summary)


VARIANTS: tuple[VariantFunction, ...] = (
    he2015,
    msra,
    preact,
    fattorib,
    miniplaces,
    convnet,
    xresnet,
    mxresnet,
    se_mxresnet,
    se_mxresnet_cosine,
    se_mxresnet_smooth,
    se_mxresnet_mixup,
    se_mxresnet_reflect,
    xresnext_16x2d,
    xresnet_bottleneck,
    se_mxresnext_16x2d,
    se_mxresnext_16x2d_reflect,
)


def default_depth(function: VariantFunction) -> int:
    """The depth of a variant where none is chosen."""
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
