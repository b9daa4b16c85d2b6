"""Data sets that a function gives: arrays, torchvision's and Hugging Face's data sets, pairs of image and label, folders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.loaders.cache import Content, Split
from harness.loaders.datasets import DataError, Dataset, Request, load_class_folders
from harness.loaders.files import to_rgb

COLUMNS = {"image": ("image", "img"), "label": ("label", "labels", "fine_label")}
"""Names of Hugging Face's columns."""


def load_own(
    load: Callable[[Mapping[str, Any]], Any], request: Request, *, classes: Sequence[str] = (), flip: bool = True
) -> Dataset:
    """The data set of a function's (train, test), or of the class folders that it names. Never published images.

    Raises DataError for what is no such thing: sizes, types, labels out of range.
    """
    made = load({"root": request.root})
    if isinstance(made, str | Path):
        whole = load_class_folders(request._replace(root=Path(made).expanduser()))
        return replace(whole, label=request.name, flip=flip)
    if not (isinstance(made, tuple) and len(made) == 2):
        raise DataError(f"(train, test) or a path is expected, not {repr(made)[:80]}")
    train, test = (read_split(part, what) for part, what in zip(made, ("train", "test"), strict=True))
    label = _column(getattr(made[0], "features", None) or {}, "label")
    given = classes or getattr(made[0], "classes", None) or getattr(label, "names", None)
    named = tuple(map(str, given or range(int(train.labels.max()) + 1)))
    for what, split in (("train", train), ("test", test)):
        for wrong in np.flatnonzero((split.labels < 0) | (split.labels >= len(named)))[:1]:
            which = f"label {split.labels[wrong]} of {what} image {wrong}"
            raise DataError(f"{which} is out of range: 0 to {len(named) - 1} are the classes")
    return Dataset(request.name, request.name, False, *Content.of(named, train, test), flip=flip)


def read_split(part: Any, what: str) -> Split:
    """Images uint8 (N, H, H, 3) and labels (N,) of whatever holds them. Raises DataError."""
    if isinstance(part, tuple) and len(part) == 2 and getattr(part[0], "ndim", 0) in (3, 4):
        images, labels = (np.asarray(array) for array in part)
    else:
        pairs = [(_read_image(image, what), label) for image, label in _list_pairs(part, what)]
        if len(shapes := {image.shape for image, _ in pairs}) != 1:
            sizes = " and ".join(map(str, sorted(shapes)[:2])) or "none"
            raise DataError(f"{what}: images of one size are expected, here are {sizes}")
        images, labels = np.stack([image for image, _ in pairs]), np.asarray([label for _, label in pairs])
    if images.ndim == 3:
        images = images[..., None].repeat(3, axis=3)
    size = images.shape[1]
    if images.dtype != np.uint8 or images.shape[1:] != (size, size, 3) or not len(images):
        raise DataError(
            f"{what}: images are {images.dtype} {images.shape}, uint8 (N, H, H, 3) or (N, H, H) is expected"
        )
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{what}: labels are {labels.dtype} {labels.shape}, {len(images)} whole numbers are expected"
        )
    return Split(np.ascontiguousarray(images), labels.astype(np.int64))


def _column(columns: Any, what: str) -> Any:
    """What a table has under one of a column's names; of a list of names, that name."""
    found = next((name for name in COLUMNS[what] if name in columns), None)
    return columns[found] if isinstance(columns, Mapping) and found else found


def _list_pairs(part: Any, what: str) -> Iterable[tuple[Any, Any]]:
    if (columns := getattr(part, "column_names", None)) is not None:  # Hugging Face's
        image, label = _column(columns, "image"), _column(columns, "label")
        if image is None or label is None:
            raise DataError(f"{what}: no columns image and label among {', '.join(columns)}")
        return ((row[image], row[label]) for row in part)
    if isinstance(part, Iterable):  # first: torch's IterableDataset has a __getitem__ that raises
        return part
    if hasattr(part, "__getitem__") and hasattr(part, "__len__"):
        return (part[index] for index in range(len(part)))
    raise DataError(f"{what}: arrays, a data set or pairs of image and label are expected, not {repr(part)[:80]}")


def _read_image(image: Any, what: str) -> NDArray[Any]:
    """(H, W, 3) or (H, W), of PIL's image, an array, or a tensor (C, H, W); numbers from 0 to 1 are made bytes."""
    array = to_rgb(image) if hasattr(image, "convert") else np.asarray(image)
    if hasattr(image, "permute") and array.ndim == 3:
        array = array.transpose(1, 2, 0)
        array = array[..., 0] if array.shape[2] == 1 else array
    if np.issubdtype(array.dtype, np.floating):
        if array.min() < 0 or array.max() > 1:
            values = f"values from {array.min():g} to {array.max():g}"
            raise DataError(f"{what}: an image has {values}: bytes, or numbers from 0 to 1, are expected")
        array = np.rint(array * 255).astype(np.uint8)
    return array
