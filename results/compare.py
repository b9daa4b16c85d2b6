"""Two sets of runs compared: difference, interval, and whether they are the same within a margin.

A difference is B minus A, so that "error +0.30" means B is worse. Its 90 % interval is the one that is shown, that the
verdict rests on, and that `--fail-on` tests.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Literal, NamedTuple

from harness.results.metrics import METRICS, NONE, Metric, suggest
from harness.results.rows import Row, flatten_spec
from harness.results.statistics import (
    LEVEL,
    Estimate,
    Interval,
    Shift,
    estimate_mean,
    mean,
    median,
    sample,
    shift,
    subtract,
    t_quantile,
)
from harness.results.store import Stored
from harness.results.values import setting

Verdict = Literal["equivalent", "different", "cannot tell"]
IDENTITY = ("variant", "network.depth", "dataset")
IMAGES = ("dataset", "fingerprint", "limit_test", "recipe.val", "recipe.val_stratified")
"""Errors are compared only where these agree: they are then of the same images."""
FOLLOWS: Mapping[str, tuple[str, ...]] = {
    "workers": ("threads", "concurrent runs"),
    "device": ("hardware", "threads", "cpus", "driver", "cuda", "cudnn"),
    "hardware": ("threads", "cpus", "driver", "cuda", "cudnn", "platform"),
    "torch": ("torchvision", "cuda", "cudnn"),
    "variant": ("network.", "recipe.", "overrides"),
}
"""Fields, or beginnings of their names, that may change with the one that `--by` names."""
EXPECTED = {
    "code", "commit", "uncommitted changes", "resnet-harness", "check", "launcher", "host", "parameters", "warm-up epochs",
    "images evaluated", "test images",
}  # fmt: skip
"""What two folders are compared for as a rule, and what follows from it or changes no figure. All else that was not chosen
must be alike: machines and versions."""
SESSION_SPREAD = 0.03  # of seconds, from one session to another: std, as a share
SESSION_GAP = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric of one pair. Difference and interval in points, or in percent of A where the metric is relative."""

    metric: Metric
    a: tuple[float, ...]  # of each run
    b: tuple[float, ...]
    test: Estimate | Shift | None = (
        None  # of the difference: in points, of logarithms where the metric is relative
    )
    how: str = ""  # which test, and what it assumes; or why there is none

    @property
    def difference(self) -> float | None:
        return self._scaled(self.test.value) if self.test else None

    @property
    def interval(self) -> Interval | None:
        if self.test is None:
            return None
        interval = self.test.interval()
        return Interval(self._scaled(interval.low), self._scaled(interval.high))

    @property
    def verdict(self) -> Verdict:
        """Equivalent where the interval lies within the margin, different where it lies beyond it."""
        if (interval := self.interval) is None or (margin := self.metric.margin) is None:
            return "cannot tell"
        lowest = 100 / (1 + margin / 100) - 100 if self.metric.relative else -margin  # a ratio and its inverse
        if lowest < interval.low and interval.high < margin:
            return "equivalent"
        return "different" if interval.low > margin or interval.high < lowest else "cannot tell"

    def __str__(self) -> str:
        """ "+0.50 (+0.41 … +0.59) points" """
        interval, unit = self.interval, "%" if self.metric.relative else "points"
        if self.difference is None or interval is None:
            return self.how
        return f"{signed(self.difference)} ({signed(interval.low)} … {signed(interval.high)}) {unit}"

    def _scaled(self, value: float) -> float:
        return 100 * math.expm1(value) if self.metric.relative else value


@dataclass(frozen=True, slots=True)
class Pair:
    """A row of A and its counterpart; None: there is none."""

    a: Row | None
    b: Row | None
    differs: Mapping[str, tuple[str, str]]  # field -> its value in A and in B
    figures: tuple[Comparison, ...]
    unlike: Mapping[str, tuple[str, str]] = field(
        default_factory=dict
    )  # machines and versions that differ unchosen

    @property
    def name(self) -> str:
        return " → ".join(dict.fromkeys(row.name for row in (self.a, self.b) if row))

    def problems(self) -> Iterator[str]:
        """What forbids to say that B is no worse, whatever the figures."""
        if self.a is None:
            return
        if self.b is None:
            yield "has no counterpart in B"
            return
        before, after = (sorted(_failures(row)) for row in (self.a, self.b))
        if len(after) > len(before):
            yield f"{len(after)} failed in B ({', '.join(after)}), {len(before)} in A"
        elif not self.b.done:
            yield "has no finished run in B"
        for name, (a, b) in self.unlike.items():
            yield f"unlike {name}: {a} → {b} (--across '{name}' overlooks it)"


def _failures(row: Row) -> list[str]:
    """A word for each run that failed or diverged."""
    failed: list[str] = [stored.record.failure.kind for stored in row.failed if stored.record.failure]
    results = [stored.record.result for stored in row.done if stored.record.result]
    return failed + ["NaN" for result in results if not math.isfinite(result.final_error)]


def centre_of(metric: Metric, values: Sequence[float]) -> float:
    """The figure of a side, as its row has it: mean of errors, median of all else."""
    return mean(values) if metric.kind == "error" else median(values)


def signed(value: float) -> str:
    """Two digits with their sign, 0.00 without."""
    text = f"{value:+.2f}".replace("-", "−")
    return "0.00" if text in ("−0.00", "+0.00") else text


# --- which rows are compared ---


def find_metric(name: str) -> Metric:
    """A metric that can be compared. Raises ValueError for another name."""
    known = [metric.name for metric in METRICS.values() if metric.better]
    if name not in known:
        raise ValueError(f"unknown metric {name!r}: {suggest(name, known)}")
    return METRICS[name]


def compare(a: Sequence[Row], b: Sequence[Row], metrics: Sequence[str] = ()) -> list[Pair]:
    """Pair the rows of two sides and compare them. A row without counterpart is a pair of its own.

    Within a pair a field agrees that takes several values on both sides, or several on one that the other has too;
    variant, depth and images wherever they take several. What is constant on a side may be what the comparison is
    about (dali against dataloader). `metrics` are compared in addition to those with a margin. Raises ValueError for
    an unknown metric, and for sides that were evaluated on different images.
    """
    images = [{_images(row) for row in side if row.done} for side in (a, b)]
    if all(images) and not images[0] & images[1]:
        first, second = (next(row for row in side if row.done) for side in (a, b))
        raise ValueError(f"A was evaluated on {_images_of(first)}, B on {_images_of(second)}: not comparable")
    names = []
    for name in sorted({name for row in (*a, *b) for name in row.fields} | {"dataset"}):
        values = [{_value(row, name) for row in side} - {None} for side in (a, b)]
        varies = [len(several) > 1 for several in values]
        always = name in (*IDENTITY, *IMAGES) or values[0] & values[1]
        if all(varies) or (any(varies) and always):
            names.append(name)
    return _match(a, b, names, metrics)


def compare_by(rows: Sequence[Row], by: str, metrics: Sequence[str] = ()) -> list[Pair]:
    """Compare rows that differ in one field alone. A is the field's first value: as given, "precision=fp32,bf16", or
    else in order; B each other one.

    Raises ValueError for an unknown metric, field or value, for a field that has one value only, and for the images.
    """
    by_field, _, chosen = by.partition("=")
    known = sorted({name for row in rows for name in row.fields})
    if by_field not in known:
        raise ValueError(f"no field {by_field!r} in these runs: {suggest(by_field, known)}")
    if by_field in (*IMAGES, "label"):
        raise ValueError(f"{by_field}: errors on different images are not comparable")
    sides: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.done or by_field in row.fields:
            sides[row.fields.get(by_field, NONE)].append(row)
    order = [word.strip() for word in chosen.split(",")] if chosen else sorted(sides, key=_natural)
    if unknown := [value for value in order if value not in sides]:
        raise ValueError(f"no run has {by_field} {unknown[0]!r}: {suggest(unknown[0], sorted(sides))}")
    first, *others = dict.fromkeys(order)
    if not others:
        raise ValueError(f"all runs have {by_field} {first}: nothing to compare")
    follows = FOLLOWS.get(by_field, ())
    bound = ("dataset", *(name for name in known if name != by_field))
    names = [name for name in bound if name in _FIXED or not name.startswith(follows)]
    if any(len({_key(row, names) for row in side if row.done}) < sum(bool(row.done) for row in side)
           for side in sides.values()):  # fmt: skip
        names, follows = list(bound), ()  # rows of one side differ in them
    pairs = [pair for value in others for pair in _match(sides[first], sides[value], names, metrics)]
    allowed = (by_field, *follows)
    return [replace(p, unlike={n: v for n, v in p.unlike.items() if not n.startswith(allowed)}) for p in pairs]


_FIXED = ("network.depth", *IMAGES)


def _value(row: Row, name: str) -> str | None:
    return row.dataset if name == "dataset" else row.fields.get(name)


def _key(row: Row, names: Iterable[str]) -> tuple[str | None, ...]:
    return tuple(_value(row, name) for name in names)


def _images(row: Row) -> tuple[str | None, ...]:
    return (row.evaluated_on, *_key(row, IMAGES))


def _images_of(row: Row) -> str:
    where = "the test set" if row.evaluated_on == "test" else f"{row.fields.get('recipe.val')} images held out"
    tested = setting(row.spec, "limit_test", int)
    limit = f", {tested} images of it" if tested else ""
    return f"{row.dataset} ({where}{limit}, fingerprint {row.fields.get('fingerprint', NONE)[:8]})"


def _natural(value: str) -> tuple[float, str]:
    """Numbers before words, and by size."""
    try:
        return float(value), ""
    except ValueError:
        return math.inf, value


def _match(a: Sequence[Row], b: Sequence[Row], names: Sequence[str], metrics: Sequence[str]) -> list[Pair]:
    """Every row of A with those of B that agree in these fields. A row without a result has no machine to agree in."""
    several = dict.fromkeys([*(name for name, metric in METRICS.items() if metric.margin), *metrics])
    chosen = [find_metric(name) for name in several]
    shared = [name for name in names if all(_value(row, name) is not None for row in (*a, *b))]
    partners: dict[tuple[str | None, ...], list[Row]] = defaultdict(list)
    for row in b:
        partners[_key(row, shared)].append(row)

    def agree(x: Row, y: Row) -> bool:
        known = names if x.done and y.done else [n for n in names if n in x.fields and n in y.fields]
        return _key(x, known) == _key(y, known)

    pairs, matched = [], set()
    for row in a:
        others = [other for other in partners.get(_key(row, shared), ()) if agree(row, other)]
        matched |= set(map(id, others))
        pairs += [_pair(row, other, chosen) for other in others if row.done or other.done]
        pairs += [Pair(row, None, {}, ())] if row.done and not others else []
    return pairs + [Pair(None, row, {}, ()) for row in b if row.done and id(row) not in matched]


def nearest(pairs: Sequence[Pair]) -> list[str]:
    """The fewest fields in which a row of A and one of B differ that have no counterpart."""
    ours, theirs = [p.a for p in pairs if p.a and not p.b][:50], [p.b for p in pairs if p.b and not p.a][:50]
    names = sorted({name for row in (*ours, *theirs) for name in row.fields})
    return min(
        ([n for n in names if x.fields.get(n) != y.fields.get(n)] for x in ours for y in theirs),
        key=len,
        default=[],
    )


def _pair(a: Row, b: Row, metrics: Sequence[Metric]) -> Pair:
    measured = a.done and b.done
    names = sorted(a.fields.keys() | b.fields.keys() if measured else a.fields.keys() & b.fields.keys())
    sides = {name: (a.fields.get(name, NONE), b.fields.get(name, NONE)) for name in names}
    differs = {name: values for name, values in sides.items() if values[0] != values[1]}
    unlike: dict[str, tuple[str, str]] = {}
    if measured:
        ours, theirs = ({n: ", ".join(sorted(found)) for n, found in row.conditions.items()} for row in (a, b))
        noted = {name: (ours[name], theirs[name]) for name in ours if name in theirs}
        chosen = flatten_spec(a.spec).keys() | flatten_spec(b.spec).keys() | EXPECTED
        unlike = {n: both for n, both in {**differs, **noted}.items() if both[0] != both[1] and n not in chosen}
    figures = tuple(judge(metric, a, b) for metric in metrics) if measured else ()
    return Pair(a, b, differs, figures, unlike)


# --- one metric of two rows ---


class _Side(NamedTuple):
    values: list[float]
    runs: list[Stored]
    planned: int | None  # how many of them were not added by --until-ci


def _side(metric: Metric, row: Row) -> _Side:
    runs = sorted(row.done, key=lambda stored: stored.record.added_until is not None)
    known = [(value, run) for run in runs if run.record.result for value in [metric.value(run.record.result)]
             if value is not None and math.isfinite(value)]  # fmt: skip
    added = sum(run.record.added_until is not None for _, run in known)
    return _Side([value for value, _ in known], [run for _, run in known], len(known) - added if added else None)


def judge(metric: Metric, a: Row, b: Row) -> Comparison:
    """One metric of two rows."""
    sides = _side(metric, a), _side(metric, b)
    values = tuple(sides[0].values), tuple(sides[1].values)
    if not all(values):
        return Comparison(metric, *values, how="not measured on both sides")
    if metric.kind == "error":
        images = sides[0].runs[0].record.images(test=metric.name.startswith("test"))
        seeds = [[run.record.seed for run in side.runs] for side in sides]
        return compare_errors(metric, values, images, seeds, (sides[0].planned, sides[1].planned))
    if metric.relative and min(map(min, values)) <= 0:
        return Comparison(metric, *values, how="some are 0: no ratio")
    scale: Callable[[float], float] = math.log if metric.relative else float
    logs = [list(map(scale, side)) for side in values]
    if metric.kind not in ("time", "energy") or not metric.relative:
        return _shift(metric, values, logs, 0.0, "")
    blocks = _sessions(sides[0].runs, sides[1].runs)
    counts = [len(set(side)) for side in blocks]
    if min(counts) >= 3:
        apart = "" if counts == list(map(len, values)) else f", over {counts[0]} and {counts[1]} sessions"
        return _shift(metric, values, [_by_session(*both) for both in zip(logs, blocks, strict=True)], 0.0, apart)
    extra = math.log1p(SESSION_SPREAD) * math.hypot(*(1 / math.sqrt(n) for n in counts))
    extra *= t_quantile(0.5 + LEVEL / 2, math.inf)
    each = "one session each" if counts == [1, 1] else f"{counts[0]} and {counts[1]} sessions"
    return _shift(metric, values, logs, extra, f"; {each}, taken as ±{100 * math.expm1(extra):.0f} %")


def compare_errors(
    metric: Metric,
    values: tuple[tuple[float, ...], tuple[float, ...]],
    images: int | None,
    seeds: Sequence[Sequence[int]] = ((), ()),
    planned: tuple[int | None, int | None] = (None, None),
) -> Comparison:
    """Errors in percent: the difference of their means, by moderated spreads or, where they go together, by seeds."""
    if paired := _paired(values, seeds):
        return Comparison(metric, *values, paired, "paired by seed, Student")
    a, b = (estimate_mean(side, images, first) for side, first in zip(values, planned, strict=True))
    if a is None or b is None:
        return Comparison(metric, *values, how="one run, and the number of test images is unknown")
    return Comparison(metric, *values, subtract(b, a), "Welch, moderated spread" if images else "Welch")


def _paired(values: Sequence[Sequence[float]], seeds: Sequence[Sequence[int]]) -> Estimate | None:
    """Of the differences by seed; None unless all seeds are common and, at 2.5 %, good on one side is good on the other."""
    import numpy as np

    n = len(set(seeds[0]))
    if n < 4 or sorted(seeds[0]) != sorted(seeds[1]) or n < len(seeds[0]):
        return None
    a, b = (np.array(side)[np.argsort(own)] for side, own in zip(values, seeds, strict=True))
    if min(np.ptp(a), np.ptp(b)) == 0:
        return None
    r = min(float(np.corrcoef(a, b)[0, 1]), 1 - 1e-12)
    if r * math.sqrt((n - 2) / (1 - r * r)) < t_quantile(0.975, n - 2):
        return None
    return sample((b - a).tolist()).estimate


def _shift(
    metric: Metric, values: tuple[tuple[float, ...], ...], tested: Sequence[list[float]], extra: float, note: str
) -> Comparison:
    a, b = values
    if test := shift(tested[0], tested[1], extra):
        return Comparison(metric, a, b, test, f"Hodges and Lehmann{note}")
    return Comparison(metric, a, b, how="fewer than 3 runs on a side")


def _sessions(a: Sequence[Stored], b: Sequence[Stored]) -> tuple[list[int], list[int]]:
    """The session of each run: runs of one side in a row on one machine, less than an hour apart."""
    entries = [
        (str(run.record.result and run.record.result.machine.get("host")), run.record.started_at, side, index)
        for side, runs in enumerate((a, b)) for index, run in enumerate(runs)
    ]  # fmt: skip
    sessions, number, last, ended = ([0] * len(a), [0] * len(b)), 0, ("", -1), datetime.min.replace(tzinfo=UTC)
    for host, started, side, index in sorted(entries):
        number += (host, side) != last or started - ended > SESSION_GAP
        sessions[side][index] = number
        last, ended = (host, side), (a, b)[side][index].record.finished_at
    return sessions


def _by_session(values: Sequence[float], sessions: Sequence[int]) -> list[float]:
    together: dict[int, list[float]] = defaultdict(list)
    for value, session in zip(values, sessions, strict=True):
        together[session].append(value)
    return list(map(median, together.values()))
