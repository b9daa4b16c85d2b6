"""Errors of stored weights on a test set: what `harness eval` does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn

from harness.loaders.cache import cache_dir
from harness.loaders.datasets import Dataset, Split, limit, load_dataset
from harness.loaders.loader import make_evaluation_loader
from harness.loaders.sampling import Augment, LoaderConfig, Normalize, SamplingPlan, make_augment, make_normalize
from harness.models.build import build
from harness.models.imagenet import ImageNetResNet
from harness.models.variants import NETWORKS, VARIANTS, Variant, default_depth, find_variant
from harness.options import EvalOptions
from harness.plan import find_data_dir
from harness.plugins import blaming
from harness.progress import say
from harness.results.published import load_published
from harness.results.remote import StorageError, is_uri, pull_file, redact
from harness.results.store import load_records
from harness.results.values import Record
from harness.spec import RunSpec, UserError
from harness.training.evaluation import MultiScale, evaluate
from harness.training.setup import EVAL_BATCH_SIZE, eval_batch_size, split_data
from harness.training.step import set_precision
from harness.training.weights import WeightsError, load_metadata, load_weights, match_weights

MULTI_SCALE_PIXELS = EVAL_BATCH_SIZE * 32 * 32  # in a batch, so that memory does not grow with the scale


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """Errors in percent over `images` of the `of` images of a test set."""

    of_what: str  # "he2015-20 on CIFAR-10"
    images: int
    of: int
    error: float
    top5_error: float | None  # None for five classes or fewer
    notes: tuple[str, ...]  # how scores were averaged, what was published, what is left over in the file


def parse_normalize(mean: str | None, std: str | None) -> Normalize | None:
    """ "0.485,0.456,0.406" and "0.229,0.224,0.225": red, green, blue of images in 0..1. None where neither is given."""
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise UserError("--mean and --std go together: one was given without the other")
    return Normalize(_colour(mean, "--mean", "from 0"), _colour(std, "--std", "above 0"))


def _colour(text: str, option: str, least: str) -> NDArray[np.float32]:
    with suppress(ValueError):
        colour = np.array(text.split(",")).astype(np.float32)
        if len(colour) == 3 and np.all((colour > 0) | (colour == 0) & (least == "from 0")) and np.all(colour <= 1):
            return colour
    raise UserError(f"{option} {text!r}: three numbers {least} to 1 are allowed, as in 0.485,0.456,0.406")


def evaluate_weights(options: EvalOptions) -> Errors:
    """Load weights into a variant's network and evaluate it on the data set's test split.

    On the GPU where there is one, in fp32. One centre crop in the recipe's size, or, with scales, the whole image
    at each of them, and mirrored where the data set allows it. Raises UserError.
    """
    parse_normalize(options.mean, options.std)
    for_scales = {
        "--average": options.average != "logits", "--no-mirror": not options.mirror,
        "--save-probabilities": options.save_probabilities is not None,
    }  # fmt: skip
    for option in [option for option, given in for_scales.items() if given and not options.scales]:
        raise UserError(f"{option} is for --scales, which says at which sizes images are evaluated")
    files = {"--predictions": options.predictions, "--save-probabilities": options.save_probabilities}
    for option, file in files.items():
        if file and not file.expanduser().absolute().parent.is_dir():
            raise UserError(f"{option} {file}: no such folder")
    try:
        uri = is_uri(str(options.weights))
        file = (
            pull_file(options.weights, cache_dir().expanduser().absolute())
            if uri
            else Path(options.weights).expanduser()
        )
        return _evaluate(replace(options, weights=redact(str(options.weights))), file)
    except (ValueError, StorageError) as error:
        raise UserError(str(error)) from None


def _evaluate(options: EvalOptions, weights: Path) -> Errors:
    """`weights` is the file. Raises ValueError or UserError."""
    about, scales = load_metadata(weights), options.scales
    variant = _choose_variant(options, about, weights)
    data_dir = find_data_dir(options.data_dir, options.dataset)
    with blaming("dataset", options.dataset):
        tensors, dataset = load_weights(weights), load_dataset(options.dataset, data_dir)
    network, unused = _load_network(options, variant, tensors, dataset)
    index, test = np.arange(len(dataset.test)), dataset.test  # which images of the whole test set
    if options.limit is not None:
        index = limit(Split(index, test.labels), options.limit).images  # type: ignore[arg-type, assignment]
        test = test.take(index)

    device, recipe = torch.device("cuda" if torch.cuda.is_available() else "cpu"), variant.recipe
    augment = Augment(0, recipe.pad_mode, None, False) if scales else make_augment(recipe, flip=False)
    most = eval_batch_size(test, augment)
    if scales:
        most = max(1, min(EVAL_BATCH_SIZE, MULTI_SCALE_PIXELS // max(scales) ** 2))
    batch_size = min(options.batch_size or most, len(test))
    normalize = parse_normalize(options.mean, options.std) or make_normalize(
        recipe.normalize, _training_images(weights, about, variant, dataset)
    )
    config = LoaderConfig(
        augment=augment, normalize=normalize, batch_size=batch_size, eval_batch_size=batch_size, device=device,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    ranked, scores = list[Tensor](), defaultdict[int, list[Tensor]](list)
    flip = bool(scales) and dataset.flip and options.mirror
    keep = options.save_probabilities is not None
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    evaluated = network if not scales else MultiScale(
        network, scales, flip=flip, average=options.average,  # type: ignore[arg-type]
        on_scale=(lambda scale, batch: scores[scale].append(batch.cpu())) if keep else None,
    )  # fmt: skip
    set_precision("fp32")
    kind = "dataloader" if augment.by_image(test) else "resident"
    with closing(make_evaluation_loader(kind, test, config)) as loader:
        evaluation = evaluate(evaluated, loader, images=len(test), autocast=nullcontext(), on_ranked=ranked.append)
    given = index[SamplingPlan(len(test), batch_size, train=False).draw(0).index]  # the loader's order
    turn = np.argsort(given)
    images, labels = given[turn], dataset.test.labels[given[turn]]
    likeliest = torch.cat(ranked).cpu().numpy()[turn]  # (n, 5), as images and labels in the test set's order
    if options.predictions is not None:
        import pandas as pd

        classes = np.array(dataset.classes)
        top = {f"top{rank}": classes[column] for rank, column in enumerate(likeliest.T, 1)}
        with _writing("--predictions", options.predictions) as path:
            pd.DataFrame({"image": images, "label": classes[labels], **top}).to_csv(path, index=False)
    if options.save_probabilities is not None:
        arrays: Any = {f"scale_{scale}": torch.cat(parts)[turn].numpy() for scale, parts in scores.items()}
        with _writing("--save-probabilities", options.save_probabilities) as path, path.open("wb") as file:
            np.savez(file, image=images, label=labels, **arrays)
    misses = len(test) - int((likeliest == labels[:, None]).sum())
    return Errors(
        of_what=f"{_name(variant)} on {dataset.label}", images=len(test), of=len(dataset.test),
        error=evaluation.error, top5_error=100 * misses / len(test) if dataset.num_classes > 5 else None,
        notes=tuple(_annotate(options, flip, variant, dataset, unused)),
    )  # fmt: skip


def _choose_variant(options: EvalOptions, about: Mapping[str, str], file: Path) -> Variant:
    """The variant that was named, or that the weights name."""
    if (word := options.variant or about.get("variant")) is None:
        raise UserError(f"{options.weights} does not name its variant: --variant does")
    sources = sorted(file.parent.glob("plugins/*/*.py"))
    if word not in VARIANTS and sources:
        files = " ".join(f"--plugin {path}" for path in sources if path.stem == path.parent.name)
        raise UserError(f"{options.weights} is of variant {word!r}, which is of a plug-in: {files}")
    function, named = find_variant(word), "0" if options.variant else about.get("depth", "0")
    variant = function(options.depth or int(named) or default_depth(function))
    smallest, scales = NETWORKS[variant.network.architecture].smallest_image, options.scales
    if scales and min(scales) < smallest:
        raise UserError(f"--scales {min(scales)} is too small for {variant.name}: at least {smallest} pixels")
    trained = variant
    with suppress(KeyError, ValueError):  # of other origin
        trained = find_variant(about["variant"])(int(about["depth"]))
    if trained.network != variant.network:  # its tensors might fit all the same
        raise UserError(f"{options.weights} holds weights of {_name(trained)}, not of {_name(variant)}")
    if options.variant is None and (stored := _find_record(file, about)) is not None:
        spec = RunSpec.from_json(stored.spec)  # as it was trained, with --set
        return replace(variant, network=spec.network, recipe=spec.recipe)
    return variant


def _find_record(weights: Path, about: Mapping[str, str]) -> Record | None:
    """The record beside a run's weights."""
    stored = load_records([weights.parent]).records if "key" in about else []
    return next((each.record for each in stored if each.record.key == about["key"]), None)


def _load_network(
    options: EvalOptions, variant: Variant, tensors: Mapping[str, Tensor], dataset: Dataset
) -> tuple[nn.Module, list[str]]:
    """The network with its weights, and the tensors of the file that belong to no layer of it."""
    size = max(options.scales, default=0) or variant.recipe.crop or dataset.image_size
    with blaming("network", variant.network.architecture):
        network = build(variant.network, dataset.num_classes, size)
    try:
        unused = match_weights(network, tensors)
    except WeightsError as error:
        what = f"{options.weights} into {_name(variant)} for {dataset.num_classes} classes"
        raise UserError(f"{what}: {error}") from None
    if options.pool_window is not None:
        if not isinstance(network, ImageNetResNet):
            raise UserError(f"--pool-window {options.pool_window}: {variant.name} pools over all of its map")
        network.window = options.pool_window
    return network, unused


def _name(variant: Variant) -> str:
    return f"{variant.name}-{variant.network.depth}" if variant.network.depth else variant.name


def _training_images(weights: Path, about: Mapping[str, str], variant: Variant, dataset: Dataset) -> Split:
    """The images over which a run measured its mean; the record beside its weights says what it left out.

    Without one, those the recipe trains on, with validation images drawn by seed 0 if there are enough.
    """
    recipe = variant.recipe if variant.recipe.val < len(dataset.train) else replace(variant.recipe, val=0)
    spec = RunSpec(
        variant=variant.name, network=variant.network, recipe=recipe, dataset=dataset.name,
        fingerprint=dataset.fingerprint, loader="resident", device="cpu",
    )  # fmt: skip
    if (stored := _find_record(weights, about)) is not None:
        known = stored.spec
        recipe = replace(recipe, val=known["recipe"]["val"])
        spec = replace(spec, recipe=recipe, seed=stored.seed, limit_train=known["limit_train"])
    return split_data(spec, dataset).train


@contextmanager
def _writing(option: str, path: Path) -> Iterator[Path]:
    try:
        yield path.expanduser()
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written: {error.strerror or error}") from None


def _annotate(
    options: EvalOptions, flip: bool, variant: Variant, dataset: Dataset, unused: list[str]
) -> Iterator[str]:
    """How scores were averaged, what the variant's source printed, and which tensors of the file were not used."""
    if options.scales:
        what = "" if options.average == "logits" else "probabilities "
        scales = ", ".join(map(str, options.scales))
        yield f"{what}averaged over scales {scales}{', and mirrored' * flip}"
    for entry in load_published():
        if (entry.variant, entry.depth, entry.dataset) == (variant.name, variant.network.depth, dataset.name):
            error = "top-5 error" if entry.error is None else "error"
            other = "" if dataset.original else "; of other images than these: not comparable"
            yield f"published: {error} {entry.number:g} % ({entry.note or entry.source}){other}"
    if unused:
        layers = ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in unused))
        yield f"left over in the file: {len(unused)} tensors of layers that are never called: {layers}"


def print_errors(errors: Errors, console: Console) -> None:
    """Print errors, on how many images of which set, and what there is to know about them."""
    count = f"{errors.images:,}" if errors.images == errors.of else f"{errors.images:,} of {errors.of:,}"
    top5 = "" if errors.top5_error is None else f", top-5 error {errors.top5_error:.2f} %"
    line = f"{errors.of_what}, test set, {count} images: top-1 error {errors.error:.2f} %{top5}"
    say(console, "\n".join((line, *errors.notes)))
