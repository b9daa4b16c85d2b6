"""Grid -> list[RunSpec]: every check of what a user typed, and which runs are still missing. Imports no torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from harness.cluster.job import Allocation
from harness.models.presets import find_preset
from harness.models.variants import VARIANTS, Recipe, Variant, default_depth, find_variant
from harness.search_space import apply
from harness.spec import Engine, Precision, RunSpec, UserError, check_word

Value = TypeVar("Value")
LOADERS = ("dali", "resident", "dataloader", "synthetic")
PRECISIONS: tuple[str, ...] = get_args(Precision)
ENGINES: tuple[str, ...] = get_args(Engine)
BATCH_NORMS = ("local", "sync")
GPU_PRECISIONS = ("tf32", "fp16")
ANY_IMAGES = ""  # as a given run's fingerprint: those of the data set that is named
MOST_EPOCHS = 1000  # of a recipe in steps
MOST_NUMBERS = 1000  # in a list of seeds


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """The runs a user asked for."""

    variants: tuple[str, ...]
    depths: tuple[int, ...] = ()  # none: each variant's default
    networks: tuple[tuple[str, int], ...] = ()  # variants and depths, in place of variants × depths: a preset's
    seeds: tuple[int, ...] = (0,)
    dataset: str = "cifar10"
    loader: str = "dali"
    precision: str = "fp32"
    engine: str | None = None  # None: graph on a GPU, eager on a CPU
    deterministic: bool = False
    epochs: int | None = None
    batch_size: int | None = None
    batch_norm: str | None = None  # local or sync
    val: int | None = None
    limit_train: int | None = None
    limit_test: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # fields of recipe and network, by name
    specs: tuple[RunSpec, ...] = ()  # these runs, in place of variants × depths × seeds: `make_spec_grid`


def fill(kind: type[Value], values: Mapping[str, Any]) -> Value:
    """A dataclass from the values that are named as its fields are."""
    return kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})  # type: ignore[arg-type]


def parse_words(text: str | None, what: str) -> tuple[str, ...]:
    """ "a,b" -> ("a", "b"), each once; none of an option that was not given."""
    if text is None:
        return ()
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UserError(f"{what} {text!r}: a list with commas and no empty places is allowed, as in a,b")
    return tuple(dict.fromkeys(words))


def parse_variants(text: str) -> tuple[str, ...]:
    """ "msra,he2015" -> ("msra", "he2015"); "all": every one."""
    return tuple(VARIANTS) if text.strip() == "all" else parse_words(text, "--variants")


def parse_depths(text: str | None, variants: Sequence[str] = ()) -> tuple[int, ...]:
    """ "20,32" -> (20, 32); "20..32" -> those from 20 to 32 that all the variants allow, of which each has its own."""

    def legal(depth: int) -> bool:
        try:
            return all(find_variant(name)(depth) for name in variants)
        except ValueError:
            return False

    depths: list[int] = []
    for word in parse_words(text, "--depths"):
        numbers = _numbers(word, "--depths", str(text))
        chosen = [n for n in numbers if legal(n)] if len(numbers) > 1 else numbers
        if not chosen:
            raise UserError(
                f"--depths {word}: no depth from {numbers[0]} to {numbers[-1]} is one of {', '.join(variants)}"
            )
        depths += chosen
    return tuple(dict.fromkeys(depths))


def parse_seeds(text: str) -> tuple[int, ...]:
    """ "3" -> (0, 1, 2), a count; "0,7" -> (0, 7), the seeds themselves; "7," -> (7,); "3..5" -> (3, 4, 5)."""
    if "," not in text and ".." not in text:
        count = _whole(text, "--seeds", text)
        if not 1 <= count <= MOST_NUMBERS:
            raise UserError(f"--seeds {text}: a count from 1 to 1000 is allowed, or a list of seeds as in 0,7")
        return tuple(range(count))
    words = parse_words(text.rstrip(","), "--seeds")
    return tuple(dict.fromkeys(seed for word in words for seed in _numbers(word, "--seeds", text)))


def _numbers(word: str, option: str, text: str) -> list[int]:
    """ "7" -> [7]; "3..5" -> [3, 4, 5]."""
    first, dots, last = word.partition("..")
    low = _whole(first, option, text)
    high = _whole(last, option, text) if dots else low
    if not low <= high < low + MOST_NUMBERS:
        raise UserError(
            f"{option} {word}: a range of at most 1000 numbers, the lowest first, is allowed, as in 20..56"
        )
    return list(range(low, high + 1))


def _whole(word: str, option: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", word.strip()):
        raise UserError(f"{option} {text!r}: {word!r} is not a whole number")
    return int(word)


def check_count(value: int | None, option: str, *, least: int = 1) -> None:
    """Raise UserError unless `value` is None or at least `least`."""
    if value is not None and value < least:
        raise UserError(f"{option} {value}: at least {least} is allowed")


def check_grid(grid: Grid) -> None:
    """Every check that needs neither data nor devices."""
    from harness.loaders.datasets import DataError, check_dataset_name

    check_word(grid.loader, LOADERS, "--loader")
    check_word(grid.precision, PRECISIONS, "--precision")
    if grid.engine is not None:
        check_word(grid.engine, ENGINES, "--engine")
    for name in ("epochs", "batch_size", "limit_train", "limit_test"):
        check_count(getattr(grid, name), f"--{name.replace('_', '-')}")
    if grid.batch_norm is not None:
        check_word(grid.batch_norm, BATCH_NORMS, "--batch-norm")
    for name in ("batch_size", "batch_norm"):
        if getattr(grid, name) is not None and name in grid.settings:
            option = name.replace("_", "-")
            raise UserError(f"{name} is given twice: leave --{option} or --set {name}=... out")
    check_count(grid.val, "--val", least=0)
    try:
        check_dataset_name(grid.dataset)
        for name, depth in () if grid.specs else grid_networks(grid):
            find_variant(name)(depth)
    except (DataError, ValueError) as error:
        raise UserError(str(error)) from None


def grid_networks(grid: Grid) -> list[tuple[str, int]]:
    """Variant and depth of every row. Raises ValueError for an unknown variant."""
    every = (
        (name, depth) for name in grid.variants for depth in grid.depths or (default_depth(find_variant(name)),)
    )
    return list(grid.networks or every)


def apply_preset(name: str, values: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    """The preset's networks and data set, but for what a user chose: `given`. Raises UserError."""
    if "spec" in given:
        raise UserError("--preset and --spec exclude each other: each names the runs")
    try:
        preset = find_preset(name)
        chosen = (values[option] if option in given else () for option in ("variants", "depths"))
        networks = preset.select(*chosen)
    except ValueError as error:
        raise UserError(f"--preset: {error}") from None
    return {"networks": networks, "dataset": values["dataset"] if "dataset" in given else preset.dataset}


def choose_engine(engine: str | None, device: str) -> Engine:
    """The chosen engine, or else the fastest one that computes the same as eager, kernel by kernel."""
    if engine == "graph" and device == "cpu":
        raise UserError("--engine graph needs a GPU; on the CPU eager and compile are allowed")
    return engine or ("graph" if device == "cuda" else "eager")  # type: ignore[return-value]


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
    if grid.specs:
        specs = [_place(spec, allocation, fingerprint) for spec in grid.specs]
    else:
        specs = [
            _make_spec(grid, name, depth, seed, allocation, fingerprint)
            for seed in grid.seeds
            for name, depth in grid_networks(grid)
        ]
    for spec in specs:
        if spec.limit_train is not None and spec.limit_train > train_images:
            raise UserError(f"--limit-train {spec.limit_train}: {grid.dataset} has {train_images} training images")
        check_batch(spec.recipe, allocation.workers)
        if spec.recipe.batch_norm == "sync" and spec.engine == "compile":
            raise UserError(
                "--engine compile cannot synchronise batch norm; with --batch-norm sync eager and graph are allowed"
            )
        images = spec.limit_train or train_images
        if spec.recipe.val >= images:
            raise UserError(
                f"{spec.name} holds out {spec.recipe.val:,} training images, and here are {images:,}: give a number "
                f"that leaves some to train on, as --val {max(1, images // 10)}"
            )
    return list(dict.fromkeys(specs))


def _make_spec(grid: Grid, name: str, depth: int, seed: int, allocation: Allocation, fingerprint: str) -> RunSpec:
    variant, settings = apply(find_variant(name)(depth), grid.settings)
    recipe, changed = override(variant.recipe, grid)
    return RunSpec(
        variant=name,
        network=variant.network,
        recipe=recipe,
        overrides=settings + changed,
        dataset=grid.dataset,
        fingerprint=fingerprint,
        limit_train=grid.limit_train,
        limit_test=grid.limit_test,
        loader=grid.loader,
        precision=grid.precision,  # type: ignore[arg-type]
        engine=choose_engine(grid.engine, allocation.device),
        deterministic=grid.deterministic,
        device=allocation.device,
        workers=allocation.workers,
        seed=seed,
    )


def _place(spec: RunSpec, allocation: Allocation, fingerprint: str) -> RunSpec:
    """A given run on these devices and images. Raises UserError where they are not the images it names."""
    if spec.fingerprint not in (ANY_IMAGES, fingerprint):
        raise UserError(
            f"--spec: {spec.title} is for other images of {spec.dataset} than those here (fingerprint "
            f"{spec.fingerprint[:12]}, not {fingerprint[:12]}); --data-dir names theirs, --dataset takes these"
        )
    engine = choose_engine(spec.engine, allocation.device)
    return replace(
        spec, fingerprint=fingerprint, device=allocation.device, workers=allocation.workers, engine=engine
    )


def load_spec(path: Path) -> RunSpec:
    """The run of a record.json or spec.json. Raises UserError where the file holds none."""
    try:
        values = json.loads(path.read_bytes())
        return RunSpec.from_json(values["spec"] if isinstance(values, dict) and "spec" in values else values)
    except OSError as error:
        raise UserError(f"--spec {path}: {error.strerror or error}") from None
    except ValueError as error:  # of JSON too
        raise UserError(f"--spec {path} holds no run's specification: {error}") from None


def make_spec_grid(paths: Sequence[Path], grid: Grid, given: Collection[str]) -> Grid:
    """The runs of some files, changed by those fields of `grid` that the user chose: `given`, and all without default.

    Raises UserError for a file that cannot be read and for options that contradict it.
    """
    for option in ("variants", "depths"):
        if option in given:
            raise UserError(f"--spec and --{option} exclude each other: the file names the network")
    read = [load_spec(path) for path in paths]
    datasets = list(dict.fromkeys([grid.dataset] if "dataset" in given else [spec.dataset for spec in read]))
    if len(datasets) > 1:
        raise UserError(f"--spec: runs on {' and on '.join(datasets)}; a command trains on one data set")
    fixed = {name: getattr(grid, name) for name in ("loader", "precision", "dataset") if name in given}
    fixed |= {
        name: value
        for name in ("engine", "limit_train", "limit_test", "deterministic")
        if (value := getattr(grid, name))
    }
    fixed |= {"fingerprint": ANY_IMAGES} if "dataset" in given else {}
    changed = [replace(_override_spec(spec, grid), **fixed) for spec in read]
    seeds = grid.seeds if "seeds" in given else ()
    specs = [replace(spec, seed=seed) for seed in seeds for spec in changed] or changed
    precision = max((spec.precision for spec in specs), key=lambda p: p in GPU_PRECISIONS)
    return replace(grid, dataset=datasets[0], precision=precision, specs=tuple(specs))


def _override_spec(spec: RunSpec, grid: Grid) -> RunSpec:
    variant = Variant(name=spec.variant, network=spec.network, recipe=spec.recipe, summary="", source="")
    variant, settings = apply(variant, grid.settings)
    recipe, changed = override(variant.recipe, grid)
    names = {text.partition("=")[0] for text in settings + changed}
    kept = tuple(text for text in spec.overrides if text.partition("=")[0] not in names)
    return replace(spec, network=variant.network, recipe=recipe, overrides=kept + settings + changed)


def count_epochs(spec: RunSpec, train_images: int) -> int:
    """Epochs of the whole run."""
    from harness.training.optim import total_epochs

    images = (spec.limit_train or train_images) - spec.recipe.val
    return total_epochs(spec.recipe, -(-images // spec.recipe.batch_size))


def check_epochs(specs: Iterable[RunSpec], train_images: int) -> None:
    """Raise UserError where a recipe in steps, made for a larger set, is thousands of epochs of this one."""
    for spec in specs:
        if spec.recipe.unit == "step" and (epochs := count_epochs(spec, train_images)) > MOST_EPOCHS:
            raise UserError(
                f"the {spec.recipe.duration:,} steps of {spec.name}'s recipe are {epochs:,} epochs of {spec.dataset}"
                f"{' with --limit-train' * bool(spec.limit_train)}: choose with --epochs, as in --epochs 15"
            )


def check_batch(recipe: Recipe, workers: int) -> None:
    """Raise UserError unless every rank gets an equal share of the global batch."""
    if recipe.batch_size % workers:
        divisors = [n for n in range(1, recipe.batch_size + 1) if recipe.batch_size % n == 0 and n <= 64]
        raise UserError(
            f"--workers {workers} does not divide the global batch of {recipe.batch_size} "
            f"(allowed: {', '.join(map(str, divisors))})"
        )


def fallback_world_sizes(elastic: int | None, specs: Sequence[RunSpec]) -> tuple[int, ...]:
    """The world sizes below --workers, largest first, at which runs may continue where a cluster has lost nodes.

    At least `elastic`, and such that every rank gets an equal share of every spec's global batch. Raises UserError
    where there is none.
    """
    if elastic is None or not specs:
        return ()
    workers = specs[0].workers
    if not 1 <= elastic <= workers:
        raise UserError(f"--elastic {elastic}: from 1 to the {workers} of --workers is allowed")
    batches = sorted({spec.recipe.batch_size for spec in specs})
    sizes = [n for n in range(workers - 1, 0, -1) if not any(batch % n for batch in batches)]
    allowed = tuple(n for n in sizes if n >= elastic)
    if not allowed and elastic < workers:
        raise UserError(
            f"--elastic {elastic}: no width from {elastic} to {workers - 1} divides the global batch of "
            f"{' and '.join(map(str, batches))} (allowed: {', '.join(map(str, sizes))})"
        )
    return allowed


def pending(specs: Iterable[RunSpec], finished: Collection[str]) -> list[RunSpec]:
    """The runs whose key is not among the finished ones."""
    return [spec for spec in specs if spec.key not in finished]


def open_out(out: str, *, write: bool) -> tuple[Path, str]:
    """--out as a local folder and, for a URI, the URI, whose records are copied into the folder.

    Raises UserError where that fails and, with `write`, unless results can be written there.
    """
    from harness.loaders.cache import cache_dir
    from harness.results.remote import StorageError, cache_folder, check_uri, is_uri, pull_results

    remote = is_uri(out)
    folder = cache_folder(out, cache_dir().expanduser().absolute()) if remote else Path(out)
    if write:
        folder = check_out(folder)
    try:
        if remote and write:
            check_uri(out)
        if remote:
            pull_results(out, folder)
    except StorageError as error:
        raise UserError(f"{'--out ' * write}{error}") from None
    return folder, out if remote else ""


def check_out(out: Path) -> Path:
    """Make the folder for results; raise UserError unless it can be written to."""
    out = out.expanduser().absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".write-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {out} cannot be written to: {error.strerror or error}") from None
    return out
