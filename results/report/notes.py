"""Footnotes: what a reader must know about single cells of the table."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from harness.results.metrics import METRICS, NONE, UNKNOWN, Metric
from harness.results.published import Published
from harness.results.report.columns import cost_entry, progress, pruned_at
from harness.results.rows import Row, incomparable
from harness.results.statistics import wilson
from harness.results.values import UNMEASURED, RunResult
from harness.results.verify import contradictions


@dataclass(frozen=True, slots=True)
class Note:
    """A footnote and the cells it belongs to: (row, column name)."""

    text: str
    cells: frozenset[tuple[int, str]]


def make_notes(rows: Sequence[Row]) -> list[Note]:
    """Everything a reader must know about single cells."""
    cells: dict[str, set[tuple[int, str]]] = defaultdict(set)
    sources = (_data_notes, _condition_notes, _timing_notes, _run_notes, _missing_notes)
    for i, row in enumerate(rows):
        for text, *columns in (note for source in sources for note in source(row)):
            cells[text] |= {(i, column) for column in columns}
    return [*(Note(text, frozenset(at)) for text, at in cells.items()), *_sampling_notes(rows)]


def _sampling_notes(rows: Sequence[Row]) -> Iterator[Note]:
    """What the number of images alone leaves open, at the smallest and the largest error of each data set."""
    groups: dict[tuple[str, str, int], dict[int, float]] = defaultdict(dict)
    for i, row in enumerate(rows):
        if row.error is not None and 0 <= row.error <= 100 and (images := row.done[0].record.images()):
            groups[row.dataset, row.evaluated_on, images][i] = row.error
    for (dataset, on, images), errors in groups.items():
        ends = [(error, wilson(error, images)) for error in sorted({min(errors.values()), max(errors.values())})]
        leave = ", of ".join(f"{error:.2f} % at {i.low:.2f} to {i.high:.2f}" for error, i in ends)
        whose = "test images" if on == "test" else "held-out images"
        text = (
            f"{images:,} {whose} of {dataset} alone leave an error of {leave}, on others of their kind (95 %, Wilson); no "
            "interval here includes that, as all rows share the images"
        )
        yield Note(text, frozenset((i, "error") for i in errors))


def _data_notes(row: Row) -> Iterator[tuple[str, ...]]:
    for text, column in incomparable(row):
        yield f"{text}: not compared with published errors", column
    if row.evaluated_on == "val":
        yield "of held-out training images, not of the test set", "error"
    if row.batch_norm_images != row.batch_size:
        yield f"batch norm over {row.batch_norm_images} images a worker", "workers"


NOTED_APART = {"uncommitted changes", "check", "concurrent runs", "runs per GPU"}


def _condition_notes(row: Row) -> Iterator[tuple[str, ...]]:
    """What differs between the runs of a row without splitting it."""
    mixed = []
    for name, values in row.conditions.items():
        known = [*values, *[NONE] * (sum(values.values()) < len(row.done))]
        if len(known) > 1 and name not in NOTED_APART:
            mixed.append(f"{name} ({', '.join(value[:40] for value in known)})")
    if mixed:
        yield f"its runs differ in {', '.join(mixed)}", "n"
    if dirty := row.conditions.get("uncommitted changes", {}).get("True"):
        yield f"{dirty} of {len(row.done)} runs had uncommitted changes: the commit is not all of their code", "n"
    checks = row.conditions.get("check", {})
    if row.done and row.fields.get("device") == "cuda" and checks.get("passed", 0) < len(row.done):
        yield (
            "device failed its check" if "failed" in checks else "device never checked: `harness check`",
            "device",
        )


def _timing_notes(row: Row) -> Iterator[tuple[str, ...]]:
    concurrent = row.conditions.get("concurrent runs", {}).keys()
    if concurrent - {"1"}:
        yield f"timed with {' or '.join(sorted(concurrent))} runs going on at a time", "epoch_seconds"
    for stored, result in zip(row.done, row.results, strict=True):
        if result.runs_per_gpu > 1:
            yield f"{result.runs_per_gpu} runs shared each GPU", "epoch_seconds"
        if result.warmup_epochs == 0 and result.epoch_seconds is not None:
            yield "of runs of one epoch: the seconds hold the warm-up", "epoch_seconds"
        for warning in result.warnings:
            if warning.startswith("engine "):
                yield warning, "engine"
            else:
                yield f"{row.name} seed {stored.record.seed}: {_shorten(warning)}", "n"
    for cause in dict.fromkeys(cause for result in row.results for cause in result.interference):
        yield f"{cause} in some epochs: they are left out", "epoch_seconds"
    if "widths" in row.fields:
        yield f"epochs with other than {row.workers} workers are left out", "epoch_seconds"


def _run_notes(row: Row) -> Iterator[tuple[str, ...]]:
    where = "n" if row.done else "error"
    if row.repeated:
        yield "a seed that was run more than once counts with its last run", "n"
    if row.planned:
        until = max(run.record.added_until or 0.0 for run in row.done)
        yield f"seeds after the first {row.planned} were added until the error was known to ±{until:g} points", "n"
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
    for stored in row.done:
        for problem in contradictions(stored.record):
            yield f"{row.name} seed {stored.record.seed}: {problem}; see harness verify", "n"
    if row.against is not None:
        yield _cite(row.against.published), "published"
        if row.against.reason:
            yield f"no verdict: {row.against.reason}", "verdict"
    if (entry := cost_entry(row)) and (entry.epoch_seconds or entry.memory_mib):
        yield (
            f"on {entry.hardware}, {entry.year}: {entry.source}",
            "published_epoch_seconds",
            "published_memory_mib",
        )


def _missing_notes(row: Row) -> Iterator[tuple[str, ...]]:
    """Why figures are missing, of all runs or of some; a GPU's are not expected of a CPU."""
    missing: dict[str, list[Metric]] = defaultdict(list)
    for name, metric in METRICS.items():
        figure = row.figures.get(name, UNKNOWN)
        expected = metric.in_table and metric.device in (None, "cpu", row.fields.get("device"))
        if not expected or figure.reason in (None, UNMEASURED.reason) or not row.done:
            continue
        reason = _untimed(row.results) if metric.kind == "time" else figure.reason or ""
        some = f" in {len(row.done) - figure.n} of {len(row.done)} runs" if figure.n else ""
        missing[f"not measured{some}: {_shorten(reason)}"].append(metric)
    for reason, metrics in missing.items():
        yield f"{', '.join(metric.title for metric in metrics)} {reason}", *(metric.name for metric in metrics)


def _untimed(results: Sequence[RunResult]) -> str:
    """Why no epoch of some runs was timed."""
    reasons: Counter[str] = Counter()
    for result in (result for result in results if result.epoch_seconds is None):
        if result.timing is not None:
            reasons.update(result.timing.untimed)
        elif result.runs_per_gpu > 1:
            reasons[f"{result.runs_per_gpu} runs share the GPU"] += 1
        else:
            reasons[f"interference: {', '.join(result.interference)}" if result.interference else "warm-up"] += 1
    return f"no epoch was timed, by reason of {', '.join(reasons)}"


def _cite(published: Published) -> str:
    """Where a published number comes from, and what is to be known about it."""
    runs = f"{published.statistic} of {published.n} runs" if published.n > 1 else "one run"
    parts = [published.source, runs + ("" if published.std is None else f", std {published.std:.2f}")]
    if published.rule == "best":
        parts.append("best epoch, set beside our best")
    if published.rule == "unstated":
        parts.append("epoch not stated: a verdict holds for our last and our best")
    if published.error is None:
        parts.append("top-5")
    return "; ".join([*parts, published.note] if published.note else parts)


def _shorten(text: str, limit: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
