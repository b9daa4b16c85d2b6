"""Images of a data set, in memory or in their files; and their cache: a file by the signature of the source files (names,
sizes, times)."""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

CACHE_FORMAT = 1  # part of every signature: raise it when arrays come out differently from the same files
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
        return Files(self.root, self.paths[chosen], self.sizes[chosen], self.digests[chosen])

    def path(self, index: int) -> bytes:
        return os.path.join(self.root, self.paths[index])  # noqa: PTH118 (Path takes no bytes)

    def read(self, index: int) -> NDArray[np.uint8]:
        """One image in RGB, (height, width, 3), not turned by EXIF's orientation. Raises DataError."""
        from PIL import Image

        path = self.path(index)
        try:
            with Image.open(os.fsdecode(path)) as image:
                pixels = np.asarray(image.convert("RGB"))
        except Exception as error:  # a broken file can make a decoder raise nearly anything
            raise DataError(f"{show(path)}: not a readable image: {_reason(error, path)}") from error
        if pixels.shape[:2] != tuple(self.sizes[index]):
            raise DataError(f"{show(path)}: is another image than when the run began")
        return pixels

    def read_or_grey(self, index: int) -> tuple[NDArray[np.uint8], str]:
        """One image; where its file is corrupt a grey one stands for it, and what is wrong comes with it."""
        try:
            return self.read(index), ""
        except DataError as error:
            return np.full((*self.sizes[index], 3), GREY, np.uint8), str(error)

    def check(self, index: int) -> str:
        """What is wrong with an image's file, if anything is."""
        return self.read_or_grey(index)[1]


def show(path: bytes) -> str:
    """A path in a message; bytes that are no UTF-8 as \\xNN."""
    return path.decode(errors="backslashreplace")


def _reason(error: Exception, path: bytes) -> str:
    words = str(getattr(error, "strerror", None) or error)
    return words.splitlines()[0].replace(os.fsdecode(path), Path(os.fsdecode(path)).name) if words else repr(error)


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
    """Read every file once: its hash, and the image's size from its header. Raises DataError."""
    from PIL import Image

    count = len(paths)
    files = Files(os.fsencode(root), paths, np.zeros((count, 2), np.int32), np.zeros((count, 32), np.uint8))

    def look(index: int) -> str:
        path = files.path(index)
        try:
            content = Path(os.fsdecode(path)).read_bytes()
            files.digests[index] = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
            with Image.open(io.BytesIO(content)) as image:
                files.sizes[index] = image.size[::-1]
        except Exception as error:  # of a header, too
            reason = "no known format" if "BytesIO" in str(error) else _reason(error, path)
            return f"{show(path)}: not a readable image: {reason}"
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


# --- what is cached ---


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
