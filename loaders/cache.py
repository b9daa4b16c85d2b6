"""The images of a data set, and their cache: a file by the signature of the source files (names, sizes, times)."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

CACHE_FORMAT = 1  # part of every signature: raise it when arrays come out differently from the same files


@dataclass(frozen=True, eq=False, slots=True)
class Split:
    """Images and their labels."""

    images: NDArray[np.uint8]  # (N, H, W, 3), RGB
    labels: NDArray[np.int64]  # (N,), indices into the data set's classes

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False, slots=True)
class Content:
    """What is in the files of a data set: what the cache keeps, and what the fingerprint is taken over."""

    classes: tuple[str, ...]
    train: Split
    test: Split

    def parts(self) -> tuple[tuple[str, ...], Split, Split]:
        return self.classes, self.train, self.test

    def fingerprint(self) -> str:
        """SHA-256 over images, labels and class names of both splits, in hex."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for split in (self.train, self.test):
            digest.update(repr(split.images.shape).encode())
            digest.update(np.ascontiguousarray(split.images).data)
            digest.update(np.ascontiguousarray(split.labels, "<i8").data)
        return digest.hexdigest()


def cache_dir() -> Path:
    """The folder of caches and downloads: $HARNESS_CACHE, else ~/.cache/resnet-harness."""
    return Path(os.environ.get("HARNESS_CACHE") or Path.home() / ".cache" / "resnet-harness")


def cached(signature: Sequence[str], read: Callable[[], Content], folder: Path) -> tuple[Content, str]:
    """`read()` and its fingerprint, from the cache where the same signature was read before.

    What the cache holds is checked against its fingerprint, and read again if they differ. A cache that cannot be
    written costs time at every start, so there is a warning, but no error.
    """
    from safetensors import SafetensorError

    key = hashlib.sha256("\n".join((str(CACHE_FORMAT), *signature)).encode()).hexdigest()
    path = folder / f"{key}.safetensors"
    if hit := _load(path):
        return hit
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            return _load(path) or _save(path, read())  # another process may have been faster
    except (OSError, SafetensorError) as error:  # no room, no permission
        warnings.warn(f"{folder}: the cache cannot be written ({error}): decoding anew", stacklevel=2)
        content = read()
        return content, content.fingerprint()


def _load(path: Path) -> tuple[Content, str] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        train, test = (Split(arrays[f"{part}_images"], arrays[f"{part}_labels"]) for part in ("train", "test"))
        content = Content(tuple(json.loads(metadata["classes"])), train, test)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
    fingerprint = content.fingerprint()
    return (content, fingerprint) if metadata.get("fingerprint") == fingerprint else None


def _save(path: Path, content: Content) -> tuple[Content, str]:
    """Write beside the path, then rename: readers see the whole file or none."""
    from safetensors.numpy import save_file

    fingerprint = content.fingerprint()
    metadata = {"classes": json.dumps(content.classes), "fingerprint": fingerprint}
    arrays = {"train_images": content.train.images, "train_labels": content.train.labels}
    arrays |= {"test_images": content.test.images, "test_labels": content.test.labels}
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, part, metadata=metadata)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return content, fingerprint
