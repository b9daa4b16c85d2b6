"""Loaders: all carry out one plan, and what they give is what a plain loop over NumPy arrays gives."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from harness.loaders import dali
from harness.loaders.datasets import Split
from harness.loaders.loader import LOADERS, Loader, make_loaders
from harness.loaders.resident import crop, crop_by_index
from harness.loaders.sampling import (
    PLAIN,
    Augment,
    LoaderConfig,
    Normalize,
    SamplingPlan,
    check_normalize,
    make_normalize,
)
from harness.training.evaluation import evaluate

REAL = [name for name in LOADERS if name != "synthetic"]
HEIGHT, WIDTH, PAD, BATCH = 12, 10, 3, 16
RANDOM = np.random.default_rng(7)
# labels say which image it is
TRAIN = Split(RANDOM.integers(0, 256, (70, HEIGHT, WIDTH, 3), dtype=np.uint8), np.arange(70))
TEST = Split(RANDOM.integers(0, 256, (41, HEIGHT, WIDTH, 3), dtype=np.uint8), np.arange(41))
OF_CIFAR: dict[str, Any] = {"augment": Augment(4, "zero", None, flip=True), "size": (32, 32)}
KINDS = ("pixel-mean", "channel-mean", "channel-mean-std", "imagenet")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads cost more than such small batches are worth."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make() -> Iterator[Any]:
    """make_loaders with defaults; what it made is closed after the test."""
    made: list[Loader] = []

    def call(kind: str, **changes: Any) -> tuple[Loader, Loader]:
        options: dict[str, Any] = {
            "augment": Augment(PAD, "zero", None, flip=True),
            "normalize": make_normalize("pixel-mean", TRAIN),
            "batch_size": BATCH,
            "eval_batch_size": 15,
            "seed": 5,
            "device": torch.device("cpu"),
            "threads": 2,
        }
        train, test = changes.pop("train", TRAIN), changes.pop("test", TEST)
        loaders = make_loaders(kind, train, test, LoaderConfig(**{**options, **changes}))
        made.extend(loaders)
        return loaders

    yield call
    for loader in made:
        loader.close()


def reference(
    split: Split, augment: Augment, normalize: Normalize, plan: SamplingPlan, epoch: int
) -> list[np.ndarray]:
    """The epoch's images one by one in float64, (3, height, width)."""
    draw = plan.draw(epoch)
    height, width = (augment.crop, augment.crop) if augment.crop else split.images.shape[1:3]
    border = ((augment.pad, augment.pad), (augment.pad, augment.pad), (0, 0))
    images = []
    for index, (y, x), flip in zip(draw.index, draw.offset, draw.flip, strict=True):
        image, raw = split.images[index] / 255, split.images[index]
        mean = np.broadcast_to(normalize.mean.astype(np.float64), image.shape)
        if augment.pad_mode == "reflect":
            image = np.pad(image, border, "reflect") - np.pad(mean, border, "reflect")
        elif augment.pad_mode == "mean":
            image = np.pad(raw, border, "mean") / 255 - np.pad(mean, border, "mean")
        elif augment.pad_mode == "zero" or normalize.mean.ndim == 3:
            image = np.pad(image - mean, border)
        else:
            image = np.pad(image, border) - normalize.mean
        image = (image / normalize.std)[y : y + height, x : x + width]
        images.append((image[:, ::-1] if flip else image).transpose(2, 0, 1))
    return images


def train_plan(augment: Augment, **changes: Any) -> SamplingPlan:
    given = {"images": 70, "batch_size": BATCH, "augment": augment, "size": (HEIGHT, WIDTH), "seed": 5}
    return SamplingPlan(**{**given, **changes})


def joined(loader: Loader, epoch: int, first_step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(loader.epoch(epoch, first_step))
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


# ---- every loader against the reference ------------------------------------------------------------------------


def check_against_reference(loader: Loader, augment: Augment, normalize: Normalize) -> None:
    plan = train_plan(augment)
    expected = reference(TRAIN, augment, normalize, plan, epoch=2)
    batches = list(loader.epoch(2))
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 16, 6]
    position = 0
    for images, labels in batches:
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert images.is_contiguous(memory_format=torch.channels_last)
        part = slice(position, position + len(labels))
        assert labels.tolist() == TRAIN.labels[plan.draw(2).index[part]].tolist()
        np.testing.assert_allclose(images.cpu().numpy(), expected[part], rtol=0, atol=1e-6)
        position += len(labels)


@pytest.mark.parametrize("loader", REAL)
@pytest.mark.parametrize("kind", ["pixel-mean", "channel-mean-std"])
@pytest.mark.parametrize("pad_mode", ["zero", "black", "reflect", "mean"])
@pytest.mark.parametrize("size", [None, 8])
def test_equals_reference(loader: str, kind: Any, pad_mode: Any, size: int | None, make: Any) -> None:
    augment, normalize = Augment(PAD, pad_mode, size, flip=True), make_normalize(kind, TRAIN)
    train, _ = make(loader, augment=augment, normalize=normalize)
    check_against_reference(train, augment, normalize)


@pytest.mark.gpu
@pytest.mark.parametrize("loader", REAL)
@pytest.mark.parametrize("kind", ["pixel-mean", "channel-mean-std"])
@pytest.mark.parametrize("pad_mode", ["zero", "reflect"])
def test_equals_reference_on_the_gpu(loader: str, kind: Any, pad_mode: Any, make: Any) -> None:
    augment, normalize = Augment(PAD, pad_mode, None, flip=True), make_normalize(kind, TRAIN)
    train, _ = make(loader, augment=augment, normalize=normalize, device=torch.device("cuda", 0))
    check_against_reference(train, augment, normalize)
    check_against_reference(train, augment, normalize)


@pytest.mark.parametrize("loader", REAL)
def test_without_padding_or_flip(loader: str, make: Any) -> None:
    augment, normalize = Augment(0, "zero", None, flip=False), make_normalize("channel-mean", TRAIN)
    images, labels = joined(make(loader, augment=augment, normalize=normalize)[0], epoch=0)
    expected = TRAIN.images[labels.numpy()].transpose(0, 3, 1, 2) / 255 - normalize.mean[:, None, None]
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("loader", REAL)
def test_images_of_an_evaluation_do_not_depend_on_its_precision(loader: str, make: Any) -> None:
    """Resized by products of matrices, which autocast would make bf16, and a GPU TF32."""
    square = Split(TRAIN.images[:, :10, :10], TRAIN.labels)
    augment = Augment(0, "zero", 6, flip=False, scale_range=(12, 14))
    _, test = make(
        loader, train=square, test=square, augment=augment, normalize=make_normalize("channel-mean", square)
    )
    network, seen = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 36, 70)), list[torch.Tensor]()

    def forward(images: torch.Tensor) -> torch.Tensor:
        seen.append(images.clone())
        return cast("torch.Tensor", network(images))

    for precision in ("fp32", "bf16"):
        evaluate(network, test, images=70, precision=precision, forward=forward)
    batches = len(seen) // 2
    assert all(map(torch.equal, seen[:batches], seen[batches:]))


@pytest.mark.parametrize("change", [{"scale_range": (32, 48)}, {"resize": 36}])
def test_the_mean_image_is_not_subtracted_from_resized_images(change: dict[str, Any]) -> None:
    resized = replace(PLAIN, **change)
    check_normalize("channel-mean", TRAIN, resized)
    with pytest.raises(ValueError, match=r"^normalize=pixel-mean needs images that are not resized: all others"):
        check_normalize("pixel-mean", TRAIN, resized)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_dataloader_with_worker_processes(make: Any) -> None:
    alone, _ = make("dataloader")
    helped, _ = make("dataloader", threads=3)
    next(helped.epoch(0))
    for process in multiprocessing.active_children():
        process.terminate()  # as a scheduler does with all processes of a job: the trainer stops first
    for epoch, start in ((0, 0), (1, 2)):
        expected, found = joined(alone, epoch, start), joined(helped, epoch, start)
        assert torch.equal(expected[0], found[0])
        assert torch.equal(expected[1], found[1])


def test_indexing_on_the_gpu_and_on_the_cpu_are_the_same() -> None:
    images = torch.from_numpy(TRAIN.images)
    size = (HEIGHT - 4, WIDTH - 4)
    draw = SamplingPlan(70, BATCH, augment=Augment(2, "zero", None, flip=True), size=size).draw(0)
    arguments = [torch.from_numpy(array) for array in (draw.index, draw.offset, draw.flip)]
    assert torch.equal(crop(images, *arguments, size), crop_by_index(images, *arguments, size))


# ---- resuming --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps_each", [1, 2, 100])
@pytest.mark.parametrize("loader", REAL)
def test_any_epoch_from_any_step(loader: str, steps_each: int, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit what an epoch gives from its beginning, whatever came before. DALI: at any macrobatch size."""
    batch_mib = BATCH * HEIGHT * WIDTH * 12 / 2**20
    monkeypatch.setattr(dali, "CPU_MACROBATCH_MIB", steps_each * batch_mib * 1.01)
    train, _ = make(loader)
    whole = {epoch: list(train.epoch(epoch)) for epoch in (0, 1, 4)}
    again, _ = make(loader)
    for epoch, start in ((1, 3), (1, 0), (4, 1), (0, 4), (0, 5), (1, 2)):
        batches = list(again.epoch(epoch, start))
        assert len(batches) == 5 - start
        for (images, labels), (expected, numbers) in zip(batches, whole[epoch][start:], strict=True):
            assert torch.equal(images, expected)
            assert torch.equal(labels, numbers)
        next(again.epoch(0))  # and left early
    assert not torch.equal(whole[0][0][1], whole[1][0][1])


def test_batches_of_dali_stay_what_they_were(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "CPU_MACROBATCH_MIB", 1e-9)
    train, _ = make("dali")
    kept = [(images, images.clone()) for epoch in range(6) for images, _ in train.epoch(epoch)]
    assert all(torch.equal(images, copy) for images, copy in kept)


def test_batches_of_dali_are_views_of_one_macrobatch(make: Any) -> None:
    train, _ = make("dali")
    pointers = {images.untyped_storage().data_ptr() for images, _ in train.epoch(0)}
    assert len(pointers) == 1


# ---- evaluation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", [None, 7, 14])
def test_evaluation_sees_every_image_once(loader: str, world: int, size: int | None, make: Any) -> None:
    normalize = make_normalize("pixel-mean", TRAIN) if size != 14 else make_normalize("channel-mean", TRAIN)
    augment = Augment(PAD, "reflect", size, flip=True)
    seen = []
    for rank in range(world):
        _, test = make(loader, augment=augment, normalize=normalize, rank=rank, world_size=world)
        images, labels = joined(test, epoch=0)
        assert sum(1 for _ in test.epoch(0)) == test.steps
        again, _ = joined(test, epoch=3)
        assert torch.equal(images, again)
        rows, columns = size or HEIGHT, size or WIDTH
        y, x = (HEIGHT + 2 * PAD - rows) // 2, (WIDTH + 2 * PAD - columns) // 2
        border = ((PAD, PAD), (PAD, PAD), (0, 0))
        for image, label in zip(images.numpy(), labels.tolist(), strict=True):
            expected = TEST.images[label] / 255 - normalize.mean
            expected = np.pad(expected, border, "reflect")[y : y + rows, x : x + columns]
            np.testing.assert_allclose(image, expected.transpose(2, 0, 1), rtol=0, atol=1e-6)
        seen += labels.tolist()
    assert sorted(seen) == list(range(41))
    assert seen != sorted(seen)


def test_evaluation_leaves_a_rank_without_an_image_a_step_short() -> None:
    plans = [SamplingPlan(31, 15, rank=rank, world_size=3, train=False) for rank in range(3)]
    assert [plan.steps for plan in plans] == [3, 2, 2]
    assert sorted(np.concatenate([plan.draw(0).index for plan in plans]).tolist()) == list(range(31))


# ---- the plan --------------------------------------------------------------------------------------------------


def test_epoch_of_cifar10() -> None:
    plan = SamplingPlan(50_000, 128, **OF_CIFAR)
    draw = plan.draw(0)
    assert plan.steps == 391
    sizes = [len(draw.part(step, step + 1).index) for step in range(plan.steps)]
    assert sizes == [128] * 390 + [80]
    assert np.array_equal(np.sort(draw.index), np.arange(50_000))
    assert not np.array_equal(draw.index, plan.draw(1).index)
    assert not np.array_equal(draw.index, replace(plan, seed=1).draw(0).index)
    assert np.array_equal(draw.index, SamplingPlan(50_000, 128, **OF_CIFAR).draw(0).index)


def test_offsets_are_uniform_and_flips_fair() -> None:
    """Offsets 0 and 8 come as often as the others. 1 in 1,000 for each of the four, at fixed seeds."""
    draw = SamplingPlan(50_000, 128, **OF_CIFAR, seed=1).draw(0)
    for axis in (0, 1):
        counts = np.bincount(draw.offset[:, axis], minlength=9)
        assert len(counts) == 9
        assert chisquare(counts).pvalue > 1e-3
    joint = np.bincount(draw.offset[:, 0] * 9 + draw.offset[:, 1], minlength=81)
    assert chisquare(joint).pvalue > 1e-3
    assert chisquare(np.bincount(draw.flip)).pvalue > 1e-3
    unflipped = Augment(4, "zero", None, flip=False)
    assert not SamplingPlan(50_000, 128, augment=unflipped, size=(32, 32)).draw(0).flip.any()


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("images", [70, 65, 64])
def test_ranks_share_the_global_batches(world: int, images: int) -> None:
    alone = SamplingPlan(images, 16, **OF_CIFAR).draw(3)
    plans = [SamplingPlan(images, 16, **OF_CIFAR, rank=rank, world_size=world) for rank in range(world)]
    draws = [plan.draw(3) for plan in plans]
    assert {plan.steps for plan in plans} == {-(-images // 16)}
    offset_of = dict(zip(alone.index.tolist(), alone.offset.tolist(), strict=True))
    for step in range(plans[0].steps):
        whole = alone.part(step, step + 1).index
        shares = [draw.part(step, step + 1).index for draw in draws]
        if len(whole) < world:  # filled up from the epoch's start
            whole = np.concatenate([whole, alone.index[: world - len(whole)]])
        assert [share.tolist() for share in shares] == [whole[rank::world].tolist() for rank in range(world)]
    for draw in draws:
        assert draw.offset.tolist() == [offset_of[index] for index in draw.index.tolist()]


@pytest.mark.parametrize("loader", REAL)
def test_two_ranks_give_what_one_gives(loader: str, make: Any) -> None:
    alone, _ = make(loader)
    ranks = [make(loader, rank=rank, world_size=2)[0] for rank in range(2)]
    for (images, labels), first, second in zip(alone.epoch(1), ranks[0].epoch(1), ranks[1].epoch(1), strict=True):
        for rank, (share, numbers) in enumerate((first, second)):
            assert torch.equal(labels[rank::2], numbers)
            assert torch.equal(images[rank::2], share)


# ---- the loader-free bound -------------------------------------------------------------------------------------


def test_synthetic_is_one_batch_of_real_images(make: Any) -> None:
    train, _ = make("synthetic")
    batches = list(train.epoch(0)) + list(train.epoch(1))
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 16, 6] * 2
    assert len({images.data_ptr() for images, _ in batches}) == 1
    images, labels = batches[0]
    plain, numbers = next(make("resident", augment=Augment(PAD, "zero", None, flip=True))[0].epoch(0))
    assert sorted(labels.tolist()) == sorted(numbers.tolist())
    assert images.shape == plain.shape
    assert train.steps == 5
    assert len(list(train.epoch(0, 3))) == 2


# ---- normalisation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_normalisation(kind: Any) -> None:
    found = make_normalize(kind, TRAIN)
    pixels = TRAIN.images / 255
    mean = {
        "pixel-mean": pixels.mean(axis=0),
        "channel-mean": pixels.mean(axis=(0, 1, 2)),
        "channel-mean-std": pixels.mean(axis=(0, 1, 2)),
        "imagenet": np.array([0.485, 0.456, 0.406]),
    }[kind]
    std = {"channel-mean-std": pixels.std(axis=(0, 1, 2)), "imagenet": np.array([0.229, 0.224, 0.225])}
    np.testing.assert_allclose(found.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(found.std, std.get(kind, np.ones(3)), rtol=1e-6)
    assert found.mean.dtype == found.std.dtype == np.float32


# ---- what can be wrong -----------------------------------------------------------------------------------------


def test_unknown_loader(make: Any) -> None:
    with pytest.raises(
        ValueError, match=r"loader 'dalli' is unknown; did you mean dali\? \(allowed: dali, resident"
    ):
        make("dalli")


def test_what_does_not_fit(make: Any) -> None:
    with pytest.raises(ValueError, match="crop 19 does not fit into 10x12 images padded by 3"):
        make("resident", augment=Augment(PAD, "zero", 19, flip=True))
    with pytest.raises(ValueError, match="padding of 10 by reflection: 10x12 images are too small"):
        make("resident", augment=Augment(10, "reflect", None, flip=True))
    with pytest.raises(ValueError, match="in batches of 2 are fewer than one for each of 3 workers"):
        make("resident", batch_size=2, world_size=3)
    with pytest.raises(ValueError, match="41 images in batches of 100 are fewer than one for each of 50 workers"):
        make("resident", batch_size=100, eval_batch_size=100, world_size=50)
    with pytest.raises(ValueError, match="a channel has the same value in all training images"):
        make_normalize("channel-mean-std", Split(np.zeros((4, 2, 2, 3), np.uint8), np.zeros(4, np.int64)))


def test_dali_is_loaded_by_who_asks_for_it() -> None:
    code = (
        "import sys, numpy, torch; from harness.loaders.loader import *; from harness.loaders.sampling import *\n"
        "split = Split(numpy.ones((8, 4, 4, 3), numpy.uint8), numpy.arange(8))\n"
        "config = LoaderConfig(augment=Augment(1, 'zero', None, True), normalize=make_normalize('imagenet', split), "
        "batch_size=4, eval_batch_size=4, device=torch.device('cpu'))\n"
        "make_loaders('resident', split, split, config)\n"
        "print('nvidia.dali' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


# ---- DALI on a GPU: what can be tested of it without one -------------------------------------------------------


ON_CPU = LoaderConfig(
    augment=Augment(PAD, "zero", None, flip=True),
    normalize=Normalize(np.zeros(3, np.float32), np.ones(3, np.float32)),
    batch_size=4,
    eval_batch_size=4,
    device=torch.device("cpu"),
)


def definition(config: LoaderConfig, mean: np.ndarray) -> list[str]:
    """Every operator of DALI's graph in words. To define it needs no GPU, to build it does."""
    on_gpu = config.device.type == "cuda"
    pipeline = dali.dali.Pipeline(batch_size=4, num_threads=1, device_id=0 if on_gpu else None)
    loader = object.__new__(dali.DaliLoader)
    own = {"_config": config, "_on_gpu": on_gpu, "_size": (8, 8), "_mean": mean, "_std": np.ones(3, np.float32)}
    vars(loader).update(own)
    with pipeline:
        loader._define()
    pipeline._build_graph()
    return [
        "\n".join(line for line in str(operator.spec).splitlines() if "_origin_stack" not in line)
        for operator in pipeline._ops
    ]


@pytest.mark.parametrize("mean_shape", [(3,), (14, 14, 3)])
def test_definition_on_the_gpu_is_that_of_the_cpu(mean_shape: tuple[int, ...]) -> None:
    on_cpu = definition(ON_CPU, np.zeros(mean_shape, np.float32))
    on_gpu = definition(replace(ON_CPU, device=torch.device("cuda", 0)), np.zeros(mean_shape, np.float32))
    assert sum("gpu" in operator for operator in on_gpu) == (5 if len(mean_shape) == 3 else 3)
    assert [operator.replace("gpu", "cpu") for operator in on_gpu] == on_cpu


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_dalis_crop_takes_no_argument_of_each_image(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every image it checks all images' arguments: 2,730 at once took 110 ms of the CPU on an H200."""
    given: list[Any] = []
    for name in ("warp_affine", "crop_mirror_normalize"):
        operator = getattr(dali.fn, name)
        monkeypatch.setattr(
            dali.fn,
            name,
            lambda *inputs, operator=operator, **k: given.extend(k.values()) or operator(*inputs, **k),
        )
    definition(replace(ON_CPU, device=torch.device(device)), np.zeros(3, np.float32))
    assert len(given) > 4
    assert not [value for value in given if isinstance(value, dali.dali.data_node.DataNode)]


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_dali_shares_no_memory_that_it_is_fed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default DALI copies on the stream that writes the memory. A pointer shared with it (`no_copy`), or a copy on
    another stream, would be read before it is written."""
    calls: list[dict[str, Any]] = []
    source = dali.fn.external_source

    def record(**options: Any) -> Any:
        calls.append(options)
        return source(**options)

    monkeypatch.setattr(dali.fn, "external_source", record)
    definition(replace(ON_CPU, device=torch.device(device)), np.zeros(3, np.float32))
    assert len(calls) == 2
    for options in calls:
        assert not any(options.get(name) for name in ("no_copy", "parallel", "cuda_stream", "blocking"))


def test_what_dali_was_fed_may_be_overwritten_at_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = joined(make("dali")[0], epoch=0)
    monkeypatch.setattr(dali, "CPU_MACROBATCH_MIB", 1e-9)
    feed = dali.DaliLoader._feed_pixels
    buffer = np.empty((BATCH, HEIGHT + 2 * PAD, WIDTH + 2 * PAD, 3), np.uint8)

    def feed_from_one_buffer(loader: dali.DaliLoader, run: int) -> np.ndarray:
        pixels = feed(loader, run)
        buffer[: len(pixels)] = pixels
        return buffer[: len(pixels)]

    monkeypatch.setattr(dali.DaliLoader, "_feed_pixels", feed_from_one_buffer)
    images, _ = joined(make("dali")[0], epoch=0)
    assert torch.equal(images, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("macrobatch_mib", [1e-9, 32])
@pytest.mark.parametrize("loader", REAL)
def test_a_busy_gpu_gets_the_right_batches(
    loader: str, macrobatch_mib: float, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long kernel is queued before each batch is taken, so that what no stream waits for comes out wrong."""
    monkeypatch.setattr(dali, "GPU_MACROBATCH_MIB", macrobatch_mib)
    augment, normalize = Augment(PAD, "zero", None, flip=True), make_normalize("pixel-mean", TRAIN)
    train, _ = make(loader, augment=augment, normalize=normalize, device=torch.device("cuda", 0))
    for epoch, first_step in ((0, 0), (1, 0), (2, 0), (5, 3), (1, 1), (0, 4), (2, 0)):
        expected = make("resident", augment=augment, normalize=normalize)[0].epoch(epoch, first_step)
        batches, kept = train.epoch(epoch, first_step), []
        for _ in range(first_step, train.steps):
            torch.cuda._sleep(50_000_000)
            images, labels = next(batches)
            kept.append((images + 0, labels + 0))  # as a training step would, on the same stream
            del images, labels
        for (images, labels), (right, numbers) in zip(kept, expected, strict=True):
            assert labels.tolist() == numbers.tolist()
            np.testing.assert_allclose(images.cpu(), right, rtol=0, atol=1e-6)
