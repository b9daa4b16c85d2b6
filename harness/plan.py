"""Grid -> list[RunSpec]: every check of what a user typed, and which runs are still missing. Imports no torch."""

from __future__ import annotations

import difflib
import itertools
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from harness.models.variants import Recipe, default_depth, find_variant
from harness.results.statistics import confidence_interval, sample
from harness.search_space import apply
from harness.spec import Engine, Precision, RunSpec, UserError

LOADERS = ("dali", "resident", "dataloader", "synthetic")
PRECISIONS: tuple[str, ...] = get_args(Precision)
ENGINES: tuple[str, ...] = get_args(Engine)
LAUNCHERS = ("ray", "local")


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """What a user asked for, words made into values."""

    variants: tuple[str, ...]
    depths: tuple[int, ...] = ()  # none: each variant's default
    seeds: tuple[int, ...] = (0,)
    dataset: str = "cifar10"
    loader: str = "dali"
    precision: str = "fp32"
    engine: str | None = None  # None: graph on a GPU, eager on a CPU
    epochs: int | None = None
    batch_size: int | None = None
    val: int | None = None
    limit_train: int | None = None
    limit_test: int | None = None
    settings: Mapping[str, Any] = field(
        default_factory=dict
    )  # fields of recipe and network: `space.parse_settings`


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """How runs lie over the machine: `concurrent_runs` at a time, `workers` ranks each, `threads` CPU threads a rank."""

    device: Literal["cuda", "cpu"]
    gpus: int
    workers: int
    concurrent_runs: int
    threads: int


def parse_words(text: str, what: str) -> tuple[str, ...]:
    """ "a,b" -> ("a", "b"), each once."""
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UserError(f"{what} {text!r}: a list with commas and no empty places is allowed, as in a,b")
    return tuple(dict.fromkeys(words))


def parse_depths(text: str) -> tuple[int, ...]:
    """ "20,32" -> (20, 32). Whether a depth is legal depends on the variant."""
    return tuple(_whole(word, "--depths", text) for word in parse_words(text, "--depths"))


def parse_seeds(text: str) -> tuple[int, ...]:
    """ "3" -> (0, 1, 2), a count; "0,7" -> (0, 7), the seeds themselves; "7," -> (7,)."""
    if "," not in text:
        count = _whole(text, "--seeds", text)
        if not 1 <= count <= 1000:
            raise UserError(f"--seeds {text}: a count from 1 to 1000 is allowed, or a list of seeds as in 0,7")
        return tuple(range(count))
    return tuple(_whole(word, "--seeds", text) for word in parse_words(text.rstrip(","), "--seeds"))


def _whole(word: str, option: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", word.strip()):
        raise UserError(f"{option} {text!r}: {word!r} is not a whole number")
    return int(word)


def check_word(word: str, allowed: Sequence[str], option: str) -> None:
    """Raise UserError, with the nearest allowed word, unless `word` is one."""
    if word not in allowed:
        near = difflib.get_close_matches(word, allowed, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{option} {word!r} is unknown{hint} (allowed: {', '.join(allowed)})")


def check_count(value: int | None, option: str, *, least: int = 1) -> None:
    """Raise UserError unless `value` is None or at least `least`."""
    if value is not None and value < least:
        raise UserError(f"{option} {value}: at least {least} is allowed")


def check_grid(sweep: Grid) -> None:
    """Every check that needs neither data nor devices."""
    from harness.loaders.datasets import DataError, check_dataset_name

    check_word(sweep.loader, LOADERS, "--loader")
    check_word(sweep.precision, PRECISIONS, "--precision")
    if sweep.engine is not None:
        check_word(sweep.engine, ENGINES, "--engine")
    check_count(sweep.epochs, "--epochs")
    check_count(sweep.batch_size, "--batch-size")
    check_count(sweep.limit_train, "--limit-train")
    check_count(sweep.limit_test, "--limit-test")
    if sweep.batch_size is not None and "batch_size" in sweep.settings:
        raise UserError("batch_size is given twice: leave --batch-size or --set batch_size=... out")
    check_count(sweep.val, "--val", least=0)
    try:
        check_dataset_name(sweep.dataset)
        for name in sweep.variants:
            function = find_variant(name)
            for depth in sweep.depths or (default_depth(function),):
                function(depth)
    except DataError as error:
        raise UserError(str(error)) from None
    except ValueError as error:
        raise UserError(str(error)) from None


def allocate(
    *, gpus: int | None, workers: int | None, have_gpus: int, have_cpus: int, precision: str, where: str
) -> Allocation:
    """Lay runs over what `where` has. Asking for more than there is raises UserError, before anything starts."""
    if gpus is None:
        gpus = have_gpus
    check_count(gpus, "--gpus", least=0)
    check_count(workers, "--workers")
    if gpus > have_gpus:
        have = f"{have_gpus} GPU{'s' * (have_gpus != 1)}" if have_gpus else "no GPU"
        raise UserError(f"--gpus {gpus}: {where} has {have}" + ("; --gpus 0 trains on the CPU" * (not have_gpus)))
    if gpus == 0:
        workers = workers or 1
        if workers > have_cpus:
            raise UserError(f"--workers {workers}: {where} has {have_cpus} CPU cores, and each worker needs one")
        if precision in ("tf32", "fp16"):
            raise UserError(f"--precision {precision} needs a GPU; on the CPU fp32 and bf16 are allowed")
        return Allocation(device="cpu", gpus=0, workers=workers, concurrent_runs=1, threads=have_cpus // workers)
    workers = workers or gpus
    if gpus % workers:
        fitting = ", ".join(str(n) for n in range(1, gpus + 1) if gpus % n == 0)
        raise UserError(f"--workers {workers} does not divide --gpus {gpus} (allowed: {fitting})")
    return Allocation(
        device="cuda",
        gpus=gpus,
        workers=workers,
        concurrent_runs=gpus // workers,
        threads=max(1, have_cpus // gpus),
    )


def choose_engine(asked: str | None, device: str) -> Engine:
    """The engine asked for, or the fastest that computes the same as eager, kernel by kernel."""
    if asked == "graph" and device == "cpu":
        raise UserError("--engine graph needs a GPU; on the CPU eager and compile are allowed")
    return asked or ("graph" if device == "cuda" else "eager")  # type: ignore[return-value]


def check_pack(pack: int, workers: int | None) -> None:
    """Raise UserError unless so many seeds can be trained by one process."""
    check_count(pack, "--pack")
    if pack > 1 and workers not in (None, 1):
        raise UserError(f"--pack {pack}: packed seeds have one worker, not {workers}; leave --workers out")


def make_packs(specs: Iterable[RunSpec], pack: int) -> list[tuple[RunSpec, ...]]:
    """Specs that differ in nothing but the seed, up to `pack` together, in their order."""
    rows: dict[RunSpec, list[RunSpec]] = defaultdict(list)
    for spec in specs:
        rows[replace(spec, seed=0)].append(spec)
    return [tuple(row[i : i + pack]) for row in rows.values() for i in range(0, len(row), pack)]


def override(recipe: Recipe, sweep: Grid) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with what the user changed, and the names of what is changed.

    Another number of epochs stretches the whole schedule: drops and warm-up keep their share of the run.
    """
    changed: list[str] = []
    if sweep.epochs is not None and not (recipe.unit == "epoch" and recipe.duration == sweep.epochs):
        factor = sweep.epochs / recipe.duration
        recipe = replace(
            recipe,
            duration=sweep.epochs,
            unit="epoch",
            milestones=tuple(m * factor for m in recipe.milestones),
            warmup=recipe.warmup * factor,
        )
        changed.append(f"epochs={sweep.epochs}")
    if sweep.batch_size is not None and sweep.batch_size != recipe.batch_size:
        recipe = replace(recipe, batch_size=sweep.batch_size)
        changed.append(f"batch_size={sweep.batch_size}")
    if sweep.val is not None and sweep.val != recipe.val:
        recipe = replace(recipe, val=sweep.val)
        changed.append(f"val={sweep.val}")
    return recipe, tuple(changed)


def expand(sweep: Grid, width: Allocation, *, fingerprint: str, train_images: int) -> list[RunSpec]:
    """Every run of a sweep: seeds outermost, so that a table over all depths and variants is there early."""
    if sweep.limit_train is not None and sweep.limit_train > train_images:
        raise UserError(f"--limit-train {sweep.limit_train}: {sweep.dataset} has {train_images} training images")
    specs = []
    for seed in sweep.seeds:
        for name in sweep.variants:
            function = find_variant(name)
            for depth in sweep.depths or (default_depth(function),):
                variant, settings = apply(function(depth), sweep.settings)
                recipe, changed = override(variant.recipe, sweep)
                check_batch(recipe, width)
                images = sweep.limit_train or train_images
                if recipe.val >= images:
                    raise UserError(f"{recipe.val} validation images of {images}: none are left to train on")
                specs.append(
                    RunSpec(
                        variant=name,
                        network=variant.network,
                        recipe=recipe,
                        overrides=settings + changed,
                        dataset=sweep.dataset,
                        fingerprint=fingerprint,
                        limit_train=sweep.limit_train,
                        limit_test=sweep.limit_test,
                        loader=sweep.loader,
                        precision=sweep.precision,  # type: ignore[arg-type]
                        engine=choose_engine(sweep.engine, width.device),
                        device=width.device,
                        workers=width.workers,
                        seed=seed,
                    )
                )
    return list(dict.fromkeys(specs))


def check_until_ci(sweep: Grid, until_ci: float | None, max_seeds: int | None) -> None:
    """Raise UserError unless seeds can be added until an interval is narrow enough."""
    if until_ci is None:
        if max_seeds is not None:
            raise UserError(f"--max-seeds {max_seeds} is for --until-ci, which says until when seeds are added")
        return
    if not (until_ci > 0 and math.isfinite(until_ci)):
        raise UserError(f"--until-ci {until_ci:g}: points of error above 0 are allowed, as in 0.10")
    if max_seeds is not None and max_seeds < max(2, len(sweep.seeds)):
        raise UserError(
            f"--max-seeds {max_seeds}: at least {max(2, len(sweep.seeds))} is allowed, which --seeds begins with"
        )


def error_half_widths(specs: Iterable[RunSpec], errors: Mapping[str, float]) -> dict[RunSpec, float | None]:
    """Half the 95 % interval of the mean last-epoch error, in points, for every spec (as seed 0) but for its seed.

    `errors` holds finished runs' errors by key. None: a run is missing or its error is not finite. One run: infinite.
    """
    rows: dict[RunSpec, list[float]] = defaultdict(list)
    for spec in specs:
        rows[replace(spec, seed=0)].append(errors.get(spec.key, math.nan))
    halves: dict[RunSpec, float | None] = {}
    for row, values in rows.items():
        interval = confidence_interval(sample(values))
        half = (interval.high - interval.low) / 2 if interval else math.inf
        halves[row] = half if all(map(math.isfinite, values)) else None
    return halves


def more_seeds(
    specs: Sequence[RunSpec], errors: Mapping[str, float], *, until_ci: float, max_seeds: int, concurrent_runs: int
) -> list[RunSpec]:
    """The next runs of those rows whose interval is still wider than ±until_ci; none: all are narrow, or at their limit.

    One seed a row at a time, more only where GPUs would stand idle. A row with a run that failed gets no further one.
    """
    used: dict[RunSpec, set[int]] = defaultdict(set)
    for spec in specs:
        used[replace(spec, seed=0)].add(spec.seed)
    halves = error_half_widths(specs, errors)
    wide = [
        row for row, half in halves.items() if half is not None and half > until_ci and len(used[row]) < max_seeds
    ]
    more = []
    for _ in range(max(1, concurrent_runs // len(wide)) if wide else 0):
        for row in wide:
            if len(used[row]) < max_seeds:
                seed = next(n for n in itertools.count() if n not in used[row])
                used[row].add(seed)
                more.append(replace(row, seed=seed))
    return more


def check_batch(recipe: Recipe, width: Allocation) -> None:
    """Raise UserError unless every rank gets an equal share of the global batch."""
    if recipe.batch_size % width.workers:
        fitting = [n for n in range(1, recipe.batch_size + 1) if recipe.batch_size % n == 0 and n <= 64]
        raise UserError(
            f"--workers {width.workers} does not divide the global batch of {recipe.batch_size} "
            f"(allowed: {', '.join(map(str, fitting))})"
        )


def narrower_widths(elastic: int | None, specs: Sequence[RunSpec]) -> tuple[int, ...]:
    """The widths below --workers, widest first, with which runs may go on where a cluster has lost nodes.

    At least `elastic`, and such that every rank gets an equal share of every spec's global batch. Raises UserError
    where there is none.
    """
    if elastic is None or not specs:
        return ()
    workers = specs[0].workers
    if not 1 <= elastic <= workers:
        raise UserError(f"--elastic {elastic}: from 1 to the {workers} of --workers is allowed")
    batches = sorted({spec.recipe.batch_size for spec in specs})
    widths = [n for n in range(workers - 1, 0, -1) if not any(batch % n for batch in batches)]
    fitting = tuple(n for n in widths if n >= elastic)
    if not fitting and elastic < workers:
        raise UserError(
            f"--elastic {elastic}: no width from {elastic} to {workers - 1} divides the global batch of "
            f"{' and '.join(map(str, batches))} (allowed: {', '.join(map(str, widths))})"
        )
    return fitting


def pending(specs: Iterable[RunSpec], finished: set[str]) -> list[RunSpec]:
    """The runs that are still missing."""
    return [spec for spec in specs if spec.key not in finished]


def pull_out(uri: str, *, write: bool) -> None:
    """Bring the records that are at --out URI into the local folder in which its runs are worked on.

    Raises UserError where that cannot be, and with `write` unless results can be written there.
    """
    from harness.results.remote import StorageError, check_uri, pull_results

    try:
        if write:
            check_uri(uri)
        pull_results(uri, cache_of(uri))
    except StorageError as error:
        raise UserError(f"--out {error}") from None


def cache_of(uri: str) -> Path:
    """The local folder that stands for a URI, absolute."""
    from harness.results.remote import cache_folder

    cache = Path(os.environ.get("HARNESS_CACHE") or Path.home() / ".cache" / "resnet-harness")
    return cache_folder(uri, cache.expanduser().absolute())


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
