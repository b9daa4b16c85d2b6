"""Data sets: which files they are, what is known about them, and their images as uint8 arrays.

Images are decoded once and then read from the cache (`cache.py`), or stay in their files (`files.py`). Nothing here
imports torch, except to read CIFAR-10 in its own format.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import socket
import tomllib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from harness.loaders.cache import Content, cache_dir, cached
from harness.loaders.cache import Split as Split
from harness.loaders.files import DataError as DataError
from harness.loaders.files import Files, Progress, in_threads, index_files, refuse, show
from harness.words import unknown

MINIPLACES_TRAIN_IMAGES = 100_000
ORIGINAL = {"09a5676e728262a768e427676db1b20e1ae9945c739c767c91d3143e7d255138"}  # digits
"""Fingerprints of published images. CIFAR-10's files have MD5 sums in torchvision; those of Mini-Places2 are not known here."""
IMAGE_SUFFIXES = (b".jpg", b".jpeg", b".png", b".bmp", b".gif", b".ppm", b".tif", b".tiff", b".webp")
_CIFAR = tomllib.loads(Path(__file__).with_name("cifar.toml").read_text())
CIFAR10_CLASSES: tuple[str, ...] = tuple(_CIFAR["cifar10"].split())
SUPERCLASSES: dict[str, str] = _CIFAR["cifar100"]
"""The 20 coarse classes of CIFAR-100 and their fine ones."""
SUPERCLASS = {fine: coarse for coarse, members in SUPERCLASSES.items() for fine in members.split()}
TORCHVISION: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py", CIFAR10_CLASSES),
    "cifar100": ("CIFAR100", "cifar-100-python", tuple(sorted(SUPERCLASS))),
}
"""torchvision's class, which knows the address and the checksums, its folder, and the classes in their order."""
RELABELLED = {
    "cifar2": ("cifar10", {name: name for name in CIFAR10_CLASSES[:2]}),
    "cifar100-coarse": ("cifar100", SUPERCLASS),
}
"""Data sets made of another's images: the class of each of its classes; images of others are left out."""

MIXED_SEED = 20151210
DOWNLOAD_TIMEOUT_SECONDS = 20
LARGEST_BYTES = 8 * 2**30  # of decoded images of both splits that are kept in memory, in each rank


@dataclass(frozen=True, eq=False, slots=True)
class Dataset:
    """A data set, its images in memory or in files."""

    name: str  # as `load_dataset` was called
    label: str  # for tables: shows when the images are not the published ones
    original: bool  # the published images themselves: published errors are comparable
    fingerprint: str  # this and the next three: of its `Content`
    classes: tuple[str, ...]
    train: Split
    test: Split
    flip: bool  # a mirrored image keeps its label

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def image_size(self) -> int:
        """Shorter side of the images, in pixels. Raises ValueError where they differ."""
        if (size := self.train.size) is None:
            raise ValueError(f"the images of {self.label} differ in size: the recipe needs a crop")
        return min(size)

    def scan(self, progress: Progress | None = None) -> None:
        """Decode every file; those in memory have been. Raises DataError, which names those that are corrupt."""
        wrong = list[str]()
        for images in (self.train.images, self.test.images):
            if isinstance(images, Files):
                wrong += in_threads(images.check, len(images), "scanning images", progress)
        refuse(wrong)


class Request(NamedTuple):
    """What `load_dataset` was called with."""

    name: str
    root: Path | None
    cache: Path
    progress: Progress | None

    def folder(self) -> Path:
        """The data folder. Raises DataError where there is none."""
        if self.root is None:
            raise DataError(f"{self.name} is not downloaded: name the development kit's folder with --data-dir")
        if not self.root.is_dir():
            raise DataError(f"{self.root}: {'not a folder' if self.root.exists() else 'no such folder'}")
        return self.root


class _Listing(NamedTuple):
    """The image files of a split, in arrays: a million of them would be a gigabyte of objects."""

    paths: NDArray[np.bytes_]  # within the data set's folder
    labels: NDArray[np.int64]
    stats: NDArray[np.int64]  # (N, 2): bytes, and the time of the last change in nanoseconds


def check_dataset_name(name: str) -> None:
    """Raise DataError unless `load_dataset` knows the name. The files are not looked at."""
    if name not in DATASETS and not (name.startswith("folder:") and name != "folder:"):
        if Path(name).is_dir():
            raise DataError(f"data set {name!r} is unknown; did you mean folder:{name}?")
        raise DataError(unknown("data set", name, (*DATASETS, "folder:PATH")))


def load_dataset(
    name: str, data_dir: Path | None = None, cache: Path | None = None, progress: Progress | None = None
) -> Dataset:
    """Read a data set, from the cache where it was decoded before.

    cifar10, cifar2 (its first two classes), cifar100, cifar100-coarse (its 20 superclasses): `data_dir` holds class
    folders (train/<class>/*, test/<class>/*; for CIFAR-100 the fine classes) or torchvision's folder of batches, whose
    checksums are then checked; without it torchvision downloads it.
    digits: scikit-learn's, 1,437 + 360 images scaled from 8x8 to 32x32; takes no `data_dir`.
    miniplaces: `data_dir` holds the development kit: train.txt, val.txt, categories.txt, images/. Its test split
    is the kit's validation list.
    folder:PATH: any class folders (val/ serves where there is no test/). Square images of one size are kept in memory
    up to LARGEST_BYTES; all others stay in their files, which are hashed once.

    The cache is `cache`, else `cache_dir()`. Raises DataError.
    """
    check_dataset_name(name)
    folder = name.startswith("folder:")
    if data_dir is not None and (name == "digits" or folder):
        where = "names its own path" if folder else "is part of scikit-learn"
        raise DataError(f"data set {name} {where}: it takes no data folder, got {data_dir}")
    request = Request(name, data_dir, cache or cache_dir(), progress)
    try:
        if folder:
            return load_class_folders(request._replace(root=Path(name.removeprefix("folder:")).expanduser()))
        return DATASETS[name](request)
    except OSError as error:  # no permission; a plug-in's download
        what = show(os.fsencode(error.filename or name))
        raise DataError(f"{what}: cannot be read: {error.strerror or error}") from error


def limit(split: Split, count: int) -> Split:
    """The first `count` images of one fixed, mixed order in which classes take turns. Raises DataError."""
    if not 0 < count <= len(split):
        raise DataError(f"cannot take {count} of {len(split)} images: allowed are 1 to {len(split)}")
    mixed = np.random.Generator(np.random.PCG64(MIXED_SEED)).permutation(len(split))
    before = defaultdict[int, Iterator[int]](itertools.count)  # how many of each class
    turn = [next(before[label]) for label in split.labels[mixed].tolist()]
    return split.take(mixed[np.argsort(turn, kind="stable")[:count]])


def hold_out(split: Split, count: int, seed: int, *, stratified: bool = True) -> tuple[Split, Split]:
    """Split into (rest, `count` held out), drawn by `seed`; stratified: every class in proportion.

    Both keep the order of `split`. Raises DataError.
    """
    if not 0 < count < len(split):
        raise DataError(f"cannot hold out {count} of {len(split)} images: allowed are 1 to {len(split) - 1}")
    generator = np.random.Generator(np.random.PCG64(seed))
    held, groups = np.zeros(len(split), bool), split.labels if stratified else np.zeros(len(split))
    labels, sizes = np.unique(groups, return_counts=True)
    exact = sizes * count / len(split)
    shares = exact.astype(np.int64)
    largest_remainder = np.argsort(shares - exact, kind="stable")[: count - shares.sum()]
    shares[largest_remainder] += 1
    for label, share in zip(labels, shares, strict=True):
        held[generator.permutation(np.flatnonzero(groups == label))[:share]] = True
    return split.take(~held), split.take(held)


# ---- the data sets ---------------------------------------------------------------------------------------------


def _load_digits(request: Request) -> Dataset:
    from importlib.metadata import version  # scikit-learn itself takes a second to import

    def read() -> Content:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
        # Every pixel four times each way: ResNet-20 errs by 0.7 points less than with smooth enlargement.
        images = np.ascontiguousarray(grey.repeat(4, axis=1).repeat(4, axis=2)[..., None].repeat(3, axis=3))
        train, test = hold_out(Split(images, bunch.target.astype(np.int64)), 360, seed=0)
        return Content.of(tuple(str(name) for name in bunch.target_names), train, test)

    content = cached(["digits", version("scikit-learn")], read, request.cache)
    return Dataset("digits", "digits", content.fingerprint in ORIGINAL, *content, flip=False)


def _load_cifar(request: Request) -> Dataset:
    name, root = request.name, request.root or request.cache / "downloads"
    kind, folder, classes = TORCHVISION[name]
    shown, batches = f"{kind[:5]}-{kind[5:]}", root / folder
    if request.root is None and not batches.is_dir():
        _download_cifar(name, root)
    if not batches.is_dir():
        dataset = load_class_folders(request._replace(root=root))
        if dataset.classes != classes:
            first = ", ".join(dataset.classes[:3])
            raise DataError(f"{root}: not {shown}'s classes ({first}, ...): try folder:{root}")
        return dataset

    def read() -> Content:
        from torchvision import datasets

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, about the age of the pickles
            try:
                parts = [getattr(datasets, kind)(root, train=train, download=False) for train in (True, False)]
            except RuntimeError as error:
                what = f"a file's checksum is not {shown}'s"
                raise DataError(f"{batches}: incomplete or corrupt: {what}") from error
        return Content.of(classes, *(Split(part.data, np.asarray(part.targets, np.int64)) for part in parts))

    listing = _list([os.fsencode(path.name) for path in sorted(batches.iterdir())], batches)
    content = cached(_sign(batches, (), listing), read, request.cache)
    return Dataset(name, name, True, *content, flip=True)


def _download_cifar(name: str, root: Path) -> None:
    from torchvision import datasets

    timeout = socket.getdefaulttimeout()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{name}.lock"):
            socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)  # torchvision sets none
            getattr(datasets, TORCHVISION[name][0])(root, download=True)  # keeps what is downloaded already
    except (OSError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{name} cannot be downloaded ({reason}): --data-dir names a folder that has it; "
            "--dataset digits needs no network"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _load_relabelled(request: Request) -> Dataset:
    """Another data set's images by fewer classes."""
    name, groups = RELABELLED[request.name]
    whole = _load_cifar(request._replace(name=name))
    classes = tuple(dict.fromkeys(groups.values()))
    number = np.array([classes.index(groups[old]) if old in groups else -1 for old in whole.classes])
    labels = [(split, number[split.labels]) for split in (whole.train, whole.test)]
    content = Content.of(classes, *(Split(split.images[new >= 0], new[new >= 0]) for split, new in labels))
    label = request.name if whole.original else f"{request.name} of {whole.label}"
    return Dataset(request.name, label, whole.original, *content, flip=True)


def load_class_folders(request: Request) -> Dataset:
    root = request.folder()
    train_classes, train = _list_class_folders(root, "train")
    val = not (root / "test").exists() and (root / "val").is_dir()  # as ImageNet is laid out
    test_classes, test = _list_class_folders(root, "val" if val else "test")
    if train_classes != test_classes:
        either = sorted(set(train_classes) ^ set(test_classes))
        only = [f"{name} only in {'train' if name in train_classes else 'test'}" for name in either]
        raise DataError(f"{root}: classes differ between train and test: {'; '.join(only)}")
    content = _read_files(request, tuple(train_classes), train, test)
    label = root.resolve().name or "folder"
    if label in DATASETS:  # it must not pass for the published images
        label = f"{label}@{content.fingerprint[:8]}"
    return Dataset(request.name, label, False, *content, flip=True)


def _list_class_folders(root: Path, split: str) -> tuple[list[str], _Listing]:
    folder = root / split
    if not folder.is_dir():
        raise DataError(f"{root}: no folder {split!r}: expected train/<class>/* and test/<class>/*")
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if not classes:
        raise DataError(f"{folder}: no class folders: expected {split}/<class>/*")
    listings: list[_Listing] = []
    for label, name in enumerate(classes):
        names = os.listdir(os.fsencode(folder / name))  # noqa: PTH208 (as bytes)
        images = sorted(
            os.fsencode(f"{split}/{name}/") + each for each in names if each.lower().endswith(IMAGE_SUFFIXES)
        )
        if not images:
            raise DataError(f"{folder / name}: no images in this class folder")
        listings.append(_list(images, root, [label] * len(images)))
    return classes, _Listing(*map(np.concatenate, zip(*listings, strict=True)))


def _list(paths: Sequence[bytes], root: Path, labels: Sequence[int] = ()) -> _Listing:
    """Raises OSError for a file that is not there, or a link to none."""
    stats, start = np.empty((len(paths), 2), np.int64), os.fsencode(root)
    for index, path in enumerate(paths):
        stat = os.stat(os.path.join(start, path))  # noqa: PTH116, PTH118 (a Path takes no bytes, and is slow)
        stats[index] = stat.st_size, stat.st_mtime_ns
    return _Listing(np.array(paths), np.array(labels, np.int64), stats)


def _sign(root: Path, classes: tuple[str, ...], *listings: _Listing) -> list[str]:
    """What the cache knows the files by."""
    digest = hashlib.sha256()
    for array in (array for listing in listings for array in listing):
        digest.update(repr((array.shape, array.dtype)).encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return [str(root.resolve()), json.dumps(classes), digest.hexdigest()]


def _load_miniplaces(request: Request) -> Dataset:
    root = request.folder()
    names, labels = _read_list(root / "categories.txt")
    if sorted(labels) != list(range(len(labels))):
        raise DataError(f"{root / 'categories.txt'}: labels are not 0 to {len(labels) - 1}, each once")
    classes = tuple(names[index] for index in np.argsort(labels))
    listings = list[_Listing]()
    for name in ("train.txt", "val.txt"):
        paths, labels = _read_list(root / name)
        if wrong := [label for label in labels if label >= len(classes)]:
            raise DataError(f"{root / name}: label {wrong[0]} is not in categories.txt")
        listings.append(_list([os.fsencode(f"images/{path}") for path in paths], root, labels))
    content = _read_files(request, classes, *listings)
    whole = len(content.train) >= MINIPLACES_TRAIN_IMAGES
    name = "miniplaces" if whole else root.resolve().name
    if name in DATASETS and not whole:
        per_class = np.bincount(content.train.labels, minlength=len(classes))
        name = f"{name}-{per_class[0]}" if np.ptp(per_class) == 0 else f"{name}@{content.fingerprint[:8]}"
    return Dataset("miniplaces", name, content.fingerprint in ORIGINAL, *content, flip=True)


def _read_list(path: Path) -> tuple[list[str], list[int]]:
    """Paths and labels of a file with lines `path label`."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: expected lines of a path and a label") from error
    names, labels = list[str](), list[int]()
    for number, line in enumerate(map(str.strip, lines), start=1):
        name, _, label = line.rpartition(" ")
        if name and label.isdecimal():
            names.append(name.strip())
            labels.append(int(label))
        elif line:
            raise DataError(f"{path} line {number}: {line[:80]!r} is not a path and a label")
    if not names:
        raise DataError(f"{path}: empty: expected lines of a path and a label")
    return names, labels


DATASETS: dict[str, Callable[[Request], Dataset]] = {
    "cifar10": _load_cifar, "cifar2": _load_relabelled, "cifar100": _load_cifar, "cifar100-coarse": _load_relabelled,
    "digits": _load_digits, "miniplaces": _load_miniplaces,
}  # fmt: skip
"""What `load_dataset` calls by name; `folder:PATH` is the other way to name a data set."""


# ---- decoding --------------------------------------------------------------------------------------------------


def _read_files(request: Request, classes: tuple[str, ...], train: _Listing, test: _Listing) -> Content:
    """The images of the listed files."""
    root, cut = request.folder(), len(train.labels)

    def read() -> Content:
        paths = np.concatenate([train.paths, test.paths])
        images = _decode(request, index_files(root.resolve(), paths, request.progress))
        return Content.of(classes, Split(images[:cut], train.labels), Split(images[cut:], test.labels))

    return cached(_sign(root, classes, train, test), read, request.cache)


def _decode(request: Request, files: Files) -> NDArray[np.uint8] | Files:
    """Every image in RGB, or the files themselves where a folder's images should stay in them."""
    (height, width), count = files.sizes[0].tolist(), len(files)
    odd = [0] * (width != height) + np.flatnonzero((files.sizes != files.sizes[0]).any(axis=1)).tolist()
    if request.name not in (*TORCHVISION, "miniplaces"):
        if odd or count * height * width * 3 > LARGEST_BYTES:
            return files
    elif odd:
        size = "{1}x{0}".format(*files.sizes[odd[0]])
        raise DataError(f"{show(files.path(odd[0]))}: image is {size}: square ones of one size are expected")
    images = np.empty((count, height, width, 3), np.uint8)

    def decode(index: int) -> str:
        images[index] = files.read(index)
        return ""

    in_threads(decode, count, "decoding images", request.progress)
    return images
