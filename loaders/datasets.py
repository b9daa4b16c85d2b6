"""Data sets: which files they are, what is known about them, and their images as uint8 arrays.

Images are decoded once and then read from the cache (`cache.py`). Nothing here imports torch, except to read
CIFAR-10 in its own format.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import socket
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from harness.loaders.cache import Arrays, Metadata, cache_dir, cached, lock
from harness.loaders.cifar import SUPERCLASS, SUPERCLASSES, TORCHVISION

DATASETS: tuple[str, ...] = ("cifar10", "cifar2", "cifar100", "cifar100-coarse", "digits", "miniplaces")
"""The names `load_dataset` knows; `folder:PATH` is the other way to name one."""

Progress = Callable[[str, int, int], None]
"""Called with the activity, the count done and the total."""

MINIPLACES_TRAIN_IMAGES = 100_000
ORIGINAL = {"09a5676e728262a768e427676db1b20e1ae9945c739c767c91d3143e7d255138"}  # digits
"""Fingerprints of published images. CIFAR-10's files have MD5 sums in torchvision; those of Mini-Places2 are not known here."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp")
MIXED_SEED = 20151210
DOWNLOAD_TIMEOUT_SECONDS = 20
DECODE_CHUNK = 200
DECODE_THREADS = 4


class DataError(ValueError):
    """The data set is missing, broken or contradictory: one line that names the file."""


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
class Content:
    """What is in the files of a data set: what the cache keeps, and what the fingerprint is taken over."""

    classes: tuple[str, ...]
    train: Split
    test: Split

    def parts(self) -> tuple[tuple[str, ...], Split, Split]:
        return self.classes, self.train, self.test

    def to_arrays(self) -> tuple[Arrays, Metadata]:
        arrays: Arrays = {"train_images": self.train.images, "train_labels": self.train.labels}
        arrays |= {"test_images": self.test.images, "test_labels": self.test.labels}
        return arrays, {"classes": json.dumps(self.classes)}

    @classmethod
    def from_arrays(cls, arrays: Arrays, metadata: Metadata) -> Self:
        train, test = (Split(arrays[f"{part}_images"], arrays[f"{part}_labels"]) for part in ("train", "test"))
        return cls(tuple(json.loads(metadata["classes"])), train, test)

    def fingerprint(self) -> str:
        """SHA-256 over images, labels and class names of both splits, in hex."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for split in (self.train, self.test):
            digest.update(repr(split.images.shape).encode())
            digest.update(np.ascontiguousarray(split.images).data)
            digest.update(np.ascontiguousarray(split.labels, "<i8").data)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False, slots=True)
class Dataset:
    """A data set in memory."""

    name: str  # as `load_dataset` was called
    label: str  # for tables: shows when the images are not the published ones
    fingerprint: str  # `Content.fingerprint`
    original: bool  # the published images themselves: published errors are comparable
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
    hint = suggest(name, (*DATASETS, "folder:"))
    raise DataError(f"unknown data set {name!r}: {hint}allowed are {', '.join(DATASETS)} and folder:PATH")


def suggest(word: str, allowed: Iterable[str]) -> str:
    """ "did you mean ...? ", or nothing where no allowed word is close."""
    close = difflib.get_close_matches(word, list(allowed), n=1)
    return f"did you mean {close[0]!r}? " if close else ""


class _File(NamedTuple):
    path: str  # within the data set's folder
    label: int
    size: int
    modified_ns: int


def load_dataset(
    name: str, data_dir: Path | None = None, cache: Path | None = None, progress: Progress | None = None
) -> Dataset:
    """Read a data set, from the cache where it was decoded before.

    cifar10, cifar2 (its first two classes), cifar100, cifar100-coarse (its 20 superclasses): `data_dir` holds class
    folders (train/<class>/*, test/<class>/*; for CIFAR-100 the fine classes) or torchvision's folder of batches, whose
    checksums are then checked; without it torchvision downloads it.
    digits: scikit-learn's, 1,437 + 360 images scaled from 8x8 to 32x32; takes no `data_dir`.
    miniplaces: `data_dir` holds the development kit: train.txt, val.txt, categories.txt, images/. Its test split
    is the kit's validation list. folder:PATH: any class folders of square images of one size.

    The cache is `cache`, else `cache_dir()`. Raises DataError.
    """
    check_dataset_name(name)
    cache = cache or cache_dir()
    if data_dir is not None and (name == "digits" or name.startswith("folder:")):
        where = "is part of scikit-learn" if name == "digits" else "names its own path"
        raise DataError(f"data set {name} {where}: it takes no data folder, got {data_dir}")
    if name == "digits":
        return _load_digits(cache)
    if name == "miniplaces":
        return _load_miniplaces(data_dir, cache, progress)
    if name.startswith("folder:"):
        return _load_class_folders(name, Path(name.removeprefix("folder:")).expanduser(), cache, progress)
    whole = _load_cifar("cifar100" if name.startswith("cifar100") else "cifar10", data_dir, cache, progress)
    if name == whole.name:
        return whole
    return _first_two_classes(whole) if name == "cifar2" else _superclasses(whole)


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
    if stratified:
        classes, sizes = np.unique(split.labels, return_counts=True)
        exact = sizes * count / len(split)
        shares = exact.astype(np.int64)
        largest_remainder = np.argsort(shares - exact, kind="stable")[: count - shares.sum()]
        shares[largest_remainder] += 1
        for label, share in zip(classes, shares, strict=True):
            held[generator.permutation(np.flatnonzero(split.labels == label))[:share]] = True
    else:
        held[generator.permutation(len(split))[:count]] = True
    return Split(split.images[~held], split.labels[~held]), Split(split.images[held], split.labels[held])


# ---- the data sets ---------------------------------------------------------------------------------------------


def _load_digits(cache: Path) -> Dataset:
    from importlib.metadata import version  # scikit-learn itself takes a second to import

    def read() -> Content:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
        # Every pixel four times each way: ResNet-20 errs by 0.7 points less than with smooth enlargement.
        images = np.ascontiguousarray(grey.repeat(4, axis=1).repeat(4, axis=2)[..., None].repeat(3, axis=3))
        train, test = hold_out(Split(images, bunch.target.astype(np.int64)), 360, seed=0)
        return Content(tuple(str(name) for name in bunch.target_names), train, test)

    content, fingerprint = cached(["digits", version("scikit-learn")], read, Content, cache)
    return Dataset("digits", "digits", fingerprint, fingerprint in ORIGINAL, *content.parts(), flip=False)


def _load_cifar(name: str, data_dir: Path | None, cache: Path, progress: Progress | None) -> Dataset:
    kind, folder, classes = TORCHVISION[name]
    download = data_dir is None
    data_dir = data_dir or cache / "downloads"
    batches = data_dir / folder
    if download and not batches.is_dir():
        _download_cifar(name, data_dir)
    if not batches.is_dir():
        dataset = _load_class_folders(name, data_dir, cache, progress)
        if dataset.classes != classes:
            first = ", ".join(dataset.classes[:3])
            raise DataError(
                f"{data_dir}: not {kind[:5]}-{kind[5:]}'s classes ({first}, ...): try folder:{data_dir}"
            )
        return dataset
    with os.scandir(batches) as entries:
        stats = sorted((entry.name, entry.stat()) for entry in entries)
    signature = [str(batches.resolve()), *(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)]
    content, fingerprint = cached(signature, lambda: _read_cifar(name, data_dir), Content, cache)
    return Dataset(name, name, fingerprint, True, *content.parts(), flip=True)


def _read_cifar(name: str, root: Path) -> Content:
    from torchvision import datasets

    kind, folder, classes = TORCHVISION[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, about the age of the pickles
        try:
            train, test = (getattr(datasets, kind)(root, train=train, download=False) for train in (True, False))
        except RuntimeError as error:
            title = f"{kind[:5]}-{kind[5:]}"
            raise DataError(
                f"{root / folder}: incomplete or corrupt: a file's checksum is not {title}'s"
            ) from error
    splits = (Split(part.data, np.asarray(part.targets, np.int64)) for part in (train, test))
    return Content(classes, *splits)


def _download_cifar(name: str, root: Path) -> None:
    from torchvision import datasets

    timeout = socket.getdefaulttimeout()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with lock(root / f"{name}.lock"):
            socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)  # torchvision sets none
            getattr(datasets, TORCHVISION[name][0])(
                root, download=True
            )  # keeps what another process has downloaded
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{name} cannot be downloaded ({reason}): name a folder that has it with --data-dir, "
            "or train on the embedded images with --dataset digits"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _superclasses(whole: Dataset) -> Dataset:
    names = tuple(SUPERCLASSES)
    number = np.array([names.index(SUPERCLASS[fine]) for fine in whole.classes])
    content = Content(names, *(Split(split.images, number[split.labels]) for split in (whole.train, whole.test)))
    label = "cifar100-coarse" if whole.original else f"cifar100-coarse of {whole.label}"
    return Dataset("cifar100-coarse", label, content.fingerprint(), whole.original, *content.parts(), flip=True)


def _first_two_classes(whole: Dataset) -> Dataset:
    pairs = ((split, split.labels < 2) for split in (whole.train, whole.test))
    content = Content(whole.classes[:2], *(Split(split.images[two], split.labels[two]) for split, two in pairs))
    label = "cifar2" if whole.original else f"cifar2 of {whole.label}"
    return Dataset("cifar2", label, content.fingerprint(), whole.original, *content.parts(), flip=True)


def _load_class_folders(name: str, root: Path, cache: Path, progress: Progress | None) -> Dataset:
    _check_folder(root)
    train_classes, train = _list_class_folders(root, "train")
    test_classes, test = _list_class_folders(root, "test")
    if train_classes != test_classes:
        either = sorted(set(train_classes) ^ set(test_classes))
        only = [f"{name} only in {'train' if name in train_classes else 'test'}" for name in either]
        raise DataError(f"{root}: classes differ between train and test: {'; '.join(only)}")
    content, fingerprint = _read_files(root, tuple(train_classes), train, test, cache, progress)
    label = root.resolve().name or "folder"
    if label in DATASETS:  # it must not pass for the published images
        label = f"{label}@{fingerprint[:8]}"
    return Dataset(name, label, fingerprint, False, *content.parts(), flip=True)


def _check_folder(root: Path) -> None:
    if not root.is_dir():
        raise DataError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}")


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
        with os.scandir(folder / name) as entries:
            images = [entry for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES)]
        if not images:
            raise DataError(f"{folder / name}: no images in this class folder")
        for image in sorted(images, key=attrgetter("name")):
            stat = image.stat()
            files.append(_File(f"{split}/{name}/{image.name}", label, stat.st_size, stat.st_mtime_ns))
    return classes, files


def _load_miniplaces(root: Path | None, cache: Path, progress: Progress | None) -> Dataset:
    if root is None:
        raise DataError("miniplaces is not downloaded: name the development kit's folder with --data-dir")
    _check_folder(root)
    classes: dict[int, str] = {}
    for number, path, label in _list_lines(root / "categories.txt"):
        if label in classes:
            raise DataError(f"{root / 'categories.txt'} line {number}: label {label} is {classes[label]} already")
        classes[label] = path
    if sorted(classes) != list(range(len(classes))):
        raise DataError(f"{root / 'categories.txt'}: labels are not 0 to {len(classes) - 1}")
    train, test = (_list_kit(root, name, len(classes)) for name in ("train.txt", "val.txt"))
    names = tuple(classes[label] for label in range(len(classes)))
    content, fingerprint = _read_files(root, names, train, test, cache, progress)
    whole = len(content.train) >= MINIPLACES_TRAIN_IMAGES
    name = "miniplaces" if whole else root.resolve().name
    if name in DATASETS and not whole:
        per_class = np.bincount(content.train.labels, minlength=len(names))
        name = f"{name}-{per_class[0]}" if np.ptp(per_class) == 0 else f"{name}@{fingerprint[:8]}"
    return Dataset("miniplaces", name, fingerprint, fingerprint in ORIGINAL, *content.parts(), flip=True)


def _list_kit(root: Path, name: str, num_classes: int) -> list[_File]:
    files: list[_File] = []
    for number, path, label in _list_lines(root / name):
        try:
            stat = (root / "images" / path).stat()
        except OSError as error:
            raise DataError(f"{root / name} line {number}: no file {root / 'images' / path}") from error
        if not 0 <= label < num_classes:
            raise DataError(f"{root / name} line {number}: label {label} is not in categories.txt")
        files.append(_File(f"images/{path}", label, stat.st_size, stat.st_mtime_ns))
    return files


def _list_lines(path: Path) -> Iterator[tuple[int, str, int]]:
    """(line number, path, label) of each line `path label`."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: expected lines of a path and a label") from error
    if not any(lines):
        raise DataError(f"{path}: empty: expected lines of a path and a label")
    for number, line in enumerate(lines, start=1):
        name, _, label = line.rpartition(" ")
        if line and not (name and label.isdecimal()):
            raise DataError(f"{path} line {number}: {line[:80]!r} is not a path and a label")
        if line:
            yield number, name.strip(), int(label)


# ---- decoding --------------------------------------------------------------------------------------------------


def _read_files(
    root: Path,
    classes: tuple[str, ...],
    train: list[_File],
    test: list[_File],
    cache: Path,
    progress: Progress | None,
) -> tuple[Content, str]:
    """The images of the listed files, and their fingerprint."""

    def read() -> Content:
        images = _decode(root, [*train, *test], progress)
        labels = np.array([file.label for file in (*train, *test)], np.int64)
        cut = len(train)
        return Content(classes, Split(images[:cut], labels[:cut]), Split(images[cut:], labels[cut:]))

    signature = [str(root.resolve()), *map(str, (classes, train, test))]
    return cached(signature, read, Content, cache)


def _decode(root: Path, files: list[_File], progress: Progress | None) -> NDArray[np.uint8]:
    """Every file in RGB. By threads: PIL releases the interpreter's lock while it decodes."""
    from PIL import Image

    first = root / files[0].path
    width, height = _read_image(first).shape[1::-1]
    if width != height:
        raise DataError(f"{first}: image is {width}x{height}: only square images are supported")
    images = np.empty((len(files), height, width, 3), np.uint8)

    def decode(start: int) -> int:
        for index, file in enumerate(files[start : start + DECODE_CHUNK], start):
            image = _read_image(root / file.path)
            if image.shape != images.shape[1:]:
                size = f"{image.shape[1]}x{image.shape[0]}"
                raise DataError(f"{root / file.path}: image is {size}, others are {width}x{height} ({first})")
            images[index] = image
        return min(start + DECODE_CHUNK, len(files))

    Image.init()  # not thread-safe on first use
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        for done in pool.map(decode, range(0, len(files), DECODE_CHUNK)):
            if progress:
                progress("decoding images", done, len(files))
    return images


def _read_image(path: Path) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # a broken file can make a decoder raise nearly anything
        reason = str(error).splitlines()[0].replace(str(path), path.name) if str(error) else repr(error)
        raise DataError(f"{path}: not a readable image: {reason}") from error
