"""Errors of stored weights: those of training's own evaluation, at several scales, and every way to be asked wrongly."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import harness
from numpy.typing import NDArray
from PIL import Image
from records import make_record
from safetensors.torch import save_file
from torch import Tensor, nn

from harness.commands.evaluate import Errors, EvalOptions, evaluate_weights, parse_normalize
from harness.loaders.datasets import limit, load_dataset
from harness.models.build import build
from harness.models.variants import NETWORKS, VARIANTS, default_depth, find_variant
from harness.results.store import load_records
from harness.spec import UserError
from harness.training.evaluation import MultiScale, evaluating, resize

CLASSES = 7
TRAIN, TEST = 42, 35  # images


@pytest.fixture(autouse=True)
def _on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    torch.set_num_threads(1)


def test_what_is_frozen_stays_so() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3).eval(), nn.BatchNorm2d(3))
    with evaluating(network):
        assert not any(module.training for module in network.modules())
    assert [module.training for module in network] == [False, True]


def write_folder(root: Path, size: int) -> Path:
    """Class folders of images that are 8x8 patches of random colours."""
    random = np.random.default_rng(size)
    for split, count in (("train", TRAIN), ("test", TEST)):
        for number in range(count):
            label = number % CLASSES
            image = random.integers(0, 256, (8, 8, 3)).repeat(size // 8, axis=0).repeat(size // 8, axis=1)
            path = root / split / f"class{label}" / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "noise", 16)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "large", 128)


def make(variant: str = "he2015", depth: int = 8, classes: int = CLASSES) -> nn.Module:
    """A network from a seed, its batch norms used to images; its classes are far apart."""
    torch.manual_seed(3)
    network = build(find_variant(variant)(depth).network, classes)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.randn(16, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3))
    return network.eval()


def store(network: nn.Module, path: Path, **about: str) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path, metadata=about)
    return path


def ask(folder: Path, weights: Path, **changes: Any) -> Errors:
    options: dict[str, Any] = {"variant": "he2015", "depth": 8, "dataset": f"folder:{folder}"}
    return evaluate_weights(EvalOptions(weights=weights, **(options | changes)))


def tensors(images: NDArray[np.uint8], mean: Any, std: Any = 1.0) -> Tensor:
    """(n, H, W, 3) -> (n, 3, H, W), normalised; in NumPy and double precision."""
    return torch.from_numpy(((images / 255.0 - mean) / std).transpose(0, 3, 1, 2)).float()


def errors(logits: Tensor, labels: NDArray[np.int64]) -> tuple[float, float]:
    """Top-1 and top-5 error in percent, by sorting."""
    order = np.argsort(-logits.numpy(), axis=1, kind="stable")
    top1 = np.mean(order[:, 0] != labels)
    top5 = np.mean([label not in row[:5] for row, label in zip(order, labels, strict=True)])
    return 100 * float(top1), 100 * float(top5)


# ---- one crop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("val", [0, 14])
def test_what_training_measured(folder: Path, tmp_path: Path, capsys: Any, val: int) -> None:
    """The last epoch's error on the test set, exactly: the same images are in the mean, whatever was left out."""
    code, _, err = harness(
        f"run --dataset folder:{folder} --depths 8 --variants he2015 --seeds 5, --epochs 1 --batch-size 14 "
        f"--limit-train 35 --val {val} --gpus 0 --loader resident --launcher local --out {tmp_path}",
        capsys,
    )
    assert (code, err) == (0, "")
    (stored,) = load_records([tmp_path]).records
    result = stored.record.result
    assert result is not None
    answer = ask(folder, stored.folder / "weights.safetensors")
    assert answer.error == (result.test_error if val else result.final_error)
    assert answer.images == answer.of == TEST


def test_the_runs_own_recipe(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """Also where its variant is named, and where the weights are away from their record."""
    code, _, err = harness(
        f"run --dataset folder:{folder} --depths 8 --variants he2015 --seeds 5, --epochs 1 --batch-size 14 --gpus 0 "
        f"--set normalize=imagenet --loader resident --launcher local --out {tmp_path / 'runs'}",
        capsys,
    )
    assert (code, err) == (0, "")
    (stored,) = load_records([tmp_path / "runs"]).records
    beside, alone = stored.folder / "weights.safetensors", tmp_path / "alone.safetensors"
    alone.write_bytes(beside.read_bytes())
    assert stored.record.result is not None
    scores = set[bytes]()
    for weights, variant in product((beside, alone), (None, "he2015")):
        path = tmp_path / "scores.npz"
        answer = ask(folder, weights, variant=variant, scales=(16,), mirror=False, save_probabilities=path)
        scores.add(np.load(path)["scale_16"].tobytes())
        assert ask(folder, weights, variant=variant).error == stored.record.result.final_error == answer.error
    assert len(scores) == 1


def test_another_data_set_is_not_cut_as_the_runs_own(folder: Path, tmp_path: Path) -> None:
    spec = make_record(0, 9.0, variants=("he2015",), depths=(8,), limit_train=TRAIN - 7).spec
    given = {"variant": "he2015", "depth": "8", "spec": json.dumps(spec)}
    trained, unknown = (
        store(make(), tmp_path / "a.safetensors", **given),
        store(make(), tmp_path / "b.safetensors"),
    )
    scores = []
    for weights in (trained, unknown):
        answer = ask(folder, weights, scales=(16,), mirror=False, save_probabilities=tmp_path / "scores.npz")
        assert ("trained on other images: cifar10\n" in answer.text) == (weights == trained)
        scores.append(np.load(tmp_path / "scores.npz")["scale_16"])
    assert np.array_equal(*scores)


def test_the_mean_is_of_the_images_that_the_run_had(folder: Path, tmp_path: Path) -> None:
    """Without a record: of all that the recipe trains on."""
    dataset = load_dataset(f"folder:{folder}")
    network = make()
    answer = ask(folder, store(network, tmp_path / "w.safetensors"))
    images = tensors(dataset.test.images, (dataset.train.images / 255.0).mean(axis=0))
    with torch.inference_mode():
        expected = errors(network(images), dataset.test.labels)
    assert (answer.error, answer.top5_error) == pytest.approx(expected)
    assert 0 < answer.top5_error < answer.error < 100  # type: ignore[operator]


def test_centre_crop_of_the_recipe(large: Path, tmp_path: Path) -> None:
    """Mini-Places2's networks see 112 pixels of 128, whatever the size of the batch."""
    dataset = load_dataset(f"folder:{large}")
    network = make("miniplaces", 18)
    path = store(network, tmp_path / "w.safetensors")
    images = tensors(dataset.test.images, (dataset.train.images / 255.0).mean(axis=(0, 1, 2)))
    with torch.inference_mode():
        expected = errors(network(images[:, :, 8:120, 8:120]), dataset.test.labels)
    answer = ask(large, path, variant="miniplaces", depth=18, batch_size=8)
    assert (answer.error, answer.top5_error) == pytest.approx(expected)


def test_other_peoples_colours_names_and_a_part_of_the_images(folder: Path, tmp_path: Path, capsys: Any) -> None:
    dataset = load_dataset(f"folder:{folder}")
    network = make()
    given = {
        f"module.p{n}.{name.rpartition('.')[2]}": t for n, (name, t) in enumerate(network.state_dict().items())
    }
    path, table = tmp_path / "w.th", tmp_path / "table.csv"
    torch.save({"state_dict": given, "best_prec1": 9.9}, path)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    code, out, err = harness(
        f"eval --weights {path} --variant he2015 --depth 8 --dataset folder:{folder} --mean 0.4,0.5,0.6 "
        f"--std 0.2,0.25,0.3 --limit 21 --predictions {table}",
        capsys,
    )
    assert (code, err) == (0, "")
    part = limit(dataset.test, 21)
    with torch.inference_mode():
        top1, top5 = errors(network(tensors(part.images, mean, std)), part.labels)
        ranked = network(tensors(dataset.test.images, mean, std)).argsort(dim=1, descending=True)
    assert out == (
        f"he2015-8 on noise, test set, 21 of 35 images: top-1 error {top1:.2f} %, top-5 error {top5:.2f} %\n"
    )
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 21
    positions = [int(row["image"]) for row in rows]
    assert positions == sorted(set(positions))
    for row, position in zip(rows, positions, strict=True):
        assert row["label"] == f"class{dataset.test.labels[position]}"
        assert [row[f"top{k}"] for k in range(1, 6)] == [f"class{c}" for c in ranked[position, :5].tolist()]
    assert 100 * np.mean([row["label"] != row["top1"] for row in rows]) == pytest.approx(top1)


def test_unused_tensors_are_named(folder: Path, tmp_path: Path, capsys: Any) -> None:
    network = make("fattorib")
    given = {f"p{n}.{name.rpartition('.')[2]}": t for n, (name, t) in enumerate(network.state_dict().items())}
    given |= {f"first_block.conv_block.0.{kind}": torch.zeros(16) for kind in ("weight", "bias")}
    given |= {"first_block.bn.weight": torch.zeros(32)}
    torch.save(given, tmp_path / "w.pth")
    code, out, err = harness(
        f"eval --weights {tmp_path}/w.pth --variant fattorib --depth 8 --dataset folder:{folder}", capsys
    )
    assert (code, err) == (0, "")
    assert out.splitlines()[1] == (
        "left over in the file: 3 tensors of layers that are never called: "
        "first_block.conv_block.0, first_block.bn"
    )


def test_no_top5_error_of_five_classes_or_fewer(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "few"
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
        for label in range(5):
            (root / split / f"class{label}").symlink_to(folder / split / f"class{label}")
    assert ask(root, store(make(classes=5), tmp_path / "w.safetensors")).top5_error is None


# ---- several scales --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [11, 32, 45])
def test_resize_is_pillows(scale: int) -> None:
    """Bilinear and antialiased, with the shorter side at the scale."""
    random = np.random.default_rng(0)
    images = random.normal(size=(2, 3, 32, 48)).astype(np.float32)
    size = (scale, round(48 * scale / 32))
    ours = resize(torch.from_numpy(images), scale)
    assert ours.shape == (2, 3, *size)
    for image, made in zip(images.reshape(-1, 32, 48), ours.reshape(-1, *size), strict=True):
        expected = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
        np.testing.assert_allclose(made.numpy(), expected, atol=5e-5)
    upright = resize(torch.from_numpy(images).transpose(2, 3), scale)
    torch.testing.assert_close(upright.transpose(2, 3), ours)


def test_logits_are_averaged_over_scales_and_mirror_images() -> None:
    network = make()
    images = torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        one = MultiScale(network, (16,), flip=False)(images)
        torch.testing.assert_close(one, network(images))
        both = MultiScale(network, (16, 21), flip=True)(images)
        enlarged = resize(images, 21)
        views = [network(x) for x in (images, images.flip(3), enlarged, enlarged.flip(3))]
    torch.testing.assert_close(both, sum(views) / 4)
    assert not torch.allclose(views[0], views[1])


def test_probabilities_are_averaged_where_they_are_to_be() -> None:
    network, images = make(), torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        scores = MultiScale(network, (16, 21), flip=False, average="probabilities")(images)
        expected = sum(network(resize(images, scale)).double().softmax(1) for scale in (16, 21)) / 2
    torch.testing.assert_close(scores.double().exp(), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(
        MultiScale(network, (16, 21), flip=False)(images).softmax(1), scores.exp(), atol=1e-4
    )


@pytest.mark.parametrize("function", VARIANTS.values(), ids=lambda f: f.__name__)
def test_every_network_takes_any_scale_from_the_smallest_on(function: Callable[[int], Any]) -> None:
    network = function(default_depth(function)).network  # type: ignore[arg-type]
    smallest = NETWORKS[network.architecture].smallest_image
    torch.manual_seed(0)
    module = build(network, 6).eval()
    scales = (smallest, smallest + 1, smallest + 7)
    with torch.inference_mode():
        logits = MultiScale(module, scales, flip=True)(torch.randn(2, 3, 24, 24))
    assert logits.shape == (2, 6)
    assert logits.isfinite().all()


def test_scales_on_a_data_set(folder: Path, tmp_path: Path, capsys: Any) -> None:
    dataset = load_dataset(f"folder:{folder}")
    network = make()
    path = store(network, tmp_path / "w.safetensors")
    code, out, err = harness(
        f"eval --weights {path} --variant he2015 --depth 8 --dataset folder:{folder} --scales 12,16,20", capsys
    )
    assert (code, err) == (0, "")
    images = tensors(dataset.test.images, (dataset.train.images / 255.0).mean(axis=0))
    with torch.inference_mode():
        views = [resize(images, scale) for scale in (12, 16, 20)]
        top1, top5 = errors(sum(network(v) + network(v.flip(3)) for v in views), dataset.test.labels)  # type: ignore[arg-type]
    assert out == (
        f"he2015-8 on noise, test set, 35 images: top-1 error {top1:.2f} %, top-5 error {top5:.2f} %\n"
        "averaged over scales 12, 16, 20, and mirrored\n"
    )
    assert ask(folder, path, scales=(16,)).error != ask(folder, path).error, "mirror images change something"


def test_scales_are_of_the_whole_image(large: Path, tmp_path: Path) -> None:
    """Not of the recipe's crop, and digits, which may not be mirrored, are not."""
    dataset = load_dataset(f"folder:{large}")
    network = make("miniplaces", 18)
    path = store(network, tmp_path / "w.safetensors")
    part = limit(dataset.test, 10)
    images = tensors(part.images, (dataset.train.images / 255.0).mean(axis=(0, 1, 2)))
    with torch.inference_mode():
        whole = resize(images, 64)
        expected = errors(network(whole) + network(whole.flip(3)), part.labels)
    answer = ask(large, path, variant="miniplaces", depth=18, scales=(64,), limit=10)
    assert (answer.error, answer.top5_error) == pytest.approx(expected)
    digits = store(make(classes=10), tmp_path / "digits.safetensors")
    assert "averaged over scales 16" in ask(large, digits, dataset="digits", scales=(16,), limit=10).text


def test_the_evaluation_of_mpmz(large: Path, tmp_path: Path, capsys: Any) -> None:
    """Probabilities over 112, 128, 160 and 240 pixels, no mirror, windows of 7x7: to 1e-6 what is computed alone."""
    dataset = load_dataset(f"folder:{large}")
    network: Any = make("mpmz", 18)
    path, file = store(network, tmp_path / "w.safetensors"), tmp_path / "p.npz"
    line = f"eval --weights {path} --variant mpmz --depth 18 --dataset folder:{large} --limit 14 "
    multi = f"{line} --scales 112,128,160,240 --average probabilities --no-mirror --pool-window 7"
    code, out, err = harness(f"{multi} --save-probabilities {file}", capsys)
    assert (code, err) == (0, "")
    saved = dict(np.load(file))
    part = saved["image"]
    assert saved["label"].tolist() == dataset.test.labels[part].tolist()
    images = tensors(dataset.test.images[part], np.array([126.80609131, 119.21331787, 104.41227722]) / 255)
    every = []
    with torch.inference_mode():
        for scale in (112, 128, 160, 240):
            maps = network.stages(torch.relu(network.bn(network.conv(resize(images, scale)))))
            side = 7 * (maps.shape[2] // 7)
            scores = network.head_bn(network.fc(maps[:, :, :side, :side].mean((2, 3)))).double().numpy()
            shifted = np.exp(scores - scores.max(1, keepdims=True))
            every.append(shifted / shifted.sum(1, keepdims=True))
            np.testing.assert_allclose(saved[f"scale_{scale}"], every[-1], rtol=0, atol=1e-6)
    top1, top5 = errors(torch.from_numpy(np.mean(every, axis=0)), saved["label"])
    assert f"top-1 error {top1:.2f} %, top-5 error {top5:.2f} %" in out
    assert "probabilities averaged over scales 112, 128, 160, 240\n" in out


def test_published_errors_stand_below(
    monkeypatch: pytest.MonkeyPatch, large: Path, tmp_path: Path, capsys: Any
) -> None:
    whole = load_dataset(f"folder:{large}")
    kit = replace(whole, name="miniplaces", label="miniplaces-400")
    monkeypatch.setattr("harness.commands.evaluate.load_dataset", lambda *_: kit)
    path = store(make("mpmz", 74), tmp_path / "w.safetensors")
    code, out, _ = harness(f"eval --weights {path} --variant mpmz --dataset miniplaces --limit 7", capsys)
    assert code == 0
    assert "published: top-5 error 17.5 %" in out
    assert "published: top-5 error 14.6 %" in out
    assert out.count("of other images than these: not comparable") == 2


# ---- asked wrongly ---------------------------------------------------------------------------------------------


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


MISTAKES = [
    ("--weights {tmp}/none.pt", "none.pt: no such file"),
    ("--weights {tmp}", "not a file"),
    ("--weights {tmp}/text.pt", "not a checkpoint that torch can read"),
    ("--weights {tmp}/text.safetensors", "not a safetensors file"),
    ("--weights {tmp}/code.pt", "refused, and nothing in it was run: it holds pickled code"),
    ("--weights {tmp}/missing.pt", "into he2015-8 for 7 classes: {head}missing: stages.0.0.bn1.bias (16,)"),
    ("--weights {tmp}/extra.pt", "{head}left over: more.weight (1,)"),
    ("--weights {tmp}/shape.pt", "{head}differing: fc.bias is (3,), expected (7,)"),
    ("--weights {tmp}/extra.pt --depth 14", "{head}missing: stages.0.1.conv1.weight (16, 16, 3, 3)"),
    ("--depth 14", "holds weights of he2015-8, not of he2015-14"),
    ("--variant preact", "holds weights of he2015-8, not of preact-8"),
    ("--variant he2051", "did you mean he2015?"),
    ("--depth 9", "depth 9 is not 6n+2"),
    ("--scales 3,32", "--scales 3 is too small for he2015: at least 4 pixels"),
    (
        "--variant miniplaces --depth 18 --scales 96,15",
        "--scales 15 is too small for miniplaces: at least 16 pixels",
    ),
    ("--scales 96,", "--scales '96,'"),
    ("--scales 96,1e3", "'1e3' is neither a whole number"),
    ("--scales 0", "too small"),
    ("--scales 96,10000", "at most 9999 pixels are allowed"),
    ("--mean 0.5,0.5,0.5", "--mean and --std go together"),
    ("--std 0.5,0.5,0.5", "--mean and --std go together"),
    ("--mean 0.5,0.5 --std 1,1,1", "--mean '0.5,0.5': expected three numbers from 0 to 1"),
    ("--mean 0.5,x,0.5 --std 1,1,1", "--mean '0.5,x,0.5'"),
    ("--mean 125,123,114 --std 1,1,1", "--mean '125,123,114': expected three numbers from 0 to 1"),
    ("--mean nan,0,0 --std 1,1,1", "--mean 'nan,0,0'"),
    ("--mean 0,0,0 --std 0,1,1", "--std '0,1,1': expected three numbers above 0 to 1"),
    ("--scales 16 --average softmax", "--average 'softmax' is unknown (allowed: logits, probabilities)"),
    ("--no-mirror", "--no-mirror is for --scales"),
    ("--average probabilities", "--average is for --scales"),
    ("--save-probabilities {tmp}/p.npz", "--save-probabilities is for --scales"),
    ("--scales 16 --save-probabilities {tmp}/none/p.npz", "no such folder"),
    ("--pool-window 7", "--pool-window 7: he2015 pools over all of its map"),
    ("--limit 0", "--limit 0: at least 1"),
    ("--limit 36", "cannot take 36 of 35 images"),
    ("--batch-size 0", "--batch-size 0: at least 1"),
    ("--predictions {tmp}/none/p.csv", "no such folder"),
    ("--predictions {tmp}", "cannot be written"),
    ("--dataset folder:{tmp}/none", "no such folder"),
    ("--dataset folders", "data set 'folders' is unknown"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("mistakes")
    network = make()
    good = network.state_dict()
    store(network, tmp / "good.safetensors", variant="he2015", depth="8", key="k")
    (tmp / "text.pt").write_text("hello\n")
    (tmp / "text.safetensors").write_text("hello\n")
    torch.save({"state_dict": good, "hook": Touch(tmp / "touched")}, tmp / "code.pt")
    torch.save({name: t for name, t in good.items() if name != "stages.0.0.bn1.bias"}, tmp / "missing.pt")
    torch.save(good | {"more.weight": torch.zeros(1)}, tmp / "extra.pt")
    torch.save(good | {"fc.bias": torch.zeros(3)}, tmp / "shape.pt")
    return tmp


@pytest.mark.parametrize(("words", "expected"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2(
    folder: Path, files: Path, capsys: Any, words: str, expected: str
) -> None:
    words, expected = (
        words.format(tmp=files),
        expected.format(head="the weights are not this network's: ", tmp=files),
    )
    line = f"eval --weights {files}/good.safetensors --variant he2015 --depth 8 --dataset folder:{folder} {words}"
    code, out, err = harness(line, capsys)
    assert (code, out) == (2, "")
    assert err.startswith("harness: error: ")
    assert err.count("\n") == 1
    assert expected in err
    assert not (files / "touched").exists()


def test_a_crop_larger_than_the_images(folder: Path, tmp_path: Path) -> None:
    path = store(make("miniplaces", 18), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="crop 112 does not fit into 16x16 images"):
        ask(folder, path, variant="miniplaces", depth=18)
    assert math.isfinite(ask(folder, path, variant="miniplaces", depth=18, scales=(16,)).error)


def test_colours() -> None:
    assert parse_normalize(None, None) is None
    normalize = parse_normalize("0, 0.5,1", "1,0.25, 0.5")
    assert normalize is not None
    assert normalize.mean.tolist() == [0, 0.5, 1]
    assert normalize.std.tolist() == [1, 0.25, 0.5]
    assert (
        find_variant("he2015")().recipe.normalize == "pixel-mean"
    )  # what the tests above measure a mean image for
