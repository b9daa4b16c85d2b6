"""Records -> rows -> text.

A row stands for all runs that differ in nothing but the seed. Runs that differ in anything else (a field of the
spec, the device, a worker's threads, torch's minor version) are never averaged together silently: they get rows
of their own, and rows that would look the same say in what they differ.
"""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, Literal
from unicodedata import combining, east_asian_width

from results.published import Published, find_published
from results.statistics import Sample, Verdict, compare_with_published, median, sample, seeds_to_tell
from results.store import Interrupted, Reading, Record, RunResult, Stored, collector_paused

Format = Literal["table", "markdown", "csv", "json"]
FORMATS: tuple[Format, ...] = ("table", "markdown", "csv", "json")
NONE = "–"
UNMEASURED = Reading(value=None)


@dataclass(frozen=True, slots=True)
class Against:
    """Our error beside a published one: difference = ours - published, in points."""

    published: Published
    ours: Sample  # the best epochs where the published number is one, else the last ones
    difference: float
    verdict: Verdict | None  # None: neither side has a spread


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """All runs of one spec but for the seed. Errors in percent; None: nothing measured it."""

    variant: str
    depth: int
    dataset: str  # label
    original: bool
    limit_train: int | None
    overrides: tuple[str, ...]
    duration: float
    duration_unit: str  # "epoch", "step"
    loader: str
    precision: str
    engine: str
    device: str
    workers: int
    batch_size: int
    evaluated_on: str
    fields: Mapping[str, str]  # everything in which rows can differ, flattened
    differs: tuple[str, ...] = ()  # ("recipe.lr=0.05",): tells this row from others that look the same
    averaged_over: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # field -> its values, as asked for

    done: tuple[Stored, ...]  # one a seed
    failed: tuple[Stored, ...]
    interrupted: tuple[Interrupted, ...]
    repeated: int = 0  # earlier runs of seeds that are counted once

    parameters: int | None = None
    error: Sample | None = None  # last epoch
    best_error: Sample | None = None
    top5_error: Sample | None = None  # last epoch
    epoch_seconds: float | None = None
    eval_seconds: float | None = None
    setup_seconds: float | None = None
    images_per_second: float | None = None
    wait_share: float | None = None  # percent
    torch_allocated_mib: Reading = UNMEASURED
    torch_reserved_mib: Reading = UNMEASURED
    nvml_process_mib: Reading = UNMEASURED
    rss_mib: Reading = UNMEASURED
    against: Against | None = None

    @property
    def name(self) -> str:
        """msra-20, say."""
        return f"{self.variant}-{self.depth}"

    @property
    def best_minus_last(self) -> float | None:
        """Points that choosing the epoch by the error shown would take off; at most 0."""
        return self.best_error.mean - self.error.mean if self.error and self.best_error else None


# --- records -> rows ---


@collector_paused()
def summarise(
    done_and_failed: Iterable[Stored], interrupted: Iterable[Interrupted] = (), across: Sequence[str] = ()
) -> list[Row]:
    """Group runs by everything but the seed, ordered by data set, variant and depth.

    `across` names fields (of `Row.fields`: "workers", "recipe.lr") whose values may be averaged together; the table
    then says so in a footnote. Raises ValueError for a field that no run has.
    """
    groups: dict[str, _Group] = {}
    by_spec: dict[str, _Group] = {}  # a spec's own fields -> the first of its groups
    met: dict[tuple[str, Surroundings | None], _Group] = {}
    known: dict[str, None] = {}

    def group(spec: Mapping[str, Any], surroundings: Surroundings | None) -> _Group:
        """The group of a run; one without result knows no surroundings and joins the runs of its spec."""
        identity = (repr({name: value for name, value in spec.items() if name != "seed"}), surroundings)
        if identity not in met:  # runs of other seeds are looked up, not flattened again
            fields, around = _flatten(spec), dict(surroundings or ())
            known.update(dict.fromkeys((*fields, *around)))
            kept = {name: value for name, value in fields.items() if name not in across}
            whole = {**kept, **{name: value for name, value in around.items() if name not in across}}
            bare, key = json.dumps(kept), json.dumps(whole)
            found = by_spec.get(bare) if surroundings is None else groups.get(key)
            met[identity] = found or groups.setdefault(key, _Group(whole))
            by_spec.setdefault(bare, met[identity])
            for name in across:
                if (value := {**fields, **around}.get(name)) is not None:
                    met[identity].averaged_over[name][value] = None
        return met[identity]

    without_result = []
    for stored in done_and_failed:
        if stored.record.result is None:
            without_result.append(stored)
        else:
            group(stored.record.spec, _surroundings(stored.record, stored.record.result)).done.append(stored)
    for stored in without_result:
        group(stored.record.spec, None).failed.append(stored)
    for partial in interrupted:
        group(partial.spec or {"run": partial.name}, None).interrupted.append(partial)
    if unknown := [name for name in across if name not in known]:
        raise ValueError(f"no field {unknown[0]!r} in these runs: they have {', '.join(sorted(known))}")
    rows = [_make_row(group) for group in groups.values()]
    rows.sort(key=lambda row: (row.dataset, row.variant, row.depth, row.workers, tuple(row.fields.items())))
    return _tell_apart(rows)


@dataclass(slots=True)
class _Group:
    fields: dict[str, str]
    done: list[Stored] = field(default_factory=list)
    failed: list[Stored] = field(default_factory=list)
    interrupted: list[Interrupted] = field(default_factory=list)
    averaged_over: dict[str, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))


def _flatten(spec: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"recipe": {"lr": 0.1}, "seed": 0} -> {"recipe.lr": "0.1"}, sorted by name."""
    flat: dict[str, str] = {}
    for name in sorted(spec):
        value = spec[name]
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}."))
        elif prefix or name != "seed":
            flat[prefix + name] = _word(value)
    return flat


def _word(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return ",".join(map(_word, value)) or NONE
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return NONE if value is None else str(value)


Surroundings = tuple[tuple[str, str], ...]


def _surroundings(record: Record, result: RunResult) -> Surroundings:
    """What changes figures and is no part of a spec, by name; "hardware" is what the spec calls "cuda" or "cpu"."""
    around = (("label", record.dataset), ("hardware", result.device), ("threads", str(result.threads)))
    versions = record.environment.get("versions")
    if isinstance(versions, dict) and isinstance(torch := versions.get("torch"), str):
        return (*around, ("torch", ".".join(torch.split("+")[0].split(".")[:2])))
    return around


def _make_row(group: _Group) -> Row:
    done, repeated = _one_a_seed(group.done)
    members = [*done, *group.failed]
    spec: Mapping[str, Any] = members[0].record.spec if members else group.interrupted[0].spec
    finished_seeds = {stored.record.seed for stored in done}
    recipe = _mapping(spec.get("recipe"))
    if members:
        record = members[0].record
        variant, depth, dataset, original = record.variant, record.depth, record.dataset, record.original
    else:
        name = group.interrupted[0].name
        variant = str(spec.get("variant", name))
        depth = int(_number(_mapping(spec.get("network")).get("depth"), 0))
        dataset, original = (name.split("_")[0] if spec else NONE), False
    results = [stored.record.result for stored in done if stored.record.result is not None]
    first = results[0] if results else None
    limit = spec.get("limit_train")
    row = Row(
        variant=variant,
        depth=depth,
        dataset=dataset,
        original=original,
        limit_train=limit if isinstance(limit, int) else None,
        overrides=tuple(map(str, overrides)) if isinstance(overrides := spec.get("overrides"), list) else (),
        duration=_number(recipe.get("duration"), math.nan),
        duration_unit=str(recipe.get("unit", "epoch")),
        loader=str(spec.get("loader", NONE)),
        precision=str(spec.get("precision", NONE)),
        engine=str(spec.get("engine", NONE)),
        device=first.device if first else NONE,
        workers=first.workers if first else int(_number(spec.get("workers"), 1)),
        batch_size=first.batch_size if first else int(_number(recipe.get("batch_size"), 0)),
        evaluated_on=first.evaluated_on if first else ("val" if recipe.get("val") else "test"),
        fields=group.fields,
        averaged_over={n: tuple(v) for n, v in group.averaged_over.items() if len(v) > 1},
        done=tuple(done),
        failed=tuple(s for s in group.failed if s.record.seed not in finished_seeds),
        interrupted=tuple(group.interrupted),
        repeated=repeated,
        **(_measure(results) if results else {}),
    )
    against = _against(row)
    return replace(row, against=against) if against else row


def _one_a_seed(runs: list[Stored]) -> tuple[list[Stored], int]:
    """The last run of each seed, by seed, and how many others there are: a seed repeated is no further sample."""
    last: dict[tuple[int, str, Surroundings], Stored] = {}
    for run in sorted(runs, key=lambda run: run.record.finished_at):
        if result := run.record.result:  # two devices are two samples, where one row may hold both
            last[run.record.seed, run.record.key, _surroundings(run.record, result)] = run
    return [last[key] for key in sorted(last)], len(runs) - len(last)


def _measure(results: list[RunResult]) -> dict[str, Any]:
    """The figures of a row."""

    def middle(get: Callable[[RunResult], float | None]) -> float | None:
        values = [value for result in results if (value := get(result)) is not None]
        return median(values) if values else None

    def peak(get: Callable[[RunResult], Reading]) -> Reading:
        readings = [get(result) for result in results]
        values = [reading.value for reading in readings if reading.value is not None]
        return Reading(value=max(values)) if values else readings[0]

    top5 = [result.final_top5_error for result in results if result.final_top5_error is not None]
    return {
        "parameters": results[0].parameters,
        "error": sample([result.final_error for result in results]),
        "best_error": sample([result.best_error for result in results]),
        "top5_error": sample(top5) if len(top5) == len(results) else None,
        "epoch_seconds": middle(lambda result: result.epoch_seconds),
        "eval_seconds": middle(lambda result: result.eval_seconds),
        "setup_seconds": middle(lambda result: result.setup_seconds),
        "images_per_second": middle(lambda result: result.images_per_second),
        "wait_share": middle(lambda result: result.wait_share),
        "torch_allocated_mib": peak(lambda result: result.memory.torch_allocated_mib),
        "torch_reserved_mib": peak(lambda result: result.memory.torch_reserved_mib),
        "nvml_process_mib": peak(lambda result: result.memory.nvml_process_mib),
        "rss_mib": peak(lambda result: result.memory.rss_mib),
    }


def _against(row: Row) -> Against | None:
    """The published number, only where data, training set and recipe are the published ones, on test images."""
    if not row.original or row.limit_train is not None or row.overrides or row.evaluated_on != "test":
        return None
    published = find_published(row.dataset, row.variant, row.depth)
    if published is None:
        return None
    theirs = published.sample
    if theirs is not None:
        ours = row.best_error if published.rule == "best" else row.error
    else:
        ours, theirs = row.top5_error, Sample(1, published.top5_error or math.nan)
    if ours is None or not math.isfinite(ours.mean):
        return None
    return Against(published, ours, ours.mean - theirs.mean, compare_with_published(ours, theirs))


SHOWN = {
    "variant", "network.depth", "dataset", "label", "limit_train", "overrides", "recipe.duration", "recipe.unit",
    "recipe.batch_size", "loader", "precision", "engine", "workers", "device", "hardware",
}  # fmt: skip
"""Fields that have a column of their own."""


def _tell_apart(rows: list[Row]) -> list[Row]:
    """Name, in each row, the fields without a column of their own in which comparable rows differ.

    Networks and recipes are compared within a variant and depth, fingerprints within a data set, all else over all
    rows: two loaders cannot be compared where one of them ran with another version of torch unnoticed.
    """

    def scope(name: str, row: Row) -> tuple[object, ...]:
        if name.startswith(("recipe.", "network.")):
            return (name, row.dataset, row.variant, row.depth, row.overrides)
        return (name, row.dataset) if name == "fingerprint" else (name,)

    values: dict[tuple[object, ...], set[str]] = defaultdict(set)
    for row in rows:
        for name, value in row.fields.items():
            if name not in SHOWN:
                values[scope(name, row)].add(value)
    told = []
    for row in rows:
        fields = row.fields.items()
        differing = {n: v for n, v in fields if n not in SHOWN and len(values[scope(n, row)]) > 1}
        words = tuple(f"{name}={_brief(v)}" for name, v in differing.items())
        told.append(replace(row, differs=words) if words else row)
    # runs of an older program may lack a field: then its absence is the difference
    alike: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, row in enumerate(told):
        alike[tuple(column.text(row) for column in (*DESCRIPTORS, DIFFERS))].append(index)
    for indices in alike.values():
        names = {name for index in indices for name in told[index].fields} if len(indices) > 1 else set()
        telling = [n for n in sorted(names) if len({told[index].fields.get(n) for index in indices}) > 1]
        for index in indices if telling else ():
            words = tuple(f"{name}={_brief(told[index].fields.get(name, NONE))}" for name in telling)
            told[index] = replace(told[index], differs=(*told[index].differs, *words))
    return told


def _brief(value: str) -> str:
    return value if len(value) <= 16 else f"{value[:12]}…"


def _number(value: object, default: float) -> float:
    """A number of a spec, which nothing has checked."""
    return value if isinstance(value, int | float) else default


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


# --- columns ---


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the page. `means` stands under the table; `stays` keeps it there when all rows agree."""

    name: str
    header: str
    text: Callable[[Row], str]
    means: str = ""
    right: bool = True
    stays: bool = False


def _percent(value: Sample | None) -> str:
    if value is None:
        return NONE
    return f"{value.mean:.2f}" if value.std is None else f"{value.mean:.2f} ± {value.std:.2f}"


def _signed(value: float | None) -> str:
    return NONE if value is None else f"{value:+.2f}".replace("-", "−")


def _figures(value: float | None) -> str:
    """Three figures, never in powers of ten: 0.0123, 1.23, 12.3, 123, 12,345."""
    if value is None or not math.isfinite(value):
        return NONE if value is None else str(value)
    if value == 0:
        return "0"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _million(value: int | None) -> str:
    return NONE if value is None else f"{value / 1e6:.2f}M"


def _mib(reading: Reading) -> str:
    return NONE if reading.value is None else f"{reading.value:,.0f}"


def _either(row: Row, name: str, text: str) -> str:
    """A descriptor, or all its values where the row was told to average over them."""
    return "/".join(row.averaged_over[name]) if name in row.averaged_over else text


def _width(row: Row) -> str:
    if "workers" in row.averaged_over:
        return f"{'/'.join(row.averaged_over['workers'])} of {row.batch_size}"
    return f"{row.workers}×{row.batch_size // max(1, row.workers)}"


def _duration(row: Row) -> str:
    if math.isnan(row.duration):
        return NONE
    return f"{row.duration:,g} {row.duration_unit}s" if row.duration != 1 else f"1 {row.duration_unit}"


def _error(row: Row) -> str:
    """The error, or in its place why there is none."""
    if row.error is not None:
        return _percent(row.error)
    if row.failed:
        return _kinds(row.failed)
    return _progress(row.interrupted[0])


def _kinds(failed: Sequence[Stored]) -> str:
    kinds = dict.fromkeys(stored.record.failure.kind for stored in failed if stored.record.failure)
    return ", ".join(kinds)


def _progress(partial: Interrupted) -> str:
    if partial.epochs == 0:
        return "no epoch yet"
    return f"epoch {partial.epochs} of {partial.of}" if partial.of else f"epoch {partial.epochs}"


def _beside(row: Row) -> str:
    if row.against is None:
        return NONE
    published = row.against.published
    number = published.error if published.error is not None else published.top5_error
    return f"{number:.2f} ({_signed(row.against.difference)})"


def _verdict(row: Row) -> str:
    if row.against is None:
        return NONE
    verdict = row.against.verdict
    return "~" if verdict is None else f"{verdict.verdict} {_p(verdict.p)}"


def _p(p: float) -> str:
    return "p<.001" if p < 0.001 else f"p={p:.2g}".replace("0.", ".", 1)


def _runs(row: Row) -> str:
    missing = len(row.failed) + len(row.interrupted)
    return f"{len(row.done)} of {len(row.done) + missing}" if missing else str(len(row.done))


DESCRIPTORS: tuple[Column, ...] = (
    Column("variant", "variant", lambda r: _either(r, "variant", r.variant), right=False, stays=True),
    Column("depth", "depth", lambda r: _either(r, "network.depth", str(r.depth or NONE)), stays=True),
    Column("dataset", "data set", lambda r: _either(r, "label", r.dataset), right=False),
    Column(
        "limit_train", "images", lambda r: "all" if r.limit_train is None else f"{r.limit_train:,}",
        "of the training set that were used",
    ),
    Column("duration", "trained", _duration, right=False),
    Column(
        "overrides", "changed", lambda r: ", ".join(r.overrides) or NONE,
        "what differs from the variant's own recipe", right=False,
    ),
    Column("loader", "loader", lambda r: _either(r, "loader", r.loader), right=False),
    Column("precision", "precision", lambda r: _either(r, "precision", r.precision), right=False),
    Column("engine", "engine", lambda r: _either(r, "engine", r.engine), right=False),
    Column("width", "width", _width, "DDP workers × images per step and worker", right=False),
    Column("device", "device", lambda r: _either(r, "hardware", r.device), right=False),
)  # fmt: skip
NUMBER = Column("number", "#", lambda r: r.name)  # only where one row takes several tables
DIFFERS = Column("differs", "differs in", lambda r: ", ".join(r.differs) or NONE, right=False)

ERRORS: tuple[Column, ...] = (
    Column("parameters", "params", lambda r: _million(r.parameters), "trainable parameters", stays=True),
    Column("n", "n", _runs, "runs that are done, one a seed", stays=True),
    Column("error", "error %", _error, "top-1 after the last epoch, mean ± std (n − 1) over the seeds", stays=True),
    Column(
        "best", "best %", lambda r: NONE if r.best_error is None else f"{r.best_error.mean:.2f}",
        "mean of each run's best epoch", stays=True,
    ),
    Column(
        "best_minus_last", "b−l", lambda r: _signed(r.best_minus_last),
        "best minus last, in points: what choosing the epoch on the evaluated images takes off", stays=True,
    ),
    Column("top5", "top-5 %", lambda r: _percent(r.top5_error), "top-5 after the last epoch", stays=True),
    Column("published", "published", _beside, "the published error (and ours minus it, in points)", stays=True),
    Column(
        "verdict", "verdict", _verdict, "could the published number be one more run of ours? prediction interval of 95 %",
        right=False, stays=True,
    ),
)  # fmt: skip
COSTS: tuple[Column, ...] = (
    Column(
        "epoch_seconds", "s/epoch", lambda r: _figures(r.epoch_seconds),
        "training only, median over the epochs after warm-up, then over the runs; evaluation, set-up and compilation "
        "are left out", stays=True,
    ),
    Column("images_per_second", "img/s", lambda r: _figures(r.images_per_second), "of all workers, same medians", stays=True),
    Column(
        "wait_share", "wait %", lambda r: NONE if r.wait_share is None else f"{r.wait_share:.1f}",
        "share of the training time spent waiting for the loader", stays=True,
    ),
    Column("torch_allocated_mib", "alloc", lambda r: _mib(r.torch_allocated_mib),
           "MiB, torch.cuda.max_memory_allocated: tensors alive at the peak", stays=True),
    Column("torch_reserved_mib", "resvd", lambda r: _mib(r.torch_reserved_mib),
           "MiB, torch.cuda.max_memory_reserved: the same with the allocator's slack", stays=True),
    Column("nvml_process_mib", "NVML", lambda r: _mib(r.nvml_process_mib),
           "MiB, all the process holds on the GPU: with CUDA context, NCCL and DALI", stays=True),
    Column("rss_mib", "RSS", lambda r: _mib(r.rss_mib), "MiB, peak resident memory on the host", stays=True),
)  # fmt: skip


# --- notes ---


@dataclass(frozen=True, slots=True)
class Note:
    """A footnote and the cells it belongs to: (row, column name)."""

    text: str
    cells: frozenset[tuple[int, str]]


def make_notes(rows: Sequence[Row]) -> list[Note]:
    """Everything a reader must know about single cells, in the order of the columns they stand in."""
    cells: dict[str, set[tuple[int, str]]] = {}

    def note(text: str, row: int, *columns: str) -> None:
        cells.setdefault(text, set()).update((row, column) for column in columns)

    for i, row in enumerate(rows):
        if not row.original and row.done:
            note(
                f"{row.dataset} is not a published data set's own images: never compared with published errors",
                i,
                "dataset",
            )
    for i, row in enumerate(rows):
        if row.limit_train is not None:
            note("trained on a part of the training set: not comparable with published errors", i, "limit_train")
        for name, values in row.averaged_over.items():
            note(f"averaged over {name}: {', '.join(values)}, as asked for", i, "n")
        if row.evaluated_on == "val":
            note("of held-out training images, not of the test set", i, "error")
        together = {str(stored.record.environment.get("concurrent_runs", 1)) for stored in row.done}
        if together - {"1"}:
            note(f"timed with {' or '.join(sorted(together))} runs going on at a time", i, "epoch_seconds")
        if row.repeated:
            note("a seed that was run more than once counts with its last run", i, "n")
        for stored in row.failed:
            if failure := stored.record.failure:
                why = f"{failure.kind}: {failure.message}" if failure.message else failure.kind
                note(
                    f"{row.name} seed {stored.record.seed} failed, {_shorten(why)}",
                    i,
                    "n" if row.done else "error",
                )
        for partial in row.interrupted:
            seed = partial.spec.get("seed")
            who = f"{row.name} seed {seed}" if seed is not None else partial.name
            note(f"{who} is not done: {_progress(partial)}", i, "n" if row.done else "error")
        if row.against is not None:
            note(_cite(row.against.published), i, "published")
        missing: dict[str, list[Column]] = defaultdict(list)
        for column in COSTS if row.done else ():
            reading = getattr(row, column.name)
            if isinstance(reading, Reading) and reading.value is None and reading.reason:
                missing[reading.reason].append(column)
        for reason, columns in missing.items():
            headers = ", ".join(column.header for column in columns)
            note(f"{headers} not measured: {_shorten(reason)}", i, *(column.name for column in columns))
    return [Note(text, frozenset(at)) for text, at in cells.items()]


def _cite(published: Published) -> str:
    """Where a published number comes from, and what is to be known about it."""
    parts = [published.source, f"mean of {published.n} runs" if published.n > 1 else "one run"]
    if published.std is not None:
        parts[1] += f", std {published.std:.2f}"
    if published.rule == "best":
        parts.append("best epoch, set beside our best")
    if published.error is None:
        parts.append("top-5")
    if published.note:
        parts.append(published.note)
    return "; ".join(parts)


def _shorten(text: str, limit: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


# --- rows -> text ---


def render(rows: Sequence[Row], format: Format = "table", *, width: int = 100, colour: bool = False) -> str:
    """The table as text, with a line of what all rows share above it and its definitions below.

    table: for a terminal of that width; split in two where it would not fit. markdown: one table. csv and json: raw
    numbers, units in the names, nothing rounded.
    """
    if format == "csv":
        return _csv(rows)
    if format == "json":
        return _json(rows)
    if not rows:
        return "no runs\n"
    layout = _lay_out(rows)
    return _markdown(layout) if format == "markdown" else _terminal(layout, rows, width, colour)


@dataclass(frozen=True, slots=True)
class _Layout:
    caption: str
    columns: list[Column]
    headers: list[str]  # with the marks of notes that hold for the whole column
    cells: list[list[str]]
    widths: list[int]
    notes: list[str]  # "¹ ..."
    means: list[str]  # "error %: ..."


def _lay_out(rows: Sequence[Row]) -> _Layout:
    """Which columns stand in the table, what is said once above it, and which marks go where."""
    cpu = all(row.torch_allocated_mib.value is None for row in rows)
    columns, shared = [NUMBER], []
    words = {
        column.name: [column.text(row) for row in rows] for column in (*DESCRIPTORS, DIFFERS, *ERRORS, *COSTS)
    }
    for column in (*DESCRIPTORS, DIFFERS, *ERRORS, *COSTS):
        texts = set(words[column.name])
        if column.name == "rss_mib" and not cpu:
            continue  # on the GPU it is in csv and json
        if texts == {NONE} or (column.name == "limit_train" and texts == {"all"}):
            continue
        if column.name == "device" and any(row.done for row in rows):
            texts -= {NONE}  # a run that failed does not know its device
        if len(texts) == 1 and not column.stays:
            shared.append(column)
        else:
            columns.append(column)
    shown = {column.name for column in columns}
    everywhere: dict[str, list[str]] = defaultdict(list)  # column -> marks
    marks: dict[tuple[int, str], list[str]] = defaultdict(list)
    notes = []
    for number, note in enumerate(make_notes(rows), 1):
        mark = str(number).translate(SUPERSCRIPT)
        notes.append(f"{mark} {note.text}")
        for name in dict.fromkeys(name for _, name in sorted(note.cells)):
            where = [i for i, n in note.cells if n == name]
            if len(where) == len(rows) or name not in shown:
                everywhere[name].append(mark)
            else:
                for i in where:
                    marks[i, name].append(mark)
    pieces = []
    for column in shared:
        text = next(text for text in words[column.name] if text != NONE)
        if column.name == "limit_train":
            text = f"training images: {text}"
        pieces.append(text + ",".join(everywhere[column.name]))
    headers = [column.header + ",".join(everywhere[column.name]) for column in columns]
    for (i, name), found in marks.items():
        words[name][i] += ",".join(found)
    words[NUMBER.name] = [str(i) for i in range(1, len(rows) + 1)]
    cells = [[_clean(words[column.name][i]) for column in columns] for i in range(len(rows))]
    return _Layout(
        caption=_clean(" · ".join(pieces)),
        columns=columns,
        headers=headers,
        cells=cells,
        widths=[max(map(_cell_width, column)) for column in zip(headers, *cells, strict=True)],
        notes=[_clean(note) for note in notes],
        means=[f"{column.header}: {column.means}" for column in columns if column.means],
    )


SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def _clean(text: str) -> str:
    """No control characters: a name from a folder must not steer the terminal or break a line."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "�" for c in text)


def _terminal(layout: _Layout, rows: Sequence[Row], width: int, colour: bool) -> str:
    """Plain columns. Written here because rich needs five seconds for the rows of 10,000 runs, this a twentieth."""

    def paint(text: str, style: str) -> str:
        return f"\x1b[{ANSI[style]}m{text}\x1b[0m" if colour and style and text.strip() else text

    def table(wanted: Sequence[int]) -> Iterator[str]:
        sizes = _fit(layout, wanted, width)
        folded = {j: sizes[j] < layout.widths[j] for j in wanted}
        header = [_pad(layout.headers[j], sizes[j], layout.columns[j].right) for j in wanted]
        yield "  ".join(header).rstrip()
        yield "  ".join("─" * sizes[j] for j in wanted)
        for row, cells in zip(rows, layout.cells, strict=True):
            lines = [textwrap.wrap(cells[j], sizes[j]) or [""] if folded[j] else [cells[j]] for j in wanted]
            for parts in zip_longest(*lines, fillvalue=""):
                painted = [
                    paint(_pad(part, sizes[j], layout.columns[j].right), _style(layout.columns[j].name, row))
                    for j, part in zip(wanted, parts, strict=True)
                ]
                yield "  ".join(painted).rstrip()
        yield ""

    output = [paint(line, "bold") for line in textwrap.wrap(layout.caption, width)]
    output += [""] if output else []
    for part in _parts(layout, width):
        output += table(part)
    for line in layout.notes:
        output += textwrap.wrap(line, width, subsequent_indent="  ")
    output += [paint(part, "dim") for part in textwrap.wrap(" · ".join(layout.means), width)]
    return "\n".join(output) + "\n"


def _parts(layout: _Layout, width: int) -> list[list[int]]:
    """The columns of each table that is printed: all in one where they fit, else errors and costs apart, and where
    that is still too wide, what the rows are in a table of its own that numbers them."""
    every = list(range(len(layout.columns)))
    groups = {c.name: k for k, columns in enumerate(((*DESCRIPTORS, DIFFERS), ERRORS, COSTS)) for c in columns}
    number, *rest = every
    what, errors, costs = ([j for j in rest if groups[layout.columns[j].name] == k] for k in range(3))

    def fits(part: list[int]) -> bool:
        return sum(layout.widths[j] for j in part) + 2 * (len(part) - 1) <= width

    if fits(rest):
        return [rest]
    pair = [part for part in ([*what, *errors], [*what, *costs]) if len(part) > len(what)]
    if all(map(fits, pair)):
        return pair
    short = [number, *(j for j in what if layout.columns[j].name in ("variant", "depth"))]
    return [part for part in ([number, *what], [*short, *errors], [*short, *costs]) if len(part) > len(short)]


ANSI = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}


def _style(name: str, row: Row) -> str:
    if name == "error" and row.error is None:
        return "red" if row.failed else "yellow"
    if name in ("published", "verdict") and row.against and row.against.verdict:
        return {"better": "green", "worse": "red", "consistent": ""}[row.against.verdict.verdict]
    return "bold" if name in ("variant", "depth", "error") else ""


def _fit(layout: _Layout, wanted: Sequence[int], width: int) -> dict[int, int]:
    """Column widths; where they do not fit, the widest columns of words are folded, to no less than 12."""
    sizes = {j: layout.widths[j] for j in wanted}
    words = [j for j in wanted if not layout.columns[j].right]
    while (excess := sum(sizes.values()) + 2 * (len(sizes) - 1) - width) > 0 and words:
        widest = max(words, key=lambda j: sizes[j])
        words.remove(widest)
        sizes[widest] = min(sizes[widest], max(12, sizes[widest] - excess))
    return sizes


def _pad(text: str, size: int, right: bool) -> str:
    space = " " * (size - _cell_width(text))
    return space + text if right else text + space


def _cell_width(text: str) -> int:
    """Columns of a terminal that a text takes: two for the wide letters of East Asia, none for combining marks."""
    if text.isascii():
        return len(text)
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def _markdown(layout: _Layout) -> str:
    from tabulate import tabulate

    table = tabulate(
        [[_escape_markdown(cell) for cell in cells[1:]] for cells in layout.cells],
        headers=[_escape_markdown(header) for header in layout.headers[1:]],
        tablefmt="github",
        colalign=["right" if column.right else "left" for column in layout.columns[1:]],
        disable_numparse=True,
    )
    parts = [
        _escape_markdown(layout.caption),
        table,
        "  \n".join(_escape_markdown(line) for line in layout.notes),
        "\n".join(f"- {_escape_markdown(line)}" for line in layout.means),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _escape_markdown(text: str) -> str:
    return "".join(f"\\{c}" if c in "\\`*_[]<>|~#" else c for c in text)


# --- rows -> numbers ---


def _raw(row: Row) -> dict[str, Any]:
    """A row as plain values, nothing rounded."""
    against = row.against
    values: dict[str, Any] = {
        "variant": row.variant,
        "depth": row.depth,
        "dataset": row.dataset,
        "dataset_is_original": row.original,
        "fingerprint": row.fields.get("fingerprint"),
        "limit_train": row.limit_train,
        "evaluated_on": row.evaluated_on,
        "duration": row.duration,
        "duration_unit": row.duration_unit,
        "overrides": " ".join(row.overrides),
        "loader": row.loader,
        "precision": row.precision,
        "engine": row.engine,
        "device": row.device,
        "workers": row.workers,
        "batch_size": row.batch_size,
        "differs": " ".join(row.differs),
        "averaged_over": " ".join(f"{name}={'/'.join(v)}" for name, v in row.averaged_over.items()),
        "parameters": row.parameters,
        "n": len(row.done),
        "seeds": " ".join(str(stored.record.seed) for stored in row.done),
    }
    for name, value in (("error", row.error), ("best_error", row.best_error), ("top5_error", row.top5_error)):
        values[f"{name}_percent_mean"] = value.mean if value else None
        values[f"{name}_percent_std"] = value.std if value else None
    values |= {
        "best_minus_last_points": row.best_minus_last,
        "epoch_seconds": row.epoch_seconds,
        "eval_seconds": row.eval_seconds,
        "setup_seconds": row.setup_seconds,
        "images_per_second": row.images_per_second,
        "wait_percent": row.wait_share,
        "torch_allocated_mib": row.torch_allocated_mib.value,
        "torch_reserved_mib": row.torch_reserved_mib.value,
        "nvml_process_mib": row.nvml_process_mib.value,
        "rss_mib": row.rss_mib.value,
        "published_error_percent": against.published.error if against else None,
        "published_top5_error_percent": against.published.top5_error if against else None,
        "published_difference_points": against.difference if against else None,
        "published_verdict": against.verdict.verdict if against and against.verdict else None,
        "published_seeds_to_tell": _seeds_to_tell(against),
        "published_p": against.verdict.p if against and against.verdict else None,
        "published_source": against.published.source if against else None,
        "failed": "; ".join(
            f"seed {s.record.seed}: {s.record.failure.kind}" for s in row.failed if s.record.failure
        ),
        "interrupted": "; ".join(f"{p.name}: {_progress(p)}" for p in row.interrupted),
    }
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _seeds_to_tell(against: Against | None) -> int | None:
    if against is None or not against.ours.std:
        return None
    return seeds_to_tell(against.ours.std, against.difference, against.published.n)


def _csv(rows: Sequence[Row]) -> str:
    output = io.StringIO()
    raw = [_raw(row) for row in rows]
    writer = csv.DictWriter(output, list(raw[0]) if raw else [], lineterminator="\n")
    if raw:
        writer.writeheader()
        writer.writerows(raw)
    return output.getvalue()


def _json(rows: Sequence[Row]) -> str:
    columns = (*DESCRIPTORS, *ERRORS, *COSTS)
    notes = [
        {"text": note.text, "cells": [{"row": i, "column": name} for i, name in sorted(note.cells)]}
        for note in make_notes(rows)
    ]
    definitions = [{"column": column.name, "means": column.means} for column in columns if column.means]
    parts = {"rows": [_raw(row) for row in rows], "notes": notes, "definitions": definitions}
    # one value a line: json's own indenting takes twenty times as long, and nobody reads it
    lines = (
        f"{json.dumps(name)}: [\n"
        + ",\n".join(json.dumps(value, ensure_ascii=False, allow_nan=False) for value in values)
        + "\n]"
        for name, values in parts.items()
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"
