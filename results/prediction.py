"""What a probe predicted of a row, beside what its runs then measured."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from harness.results.metrics import METRICS, figures
from harness.results.rows import Row


class PredictedFigure(NamedTuple):
    """One figure as text, in the unit shown."""

    figure: str  # "s/epoch"
    values: str  # predicted and measured, "3.20 → 4.00"
    difference: str = ""  # measured minus predicted, "+0.80 (+25.0 %)", to the last place of the larger figure
    reason: str = ""  # why there is no difference


def predicted_figures(row: Row) -> list[PredictedFigure]:
    """What was predicted of a row; empty without a prediction or a finished run.

    What neither side can have on the CPU, a GPU's memory, is left out.
    """
    pairs: list[PredictedFigure] = []
    if row.predicted is None or not row.done:
        return pairs
    hidden: Any = row.predicted.hidden_epoch_seconds
    for name, metric in METRICS.items():
        if metric.predict is None:
            continue
        predicted, actual = metric.measure(row.predicted), row.figures[name]
        b: Any
        a, b = (None if side.value is None else side.value * metric.scale for side in (predicted, actual))
        values = f"{figures(a)} → {figures(b)}"
        if a is not None and b is not None:
            pairs.append(PredictedFigure(metric.heading, values, _difference(a, b)))
        elif row.fields.get("device") != "cpu" or a != b:
            side, reading = ("not predicted", predicted) if a is None else ("not measured", actual)
            reason = f"{side}: {reading.reason or 'no reason given'}"
            pairs.append(PredictedFigure(metric.heading, values, reason=reason))
        if name == "epoch_seconds" and None not in (hidden, b):
            pairs.append(PredictedFigure("  hidden", f"{figures(hidden)} → {figures(b)}", _difference(hidden, b)))
    return pairs


def _difference(predicted: float, actual: float) -> str:
    largest = max(abs(predicted), abs(actual))
    digits = max(0, 2 - math.floor(math.log10(largest))) if 0 < largest < math.inf else 0
    percent = f" ({100 * (actual - predicted) / predicted:+.1f} %)" if predicted else ""
    return f"{actual - predicted:+,.{digits}f}{percent}".replace("-", "−")
