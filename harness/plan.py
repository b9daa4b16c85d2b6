"""Grid -> list[RunSpec]: every check of what a user typed, and which runs are still missing. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from harness.cluster.job import Allocation
from harness.loaders.cache import cache_dir
from harness.loaders.datasets import DataError, Dataset, check_dataset_name
from harness.loaders.loader import check_crops
from harness.loaders.sampling import check_normalize, make_augment
from harness.models.variants import NETWORKS, Recipe, Variant, default_depth, find_preset, find_variant
from harness.options import Grid, fill, parse_depths
from harness.plugins import identify, own_values
from harness.results.remote import StorageError, cache_folder, check_uri, is_uri, pull_results
from harness.results.sweeps import format_value
from harness.search_space import apply, check_settings
from harness.spec import Engine, RunSpec, UserError, at_home, mistakes, refuse
from harness.training.recipe import CAPTURABLE, total_epochs

GPU_PRECISIONS = ("tf32", "fp16")
_on_gpu = GPU_PRECISIONS.__contains__
SHARED = ("dataset", "loader", "precision", "engine", "deterministic", "limit_train", "limit_test")  # with RunSpec
ANY_IMAGES = ""  # as a given run's fingerprint: those of the data set that is named
MOST_EPOCHS = 1000  # of a recipe in steps


def make_grid(given: Mapping[str, Any]) -> Grid:
    """The runs that options name: variants × depths × seeds, a preset's, or stored ones as changed by other options.

    Values, or words as on the command line; `runs` are groups of them, each on top of the others. Raises UserError.
    """
    if groups := given.get("runs"):
        shared = {name: value for name, value in given.items() if name != "runs"}
        grids = tuple(make_grid(merge(shared, group)) for group in groups)
        specs = tuple(spec for grid in grids for spec in grid.specs)
        _check_one_dataset("", (grid.dataset for grid in grids))
        precision = max((grid.precision for grid in grids), key=_on_gpu)
        return replace(grids[0], groups=grids, specs=specs, precision=precision)
    both = "--spec and --{} cannot be combined: the file names the network"
    refuse({both.format(name): {"specs", name} <= given.keys() for name in ("preset", "variants", "depths")})
    if isinstance(words := given.get("depths"), str | int):
        variants = fill(Grid, {"variants": given.get("variants")}).variants
        with mistakes(UserError, f"--depths {words!r}: "):
            given = {**given, "depths": parse_depths(str(words), variants)}
    grid = fill(Grid, given)
    if "preset" in given:
        with mistakes(ValueError, "--preset: "):
            preset = find_preset(given["preset"])
            networks = preset.select(grid.variants if "variants" in given else (), grid.depths)
        grid = replace(grid, networks=networks, dataset=grid.dataset if "dataset" in given else preset.dataset)
    return _change_specs(grid, given) if grid.specs else grid


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name: those above win; of tables (`settings`), field by field."""
    tables = [n for n, v in above.items() if isinstance(v, Mapping) and isinstance(below.get(n), Mapping)]
    return {**below, **above, **{n: {**below[n], **above[n]} for n in tables}}


def check_grid(grid: Grid) -> None:
    """Every check that needs neither data nor devices."""
    for group in grid.groups:
        check_grid(group)
    refuse({f"--{n} is empty: at least one is required": not getattr(grid, n) for n in ("seeds", "variants")})
    twice = [n for n in ("batch_size", "batch_norm") if getattr(grid, n) is not None and n in grid.settings]
    refuse({f"{n} is given twice: leave --{n.replace('_', '-')} or --set {n}=... out": True for n in twice})
    with mistakes((DataError, ValueError)):
        check_dataset_name(grid.dataset)
        for name, depth in () if grid.specs else grid_networks(grid):
            find_variant(name)(depth)


def find_data_dir(chosen: Path | None, dataset: str) -> Path | None:
    """The folder of a data set's images, absolute: the chosen one, or HARNESS_DATA_DIR where the data set takes one."""
    variable = None if dataset == "digits" or ":" in dataset else os.environ.get("HARNESS_DATA_DIR")
    folder = chosen or variable
    return None if folder is None else at_home(folder).absolute()


def grid_networks(grid: Grid) -> list[tuple[str, int]]:
    """Variant and depth of every row; --depths is for those that have depths. Raises ValueError for an unknown variant."""
    if grid.networks:
        return list(grid.networks)
    own = {name: default_depth(find_variant(name)) for name in grid.variants}
    return [(name, depth) for name, n in own.items() for depth in (grid.depths if n else ()) or (n,)]


def choose_engine(engine: str | None, device: str, optimizer: str = "sgd") -> Engine:
    """The chosen engine, or else the fastest one that computes the same as eager, kernel by kernel."""
    captured = device == "cuda" and optimizer in CAPTURABLE
    refuse({
        "engine graph needs a GPU; the CPU supports --engine eager and compile": engine == "graph" and device == "cpu",
        f"--engine {engine}: optimizer {optimizer} cannot be captured as a CUDA graph, because its plug-in "
        "does not say capturable=True; use eager": device == "cuda" and engine in ("graph", "compile") and not captured,
    })  # fmt: skip
    return engine or ("graph" if captured else "eager")  # type: ignore[return-value]


def override(recipe: Recipe, grid: Grid) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with the grid's epochs, batch size and validation images, and what that changed.

    Another number of epochs stretches the whole schedule: drops and warm-up keep their share of the run.
    """
    changed: dict[str, Any] = {}
    if grid.epochs is not None and not (recipe.unit == "epoch" and recipe.duration == grid.epochs):
        changed["epochs"] = grid.epochs
        factor = grid.epochs / recipe.duration
        milestones, warmup = tuple(m * factor for m in recipe.milestones), recipe.warmup * factor
        recipe = replace(recipe, duration=grid.epochs, unit="epoch", milestones=milestones, warmup=warmup)
    asked = {"batch_size": grid.batch_size, "batch_norm": grid.batch_norm, "val": grid.val}
    own: dict[str, Any] = {name: n for name, n in asked.items() if n is not None and n != getattr(recipe, name)}
    return replace(recipe, **own), tuple(f"{name}={n}" for name, n in (changed | own).items())


def expand(grid: Grid, allocation: Allocation, *, fingerprint: str, train_images: int) -> list[RunSpec]:
    """Every run of a grid, each once; seeds outermost, so that a table over all depths and variants is there early."""
    specs, workers = list[RunSpec](), allocation.workers
    for each in grid.groups or (grid,):
        own = [_place(spec, allocation, fingerprint) for spec in each.specs or make_specs(each)]
        check_settings(each.settings, own)
        specs += own
    for spec in specs:
        images, batch, val = spec.limit_train or train_images, spec.recipe.batch_size, spec.recipe.val
        divisors = ", ".join(str(n) for n in range(1, 65) if batch % n == 0)
        refuse({
            f"batch_size={batch}: at least 1 is required": batch < 1,
            f"batch_size={batch}: {grid.dataset} has {train_images} training images":
                batch > train_images and f"batch_size={batch}" in spec.overrides,
            f"--limit-train {images}: {grid.dataset} has {train_images} training images": images > train_images,
            f"--workers {workers} does not divide the global batch of {batch} (allowed: {divisors})": batch % workers,
            "--engine compile does not support --batch-norm sync: use eager or graph":
                spec.recipe.batch_norm == "sync" and spec.engine == "compile",
            f"{spec.name} would hold out {val:,} training images, but there are only {images:,}: hold out fewer, "
            f"as with --val {max(1, images // 10)}": val >= images,
        })  # fmt: skip
        _check_last_batch(spec, images - val)
    return list(dict.fromkeys(specs))


def _check_last_batch(spec: RunSpec, images: int) -> None:
    """Raise UserError where a worker would train on one image alone: batch norm of a row of logits takes two at least."""
    batch, alone = spec.recipe.batch_size, spec.workers == 1 or spec.recipe.batch_norm == "local"
    least = 2 * spec.workers if spec.network.head_batch_norm and alone else 0

    def fits(size: int) -> bool:
        return not size % spec.workers and all(n == 0 or n >= least for n in (size, images % size))

    if not fits(batch):
        others = [n for step in range(1, batch) for n in (batch - step, batch + step) if fits(n)][:3]
        raise UserError(
            f"{spec.name} normalises logits over each worker's images: a batch needs at least {least}, and the last of "
            f"{images:,} images in batches of {batch} has {images % batch or batch} "
            f"(possible as --batch-size: {', '.join(map(str, others)) or 'none'})"
        )


def make_specs(grid: Grid) -> list[RunSpec]:
    """The runs of variants, depths and seeds, not placed yet."""
    variants = [(name, find_variant(name)(depth)) for name, depth in grid_networks(grid)]
    named: dict[str, Any] = {"dataset": grid.dataset, "loader": grid.loader, "fingerprint": ANY_IMAGES}
    specs = [RunSpec(variant=n, network=v.network, recipe=v.recipe, device="cpu", **named) for n, v in variants]
    return _vary(specs, grid, (*SHARED, "seeds"))


def _vary(specs: Iterable[RunSpec], grid: Grid, given: Collection[str]) -> list[RunSpec]:
    """The runs with a grid's settings, epochs, batch size, batch norm and validation images, and those of its other fields
    that are given. Seeds outermost."""
    fixed: dict[str, Any] = {name: getattr(grid, name) for name in SHARED if name in given}
    fixed |= {"fingerprint": ANY_IMAGES} if "dataset" in given else {}
    varied = []
    for before in specs:
        spec, settings = apply(before, grid.settings)
        recipe, changed = override(spec.recipe, grid)
        names = {text.partition("=")[0] for text in settings + changed}
        kept = tuple(text for text in spec.overrides if text.partition("=")[0] not in names)
        made = replace(spec, recipe=recipe, overrides=kept + settings + changed, **fixed)
        varied.append(_restate(made) if kept != before.overrides or (kept and settings + changed) else made)
    return [replace(spec, seed=seed) for seed in grid.seeds for spec in varied] if "seeds" in given else varied


def _restate(spec: RunSpec) -> RunSpec:
    """A changed run as the command would give it that names all changes at once: in its order, without what is the
    variant's own again."""

    def values(of: RunSpec | Variant) -> dict[str, Any]:
        parts = [asdict(part) | own_values(part) for part in (of.recipe, of.network)]
        return parts[0] | parts[1] | {"epochs": (of.recipe.duration, of.recipe.unit)}

    try:
        own = find_variant(spec.variant)(spec.network.depth)
    except ValueError:  # of a plug-in that is not here, or of a depth that it cannot have
        return spec
    now, before = values(spec), values(own)
    rank = {name: place for place, name in enumerate((*now, "batch_size", "batch_norm", "val"))}
    texts = {text.partition("=")[0]: text for text in spec.overrides}
    left = sorted(
        (name for name in texts if now.get(name) != before.get(name)), key=lambda name: rank.get(name, -1)
    )
    recipe = own.recipe if own.recipe == spec.recipe else spec.recipe  # 90 epochs, not 90.0
    return replace(spec, recipe=recipe, overrides=tuple(texts[name] for name in left))


def _place(spec: RunSpec, allocation: Allocation, fingerprint: str) -> RunSpec:
    """A given run on these devices and images. Raises UserError where they are not the images it names."""
    if spec.fingerprint not in (ANY_IMAGES, fingerprint):
        raise UserError(
            f"--spec: {spec.title} is for other images of {spec.dataset} than those here (fingerprint "
            f"{spec.fingerprint[:12]}, not {fingerprint[:12]}); --data-dir names theirs, --dataset takes these"
        )
    engine = choose_engine(spec.engine, allocation.device, spec.recipe.optimizer)
    placed: dict[str, Any] = {"device": allocation.device, "workers": allocation.workers, "engine": engine}
    return identify(replace(spec, fingerprint=fingerprint, **placed))


def _change_specs(grid: Grid, given: Collection[str]) -> Grid:
    """The stored runs of a grid, changed by those of its other fields that are given."""
    dataset = _check_one_dataset(
        "--spec: ", [grid.dataset] if "dataset" in given else [s.dataset for s in grid.specs]
    )
    specs = tuple(_vary(grid.specs, grid, given))
    precision = max((spec.precision for spec in specs), key=_on_gpu)
    return replace(grid, dataset=dataset, precision=precision, specs=specs)


def _check_one_dataset(what: str, names: Iterable[str]) -> str:
    """The data set that all of these are. Raises UserError where they differ."""
    names = tuple(dict.fromkeys(names))
    if len(names) > 1:
        raise UserError(
            f"{what}runs on {' and on '.join(names)}; a command trains on one data set: name it by --dataset"
        )
    return names[0]


def check_images(specs: Iterable[RunSpec], dataset: Dataset) -> None:
    """Raise UserError where a run's loader cannot make its recipe's crops of these images, or its network take them."""
    for spec in specs:
        augment = make_augment(spec.recipe, flip=dataset.flip)
        smallest = NETWORKS[spec.network.architecture].smallest_image
        with mistakes((UserError, ValueError), f"{spec.name} on {dataset.label}: "):
            _check_recipe(spec)
            for split in (dataset.train, dataset.test):
                check_crops(spec.loader, split, augment, spec.recipe.normalize)
            check_normalize(spec.recipe.normalize, dataset.train, augment)
            size, count = min(augment.crop_size(dataset.train)), len(dataset.test)
            refuse({
                f"{dataset.num_classes} classes are too few: at least 2": dataset.num_classes < 2,
                f"images of {size} pixels are too small for this network: at least {smallest}": size < smallest,
                f"--limit-test {spec.limit_test}: there are {count} test images": (spec.limit_test or 0) > count,
            })  # fmt: skip


def _check_recipe(spec: RunSpec) -> None:
    """Raise UserError for values that torch would refuse, or that no schedule or loader can count with."""
    recipe, network = spec.recipe, spec.network
    scales, own = recipe.scale_range, own_values(recipe) if recipe.optimizer == "adamw" else {}
    refuse({
        f"momentum={recipe.momentum:g}: 0 to 1 is allowed": recipe.optimizer == "sgd" and recipe.momentum > 1,
        "nesterov=true: a momentum above 0 is required": recipe.nesterov and not recipe.momentum,
        f"label_smoothing={recipe.label_smoothing:g}: 0 to 1 is allowed": recipe.label_smoothing > 1,
        f"batch_norm_eps={network.batch_norm_eps:g}: above 0 is required": network.batch_norm_eps <= 0,
        f"cardinality={network.cardinality}: at least 1 is required": network.cardinality < 1,
        f"scale_range={format_value(scales)}: two rising sides in pixels are allowed":
            scales and not (len(scales) == 2 and 0 < scales[0] <= scales[1]),
        f"warmup={recipe.warmup:g} with first_step: less than all {recipe.duration:g} {recipe.unit}s is allowed":
            recipe.first_step and recipe.warmup >= recipe.duration and recipe.schedule != "multistep",
        f"eps={own.get('eps', 0):g}: at least 0 is required": own.get("eps", 0) < 0,
        **{f"{name}={value:g}: 0 to below 1 is allowed": not 0 <= value < 1 for name, value in own.items()
           if name.startswith("beta")},
    })  # fmt: skip


def count_epochs(spec: RunSpec, train_images: int) -> int:
    """Epochs of the whole run."""
    images = (spec.limit_train or train_images) - spec.recipe.val
    return total_epochs(spec.recipe, -(-images // spec.recipe.batch_size))


def check_epochs(specs: Iterable[RunSpec], train_images: int) -> None:
    """Raise UserError where a recipe in steps, made for a larger set, is thousands of epochs of this one."""
    for spec in specs:
        if spec.recipe.unit == "step" and (epochs := count_epochs(spec, train_images)) > MOST_EPOCHS:
            raise UserError(
                f"the {spec.recipe.duration:,} steps of {spec.name}'s recipe amount to {epochs:,} epochs of {spec.dataset}"
                f"{' with --limit-train' * bool(spec.limit_train)}: choose with --epochs, as in --epochs 15"
            )


def fallback_world_sizes(elastic: int | None, specs: Sequence[RunSpec]) -> tuple[int, ...]:
    """The world sizes below --workers, largest first, at which runs may continue where a cluster has lost nodes: at least
    `elastic`, with an equal share of every spec's global batch for each rank. Raises UserError where there is none."""
    if elastic is None or not specs:
        return ()
    workers, batches = specs[0].workers, sorted({spec.recipe.batch_size for spec in specs})
    sizes = [n for n in range(workers - 1, 0, -1) if not any(batch % n for batch in batches)]
    allowed = tuple(n for n in sizes if n >= elastic)
    refuse({
        f"--elastic {elastic}: expected a number from 1 to {workers}, the number of --workers": not 1 <= elastic <= workers,
        f"--elastic {elastic}: no width from {elastic} to {workers - 1} divides the global batch of "
        f"{' and '.join(map(str, batches))} (allowed: {', '.join(map(str, sizes))})": not allowed and elastic < workers,
    })  # fmt: skip
    return allowed


def pending(specs: Iterable[RunSpec], finished: Collection[str]) -> list[RunSpec]:
    """The runs whose key is not among the finished ones."""
    return [spec for spec in specs if spec.key not in finished]


def open_out(out: str, *, write: bool, also: str = "") -> tuple[Path, str]:
    """--out as a local folder and, for a URI, the URI, whose records are copied into the folder; files of runs, too, whose
    names begin with `also`. Raises UserError where that fails and, with `write`, unless results can be written there."""
    remote = is_uri(out)
    folder = cache_folder(out, cache_dir()) if remote else at_home(out)
    refuse({
        f"{out!r} is no URI: two slashes are needed, as in s3://bucket/runs":
            not remote and re.match("[A-Za-z][A-Za-z0-9+.-]+:/", out),
        f"{out!r} is a file; expected a folder of results or of a run": not write and folder.is_file(),
    })  # fmt: skip
    if write:
        folder = check_out(folder)
    with mistakes(StorageError, "--out " * write):
        if remote and write:
            check_uri(out)
        if remote:
            pull_results(out, folder, also=also)
    return folder, out if remote else ""


def check_out(out: Path) -> Path:
    """Make the folder for results; raise UserError unless it can be written to."""
    out = out.absolute()
    with mistakes(OSError, f"--out {out} cannot be written to: "):
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".write-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    return out
