"""Data sets: which files they are, what is known about them, and their images as uint8 arrays.

Images are decoded once. The arrays are kept in one file of the cache folder, named by the fingerprint of
what it holds; a small index leads from the names, sizes and times of the source files to that fingerprint, so
that the next start decodes nothing. Nothing here imports torch, except to read CIFAR-10 in its own format.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DATASETS: tuple[str, ...] = ("cifar10", "cifar2", "digits", "miniplaces")
"""The names `load_dataset` knows; `folder:PATH` is the other way to name one."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and how much there is."""

CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
MINIPLACES_TRAIN_IMAGES = 100_000
IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp"))
CACHE_FORMAT = 1  # part of every signature: raise it when arrays come out differently from the same files
MIXED_SEED = 20151210
DOWNLOAD_TIMEOUT_SECONDS = 20
DECODE_CHUNK = 200
DECODE_THREADS = 4


class DataError(ValueError):
    """The data asked for is missing, broken or contradictory: one line that names the file."""


@dataclass(frozen=True, eq=False, slots=True)
class Split:
    """Images and their labels."""

    images: NDArray[np.uint8]
    """(N, H, W, 3), RGB."""
    labels: NDArray[np.int64]
    """(N,), indices into the data set's classes."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False, slots=True)
class Dataset:
    """A data set in memory."""

    name: str  # as it was asked for
    label: str  # for tables: says so when the images are not the published ones
    fingerprint: str  # SHA-256 over images, labels and class names of both splits, in hex
    original: bool  # the published images themselves, so published errors may stand beside ours
    classes: tuple[str, ...]
    train: Split
    test: Split
    flip: bool  # a mirrored image keeps its label

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def image_size(self) -> int:
        """Side of the square images, in pixels."""
        return int(self.train.images.shape[1])


def check_dataset_name(name: str) -> None:
    """Raise DataError unless `load_dataset` knows the name. The files are not looked at."""
    if name in DATASETS or (name.startswith("folder:") and name != "folder:"):
        return
    close = difflib.get_close_matches(name, (*DATASETS, "folder:"), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise DataError(f"unknown data set {name!r}: {hint}allowed are {', '.join(DATASETS)} and folder:PATH")


def load_dataset(
    name: str,
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Read a data set, from the cache where it was decoded before.

    cifar10, cifar2 (its first two classes): `data_dir` holds class folders (train/<class>/*, test/<class>/*) or
    torchvision's `cifar-10-batches-py`, whose checksums are then checked; without it torchvision downloads it.
    digits: scikit-learn's, 1,437 + 360 images scaled from 8x8 to 32x32; takes no `data_dir`.
    miniplaces: `data_dir` holds the development kit: train.txt, val.txt, categories.txt, images/. Its test split
    is the kit's validation list. folder:PATH: any class folders of square images of one size.

    The cache is `cache_dir`, else $HARNESS_CACHE, else ~/.cache/resnet-harness. Raises DataError.
    """
    check_dataset_name(name)
    cache = cache_dir or Path(os.environ.get("HARNESS_CACHE") or Path.home() / ".cache" / "resnet-harness")
    if data_dir is not None and (name == "digits" or name.startswith("folder:")):
        where = "inside scikit-learn" if name == "digits" else "at the path in its name"
        raise DataError(f"data set {name} lies {where}: it takes no data folder, got {data_dir}")
    if name == "digits":
        return _load_digits(cache)
    if name == "miniplaces":
        return _load_miniplaces(data_dir, cache, progress)
    if name.startswith("folder:"):
        return _load_class_folders(name, Path(name.removeprefix("folder:")).expanduser(), cache, progress)
    cifar10 = _load_cifar10(data_dir, cache, progress)
    return cifar10 if name == "cifar10" else _first_two_classes(cifar10)


def limit(split: Split, count: int) -> Split:
    """The first `count` images of one fixed, mixed order in which classes take turns. Raises DataError."""
    if not 0 < count <= len(split):
        raise DataError(f"cannot take {count} of {len(split)} images: allowed are 1 to {len(split)}")
    mixed = np.random.Generator(np.random.PCG64(MIXED_SEED)).permutation(len(split))
    turn = np.empty(len(split), np.int64)  # which image of its class it is, in the mixed order
    for label in np.unique(split.labels):
        mine = mixed[split.labels[mixed] == label]
        turn[mine] = np.arange(len(mine))
    chosen = mixed[np.argsort(turn[mixed], kind="stable")][:count]
    return Split(split.images[chosen], split.labels[chosen])


def hold_out(split: Split, count: int, seed: int, *, stratified: bool = True) -> tuple[Split, Split]:
    """Split into (rest, `count` held out), drawn by `seed`; stratified: every class in proportion.

    Both keep the order of `split`. Raises DataError.
    """
    if not 0 < count < len(split):
        raise DataError(f"cannot hold out {count} of {len(split)} images: allowed are 1 to {len(split) - 1}")
    generator = np.random.Generator(np.random.PCG64(seed))
    held = np.zeros(len(split), bool)
    if not stratified:
        held[generator.permutation(len(split))[:count]] = True
        return Split(split.images[~held], split.labels[~held]), Split(split.images[held], split.labels[held])
    classes, sizes = np.unique(split.labels, return_counts=True)
    exact = sizes * count / len(split)
    shares = exact.astype(np.int64)
    largest_remainder = np.argsort(shares - exact, kind="stable")[: count - shares.sum()]
    shares[largest_remainder] += 1
    for label, share in zip(classes, shares, strict=True):
        mine = np.flatnonzero(split.labels == label)
        held[generator.permutation(mine)[:share]] = True
    return Split(split.images[~held], split.labels[~held]), Split(split.images[held], split.labels[held])


# ---- the data sets ---------------------------------------------------------------------------------------------


def _load_digits(cache: Path) -> Dataset:
    from importlib.metadata import version  # scikit-learn itself takes a second to import

    def read() -> _Content:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
        # Every pixel four times each way: ResNet-20 errs by 0.7 points less than with smooth enlargement.
        images = np.ascontiguousarray(grey.repeat(4, axis=1).repeat(4, axis=2)[..., None].repeat(3, axis=3))
        train, test = hold_out(Split(images, bunch.target.astype(np.int64)), 360, seed=0)
        return _Content(tuple(str(name) for name in bunch.target_names), train, test)

    content, fingerprint = _cached(["digits", version("scikit-learn")], read, cache)
    return Dataset("digits", "digits", fingerprint, True, *content.parts(), flip=False)


def _load_cifar10(data_dir: Path | None, cache: Path, progress: Progress | None) -> Dataset:
    if data_dir is None:
        data_dir = cache / "downloads"
        if not (data_dir / "cifar-10-batches-py").is_dir():
            _download_cifar10(data_dir)
    if not (data_dir / "cifar-10-batches-py").is_dir():
        dataset = _load_class_folders("cifar10", data_dir, cache, progress)
        if dataset.classes != CIFAR10_CLASSES:
            found = ", ".join(dataset.classes[:3])
            raise DataError(f"{data_dir}: not CIFAR-10's classes ({found}, ...): try folder:{data_dir}")
        return dataset
    batches = data_dir / "cifar-10-batches-py"
    with os.scandir(batches) as entries:
        stats = sorted((entry.name, entry.stat()) for entry in entries)
    signature = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]
    signature = ["cifar-10-batches-py", str(batches.resolve()), *signature]
    content, fingerprint = _cached(signature, lambda: _read_cifar10(data_dir), cache)
    return Dataset("cifar10", "cifar10", fingerprint, True, *content.parts(), flip=True)


def _read_cifar10(root: Path) -> _Content:
    from torchvision.datasets import CIFAR10

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, about the age of the pickles
        try:
            train, test = (CIFAR10(root, train=train, download=False) for train in (True, False))
        except RuntimeError as error:
            path = root / "cifar-10-batches-py"
            raise DataError(f"{path}: incomplete or corrupt: a file's checksum is not CIFAR-10's") from error
    splits = (Split(part.data, np.asarray(part.targets, np.int64)) for part in (train, test))
    return _Content(CIFAR10_CLASSES, *splits)


def _download_cifar10(root: Path) -> None:
    from torchvision.datasets import CIFAR10

    timeout = socket.getdefaulttimeout()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / "cifar10.lock"):
            socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)  # torchvision sets none
            CIFAR10(root, download=True)  # leaves alone what another process has just brought
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"cifar10 cannot be downloaded ({reason}): name a folder that has it with --data-dir, "
            "or train on the embedded images with --dataset digits"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _first_two_classes(whole: Dataset) -> Dataset:
    def first_two(split: Split) -> Split:
        chosen = split.labels < 2
        return Split(split.images[chosen], split.labels[chosen])

    content = _Content(whole.classes[:2], first_two(whole.train), first_two(whole.test))
    label = "cifar2" if whole.original else f"cifar2 of {whole.label}"
    return Dataset("cifar2", label, content.fingerprint(), whole.original, *content.parts(), flip=True)


def _load_class_folders(name: str, root: Path, cache: Path, progress: Progress | None) -> Dataset:
    if not root.is_dir():
        raise DataError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}")
    train_classes, train = _list_class_folders(root, "train")
    test_classes, test = _list_class_folders(root, "test")
    if train_classes != test_classes:
        only = [
            f"{', '.join(sorted(classes))} only in {where}"
            for where, classes in (
                ("train", set(train_classes) - set(test_classes)),
                ("test", set(test_classes) - set(train_classes)),
            )
            if classes
        ]
        raise DataError(f"{root}: classes differ between train and test: {'; '.join(only)}")
    signature = ["class folders", str(root.resolve()), str(train), str(test)]
    content, fingerprint = _cached(
        signature, lambda: _decode(root, tuple(train_classes), train, test, progress), cache
    )
    label = root.resolve().name or "folder"
    if label in DATASETS:  # never to be taken for the published images
        label = f"{label}@{fingerprint[:8]}"
    return Dataset(name, label, fingerprint, False, *content.parts(), flip=True)


def _list_class_folders(root: Path, split: str) -> tuple[list[str], list[_File]]:
    folder = root / split
    if not folder.is_dir():
        raise DataError(f"{root}: no folder {split!r}: expected train/<class>/* and test/<class>/*")
    with os.scandir(folder) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] != ".")
    if not classes:
        raise DataError(f"{folder}: no class folders: expected {split}/<class>/*")
    files: list[_File] = []
    for label, name in enumerate(classes):
        before = len(files)
        with os.scandir(folder / name) as entries:
            for entry in entries:
                dot = entry.name.rfind(".")
                if dot > 0 and entry.name[dot:].lower() in IMAGE_SUFFIXES:
                    stat = entry.stat()
                    files.append((f"{split}/{name}/{entry.name}", label, stat.st_size, stat.st_mtime_ns))
        if len(files) == before:
            raise DataError(f"{folder / name}: no images in this class folder")
    files.sort(key=itemgetter(1, 0))
    return classes, files


def _load_miniplaces(root: Path | None, cache: Path, progress: Progress | None) -> Dataset:
    if root is None:
        raise DataError("miniplaces is not downloaded: name the development kit's folder with --data-dir")
    if not root.is_dir():
        raise DataError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}")
    classes: dict[int, str] = {}
    for number, path, label in _list_lines(root / "categories.txt"):
        if label in classes:
            raise DataError(f"{root / 'categories.txt'} line {number}: label {label} is {classes[label]} already")
        classes[label] = path
    if sorted(classes) != list(range(len(classes))):
        raise DataError(f"{root / 'categories.txt'}: labels are not 0 to {len(classes) - 1}")
    train, test = (_list_kit(root, name, len(classes)) for name in ("train.txt", "val.txt"))
    names = tuple(classes[label] for label in range(len(classes)))
    signature = ["miniplaces", str(root.resolve()), str(names), str(train), str(test)]
    content, fingerprint = _cached(signature, lambda: _decode(root, names, train, test, progress), cache)
    whole = len(content.train) >= MINIPLACES_TRAIN_IMAGES
    name = "miniplaces" if whole else root.resolve().name
    if name in DATASETS and not whole:
        per_class = np.bincount(content.train.labels, minlength=len(names))
        name = f"{name}-{per_class[0]}" if np.ptp(per_class) == 0 else f"{name}@{fingerprint[:8]}"
    return Dataset("miniplaces", name, fingerprint, whole, *content.parts(), flip=True)


def _list_kit(root: Path, name: str, num_classes: int) -> list[_File]:
    files: list[_File] = []
    for number, path, label in _list_lines(root / name):
        try:
            stat = (root / "images" / path).stat()
        except OSError as error:
            raise DataError(f"{root / name} line {number}: no file {root / 'images' / path}") from error
        if not 0 <= label < num_classes:
            raise DataError(f"{root / name} line {number}: label {label} is not in categories.txt")
        files.append((f"images/{path}", label, stat.st_size, stat.st_mtime_ns))
    return files


def _list_lines(path: Path) -> Iterator[tuple[int, str, int]]:
    """(line number, path, label) of each line `path label`."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: expected lines of a path and a label") from error
    if not any(line.strip() for line in lines):
        raise DataError(f"{path}: empty: expected lines of a path and a label")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdecimal():
            raise DataError(f"{path} line {number}: {line.strip()[:80]!r} is not a path and a label")
        yield number, name.strip(), int(label)


# ---- decoding --------------------------------------------------------------------------------------------------


_File = tuple[str, int, int, int]  # path within the data set's folder, label, bytes, time of change in ns


def _decode(
    root: Path,
    classes: tuple[str, ...],
    train: Sequence[_File],
    test: Sequence[_File],
    progress: Progress | None,
) -> _Content:
    """Decode every file to RGB. Threads, because PIL lets go of the interpreter while it decodes."""
    from PIL import Image

    files = [*train, *test]
    first = root / files[0][0]
    width, height = _read_image(first).shape[1::-1]
    if width != height:
        raise DataError(f"{first}: image is {width}x{height}: only square images are supported")
    images = np.empty((len(files), height, width, 3), np.uint8)

    def decode(start: int) -> int:
        for index, (path, *_) in enumerate(files[start : start + DECODE_CHUNK], start):
            image = _read_image(root / path)
            if image.shape != images.shape[1:]:
                size = f"{image.shape[1]}x{image.shape[0]}"
                raise DataError(f"{root / path}: image is {size}, others are {width}x{height} ({first})")
            images[index] = image
        return min(start + DECODE_CHUNK, len(files))

    Image.init()  # not thread-safe on first use
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        for done in pool.map(decode, range(0, len(files), DECODE_CHUNK)):
            if progress:
                progress("decoding images", done, len(files))
    labels = np.array([label for _, label, *_ in files], np.int64)
    cut = len(train)
    return _Content(classes, Split(images[:cut], labels[:cut]), Split(images[cut:], labels[cut:]))


def _read_image(path: Path) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # a broken file can make a decoder raise nearly anything
        reason = str(error).splitlines()[0].replace(str(path), path.name) if str(error) else repr(error)
        raise DataError(f"{path}: not a readable image: {reason}") from error


# ---- the cache -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class _Content:
    """What the cache keeps, and what the fingerprint is taken over."""

    classes: tuple[str, ...]
    train: Split
    test: Split

    def parts(self) -> tuple[tuple[str, ...], Split, Split]:
        return self.classes, self.train, self.test

    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for split in (self.train, self.test):
            digest.update(repr(split.images.shape).encode())
            digest.update(np.ascontiguousarray(split.images).data)
            digest.update(np.ascontiguousarray(split.labels, "<i8").data)
        return digest.hexdigest()


def _cached(signature: list[str], read: Callable[[], _Content], cache: Path) -> tuple[_Content, str]:
    """`read()` and its fingerprint, from the cache where the same signature was read before.

    What the cache holds is checked against its fingerprint; anything wrong with it means reading again. A cache
    that cannot be written costs time at every start, so it is warned of, but is no error.
    """
    from safetensors import SafetensorError

    key = hashlib.sha256("\n".join((str(CACHE_FORMAT), *signature)).encode()).hexdigest()
    index = cache / "index" / f"{key}.json"
    found = _load_cached(index, cache)
    if found:
        return found
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        with _lock(index.with_suffix(".lock")):
            found = _load_cached(index, cache)  # another process may have been faster
            if found:
                return found
            content = read()
            fingerprint = content.fingerprint()
            _save_content(content, cache / f"{fingerprint}.safetensors")
            _write_whole(index, lambda part: part.write_text(json.dumps({"fingerprint": fingerprint})))
            return content, fingerprint
    except (OSError, SafetensorError) as error:  # no room, no permission
        warnings.warn(f"{cache}: the cache cannot be written ({error}): decoding anew", stacklevel=2)
        content = read()
        return content, content.fingerprint()


def _load_cached(index: Path, cache: Path) -> tuple[_Content, str] | None:
    from safetensors import SafetensorError, safe_open

    try:
        fingerprint = str(json.loads(index.read_text())["fingerprint"])
        with safe_open(cache / f"{fingerprint}.safetensors", "np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            classes = tuple(json.loads(file.metadata()["classes"]))
        train, test = (Split(arrays[f"{part}_images"], arrays[f"{part}_labels"]) for part in ("train", "test"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
    content = _Content(classes, train, test)
    return (content, fingerprint) if content.fingerprint() == fingerprint else None


def _save_content(content: _Content, path: Path) -> None:
    from safetensors.numpy import save_file

    arrays = {
        f"{name}_{field}": np.ascontiguousarray(getattr(split, field))
        for name, split in (("train", content.train), ("test", content.test))
        for field in ("images", "labels")
    }
    metadata = {"classes": json.dumps(content.classes)}
    _write_whole(path, lambda part: save_file(arrays, part, metadata=metadata))


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the path, then rename: readers see the whole file or none."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    from filelock import FileLock

    with FileLock(path):
        yield
