"""Images read from their files: what is read, how each is cut, that all loaders give the same, and what corrupt ones do."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import harness
from PIL import Image
from safetensors.torch import save_file
from scipy.stats import kstest
from torchvision.transforms import v2

from harness.commands.evaluate import EvalOptions, evaluate_weights
from harness.loaders import dali, datasets, files
from harness.loaders.datasets import DataError, Dataset, Split, hold_out, limit, load_dataset
from harness.loaders.files import Files
from harness.loaders.loader import Loader, make_loaders
from harness.loaders.own import read_split
from harness.loaders.sampling import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augment,
    LoaderConfig,
    Normalize,
    SamplingPlan,
    draw_cuts,
    make_normalize,
)
from harness.models.build import build
from harness.models.variants import find_variant
from harness.spec import UserError

ARCHIVE = Path(__file__).parents[2] / "shared" / "data" / "miniplaces-400.tar.xz"
BOXES = Augment(0, "zero", 24, flip=True, resize=28, area_range=(0.25, 1.0))
RESIZED = replace(BOXES, area_range=())
LARGEST, MEAN = 4, 0.25  # of 255: differences of two decoders' and resizers' rounding
STD = torch.tensor(IMAGENET_STD)[:, None, None]


def write_photos(root: Path, train: int = 22, test: int = 10, classes: int = 2) -> Path:
    """Smooth images of many sizes, as JPEG of several kinds and PNG."""
    random = np.random.default_rng(3)
    for split, count in (("train", train), ("test", test)):
        for number in range(count):
            few = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            image = few.resize(tuple(random.integers(30, 70, 2).tolist()), Image.Resampling.BICUBIC)
            image = image.convert("L") if number % 7 == 3 else image
            path = root / split / f"c{number % classes}" / f"{number:03}.{'png' if number % 4 == 1 else 'jpg'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return root


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture
def dataset(photos: Path, tmp_path: Path) -> Dataset:
    return load_dataset(f"folder:{photos}", cache=tmp_path / "cache")


@pytest.fixture
def make(dataset: Dataset) -> Iterator[Any]:
    made: list[Loader] = []

    def call(kind: str, augment: Augment = BOXES, **changes: Any) -> tuple[Loader, Loader]:
        train, test = changes.pop("train", dataset.train), changes.pop("test", dataset.test)
        options: dict[str, Any] = {
            "augment": augment, "normalize": make_normalize("imagenet", train), "batch_size": 6, "eval_batch_size": 4,
            "seed": 5, "device": torch.device("cpu"), "threads": 2, "warn": lambda _: None,
        }  # fmt: skip
        loaders = make_loaders(kind, train, test, LoaderConfig(**options | changes))
        made.extend(loaders)
        return loaders

    yield call
    for loader in made:
        loader.close()


def joined(loader: Loader, epoch: int, first_step: int = 0) -> tuple[torch.Tensor, list[int]]:
    batches = list(loader.epoch(epoch, first_step))
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches]).tolist()


def check_near(a: torch.Tensor, b: torch.Tensor) -> None:
    difference = ((a - b) * STD * 255).abs()
    assert difference.max() <= LARGEST + 1e-3
    assert difference.mean() <= MEAN


# ---- the data set ----------------------------------------------------------------------------------------------


def test_sizes_and_labels_are_those_of_the_files(photos: Path, dataset: Dataset) -> None:
    images = dataset.train.images
    assert isinstance(images, Files)
    for index in range(len(images)):
        path = Path(os.fsdecode(images.path(index)))
        with Image.open(path) as image:
            assert image.size[::-1] == tuple(images.sizes[index])
        assert path.parent.name == dataset.classes[dataset.train.labels[index]]
    assert (len(dataset.train), len(dataset.test), dataset.train.size) == (22, 10, None)


def test_fingerprint_is_of_contents_alone(photos: Path, dataset: Dataset, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", photos, copy], check=True)
    (copy / "train" / "c0" / "000.jpg").rename(copy / "train" / "c0" / "0.jpg")
    assert load_dataset(f"folder:{copy}", cache=tmp_path).fingerprint == dataset.fingerprint
    path = copy / "test" / "c1" / "003.jpg"
    path.write_bytes(path.read_bytes() + b"\0")
    assert load_dataset(f"folder:{copy}", cache=tmp_path).fingerprint != dataset.fingerprint


def test_files_are_read_once(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int]] = []
    first = load_dataset(f"folder:{photos}", cache=tmp_path, progress=lambda *report: seen.append(report))
    assert seen[-1] == ("hashing image files", 32, 32)
    monkeypatch.setattr(datasets, "index_files", None)
    again = load_dataset(f"folder:{photos}", cache=tmp_path)
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.test.images.sizes, first.test.images.sizes)  # type: ignore[union-attr]
    assert again.test.images.path(3) == first.test.images.path(3)  # type: ignore[union-attr]
    (photos / "train" / "c0" / "000.jpg").touch()
    with pytest.raises(TypeError):
        load_dataset(f"folder:{photos}", cache=tmp_path)


def test_equal_squares_stay_in_memory_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "test"):
        for number in range(4):
            (tmp_path / "set" / split / "a").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "set" / split / "a" / f"{number}.png")
    name = f"folder:{tmp_path / 'set'}"
    monkeypatch.setattr(datasets, "LARGEST_BYTES", 8 * 8 * 8 * 3)
    assert isinstance(load_dataset(name, cache=tmp_path / "one").train.images, np.ndarray)
    monkeypatch.setattr(datasets, "LARGEST_BYTES", 8 * 8 * 8 * 3 - 1)
    streamed = load_dataset(name, cache=tmp_path / "two")
    assert (streamed.train.size, streamed.image_size) == ((8, 8), 8)
    with pytest.raises(ValueError, match="read from their files, not kept in memory"):
        _ = streamed.train.pixels


def test_links_and_names_of_any_bytes(photos: Path, tmp_path: Path, dataset: Dataset) -> None:
    for split, into in (("train", "train"), ("test", "val")):  # val/, as of ImageNet
        for path in (photos / split).rglob("*.*"):
            folder = tmp_path / "links" / into / path.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            name = os.fsdecode(path.stem.encode() + b" \xff\n" + path.suffix.encode())
            (folder / name).symlink_to(path)
    found = load_dataset(f"folder:{tmp_path / 'links'}", cache=tmp_path)
    assert found.fingerprint == dataset.fingerprint
    assert np.array_equal(found.test.images.read(0), dataset.test.images.read(0))  # type: ignore[union-attr]
    broken = tmp_path / "links" / "val" / "c0" / "z.jpg"
    broken.symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=f"^{broken}: cannot be read: No such file or directory$"):
        load_dataset(f"folder:{tmp_path / 'links'}", cache=tmp_path)


def test_limit_and_hold_out(dataset: Dataset) -> None:
    few = limit(dataset.train, 10)
    rest, held = hold_out(few, 4, seed=1)
    assert (len(rest), len(held), len(held.images)) == (6, 4, 4)
    assert np.bincount(held.labels).tolist() == [2, 2]
    paths = {split.images.path(index) for split in (rest, held) for index in range(len(split))}  # type: ignore[union-attr]
    assert len(paths) == 10


# ---- the cuts --------------------------------------------------------------------------------------------------


def make_plan(augment: Augment, count: int = 4000, **changes: Any) -> SamplingPlan:
    return SamplingPlan(**{"images": count, "batch_size": 8, "augment": augment} | changes)


def test_boxes_are_of_random_area_aspect_and_place() -> None:
    """At fixed seeds; the area alone is uniform where every first draw fits."""
    plan = make_plan(replace(BOXES, area_range=(0.1, 0.4)))
    index, sizes = np.arange(4000), np.full((4000, 2), 500)
    cuts = draw_cuts(plan, 2, index, sizes)
    y, x, height, width = cuts.box.T
    area, aspect = height * width / 500**2, np.log(width / height)
    assert kstest((area - 0.1) / 0.3, "uniform").pvalue > 1e-3
    assert kstest((aspect + np.log(4 / 3)) / (2 * np.log(4 / 3)), "uniform").pvalue > 1e-3
    for start, side in ((y, height), (x, width)):
        assert kstest((start + 0.5) / (500 - side + 1), "uniform").pvalue > 1e-3
    assert (cuts.size == 24).all()
    assert not cuts.offset.any()


def test_a_cut_is_a_function_of_seed_epoch_and_image() -> None:
    plan, sizes = make_plan(BOXES), np.random.default_rng(0).integers(20, 90, (50, 2))
    whole = draw_cuts(plan, 1, np.arange(50), sizes)
    some = draw_cuts(replace(plan, rank=1, world_size=2), 1, np.array([7, 3]), sizes[[7, 3]])
    assert np.array_equal(some.box, whole.box[[7, 3]])
    for other, epoch in ((plan, 2), (replace(plan, seed=1), 1)):
        assert not np.array_equal(draw_cuts(other, epoch, np.arange(50), sizes).box, whole.box)


@pytest.mark.parametrize("augment", [BOXES, RESIZED, replace(BOXES, area_range=(0.9, 1.0))])
@pytest.mark.parametrize("train", [True, False])
def test_every_cut_lies_within_its_image(augment: Augment, train: bool) -> None:
    sizes = np.concatenate([np.random.default_rng(1).integers(1, 300, (500, 2)), [[1, 400], [400, 1], [28, 28]]])
    cuts = draw_cuts(make_plan(augment, train=train), 0, np.arange(len(sizes)), sizes)
    assert (cuts.box[:, :2] >= 0).all()
    assert (cuts.box[:, 2:] >= 1).all()
    assert (cuts.box[:, :2] + cuts.box[:, 2:] <= sizes).all()
    assert (cuts.offset >= 0).all()
    assert (cuts.offset + 24 <= cuts.size).all()
    if not (train and augment.area_range):
        assert (cuts.size.min(axis=1) == 28).all()


# ---- the loaders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [BOXES, RESIZED])
def test_dataloader_does_what_torchvision_does(augment: Augment, make: Any, dataset: Dataset) -> None:
    """Image by image: resized_crop of the plan's box, or Resize and a crop, of the file as PIL decodes it."""
    train, test = make("dataloader", augment)
    plan = make_plan(augment, 22, batch_size=6, seed=5)
    draw = plan.draw(3)
    cuts = draw_cuts(plan, 3, draw.index, dataset.train.sizes[draw.index])
    normalize = v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    found, labels = joined(train, 3)
    assert labels == dataset.train.labels[draw.index].tolist()
    for image, index, box, (y, x), flip in zip(found, draw.index, cuts.box, cuts.offset, draw.flip, strict=True):
        with Image.open(os.fsdecode(dataset.train.images.path(index))) as file:  # type: ignore[union-attr]
            whole = v2.functional.pil_to_tensor(file.convert("RGB"))
        if augment.area_range:
            expected = v2.functional.resized_crop(whole, *box.tolist(), [24, 24], antialias=True)
        else:
            expected = v2.functional.crop(v2.Resize(28, antialias=True)(whole), int(y), int(x), 24, 24)
        expected = normalize(v2.functional.to_dtype(expected, torch.float32, scale=True))
        torch.testing.assert_close(image, expected.flip(2) if flip else expected)
    order = replace(plan, images=10, batch_size=4, train=False).draw(0).index
    evaluated, _ = joined(test, 0)
    for image, index in zip(evaluated, order, strict=True):
        whole = torch.from_numpy(dataset.test.images.read(index).copy()).permute(2, 0, 1)  # type: ignore[union-attr]
        expected = v2.CenterCrop(24)(v2.Resize(28, antialias=True)(whole))
        torch.testing.assert_close(image, normalize(v2.functional.to_dtype(expected, torch.float32, scale=True)))


@pytest.mark.parametrize("augment", [BOXES, RESIZED])
def test_dali_agrees_with_dataloader(augment: Augment, make: Any) -> None:
    for ours, theirs in zip(make("dali", augment), make("dataloader", augment), strict=True):
        for epoch in (0, 2):
            (a, labels), (b, numbers) = joined(ours, epoch), joined(theirs, epoch)
            assert labels == numbers
            check_near(a, b)


@pytest.mark.parametrize("kind", ["dali", "dataloader"])
def test_images_in_memory_are_cut_as_those_in_files(
    kind: str, make: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    random, splits = np.random.default_rng(0), list[Split]()
    for split in ("train", "test"):
        images = random.integers(0, 256, (8, 40, 40, 3), dtype=np.uint8)
        (tmp_path / "set" / split / "a").mkdir(parents=True)
        for number, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / "set" / split / "a" / f"{number}.png")
        splits.append(Split(images, np.zeros(8, np.int64)))
    monkeypatch.setattr(datasets, "LARGEST_BYTES", 0)
    stored = load_dataset(f"folder:{tmp_path / 'set'}", cache=tmp_path)
    for augment in (BOXES, RESIZED, replace(RESIZED, resize=0)):
        memory = make(kind, augment, train=splits[0], test=splits[1])
        if not augment.resize:  # neither pads nor resizes: cropped as ever
            assert not augment.by_image(splits[0])
            make(kind, augment, train=stored.train, test=stored.test)
            continue
        for a, b in zip(memory, make(kind, augment, train=stored.train, test=stored.test), strict=True):
            assert torch.equal(joined(a, 1)[0], joined(b, 1)[0])


@pytest.mark.parametrize("kind", ["dali", "dataloader"])
def test_any_epoch_from_any_step_and_any_rank(kind: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "CPU_MACROBATCH_MIB", 1e-9)
    train, _ = make(kind)
    whole = {epoch: list(train.epoch(epoch)) for epoch in (0, 1)}
    for epoch, start in ((1, 2), (0, 3), (1, 0)):
        for (images, labels), (right, numbers) in zip(
            train.epoch(epoch, start), whole[epoch][start:], strict=True
        ):
            assert torch.equal(images, right)
            assert torch.equal(labels, numbers)
        next(train.epoch(0))
    ranks = [make(kind, rank=rank, world_size=2)[0].epoch(1) for rank in range(2)]
    for (images, labels), *shares in zip(whole[1], *ranks, strict=True):
        for rank, (share, numbers) in enumerate(shares):
            assert torch.equal(images[rank::2], share)
            assert torch.equal(labels[rank::2], numbers)


@pytest.mark.parametrize("kind", ["dali", "dataloader", "synthetic"])
def test_evaluation_sees_every_image_once(kind: str, make: Any, dataset: Dataset) -> None:
    parts = [joined(make(kind, rank=rank, world_size=3)[1], epoch) for rank in range(3) for epoch in (0,)]
    alone, _ = joined(make(kind)[1], 1)
    together = torch.cat([images for images, _ in parts])
    assert sorted(map(float, together.sum((1, 2, 3)))) == sorted(map(float, alone.sum((1, 2, 3))))
    assert sorted(label for _, labels in parts for label in labels) == sorted(dataset.test.labels.tolist())


def test_synthetic_is_a_batch_of_real_images(make: Any) -> None:
    images, _ = next(make("dataloader")[0].epoch(0))
    batches = list(make("synthetic")[0].epoch(0))
    assert [len(labels) for _, labels in batches] == [6, 6, 6, 4]
    assert torch.equal(batches[0][0], images)


def test_resident_refuses(make: Any) -> None:
    with pytest.raises(ValueError, match=r"resident crops images of one size .* use dali or dataloader"):
        make("resident")


def test_what_cannot_be_cut(dataset: Dataset) -> None:
    for augment, words in (
        (replace(BOXES, pad=4), r"images of \d+x\d+ to \d+x\d+ pixels, which .* need pad=0$"),
        (
            replace(BOXES, area_range=(0.5, 2.0)),
            r"area_range=\(0.5, 2.0\): two rising numbers above 0 and up to 1",
        ),
        (replace(BOXES, resize=20), "crop 24 does not fit into images whose shorter side is 20"),
        (replace(BOXES, crop=None), "need crop=[0-9]+$"),
        (replace(BOXES, resize=0), "need resize=27$"),
    ):
        with pytest.raises(ValueError, match=words):
            augment.crop_size(dataset.train)
    with pytest.raises(
        ValueError, match=r"normalize=pixel-mean measures images in memory.*imagenet and imagenet-mean"
    ):
        make_normalize("pixel-mean", dataset.train)


@pytest.mark.data
def test_loaders_agree_on_real_photographs(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ARCHIVE.exists():
        pytest.skip("no ../shared/data")
    with tarfile.open(ARCHIVE) as archive:
        members = (member for member in archive if member.name.endswith(".jpg"))
        for number, member in zip(range(24), members, strict=False):
            path = tmp_path / "set" / ("test" if number % 3 == 0 else "train") / "a" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]
    monkeypatch.setattr(datasets, "LARGEST_BYTES", 0)
    real = load_dataset(f"folder:{tmp_path / 'set'}", cache=tmp_path)
    augment = replace(BOXES, crop=96, resize=112)
    pairs = [make(kind, augment, train=real.train, test=real.test) for kind in ("dali", "dataloader")]
    for ours, theirs in zip(*pairs, strict=True):
        check_near(joined(ours, 0)[0], joined(theirs, 0)[0])


# ---- corrupt files ---------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(photos: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the photos, one of them cut short, and its path."""
    subprocess.run(["cp", "-r", photos, tmp_path / "damaged"], check=True)
    path = tmp_path / "damaged" / "train" / "c0" / "002.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    return tmp_path / "damaged", path


@pytest.mark.parametrize("kind", ["dali", "dataloader"])
def test_corrupt_files_are_counted_and_refused(
    kind: str, damaged: tuple[Path, Path], make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, path = damaged
    corrupt, said = load_dataset(f"folder:{root}", cache=tmp_path), list[str]()
    train, _ = make(kind, train=corrupt.train, warn=said.append)
    with pytest.raises(DataError, match=rf"^1 corrupt files of 22, 0 are allowed: first {path}: not a readable"):
        joined(train, 0)
    monkeypatch.setattr(files, "MOST_CORRUPT", 1 / 22)
    train, _ = make(kind, train=corrupt.train, warn=said.append)
    right, _ = make(kind)
    for epoch in (0, 1):
        images, labels = joined(train, epoch)
        expected, numbers = joined(right, epoch)
        assert labels == numbers
        (bad,) = np.flatnonzero((images != expected).any((1, 2, 3)).numpy())
        grey = (torch.full((3, 24, 24), files.GREY / 255) - torch.tensor(IMAGENET_MEAN)[:, None, None]) / STD
        torch.testing.assert_close(images[bad], grey)
    (line,) = said
    assert line.startswith(f"{path}: not a readable image: ")
    assert line.endswith("; a grey image stands for it")


def test_what_dali_cannot_decode_pil_does(
    photos: Path, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["cp", "-r", photos, tmp_path / "gif"], check=True)
    path = tmp_path / "gif" / "train" / "c0" / "000.jpg"
    with Image.open(path) as image:
        image.save(path.with_suffix(".gif"))
    path.unlink()
    some = load_dataset(f"folder:{tmp_path / 'gif'}", cache=tmp_path)
    expected, _ = joined(make("dataloader", train=some.train)[0], 0)
    check_near(joined(make("dali", train=some.train)[0], 0)[0], expected)
    monkeypatch.setattr(dali, "reads_header", lambda *_: True)  # found out only while it decodes
    check_near(joined(make("dali", train=some.train)[0], 0)[0], expected)


@pytest.mark.parametrize("kind", ["dali", "dataloader"])
def test_sixteen_bits_become_eight(kind: str, make: Any, tmp_path: Path) -> None:
    grey = np.linspace(0, 2**16 - 1, 1600).astype(np.uint16).reshape(40, 40)
    for split in ("train", "test"):
        for name, image in (("0.png", grey), ("1.tif", grey), ("2.png", np.zeros((40, 41), np.uint8))):
            (tmp_path / "set" / split / "a").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / "set" / split / "a" / name)
    train = load_dataset(f"folder:{tmp_path / 'set'}", cache=tmp_path).train
    middle = (grey[8:32, 8:32] >> 8) / 255
    plain = Normalize(np.zeros(3, np.float32), np.ones(3, np.float32))
    _, test = make(kind, Augment(0, "zero", 24, flip=False, resize=40), train=train, test=train, normalize=plain)
    exact = [image for image in joined(test, 0)[0] if np.allclose(image, middle, atol=1e-6)]
    assert len(exact) == 2
    made = Image.fromarray(grey.astype(np.float32))
    with pytest.raises(DataError, match=r"^pixels of 32 bits \(PIL's mode F\): 8 or 16 bits are allowed$"):
        files.to_rgb(made)
    own = read_split([(Image.fromarray(grey), 0)], "train").pixels
    assert np.array_equal(own[0, ..., 1], grey >> 8)


@pytest.mark.parametrize("kind", ["dali", "dataloader"])
def test_a_file_that_changes_while_a_run_trains_is_a_corrupt_one(
    kind: str, photos: Path, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another image, of the same size."""
    monkeypatch.setattr(files, "MOST_CORRUPT", 1 / 22)
    subprocess.run(["cp", "-r", photos, tmp_path / "changed"], check=True)
    path, said = tmp_path / "changed" / "train" / "c0" / "002.jpg", list[str]()
    train, _ = make(
        kind, train=load_dataset(f"folder:{tmp_path / 'changed'}", cache=tmp_path).train, warn=said.append
    )
    with Image.open(path) as image:
        image.transpose(Image.Transpose.ROTATE_180).save(path)
    joined(train, 0)
    assert said == [
        f"{path}: not a readable image: it has changed since it was hashed; a grey image stands for it"
    ]


def test_what_ends_dali_goes_to_pil(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a batch of 32 files or more a header that DALI's parsers cannot read ends the process: SIGSEGV."""
    root = write_photos(tmp_path / "set", train=64, test=2)
    folder, turned = root / "train" / "c0", Image.Exif()
    turned[0x112] = 6
    image = Image.open(folder / "000.jpg").resize((50, 40))
    grey = Image.fromarray(np.linspace(0, 2**16 - 1, 2000).astype(np.uint16).reshape(40, 50))
    one = Image.new("1", (50, 40))  # a TIFF of that has no BitsPerSample
    shaded = Image.merge(  # of such a TIFF DALI makes stripes
        "LA", [image.convert("L"), image.convert("L").rotate(180)]
    )
    for name, made, options in (
        ("x0.jpg", image, {"format": "GIF"}), ("x1.jpg", image, {"format": "TGA"}), ("x2.png", grey, {}),
        ("x3.ppm", image, {}), ("x4.tif", image, {"exif": turned}), ("x5.tif", one, {}), ("x6.png", image, {}),
        ("x7.jpg", image, {}), ("x8.tif", shaded, {}), ("y.webp", image, {"lossless": True, "exif": turned}),
        ("z.webp", image, {}),
    ):  # fmt: skip
        made.save(folder / name, **options)
    (folder / "x6.png").write_bytes((folder / "x6.png").read_bytes()[:45])
    content = (folder / "x7.jpg").read_bytes()
    (folder / "x7.jpg").write_bytes(content[: content.index(b"\xff\xda")])
    train = load_dataset(f"folder:{root}", cache=tmp_path).train
    monkeypatch.setattr(files, "MOST_CORRUPT", 0.5)
    ours, _ = make("dali", RESIZED, train=train, batch_size=75)
    given = [ours._read_file(index)[0][:2] for index in range(75)]
    assert [each == b"P6" for each in given] == [b"/x" in path for path in train.images.paths]  # type: ignore[union-attr]
    theirs, _ = make("dataloader", RESIZED, train=train, batch_size=75)
    check_near(joined(ours, 0)[0], joined(theirs, 0)[0])


def test_a_header_of_an_unknown_type_is_not_for_dali() -> None:
    """nvImageCodec's Python module knows no type of 33 bits, and raises TypeError."""
    written, size = io.BytesIO(), np.array([48, 40], np.int32)
    Image.new("RGB", (40, 48)).save(written, "JPEG")
    content = written.getvalue()
    assert dali.reads_header(content, size)
    assert not dali.reads_header(content.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x21"), size)


def test_a_file_cut_to_its_header_while_a_run_trains_does_not_end_the_process(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "set", train=64, test=2)
    with Image.open(root / "train" / "c0" / "000.jpg") as image:
        for name in ("jpg", "png", "webp", "bmp", "ppm", "tif"):
            image.save(root / "train" / "c0" / f"x.{name}")
    code = (
        "import os, sys, torch\n"
        "from harness.loaders import files\n"
        "from harness.loaders.datasets import load_dataset\n"
        "from harness.loaders.loader import make_loaders\n"
        "from harness.loaders.sampling import *\n"
        "files.MOST_CORRUPT = 0.5\n"
        "data = load_dataset('folder:' + sys.argv[1])\n"
        "augment = Augment(0, 'zero', 24, True, (), 28, (0.25, 1.0))\n"
        "config = LoaderConfig(augment=augment, normalize=make_normalize('imagenet', data.train), batch_size=70, threads=2,\n"
        "                      eval_batch_size=70, device=torch.device('cpu'), warn=lambda line: print(line, flush=True))\n"
        "train, test = make_loaders('dali', data.train, data.test, config)\n"
        "for epoch, name in enumerate(('jpg', 'png', 'webp', 'bmp', 'ppm', 'tif', '')):\n"
        "    for _ in range(2): list(train.epoch(epoch))\n"
        "    if name: os.truncate(f'{sys.argv[1]}/train/c0/x.{name}', 5)\n"
        "train.close(), test.close()\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(root)], env=os.environ | {"HARNESS_CACHE": str(tmp_path / "cache")},
        stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert (out.returncode, len(out.stdout.splitlines())) == (0, 6)


def test_scan_names_corrupt_files_and_nothing_is_trained(
    damaged: tuple[Path, Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    root, path = damaged
    code, _, err = harness(f"run --dataset folder:{root} {CUT} --scan --out {tmp_path / 'out'}", capsys)
    assert code == 2
    assert f"1 of 32 image files cannot be read: {path}: not a readable image: " in err.replace("\n", " ")
    assert not list((tmp_path / "out").glob("*"))
    path.write_bytes(b"no image")
    code, _, err = harness(f"run --dataset folder:{root} {CUT} --out {tmp_path / 'out'}", capsys)
    assert (code, "no known format" in err) == (2, True)


# ---- runs ------------------------------------------------------------------------------------------------------

CUT = (
    "--depths 8 --epochs 2 --batch-size 8 --gpus 0 --launcher local --set pad=0 --set crop=16 --set resize=18 "
    "--set area_range=0.25,1 --set normalize=imagenet --val 6"
)


@pytest.mark.parametrize("loader", ["dali", "dataloader"])
def test_a_run_from_files(
    loader: str, photos: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    line = f"run --dataset folder:{photos} --loader {loader} {CUT} --out {tmp_path / 'out'}"
    code, out, _ = harness(f"{line} --scan", capsys)
    assert code == 0
    assert "photos" in out
    code, out, err = harness(line, capsys)
    assert "was done already" in " ".join((out + err).split())
    (weights,) = tmp_path.glob("out/*/weights.safetensors")
    assert (
        harness(f"eval {weights} --dataset folder:{photos}", capsys)[0] == 2
    )  # the recipe of he2015 crops nothing


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("", "need pad=0, crop=32, resize=36, normalize=imagenet"),
        ("--set pad=0 --set crop=224", "need resize=256, normalize=imagenet"),
        ("--set pad=0 --set resize=256", "need crop=224, normalize=imagenet"),
        ("--set pad=0 --set crop=16 --set resize=18", "need normalize=imagenet"),
        ("--set scale_range=40,50", "need pad=0, scale_range=none, crop=32, resize=36, normalize=imagenet"),
        ("--variants imagenet --loader resident", "use dali or dataloader"),
    ],
)
def test_recipes_that_cannot_train_files(
    words: str, reason: str, photos: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    line = f"run --dataset folder:{photos} --epochs 1 --batch-size 8 --gpus 0 {words} --out {tmp_path / 'out'}"
    code, _, err = harness(line, capsys)
    assert code == 2
    assert reason in " ".join(err.split())


def test_weights_are_evaluated_on_files(photos: Path, tmp_path: Path, monkeypatch: Any, dataset: Dataset) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    network = build(find_variant("imagenet")(18).network, 2).eval()
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    options = EvalOptions(weights=tmp_path / "w.safetensors", variant="imagenet", dataset=f"folder:{photos}")
    found = evaluate_weights(options)
    wrong, transform = 0, v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])
    for index, label in enumerate(dataset.test.labels):
        image = transform(torch.from_numpy(dataset.test.images.read(index).copy()).permute(2, 0, 1))  # type: ignore[union-attr]
        image = v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)(v2.functional.to_dtype(image, torch.float32, scale=True))
        with torch.inference_mode():
            wrong += int(network(image[None]).argmax()) != label
    assert (found.images, found.error) == (10, pytest.approx(10 * wrong))
    with pytest.raises(UserError, match="need crop=32, resize=36"):
        evaluate_weights(replace(options, scales=(64,)))


@pytest.mark.parametrize("stored", [True, False])
def test_cuts_are_defined_alike_on_the_gpu(stored: bool, dataset: Dataset) -> None:
    """To define DALI's graph needs no GPU. Decoding is mixed there; numbers and paths come from the host."""
    config = LoaderConfig(
        augment=BOXES, normalize=Normalize(np.zeros(3, np.float32), np.ones(3, np.float32)), batch_size=4,
        eval_batch_size=4, device=torch.device("cpu"),
    )  # fmt: skip

    def definition(device: str) -> list[str]:
        pipeline = dali.dali.Pipeline(batch_size=4, num_threads=1, device_id=None if device == "cpu" else 0)
        loader = object.__new__(dali.CutLoader)
        split = dataset.train if stored else Split(np.zeros((4, 40, 40, 3), np.uint8), np.zeros(4, np.int64))
        vars(loader).update(_config=config, _on_gpu=device != "cpu", _size=(24, 24), _split=split)
        with pipeline:
            loader._define()
        pipeline._build_graph()
        specs = (str(operator.spec).splitlines() for operator in pipeline._ops)
        return ["\n".join(line for line in spec if "_origin_stack" not in line) for spec in specs]

    on_cpu, on_gpu = definition("cpu"), definition("cuda:0")
    assert any("mixed" in operator for operator in on_gpu) == stored
    # else a GPU upsamples colours otherwise than libjpeg does
    assert any("jpeg_fancy_upsampling: True" in operator for operator in on_gpu) == stored
    assert [each.replace("gpu", "cpu").replace("mixed", "cpu") for each in on_gpu] == on_cpu


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.long)])
def test_benchmark_of_images(times: int, photos: Path, tmp_path: Path) -> None:
    """A short benchmarks/images.py: it links, takes turns and stores every reading."""
    script = Path(__file__).parents[1] / "benchmarks" / "images.py"
    words = f"--data-dir {photos} --times {times} --rounds 1 --seconds 0.1 --crop 24 --resize 28 --batch-size 4 --threads 1"
    out = subprocess.run(
        [sys.executable, script, *words.split(), "--json", tmp_path / "images.json"],
        check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "HARNESS_CACHE": str(tmp_path / "cache")},
    ).stdout  # fmt: skip
    content = json.loads((tmp_path / "images.json").read_text())
    assert content["images"] == {str(n): 22 * n for n in range(1, times + 1)}
    assert set(content["readings"]) == {
        f"{way} {n}" for way in ("dali", "dataloader", "torchvision") for n in range(1, times + 1)
    }
    for (reading,) in content["readings"].values():
        assert reading["images_per_second"] > 0
        assert reading["peak_rss_mib"] > 100
    assert "torchvision" in out


def test_memory_does_not_grow_with_the_set(photos: Path, tmp_path: Path) -> None:
    """Twenty times the images, by links: the peak of a process that loads an epoch of each."""
    for copy in range(20):
        for split in ("train", "test"):
            for path in (photos / split).rglob("*.*"):
                link = tmp_path / "many" / split / path.parent.name / f"{copy}-{path.name}"
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path)
    code = (
        "import resource, sys, torch\n"
        "from harness.loaders.datasets import load_dataset\n"
        "from harness.loaders.loader import make_loaders\n"
        "from harness.loaders.sampling import *\n"
        "data = load_dataset('folder:' + sys.argv[1])\n"
        "augment = Augment(0, 'zero', 24, True, (), 28, (0.25, 1.0))\n"
        "config = LoaderConfig(augment=augment, normalize=make_normalize('imagenet', data.train), batch_size=8,\n"
        "                      eval_batch_size=8, device=torch.device('cpu'), threads=1)\n"
        "train, test = make_loaders('dali', data.train, data.test, config)\n"
        "print(sum(len(labels) for _, labels in train.epoch(0)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        "train.close(), test.close()\n"
    )
    environment = {**os.environ, "HARNESS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code]
    few, many = (
        [int(n) for n in subprocess.check_output([*command, str(root)], env=environment, text=True).split()]
        for root in (photos, tmp_path / "many")
    )
    assert (few[0], many[0]) == (22, 440)
    assert many[1] < few[1] + 20 * 1024  # KiB
