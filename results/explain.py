"""Where a row's figures come from: each metric's definition and runs, and what is known of every run, as text."""

from __future__ import annotations

import math
from statistics import median

from harness.results.metrics import METRICS
from harness.results.prediction import predicted_figures
from harness.results.report.text import fill_template, in_words
from harness.results.rows import Row
from harness.results.statistics import estimate_mean, seeds_to_tell
from harness.results.store import Stored, load_epochs, time_epochs
from harness.results.values import EpochMetrics, Measurement
from harness.results.verify import check_epochs


def why(row: Row) -> str:
    """Explain a row, by why.txt.j2. Reads epochs.jsonl of its runs and says where it and the record disagree."""
    errors = row.values("error")
    mean = estimate_mean(errors, row.done[0].record.images(), row.planned) if errors else None
    return fill_template(
        "why.txt.j2", row=row, metrics=METRICS, mean=mean if mean and math.isfinite(mean.value) else None, read=_read,
        predicted_figures=predicted_figures, time_epochs=time_epochs, median=median, seeds_to_tell=seeds_to_tell, word=_word,
        categories=in_words,
    )  # fmt: skip


def _read(run: Stored) -> tuple[list[EpochMetrics], list[str]]:
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
