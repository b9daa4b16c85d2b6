"""What a variant is: a network, the recipe that trains it, and where both come from. No torch here.

All are plain data in variants.toml, THE place to add one; the command line, the plan, the tests and the tables follow.
So are presets, in presets.toml: `harness run --preset NAME` trains one, `harness report --preset NAME` prints its table.
Plug-ins add to `NETWORKS` and `VARIANTS`, as this file does.
"""

from __future__ import annotations

import inspect
import json
import math
import tomllib
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_origin

from harness.words import unknown

if TYPE_CHECKING:
    from torch import nn

Unit = Literal["epoch", "step"]


def added(default: Any) -> Any:
    """A field newer than stored specs: left out of them, too, where it stands at its default."""
    return field(default=default, metadata={"added": True})


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """An architecture: `harness.models.build.build(network, num_classes)` makes the module.

    Two networks with equal fields are the same function of their weights.
    """

    depth: int  # 0: the architecture has only one, and no number for it
    architecture: str = "cifar"  # one of NETWORKS
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
    extra: tuple[str, ...] = added(())
    """Fields of a plug-in's own that are not at their default, by name: ("width=32",), JSON after the sign."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a network is trained. `duration`, `milestones` and `warmup` are all counted in `unit`."""

    duration: float
    unit: Unit = "epoch"
    batch_size: int = 128  # global, whatever the number of workers
    lr: float = 0.1
    schedule: str = "multistep"  # one of harness.training.recipe.SCHEDULES
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
    resize: int = added(0)
    """Shorter side to which an image is resized before the crop; 0: it is not. With `area_range` evaluated ones only."""
    area_range: tuple[float, ...] = added(())
    """Least and largest share of an image's area in the box that is resized to a training crop; (): no such box."""
    aspect_range: tuple[float, ...] = added((3 / 4, 4 / 3))  # of that box: width over height
    flip: bool = True
    val: int = 0  # training images held out, and evaluated in place of the test set
    val_stratified: bool = False  # held out in equal shares of every class
    batch_norm: Literal["local", "sync"] = added("local")
    """Whose images a training batch's statistics are of: each worker's own, as under DDP, or all workers'."""
    optimizer: str = added("sgd")  # one of harness.training.recipe.OPTIMIZERS
    augmentations: tuple[str, ...] = added(())  # of harness.training.recipe.AUGMENTATIONS, after crop and flip
    extra: tuple[str, ...] = added(())  # as `Network.extra`: of optimizer, schedule and augmentations


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
"""Raises ValueError for a depth that the architecture cannot have."""

IMAGENET_BLOCKS = {
    18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 74: (9, 9, 9, 9), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3),
}  # fmt: skip
"""Blocks in each of the four stages, by depth: arXiv:1512.03385, table 1; 74 is apark263/mpmz's own."""


# --- what makes a module, built in or not ---


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What makes the modules of an architecture, and which there are."""

    make: Callable[..., nn.Module]
    """Its parameters are filled by name: num_classes, image_size (side in pixels), network, depth; others that have a
    default are fields of its own. Raises ValueError for a network that it cannot make."""
    smallest_image: int = 1  # side in pixels; of ours the product of all strides
    depths: tuple[int, ...] = ()  # all that there are; (): any
    three_stages: bool = False  # of equally many blocks, with one layer before and one after: 6n+2, or 9n+2
    reads: Mapping[str, tuple[str, ...]] | None = None
    """Fields of `Network`, beside the depth, on which the module depends, and their words, (): any; None: all of them."""


def _make(name: str, network: Network, num_classes: int) -> nn.Module:
    """A module of this package, imported when it is made."""
    made: nn.Module = getattr(import_module("harness.models.networks"), name)(network, num_classes)
    return made


_NORMS: dict[str, tuple[str, ...]] = {"head_batch_norm": (), "batch_norm_eps": ()}
_CIFAR = {"block": ("basic", "preact", "late-stride"), "shortcut": ("A", "identity-conv"), **_NORMS}
_FOUR_STAGES = {"block": ("basic", "bottleneck"), "shortcut": ("projection", "identity-conv"), **_NORMS}
_GROUPS = ("cardinality", "group_width")  # of bottlenecks alone
_XRESNET = {"block": ("basic", "bottleneck"), "shortcut": ("projection", "bare-projection")} | dict.fromkeys(
    ("batch_norm_eps", "activation", "squeeze_ratio", "stem_width", "init", "padding", *_GROUPS), ()
)
NETWORKS: dict[str, Architecture] = {
    "cifar": Architecture(make=partial(_make, "CifarResNet"), smallest_image=4, three_stages=True, reads=_CIFAR),
    "imagenet": Architecture(
        make=partial(_make, "ImageNetResNet"), smallest_image=16, depths=(18, 34, 50, 74), reads=_FOUR_STAGES
    ),
    "resnet": Architecture(
        make=partial(_make, "ResNet"), smallest_image=32, depths=(18, 34, 50, 101, 152), reads=_FOUR_STAGES
    ),
    "convnet": Architecture(
        make=partial(_make, "ConvNet"), smallest_image=4, depths=(8,), reads={"batch_norm_eps": ()}
    ),
    "xresnet": Architecture(make=partial(_make, "XResNet"), smallest_image=4, three_stages=True, reads=_XRESNET),
}


def check_reads(network: Network, name: str) -> None:
    """Raise ValueError where the network would be the same whatever this field of it says."""
    what, reads = f"architecture {network.architecture}", NETWORKS[network.architecture].reads
    if reads is None or name not in OF_NETWORK or name == "architecture":
        return
    if name in reads and name in _GROUPS and network.block != "bottleneck":
        raise ValueError(f"{what} has this field with block=bottleneck only, not {network.block}")
    if name not in reads:
        raise ValueError(f"{what} has no such field (allowed: {', '.join(reads) or 'none'})")
    if reads[name] and getattr(network, name) not in reads[name]:
        raise ValueError(f"{what} has no such {name} (allowed: {', '.join(reads[name])})")


def check_depth(network: Network, of: str = "") -> None:
    """Raise ValueError where the architecture cannot have this depth, or is none of `NETWORKS`."""
    architecture = find("network", network.architecture, NETWORKS)
    depth, listed = network.depth, architecture.depths
    if listed == (0,) and depth:
        raise ValueError(f"{of}depth {depth}: {network.architecture} has only one depth, and no number for it")
    if listed and depth not in listed:
        raise ValueError(f"{of}depth {depth} is not allowed (allowed: {', '.join(map(str, listed))})")
    layers = 9 if network.block == "bottleneck" else 6  # that one more block in each of three stages adds
    n = (depth - 2) / layers
    if architecture.three_stages and (n < 1 or n != int(n)):
        below = max(1, int(n)) * layers + 2
        raise ValueError(f"{of}depth {depth} is not {layers}n+2: try {below} or {below + layers}")


@cache
def parameters_of(make: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function or class, with their types where these can be known."""
    try:
        return inspect.signature(make, eval_str=True).parameters
    except NameError:  # a type that is imported for type checkers alone
        return inspect.signature(make).parameters


@cache
def own_fields(make: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Type and default of each field of a maker's own: of its parameters that have a default, and that nothing else
    fills, those that are text, numbers or truth values."""
    found, filled = {}, set().union(*FILLED.values())
    for name, p in parameters_of(make).items():
        typed = p.annotation in SIMPLE or get_origin(p.annotation) is Literal
        hint = p.annotation if typed else type(p.default)
        if name not in filled and p.default is not p.empty and (typed or hint in SIMPLE):
            found[name] = hint, p.default
    return found


def call(make: Callable[..., Any], given: Mapping[str, Any], extra: tuple[str, ...] = ()) -> Any:
    """Call a maker with what is given, by the names of its parameters, and with its own fields as `extra` has them.

    One that takes any keyword, as torchvision's networks do, gets num_classes by it.
    """
    parameters, own = parameters_of(make), own_fields(make)
    filled = parameters.keys() | {"num_classes" for p in parameters.values() if p.kind is p.VAR_KEYWORD}
    values = {**given, **{name: value for name, value in read_extra(extra).items() if name in own}}
    return make(**{name: value for name, value in values.items() if name in filled})


def read_extra(extra: Iterable[str]) -> dict[str, Any]:
    """("width=32",) -> {"width": 32}."""
    return {name: json.loads(value) for name, _, value in (text.partition("=") for text in extra)}


def write_extra(values: Mapping[str, Any], makes: Iterable[Callable[..., Any]]) -> tuple[str, ...]:
    """{"width": 32} -> ("width=32",): those that one of the makers has, and that are not at the default of all."""
    own = [(name, default) for make in makes for name, (_, default) in own_fields(make).items()]
    kept = {name: value for name, value in sorted(values.items()) if any(name == n and value != d for n, d in own)}
    return tuple(f"{name}={json.dumps(value)}" for name, value in kept.items())


SIMPLE = (bool, int, float, str)
OF_NETWORK, OF_RECIPE = ({each.name for each in fields(part)} for part in (Network, Recipe))
FILLED = {
    "network": {"num_classes", "image_size", "depth", "network"}, "dataset": {"root"}, "augmentation": {"images", "draws"},
    "optimizer": {"groups", *OF_RECIPE}, "schedule": {"moment", *OF_RECIPE},
}  # fmt: skip
"""The parameters of makers that are filled by name, by kind; a loader is called by place."""
ABOUT = {"base", "summary", "source", "depth", "depths", "least", "at"}
"""Words of variants.toml that are no fields."""


def make_variant(name: str, rows: dict[str, dict[str, Any]]) -> VariantFunction:
    """A variant of rows like those of variants.toml: its own and its base's."""
    row = ChainMap(rows[name])  # the variant, its base, and so on
    while "base" in row.maps[-1]:
        row.maps.append(rows[row.maps[-1]["base"]])

    def variant(depth: int = row["depth"]) -> Variant:
        changes: dict[str, Any] = {}
        for link in reversed(row.maps):
            for part in (link, *link.get("at", ())):
                if part is link or depth in part.get("depths", ()) or depth >= part.get("least", math.inf):
                    changes |= {key: tuple(x) if isinstance(x, list) else x for key, x in part.items()}
        given = {key: value for key, value in changes.items() if key not in ABOUT}
        network = Network(depth=depth, **{key: given.pop(key) for key in OF_NETWORK & given.keys()})
        check_depth(network, f"{name}: ")
        recipe = Recipe(**{key: given.pop(key) for key in OF_RECIPE & given.keys()})
        if given:  # fields of a plug-in's own
            make = NETWORKS[network.architecture].make
            network = replace(network, extra=write_extra(given, [make]))
            rest = sorted(given.keys() - own_fields(make).keys())
            recipe = replace(recipe, extra=tuple(f"{key}={json.dumps(given[key])}" for key in rest))
        return Variant(name=name, network=network, recipe=recipe, source=row["source"], summary=row["summary"])

    variant.__name__, variant.__doc__ = name.replace("-", "_"), row["summary"]
    return variant


def default_depth(function: VariantFunction) -> int:
    """The depth of a variant where none is chosen."""
    default: int = inspect.signature(function).parameters["depth"].default
    return default


def find(kind: str, name: str, entries: Mapping[str, Entry]) -> Entry:
    """The entry of that name. Raises ValueError where there is none."""
    if name in entries:
        return entries[name]
    raise ValueError(unknown(kind, name, entries) + " (see `harness variants`)" * (kind == "variant"))


def load_rows(name: str) -> dict[str, dict[str, Any]]:
    """The tables of a file beside this one."""
    return tomllib.loads(Path(__file__).with_name(name).read_text())


ROWS = load_rows("variants.toml")
VARIANTS: dict[str, VariantFunction] = {name: make_variant(name, ROWS) for name in ROWS}

find_variant = partial(find, "variant", entries=VARIANTS)
"""The variant of that name. Raises ValueError where there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """The runs behind one source's table, and the columns in which it prints them: see presets.toml."""

    source: str
    dataset: str
    networks: dict[str, list[int]]
    columns: list[str]
    least_accuracy: float | None = None

    def select(self, variants: Sequence[str] = (), depths: Sequence[int] = ()) -> tuple[tuple[str, int], ...]:
        """Variant and depth of every row; variants or depths that a user chose stand in place of the preset's own.

        A chosen variant that the preset has not comes at its default depth. Raises ValueError for an unknown one.
        """
        return tuple(
            (name, depth)
            for name in variants or self.networks
            for depth in depths or self.networks.get(name) or (default_depth(find_variant(name)),)
        )


PRESETS = {name: Preset(**row) for name, row in load_rows("presets.toml").items()}

find_preset = partial(find, "preset", entries=PRESETS)
"""The preset of that name. Raises ValueError where there is none."""
