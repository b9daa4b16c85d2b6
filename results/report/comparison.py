"""A comparison as text, Markdown or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from harness.results.compare import Comparison, Pair, signed
from harness.results.metrics import NONE
from harness.results.report.text import Sheet, clean, for_markdown, for_terminal
from harness.results.values import finite

DEFINITIONS = (
    "A, B: of n runs, as in harness report: of errors mean ± std, of seconds the median, of memory the largest",
    "B − A: the difference of these two: of percentages in points, of all else in percent of A",
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
        values = {"schema_version": 1, "pairs": list(map(_plain_pair, pairs)), "definitions": definitions}
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
    return for_markdown(sheet) if format == "markdown" else for_terminal(sheet, width, colour=colour)


def _lines(pair: Pair, named: set[str]) -> Iterator[list[str]]:
    row = pair.a or pair.b
    own = ", ".join(f"{n} {a} → {b}" for n, (a, b) in pair.differs.items() if n not in named)
    what = clean(f"{pair.name} {row.dataset if row else NONE} {own}".strip())
    for number, figure in enumerate(pair.figures):
        metric, interval, margin = figure.metric, figure.interval, figure.metric.margin
        unit = " %" if metric.relative else ""
        yield [
            what if number == 0 else "", metric.heading, f"{figure.a.n}, {figure.b.n}", metric.summary(figure.a),
            metric.summary(figure.b), NONE if figure.difference is None else f"{signed(figure.difference)}{unit}",
            NONE if interval is None else f"{signed(interval.low)} … {signed(interval.high)}",
            *([NONE, NONE] if margin is None else [f"±{margin:g}{unit}", figure.verdict]),
        ]  # fmt: skip
    if not pair.figures:
        counts = ", ".join(str(len(side.done)) if side else NONE for side in (pair.a, pair.b))
        yield [what, NONE, counts, *[NONE] * 5, f"no result in {'B' if pair.a and pair.a.done else 'A'}"]


def _plain_pair(pair: Pair) -> dict[str, Any]:
    return {
        "a": pair.a and pair.a.name, "b": pair.b and pair.b.name, "differs": pair.differs,
        "problems": list(pair.problems()), "figures": list(map(_plain_figure, pair.figures)),
    }  # fmt: skip


def _plain_figure(figure: Comparison) -> dict[str, Any]:
    metric, interval = figure.metric, figure.interval
    sides = {
        side: finite({"n": f.n, "value": f.value, "std": f.std}) for side, f in (("a", figure.a), ("b", figure.b))
    }
    return {
        "metric": metric.name, "unit": "percent" if metric.relative else "points", **sides,
        **finite({"difference": figure.difference}), "interval": interval and list(finite(interval._asdict()).values()),
        "margin": metric.margin, "verdict": figure.verdict, "test": figure.how,
    }  # fmt: skip
