"""Footnotes: what a reader must know about single cells of the table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence

from harness.results.metrics import METRICS, NONE, UNKNOWN, Metric, figures
from harness.results.published import Published
from harness.results.report.columns import cost_entry, progress, pruned_at
from harness.results.rows import Row, incomparable
from harness.results.statistics import wilson
from harness.results.values import UNMEASURED
from harness.results.verify import contradictions

Noted = Iterator[tuple[str, ...]]
"""A text and the names of the columns that it belongs to."""


def make_notes(rows: Sequence[Row]) -> Mapping[str, set[tuple[int, str]]]:
    """Everything a reader must know about single cells: a text -> its cells, (row, column name)."""
    notes: dict[str, set[tuple[int, str]]] = defaultdict(set)
    for i, row in enumerate(rows):
        for source in (_data_notes, _condition_notes, _timing_notes, _run_notes, _published_notes, _missing_notes):
            for text, *columns in source(row):
                notes[text] |= {(i, column) for column in columns}
    for why, runs in _alike_failures(rows).items():
        names = ", ".join(name for _, name in runs[:MOST_NAMED]) + ", …" * (len(runs) > MOST_NAMED)
        said = f"{names} failed, {why}" if len(runs) == 1 else f"{len(runs)} runs failed, {why}: {names}"
        notes[said] |= {(i, "n" if rows[i].done else "error") for i, _ in runs}
    groups: dict[tuple[str, str, int], dict[int, float]] = defaultdict(dict)
    for i, row in enumerate(rows):
        if row.error is not None and 0 <= row.error <= 100 and (images := row.done[0].record.images()):
            groups[row.dataset, row.evaluated_on, images][i] = row.error
    for (dataset, on, images), errors in groups.items():
        notes[_sampling_note(dataset, on, images, errors.values())] = {(i, "error") for i in errors}
    return notes


MOST_NAMED = 4


def _alike_failures(rows: Sequence[Row]) -> Mapping[str, list[tuple[int, str]]]:
    """Why runs failed -> their rows and names."""
    alike: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for i, row in enumerate(rows):
        for seed, failure in ((stored.record.seed, stored.record.failure) for stored in row.failed):
            if failure:
                why = _shorten(f"{failure.kind}: {failure.message}".removesuffix(": "))
                alike[why].append((i, f"{row.name} seed {seed}"))
    return alike


def _sampling_note(dataset: str, on: str, images: int, errors: Collection[float]) -> str:
    """What the number of images alone leaves open, at the smallest and the largest error of a data set."""
    ends = [(error, wilson(error, images)) for error in sorted({min(errors), max(errors)})]
    leave = ", of ".join(f"{error:.2f} % at {i.low:.2f} to {i.high:.2f}" for error, i in ends)
    return (
        f"{images:,} {'test' if on == 'test' else 'held-out'} images of {dataset} alone leave an error of {leave}, on others "
        "of their kind (95 %, Wilson); no interval here includes that, as all rows share the images"
    )


def _data_notes(row: Row) -> Noted:
    for text, column in incomparable(row):
        yield f"{text}: not compared with published errors", column
    if row.evaluated_on == "val":
        yield "of held-out training images, not of the test set", "error"
    if row.batch_norm_images != row.batch_size:
        yield f"batch norm over {row.batch_norm_images} images a worker", "workers"


NOTED_APART = {"uncommitted changes", "check", "concurrent runs", "runs per GPU"}


def _condition_notes(row: Row) -> Noted:
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
        failed = "failed" in checks
        yield "device failed its check" if failed else "device never checked: `harness check`", "device"


def _timing_notes(row: Row) -> Noted:
    concurrent = row.conditions.get("concurrent runs", {}).keys()
    if concurrent - {"1"}:
        yield f"timed with {' or '.join(sorted(concurrent))} runs going on at a time", "epoch_seconds"
    for stored, result in zip(row.done, row.results, strict=True):
        if result.mfu is not None:
            peak = figures((result.peak_flops or 0) / 1e12)
            yield f"over {peak} TFLOP/s a worker: {result.device}, {result.peak_source}", "mfu"
        elif result.peak_flops and result.images_per_second:
            yield (
                "faster than the peak of the device as it was measured, busy: `harness check` measures again",
                "mfu",
            )
        if result.runs_per_gpu > 1:
            yield f"{result.runs_per_gpu} runs shared each GPU", "epoch_seconds"
        if result.warmup_epochs == 0 and result.epoch_seconds is not None:
            yield "of runs of one epoch: the seconds hold the warm-up", "epoch_seconds"
        for warning in result.warnings:
            own = f"{row.name} seed {stored.record.seed}: {_shorten(warning)}", "n"
            yield (warning, "engine") if warning.startswith("engine ") else own
    for cause in dict.fromkeys(cause for result in row.results for cause in result.interference):
        yield f"{cause} in some epochs: they are left out", "epoch_seconds"
    if "widths" in row.fields:
        yield f"epochs with other than {row.workers} workers are left out", "epoch_seconds"


def _run_notes(row: Row) -> Noted:
    where = "n" if row.done else "error"
    if row.repeated:
        yield "a seed that was run more than once counts with its last run", "n"
    if row.planned:
        until = max(run.record.added_until or 0.0 for run in row.done)
        yield f"seeds after the first {row.planned} were added until the error was known to ±{until:g} points", "n"
    for stored in row.pruned:
        alone = "pruned by a search before its end: averaged with nothing"
        beside = f"{row.name} seed {stored.record.seed} was {pruned_at(stored)} epochs by a search"
        yield beside if row.done else alone, where
    for partial in row.interrupted:
        seed = partial.spec.get("seed")
        yield (
            f"{partial.name if seed is None else f'{row.name} seed {seed}'} is not done: {progress(partial)}",
            where,
        )
    for stored in row.done:
        for problem in contradictions(stored.record):
            yield f"{row.name} seed {stored.record.seed}: {problem}; see harness verify", "n"


def _published_notes(row: Row) -> Noted:
    if row.against is not None:
        yield _cite(row.against.published), "published"
        if row.against.reason:
            yield f"no verdict: {row.against.reason}", "verdict"
    if (entry := cost_entry(row)) and (entry.epoch_seconds or entry.memory_mib):
        text = f"on {entry.hardware}, {entry.year}: {entry.source}"
        yield text, "published_epoch_seconds", "published_memory_mib"


RULES = {
    "best": "best epoch, set beside our best",
    "unstated": "epoch not stated: a verdict holds for our last and our best",
}


def _cite(published: Published) -> str:
    """Where a published number comes from, and what is to be known about it."""
    runs = f"{published.statistic} of {published.n} runs" if published.n > 1 else "one run"
    std = "" if published.std is None else f", std {published.std:.2f}"
    top5 = "top-5" if published.error is None else ""
    return "; ".join(filter(None, (published.source, runs + std, RULES.get(published.rule), top5, published.note)))


def _missing_notes(row: Row) -> Noted:
    """Why figures are missing, of all runs or of some; a GPU's are not expected of a CPU."""
    missing: dict[str, list[Metric]] = defaultdict(list)
    for name, metric in METRICS.items():
        figure = row.figures.get(name, UNKNOWN)
        expected = metric.in_table and metric.device in (None, "cpu", row.fields.get("device"))
        if not expected or figure.reason in (None, UNMEASURED.reason) or not row.done:
            continue
        reason = _untimed(row) if metric.kind == "time" else figure.reason or ""
        some = f" in {len(row.done) - figure.n} of {len(row.done)} runs" if figure.n else ""
        missing[f"not measured{some}: {_shorten(reason)}"].append(metric)
    for reason, metrics in missing.items():
        yield f"{', '.join(metric.title for metric in metrics)} {reason}", *(metric.name for metric in metrics)


def _untimed(row: Row) -> str:
    """Why no epoch of some runs was timed."""
    reasons: dict[str, None] = {}
    for result in (result for result in row.results if result.epoch_seconds is None):
        interference = f"interference: {', '.join(result.interference)}" if result.interference else "warm-up"
        early = f"{result.runs_per_gpu} runs share the GPU" if result.runs_per_gpu > 1 else interference
        reasons |= dict.fromkeys(result.timing.untimed if result.timing else [early])
    return f"no epoch was timed, by reason of {', '.join(reasons)}"


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 160 else f"{line[:159]}…"
