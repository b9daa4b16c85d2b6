"""The images of a data set, and their cache: a file by the signature of the source files (names, sizes, times)."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        height, width = self.sizes(slice(1))[0].tolist()
        same = not isinstance(self.images, Files) or bool((self.images.sizes == (height, width)).all())
        return (height, width) if same else None

    def sizes(self, chosen: Any) -> NDArray[np.int32]:
        """(n, 2): height and width of some images."""
        images = self.images
        sizes = images.sizes if isinstance(images, Files) else np.full((1, 2), images.shape[1:3], np.int32)
        chosen_sizes: NDArray[np.int32] = np.broadcast_to(sizes, (len(self), 2))[chosen]
        return chosen_sizes

    def take(self, chosen: Any) -> Split:
        """Some of the images, as an array of indices or a mask says."""
        return Split(self.images[chosen], self.labels[chosen])

    def update(self, digest: Any) -> None:
        """Add images and labels to a hash."""
        content = self.images.digests if isinstance(self.images, Files) else self.images
        digest.update(repr(content.shape).encode())
        digest.update(np.ascontiguousarray(content).data)
        digest.update(np.ascontiguousarray(self.labels, "<i8").data)

    def pack(self) -> dict[str, NDArray[Any]]:
        """Arrays for the cache, from which `unpack` makes it."""
        images = self.images
        if not isinstance(images, Files):
            return {"images": images, "labels": self.labels}
        paths = images.paths.view(np.uint8).reshape(len(images), -1)
        return {"paths": paths, "sizes": images.sizes, "digests": images.digests, "labels": self.labels}


def unpack(arrays: dict[str, NDArray[Any]], root: bytes) -> Split:
    """The split of `Split.pack`."""
    if "images" in arrays:
        return Split(arrays["images"], arrays["labels"])
    paths = arrays["paths"].view(f"S{arrays['paths'].shape[1]}").ravel()
    return Split(Files(root, paths, arrays["sizes"], arrays["digests"]), arrays["labels"])


@dataclass(frozen=True, eq=False, slots=True)
class Content:
    """What is in the files of a data set: what the cache keeps, and what the fingerprint is taken over."""

    classes: tuple[str, ...]
    train: Split
    test: Split

    def parts(self) -> tuple[tuple[str, ...], Split, Split]:
        return self.classes, self.train, self.test

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
        train, test = (
            unpack(
                {name.removeprefix(part): array for name, array in arrays.items() if name.startswith(part)}, root
            )
            for part in ("train_", "test_")
        )
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
    if isinstance(content.train.images, Files):
        metadata["root"] = content.train.images.root.hex()  # no UTF-8, perhaps
    arrays = {f"train_{name}": array for name, array in content.train.pack().items()}
    arrays |= {f"test_{name}": array for name, array in content.test.pack().items()}
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, part, metadata=metadata)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return content, fingerprint
