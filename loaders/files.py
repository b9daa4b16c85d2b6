"""Images that stay in their files, for sets whose images differ in size or do not fit into memory."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Progress = Callable[[str, int, int], None]
"""Called with the activity, the count done and the total."""

THREADS = 4
CHUNK = 200  # files between two reports of progress; no more tasks are queued than these
MOST_CORRUPT = 1e-4  # of a set's files, that may turn out to be corrupt while a run trains
NAMED = 3  # corrupt files that an error names
GREY = 127  # of the image that stands for a corrupt file


class DataError(ValueError):
    """The data set is missing, broken or contradictory: one line that names the file."""


@dataclass(frozen=True, eq=False, slots=True)
class Files:
    """The files of a split, about 100 bytes of memory for each; indexing gives the files of some images."""

    root: bytes
    paths: NDArray[np.bytes_]  # (N,), within the root, as the file system has them
    sizes: NDArray[np.int32]  # (N, 2), height and width
    digests: NDArray[np.uint8]  # (N, 32), SHA-256 of each file

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, chosen: Any) -> Files:
        return Files(self.root, *(array[chosen] for array in (self.paths, self.sizes, self.digests)))

    def path(self, index: int) -> bytes:
        return os.path.join(self.root, self.paths[index])  # noqa: PTH118 (Path takes no bytes)

    def content(self, index: int) -> bytes:
        """Of one file. Raises OSError, and DataError where it is not what it was."""
        with open(self.path(index), "rb", buffering=0) as file:  # noqa: PTH123 (a Path is slow)
            content = file.read()
        if hashlib.sha256(content).digest() != self.digests[index].tobytes():
            raise DataError("it has changed since it was hashed")
        return content

    def read(self, index: int) -> NDArray[np.uint8]:
        """One image in RGB, (height, width, 3), not turned by EXIF's orientation. Raises DataError."""
        from PIL import Image

        try:
            with Image.open(io.BytesIO(self.content(index))) as image:
                return to_rgb(image)
        except Exception as error:  # a broken file can make a decoder raise nearly anything
            raise DataError(_unreadable(self.path(index), error)) from error

    def read_or_grey(self, index: int) -> tuple[NDArray[np.uint8], str]:
        """One image; where its file is corrupt a grey one stands for it, and what is wrong comes with it."""
        try:
            return self.read(index), ""
        except DataError as error:
            return np.full((*self.sizes[index], 3), GREY, np.uint8), str(error)

    def check(self, index: int) -> str:
        """What is wrong with an image's file, if anything is."""
        return self.read_or_grey(index)[1]


def to_rgb(image: Any) -> NDArray[np.uint8]:
    """PIL's image as (height, width, 3); PIL itself makes white of more than 8 bits. Raises DataError."""
    from PIL import Image

    if image.mode in ("I", "F"):
        raise DataError(f"pixels of 32 bits (PIL's mode {image.mode}): 8 or 16 bits are allowed")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.asarray(image.convert("RGB"))


def show(path: bytes) -> str:
    """A path in a message; bytes that are no UTF-8 as \\xNN."""
    return path.decode(errors="backslashreplace")


def _unreadable(path: bytes, error: Exception) -> str:
    name, words = os.fsdecode(path), str(getattr(error, "strerror", None) or error) or repr(error)
    reason = "no known format" if "BytesIO" in words else words.splitlines()[0].replace(name, Path(name).name)
    return f"{show(path)}: not a readable image: {reason}"


def in_threads(work: Callable[[int], str], count: int, what: str, progress: Progress | None) -> list[str]:
    """What `work` gives for 0 to `count` - 1, by threads: PIL and hashing release the interpreter's lock."""
    from PIL import Image

    Image.init()  # not thread-safe on first use
    results: list[str] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, count, CHUNK):
            results += pool.map(work, range(first, min(first + CHUNK, count)))
            if progress:
                progress(what, len(results), count)
    return results


def index_files(root: Path, paths: NDArray[np.bytes_], progress: Progress | None) -> Files:
    """Read every file once: its hash, and from its header the image's size. Raises DataError."""
    from PIL import Image

    count = len(paths)
    sizes, digests = np.zeros((count, 2), np.int32), np.zeros((count, 32), np.uint8)
    files = Files(os.fsencode(root), paths, sizes, digests)

    def look(index: int) -> str:
        path = files.path(index)
        try:
            content = Path(os.fsdecode(path)).read_bytes()
            files.digests[index] = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
            with Image.open(io.BytesIO(content)) as image:
                files.sizes[index] = image.size[::-1]
        except Exception as error:  # of a header, too
            return _unreadable(path, error)
        return ""

    refuse(in_threads(look, count, "hashing image files", progress))
    return files


def refuse(wrong: Sequence[str]) -> None:
    """Raise DataError where a file's entry says what is wrong with it: it names the first ones."""
    if bad := list(filter(None, wrong)):
        more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise DataError(f"{len(bad)} of {len(wrong):,} image files cannot be read: {'; '.join(bad[:NAMED])}{more}")


@dataclass(slots=True)
class Corrupt:
    """Counts the files that turn out to be corrupt while a run trains, and refuses more than are allowed."""

    files: Files
    warn: Callable[[str], None]
    known: dict[int, str] = field(default_factory=dict)

    def add(self, indices: Sequence[int]) -> None:
        """Raises DataError where they are too many."""
        for index in set(indices) - self.known.keys():
            known = self.files.check(index) or f"{show(self.files.path(index))}: could not be read once"
            self.known[index] = known
            allowed = int(len(self.files) * MOST_CORRUPT)
            if len(self.known) > allowed:
                what = f"{len(self.known)} corrupt files of {len(self.files):,}, {allowed} are allowed"
                raise DataError(f"{what}: first {next(iter(self.known.values()))}; --scan names all")
            self.warn(f"{self.known[index]}; a grey image stands for it")
