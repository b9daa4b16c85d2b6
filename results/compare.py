"""Two sets of runs compared: difference, interval, and whether they are the same within a margin.

A difference is B minus A, so that "error +0.30" means B is worse. It is that of the two figures beside it, those of
`harness report`; its 90 % interval is the one that is shown, that the verdict rests on, and that `--fail-on` tests.
"""

from __future__ import annotations

import math
import statistics
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from harness.results.metrics import METRICS, NONE, Figure, Metric, suggest
from harness.results.rows import Row, flatten_spec
from harness.results.statistics import (
    LEVEL,
    Estimate,
    Interval,
    Shift,
    estimate_mean,
    median,
    shift,
    subtract,
    t_quantile,
)
from harness.results.store import Stored

Verdict = Literal["equivalent", "different", "cannot tell"]
IMAGES = (
    "label", "dataset", "fingerprint", "evaluated_on", "limit_test", "recipe.val", "recipe.val_stratified",
)  # fmt: skip
"""Errors are compared only where these agree: they are then of the same images."""
RULES = tomllib.loads(Path(__file__).with_name("compare.toml").read_text(encoding="utf-8"))
FOLLOWS = {name: tuple(others) for name, others in RULES["follows"].items()}
EXPECTED = frozenset(RULES["expected"])
SESSION_SPREAD = 0.03  # of seconds, from one session to another: std, as a share
SESSION_GAP = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric of one pair. Difference and interval in points, or in percent of A where the metric is relative."""

    metric: Metric
    a: Figure
    b: Figure
    test: Estimate | Shift | None = None  # of B - A: in points, of logarithms where the metric is relative
    how: str = ""  # which test, and what it assumes; or why there is none

    @property
    def difference(self) -> float | None:
        return self._scaled(self.test.value) if self.test else None

    @property
    def interval(self) -> Interval | None:
        return Interval(*map(self._scaled, self.test.interval())) if self.test else None

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
    unlike: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # machines and versions, unchosen

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
    return failed + ["NaN" for result in row.results if not math.isfinite(result.final_error)]


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


def compare(
    a: Sequence[Row], b: Sequence[Row], metrics: Sequence[str] = (), across: Sequence[str] = ()
) -> list[Pair]:
    """Pair the rows of two sides and compare them. A row without counterpart is a pair of its own.

    Within a pair a field agrees that takes several values on both sides, or several on one that the other has too;
    variant, depth and images wherever they take several. What is constant on a side may be what the comparison is
    about (dali against dataloader). `metrics` are compared in addition to those with a margin; `across` may be unlike.
    Raises ValueError for an unknown metric, and for sides that were evaluated on different images.
    """
    images = [{_key(row, IMAGES) for row in side if row.done} for side in (a, b)]
    if all(images) and not images[0] & images[1]:
        ours, theirs = map(sorted, images)
        unlike = [f"{n} {x} → {y}" for n, x, y in zip(IMAGES, ours[0], theirs[0], strict=True) if x != y]
        raise ValueError(f"A and B were evaluated on different images ({', '.join(unlike)}): not comparable")
    names = []
    for name in sorted({name for row in (*a, *b) for name in row.fields}):
        values = [{row.fields[name] for row in side if name in row.fields} for side in (a, b)]
        always = name in ("variant", "network.depth", *IMAGES) or values[0] & values[1]
        fewer, more = sorted(map(len, values))
        if fewer > 1 or (more > 1 and always):
            names.append(name)
    return _match(a, b, names, metrics, across)


def compare_by(
    rows: Sequence[Row], by: str, metrics: Sequence[str] = (), across: Sequence[str] = ()
) -> list[Pair]:
    """Compare rows that differ in one field alone. A is the field's first value: as given, "precision=fp32,bf16", or
    else in order; B each other one.

    Raises ValueError for an unknown metric, field or value, for a field that has one value only, and for the images.
    """
    by_field, _, chosen = by.partition("=")
    known = sorted({name for row in rows for name in row.fields})
    if by_field not in known:
        raise ValueError(f"no field {by_field!r} in these runs: {suggest(by_field, known)}")
    if by_field in IMAGES:
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
    bound = [name for name in known if name != by_field]
    names = [name for name in bound if name in ("network.depth", *IMAGES) or not name.startswith(follows)]
    finished = [[_key(row, names) for row in side if row.done] for side in sides.values()]
    if any(len(set(keys)) < len(keys) for keys in finished):  # rows of one side differ in what follows
        names, follows = bound, ()
    overlooked = (by_field, *follows, *across)
    return [p for value in others for p in _match(sides[first], sides[value], names, metrics, overlooked)]


def _key(row: Row, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(row.fields.get(name, NONE) for name in names)


def _natural(value: str) -> tuple[float, str]:
    """Numbers before words, and by size."""
    try:
        return float(value), ""
    except ValueError:
        return math.inf, value


def _match(
    a: Sequence[Row], b: Sequence[Row], names: Sequence[str], metrics: Sequence[str], overlooked: Sequence[str]
) -> list[Pair]:
    """Every row of A with those of B that agree in these fields; a row without a result has no machine to agree in."""
    several = dict.fromkeys([*(name for name, metric in METRICS.items() if metric.margin), *metrics])
    chosen = [find_metric(name) for name in several]
    shared = [name for name in names if all(name in row.fields for row in (*a, *b))]
    partners: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in b:
        partners[_key(row, shared)].append(row)
    pairs, matched = [], set()
    for row in a:
        alike = partners.get(_key(row, shared), [])
        others = [o for o in alike if not (row.done and o.done) or _key(row, names) == _key(o, names)]
        matched |= set(map(id, others))
        pairs += [_pair(row, other, chosen, tuple(overlooked)) for other in others if row.done or other.done]
        pairs += [Pair(row, None, {}, ())] if row.done and not others else []
    return pairs + [Pair(None, row, {}, ()) for row in b if row.done and id(row) not in matched]


def nearest(pairs: Sequence[Pair]) -> list[str]:
    """The fewest fields in which a row of A and one of B differ that have no counterpart."""
    ours, theirs = [p.a for p in pairs if p.a and not p.b][:50], [p.b for p in pairs if p.b and not p.a][:50]
    differing = [[n for n in sorted(x.fields.keys() | y.fields.keys()) if x.fields.get(n) != y.fields.get(n)]
                 for x in ours for y in theirs]  # fmt: skip
    return min(differing, key=len, default=[])


def _pair(a: Row, b: Row, metrics: Sequence[Metric], overlooked: tuple[str, ...]) -> Pair:
    if not (a.done and b.done):
        common = sorted(a.fields.keys() & b.fields.keys())
        return Pair(a, b, {n: (a.fields[n], b.fields[n]) for n in common if a.fields[n] != b.fields[n]}, ())
    names = sorted(a.fields.keys() | b.fields.keys())
    differs = {n: (x, y) for n, x, y in zip(names, _key(a, names), _key(b, names), strict=True) if x != y}
    ours, theirs = ({n: ", ".join(sorted(found)) for n, found in row.conditions.items()} for row in (a, b))
    noted = {n: (ours[n], theirs[n]) for n in ours if n in theirs and ours[n] != theirs[n]}
    chosen = flatten_spec(a.spec).keys() | flatten_spec(b.spec).keys() | EXPECTED
    unlike = {n: v for n, v in (differs | noted).items() if n not in chosen and not n.startswith(overlooked)}
    return Pair(a, b, differs, tuple(judge(metric, a, b) for metric in metrics), unlike)


# --- one metric of two rows ---


def judge(metric: Metric, a: Row, b: Row) -> Comparison:
    """One metric of two rows."""
    runs: list[list[Stored]] = []
    values: list[list[float]] = []
    for row in (a, b):
        planned_first = sorted(row.done, key=lambda stored: stored.record.added_until is not None)
        known = [(run, value) for run in planned_first if run.record.result
                 if (value := metric.value(run.record.result)) is not None and math.isfinite(value)]  # fmt: skip
        runs.append([run for run, _ in known])
        values.append([value for _, value in known])
    if metric.kind == "error" and all(values):
        images = runs[0][0].record.images(test=metric.name.startswith("test"))
        seeds = [[run.record.seed for run in side] for side in runs]
        planned = [sum(run.record.added_until is None for run in side) for side in runs]
        return compare_errors(metric, values, images, seeds, planned)
    figures = _figures(metric, values)
    if not all(values):
        return Comparison(metric, *figures, how="not measured on both sides")
    if metric.relative and min(map(min, values)) <= 0:
        return Comparison(metric, *figures, how="some are 0: no ratio")
    scale = math.log if metric.relative else float
    scaled: Sequence[list[float]] = [list(map(scale, side)) for side in values]
    a_value, b_value = (scale(figure.value or 0.0) for figure in figures)
    extra, note = 0.0, ""
    if metric.relative and metric.kind in ("time", "energy"):
        scaled, extra, note = _in_sessions(runs, scaled)
    if test := shift(b_value - a_value, scaled[0], scaled[1], extra):
        return Comparison(metric, *figures, test, f"Mann and Whitney{note}")
    return Comparison(metric, *figures, how="fewer than 3 runs on a side")


def _figures(metric: Metric, values: Sequence[Sequence[float]]) -> tuple[Figure, Figure]:
    a, b = (metric.combine(v) if v else Figure(None) for v in values)
    return a, b


def compare_errors(
    metric: Metric,
    values: Sequence[Sequence[float]],
    images: int | None,
    seeds: Sequence[Sequence[int]] = ((), ()),
    planned: Sequence[int] = (0, 0),  # how many of each side --until-ci did not add; 0: all count
) -> Comparison:
    """Errors in percent: the difference of their means, by moderated spreads or, where they go together, by seeds."""
    figures = _figures(metric, values)
    if paired := _paired(values, seeds):
        return Comparison(metric, *figures, paired, "paired by seed, Student")
    a, b = (estimate_mean(side, images, first or None) for side, first in zip(values, planned, strict=True))
    if a is None or b is None:
        return Comparison(metric, *figures, how="one run, and the number of test images is unknown")
    return Comparison(metric, *figures, subtract(b, a), "Welch, moderated spread" if images else "Welch")


def _paired(values: Sequence[Sequence[float]], seeds: Sequence[Sequence[int]]) -> Estimate | None:
    """Of the differences by seed; None unless all seeds are common and, at 2.5 %, good on one side is good on the other."""
    one, two = (dict(zip(own, side, strict=False)) for own, side in zip(seeds, values, strict=True))
    n = len(one)
    if n < 4 or one.keys() != two.keys() or n < max(map(len, values)):
        return None
    a, b = list(one.values()), [two[seed] for seed in one]
    if min(max(a) - min(a), max(b) - min(b)) == 0:
        return None
    r = min(statistics.correlation(a, b), 1 - 1e-12)
    if r * math.sqrt((n - 2) / (1 - r * r)) < t_quantile(0.975, n - 2):
        return None
    return estimate_mean([y - x for x, y in zip(a, b, strict=True)], None)


def _by_session(runs: Sequence[Sequence[Stored]], values: Sequence[Sequence[float]]) -> list[list[list[float]]]:
    """Of either side the values of each session: of runs of one side in a row on one machine, less than an hour apart."""
    entries = [
        (str(run.record.result and run.record.result.machine.get("host")), run.record.started_at, side, index)
        for side, several in enumerate(runs) for index, run in enumerate(several)
    ]  # fmt: skip
    sessions: list[list[list[float]]] = [[], []]
    last, ended = ("", -1), datetime.min.replace(tzinfo=UTC)
    for host, started, side, index in sorted(entries):
        if (host, side) != last or started - ended > SESSION_GAP:
            sessions[side].append([])
        sessions[side][-1].append(values[side][index])
        last, ended = (host, side), runs[side][index].record.finished_at
    return sessions


def _in_sessions(
    runs: Sequence[Sequence[Stored]], values: Sequence[list[float]]
) -> tuple[Sequence[list[float]], float, str]:
    """What is tested, how much sessions add to half the interval, and a note: from three a side on their medians are tested."""
    sessions = _by_session(runs, values)
    a, b = map(len, sessions)
    if min(a, b) >= 3:
        note = "" if [a, b] == list(map(len, values)) else f", over {a} and {b} sessions"
        return [list(map(median, side)) for side in sessions], 0.0, note
    extra = t_quantile(0.5 + LEVEL / 2, math.inf) * math.log1p(SESSION_SPREAD) * math.hypot(a**-0.5, b**-0.5)
    each = "one session each" if a == b == 1 else f"{a} and {b} sessions"
    return values, extra, f"; {each}, taken as ±{100 * math.expm1(extra):.0f} %"
