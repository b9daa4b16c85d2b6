"""Data sets: what is read, what is kept, and one clear line for everything that can be wrong."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from harness.loaders.datasets import (
    CIFAR10_CLASSES,
    DATASETS,
    SUPERCLASS,
    SUPERCLASSES,
    DataError,
    Dataset,
    Split,
    check_dataset_name,
    hold_out,
    limit,
    load_dataset,
)
from harness.loaders.files import Files

ARCHIVE = Path(__file__).parents[2] / "shared" / "data" / "cifar10-q75.tar.xz"
RANDOM = np.random.default_rng(0)


def write_image(path: Path, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    pixels = RANDOM.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def write_folders(root: Path, classes: tuple[str, ...] = ("cat", "dog"), train: int = 3, test: int = 2) -> Path:
    for split, count in (("train", train), ("test", test)):
        for name in classes:
            for number in range(count):
                write_image(root / split / name / f"{number:04}.png")
    return root


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    return write_folders(tmp_path / "animals")


def load_folder(root: Path, cache: Path) -> Dataset:
    return load_dataset(f"folder:{root}", cache=cache)


def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(files: Files, index: int) -> None:
        raise AssertionError(f"decoded {files.path(index)!r}")

    monkeypatch.setattr(Files, "read", fail)


# ---- names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*DATASETS, "folder:somewhere"])
def test_known_names(name: str) -> None:
    check_dataset_name(name)


def test_unknown_name_is_answered_with_a_guess() -> None:
    with pytest.raises(
        DataError, match=r"data set 'cifar11' is unknown; did you mean cifar10\? \(allowed: cifar10, "
    ):
        check_dataset_name("cifar11")
    with pytest.raises(DataError, match="data set 'folder:' is unknown"):
        load_dataset("folder:")


def test_import_is_light() -> None:
    code = "import sys, harness.loaders.datasets, harness.loaders.loader, harness.loaders.sampling; print({'torch', 'sklearn', 'nvidia.dali'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


# ---- class folders ---------------------------------------------------------------------------------------------


def test_class_folders_hold_what_was_written(tmp_path: Path, cache: Path) -> None:
    written = [
        write_image(tmp_path / "pets" / split / name / f"{number}.png")
        for split in ("train", "test")
        for name in ("ant", "bee")
        for number in range(2)
    ]
    (tmp_path / "pets" / "train" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "pets" / "train" / ".hidden").mkdir()
    seen = []
    dataset = load_dataset(
        f"folder:{tmp_path / 'pets'}", cache=cache, progress=lambda *report: seen.append(report)
    )
    assert np.array_equal(dataset.train.images, written[:4])
    assert np.array_equal(dataset.test.images, written[4:])
    assert dataset.train.labels.tolist() == dataset.test.labels.tolist() == [0, 0, 1, 1]
    assert dataset.train.labels.dtype == np.int64
    assert (dataset.classes, dataset.num_classes, dataset.image_size) == (("ant", "bee"), 2, 8)
    assert (dataset.name, dataset.label) == (f"folder:{tmp_path / 'pets'}", "pets")
    assert not dataset.original
    assert dataset.flip
    assert seen[-1] == ("decoding images", 8, 8)


def test_fingerprint_follows_the_contents_only(tmp_path: Path, animals: Path, cache: Path) -> None:
    first = load_folder(animals, cache)
    moved = load_folder(animals.rename(tmp_path / "elsewhere"), cache)
    assert moved.fingerprint == first.fingerprint
    (tmp_path / "elsewhere" / "train" / "cat").rename(tmp_path / "elsewhere" / "train" / "cow")
    (tmp_path / "elsewhere" / "test" / "cat").rename(tmp_path / "elsewhere" / "test" / "cow")
    assert load_folder(tmp_path / "elsewhere", cache).fingerprint != first.fingerprint


def test_cifar10_from_class_folders_is_labelled_as_not_original(tmp_path: Path, cache: Path) -> None:
    whole = load_dataset("cifar10", write_folders(tmp_path / "cifar10-q75", CIFAR10_CLASSES), cache)
    assert (whole.name, whole.label, whole.original) == ("cifar10", "cifar10-q75", False)
    renamed = load_dataset("cifar10", (tmp_path / "cifar10-q75").rename(tmp_path / "cifar10"), cache)
    assert renamed.label == f"cifar10@{whole.fingerprint[:8]}"
    pair = load_dataset("cifar2", (tmp_path / "cifar10").rename(tmp_path / "cifar10-q75"), cache)
    assert (pair.label, pair.classes) == ("cifar2 of cifar10-q75", ("airplane", "automobile"))
    assert np.array_equal(pair.train.images, whole.train.images[:6])
    assert pair.test.labels.tolist() == [0, 0, 1, 1]
    assert pair.fingerprint != whole.fingerprint


def test_other_classes_are_not_cifar10(animals: Path, cache: Path) -> None:
    with pytest.raises(DataError, match=r"not CIFAR-10's classes \(cat, dog, ...\): try folder:"):
        load_dataset("cifar10", animals, cache)


# ---- the cache -------------------------------------------------------------------------------------------------


def test_second_load_decodes_nothing(animals: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_folder(animals, cache)
    no_decoding(monkeypatch)
    second = load_folder(animals, cache)
    assert np.array_equal(first.train.images, second.train.images)
    assert np.array_equal(first.test.labels, second.test.labels)
    assert (first.fingerprint, first.classes) == (second.fingerprint, second.classes)


def test_default_cache_is_named_by_the_environment(
    animals: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(cache))
    dataset = load_dataset(f"folder:{animals}")
    (file,) = cache.glob("*.npz")
    with np.load(file) as stored:
        assert stored["fingerprint"] == dataset.fingerprint


def test_changed_image_is_decoded_anew(animals: Path, cache: Path) -> None:
    before = load_folder(animals, cache)
    pixels = write_image(animals / "train" / "cat" / "0001.png")
    after = load_folder(animals, cache)
    assert np.array_equal(after.train.images[1], pixels)
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "gone"])
def test_corrupt_cache_is_decoded_again(
    damage: str, animals: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = load_folder(animals, cache)
    (file,) = cache.glob("*.npz")
    content = bytearray(file.read_bytes())
    content[-700] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"truncated": content[:-100], "one bit": content, "empty": b""}[damage])
    again = load_folder(animals, cache)
    assert np.array_equal(again.train.images, good.train.images)
    assert again.fingerprint == good.fingerprint
    no_decoding(monkeypatch)  # for it is whole again
    assert load_folder(animals, cache).fingerprint == good.fingerprint


def test_interrupted_write_leaves_nothing_behind(
    animals: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(path: Path, **arrays: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("numpy.savez", half)
        with pytest.raises(KeyboardInterrupt):
            load_folder(animals, cache)
    assert [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"] == []
    assert len(load_folder(animals, cache).train) == 6


def test_unwritable_cache_is_warned_of(tmp_path: Path, animals: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="the cache cannot be written"):
        assert len(load_folder(animals, tmp_path / "file").train) == 6


def test_it_is_said_who_is_waited_for(animals: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_folder(animals, cache)
    (stored,) = cache.rglob("*.npz")
    stored.unlink()
    code = "import sys, time, filelock; (lock := filelock.FileLock(sys.argv[1])).acquire(); print(flush=True); time.sleep(1)"
    command = [sys.executable, "-c", code, str(stored.with_suffix(".lock"))]
    other = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert other.stdout
    other.stdout.readline()
    monkeypatch.setattr("harness.loaders.cache.LOCK_SECONDS", 0.1)
    with pytest.warns(UserWarning, match="waiting for another process that decodes these images"):
        assert len(load_folder(animals, cache).train) == 6
    other.communicate(timeout=60)


def test_processes_starting_at_once_decode_once(animals: Path, cache: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from harness.loaders.datasets import load_dataset\n"
        "reports = []\n"
        "dataset = load_dataset(sys.argv[1], None, Path(sys.argv[2]), lambda *report: reports.append(report))\n"
        "print(dataset.fingerprint, len(reports))"
    )
    command = [sys.executable, "-c", code, f"folder:{animals}", str(cache)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    lines = [process.communicate(timeout=60)[0].split() for process in processes]
    assert len({fingerprint for fingerprint, _ in lines}) == 1
    assert sorted(int(reports) for _, reports in lines) == [0, 0, 2], "hashed and decoded by one of them"


# ---- what can be wrong -----------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[DataError], *parts: object) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def test_missing_folder(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(DataError) as error:
        load_folder(tmp_path / "nowhere", cache)
    one_line(error, tmp_path / "nowhere", "no such folder")


def test_a_folder_that_may_not_be_listed(animals: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listdir(path: str | bytes) -> list[str]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "listdir", listdir)  # root may list all
    with pytest.raises(DataError, match=rf"^{animals}/train: cannot be read: Permission denied$"):
        load_dataset(f"folder:{animals}", cache=cache)


def test_a_data_set_whose_own_function_cannot_download_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(request: object) -> Dataset:
        raise URLError("no route to the server")  # which has a reason and no strerror

    monkeypatch.setitem(DATASETS, "mine", load)
    with pytest.raises(DataError, match=r"^mine: cannot be read: <urlopen error no route to the server>$"):
        load_dataset("mine")


def test_no_class_folders(tmp_path: Path, animals: Path, cache: Path) -> None:
    (tmp_path / "flat" / "train").mkdir(parents=True)
    write_image(tmp_path / "flat" / "train" / "1.png")
    with pytest.raises(DataError) as error:
        load_folder(tmp_path / "flat", cache)
    one_line(error, tmp_path / "flat" / "train", "no class folders")
    with pytest.raises(DataError) as error:
        load_folder(animals / "train", cache)
    one_line(error, animals / "train", "no folder 'train'")
    (animals / "test" / "dog" / "0000.png").unlink()
    (animals / "test" / "dog" / "0001.png").unlink()
    with pytest.raises(DataError) as error:
        load_folder(animals, cache)
    one_line(error, animals / "test" / "dog", "no images")


def test_classes_that_differ(animals: Path, cache: Path) -> None:
    (animals / "test" / "dog").rename(animals / "test" / "dogs")
    with pytest.raises(DataError) as error:
        load_folder(animals, cache)
    one_line(error, animals, "dog only in train; dogs only in test")


@pytest.mark.parametrize(("damage", "reason"), [("truncated", "truncated"), ("text", "no known format")])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_unreadable_image(damage: str, reason: str, suffix: str, animals: Path, cache: Path) -> None:
    path = animals / "test" / "dog" / f"0007{suffix}"
    write_image(path)
    content = path.read_bytes()
    path.write_bytes(content[:-40] if damage == "truncated" else b"hello")
    with pytest.raises(DataError) as error:
        load_folder(animals, cache)
    one_line(error, path, "not a readable image", reason)


def test_a_known_sets_images_are_equal_squares(tmp_path: Path, cache: Path) -> None:
    """A folder's may have any size: test_files.py."""
    root = write_folders(tmp_path / "cifar", CIFAR10_CLASSES)
    write_image(root / "train" / "dog" / "0001.png", (9, 8))
    with pytest.raises(DataError) as error:
        load_dataset("cifar10", root, cache)
    one_line(error, root / "train" / "dog" / "0001.png", "image is 9x8: square ones of one size are expected")
    write_image(root / "train" / CIFAR10_CLASSES[0] / "0000.png", (9, 8))
    with pytest.raises(DataError, match=r"0000\.png: image is 9x8: square ones"):
        load_dataset("cifar10", root, cache)


def test_data_folder_where_none_is_taken(animals: Path, cache: Path) -> None:
    for name in ("digits", f"folder:{animals}"):
        with pytest.raises(DataError, match="takes no data folder"):
            load_dataset(name, animals, cache)


# ---- CIFAR-10 in torchvision's layout --------------------------------------------------------------------------


def write_batches(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, object]]:
    """A tiny CIFAR-10 in the original pickled format, with torchvision's list of checksums changed to match."""
    from torchvision.datasets import CIFAR10

    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    batches: dict[str, dict[str, object]] = {}
    sums = {}
    for name in (*(name for name, _ in CIFAR10.train_list), "test_batch", "batches.meta"):
        batches[name] = {
            "data": RANDOM.integers(0, 256, (2, 3072), dtype=np.uint8),
            "labels": RANDOM.integers(0, 10, 2).tolist(),
            "label_names": list(CIFAR10_CLASSES),
        }
        (folder / name).write_bytes(pickle.dumps(batches[name]))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    return batches


def test_original_batches(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = write_batches(tmp_path / "data", monkeypatch)
    dataset = load_dataset("cifar10", tmp_path / "data", cache)
    assert (dataset.label, dataset.original, dataset.classes) == ("cifar10", True, CIFAR10_CLASSES)
    assert len(dataset.train) == 10
    planes = np.asarray(batches["data_batch_2"]["data"])[1].reshape(3, 32, 32)
    assert np.array_equal(dataset.train.images[3], planes.transpose(1, 2, 0))
    assert dataset.test.labels.tolist() == batches["test_batch"]["labels"]
    # a changed byte is noticed, whatever the cache holds
    path = tmp_path / "data" / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DataError, match="checksum") as error:
        load_dataset("cifar10", tmp_path / "data", cache)
    one_line(error, path.parent)


def test_cifar100_with_both_sets_of_labels(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From torchvision's batches, whose checksums are looked at, and from folders of the fine classes."""
    from torchvision.datasets import CIFAR100

    fine = sorted(SUPERCLASS)
    assert (len(fine), len(SUPERCLASSES), fine[0], fine[-1]) == (100, 20, "apple", "worm")
    assert {len(members.split()) for members in SUPERCLASSES.values()} == {5}
    assert list(SUPERCLASSES) == sorted(SUPERCLASSES)
    folder = tmp_path / "data" / "cifar-100-python"
    folder.mkdir(parents=True)
    labels, sums = [fine.index("worm"), fine.index("apple")], {}
    for name in ("train", "test", "meta"):
        batch = {
            "data": RANDOM.integers(0, 256, (2, 3072), dtype=np.uint8),
            "fine_labels": labels,
            "fine_label_names": fine,
        }
        (folder / name).write_bytes(pickle.dumps(batch))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    whole, coarse = (load_dataset(name, tmp_path / "data", cache) for name in ("cifar100", "cifar100-coarse"))
    assert (whole.label, whole.original, whole.num_classes) == ("cifar100", True, 100)
    assert [whole.classes[n] for n in whole.train.labels] == ["worm", "apple"]
    assert (coarse.label, coarse.original, coarse.num_classes) == ("cifar100-coarse", True, 20)
    assert [coarse.classes[n] for n in coarse.test.labels] == ["non-insect_invertebrates", "fruit_and_vegetables"]
    assert np.array_equal(whole.train.images, coarse.train.images)
    assert whole.fingerprint != coarse.fingerprint
    (folder / "test").write_bytes(b"x")
    with pytest.raises(DataError, match="checksum is not CIFAR-100's"):
        load_dataset("cifar100", tmp_path / "data", cache)
    folders = load_dataset("cifar100-coarse", write_folders(tmp_path / "jpeg", tuple(fine)), cache)
    assert (folders.label, folders.original) == ("cifar100-coarse of jpeg", False)
    assert sorted(set(folders.train.labels.tolist())) == list(range(20))
    with pytest.raises(DataError, match="not CIFAR-100's classes"):
        load_dataset("cifar100", write_folders(tmp_path / "other", CIFAR10_CLASSES), cache)


def test_no_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise URLError("Temporary failure in name resolution")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", unreachable)
    with pytest.raises(DataError, match="cannot be downloaded") as error:
        load_dataset("cifar2", cache=cache)
    one_line(error, "--data-dir", "--dataset digits", "name resolution")


# ---- digits ----------------------------------------------------------------------------------------------------


def test_digits(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load_dataset("digits", cache=cache)
    assert (len(dataset.train), len(dataset.test), dataset.image_size, dataset.num_classes) == (1437, 360, 32, 10)
    assert dataset.fingerprint.startswith("09a5676e728262a7"), "the same images everywhere, whatever the versions"
    assert dataset.original
    assert not dataset.flip, "a mirrored digit is another sign"
    for split in (dataset.train, dataset.test):
        share = np.bincount(split.labels) / len(split)
        assert np.abs(share - 0.1).max() < 0.006
    assert dataset.train.images.min() == 0
    assert dataset.train.images.max() == 255
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # from the cache now, without scikit-learn
    assert load_dataset("digits", cache=cache).fingerprint == dataset.fingerprint


# ---- Mini-Places2 ----------------------------------------------------------------------------------------------


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    root = tmp_path / "miniplaces"
    lines = []
    for number in range(4):
        path = f"train/a/{('abbey', 'bay')[number % 2]}/{number:08}.jpg"
        write_image(root / "images" / path)
        lines.append(f"{path} {number % 2}\n")
    write_image(root / "images" / "val" / "00000001.jpg")
    (root / "train.txt").write_text("".join(lines))
    (root / "val.txt").write_text("val/00000001.jpg 1\n")
    (root / "categories.txt").write_text("/a/abbey 0\n/b/bay 1\n")
    return root


def test_miniplaces(kit: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load_dataset("miniplaces", kit, cache)
    assert (dataset.label, dataset.original) == ("miniplaces-2", False)  # two training images of each class
    assert dataset.classes == ("/a/abbey", "/b/bay")
    assert dataset.train.labels.tolist() == [0, 1, 0, 1]
    assert dataset.test.labels.tolist() == [1]
    with Image.open(kit / "images" / "train" / "a" / "bay" / "00000001.jpg") as image:
        assert np.array_equal(dataset.train.images[1], np.asarray(image))
    no_decoding(monkeypatch)
    assert (
        load_dataset("miniplaces", kit.rename(kit.with_name("moved")).rename(kit), cache).label == "miniplaces-2"
    )


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "train.txt",
            "train/a/abbey/00000000.jpg 0\ntrain/gone.jpg 1\n",
            "images/train/gone.jpg: cannot be read: No such file or directory",
        ),
        ("val.txt", "val/00000001.jpg\n", "val.txt line 1: 'val/00000001.jpg' is not a path and a label"),
        ("val.txt", "val/00000001.jpg 2\n", "val.txt: label 2 is not in categories.txt"),
        ("val.txt", "\n", "val.txt: empty"),
        ("categories.txt", "/a/abbey 0\n/b/bay 0\n", "categories.txt: labels are not 0 to 1, each once"),
        ("categories.txt", "/a/abbey 0\n/b/bay 2\n", "categories.txt: labels are not 0 to 1, each once"),
    ],
)
def test_broken_lists(file: str, text: str, message: str, kit: Path, cache: Path) -> None:
    (kit / file).write_text(text)
    with pytest.raises(DataError, match=message) as error:
        load_dataset("miniplaces", kit, cache)
    one_line(error, kit)


def test_missing_kit(tmp_path: Path, animals: Path, cache: Path) -> None:
    with pytest.raises(DataError, match="--data-dir"):
        load_dataset("miniplaces", cache=cache)
    with pytest.raises(DataError, match="nowhere: no such folder"):
        load_dataset("miniplaces", tmp_path / "nowhere", cache)
    with pytest.raises(DataError, match=r"categories.txt: cannot be read"):
        load_dataset("miniplaces", animals, cache)


# ---- subsets and splits ----------------------------------------------------------------------------------------


def numbered(sizes: list[int]) -> Split:
    """Images that say which they are."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    images = np.arange(len(labels) * 3, dtype=np.uint8).reshape(-1, 1, 1, 3)
    return Split(images, labels)


def test_limit_takes_turns_between_classes() -> None:
    split = numbered([30, 30, 20])
    for count in (3, 6, 60, 80):
        few = limit(split, count)
        assert len(few) == len(few.images) == count
        assert np.bincount(few.labels).tolist() == {60: [20, 20, 20], 80: [30, 30, 20]}.get(
            count, [count // 3] * 3
        )
        assert len({image.tobytes() for image in few.images}) == count
        assert np.array_equal(split.labels[few.images[:, 0, 0, 0] // 3], few.labels)
        assert np.array_equal(few.images, limit(split, 80).images[:count])
    assert limit(split, 60).labels.tolist() != sorted(limit(split, 60).labels.tolist())
    for count in (0, -1, 81):
        with pytest.raises(DataError, match=re.escape(f"cannot take {count} of 80 images")):
            limit(split, count)


def test_hold_out_keeps_proportions() -> None:
    split = numbered([40, 20, 20])
    rest, held = hold_out(split, 21, seed=3)
    assert len(rest) + len(held) == 80
    counts = np.bincount(held.labels)
    assert counts.sum() == 21
    assert np.abs(counts - np.array([10.5, 5.25, 5.25])).max() < 1
    seen = [image.tobytes() for part in (rest, held) for image in part.images]
    assert len(set(seen)) == 80
    assert np.array_equal(split.labels[held.images[:, 0, 0, 0] // 3], held.labels)
    assert np.array_equal(hold_out(split, 21, seed=3)[1].images, held.images)
    assert not np.array_equal(hold_out(split, 21, seed=4)[1].images, held.images)
    for count in (0, 80):
        with pytest.raises(DataError, match=f"cannot hold out {count} of 80 images"):
            hold_out(split, count, seed=0)


# ---- real images -----------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.skipif(not ARCHIVE.exists(), reason=f"no real images at {ARCHIVE}")
def test_real_images(tmp_path: Path, cache: Path) -> None:
    """The first images of every class, as they lie in the archive."""
    with tarfile.open(ARCHIVE, "r|xz") as archive:
        for member in archive:
            if re.fullmatch(r"(train|test)/\w+/000[0-9]\.jpg", member.name):
                archive.extract(member, tmp_path / "cifar10-q75", filter="data")
    dataset = load_dataset("cifar10", tmp_path / "cifar10-q75", cache)
    assert (len(dataset.train), len(dataset.test), dataset.image_size) == (100, 100, 32)
    assert (dataset.label, dataset.original) == ("cifar10-q75", False)
    path = tmp_path / "cifar10-q75" / "train" / "frog" / "0004.jpg"
    with Image.open(path) as image:
        assert np.array_equal(dataset.train.images[64], np.asarray(image))
    assert len(list(cache.glob("*.npz"))) == 1


def test_a_plain_split_is_drawn_from_all_images_and_keeps_their_order() -> None:
    split = Split(np.arange(400, dtype=np.uint8).repeat(12).reshape(400, 2, 2, 3) % 251, np.arange(400) // 100)
    rest, held = hold_out(split, 100, seed=1, stratified=False)
    assert (len(rest), len(held)) == (300, 100)
    whole = sorted([*map(bytes, rest.images), *map(bytes, held.images)])
    assert whole == sorted(map(bytes, split.images))
    counts = np.bincount(held.labels, minlength=4)
    assert counts.sum() == 100
    assert not (counts == 25).all(), "seed 1 draws the classes unequally; a stratified split never does"
    again = hold_out(split, 100, seed=1, stratified=False)[1]
    assert (again.images == held.images).all()
