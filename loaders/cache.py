"""Decoded images and hashed files of a data set, cached in a file by the signature of the source files (names, sizes, times)."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from harness.loaders.files import Files

CACHE_FORMAT = 2  # part of every signature: raise it when arrays come out differently from the same files
LOCK_SECONDS = 10.0  # until it is said who is waited for


@dataclass(frozen=True, eq=False, slots=True)
class Split:
    """Images and their labels."""

    images: NDArray[np.uint8] | Files  # (N, H, W, 3), RGB, or the files that they are read from
    labels: NDArray[np.int64]  # (N,), indices into the data set's classes

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """Images in memory. Raises ValueError where they are not."""
        if isinstance(self.images, Files):
            raise ValueError("these images are read from their files, not kept in memory")
        return self.images

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of every image; None where they differ."""
        sizes = self.sizes
        height, width = sizes[0].tolist()
        return (height, width) if (sizes == sizes[0]).all() else None

    @property
    def sizes(self) -> NDArray[np.int32]:
        """(N, 2): height and width of every image."""
        images = self.images
        sizes = images.sizes if isinstance(images, Files) else np.array(images.shape[1:3], np.int32)
        return np.broadcast_to(sizes, (len(self), 2))

    def take(self, chosen: Any) -> Split:
        """Some of the images, as an array of indices or a mask says."""
        return Split(self.images[chosen], self.labels[chosen])


class Content(NamedTuple):
    """What is in the files of a data set, and in the cache."""

    fingerprint: str  # SHA-256 over images (of files: the SHA-256 of each), labels and class names, in hex
    classes: tuple[str, ...]
    train: Split
    test: Split

    @classmethod
    def of(cls, classes: tuple[str, ...], train: Split, test: Split) -> Content:
        """With its fingerprint."""
        digest = hashlib.sha256(json.dumps(classes).encode())
        for split in (train, test):
            content = split.images.digests if isinstance(split.images, Files) else split.images
            digest.update(repr(content.shape).encode())
            digest.update(np.ascontiguousarray(content).data)
            digest.update(np.ascontiguousarray(split.labels, "<i8").data)
        return cls(digest.hexdigest(), classes, train, test)


def cache_dir() -> Path:
    """The folder of caches and downloads: $HARNESS_CACHE, else ~/.cache/resnet-harness."""
    return Path(os.environ.get("HARNESS_CACHE") or "~/.cache/resnet-harness").expanduser().absolute()


def cached(signature: Sequence[str], read: Callable[[], Content], folder: Path) -> Content:
    """What `read()` gives, from the cache where the same signature was read before.

    What the cache holds is checked against its fingerprint, and read again if they differ. A cache that cannot be
    written costs time at every start, so there is a warning, but no error.
    """
    key = hashlib.sha256("\n".join((str(CACHE_FORMAT), *signature)).encode(errors="surrogateescape"))
    path = folder / f"{key.hexdigest()}.npz"
    if hit := _load(path):
        return hit
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        try:
            held = lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            warnings.warn(f"{folder}: waiting for another process that decodes these images", stacklevel=2)
            held = lock.acquire()
        with held:
            return _load(path) or _save(path, read())  # another process may have been faster
    except OSError as error:  # no room, no permission
        warnings.warn(f"{folder}: the cache cannot be written ({error}): decoding anew", stacklevel=2)
        return read()


def _load(path: Path) -> Content | None:
    try:
        with path.open("rb") as file, np.load(file) as archive:
            arrays = dict(archive)
        splits = list[Split]()
        for part in ("train", "test"):
            if (images := arrays.get(f"{part}_images")) is None:
                images = Files(*(arrays[f"{part}_{each.name}"][()] for each in fields(Files)))
            splits.append(Split(images, arrays[f"{part}_labels"]))
        content = Content.of(tuple(arrays["classes"].tolist()), *splits)
        return content if arrays["fingerprint"] == content.fingerprint else None
    except Exception:  # a damaged archive can make its reader raise nearly anything
        return None


def _save(path: Path, content: Content) -> Content:
    """Write beside the path, then rename: readers see the whole file or none."""
    arrays: dict[str, Any] = {"classes": content.classes, "fingerprint": content.fingerprint}
    for part, split in (("train", content.train), ("test", content.test)):
        arrays[f"{part}_labels"] = split.labels
        if isinstance(images := split.images, Files):
            arrays |= {f"{part}_{each.name}": getattr(images, each.name) for each in fields(Files)}
        else:
            arrays[f"{part}_images"] = images
    new = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        np.savez(new, **arrays)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    return content
