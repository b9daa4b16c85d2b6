"""All variants, as plain data: the network, the recipe that trains it, and where both come from.

THE place to add one: `declare` or `derive` puts it into `VARIANTS`, and the command line, the plan, the tests and the
tables follow. No torch here.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

Unit = Literal["epoch", "step"]


def added(default: Any) -> Any:
    """A field newer than stored specs: left out of them, too, where it stands at its default."""
    return field(default=default, metadata={"added": True})


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
    shortcut: Literal["A", "identity-conv", "projection", "bare-projection"] = "A"
    """At a change of width. A: subsample, zero-pad channels, no parameters (arXiv:1512.03385, section 4.2).
    identity-conv: 1x1 convolution of stride 2 that starts as the identity (apark263/cfmz). projection: what
    the architecture has, a 1x1 convolution with whatever stands around it. bare-projection: the same without its batch
    norm, and in the first stage too (the weights stored in iamVarunAnand/image_classification)."""
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
    stem_width: int = added(0)
    """Of the first convolution; 0: the first stage's."""
    init: Literal["he", "truncated-he"] = added("he")
    """Normal by fan-in (arXiv:1502.01852); truncated-he: none beyond two deviations, with the same variance (Keras)."""
    padding: Literal["even", "end"] = added("even")
    """Of 3x3 convolutions of stride 2, where the image's side is even. even: one pixel on each side. end: one after
    the last pixel alone (TensorFlow's "same")."""


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
    first_step: int = added(0)  # what the schedule counts the first step as; 1 in the Keras callback of the ladder
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay: Literal["all", "kernels", "kernels-but-squeeze"] = "all"
    """What has weight decay. kernels: convolution and affine weights, no biases, no batch norm; -but-squeeze: nor the
    weights of squeeze-and-excitation."""
    label_smoothing: float = 0.0
    mixup: float = 0.0  # alpha; 0 is off
    mixup_partner: Literal["batch", "set"] = added("batch")  # of the rank's batch, or of the whole training set
    normalize: Literal["pixel-mean", "channel-mean", "channel-mean-std", "imagenet", "imagenet-mean"] = (
        "pixel-mean"
    )
    """What is subtracted from an image of range 0..1, and what it is divided by: the training set's mean
    image, its mean colour, its mean colour and standard deviation, or ImageNet's colours; imagenet-mean: ImageNet's mean
    colour as apark263/mpmz has it, and nothing divided."""
    pad: int = 4
    pad_mode: Literal["zero", "black", "reflect", "mean"] = "zero"
    """zero: zeros after normalisation; black: before it; mean: of the image's own rows and columns (numpy.pad)."""
    crop: int | None = None  # side of the random crop; None: the image's own
    scale_range: tuple[int, ...] = added(())
    """Least and largest side, drawn for each training image, to which it is enlarged before the crop; (): not at all."""
    flip: bool = True
    val: int = 0  # training images held out, and evaluated in place of the test set
    val_stratified: bool = False  # held out in equal shares of every class
    batch_norm: Literal["local", "sync"] = added("local")
    """Whose images a training batch's statistics are of: each worker's own, as under DDP, or all workers'."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A named pair of network and recipe at one depth."""

    name: str
    network: Network
    recipe: Recipe
    source: str
    summary: str


Entry = TypeVar("Entry")
VariantFunction = Callable[[int], Variant]
Design = Callable[[int], tuple[Network, Recipe]]
"""Network and recipe by depth."""

VARIANTS: dict[str, VariantFunction] = {}

IMAGENET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 74: (9, 9, 9, 9)}
"""Blocks in each of the four stages, by depth: arXiv:1512.03385, table 1; 74 is apark263/mpmz's own."""
LISTED_DEPTHS = {"imagenet": tuple(IMAGENET_BLOCKS), "convnet": (8,)}


def check_depth(network: Network) -> None:
    """Raise ValueError where the architecture cannot have this depth."""
    depth, listed = network.depth, LISTED_DEPTHS.get(network.architecture)
    if listed and depth not in listed:
        raise ValueError(f"depth {depth} is none of {', '.join(map(str, listed))}")
    layers = layers_per_block(network)
    n = (depth - 2) / layers
    if not listed and (n < 1 or n != int(n)):
        below = max(1, int(n)) * layers + 2
        raise ValueError(f"depth {depth} is not {layers}n+2: try {below} or {below + layers}")


def layers_per_block(network: Network) -> int:
    """Convolutions that one more block in each of three stages adds."""
    return 9 if network.block == "bottleneck" else 6


def declare(name: str, summary: str, source: str, *, depth: int) -> Callable[[Design], VariantFunction]:
    """Makes a variant of a design, and puts it into `VARIANTS`; `depth` is its default.

    The variant raises ValueError for a depth that its architecture cannot have, and this for a name that is taken.
    """
    default = depth

    def decorate(design: Design) -> VariantFunction:
        def variant(depth: int = default) -> Variant:
            network, recipe = design(depth)
            check_depth(network)
            return Variant(name=name, network=network, recipe=recipe, source=source, summary=summary)

        variant.__name__, variant.__doc__ = name.replace("-", "_"), design.__doc__ or summary
        if VARIANTS.setdefault(name, variant) is not variant:
            raise ValueError(f"two variants are named {name!r}")
        return variant

    return decorate


def fixed(recipe: Recipe, **network: Any) -> Design:
    """The same recipe and fields of the network at every depth."""
    return lambda depth: (Network(depth=depth, **network), recipe)


def derive(base: VariantFunction, name: str, summary: str, source: str = "", **changes: Any) -> VariantFunction:
    """The variant `name`: `base` at the same depths, with other fields of its network and its recipe."""
    networks = {field: value for field, value in changes.items() if field in Network.__dataclass_fields__}
    recipes = {field: value for field, value in changes.items() if field not in networks}

    def design(depth: int) -> tuple[Network, Recipe]:
        own = base(depth)
        return replace(own.network, **networks), replace(own.recipe, **recipes)

    depth = default_depth(base)
    return declare(name, summary, source or base(depth).source, depth=depth)(design)


def default_depth(function: VariantFunction) -> int:
    """The depth of a variant where none is chosen."""
    default: int = inspect.signature(function).parameters["depth"].default
    return default


def find(kind: str, name: str, entries: Mapping[str, Entry]) -> Entry:
    """The entry of that name. Raises ValueError where there is none."""
    if name in entries:
        return entries[name]
    close = difflib.get_close_matches(name, entries, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"allowed are {', '.join(entries)}"
    raise ValueError(f"unknown {kind} {name!r}: {hint}")


def find_variant(name: str) -> VariantFunction:
    """The variant of that name. Raises ValueError where there is none."""
    return find("variant", name, VARIANTS)


@declare(
    "he2015",
    "64k steps, lr 0.1 dropped at 32k and 48k, option A shortcuts",
    "arXiv:1512.03385 section 4.2",
    depth=20,
)
def he2015(depth: int) -> tuple[Network, Recipe]:
    """The paper's CIFAR-10 network: arXiv:1512.03385, section 4.2."""
    # the paper: 0.01 until the training error is below 80 %, "about 400 iterations", at depth 110
    warmup: dict[str, Any] = {"warmup": 400, "warmup_lr": 0.01} if depth >= 110 else {}
    return Network(depth=depth), Recipe(duration=64_000, unit="step", milestones=(32_000, 48_000), **warmup)


NEON_EPS = 1e-3  # of neon's batch norms

# Its images are bytes less the mean colour, of range 255 where ours is 1; the batch norm after the stem makes them equal.
msra = declare(
    "msra", "180 epochs, lr 0.1 dropped at 90 and 135, batch norm on the output", "github.com/apark263/cfmz", depth=20,
)(fixed(
    Recipe(duration=180, milestones=(90, 135), normalize="channel-mean", pad_mode="mean"),
    shortcut="identity-conv", head_batch_norm=True, batch_norm_eps=NEON_EPS,
))  # fmt: skip
preact = derive(
    he2015, "preact", "he2015, pre-activated: arXiv:1603.05027 figure 4(e)", "arXiv:1603.05027", block="preact",
)  # fmt: skip


@declare(
    "fattorib", "180 epochs (44 and 56: 200), ImageNet's mean and std, 2,500 images held out",
    "github.com/fattorib/ResNets-CIFAR10", depth=20,
)  # fmt: skip
def fattorib(depth: int) -> tuple[Network, Recipe]:
    """fattorib/ResNets-CIFAR10: its own network and split; it trained depths 20, 32, 44 and 56.

    It tests (epoch % 90) and (epoch % 135) to drop, so that its 200 epochs have a third drop at 180.
    """
    recipe = Recipe(duration=180, milestones=(90, 135), normalize="imagenet", pad_mode="black", val=2_500)
    if depth in (44, 56):
        recipe = replace(recipe, duration=200, milestones=(90, 135, 180))
    if depth >= 110:  # not trained by its author: the paper's warm-up, about 400 steps
        recipe = replace(recipe, warmup=1, warmup_lr=0.01)
    return Network(depth=depth, block="late-stride"), recipe


@declare(
    "miniplaces",
    "80 epochs, lr 0.1 dropped at 40 and 70, crops of 112 pixels",
    "github.com/apark263/mpmz",
    depth=74,
)
def miniplaces(depth: int) -> tuple[Network, Recipe]:
    """Mini-Places2, images of 128 pixels cropped to 112: apark263/mpmz@76a2b88, written for neon.

    The network is that of its last script, trained as its README says, by mean subtraction, crops and flips alone;
    the script itself varies scale, aspect and contrast too. It published no error: `mpmz` has.
    """
    return Network(
        depth=depth, architecture="imagenet", block="bottleneck" if depth == 50 else "basic", shortcut="projection",
        batch_norm_eps=NEON_EPS,
    ), Recipe(
        duration=80, milestones=(40, 70), weight_decay=5e-4, normalize="channel-mean", pad=0, crop=112,
    )  # fmt: skip


mpmz = derive(
    miniplaces, "mpmz",
    "the network of the published 17.5 %: shortcuts that start as the identity, batch norm on the output",
    "github.com/apark263/mpmz@49b0525", shortcut="identity-conv", head_batch_norm=True,
    normalize="imagenet-mean", scale_range=(128, 240),
)  # fmt: skip
convnet = declare(
    "convnet", "5 epochs, lr 0.1 falling linearly to 0, no augmentation, for cifar2",
    "github.com/KaushikRoy94/Work", depth=8,
)(fixed(
    Recipe(duration=5, schedule="linear", weight_decay=0.0, normalize="channel-mean-std", pad=0, flip=False),
    architecture="convnet", shortcut="projection",
))  # fmt: skip

# --- the ladder: each step changes one thing ---

LADDER = "github.com/iamVarunAnand/image_classification"
LADDER_RECIPE = Recipe(
    duration=180, milestones=(90, 135), warmup=1, warmup_lr=0.01, decay="kernels", normalize="channel-mean-std",
    weight_decay=2e-4,  # Keras adds 1e-4 of the squares to the loss, without the half
    pad_mode="black", val=5_000, val_stratified=True,
)  # fmt: skip
X: dict[str, Any] = {"architecture": "xresnet", "shortcut": "projection", "batch_norm_eps": 2e-5}
COSINE: dict[str, Any] = {
    "schedule": "cosine", "milestones": (), "warmup": 5, "warmup_lr": 0.0, "warmup_shape": "linear",
}  # fmt: skip
SQUEEZE: dict[str, Any] = {"squeeze_ratio": 16, "decay": "kernels-but-squeeze"}

xresnet = declare(
    "xresnet",
    "the ladder's first step: pre-activation, average-pool shortcuts, both poolings; 5,000 images held out",
    LADDER, depth=20,
)(fixed(LADDER_RECIPE, **X))  # fmt: skip
mxresnet = derive(xresnet, "mxresnet", "xresnet with Mish (arXiv:1908.08681)", activation="mish")
se_mxresnet = derive(mxresnet, "se-mxresnet", "mxresnet with squeeze-and-excitation (arXiv:1709.01507)", **SQUEEZE)
se_mxresnet_cosine = derive(
    se_mxresnet, "se-mxresnet-cosine", "se-mxresnet with cosine decay after 5 epochs of warm-up", **COSINE,
)  # fmt: skip
se_mxresnet_smooth = derive(
    se_mxresnet_cosine, "se-mxresnet-smooth", "se-mxresnet-cosine with label smoothing 0.1", label_smoothing=0.1,
)  # fmt: skip
se_mxresnet_mixup = derive(se_mxresnet_smooth, "se-mxresnet-mixup", "se-mxresnet-smooth with mixup 0.4", mixup=0.4)
se_mxresnet_reflect = derive(
    se_mxresnet_mixup, "se-mxresnet-reflect", "se-mxresnet-mixup with reflection padding", pad_mode="reflect",
)  # fmt: skip
xresnext_16x2d = declare(
    "xresnext-16x2d", "xresnet with bottlenecks of 16 groups of width 2 (arXiv:1611.05431)", LADDER, depth=29,
)(fixed(LADDER_RECIPE, **X, block="bottleneck", cardinality=16, group_width=2))  # fmt: skip
xresnet_bottleneck = derive(
    xresnext_16x2d, "xresnet-bottleneck", "xresnet with bottlenecks of width 16", cardinality=1, group_width=16,
)  # fmt: skip
se_mxresnext_16x2d = derive(
    xresnext_16x2d, "se-mxresnext-16x2d", "xresnext-16x2d with Mish and squeeze-and-excitation",
    activation="mish", **SQUEEZE,
)  # fmt: skip
se_mxresnext_16x2d_reflect = derive(
    se_mxresnext_16x2d, "se-mxresnext-16x2d-reflect",
    "se-mxresnext-16x2d with the recipe of se-mxresnet-reflect", label_smoothing=0.1, mixup=0.4,
    pad_mode="reflect", **COSINE,
)  # fmt: skip


def as_in_keras(base: VariantFunction) -> VariantFunction:
    """The variant "keras-...": as its source's own code and stored weights make it, where torch does otherwise.

    Basic blocks have the shortcuts of the stored weights, XResNeXt the stem of commit 59e44ed: their parameters are
    those that the README counts.
    """
    own = base(default_depth(base))
    changes: dict[str, Any] = {"init": "truncated-he", "padding": "end", "shortcut": "bare-projection"}
    if own.network.block == "bottleneck":
        changes |= {"shortcut": "projection", "stem_width": 0 if own.network.squeeze_ratio else 16}
    if own.recipe.schedule == "cosine":
        changes["first_step"] = 1
    if own.recipe.mixup:
        changes["mixup_partner"] = "set"
    return derive(base, f"keras-{own.name}", f"{own.name} as its source computes it, in Keras", **changes)


for _name in tuple(VARIANTS)[tuple(VARIANTS).index("xresnet") :]:
    as_in_keras(VARIANTS[_name])
