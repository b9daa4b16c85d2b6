"""What a source does that torch does not by itself: its resizing, its mixing, its padding, its initial weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from harness.loaders.datasets import Split
from harness.loaders.loader import Loader, make_loaders
from harness.loaders.sampling import (
    Augment,
    LoaderConfig,
    Normalize,
    SamplingPlan,
    draw_partners,
    draw_shares,
    make_normalize,
)
from harness.models.build import build
from harness.models.networks import EndPadded
from harness.models.variants import find_variant

SIDE, CROP, COUNT, SEED = 16, 14, 37, 5
RANDOM = np.random.default_rng(0)
SET = Split(RANDOM.integers(0, 256, (COUNT, SIDE, SIDE, 3)).astype(np.uint8), np.arange(COUNT, dtype=np.int64))
REAL = ("dali", "resident", "dataloader")


@pytest.fixture
def make() -> Iterator[Any]:
    made: list[Loader] = []

    def call(kind: str, augment: Augment, **changes: Any) -> tuple[Loader, Loader]:
        config = LoaderConfig(
            augment=augment, normalize=make_normalize("imagenet-mean", SET), batch_size=8, eval_batch_size=10,
            seed=SEED, device=torch.device("cpu"), **changes,
        )  # fmt: skip
        made.extend(make_loaders(kind, SET, SET, config))
        return made[-2], made[-1]

    yield call
    for loader in made:
        loader.close()


def resize(square: NDArray[Any], size: int) -> NDArray[Any]:
    """Every pixel `size` times, then means of `side` each: areas without fractions."""
    side = len(square)
    wide = square.astype(np.float64).repeat(size, 0).repeat(size, 1)
    return wide.reshape(size, side, size, side, 3).mean((1, 3))


def normalised(images: list[NDArray[Any]]) -> NDArray[Any]:
    mean = np.array([126.80609131, 119.21331787, 104.41227722])
    return np.stack([((image - mean) / 255).transpose(2, 0, 1) for image in images])


def all_images(loader: Loader, epoch: int) -> NDArray[Any]:
    return torch.cat([images for images, _ in loader.epoch(epoch)]).numpy()


@pytest.mark.parametrize("kind", REAL)
def test_scales_are_drawn_and_resized_alike(kind: str, make: Any) -> None:
    augment = Augment(0, "zero", CROP, flip=True, scale_range=(16, 30))
    train, test = make(kind, augment)
    plan = SamplingPlan(COUNT, 8, SEED, augment=augment, size=(SIDE, SIDE))
    draw = plan.draw(3)
    assert draw.side is not None
    expected = []
    for index, (y, x), side, flip in zip(draw.index, draw.offset, draw.side, draw.flip, strict=True):
        image = resize(SET.images[index][y : y + side, x : x + side], CROP)
        expected.append(image[:, ::-1] if flip else image)
    np.testing.assert_allclose(all_images(train, 3), normalised(expected), rtol=0, atol=2e-6)
    # an evaluated image is whole
    _, order = zip(*test.epoch(0), strict=True)
    whole = [resize(SET.images[label], CROP) for label in torch.cat(order).tolist()]
    np.testing.assert_allclose(all_images(test, 0), normalised(whole), rtol=0, atol=2e-6)


def test_every_scale_comes_and_every_square_lies_inside() -> None:
    augment = Augment(0, "zero", 112, flip=False, scale_range=(128, 240))
    draw = SamplingPlan(4000, 8, seed=1, augment=augment, size=(128, 128)).draw(0)
    assert draw.side is not None
    assert set(draw.side) == {int(112 * 128 / scale) for scale in range(128, 241)}
    assert draw.offset.min() == 0
    assert (draw.offset + draw.side[:, None]).max() == 128


def test_scales_need_square_images_without_padding(make: Any) -> None:
    for augment in (Augment(1, "zero", CROP, True, (16, 30)), Augment(0, "zero", CROP, True, (15, 30))):
        with pytest.raises(ValueError, match=r"scales 1[56] to 30 of 16x16 images"):
            make("resident", augment)


@pytest.mark.parametrize("kind", REAL)
def test_mixup_with_the_whole_set_mixes_before_it_augments(kind: str, make: Any) -> None:
    """data/mixupcifargenerator.py of iamVarunAnand/image_classification: two raw images, then one crop and flip."""
    augment = Augment(2, "black", None, flip=True)
    train, _ = make(kind, augment, mixup=0.4)
    plan = SamplingPlan(COUNT, 8, SEED, augment=augment, size=(SIDE, SIDE))
    draw, partner, shares = plan.draw(2), draw_partners(plan, 2), draw_shares(plan, 2, 0.4)
    assert 0 < shares.max() <= 0.5
    expected = []
    for index, (y, x), flip, share in zip(draw.index, draw.offset, draw.flip, shares, strict=True):
        mixed = (1 - share) * SET.images[index].astype(float) + share * SET.images[partner[index]]
        image = np.pad(mixed, ((2, 2), (2, 2), (0, 0)))[y : y + SIDE, x : x + SIDE]
        expected.append(image[:, ::-1] if flip else image)
    np.testing.assert_allclose(all_images(train, 2), normalised(expected), rtol=0, atol=2e-6)
    later = torch.cat([images for images, _ in train.epoch(2, 2)])
    assert np.array_equal(all_images(train, 2)[16:], later.numpy())


def test_ranks_share_one_mixup(make: Any) -> None:
    augment = Augment(2, "black", None, flip=True)
    one = {label: image for image, label in flatten(make("resident", augment, mixup=0.4)[0])}
    for rank in range(2):
        for image, label in flatten(make("resident", augment, mixup=0.4, rank=rank, world_size=2)[0]):
            assert torch.equal(one[label], image)


def flatten(loader: Loader) -> Iterator[tuple[torch.Tensor, int]]:
    for images, labels in loader.epoch(1):
        yield from zip(images, labels.tolist(), strict=True)


def test_the_mean_colour_is_a_constant() -> None:
    normalize: Normalize = make_normalize("imagenet-mean", SET)
    assert normalize.mean * 255 == pytest.approx([126.80609131, 119.21331787, 104.41227722])
    assert normalize.std.tolist() == [1, 1, 1]


@pytest.mark.parametrize(("side", "stride", "border"), [(8, 2, (0, 1)), (7, 2, (1, 1)), (8, 1, (1, 1))])
def test_padding_at_the_end(side: int, stride: int, border: tuple[int, int]) -> None:
    """TensorFlow's "same": max((ceil(n / stride) - 1) * stride + 3 - n, 0) in all, the smaller half first."""
    layer, images = EndPadded(3, 4, 3, stride, bias=False), torch.randn(2, 3, side, side)
    expected = F.conv2d(F.pad(images, border * 2), layer.weight, stride=stride)
    assert torch.equal(layer(images), expected)
    assert layer(images).shape[2] == -(-side // stride)


def test_truncated_weights_have_the_variance_of_the_others() -> None:
    torch.manual_seed(0)
    network = build(find_variant("keras-xresnet")(20).network, 10)
    weight: torch.Tensor = network.stages[2][1].residual[0].weight  # type: ignore[index, union-attr, assignment]
    std = (2 / (64 * 9)) ** 0.5
    assert weight.std().item() == pytest.approx(std, rel=0.02)
    assert weight.abs().max().item() == pytest.approx(2 * std / 0.87962566, rel=0.01)


def test_pooling_over_whole_windows() -> None:
    """neon pools 7x7 at stride 7, then classifies every window and takes the mean of their scores."""
    torch.manual_seed(0)
    network: Any = build(find_variant("miniplaces")(18).network, 100, 240).eval()
    network.window = 7
    with torch.inference_mode():
        for side in (112, 128, 160, 240):
            image = torch.randn(1, 3, side, side)
            maps = network.stages(F.relu(network.bn(network.conv(image))))
            windows = F.avg_pool2d(maps, 7, 7)
            scores = F.conv2d(windows, network.fc.weight[:, :, None, None]).mean((2, 3))
            torch.testing.assert_close(network(image), scores, rtol=1e-5, atol=1e-5)
