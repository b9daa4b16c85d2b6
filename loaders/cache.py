"""The cache of decoded data sets: one file of arrays each, named by the fingerprint of its contents.

A small index leads from the signature of the source files (names, sizes, times) to that fingerprint, so that the
next start decodes nothing. This module knows nothing of what the arrays mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

CACHE_FORMAT = 1  # part of every signature: raise it when arrays come out differently from the same files

Arrays = dict[str, NDArray[Any]]
Metadata = dict[str, str]


class Cacheable(Protocol):
    """A value that consists of arrays and a few words about them; `fingerprint` is a hash of all."""

    def to_arrays(self) -> tuple[Arrays, Metadata]: ...
    @classmethod
    def from_arrays(cls, arrays: Arrays, metadata: Metadata) -> Self: ...
    def fingerprint(self) -> str: ...


Value = TypeVar("Value", bound=Cacheable)


def cache_dir() -> Path:
    """The folder of caches and downloads: $HARNESS_CACHE, else ~/.cache/resnet-harness."""
    return Path(os.environ.get("HARNESS_CACHE") or Path.home() / ".cache" / "resnet-harness")


def cached(
    signature: Sequence[str], read: Callable[[], Value], kind: type[Value], folder: Path
) -> tuple[Value, str]:
    """`read()` and its fingerprint, from the cache where the same signature was read before.

    What the cache holds is checked against its fingerprint, and read again if they differ. A cache that cannot be
    written costs time at every start, so there is a warning, but no error.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    key = hashlib.sha256("\n".join((str(CACHE_FORMAT), *signature)).encode()).hexdigest()
    index = folder / "index" / f"{key}.json"
    hit = _load(index, kind, folder)
    if hit:
        return hit
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        with lock(index.with_suffix(".lock")):
            hit = _load(index, kind, folder)  # another process may have been faster
            if hit:
                return hit
            value = read()
            fingerprint = value.fingerprint()
            arrays, metadata = value.to_arrays()
            whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            path = folder / f"{fingerprint}.safetensors"
            _write_atomic(path, lambda part: save_file(whole, part, metadata=metadata))
            _write_atomic(index, lambda part: part.write_text(json.dumps({"fingerprint": fingerprint})))
            return value, fingerprint
    except (OSError, SafetensorError) as error:  # no room, no permission
        warnings.warn(f"{folder}: the cache cannot be written ({error}): decoding anew", stacklevel=2)
        value = read()
        return value, value.fingerprint()


def lock(path: Path) -> AbstractContextManager[Any]:
    """Held by one process at a time."""
    from filelock import FileLock

    return FileLock(path)


def _load(index: Path, kind: type[Value], folder: Path) -> tuple[Value, str] | None:
    from safetensors import SafetensorError, safe_open

    try:
        fingerprint = str(json.loads(index.read_text())["fingerprint"])
        with safe_open(folder / f"{fingerprint}.safetensors", "np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            value = kind.from_arrays(arrays, file.metadata())
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
    return (value, fingerprint) if value.fingerprint() == fingerprint else None


def _write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the path, then rename: readers see the whole file or none."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
