"""What a probe predicted of a row, beside what its runs then measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from harness.results.metrics import METRICS, figures
from harness.results.rows import Row
from harness.results.values import Measurement


@dataclass(frozen=True, slots=True)
class PredictedFigure:
    """One figure, predicted and actual; null with its reason where either cannot be read."""

    figure: str  # "s/epoch"
    predicted: Measurement
    actual: Measurement

    @property
    def difference(self) -> float | None:
        """Actual minus predicted, in the figure's unit."""
        if self.predicted.value is None or self.actual.value is None:
            return None
        return self.actual.value - self.predicted.value

    @property
    def percent(self) -> float | None:
        if self.difference is None or not self.predicted.value:
            return None
        return 100 * self.difference / self.predicted.value

    @property
    def reason(self) -> str | None:
        for side, reading in (("not predicted", self.predicted), ("not measured", self.actual)):
            if reading.value is None:
                return f"{side}: {reading.reason or 'no reason given'}"
        return None


def predicted_figures(row: Row) -> tuple[PredictedFigure, ...]:
    """What was predicted of a row, in the units shown; empty without a prediction or a finished run.

    What neither side can have on the CPU, a GPU's memory, is left out.
    """
    if row.predicted is None or not row.done:
        return ()

    def scaled(value: float | None, reason: str | None) -> Measurement:
        return Measurement(value=None if value is None else value * metric.scale, reason=reason)

    pairs = []
    for name, metric in METRICS.items():
        if metric.predict:
            predicted, actual = metric.measure(row.predicted), row.figures[name]
            if row.fields.get("device") != "cpu" or predicted.value is not None or actual.value is not None:
                sides = (scaled(side.value, side.reason) for side in (predicted, actual))
                pairs.append(PredictedFigure(metric.heading, *sides))
    return tuple(pairs)


def in_words(row: Row) -> Iterator[str]:
    pairs = predicted_figures(row)
    if not pairs or row.predicted is None:
        return
    yield (
        f"predicted by a probe of {row.predicted.steps} steps on {row.predicted.made_at:%Y-%m-%d %H:%M} UTC, "
        "and what was measured:"
    )
    for pair in pairs:
        yield f"  {pair.figure:<9}  {show(pair.predicted.value)} → {show(pair.actual.value)}  {show_difference(pair)}"
    for cause in row.predicted.interference:
        yield f"  while probing: {cause}"


def show(value: float | None) -> str:
    """Three figures, or all before the point."""
    return figures(value).replace("-", "−")


def show_difference(pair: PredictedFigure) -> str:
    """ "+0.12 (+6.4 %)", to the last place of the larger figure; or why it has none."""
    if pair.difference is None:
        return f"({pair.reason})"
    largest = max(abs(reading.value or 0.0) for reading in (pair.predicted, pair.actual))
    digits = max(0, 2 - math.floor(math.log10(largest))) if 0 < largest < math.inf else 0
    percent = "" if pair.percent is None else f" ({pair.percent:+.1f} %)"
    return f"{pair.difference:+,.{digits}f}{percent}".replace("-", "−")
