"""Two sets of runs compared: difference, interval, whether they are the same within a margin, and `compare --fail-on`.

A difference is B minus A, so that "error +0.30" means B is worse. It is that of the two figures beside it, those of
`harness report`; its 90 % interval is the one that is shown, that the verdict rests on, and that `--fail-on` tests.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

from harness.results.metrics import METRICS, NONE, Figure, Metric
from harness.results.rows import FIELDS, TIMED, Row, flatten_spec
from harness.results.statistics import (
    ALPHA,
    LEVEL,
    Estimate,
    Interval,
    Shift,
    estimate_mean,
    holm,
    scatter,
    squared_spread,
    t_quantile,
)
from harness.results.values import Record
from harness.words import unknown

IMAGES = tuple(FIELDS["images"])
SESSION_SPREAD = 0.03  # of seconds, from one session to another, assumed: std, as a share
SESSION_GAP = timedelta(hours=1)
Test = Estimate | Shift
Side = Sequence[tuple[Record, float]]
"""Runs, each with its figure."""
Matched = tuple[Row | None, Row | None]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric of one pair. Difference and interval in points, or in percent of A where the metric is relative."""

    metric: Metric
    a: Figure
    b: Figure
    test: Test | None = None  # of B - A: in points, of logarithms where the metric is relative
    how: str = ""  # which test, and what it assumes; or why there is none
    disturbed: bool = False  # whether it is of disturbed epochs, on either side

    @property
    def difference(self) -> float | None:
        return self._scaled(self.test.value) if self.test else None

    @property
    def interval(self) -> Interval | None:
        return Interval(*map(self._scaled, self.test.interval())) if self.test else None

    @property
    def verdict(self) -> Literal["equivalent", "different", "cannot tell"]:
        """Equivalent where the interval lies within the margin, different where it lies beyond it. Of disturbed epochs it says
        nothing."""
        if (interval := self.interval) is None or (margin := self.metric.margin) is None or self.disturbed:
            return "cannot tell"
        if -margin < interval.low and interval.high < margin:
            return "equivalent"
        return "different" if interval.low > margin or interval.high < -margin else "cannot tell"

    def __str__(self) -> str:
        """ "+0.50 (+0.41 … +0.59) points" """
        interval, unit = self.interval, "%" if self.metric.relative else "points"
        if self.difference is None or interval is None:
            return self.how
        return f"{signed(self.difference)} ({signed(interval.low)} … {signed(interval.high)}) {unit}"

    def _scaled(self, value: float) -> float:
        return 100 * math.expm1(value) if self.metric.relative else value


class Pair(NamedTuple):
    """A row of A and its counterpart; None: there is none."""

    a: Row | None
    b: Row | None
    differs: Mapping[str, tuple[str, str]] = {}  # field -> its value in A and in B
    figures: tuple[Comparison, ...] = ()
    unlike: Mapping[str, tuple[str, str]] = {}  # machines and versions, unchosen
    apart: Sequence[str] = ()  # fields that tell it from others of its networks and images

    @property
    def name(self) -> str:
        """ "msra-20 → msra-32 digits", "msra-20 digits loader dali" """
        rows = [row for row in (self.a, self.b) if row]
        apart = ([f"{name} {row.text(name)}" for row in rows] for name in self.apart)
        parts = ([row.name for row in rows], [row.dataset for row in rows], *apart)
        return " ".join(" → ".join(dict.fromkeys(part)) for part in parts)

    def problems(self) -> Iterator[str]:
        """What forbids to say that B is no worse, whatever the figures."""
        if self.a is None:
            return
        if self.b is None:
            yield "has no counterpart in B"
            return
        before, after = (
            sorted(stored.record.failure.kind for stored in row.failed if stored.record.failure)
            + ["NaN" for result in row.results if not math.isfinite(result.final_error)]
            for row in (self.a, self.b)
        )
        if len(after) > len(before):
            yield f"{len(after)} failed in B ({', '.join(after)}), {len(before)} in A"
        elif not self.b.done:
            yield "has no finished run in B"
        for name, (a, b) in self.unlike.items():
            yield f"unlike {name}: {a} → {b} (--across '{name}' overlooks it)"


def signed(value: float) -> str:
    """Two digits with their sign, 0.00 without."""
    text = f"{value:+,.2f}".replace("-", "−")
    return "0.00" if text[1:] == "0.00" else text


# --- which rows are compared ---


def compare(
    a: Sequence[Row], b: Sequence[Row], metrics: Sequence[str] = (), across: Sequence[str] = ()
) -> list[Pair]:
    """Pair the rows of two sides and compare them. A row without counterpart is a pair of its own.

    Within a pair a field agrees that takes several values on a side, if both sides have one of them; variant, depth and
    images wherever they take several. Any other may be what the comparison is about (dali against dataloader). `metrics`
    are compared in addition to those with a margin; `across` may be unlike. Raises ValueError for sides that were evaluated on different images.
    """
    images = [{_key(row, IMAGES) for row in side if row.done} for side in (a, b)]
    if all(images) and not images[0] & images[1]:
        ours, theirs = map(min, images)
        unlike = [f"{n} {x} → {y}" for n, x, y in zip(IMAGES, ours, theirs, strict=True) if x != y]
        raise ValueError(f"A and B were evaluated on different images ({', '.join(unlike)}): not comparable")
    names = []
    for name in sorted({name for row in (*a, *b) for name in row.fields}):
        in_a, in_b = ({row.fields[name] for row in side if name in row.fields} for side in (a, b))
        always = name in ("variant", "network.depth", *IMAGES)
        if max(len(in_a), len(in_b)) > 1 and (always or in_a & in_b):
            names.append(name)
    return _compare_all(_match(a, b, names), metrics, across)


def compare_by(
    rows: Sequence[Row], by: str, metrics: Sequence[str] = (), across: Sequence[str] = ()
) -> list[Pair]:
    """Compare rows that differ in one field alone. A is the field's first value: as given, "precision=fp32,bf16", or
    else in order; B each other one.

    Raises ValueError for an unknown field or value, for a field that has one value only, and for the images.
    """
    by_field, _, chosen = by.partition("=")
    known = sorted({name for row in rows for name in row.fields})
    if by_field not in known:
        raise ValueError(unknown("field", by_field, known))
    if by_field in IMAGES:
        raise ValueError(f"{by_field}: errors on different images are not comparable")
    sides: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.done or by_field in row.fields:
            sides[row.fields.get(by_field, NONE)].append(row)
    order = [word.strip() for word in chosen.split(",")] if chosen else sorted(sides, key=_natural)
    if wrong := [value for value in order if value not in sides]:
        raise ValueError(f"no run has such a value: {unknown(by_field, wrong[0], sorted(sides))}")
    first, *others = dict.fromkeys(order)
    if not others:
        raise ValueError(f"all runs have {by_field} {first}: nothing to compare")
    part = by_field.partition(".")[0] + "."  # of a recipe's or network's field
    follows = tuple(FIELDS["follows"].get(by_field, FIELDS["follows"].get(part, ())))
    bound = [name for name in known if name != by_field]
    names = [name for name in bound if name in ("network.depth", *IMAGES) or not name.startswith(follows)]
    finished = [[_key(row, names) for row in side if row.done] for side in sides.values()]
    if any(len(set(keys)) < len(keys) for keys in finished):  # rows of one side differ in what follows
        names, follows = bound, ()
    overlooked = (by_field, *follows, *across)
    matched = [both for value in others for both in _match(sides[first], sides[value], names)]
    return _compare_all(matched, metrics, overlooked)


def _key(row: Row, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(row.fields.get(name, NONE) for name in names)


def _natural(value: str) -> tuple[float, str]:
    """Numbers before words, and by size."""
    try:
        return float(value), ""
    except ValueError:
        return math.inf, value


def _match(a: Sequence[Row], b: Sequence[Row], names: Sequence[str]) -> list[Matched]:
    """Every row of A with those of B that agree in these fields; a row without a result has no machine to agree in."""
    shared = [name for name in names if all(name in row.fields for row in (*a, *b))]
    partners: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in b:
        partners[_key(row, shared)].append(row)
    both, matched = list[Matched](), set[int]()
    for row in a:
        alike = partners.get(_key(row, shared), [])
        others = [o for o in alike if not (row.done and o.done) or _key(row, names) == _key(o, names)]
        matched |= set(map(id, others))
        both += [(row, other) for other in others if row.done or other.done]
        both += [(row, None)] if row.done and not others else []
    return both + [(None, row) for row in b if row.done and id(row) not in matched]


def _compare_all(matched: Sequence[Matched], metrics: Sequence[str], overlooked: Sequence[str]) -> list[Pair]:
    """By the scatter of all rows, each once: beside several others, A's chance spread would count with every one of them."""
    done = {id(row): row for both in matched for row in both if row and row.done}.values()
    spread = {name: _find_scatter(done, name) for name, metric in METRICS.items() if metric.kind == "error"}
    of = sum(None not in both for both in matched)
    pairs = [_pair(x, y, metrics, tuple(overlooked), spread, of) if x and y else Pair(x, y) for x, y in matched]
    rows, apart = [x or y for x, y in matched], ["variant", "network.depth", "label"]
    for name in dict.fromkeys(n for row in rows if row for n in (*FIELDS["shown"], *row.fields)):
        before, after = ({_key(row, names) for row in rows if row} for names in (apart, [*apart, name]))
        apart += [name] * (len(after) > len(before))
    return [pair._replace(apart=apart[3:]) for pair in pairs]


def nearest(pairs: Sequence[Pair]) -> list[str]:
    """The fewest fields in which a row of A and one of B differ that have no counterpart."""
    ours, theirs = [p.a for p in pairs if p.a and not p.b][:50], [p.b for p in pairs if p.b and not p.a][:50]
    return min((list(_differences(x.fields, y.fields)) for x in ours for y in theirs), key=len, default=[])


def _differences(a: Mapping[str, str], b: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    both = {name: (a.get(name, NONE), b.get(name, NONE)) for name in sorted(a.keys() | b.keys())}
    return {name: values for name, values in both.items() if values[0] != values[1]}


def _find_scatter(rows: Collection[Row], name: str) -> float:
    """How many times the noise of the test images runs scatter in this error."""
    sides = [side for row in rows if (side := row.measured(name))]
    return scatter(squared_spread([e for _, e in side], n) for side in sides if (n := _images(side, name)))


def _images(side: Side, name: str) -> int | None:
    """How many images an error is of."""
    return side[0][0].images(test=name.startswith("test"))


def _pair(
    a: Row, b: Row, metrics: Sequence[str], overlooked: tuple[str, ...], spread: Mapping[str, float], of: int
) -> Pair:
    differs = _differences(a.fields, b.fields)
    if not (a.done and b.done):
        return Pair(a, b, {n: values for n, values in differs.items() if n in a.fields and n in b.fields})
    ours, theirs = ({n: ", ".join(sorted(found)) for n, found in row.conditions.items()} for row in (a, b))
    noted = {n: values for n, values in _differences(ours, theirs).items() if n in ours and n in theirs}
    chosen = {*flatten_spec(a.spec), *flatten_spec(b.spec), *FIELDS["expected"]}
    unlike = {n: v for n, v in (differs | noted).items() if n not in chosen and not n.startswith(overlooked)}
    # of the test set beside that of images held out, where it is measured
    usual = [n for n, m in METRICS.items() if m.margin and (n != "test_error" or a.figures[n].n + b.figures[n].n)]
    names = dict.fromkeys([*usual, *metrics])
    figures = tuple(judge(METRICS[name], a, b, spread.get(name, 1.0), of) for name in names)
    return Pair(a, b, differs, figures, unlike)


# --- one metric of two rows ---


def judge(metric: Metric, a: Row, b: Row, spread: float = 1.0, of: int = 1) -> Comparison:
    """One metric of two rows, which are one of so many pairs, whose runs `scatter` so much."""
    sides = [row.measured(metric.name) for row in (a, b)]
    figures = a.figures[metric.name], b.figures[metric.name]
    known = [figure.value for figure in figures if figure.value is not None and math.isfinite(figure.value)]
    test: Test | None = None
    if len(known) < 2:
        how = "not measured on both sides"
    elif (
        min(map(len, sides)) < 3
    ):  # of seconds no interval of 90 % exists, of errors one that rests on the images alone
        how = "fewer than 3 runs on a side"
    elif metric.kind == "error":
        test, how = compare_errors(sides, _images(sides[0], metric.name), spread, of)
    elif metric.relative and any(value <= 0 for side in sides for _, value in side):
        how = "some are 0: no ratio"
    else:
        scale = math.log if metric.relative else float
        values = [[scale(value) for _, value in side] for side in sides]
        extra, how = 0.0, "Mann-Whitney"
        if metric.relative and metric.kind in ("time", "energy"):
            values, extra, note = _in_sessions(sides, values)
            how += note
        test = Shift(scale(known[1]) - scale(known[0]), tuple(values[0]), tuple(values[1]), extra)
    disturbed = any(result.all_disturbed for row in (a, b) for result in row.results)
    return Comparison(metric, *figures, test, how, disturbed and metric.name in TIMED)


def compare_errors(
    sides: Sequence[Side], images: int | None, spread: float = 1.0, of: int = 1
) -> tuple[Test | None, str]:
    """The difference of two means of errors in percent, and how it was tested: by moderated spreads or, where they go
    together, by seeds."""
    if paired := _paired(sides, of):
        return paired, "paired t-test, by seed"
    planned = [sum(record.added_until is None for record, _ in side) or None for side in sides]
    a, b = (estimate_mean([e for _, e in side], images, n, spread) for side, n in zip(sides, planned, strict=True))
    return b - a if a and b else None, "Welch, moderated variance" if images else "Welch"


def _paired(sides: Sequence[Side], of: int) -> Estimate | None:
    """Of the differences by seed; None unless all seeds are common and good on one side is good on the other: at 2.5 % over all
    pairs of rows, as chance gives a pair that goes together too small a spread."""
    one, two = ({record.seed: error for record, error in side} for side in sides)
    n = len(one)
    if n < 4 or one.keys() != two.keys() or n < max(map(len, sides)):
        return None
    a, b = list(one.values()), [two[seed] for seed in one]
    if min(max(a) - min(a), max(b) - min(b)) == 0:
        return None
    r = min(statistics.correlation(a, b), 1 - 1e-12)
    if r <= 0 or r * math.sqrt((n - 2) / (1 - r * r)) < t_quantile(1 - 0.025 / of, n - 2):
        return None
    return estimate_mean([y - x for x, y in zip(a, b, strict=True)], None)


def _in_sessions(sides: Sequence[Side], values: list[list[float]]) -> tuple[list[list[float]], float, str]:
    """What is tested, how much sessions add to half the interval, and a note: from three a side on their medians are tested.

    A session is what one side ran in a row on one machine, less than an hour apart.
    """
    runs = sorted(
        (str(record.result and record.result.machine.get("host")), record.started_at, side, record.finished_at, value)
        for side, several in enumerate(sides) for (record, _), value in zip(several, values[side], strict=True)
    )  # fmt: skip
    begins = [True, *((a[0], a[2]) != (b[0], b[2]) or b[1] - a[3] > SESSION_GAP for a, b in pairwise(runs))]
    sessions: list[dict[int, list[float]]] = [defaultdict(list), defaultdict(list)]
    for number, (_, _, side, _, value) in zip(accumulate(begins), runs, strict=True):
        sessions[side][number].append(value)
    a, b = map(len, sessions)
    if min(a, b) >= 3:
        note = "" if [a, b] == list(map(len, values)) else f", over {a} and {b} sessions"
        return [list(map(statistics.median, side.values())) for side in sessions], 0.0, note
    extra = t_quantile(0.5 + LEVEL / 2, math.inf) * math.log1p(SESSION_SPREAD) * math.hypot(a**-0.5, b**-0.5)
    each = "one session each" if a == b == 1 else f"{a} and {b} sessions"
    return values, extra, f"; {each}, assumed to differ by ±{100 * math.expm1(extra):.0f} %"


# --- compare --fail-on ---


class Condition(NamedTuple):
    """error>+0.3: B's error is more than 0.3 points above A's; epoch_seconds>5%: B's epochs take over 5 % longer."""

    metric: str
    above: bool
    limit: float
    percent: bool

    def __str__(self) -> str:
        return f"{self.metric}{'>' if self.above else '<'}{self.limit:+g}{'%' if self.percent else ''}"

    def on(self, figure: Comparison) -> tuple[Test, float] | None:
        """The test and the limit on its scale, both mirrored for "<"; None where there is none."""
        relative, centre = figure.metric.relative, figure.a.value
        limit = self.limit / 100 if self.percent else self.limit
        if figure.test is None or centre is None or (relative != self.percent and centre == 0):
            return None
        if relative != self.percent:
            limit = limit / centre if relative else limit * centre
        if relative:
            limit = math.log1p(limit) if limit > -1 else -math.inf
        return (figure.test, limit) if self.above else (-figure.test, -limit)


def parse_fail_on(text: str) -> list[Condition]:
    """Read 'error>+0.3,epoch_seconds>5%'. Raises ValueError, in one line, for what does not parse."""
    conditions = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*([<>])\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*(%?)\s*", part)
        if match is None:
            raise ValueError(f"cannot read {part.strip()!r}: write conditions like error>+0.3,epoch_seconds>5%")
        name, sign, limit, percent = match.groups()
        if name not in (known := [metric.name for metric in METRICS.values() if metric.better]):
            raise ValueError(unknown("metric", name, known))
        conditions.append(Condition(name, sign == ">", float(limit), bool(percent)))
    return conditions


class Gate(NamedTuple):
    """What `--fail-on` comes to: lines for what fails, and for what the runs cannot tell."""

    failed: list[str]
    unclear: list[str]


def check_conditions(pairs: Sequence[Pair], conditions: Sequence[Condition]) -> Gate:
    """Test every pair, each condition at 5 % over all pairs (Holm).

    A condition is met where the difference is beyond its limit and, by Holm's p, beyond 0 (or the limit, if that is less): the
    interval's, where there is one pair.
    """
    gate = Gate([], [])
    if not conditions:
        return gate
    gate.failed.extend(f"{pair.name}: {problem}" for pair in pairs for problem in pair.problems())
    if not pairs:
        gate.failed.append("no two rows could be compared")
    for condition in conditions:
        figures = [(pair.name, f) for pair in pairs for f in pair.figures if f.metric.name == condition.metric]
        tests = [condition.on(figure) for _, figure in figures]
        ps = holm([on[0].p_above(min(0.0, on[1])) if on else 1.0 for on in tests])
        for (name, figure), on, p in zip(figures, tests, ps, strict=True):
            line = f"{name}: {condition}"
            if not (figure.a.n and figure.b.n):
                gate.failed.append(f"{line} cannot be checked, {condition.metric} was not measured on both sides")
            elif on is None:
                gate.unclear.append(f"{line} cannot tell: {figure if figure.test is None else 'A is 0'}")
            elif figure.disturbed:
                gate.unclear.append(f"{line} cannot tell: no epoch of some runs was undisturbed")
            elif on[0].value > on[1] and p <= ALPHA + 1e-9:
                gate.failed.append(f"{line} fails: {figure}")
            elif on[0].interval().high > on[1]:
                over = f", p {p:.2g} over {len(ps)} rows" if on[0].value > on[1] and len(ps) > 1 else ""
                gate.unclear.append(f"{line} cannot tell: {figure}{over}")
    return gate
