"""Two sets of runs against each other: difference, interval, and whether they are the same within a margin.

B is compared with A: a difference is B minus A, so that "error +0.30" means B is worse.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from harness.results.report.text import Sheet, clean, escape_markdown, for_markdown, for_terminal, paint
from harness.results.rows import NONE, Row
from harness.results.statistics import Interval, Sample, sample, tost, welch
from harness.results.values import RunResult


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of a run. Errors are compared in points, all else in percent of A."""

    name: str
    header: str
    get: Callable[[RunResult], float | None]
    relative: bool


METRICS = {
    metric.name: metric
    for metric in (
        Metric("error", "error %", lambda r: r.final_error, False),
        Metric("best_error", "best %", lambda r: r.best_error, False),
        Metric("top5_error", "top-5 %", lambda r: r.final_top5_error, False),
        Metric("test_error", "test %", lambda r: r.test_error, False),
        Metric("epoch_seconds", "s/epoch", lambda r: r.epoch_seconds, True),
        Metric("images_per_second", "img/s", lambda r: r.images_per_second, True),
        Metric("torch_allocated_mib", "alloc MiB", lambda r: r.memory.torch_allocated_mib.value, True),
        Metric("torch_reserved_mib", "resvd MiB", lambda r: r.memory.torch_reserved_mib.value, True),
        Metric("nvml_process_mib", "NVML MiB", lambda r: r.memory.nvml_process_mib.value, True),
        Metric("rss_mib", "RSS MiB", lambda r: r.memory.rss_mib.value, True),
    )
}
MARGINS = {"error": 0.2, "epoch_seconds": 5.0}
"""Within which two sides are called equivalent: points of error, percent of time."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One metric of one pair. Difference, interval and margin in points, or in percent where the metric is relative."""

    metric: str
    a: Sample | None
    b: Sample | None
    difference: float | None
    interval: Interval | None  # 95 %, Welch
    margin: float | None
    verdict: Literal["equivalent", "different", "~"]
    p: float | None  # of the two one-sided tests


@dataclass(frozen=True, slots=True)
class Pair:
    """A row of A and the row of B that it is compared with."""

    a: Row
    b: Row
    differs: dict[str, tuple[str, str]]  # field -> its value in A and in B
    figures: tuple[Figure, ...]


def compare(
    a: Sequence[Row], b: Sequence[Row], margins: dict[str, float] = MARGINS, metrics: Sequence[str] = ()
) -> list[Pair]:
    """Pair the rows of two sides and compare them; rows without a result or a counterpart are left out.

    Within a pair a field must agree that takes several values on both sides; variant, depth and data set must where
    they take several on either. What is constant on a side may be what the comparison is about (dali against
    dataloader). `metrics` are compared in addition to the margins' own. Raises ValueError for an unknown metric.
    """
    names = list(dict.fromkeys([*margins, *metrics]))
    for name in names:
        _known(name)
    a, b = [row for row in a if row.done], [row for row in b if row.done]
    fields = sorted({name for row in (*a, *b) for name in row.fields})
    binding = [
        name
        for name in fields
        if (_varies(name, a) and _varies(name, b)) or (name in IDENTITY and (_varies(name, a) or _varies(name, b)))
    ]
    partners: dict[tuple[str | None, ...], list[Row]] = defaultdict(list)
    for row in b:
        partners[tuple(map(row.fields.get, binding))].append(row)
    return [
        _pair(row, other, names, margins)
        for row in a
        for other in partners.get(tuple(map(row.fields.get, binding)), ())
    ]


IDENTITY = {"variant", "network.depth", "label"}


def compare_by(
    rows: Sequence[Row], field: str, margins: dict[str, float] = MARGINS, metrics: Sequence[str] = ()
) -> list[Pair]:
    """Compare rows that differ in one field alone; A is the field's first value, in order, B each other one.

    Raises ValueError for an unknown metric, and where no row has the field or it has one value only.
    """
    names = list(dict.fromkeys([*margins, *metrics]))
    for name in names:
        _known(name)
    rows = [row for row in rows if row.done]
    known = sorted({name for row in rows for name in row.fields})
    if field not in known:
        raise ValueError(f"no field {field!r} in these runs{_suggest(field, known)}")
    values = sorted({row.fields.get(field, NONE) for row in rows}, key=_natural)
    if len(values) < 2:
        raise ValueError(f"all runs have {field} {values[0]}: nothing to compare")
    by = {value: [row for row in rows if row.fields.get(field, NONE) == value] for value in values}
    pairs = []
    for value in values[1:]:
        others = {_rest(row, field): row for row in by[value]}
        pairs += [
            _pair(row, others[_rest(row, field)], names, margins)
            for row in by[values[0]]
            if _rest(row, field) in others
        ]
    return pairs


def _rest(row: Row, field: str) -> str:
    return json.dumps({name: value for name, value in row.fields.items() if name != field}, sort_keys=True)


def _natural(value: str) -> tuple[float, str]:
    """Numbers before words, and by size."""
    try:
        return float(value), ""
    except ValueError:
        return math.inf, value


def _varies(name: str, rows: Sequence[Row]) -> bool:
    return len({row.fields.get(name) for row in rows}) > 1


def _pair(a: Row, b: Row, names: Sequence[str], margins: dict[str, float]) -> Pair:
    fields = sorted(a.fields.keys() | b.fields.keys())
    sides = {name: (a.fields.get(name, NONE), b.fields.get(name, NONE)) for name in fields}
    return Pair(
        a,
        b,
        {name: values for name, values in sides.items() if values[0] != values[1]},
        tuple(_figure(METRICS[name], a, b, margins.get(name)) for name in names),
    )


def _values(metric: Metric, row: Row) -> list[float]:
    values = [metric.get(stored.record.result) for stored in row.done if stored.record.result is not None]
    return [value for value in values if value is not None and math.isfinite(value)]


def _figure(metric: Metric, a: Row, b: Row, margin: float | None) -> Figure:
    """Relative metrics are tested as logarithms: a ratio and its inverse are then equally far from 1."""
    first, second = _values(metric, a), _values(metric, b)
    if not first or not second:
        return Figure(metric.name, None, None, None, None, margin, "~", None)
    shown = sample(first), sample(second)
    if metric.relative:
        if min(*first, *second) <= 0:
            return Figure(metric.name, *shown, None, None, margin, "~", None)
        tested = sample([math.log(v) for v in first]), sample([math.log(v) for v in second])
    else:
        tested = shown
    apart = welch(tested[1], tested[0])
    limit = None if margin is None else math.log1p(margin / 100) if metric.relative else margin
    same = None if limit is None else tost(tested[1], tested[0], limit)

    def scale(value: float) -> float:
        return 100 * math.expm1(value) if metric.relative else value

    return Figure(
        metric=metric.name,
        a=shown[0],
        b=shown[1],
        difference=scale(tested[1].mean - tested[0].mean),
        interval=Interval(scale(apart.interval.low), scale(apart.interval.high)) if apart else None,
        margin=margin,
        verdict=same.verdict if same else "~",
        p=same.p if same else None,
    )


# --- conditions for CI ---


@dataclass(frozen=True, slots=True)
class Condition:
    """error>+0.3: fails where B's error is more than 0.3 points above A's; epoch_seconds>5%: more than 5 % longer."""

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
        found = re.fullmatch(r"\s*(\w+)\s*([<>])\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*(%?)\s*", part)
        if found is None:
            raise ValueError(f"cannot read {part.strip()!r}: write conditions like error>+0.3,epoch_seconds>5%")
        name, sign, limit, percent = found.groups()
        _known(name)
        conditions.append(Condition(name, sign == ">", float(limit), bool(percent)))
    return tuple(conditions)


def violations(pairs: Sequence[Pair], conditions: Sequence[Condition]) -> list[str]:
    """A line for every pair that a condition fails, or that lacks the figures to check it; and one for no pairs."""
    if conditions and not pairs:
        return ["no two rows could be compared"]
    lines = []
    for pair in pairs:
        for condition in conditions:
            metric = METRICS[condition.metric]
            first, second = _values(metric, pair.a), _values(metric, pair.b)
            if not first or not second:
                lines.append(
                    f"{pair.a.name}: {condition} cannot be checked, {metric.name} was not measured on both sides"
                )
                continue
            a, b = sample(first).mean, sample(second).mean
            if condition.percent and a == 0:
                lines.append(f"{pair.a.name}: {condition} cannot be checked, {metric.name} of A is 0")
                continue
            difference = 100 * (b / a - 1) if condition.percent else b - a
            if difference > condition.limit if condition.above else difference < condition.limit:
                unit = " %" if condition.percent else ""
                lines.append(
                    f"{pair.a.name}: {condition} fails, {metric.name} {a:.6g} -> {b:.6g} ({difference:+.3g}{unit})"
                )
    return lines


def _known(name: str) -> None:
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}{_suggest(name, list(METRICS))}")


def _suggest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f": did you mean {close[0]!r}?" if close else f": known are {', '.join(known)}"


# --- pairs -> text ---

MEANS = (
    "A, B: mean ± std over n runs; B − A: errors in points, all else in percent of A, on the logarithms",
    "interval: 95 %, Welch",
    "verdict: two one-sided tests, alpha 5 %: equivalent within the margin, different beyond it, ~ where the runs "
    "cannot tell",
)


def render_comparison(
    pairs: Sequence[Pair], format: str = "table", *, width: int = 100, colour: bool = False
) -> str:
    """table, markdown or json."""
    if format == "json":
        return _json(pairs)
    if not pairs:
        return "nothing to compare: no row of A has a counterpart in B\n"
    shared = set.intersection(*({(n, *v) for n, v in pair.differs.items()} for pair in pairs))
    caption = "B against A: " + (", ".join(f"{n} {a} → {b}" for n, a, b in sorted(shared)) or "same settings")
    named = {name for name, _, _ in shared}
    own = [", ".join(f"{n} {a} → {b}" for n, (a, b) in pair.differs.items() if n not in named) for pair in pairs]
    sheet, styles = _sheet(pairs, own)
    if format == "markdown":
        lines = "\n".join(f"- {escape_markdown(line)}" for line in MEANS)
        return f"{escape_markdown(clean(caption))}\n\n{for_markdown(sheet)}\n\n{lines}\n"
    output = [paint(line, "bold" if colour else "") for line in textwrap.wrap(clean(caption), width)]
    output += ["", *for_terminal(sheet, width, styles if colour else None), ""]
    for line in MEANS:
        output += [
            paint(part, "dim" if colour else "") for part in textwrap.wrap(line, width, subsequent_indent="  ")
        ]
    return "\n".join(output) + "\n"


def _sheet(pairs: Sequence[Pair], own: Sequence[str]) -> tuple[Sheet, list[list[str]]]:
    headers = ["what", "metric", "n", "A", "B", "B − A", "interval", "margin", "verdict"]
    right = [False, False, True, True, True, True, True, True, False]
    cells, styles = [], []
    for pair, differs in zip(pairs, own, strict=True):
        name = pair.a.name if pair.a.name == pair.b.name else f"{pair.a.name} → {pair.b.name}"
        for number, figure in enumerate(pair.figures):
            what = clean(f"{name} {pair.a.dataset} {differs}".strip()) if number == 0 else ""
            cells.append([what, *_words(figure)])
            colours = {"equivalent": "green", "different": "red", "~": ""}
            styles.append(["bold", *[""] * 7, colours[figure.verdict]])
    return Sheet(headers, right, cells), styles


def _words(figure: Figure) -> Iterator[str]:
    metric, interval = METRICS[figure.metric], figure.interval
    unit = " %" if metric.relative else ""
    yield metric.header
    yield f"{figure.a.n}, {figure.b.n}" if figure.a and figure.b else NONE
    yield _spread(figure.a, metric)
    yield _spread(figure.b, metric)
    yield NONE if figure.difference is None else f"{_signed(figure.difference)}{unit}"
    yield NONE if interval is None else f"{_signed(interval.low)} … {_signed(interval.high)}"
    yield NONE if figure.margin is None else f"±{figure.margin:g}{unit}"
    yield NONE if figure.margin is None else figure.verdict


def _spread(side: Sample | None, metric: Metric) -> str:
    if side is None:
        return NONE
    digits = 2 if not metric.relative or abs(side.mean) < 100 else 0
    return f"{side.mean:,.{digits}f}" + ("" if side.std is None else f" ± {side.std:,.{digits}f}")


def _signed(value: float) -> str:
    text = f"{value:+.2f}".replace("-", "−")
    return "0.00" if text in ("−0.00", "+0.00") else text


def _json(pairs: Sequence[Pair]) -> str:
    def number(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    entries = []
    for pair in pairs:
        figures = [
            {
                "metric": figure.metric,
                "unit": "percent" if METRICS[figure.metric].relative else "points",
                "a": None if figure.a is None else [figure.a.n, figure.a.mean, figure.a.std],
                "b": None if figure.b is None else [figure.b.n, figure.b.mean, figure.b.std],
                "difference": number(figure.difference),
                "interval": None
                if figure.interval is None
                else [number(figure.interval.low), number(figure.interval.high)],
                "margin": figure.margin,
                "verdict": figure.verdict,
                "p": number(figure.p),
            }
            for figure in pair.figures
        ]
        entries.append({"a": pair.a.name, "b": pair.b.name, "differs": pair.differs, "figures": figures})
    return (
        json.dumps(
            {"pairs": entries, "sides": "[n, mean, std]", "definitions": MEANS}, indent=1, ensure_ascii=False
        )
        + "\n"
    )
