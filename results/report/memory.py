"""Who holds a row's memory: a chart of stacked bars, and the same as words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from harness.results.report.text import clean
from harness.results.rows import Row
from harness.results.values import MEMORY_CATEGORIES

COLOURS = {
    "weights": "#455f7f", "gradients": "#44c6ff", "optimizer state": "#5b975f", "activations": "#f19b06",
    "allocator slack": "#835a17", "data loader": "#e1a497", "NCCL": "#9e2bad", "CUDA context": "#6b6f74",
    "process at its start": "#6b6f74",
    "unaccounted": "#b5bbc3",
}  # fmt: skip
"""A GPU's and a CPU's categories are told apart by the colour-blind too, neighbours most of all: found by a search over CIELAB distances as seen without
one of the cones, on white and on the dark page."""
OTHER = "#8d7b68"  # an category that this version does not know
MAX_BARS = 24
BAR, HEAD, FOOT = 44, 8, 46  # pixels: of a row, above the first and below the last
NOT_RECORDED = "memory by category: no record of these runs has it"


def known(categories: Mapping[str, float]) -> dict[str, float]:
    """The categories in the order they are shown, without those that hold nothing or cannot be a figure."""
    order = [*MEMORY_CATEGORIES, *sorted(categories.keys() - set(MEMORY_CATEGORIES))]
    return {name: value for name in order if math.isfinite(value := categories.get(name, 0.0)) and value}


def in_words(categories: Mapping[str, float]) -> str:
    """ "weights 1.0, activations 350, unaccounted −3 (counted twice)": MiB, largest first but for what is left over."""
    parts = [f"{clean(name)} {mib(value)}" for name, value in known(categories).items()]
    return ", ".join(parts) + (
        " (some of it is counted twice)" if categories.get(MEMORY_CATEGORIES[-1], 0.0) < 0 else ""
    )


def mib(value: float) -> str:
    """Three figures or all before the point: 0.52, 8.3, 512, 1,234."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}".replace("-", "−")


def choose(rows: Sequence[Row], members: Sequence[int]) -> list[int]:
    """The rows whose memory is drawn: those that have it, those with the smallest error where they are many."""

    def error(i: int) -> float:
        sample = rows[i].error
        return sample.mean if sample and math.isfinite(sample.mean) else math.inf

    having = [i for i in members if known(rows[i].by_category_mib)]
    return sorted(sorted(having, key=error)[:MAX_BARS])


def category_values(
    labels: Mapping[int, str], categories: Mapping[int, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """The bars as Vega reads them, one value a part. `page.js` does the same."""
    return [
        {"row": labels[i], "category": name, "mib": value, "order": k, "whole": sum(parts.values())}
        for i, parts in categories.items()
        for k, (name, value) in enumerate(parts.items())
    ]


def colours(categories: Mapping[int, Mapping[str, float]]) -> dict[str, str]:
    """The categories that hold something in any row, in their order, with their colours."""
    met = {name for parts in categories.values() for name in parts}
    return {name: COLOURS.get(name, OTHER) for name in known(dict.fromkeys(met, 1.0))}


def categories_spec(shown: Mapping[str, str], labels: Sequence[str], title: str) -> dict[str, Any]:
    """A bar a row, its name above it, its parts from left to right; what is below zero goes to the left.

    A tick marks the sum, which is what was measured of the whole.
    """
    y = {"field": "row", "type": "nominal", "sort": list(labels), "axis": None, "scale": {"paddingInner": 0, "paddingOuter": 0}}  # fmt: skip
    x = {"field": "mib", "type": "quantitative", "stack": "zero", "title": title,
         "axis": {"tickCount": 6, "format": ",~r"}, "scale": {"nice": True}}  # fmt: skip
    bar = {"type": "bar", "style": "category", "height": 18, "yOffset": 9}
    tick = {"type": "tick", "style": "whole", "orient": "vertical", "thickness": 2, "size": 26, "yOffset": 9}
    of_row = {"groupby": ["row"], "aggregate": [{"op": "max", "field": "whole", "as": "whole"}]}
    return {
        "data": {"name": "categories"},
        "params": [{"name": "hidden", "value": []}, {"name": "lit", "value": None}],
        "transform": [{"filter": "indexof(hidden, datum.row) < 0"}],
        "encoding": {"y": y},
        "layer": [
            {
                "mark": bar,
                "encoding": {
                    "x": x,
                    "color": {"field": "category", "type": "nominal", "legend": None,
                              "scale": {"domain": list(shown), "range": list(shown.values())}},
                    "order": {"field": "order", "type": "quantitative"},
                    "opacity": {"condition": {"test": "lit === null || datum.row === lit", "value": 1}, "value": 0.15},
                    "tooltip": [
                        {"field": "row", "type": "nominal", "title": "row"},
                        {"field": "category", "type": "nominal", "title": "category"},
                        {"field": "mib", "type": "quantitative", "title": "MiB", "format": ",.1f"},
                        {"field": "whole", "type": "quantitative", "title": "of MiB", "format": ",.0f"},
                    ],
                },
            },
            {
                "transform": [of_row],
                "mark": tick,
                "encoding": {"x": {"field": "whole", "type": "quantitative"}},
            },
            {
                "transform": [of_row, {"calculate": "datum.row + ':  ' + format(datum.whole, ',.0f') + ' MiB'", "as": "said"}],
                "mark": {"type": "text", "align": "left", "baseline": "middle", "yOffset": -11, "fontSize": 12,
                         "limit": {"expr": "width"}},
                "encoding": {"x": {"value": 0}, "text": {"field": "said"}},
            },
        ],
    }  # fmt: skip


def height(bars: int) -> int:
    """Pixels of the whole chart."""
    return HEAD + BAR * bars + FOOT
