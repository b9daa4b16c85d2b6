"""Errors of stored weights on a test set: what `harness eval` does."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from harness.loaders.datasets import Dataset, Split, limit, load_dataset
from harness.loaders.loader import Loader, make_evaluation_loader
from harness.loaders.sampling import Augment, LoaderConfig, Normalize, SamplingPlan, make_normalize
from harness.models.build import SMALLEST_IMAGE, build
from harness.models.imagenet import ImageNetResNet
from harness.models.variants import Variant, default_depth, find_variant
from harness.options import EvalOptions, check_options
from harness.progress import say
from harness.results.published import load_published
from harness.results.store import load_records
from harness.spec import RunSpec, UserError
from harness.training.evaluation import MultiScale, evaluate
from harness.training.setup import EVAL_BATCH_SIZE, split_data
from harness.training.step import set_precision
from harness.training.weights import WeightsError, load_metadata, load_weights, match_weights

MULTI_SCALE_PIXELS = EVAL_BATCH_SIZE * 32 * 32  # in a batch, so that memory does not grow with the scale


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Errors:
    """Errors in percent over `images` images of the test set; `top5_error` is None for five classes or fewer."""

    name: str  # "he2015-20"
    label: str  # of the data set
    images: int
    of: int  # images of the test set
    error: float
    top5_error: float | None
    scales: tuple[int, ...]
    flip: bool  # averaged over mirrored images too
    average: str  # "logits" or "probabilities"
    published: tuple[str, ...]  # what the variant's source printed
    unused: tuple[str, ...]  # tensors in the file that belong to no layer of the network


def parse_normalize(mean: str | None, std: str | None) -> Normalize | None:
    """ "0.485,0.456,0.406" and "0.229,0.224,0.225": red, green, blue of images in 0..1. None where neither is given."""
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise UserError("--mean and --std go together: one was given without the other")
    return Normalize(_colour(mean, "--mean", above=-1e-9), _colour(std, "--std", above=0.0))


def _colour(text: str, option: str, *, above: float) -> NDArray[np.float32]:
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or not all(math.isfinite(number) and above < number <= 1 for number in numbers):
        least = "above 0" if above == 0 else "from 0"
        raise UserError(f"{option} {text!r}: three numbers {least} to 1 are allowed, as in 0.485,0.456,0.406")
    return np.array(numbers, np.float32)


def evaluate_weights(options: EvalOptions) -> Errors:
    """Load weights into a variant's network and evaluate it on the data set's test split.

    On the GPU where there is one, in fp32. One centre crop in the recipe's size, or, with scales, the whole image
    at each of them, and mirrored where the data set allows it. Raises UserError.
    """
    check_options(options)
    parse_normalize(options.mean, options.std)
    if not options.scales:
        chosen = (options.average != "logits", not options.mirror, options.save_probabilities is not None)
        for option in itertools.compress(("--average", "--no-mirror", "--save-probabilities"), chosen):
            raise UserError(f"{option} is for --scales, which says at which sizes images are evaluated")
    for name in ("predictions", "save_probabilities"):
        file: Path | None = getattr(options, name)
        if file and not file.expanduser().absolute().parent.is_dir():
            raise UserError(f"--{name.replace('_', '-')} {file}: no such folder")
    try:
        return _evaluate(options)
    except ValueError as error:
        raise UserError(str(error)) from None


def _evaluate(options: EvalOptions) -> Errors:
    """Raises ValueError or UserError."""
    named = load_metadata(options.weights.expanduser()) if options.variant is None else {}
    if (word := options.variant or named.get("variant")) is None:
        raise UserError(f"{options.weights} does not name its variant: --variant does")
    function = find_variant(word)
    depth = options.depth or (int(named["depth"]) if "depth" in named else default_depth(function))
    variant = function(depth)
    name, scales, weights = f"{variant.name}-{variant.network.depth}", options.scales, options.weights.expanduser()
    smallest = SMALLEST_IMAGE[variant.network.architecture]
    if scales and min(scales) < smallest:
        raise UserError(f"--scales {min(scales)} is too small for {variant.name}: at least {smallest} pixels")
    tensors = load_weights(weights)
    _check_origin(weights, variant)
    dataset = load_dataset(options.dataset, options.data_dir)
    crop = None if scales else variant.recipe.crop
    network = build(variant.network, dataset.num_classes, max(scales) if scales else crop or dataset.image_size)
    try:
        unused = match_weights(network, tensors)
    except WeightsError as error:
        raise UserError(f"{weights} into {name} for {dataset.num_classes} classes: {error}") from None

    if options.pool_window is not None:
        if not isinstance(network, ImageNetResNet):
            raise UserError(f"--pool-window {options.pool_window}: {variant.name} pools over all of its map")
        network.window = options.pool_window
    position: NDArray[np.int64] = np.arange(len(dataset.test))  # of these images in the whole test set
    test = dataset.test
    if options.limit is not None:
        # the same choice, of positions in place of images
        position = limit(Split(position, test.labels), options.limit).images  # type: ignore[arg-type, assignment]
        test = limit(test, options.limit)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader, order = _load(options, variant, dataset, test, device)
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    flip = bool(scales) and dataset.flip and options.mirror
    kept: dict[int, list[Tensor]] = {scale: [] for scale in scales}
    several = MultiScale(
        network, scales, flip=flip, average=options.average,  # type: ignore[arg-type]
        on_scale=(lambda scale, batch: kept[scale].append(batch.cpu())) if options.save_probabilities else None,
    )  # fmt: skip
    set_precision("fp32")
    batches: list[Tensor] = []
    evaluation = evaluate(
        several if scales else network,
        loader,
        images=len(test),
        autocast=nullcontext(),
        on_ranked=batches.append,
    )
    loader.close()
    ranked: NDArray[np.int64] = torch.cat(batches).cpu().numpy()
    labels = test.labels[order]
    if options.predictions:
        _write_predictions(options.predictions.expanduser(), position[order], labels, ranked, dataset)
    if options.save_probabilities:
        _write_probabilities(options.save_probabilities.expanduser(), position[order], labels, kept)
    misses = len(test) - int((ranked == labels[:, None]).sum())
    return Errors(
        name=name,
        label=dataset.label,
        images=evaluation.images,
        of=len(dataset.test),
        error=evaluation.error,
        top5_error=100 * misses / len(test) if dataset.num_classes > 5 else None,
        scales=scales,
        flip=flip,
        average=options.average,
        published=tuple(_cite_published(variant, dataset)),
        unused=tuple(unused),
    )


def _cite_published(variant: Variant, dataset: Dataset) -> Iterator[str]:
    """Each published number of the variant, and whether ours may be compared with it."""
    for entry in load_published():
        if (entry.variant, entry.depth, entry.dataset) == (variant.name, variant.network.depth, dataset.name):
            error = "top-5 error" if entry.error is None else "error"
            about = f"published: {error} {entry.number:g} % ({entry.note or entry.source})"
            yield about if dataset.original else f"{about}; of other images than these: not comparable"


def _write_probabilities(
    path: Path, position: NDArray[np.int64], labels: NDArray[np.int64], kept: Mapping[int, Sequence[Tensor]]
) -> None:
    """Arrays in the test set's order: image and label (n,), and scale_112 and so on (n, classes)."""
    order = np.argsort(position)
    arrays: dict[str, Any] = {
        f"scale_{scale}": torch.cat(list(batches)).numpy()[order] for scale, batches in kept.items()
    }
    try:
        with path.open("wb") as file:
            np.savez(file, image=position[order], label=labels[order], **arrays)
    except OSError as error:
        raise UserError(f"--save-probabilities {path} cannot be written: {error.strerror}") from None


def _load(
    options: EvalOptions, variant: Variant, dataset: Dataset, test: Split, device: torch.device
) -> tuple[Loader, NDArray[np.int64]]:
    """A loader of the images, and the order in which it gives them."""
    recipe, scales = variant.recipe, options.scales
    most = max(1, min(EVAL_BATCH_SIZE, MULTI_SCALE_PIXELS // max(scales) ** 2)) if scales else EVAL_BATCH_SIZE
    batch_size = min(options.batch_size or most, len(test))
    config = LoaderConfig(
        augment=Augment(0, recipe.pad_mode, None, flip=False)
        if scales
        else Augment(recipe.pad, recipe.pad_mode, recipe.crop, flip=False, scale_range=recipe.scale_range),
        normalize=parse_normalize(options.mean, options.std)
        or make_normalize(recipe.normalize, _training_images(options.weights.expanduser(), variant, dataset)),
        batch_size=batch_size,
        eval_batch_size=batch_size,
        device=device,
        threads=torch.get_num_threads(),
    )
    order = SamplingPlan(len(test), batch_size, train=False).draw(0).index
    return make_evaluation_loader("resident", test, config), order


def _check_origin(weights: Path, variant: Variant) -> None:
    """Raise UserError where the file names another network, whose tensors might fit all the same."""
    about = load_metadata(weights)
    try:
        trained = find_variant(about["variant"])(int(about["depth"]))
    except (KeyError, ValueError):
        return
    if trained.network != variant.network:
        raise UserError(
            f"{weights} holds weights of {trained.name}-{trained.network.depth}, "
            f"not of {variant.name}-{variant.network.depth}"
        )


def _training_images(weights: Path, variant: Variant, dataset: Dataset) -> Split:
    """The images over which a run measured its mean; the record beside its weights says what it left out.

    Without one, those the recipe trains on, with validation images drawn by seed 0 if there are enough.
    """
    recipe = variant.recipe if variant.recipe.val < len(dataset.train) else replace(variant.recipe, val=0)
    spec = RunSpec(
        variant=variant.name, network=variant.network, recipe=recipe, dataset=dataset.name,
        fingerprint=dataset.fingerprint, loader="resident", device="cpu",
    )  # fmt: skip
    key = load_metadata(weights).get("key")
    for stored in load_records([weights.parent]).records if key else []:
        if stored.record.key == key:
            known = stored.record.spec
            recipe = replace(spec.recipe, val=known["recipe"]["val"])
            spec = replace(spec, recipe=recipe, seed=stored.record.seed, limit_train=known["limit_train"])
    return split_data(spec, dataset).train


def _write_predictions(
    path: Path, position: NDArray[np.int64], labels: NDArray[np.int64], ranked: NDArray[np.int64], dataset: Dataset
) -> None:
    """A line per image: its position in the test set, its class, and the most likely classes, best first."""
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["image", "label", *(f"top{rank + 1}" for rank in range(ranked.shape[1]))])
            for row in np.argsort(position):
                classes = [dataset.classes[number] for number in (labels[row], *ranked[row])]
                rows.writerow([int(position[row]), *classes])
    except OSError as error:
        raise UserError(f"--predictions {path} cannot be written: {error.strerror}") from None


def print_errors(errors: Errors, console: Console) -> None:
    """Print errors, on how many images of which set, and which tensors of the file were not used."""
    count = f"{errors.images:,}" if errors.images == errors.of else f"{errors.images:,} of {errors.of:,}"
    line = f"{errors.name} on {errors.label}, test set, {count} images: top-1 error {errors.error:.2f} %"
    if errors.top5_error is not None:
        line += f", top-5 error {errors.top5_error:.2f} %"
    lines = [line]
    if errors.scales:
        mirrored = ", and mirrored" if errors.flip else ""
        what = "" if errors.average == "logits" else "probabilities "
        lines.append(f"{what}averaged over scales {', '.join(map(str, errors.scales))}{mirrored}")
    lines += errors.published
    if errors.unused:
        layers = dict.fromkeys(name.rpartition(".")[0] for name in errors.unused)
        lines.append(
            f"left over in the file: {len(errors.unused)} tensors of layers that are never called: {', '.join(layers)}"
        )
    say(console, "\n".join(lines))
