"""Decoded images and hashed files of a data set, cached in a file by the signature of the source files (names, sizes, times)."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from harness.loaders.files import Files

CACHE_FORMAT = 1  # part of every signature: raise it when arrays come out differently from the same files


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

    def update(self, digest: Any) -> None:
        """Add images and labels to a hash."""
        content = self.images.digests if isinstance(self.images, Files) else self.images
        digest.update(repr(content.shape).encode())
        digest.update(np.ascontiguousarray(content).data)
        digest.update(np.ascontiguousarray(self.labels, "<i8").data)

    def pack(self, part: str) -> dict[str, NDArray[Any]]:
        """Arrays for the cache, from which `unpack` makes it; `part` begins their names."""
        arrays: dict[str, NDArray[Any]] = {"labels": self.labels}
        if isinstance(images := self.images, Files):
            paths = images.paths.view(np.uint8).reshape(len(images), -1)
            arrays |= {"paths": paths, "sizes": images.sizes, "digests": images.digests}
        else:
            arrays["images"] = images
        return {f"{part}_{name}": np.ascontiguousarray(array) for name, array in arrays.items()}


def unpack(arrays: dict[str, NDArray[Any]], part: str, root: bytes) -> Split:
    """The split of `Split.pack`."""
    own = {name.removeprefix(f"{part}_"): array for name, array in arrays.items()}
    if "images" in own:
        return Split(own["images"], own["labels"])
    paths = own["paths"].view(f"S{own['paths'].shape[1]}").ravel()
    return Split(Files(root, paths, own["sizes"], own["digests"]), own["labels"])


class Content(NamedTuple):
    """What is in the files of a data set: what the cache keeps, and what the fingerprint is taken over."""

    classes: tuple[str, ...]
    train: Split
    test: Split

    def fingerprint(self) -> str:
        """SHA-256 over images (of files: the SHA-256 of each), labels and class names of both splits, in hex."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for split in (self.train, self.test):
            split.update(digest)
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

    key = hashlib.sha256("\n".join((str(CACHE_FORMAT), *signature)).encode(errors="surrogateescape"))
    path = folder / f"{key.hexdigest()}.safetensors"
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
        root = bytes.fromhex(metadata.get("root", ""))
        splits = (unpack(arrays, part, root) for part in ("train", "test"))
        content = Content(tuple(json.loads(metadata["classes"])), *splits)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
    fingerprint = content.fingerprint()
    return (content, fingerprint) if metadata.get("fingerprint") == fingerprint else None


def _save(path: Path, content: Content) -> tuple[Content, str]:
    """Write beside the path, then rename: readers see the whole file or none."""
    from safetensors.numpy import save_file

    fingerprint = content.fingerprint()
    metadata = {"classes": json.dumps(content.classes), "fingerprint": fingerprint}
    if isinstance(content.train.images, Files):
        metadata["root"] = content.train.images.root.hex()  # no UTF-8, perhaps
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(content.train.pack("train") | content.test.pack("test"), part, metadata=metadata)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return content, fingerprint
