"""Two sets of runs compared: difference, interval, and whether they are the same within a margin.

A difference is B minus A, so that "error +0.30" means B is worse.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from harness.results.metrics import METRICS, NONE, Metric, suggest
from harness.results.report.text import Sheet, clean, escape_markdown, for_markdown, for_terminal, paint
from harness.results.rows import Row
from harness.results.statistics import Interval, Sample, estimate_mean, sample, subtract


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric of one pair. Difference, interval and margin in points, or in percent where the metric is relative."""

    metric: Metric
    a: Sample | None
    b: Sample | None
    margin: float | None  # within which the sides are called equivalent
    difference: float | None = None
    interval: Interval | None = None  # 90 %, Welch
    verdict: Literal["equivalent", "different", "~"] = "~"


@dataclass(frozen=True, slots=True)
class Pair:
    a: Row
    b: Row
    differs: dict[str, tuple[str, str]]  # field -> its value in A and in B
    figures: tuple[Comparison, ...]


IDENTITY = {"variant", "network.depth", "label"}
"""Fields in which two compared rows agree wherever they take several values on either side."""


def find_metric(name: str) -> Metric:
    """A metric that can be compared. Raises ValueError for another name."""
    known = [metric.name for metric in METRICS.values() if metric.better]
    if name not in known:
        raise ValueError(f"unknown metric {name!r}: {suggest(name, known)}")
    return METRICS[name]


def _choose(metrics: Sequence[str]) -> list[Metric]:
    """Those that have a margin, and those that are named."""
    names = dict.fromkeys([*(name for name, metric in METRICS.items() if metric.margin), *metrics])
    return list(map(find_metric, names))


def compare(a: Sequence[Row], b: Sequence[Row], metrics: Sequence[str] = ()) -> list[Pair]:
    """Pair the rows of two sides and compare them; rows without a result or a counterpart are left out.

    Within a pair a field must agree that takes several values on both sides; variant, depth and data set must where
    they take several on either. What is constant on a side may be what the comparison is about (dali against
    dataloader). `metrics` are compared in addition to those with a margin. Raises ValueError for an unknown metric.
    """
    chosen = _choose(metrics)
    a, b = [row for row in a if row.done], [row for row in b if row.done]
    binding = []
    for name in sorted({name for row in (*a, *b) for name in row.fields}):
        varies = [len({row.fields.get(name) for row in side}) > 1 for side in (a, b)]
        if all(varies) or (name in IDENTITY and any(varies)):
            binding.append(name)
    partners: dict[tuple[str | None, ...], list[Row]] = defaultdict(list)
    for row in b:
        partners[tuple(map(row.fields.get, binding))].append(row)
    pairs = [(row, partners.get(tuple(map(row.fields.get, binding)), ())) for row in a]
    return [_pair(row, other, chosen) for row, others in pairs for other in others]


def compare_by(rows: Sequence[Row], field: str, metrics: Sequence[str] = ()) -> list[Pair]:
    """Compare rows that differ in one field alone; A is the field's first value, in order, B each other one.

    Raises ValueError for an unknown metric, and where no row has the field or it has one value only.
    """
    chosen = _choose(metrics)
    rows = [row for row in rows if row.done]
    known = sorted({name for row in rows for name in row.fields})
    if field not in known:
        raise ValueError(f"no field {field!r} in these runs: {suggest(field, known)}")
    by: dict[str, dict[str, Row]] = defaultdict(dict)  # value -> the rest of the fields -> row
    for row in rows:
        rest = json.dumps({name: value for name, value in row.fields.items() if name != field}, sort_keys=True)
        by[row.fields.get(field, NONE)][rest] = row
    first, *others = sorted(by, key=_natural)
    if not others:
        raise ValueError(f"all runs have {field} {first}: nothing to compare")
    pairs = [(row, by[value].get(rest)) for value in others for rest, row in by[first].items()]
    return [_pair(row, other, chosen) for row, other in pairs if other]


def _natural(value: str) -> tuple[float, str]:
    """Numbers before words, and by size."""
    try:
        return float(value), ""
    except ValueError:
        return math.inf, value


def _pair(a: Row, b: Row, metrics: Sequence[Metric]) -> Pair:
    sides = {n: (a.fields.get(n, NONE), b.fields.get(n, NONE)) for n in sorted(a.fields.keys() | b.fields.keys())}
    differs = {name: values for name, values in sides.items() if values[0] != values[1]}
    return Pair(a, b, differs, tuple(judge(metric, a, b) for metric in metrics))


def _values(metric: Metric, row: Row) -> list[float]:
    values = [metric.value(stored.record.result) for stored in row.done if stored.record.result is not None]
    return [value for value in values if value is not None and math.isfinite(value)]


def judge(metric: Metric, a: Row, b: Row) -> Comparison:
    """One metric of two rows. Ratios are tested as logarithms: one and its inverse are then equally far from 1."""
    first, second = _values(metric, a), _values(metric, b)
    if not first or not second:
        return Comparison(metric, None, None, metric.margin)
    shown = sample(first), sample(second)
    if metric.relative and min(*first, *second) <= 0:
        return Comparison(metric, *shown, metric.margin)
    tested = [list(map(math.log, values)) if metric.relative else values for values in (first, second)]

    def scale(value: float) -> float:
        return 100 * math.expm1(value) if metric.relative else value

    a_mean, b_mean = (estimate_mean(values, None) for values in tested)
    if a_mean is None or b_mean is None:
        return Comparison(metric, *shown, metric.margin, scale(sample(tested[1]).mean - sample(tested[0]).mean))
    apart = subtract(b_mean, a_mean)
    low, high = scale(apart.interval().low), scale(apart.interval().high)
    verdict: Literal["equivalent", "different", "~"] = "~"
    if (margin := metric.margin) is not None:
        lowest = 100 / (1 + margin / 100) - 100 if metric.relative else -margin
        if lowest < low and high < margin:
            verdict = "equivalent"
        elif low > margin or high < lowest:
            verdict = "different"
    return Comparison(metric, *shown, metric.margin, scale(apart.value), Interval(low, high), verdict)


# --- conditions for CI ---


@dataclass(frozen=True, slots=True)
class Condition:
    """error>+0.3: B's error is more than 0.3 points above A's; epoch_seconds>5%: B's epochs take over 5 % longer."""

    metric: str
    above: bool
    limit: float
    percent: bool

    def __str__(self) -> str:
        return f"{self.metric}{'>' if self.above else '<'}{self.limit:+g}{'%' if self.percent else ''}"


def parse_fail_on(text: str) -> tuple[Condition, ...]:
    """Read 'error>+0.3,epoch_seconds>5%'. Raises ValueError, in one line, for what does not parse."""
    conditions = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*([<>])\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*(%?)\s*", part)
        if match is None:
            raise ValueError(f"cannot read {part.strip()!r}: write conditions like error>+0.3,epoch_seconds>5%")
        name, sign, limit, percent = match.groups()
        find_metric(name)
        conditions.append(Condition(name, sign == ">", float(limit), bool(percent)))
    return tuple(conditions)


def violations(pairs: Sequence[Pair], conditions: Sequence[Condition]) -> list[str]:
    """A line for every pair that meets a condition, or lacks the figures to check it; and one for no pairs."""
    if conditions and not pairs:
        return ["no two rows could be compared"]
    checked = [(pair, condition, _violation(pair, condition)) for pair in pairs for condition in conditions]
    return [f"{pair.a.name}: {condition} {problem}" for pair, condition, problem in checked if problem]


def _violation(pair: Pair, condition: Condition) -> str | None:
    name, figure = condition.metric, judge(METRICS[condition.metric], pair.a, pair.b)
    if figure.a is None or figure.b is None:
        return f"cannot be checked, {name} was not measured on both sides"
    a, b = figure.a.mean, figure.b.mean
    if condition.percent and a == 0:
        return f"cannot be checked, {name} of A is 0"
    difference = 100 * (b / a - 1) if condition.percent else b - a
    if difference > condition.limit if condition.above else difference < condition.limit:
        return f"fails, {name} {a:.6g} -> {b:.6g} ({difference:+.3g}{' %' if condition.percent else ''})"
    return None


# --- pairs -> text ---

MEANS = (
    "A, B: mean ± std over n runs; B − A: errors in points, all else in percent of A, on the logarithms",
    "interval: 90 %, Welch",
    "verdict: equivalent where the interval lies within the margin, different where it lies beyond, else ~",
)


def render_comparison(
    pairs: Sequence[Pair], format: str = "table", *, width: int = 100, colour: bool = False
) -> str:
    if format == "json":
        return _json(pairs)
    if not pairs:
        return "nothing to compare: no row of A has a counterpart in B\n"
    shared = set.intersection(*({(n, *v) for n, v in pair.differs.items()} for pair in pairs))
    caption = "B against A: " + (", ".join(f"{n} {a} → {b}" for n, a, b in sorted(shared)) or "same settings")
    named = {name for name, _, _ in shared}
    own = [", ".join(f"{n} {a} → {b}" for n, (a, b) in pair.differs.items() if n not in named) for pair in pairs]
    headers = ["what", "metric", "n", "A", "B", "B − A", "interval", "margin", "verdict"]
    colours = {"equivalent": "green", "different": "red", "~": ""}
    cells, styles = [], []
    for pair, differs in zip(pairs, own, strict=True):
        name = " → ".join(dict.fromkeys([pair.a.name, pair.b.name]))
        for number, figure in enumerate(pair.figures):
            what = clean(f"{name} {pair.a.dataset} {differs}".strip()) if number == 0 else ""
            cells.append([what, *_words(figure)])
            styles.append(["bold", *[""] * 7, colours[figure.verdict]])
    sheet = Sheet(headers, [name not in ("what", "metric", "verdict") for name in headers], cells)
    if format == "markdown":
        lines = "\n".join(f"- {escape_markdown(line)}" for line in MEANS)
        return f"{escape_markdown(clean(caption))}\n\n{for_markdown(sheet)}\n\n{lines}\n"
    output = [paint(line, "bold" if colour else "") for line in textwrap.wrap(clean(caption), width)]
    output += ["", *for_terminal(sheet, width, styles if colour else None), ""]
    small = [part for line in MEANS for part in textwrap.wrap(line, width, subsequent_indent="  ")]
    output += [paint(part, "dim" if colour else "") for part in small]
    return "\n".join(output) + "\n"


def _words(figure: Comparison) -> list[str]:
    metric, interval = figure.metric, figure.interval
    unit = " %" if metric.relative else ""
    return [
        metric.heading,
        f"{figure.a.n}, {figure.b.n}" if figure.a and figure.b else NONE,
        _spread(figure.a, metric),
        _spread(figure.b, metric),
        NONE if figure.difference is None else f"{_signed(figure.difference)}{unit}",
        NONE if interval is None else f"{_signed(interval.low)} … {_signed(interval.high)}",
        NONE if figure.margin is None else f"±{figure.margin:g}{unit}",
        NONE if figure.margin is None else figure.verdict,
    ]


def _spread(side: Sample | None, metric: Metric) -> str:
    if side is None:
        return NONE
    digits = 2 if not metric.relative or abs(side.mean) < 100 else 0
    return f"{side.mean:,.{digits}f}" + ("" if side.std is None else f" ± {side.std:,.{digits}f}")


def _signed(value: float) -> str:
    text = f"{value:+.2f}".replace("-", "−")
    return "0.00" if text in ("−0.00", "+0.00") else text


def _json(pairs: Sequence[Pair]) -> str:
    entries = [
        {"a": pair.a.name, "b": pair.b.name, "differs": pair.differs, "figures": list(map(_plain, pair.figures))}
        for pair in pairs
    ]
    values = {"pairs": entries, "sides": "[n, mean, std]", "definitions": MEANS}
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def _plain(figure: Comparison) -> dict[str, Any]:
    def number(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    a, b = ((side.n, side.mean, side.std) if side else None for side in (figure.a, figure.b))
    interval = figure.interval and (number(figure.interval.low), number(figure.interval.high))
    return {
        "metric": figure.metric.name, "unit": "percent" if figure.metric.relative else "points", "a": a, "b": b,
        "difference": number(figure.difference), "interval": interval, "margin": figure.margin,
        "verdict": figure.verdict,
    }  # fmt: skip
