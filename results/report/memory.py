"""Memory by category: in words, in colours, and as values of a chart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from harness.results.report.text import clean
from harness.results.values import MEMORY_CATEGORIES

COLOURS = {
    "weights": "#455f7f", "gradients": "#44c6ff", "optimizer state": "#5b975f", "activations": "#f19b06",
    "allocator slack": "#835a17", "data loader": "#e1a497", "NCCL": "#9e2bad", "CUDA context": "#6b6f74",
    "process at its start": "#6b6f74",
    "unaccounted": "#b5bbc3",
}  # fmt: skip
"""Distinct also for the colour-blind, neighbours most of all: found by a search over CIELAB distances as seen without one of
the cones, on white and on the dark page. A GPU has no "process at its start", a CPU no CUDA context."""
OTHER = "#8d7b68"  # a category that this version does not know
NOT_RECORDED = "memory by category: no record of these runs has it"


def known(categories: Mapping[str, float]) -> dict[str, float]:
    """The categories in the order they are shown, without those that hold nothing or cannot be a figure."""
    order = [*MEMORY_CATEGORIES, *sorted(categories.keys() - set(MEMORY_CATEGORIES))]
    return {name: value for name in order if math.isfinite(value := categories.get(name, 0.0)) and value}


def in_words(categories: Mapping[str, float]) -> str:
    """ "weights 1.0, activations 350, unaccounted −3 (some of it is counted twice)", in MiB."""
    parts = ", ".join(f"{clean(name)} {mib(value)}" for name, value in known(categories).items())
    return parts + (" (some of it is counted twice)" if categories.get(MEMORY_CATEGORIES[-1], 0.0) < 0 else "")


def mib(value: float) -> str:
    """Three figures or all before the point: 0.52, 8.3, 512, 1,234."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}".replace("-", "−")


def category_values(categories: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    return [
        {"row": row, "category": name, "mib": round(value, 2), "order": k, "whole": round(sum(parts.values()), 2)}
        for row, parts in categories.items()
        for k, (name, value) in enumerate(parts.items())
    ]


def colours(categories: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """The categories that hold something in any row, in their order, with their colours."""
    names = {name for parts in categories.values() for name in parts}
    return {name: COLOURS.get(name, OTHER) for name in known(dict.fromkeys(names, 1.0))}
