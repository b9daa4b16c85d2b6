"""Footnotes: what a reader must know about single cells of the table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from harness.results.metrics import METRICS, UNKNOWN, Metric
from harness.results.published import Published
from harness.results.report.columns import cost_entry, progress, pruned_at
from harness.results.rows import Row
from harness.results.values import UNMEASURED


@dataclass(frozen=True, slots=True)
class Note:
    """A footnote and the cells it belongs to: (row, column name)."""

    text: str
    cells: frozenset[tuple[int, str]]


def make_notes(rows: Sequence[Row]) -> list[Note]:
    """Everything a reader must know about single cells."""
    cells: dict[str, set[tuple[int, str]]] = defaultdict(set)
    for i, row in enumerate(rows):
        if not row.original and row.done:
            text = f"{row.dataset} is not a published data set's own images: never compared with published errors"
            cells[text].add((i, "dataset"))
    for i, row in enumerate(rows):
        for text, *columns in (*_data_notes(row), *_timing_notes(row), *_run_notes(row), *_missing_notes(row)):
            cells[text] |= {(i, column) for column in columns}
    return [Note(text, frozenset(at)) for text, at in cells.items()]


def _data_notes(row: Row) -> Iterator[tuple[str, ...]]:
    if row.limit_train is not None:
        yield "trained on a part of the training set: not comparable with published errors", "limit_train"
    if row.limit_test is not None:
        yield f"of {row.limit_test:,} of the test images: not comparable with published errors", "error"
    for name, values in row.averaged_over.items():
        yield f"averaged over {name}: {', '.join(values)}, as requested", "n"
    if row.evaluated_on == "val":
        yield "of held-out training images, not of the test set", "error"


def _timing_notes(row: Row) -> Iterator[tuple[str, ...]]:
    concurrent = {str(stored.record.environment.get("concurrent_runs", 1)) for stored in row.done}
    if concurrent - {"1"}:
        yield f"timed with {' or '.join(sorted(concurrent))} runs going on at a time", "epoch_seconds"
    results = [stored.record.result for stored in row.done if stored.record.result is not None]
    for result in results:
        if result.runs_per_gpu > 1:
            yield f"{result.runs_per_gpu} runs shared each GPU: their epochs are not timed", "epoch_seconds"
        for warning in result.warnings:
            if warning.startswith("engine "):
                yield warning, "engine"
    for cause in dict.fromkeys(cause for result in results for cause in result.interference):
        yield f"{cause} in some epochs: they are left out", "epoch_seconds"
    if widths := row.fields.get("widths"):
        yield (
            f"DDP width {widths}: the cluster had no room for {row.workers} workers; epochs at another width are left "
            "out of the seconds"
        ), "epoch_seconds", "error"  # fmt: skip


def _run_notes(row: Row) -> Iterator[tuple[str, ...]]:
    where = "n" if row.done else "error"
    if row.repeated:
        yield "a seed that was run more than once counts with its last run", "n"
    for stored in row.failed:
        if failure := stored.record.failure:
            why = f"{failure.kind}: {failure.message}" if failure.message else failure.kind
            yield f"{row.name} seed {stored.record.seed} failed, {_shorten(why)}", where
    for stored in row.pruned:
        if row.done:
            yield f"{row.name} seed {stored.record.seed} was {pruned_at(stored)} epochs by a search", where
        else:
            yield "pruned by a search before its end: averaged with nothing", where
    for partial in row.interrupted:
        seed = partial.spec.get("seed")
        run = f"{row.name} seed {seed}" if seed is not None else partial.name
        yield f"{run} is not done: {progress(partial)}", where
    if row.against is not None:
        yield _cite(row.against.published), "published"
    if (entry := cost_entry(row)) and (entry.epoch_seconds or entry.memory_mib):
        yield (
            f"on {entry.hardware}, {entry.year}: {entry.source}",
            "published_epoch_seconds",
            "published_memory_mib",
        )


def _missing_notes(row: Row) -> Iterator[tuple[str, ...]]:
    """Why figures are missing; a GPU's are not expected of a CPU."""
    if not row.done:
        return
    if row.epoch_seconds is None and all(s.record.result.runs_per_gpu == 1 for s in row.done if s.record.result):
        yield "no epoch was timed: each was the first of its attempt, which is warm-up", "epoch_seconds"
    missing: dict[str, list[Metric]] = defaultdict(list)
    for name, metric in METRICS.items():
        figure = row.figures.get(name, UNKNOWN)
        expected = (
            metric.in_table and metric.missing is None and metric.device in (None, "cpu", row.fields.get("device"))
        )
        if expected and figure.value is None and figure.reason not in (None, UNMEASURED.reason):
            missing[figure.reason].append(metric)
    for reason, metrics in missing.items():
        titles = ", ".join(metric.title for metric in metrics)
        yield f"{titles} not measured: {_shorten(reason)}", *(metric.name for metric in metrics)


def _cite(published: Published) -> str:
    """Where a published number comes from, and what is to be known about it."""
    parts = [published.source, f"mean of {published.n} runs" if published.n > 1 else "one run"]
    if published.std is not None:
        parts[1] += f", std {published.std:.2f}"
    if published.rule == "best":
        parts.append("best epoch, set beside our best")
    if published.error is None:
        parts.append("top-5")
    return "; ".join([*parts, published.note] if published.note else parts)


def _shorten(text: str, limit: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
