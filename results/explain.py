"""Where a row's figures come from: each metric's definition and runs, what a probe predicted, and what is known of every
run, as text."""

from __future__ import annotations

import math
from statistics import median
from typing import NamedTuple

from harness.results.metrics import METRICS, decimals, figures
from harness.results.report.columns import end_of
from harness.results.report.text import fill_template, in_words
from harness.results.rows import Row
from harness.results.statistics import MIN_SEEDS, estimate_mean
from harness.results.store import Stored, load_epochs, time_epochs
from harness.results.values import EpochMetrics, Measurement
from harness.results.verify import check_epochs


def why(row: Row) -> str:
    """Explain a row, by why.txt.j2. Reads epochs.jsonl of its runs and says where it and the record disagree."""
    errors = row.values("error")
    mean = estimate_mean(errors, row.done[0].record.images(), row.planned) if len(errors) >= MIN_SEEDS else None
    return fill_template(
        "why.txt.j2", row=row, metrics=METRICS, mean=mean if mean and math.isfinite(mean.value) else None, read=read_epochs,
        predicted_figures=predicted_figures, time_epochs=time_epochs, median=median, word=_word, categories=in_words, end_of=end_of,
    )  # fmt: skip


def read_epochs(run: Stored) -> tuple[list[EpochMetrics], list[str]]:
    """A run's epochs, and what is wrong with them."""
    try:
        epochs = load_epochs(run.folder)
    except (OSError, ValueError) as error:
        return [], [str(error)]
    return epochs, [f"but {problem}" for problem in check_epochs(run.record, epochs)]


def _word(value: object) -> str:
    if isinstance(value, Measurement):
        return f"null ({value.reason or 'no reason given'})" if value.value is None else _word(value.value)
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}") if isinstance(value, float) else str(value)


class PredictedFigure(NamedTuple):
    """One figure that a probe predicted, as text, in the unit shown."""

    figure: str  # "s/epoch"
    values: str  # predicted and measured, "3.20 → 4.00"
    difference: str = ""  # measured minus predicted, "+0.80 (+25.0 %)", to the last place of the larger figure
    reason: str = ""  # why there is no difference


def predicted_figures(row: Row) -> list[PredictedFigure]:
    """What was predicted of a row, beside what its runs then measured; empty without a prediction or a finished run.

    What neither side can have on the CPU, a GPU's memory, is left out.
    """
    pairs: list[PredictedFigure] = []
    if row.predicted is None or not row.done:
        return pairs
    for name, metric in METRICS.items():
        if metric.predict is None:
            continue
        predicted, actual = metric.measure(row.predicted), row.figures[name]
        a, b = (None if side.value is None else side.value * metric.scale for side in (predicted, actual))
        if a is not None and b is not None:
            pairs.append(_pair(metric.heading, a, b))
        elif row.fields.get("device") != "cpu" or a != b:
            side, reading = ("not predicted", predicted) if a is None else ("not measured", actual)
            reason = f"{side}: {reading.reason or 'no reason given'}"
            pairs.append(PredictedFigure(metric.heading, f"{figures(a)} → {figures(b)}", reason=reason))
        hidden = row.predicted.hidden_epoch_seconds
        if name == "epoch_seconds" and hidden is not None and b is not None:
            pairs.append(_pair("  hidden", hidden, b))
    return pairs


def _pair(figure: str, predicted: float, actual: float) -> PredictedFigure:
    digits = decimals(max(abs(predicted), abs(actual)))
    percent = f" ({100 * (actual - predicted) / predicted:+.1f} %)" if predicted else ""
    difference = f"{actual - predicted:+,.{digits}f}{percent}".replace("-", "−")
    return PredictedFigure(figure, f"{figures(predicted)} → {figures(actual)}", difference)
