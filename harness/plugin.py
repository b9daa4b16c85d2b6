"""What a plug-in file says: `from harness import plugin`, and these over plain functions and classes.

    @plugin.network(lr=0.05, duration=30, unit="epoch", milestones=[15, 25])
    def wide(num_classes, depth=20, width=32): ...

They only take note; `harness run --plugin FILE` enters what its file notes into the tables of the built-in ones. Parameters
are filled by name (`harness.models.variants.call`); others that have a default, and are text, numbers or truth values, are
fields: `--set width=64`, `--search "width=choice(16,32)"`. A file may as well list names: NETWORKS = {"wide": wide}.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

Made = TypeVar("Made", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Note:
    """That something is to be entered, and the line that says so."""

    kind: str  # one of harness.plugins.TABLES
    name: str
    made: Any  # the function or class; None for a variant
    file: str
    line: int
    options: dict[str, Any] = field(default_factory=dict)


NOTES: list[Note] = []
"""Of all plug-ins that were imported, loaded by a command or not."""


def network(
    make: Made | None = None, /, *, name: str = "", depth: int | None = None, smallest_image: int = 1, **row: Any
) -> Any:
    """A maker of modules: `make(num_classes, ...)` -> torch.nn.Module, images (N, 3, H, W) -> logits (N, num_classes).

    Filled besides: image_size (side in pixels), depth. `depth` is the default, and that of a maker without such a
    parameter; `smallest_image` the least side in pixels. A variant of the same name comes with it: its recipe is he2015's
    with what `row` changes, fields as in models/variants.toml.
    """
    return _note("network", make, name, depth=depth, smallest_image=smallest_image, row=row)


def variant(name: str, *, base: str, **row: Any) -> None:
    """A variant: `base` with fields of recipe and network changed, as in models/variants.toml; summary and source too."""
    frame = sys._getframe(1)
    NOTES.append(Note("variant", name, None, frame.f_code.co_filename, frame.f_lineno, {"base": base, **row}))


def dataset(load: Made | None = None, /, *, name: str = "", classes: Sequence[str] = (), flip: bool = True) -> Any:
    """A data set: `load()` or `load(root)`, the folder of --data-dir or None -> (train, test).

    Each is a pair of arrays, images uint8 (N, H, H, 3) or (N, H, H) and labels (N,); a torchvision data set; a Hugging
    Face data set; or an iterable of pairs of image and label. Or, in place of both, the path of a folder of class folders.
    `flip`: a mirrored image keeps its label.
    """
    return _note("dataset", load, name, classes=tuple(classes), flip=flip)


def loader(make: Made | None = None, /, *, name: str = "") -> Any:
    """A loader: `make(split, plan, config)` -> `harness.loaders.loader.Loader`."""
    return _note("loader", make, name)


def optimizer(make: Made | None = None, /, *, name: str = "", capturable: bool = False) -> Any:
    """An optimizer: `make(groups, lr, ...)` -> torch.optim.Optimizer; fields of the recipe (momentum, ...) are filled.

    `groups` are torch's, with "weight_decay". `capturable`: it makes its state at once and reads lr from the tensor that it
    is given, so that its steps can be captured as CUDA graphs; others run kernel by kernel.
    """
    return _note("optimizer", make, name, capturable=capturable)


def schedule(factor: Made | None = None, /, *, name: str = "") -> Any:
    """A schedule: `factor(moment, ...)` -> what lr is multiplied by after warm-up (`harness.training.recipe.Moment`)."""
    return _note("schedule", factor, name)


def augmentation(change: Made | None = None, /, *, name: str = "") -> Any:
    """An augmentation: `change(images, draws, ...)` -> images, (n, 3, H, W), normalised, after crop and flip.

    All that is random comes from `draws` (`harness.training.recipe.Draws`); the images given are left as they are.
    """
    return _note("augmentation", change, name)


def _note(kind: str, made: Made | None, name: str, **options: Any) -> Any:
    """Note what is decorated; the decorator, where it is called with options first."""
    frame = sys._getframe(2)
    file, line = frame.f_code.co_filename, frame.f_lineno

    def note(made: Made) -> Made:
        NOTES.append(Note(kind, name or made.__name__, made, file, line, options))
        return made

    return note if made is None else note(made)
