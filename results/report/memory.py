"""Memory by category, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping

from harness.results.report.text import clean
from harness.results.values import MEMORY_CATEGORIES

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
