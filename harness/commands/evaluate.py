"""Errors of stored weights on a test set: what `harness eval` does."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from harness.commands.report import write_mistakes
from harness.loaders.cache import cache_dir
from harness.loaders.datasets import Dataset, Split, hold_out, limit, load_dataset
from harness.loaders.loader import make_evaluation_loader
from harness.loaders.sampling import Augment, LoaderConfig, Normalize, SamplingPlan, make_augment, make_normalize
from harness.models.build import build
from harness.models.networks import ImageNetResNet
from harness.models.variants import NETWORKS, VARIANTS, Variant, default_depth, find_variant
from harness.options import EvalOptions
from harness.plan import find_data_dir
from harness.plugins import blaming, kept_files
from harness.results.published import load_published
from harness.results.remote import StorageError, is_uri, pull_file, redact
from harness.results.report.text import fill_template
from harness.spec import RunSpec, UserError, at_home, mistakes, refuse
from harness.training.evaluation import MultiScale, evaluate
from harness.training.setup import EVAL_BATCH_SIZE, eval_batch_size, split_data
from harness.training.step import set_precision
from harness.training.weights import WeightsError, load_metadata, load_weights, match_weights

MULTI_SCALE_PIXELS = EVAL_BATCH_SIZE * 32 * 32  # in a batch, so that memory does not grow with the scale


class Errors(NamedTuple):
    """Errors in percent over `images` of the `of` images of a test set."""

    error: float
    top5_error: float | None  # None for five classes or fewer
    images: int
    of: int
    text: str  # with how scores were averaged, what was published, what is left over in the file


def parse_normalize(mean: str | None, std: str | None) -> Normalize | None:
    """ "0.485,0.456,0.406" and "0.229,0.224,0.225": red, green, blue of images in 0..1. None where neither is given."""
    if (mean is None) != (std is None):
        raise UserError("--mean and --std go together: one was given without the other")
    if mean is None or std is None:
        return None
    return Normalize(_colour(mean, "--mean", "from 0"), _colour(std, "--std", "above 0"))


def _colour(text: str, option: str, least: str) -> NDArray[np.float32]:
    with suppress(ValueError):
        colour = np.array(text.split(",")).astype(np.float32)
        if len(colour) == 3 and np.all((colour > 0) | (colour == 0) & (least == "from 0")) and np.all(colour <= 1):
            return colour
    raise UserError(f"{option} {text!r}: expected three numbers {least} to 1, as in 0.485,0.456,0.406")


def evaluate_weights(options: EvalOptions) -> Errors:
    """Load weights into a variant's network and evaluate it on the data set's test split.

    On the GPU where there is one, in fp32. One centre crop in the recipe's size, or, with scales, the whole image
    at each of them, and mirrored where the data set allows it. Raises UserError.
    """
    for_scales = {
        "--average": options.average != "logits", "--no-mirror": not options.mirror,
        "--save-probabilities": options.save_probabilities is not None,
    }  # fmt: skip
    files = {"--predictions": options.predictions, "--save-probabilities": options.save_probabilities}
    refuse({
        **{f"{option} is for --scales, which says at which sizes images are evaluated": given and not options.scales
           for option, given in for_scales.items()},
        **{f"{option} {path}: no such folder": path and not path.absolute().parent.is_dir()
           for option, path in files.items()},
    })  # fmt: skip
    with mistakes((ValueError, StorageError)):
        file = at_home(options.weights)
        if is_uri(str(options.weights)):
            file = pull_file(options.weights, cache_dir())
        return _evaluate(replace(options, weights=redact(str(options.weights))), file)


def _evaluate(options: EvalOptions, weights: Path) -> Errors:
    """`weights` is the file. Raises ValueError or UserError."""
    scales, given = options.scales, parse_normalize(options.mean, options.std)
    tensors, about = load_weights(weights), load_metadata(weights)
    variant, trained = _choose_variant(options, about, weights)
    name = options.dataset or (trained.dataset if trained else "cifar10")
    with blaming("dataset", name):
        dataset = load_dataset(name, find_data_dir(options.data_dir, name))
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
    train = dataset.train  # the mean is of what was trained on, or would be, if there are enough
    other = trained is not None and trained.fingerprint != dataset.fingerprint
    if trained is not None and not other:
        train = split_data(replace(trained, limit_test=None), dataset).train
    elif 0 < recipe.val < len(train):
        train, _ = hold_out(train, recipe.val, 0, stratified=recipe.val_stratified)
    normalize = given or make_normalize(recipe.normalize, train)
    config = LoaderConfig(
        augment=augment, normalize=normalize, batch_size=batch_size, eval_batch_size=batch_size, device=device,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    ranked, scores = list[Tensor](), defaultdict[int, list[Tensor]](list)
    flip = bool(scales) and dataset.flip and options.mirror
    keep = options.save_probabilities is not None
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    forward = None if not scales else MultiScale(
        network, scales, flip=flip, average=options.average,  # type: ignore[arg-type]
        on_scale=(lambda scale, batch: scores[scale].append(batch.cpu())) if keep else None,
    )  # fmt: skip
    set_precision("fp32")
    kind = "dataloader" if augment.by_image(test) else "resident"
    with closing(make_evaluation_loader(kind, test, config)) as loader:
        evaluation = evaluate(network, loader, images=len(test), forward=forward, on_ranked=ranked.append)
    order = index[SamplingPlan(len(test), batch_size, train=False).draw(0).index]  # the loader's
    turn = np.argsort(order)
    images, labels = order[turn], dataset.test.labels[order[turn]]
    likeliest = torch.cat(ranked).cpu().numpy()[turn]  # (n, 5), as images and labels in the test set's order
    if (path := options.predictions) is not None:
        classes, top = np.array(dataset.classes), [f"top{rank}" for rank in range(1, likeliest.shape[1] + 1)]
        rows = zip(images, classes[labels], *classes[likeliest.T], strict=True)
        with write_mistakes(f"--predictions {path}"), path.open("w", newline="", encoding="utf-8") as table:
            csv.writer(table, lineterminator="\n").writerows([("image", "label", *top), *rows])
    if (path := options.save_probabilities) is not None:
        arrays: Any = {f"scale_{scale}": torch.cat(parts)[turn].numpy() for scale, parts in scores.items()}
        with write_mistakes(f"--save-probabilities {path}"), path.open("wb") as file:
            np.savez(file, image=images, label=labels, **arrays)
    misses = len(test) - int((likeliest == labels[:, None]).sum())
    top5_error = 100 * misses / len(test) if dataset.num_classes > 5 else None
    network_of = (variant.name, variant.network.depth, dataset.name)
    text = fill_template(
        "eval.txt.j2", name=_name(variant), dataset=dataset, trained=trained if other else None, options=options, flip=flip, images=len(test),
        error=evaluation.error, top5_error=top5_error, unused=unused,
        layers=dict.fromkeys(name.rpartition(".")[0] for name in unused),
        published=[entry for entry in load_published() if (entry.variant, entry.depth, entry.dataset) == network_of],
    )  # fmt: skip
    return Errors(evaluation.error, top5_error, len(test), len(dataset.test), text)


def _choose_variant(options: EvalOptions, about: Mapping[str, str], file: Path) -> tuple[Variant, RunSpec | None]:
    """The variant that was named, or that the weights name; the run that trained them."""
    if (word := options.variant or about.get("variant")) is None:
        raise UserError(f"{options.weights} does not name its variant: --variant does")
    if word not in VARIANTS and (kept := kept_files(file.parent)):
        files = " ".join(f"--plugin {path}" for path in kept)
        raise UserError(f"{options.weights} is of variant {word!r}, which is of a plug-in: {files}")
    function, named = find_variant(word), "0" if options.variant else about.get("depth", "0")
    variant = function(options.depth or int(named) or default_depth(function))
    smallest, scales = NETWORKS[variant.network.architecture].smallest_image, options.scales
    if scales and min(scales) < smallest:
        raise UserError(f"--scales {min(scales)} is too small for {variant.name}: at least {smallest} pixels")
    held = variant
    with suppress(KeyError, ValueError):  # of other origin
        held = find_variant(about["variant"])(int(about["depth"]))
    if held.network != variant.network:  # its tensors might fit all the same
        raise UserError(f"{options.weights} holds weights of {_name(held)}, not of {_name(variant)}")
    trained = RunSpec.from_json(json.loads(about["spec"])) if "spec" in about else None
    if trained is not None and trained.variant == variant.name and trained.network.depth == variant.network.depth:
        variant = replace(variant, network=trained.network, recipe=trained.recipe)  # with --set
    return variant, trained


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
    return f"{variant.name}{f'-{variant.network.depth}' * bool(variant.network.depth)}"
