"""Data sets that a function gives: arrays, torchvision's and Hugging Face's data sets, pairs of image and label, folders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.loaders.cache import Content, Split
from harness.loaders.datasets import DataError, Dataset, Request, load_class_folders

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")


def load_own(
    load: Callable[[Mapping[str, Any]], Any], request: Request, *, classes: Sequence[str] = (), flip: bool = True
) -> Dataset:
    """The data set of a function's (train, test), or of the class folders that it names. Never published images.

    Raises DataError for what is no such thing: sizes, types, labels out of range.
    """
    made = load({"root": request.root})
    if isinstance(made, str | Path):
        whole = load_class_folders(request._replace(root=Path(made).expanduser()))
        content, fingerprint = Content(whole.classes, whole.train, whole.test), whole.fingerprint
    elif isinstance(made, tuple) and len(made) == 2:
        train, test = (read_split(part, what) for part, what in zip(made, ("train", "test"), strict=True))
        content = Content(_name_classes(classes, made[0], train, test), train, test)
        fingerprint = content.fingerprint()
    else:
        raise DataError(f"(train, test) or a path is expected, not {_describe(made)}")
    return Dataset(request.name, request.name, fingerprint, False, *content.parts(), flip=flip)


def read_split(part: Any, what: str) -> Split:
    """Images uint8 (N, H, H, 3) and labels (N,) of whatever holds them. Raises DataError."""
    if isinstance(part, tuple) and len(part) == 2 and getattr(_array(part[0]), "ndim", 0) in (3, 4):
        images, labels = _array(part[0]), np.asarray(_array(part[1]))
    else:
        pairs = list(_pairs(part, what))
        images = [_image(image) for image, _ in pairs]
        if len(shapes := sorted({image.shape for image in images})) != 1:
            sizes = " and ".join(map(str, shapes[:2])) or "none"
            raise DataError(f"{what}: images of one size are expected, here are {sizes}")
        images, labels = np.stack(images), np.asarray([label for _, label in pairs])
    if images.dtype != np.uint8:
        raise DataError(f"{what}: images are {images.dtype}, uint8 of 0 to 255 is expected")
    if images.ndim == 3:
        images = images[..., None].repeat(3, axis=3)
    if images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2] or not len(images):
        raise DataError(f"{what}: images are {images.shape}, (N, H, H, 3) or (N, H, H) is expected")
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{what}: labels are {labels.dtype} {labels.shape}, {len(images)} whole numbers are expected"
        )
    return Split(np.ascontiguousarray(images), labels.astype(np.int64))


def _pairs(part: Any, what: str) -> Iterable[tuple[Any, Any]]:
    if (columns := getattr(part, "column_names", None)) is not None:  # Hugging Face
        image, label = (
            next((name for name in names if name in columns), None) for names in (IMAGE_COLUMNS, LABEL_COLUMNS)
        )
        if image is None or label is None:
            raise DataError(f"{what}: no columns image and label among {', '.join(columns)}")
        return ((row[image], row[label]) for row in part)
    if hasattr(part, "__getitem__") and hasattr(part, "__len__"):
        return (part[index] for index in range(len(part)))
    if isinstance(part, Iterable):
        return part
    raise DataError(f"{what}: arrays, a data set or pairs of image and label are expected, not {_describe(part)}")


def _array(value: Any) -> Any:
    """numpy's, of numpy or torch; anything else as it is."""
    return value if isinstance(value, np.ndarray) else value.numpy() if hasattr(value, "numpy") else value


def _image(image: Any) -> NDArray[Any]:
    """(H, W, 3) or (H, W), of PIL's image, an array, or a tensor (3, H, W), of 0 to 1 where it is no whole number."""
    if hasattr(image, "convert"):
        return np.asarray(image.convert("RGB"))
    array = np.asarray(_array(image))
    if hasattr(image, "numpy") and array.ndim == 3:
        array = array.transpose(1, 2, 0)
        array = array.repeat(3, axis=2) if array.shape[2] == 1 else array
    if np.issubdtype(array.dtype, np.floating):
        if array.min() < 0 or array.max() > 1:
            raise DataError(
                f"an image has values from {array.min():g} to {array.max():g}: bytes, or 0 to 1, are expected"
            )
        array = np.rint(array * 255).astype(np.uint8)
    return array


def _name_classes(given: Sequence[str], source: Any, train: Split, test: Split) -> tuple[str, ...]:
    """The classes that are named, by the decorator or the data set, or else numbers. Raises DataError."""
    features = getattr(source, "features", None) or {}
    label = next((features[name] for name in LABEL_COLUMNS if name in features), None)
    named = tuple(given or getattr(source, "classes", None) or getattr(label, "names", None) or ())
    count = len(named) or int(train.labels.max()) + 1
    for what, split in (("train", train), ("test", test)):
        if wrong := np.flatnonzero((split.labels < 0) | (split.labels >= count)).tolist():
            which = f"label {split.labels[wrong[0]]} of {what} image {wrong[0]}"
            raise DataError(f"{which} is out of range: 0 to {count - 1} are the classes of the training images")
    return tuple(map(str, named)) or tuple(map(str, range(count)))


def _describe(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"[:80]
