"""A comparison as text, Markdown or JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from harness.results.compare import Comparison, Pair, centre_of, signed
from harness.results.metrics import NONE, Metric
from harness.results.report.text import Sheet, clean, for_markdown, for_terminal
from harness.results.statistics import std

DEFINITIONS = (
    "A, B: of errors mean ± std over n runs, of all else median ± std",
    "B − A: of errors the difference of the means, in points; of all else the median over all pairs of a run of B and one "
    "of A, in percent of A, which need not be that of the two medians",
    "interval: 90 %, the one that the verdict rests on",
    "verdict: equivalent where the interval lies within the margin, different where it lies beyond it",
)
HEADERS = ["what", "metric", "n", "A", "B", "B − A", "interval", "margin", "verdict"]
COLOURS = {"equivalent": "green", "different": "red"}


def render_comparison(
    pairs: Sequence[Pair], format: str = "table", *, width: int = 100, colour: bool = False
) -> str:
    """Every pair and metric in a line; then what else forbids a conclusion, and what the tests were."""
    figures = [figure for pair in pairs for figure in pair.figures]
    tests = dict.fromkeys(f"{figure.metric.title}: {figure.how}" for figure in figures if figure.how)
    definitions = [*DEFINITIONS, *tests]
    if format == "json":
        values = {"pairs": list(map(_plain_pair, pairs)), "definitions": definitions}
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    if not pairs:
        return "nothing to compare: no row of A has a counterpart in B\n"
    both = [pair for pair in pairs if pair.a and pair.b]
    shared = set.intersection(*({(n, *v) for n, v in pair.differs.items()} for pair in both)) if both else set()
    caption = "B against A: " + (", ".join(f"{n} {a} → {b}" for n, a, b in sorted(shared)) or "same settings")
    named = {name for name, _, _ in shared}
    cells = [line for pair in pairs for line in _lines(pair, named)]
    sheet = Sheet(
        headers=HEADERS,
        right=[name not in ("what", "metric", "verdict") for name in HEADERS],
        cells=cells,
        caption=clean(caption),
        notes=[clean(f"{pair.name}: {problem}") for pair in pairs for problem in pair.problems()],
        means=definitions,
        styles=[["bold", *[""] * 7, COLOURS.get(line[-1], "")] for line in cells],
    )
    return (
        for_markdown(sheet)
        if format == "markdown"
        else "\n".join(for_terminal(sheet, width, colour=colour)) + "\n"
    )


def _lines(pair: Pair, named: set[str]) -> Iterator[list[str]]:
    row = pair.a or pair.b
    own = ", ".join(f"{n} {a} → {b}" for n, (a, b) in pair.differs.items() if n not in named)
    what = clean(f"{pair.name} {row.dataset if row else NONE} {own}".strip())
    for number, figure in enumerate(pair.figures):
        yield ["" if number else what, *_words(figure)]
    if not pair.figures:
        counts = ", ".join(str(len(side.done)) if side else NONE for side in (pair.a, pair.b))
        word = f"no result in {'B' if pair.a and pair.a.done else 'A'}"
        if not (pair.a and pair.b):
            word = f"only in {'A' if pair.a else 'B'}"
        yield [what, NONE, counts, *[NONE] * 5, word]


def _words(figure: Comparison) -> list[str]:
    metric, interval, margin = figure.metric, figure.interval, figure.metric.margin
    unit = " %" if metric.relative else ""
    return [
        metric.heading,
        f"{len(figure.a)}, {len(figure.b)}",
        _spread(figure.a, metric),
        _spread(figure.b, metric),
        NONE if figure.difference is None else f"{signed(figure.difference)}{unit}",
        NONE if interval is None else f"{signed(interval.low)} … {signed(interval.high)}",
        NONE if margin is None else f"±{margin:g}{unit}",
        NONE if margin is None else figure.verdict,
    ]


def _spread(values: Sequence[float], metric: Metric) -> str:
    if not values:
        return NONE
    centre, spread = centre_of(metric, values), std(values)
    digits = 2 if not metric.relative or abs(centre) < 100 else 0
    return f"{centre:,.{digits}f}" + ("" if spread is None else f" ± {spread:,.{digits}f}")


def _plain_pair(pair: Pair) -> dict[str, Any]:
    return {
        "a": pair.a and pair.a.name, "b": pair.b and pair.b.name, "differs": pair.differs,
        "problems": list(pair.problems()), "figures": list(map(_plain_figure, pair.figures)),
    }  # fmt: skip


def _plain_figure(figure: Comparison) -> dict[str, Any]:
    def number(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    def side(values: Sequence[float]) -> dict[str, float | None] | None:
        word = "mean" if metric.kind == "error" else "median"
        return {"n": len(values), word: centre_of(metric, values), "std": number(std(values))} if values else None

    metric, interval = figure.metric, figure.interval
    return {
        "metric": metric.name, "unit": "percent" if metric.relative else "points", "a": side(figure.a), "b": side(figure.b),
        "difference": number(figure.difference), "interval": interval and (number(interval.low), number(interval.high)),
        "margin": metric.margin, "verdict": figure.verdict, "test": figure.how,
    }  # fmt: skip
