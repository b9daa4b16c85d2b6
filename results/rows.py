"""Records -> rows.

A row stands for all runs that differ in nothing but the seed. Runs that differ in anything else (a field of the spec,
the device, a worker's threads, torch's minor version) are never averaged silently: they get rows of their own, and
rows that would look the same name what they differ in.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from harness.results.metrics import METRICS, NONE, UNKNOWN, Figure
from harness.results.published import Published, find_published
from harness.results.statistics import Sample, Verdict, compare_with_published
from harness.results.store import Interrupted, Stored, collector_paused
from harness.results.values import Prediction, Record, RunResult, flatten


@dataclass(frozen=True, slots=True)
class Against:
    """Our error beside a published one: difference = ours - published, in points."""

    published: Published
    ours: Sample  # the best epochs where the published number is one, else the last ones
    difference: float
    verdict: Verdict | None  # None: neither side has a spread


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """All runs of one spec but for the seed."""

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
    differs: tuple[str, ...] = ()  # ("recipe.lr=0.05",): distinguishes this row from others that look the same
    averaged_over: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # field -> its values, by --across

    done: tuple[Stored, ...]  # one per seed
    failed: tuple[Stored, ...]
    pruned: tuple[Stored, ...] = ()  # by a search, before their end
    interrupted: tuple[Interrupted, ...]
    repeated: int = 0  # earlier runs of seeds that are counted once

    figures: Mapping[str, Figure]  # by the names of `METRICS`
    by_category_mib: Mapping[str, float] = field(default_factory=dict)  # of the run that used most memory
    against: Against | None = None
    predicted: Prediction | None = None  # by a probe on such a device, with as many threads

    @property
    def name(self) -> str:
        """msra-20, say."""
        return f"{self.variant}-{self.depth}"

    @property
    def error(self) -> Sample | None:
        """Of the last epoch, in percent."""
        return self.figures.get("error", UNKNOWN).sample

    @property
    def epoch_seconds(self) -> float | None:
        """Training only, without warm-up."""
        return self.figures.get("epoch_seconds", UNKNOWN).value

    @property
    def best_minus_last(self) -> float | None:
        """Points by which the error falls where the epoch is chosen on the evaluated images; at most 0."""
        best, last = self.figures.get("best_error", UNKNOWN).value, self.error
        return None if best is None or last is None else best - last.mean


@collector_paused()
def summarise(
    records: Iterable[Stored],
    interrupted: Iterable[Interrupted] = (),
    across: Sequence[str] = (),
    predictions: Iterable[Prediction] = (),
) -> list[Row]:
    """Group runs by everything but the seed, ordered by data set, variant and depth.

    `across` names fields (of `Row.fields`: "workers", "recipe.lr") whose values may be averaged together; the table
    then says so in a footnote. Raises ValueError for a field that no run has.
    """
    groups = _Groups(across)
    without_result = []
    for stored in records:
        if stored.record.result is None:
            without_result.append(stored)
        else:
            groups.find(stored.record.spec, surroundings(stored.record, stored.record.result)).done.append(stored)
    for stored in without_result:
        group = groups.find(stored.record.spec, None)
        (group.pruned if stored.record.pruned else group.failed).append(stored)
    for partial in interrupted:
        groups.find(partial.spec or {"run": partial.name}, None).interrupted.append(partial)
    if unknown := [name for name in across if name not in groups.fields]:
        raise ValueError(f"no field {unknown[0]!r} in these runs: they have {', '.join(sorted(groups.fields))}")
    rows = _add_predictions([_make_row(group) for group in groups.by_identity.values()], predictions)
    rows.sort(key=lambda row: (row.dataset, row.variant, row.depth, row.workers, tuple(row.fields.items())))
    return _name_differences(rows)


# --- which runs belong to one row ---

Surroundings = tuple[tuple[str, str], ...]
SURROUNDINGS = ("label", "hardware", "threads", "torch", "widths")


def surroundings(record: Record, result: RunResult) -> Surroundings:
    """What changes figures without being part of a spec, by name; "hardware" is what the spec calls "cuda" or "cpu".

    Only runs that continued with fewer workers have "widths": neither their seconds nor, since batch norm sees other
    shares of a batch, their errors are averaged with those of others.
    """
    named = {"label": record.dataset, "hardware": result.device, "threads": str(result.threads)}
    if result.widths:
        named["widths"] = "→".join(map(str, result.widths))
    if result.engine is not None and result.engine != record.spec.get("engine"):  # a fallback
        named["engine"] = result.engine
    versions = record.environment.get("versions")
    if isinstance(versions, dict) and isinstance(torch := versions.get("torch"), str):
        named["torch"] = ".".join(torch.split("+")[0].split(".")[:2])
    return tuple(named.items())


@dataclass(slots=True)
class _Group:
    fields: dict[str, str]
    done: list[Stored] = field(default_factory=list)
    failed: list[Stored] = field(default_factory=list)
    pruned: list[Stored] = field(default_factory=list)
    interrupted: list[Interrupted] = field(default_factory=list)
    averaged_over: dict[str, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))


class _Groups:
    """The runs of each identity: all fields of the spec but the seed, and the surroundings."""

    def __init__(self, across: Sequence[str]) -> None:
        self.across = across
        self.fields: set[str] = set()  # of any run
        self.by_identity: dict[str, _Group] = {}
        self._by_spec: dict[str, _Group] = {}  # the first group of each spec
        # runs of other seeds are not flattened again
        self._seen: dict[tuple[str, Surroundings | None], _Group] = {}

    def find(self, spec: Mapping[str, Any], around: Surroundings | None) -> _Group:
        """The group of a run; one without a result has no surroundings and joins the runs of its spec."""
        seen = (repr({name: value for name, value in spec.items() if name != "seed"}), around)
        if seen in self._seen:
            return self._seen[seen]
        own = flatten_spec(spec)
        every = own | dict(around or ())
        self.fields |= every.keys()
        bare = json.dumps({name: value for name, value in own.items() if name not in self.across})
        kept = {name: value for name, value in every.items() if name not in self.across}
        known = self._by_spec.get(bare) if around is None else self.by_identity.get(json.dumps(kept))
        group = known or self.by_identity.setdefault(json.dumps(kept), _Group(kept))
        self._by_spec.setdefault(bare, group)
        for name in self.across:
            if name in every:
                group.averaged_over[name][every[name]] = None
        self._seen[seen] = group
        return group


def flatten_spec(spec: Mapping[str, Any]) -> dict[str, str]:
    """{"recipe": {"lr": 0.1}, "seed": 0} -> {"recipe.lr": "0.1"}, sorted by name, without the seed."""
    return {name: _word(value) for name, value in sorted(flatten(spec)) if name != "seed"}


def _word(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return ",".join(map(_word, value)) or NONE
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return NONE if value is None else str(value)


# --- a group -> a row ---


def _make_row(group: _Group) -> Row:
    done, repeated = _last_of_each_seed(group.done)
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
    limits = (
        limit if isinstance(limit := spec.get(name), int) else None for name in ("limit_train", "limit_test")
    )
    limit_train, limit_test = limits
    largest = max((r.memory.by_category_mib for r in results), key=lambda c: sum(c.values()), default={})
    row = Row(
        variant=variant,
        depth=depth,
        dataset=dataset,
        original=original,
        limit_train=limit_train,
        limit_test=limit_test,
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
        figures={name: metric.summarise(results) for name, metric in METRICS.items()},
        by_category_mib=largest,
    )
    return replace(row, against=judge(row))


def _last_of_each_seed(runs: list[Stored]) -> tuple[list[Stored], int]:
    """The last run of each seed, by seed, and the number of the others: a repeated seed is not another sample."""
    last: dict[tuple[int, str, Surroundings], Stored] = {}
    for run in sorted(runs, key=lambda run: run.record.finished_at):
        if result := run.record.result:  # two devices are two samples, where one row may hold both
            last[run.record.seed, run.record.key, surroundings(run.record, result)] = run
    return [last[key] for key in sorted(last)], len(runs) - len(last)


def _add_predictions(rows: list[Row], predictions: Iterable[Prediction]) -> list[Row]:
    """The rows, each with the last prediction for its spec, device and threads."""
    by_spec: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        by_spec[json.dumps(flatten_spec(prediction.spec))].append(prediction)
    if not by_spec:
        return rows

    def last(row: Row) -> Prediction | None:
        own = json.dumps({name: value for name, value in row.fields.items() if name not in SURROUNDINGS})
        on = (row.device, row.fields.get("threads"))
        fitting = [p for p in by_spec.get(own, ()) if not row.done or (p.device, str(p.threads)) == on]
        return fitting[-1] if fitting else None

    return [replace(row, predicted=last(row)) for row in rows]


def judge(row: Row) -> Against | None:
    """The published number beside a row: only where data, training set and recipe are the published ones, on test
    images."""
    if not row.original or row.limit_train is not None or row.limit_test is not None or row.overrides:
        return None
    published = find_published(row.dataset, row.variant, row.depth)
    if published is None:
        return None
    names = ("error", "top5_error", "best_error")
    if row.evaluated_on != "test":  # the best epoch was then chosen, and measured, on other images
        names = ("test_error", "test_top5_error", "")
    last, top5, best = (row.figures.get(name, UNKNOWN).sample for name in names)
    theirs = published.sample
    if theirs is not None:
        ours = best if published.rule == "best" else last
    else:
        ours, theirs = top5, Sample(1, published.top5_error or math.nan)
    if ours is None or not math.isfinite(ours.mean):
        return None
    return Against(published, ours, ours.mean - theirs.mean, compare_with_published(ours, theirs))


# --- what tells rows apart ---

SHOWN = {
    "variant", "network.depth", "dataset", "label", "limit_train", "overrides", "recipe.duration", "recipe.unit",
    "recipe.batch_size", "loader", "precision", "engine", "workers", "device", "hardware",
}  # fmt: skip
"""Fields that have a column of their own."""
NAMED = {"deterministic"}
"""Fields that are stored only where they are not at their default: named in each row that has them."""


def _name_differences(rows: list[Row]) -> list[Row]:
    """Name, in each row, the fields without a column of their own in which comparable rows differ.

    Networks and recipes are compared within a variant and depth, fingerprints within a data set, all else over all
    rows: two loaders are not comparable where one of them ran with another version of torch.
    """

    def scope(name: str, row: Row) -> tuple[object, ...]:
        if name.startswith(("recipe.", "network.")):
            return (row.dataset, row.variant, row.depth, row.overrides)
        return (row.dataset,) if name == "fingerprint" else ()

    differing: dict[str, set[tuple[object, ...]]] = {}  # field -> the scopes within which it differs
    for name in dict.fromkeys(name for row in rows for name in row.fields if name not in SHOWN):
        having = [row for row in rows if name in row.fields]
        if len({row.fields[name] for row in having}) == 1:  # as most fields are: no scope needs a look
            continue
        values: dict[tuple[object, ...], set[str]] = defaultdict(set)
        for row in having:
            values[scope(name, row)].add(row.fields[name])
        differing[name] = {where for where, several in values.items() if len(several) > 1}

    def extend(row: Row, names: Iterable[str]) -> Row:
        values = ((name, row.fields.get(name, NONE)) for name in names)
        words = [f"{name}={value if len(value) <= 16 else f'{value[:12]}…'}" for name, value in values]
        return replace(row, differs=(*row.differs, *words)) if words else row

    own = [[n for n in row.fields if n in NAMED or scope(n, row) in differing.get(n, ())] for row in rows]
    named = [extend(row, names) for row, names in zip(rows, own, strict=True)]
    # a field that only some of them have: widths of an elastic run
    alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, row in enumerate(named):
        looks = (
            row.variant, row.depth, row.dataset, row.limit_train, row.duration, row.duration_unit, row.overrides,
            row.loader, row.precision, row.engine, row.workers, row.batch_size, row.device, row.differs,
        )  # fmt: skip
        alike[looks].append(index)
    for indices in (several for several in alike.values() if len(several) > 1):
        names = sorted({name for index in indices for name in named[index].fields})
        telling = [n for n in names if len({named[index].fields.get(n) for index in indices}) > 1]
        for index in indices:
            named[index] = extend(named[index], telling)
    return named


def _number(value: object, default: float) -> float:
    """A number of a spec, which nothing has checked."""
    return value if isinstance(value, int | float) else default


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
