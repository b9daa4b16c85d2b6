"""Records -> rows.

A row stands for all runs that differ in nothing but the seed. Runs that differ in anything else (a field of the
spec, the device, a worker's threads, torch's minor version) are never averaged together silently: they get rows
of their own, and rows that would look the same say in what they differ.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from harness.results.published import Published, find_published
from harness.results.statistics import Sample, Verdict, compare_with_published, median, sample
from harness.results.store import Interrupted, Stored, collector_paused
from harness.results.values import Measurement, Prediction, Record, RunResult

NONE = "–"
UNMEASURED = Measurement(value=None)


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
    limit_test: int | None
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
    pruned: tuple[Stored, ...] = ()  # by a search, before their end
    interrupted: tuple[Interrupted, ...]
    repeated: int = 0  # earlier runs of seeds that are counted once

    parameters: int | None = None
    error: Sample | None = None  # last epoch
    best_error: Sample | None = None
    top5_error: Sample | None = None  # last epoch
    test_error: Sample | None = None  # last epoch, where the errors above are of images held out
    test_top5_error: Sample | None = None
    epoch_seconds: float | None = None
    eval_seconds: float | None = None
    setup_seconds: float | None = None
    images_per_second: float | None = None
    data_stall_percent: float | None = None  # percent
    energy_joules: float | None = None  # of a whole run, while it trained
    torch_allocated_mib: Measurement = UNMEASURED
    torch_reserved_mib: Measurement = UNMEASURED
    nvml_process_mib: Measurement = UNMEASURED
    rss_mib: Measurement = UNMEASURED
    by_category_mib: Mapping[str, float] = field(
        default_factory=dict
    )  # of the run that used most; empty: not recorded
    against: Against | None = None
    predicted: Prediction | None = None  # by a probe on such a device, with as many threads

    @property
    def predicted_epoch_seconds(self) -> float | None:
        """Seconds per epoch as a probe predicted them."""
        return self.predicted.epoch_seconds if self.predicted else None

    @property
    def name(self) -> str:
        """msra-20, say."""
        return f"{self.variant}-{self.depth}"

    @property
    def best_minus_last(self) -> float | None:
        """Points that choosing the epoch by the error shown would take off; at most 0."""
        return self.best_error.mean - self.error.mean if self.error and self.best_error else None


@collector_paused()
def summarise(
    done_and_failed: Iterable[Stored],
    interrupted: Iterable[Interrupted] = (),
    across: Sequence[str] = (),
    predictions: Iterable[Prediction] = (),
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
        found = group(stored.record.spec, None)
        (found.pruned if stored.record.pruned else found.failed).append(stored)
    for partial in interrupted:
        group(partial.spec or {"run": partial.name}, None).interrupted.append(partial)
    if unknown := [name for name in across if name not in known]:
        raise ValueError(f"no field {unknown[0]!r} in these runs: they have {', '.join(sorted(known))}")
    rows = _predicted([_make_row(group) for group in groups.values()], predictions)
    rows.sort(key=lambda row: (row.dataset, row.variant, row.depth, row.workers, tuple(row.fields.items())))
    return _tell_apart(rows)


@dataclass(slots=True)
class _Group:
    fields: dict[str, str]
    done: list[Stored] = field(default_factory=list)
    failed: list[Stored] = field(default_factory=list)
    pruned: list[Stored] = field(default_factory=list)
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
AROUND = ("label", "hardware", "threads", "torch", "widths")


def _surroundings(record: Record, result: RunResult) -> Surroundings:
    """What changes figures and is no part of a spec, by name; "hardware" is what the spec calls "cuda" or "cpu".

    "widths" is of runs alone that went on with fewer workers: neither their seconds nor, since batch norm sees
    other shares of a batch, their errors are averaged with those of others.
    """
    around: Surroundings = (
        ("label", record.dataset), ("hardware", result.device), ("threads", str(result.threads)),
    )  # fmt: skip
    if result.widths:
        around = (*around, ("widths", "→".join(map(str, result.widths))))
    if result.engine is not None and result.engine != record.spec.get("engine"):  # the one asked for did not work
        around = (*around, ("engine", result.engine))
    versions = record.environment.get("versions")
    if isinstance(versions, dict) and isinstance(torch := versions.get("torch"), str):
        return (*around, ("torch", ".".join(torch.split("+")[0].split(".")[:2])))
    return around


def _make_row(group: _Group) -> Row:
    done, repeated = _one_a_seed(group.done)
    members = [*done, *group.failed, *group.pruned]
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
    limit, limit_test = spec.get("limit_train"), spec.get("limit_test")
    row = Row(
        variant=variant,
        depth=depth,
        dataset=dataset,
        original=original,
        limit_train=limit if isinstance(limit, int) else None,
        limit_test=limit_test if isinstance(limit_test, int) else None,
        overrides=tuple(map(str, overrides)) if isinstance(overrides := spec.get("overrides"), list) else (),
        duration=_number(recipe.get("duration"), math.nan),
        duration_unit=str(recipe.get("unit", "epoch")),
        loader=str(spec.get("loader", NONE)),
        precision=str(spec.get("precision", NONE)),
        engine=group.fields.get("engine", NONE),
        device=first.device if first else NONE,
        workers=first.workers if first else int(_number(spec.get("workers"), 1)),
        batch_size=first.batch_size if first else int(_number(recipe.get("batch_size"), 0)),
        evaluated_on=first.evaluated_on if first else ("val" if recipe.get("val") else "test"),
        fields=group.fields,
        averaged_over={n: tuple(v) for n, v in group.averaged_over.items() if len(v) > 1},
        done=tuple(done),
        failed=tuple(s for s in group.failed if s.record.seed not in finished_seeds),
        pruned=tuple(s for s in group.pruned if s.record.seed not in finished_seeds),
        interrupted=tuple(group.interrupted),
        repeated=repeated,
        **(_measure(results) if results else {}),
    )
    against = _against(row)
    return replace(row, against=against) if against else row


def _predicted(rows: list[Row], predictions: Iterable[Prediction]) -> list[Row]:
    """The rows with the last prediction of each spec beside them, where it was made for what the row ran on."""
    by_spec: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        by_spec[json.dumps(_flatten(prediction.spec))].append(prediction)
    if not by_spec:
        return rows
    told = []
    for row in rows:
        fields = {name: value for name, value in row.fields.items() if name not in AROUND}
        for prediction in by_spec.get(json.dumps(fields), ()):
            where = (prediction.device, str(prediction.threads))
            if not row.done or where == (row.device, row.fields.get("threads")):
                row = replace(row, predicted=prediction)
        told.append(row)
    return told


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

    def peak(get: Callable[[RunResult], Measurement]) -> Measurement:
        readings = [get(result) for result in results]
        values = [reading.value for reading in readings if reading.value is not None]
        return Measurement(value=max(values)) if values else readings[0]

    def spread(get: Callable[[RunResult], float | None]) -> Sample | None:
        values = [value for result in results if (value := get(result)) is not None]
        return sample(values) if len(values) == len(results) else None

    return {
        "parameters": results[0].parameters,
        "error": sample([result.final_error for result in results]),
        "best_error": sample([result.best_error for result in results]),
        "top5_error": spread(lambda result: result.final_top5_error),
        "test_error": spread(lambda result: result.test_error),
        "test_top5_error": spread(lambda result: result.test_top5_error),
        "epoch_seconds": middle(lambda result: result.epoch_seconds),
        "eval_seconds": middle(lambda result: result.eval_seconds),
        "setup_seconds": middle(lambda result: result.setup_seconds),
        "images_per_second": middle(lambda result: result.images_per_second),
        "data_stall_percent": middle(lambda result: result.data_stall_percent),
        "energy_joules": middle(lambda result: result.energy_joules.value),
        "torch_allocated_mib": peak(lambda result: result.memory.torch_allocated_mib),
        "torch_reserved_mib": peak(lambda result: result.memory.torch_reserved_mib),
        "nvml_process_mib": peak(lambda result: result.memory.nvml_process_mib),
        "rss_mib": peak(lambda result: result.memory.rss_mib),
        "by_category_mib": _owners(results),
    }


def _owners(results: Sequence[RunResult]) -> Mapping[str, float]:
    """Who held the memory of the run that used most, of those that say so."""

    return max(
        (result.memory.by_category_mib for result in results), key=lambda categories: sum(categories.values())
    )


def _against(row: Row) -> Against | None:
    """The published number, only where data, training set and recipe are the published ones, on test images."""
    if not row.original or row.limit_train is not None or row.limit_test is not None or row.overrides:
        return None
    published = find_published(row.dataset, row.variant, row.depth)
    if published is None:
        return None
    last, top5, best = row.error, row.top5_error, row.best_error
    if row.evaluated_on != "test":  # the best epoch was then chosen, and measured, on other images
        last, top5, best = row.test_error, row.test_top5_error, None
    theirs = published.sample
    if theirs is not None:
        ours = best if published.rule == "best" else last
    else:
        ours, theirs = top5, Sample(1, published.top5_error or math.nan)
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
            return (row.dataset, row.variant, row.depth, row.overrides)
        return (row.dataset,) if name == "fingerprint" else ()

    differing: dict[str, set[tuple[object, ...]]] = {}  # field -> the scopes within which it differs
    for name in dict.fromkeys(name for row in rows for name in row.fields if name not in SHOWN):
        having = [row for row in rows if name in row.fields]
        if len({row.fields[name] for row in having}) == 1:  # as most fields are: told without looking at scopes
            continue
        values: dict[tuple[object, ...], set[str]] = defaultdict(set)
        for row in having:
            values[scope(name, row)].add(row.fields[name])
        differing[name] = {where for where, found in values.items() if len(found) > 1}
    told = []
    for row in rows:
        telling = [name for name in row.fields if name in differing and scope(name, row) in differing[name]]
        words = tuple(f"{name}={_brief(row.fields[name])}" for name in telling)
        told.append(replace(row, differs=words) if words else row)
    # runs of an older program may lack a field: then its absence is the difference
    alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, row in enumerate(told):
        looks = (
            row.variant, row.depth, row.dataset, row.limit_train, row.duration, row.duration_unit, row.overrides,
            row.loader, row.precision, row.engine, row.workers, row.batch_size, row.device, row.differs,
        )  # fmt: skip
        alike[looks].append(index)
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
