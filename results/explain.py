"""Where a row's figures come from: each metric's definition and runs, and what is known of every run, as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from statistics import median

from harness.results import prediction
from harness.results.metrics import METRICS
from harness.results.report import memory as categories
from harness.results.report.columns import progress
from harness.results.report.text import clean
from harness.results.rows import Row
from harness.results.statistics import estimate_mean, seeds_to_tell
from harness.results.store import Stored, load_epochs, time_epochs
from harness.results.values import Measurement, RunResult
from harness.results.verify import check_epochs


def why(row: Row) -> str:
    """Explain a row. Reads epochs.jsonl of its runs and says where it and the record disagree."""
    where = "test set" if row.evaluated_on == "test" else "images held out"
    lines = [f"{row.name} on {row.dataset}" + (f": errors are of the {where}" if row.done else ""), ""]
    for section in (_figures, _runs, prediction.in_words):
        if text := list(section(row)):
            lines += [*text, ""]
    lines += _without_result(row)
    lines += ["what these runs share, beside the seed's own:"]
    lines += [f"  {name} = {value}" for name, value in row.fields.items()]
    lines += [f"  {name} is averaged over: {', '.join(values)}" for name, values in row.averaged_over.items()]
    lines += ["what is known of them beside:"] if row.conditions else []
    for name, found in row.conditions.items():
        counts = [
            value + (f" ({n} of {len(row.done)})" if n < len(row.done) else "") for value, n in found.items()
        ]
        lines.append(f"  {name} = {', '.join(counts)}")
    return "\n".join(map(clean, lines)) + "\n"


def _figures(row: Row) -> Iterator[str]:
    """Every metric: its value, definition and runs; or why it has none. Then the published error."""
    for name, figure in row.figures.items():
        metric = METRICS[name]
        if figure.value is None:
            yield from [f"{metric.heading} –: {figure.reason}"] if figure.reason else []
            continue
        yield f"{metric.heading} {metric.summary(figure)} = {metric.means}"
        if metric.over_seeds != "first":
            readings = [(run.record.seed, metric.measure(result)) for run, result in _results(row)]
            each = [(seed, _word(r) if r.value is None else metric.text(r.value)) for seed, r in readings]
            yield "  " + ", ".join(f"seed {seed}: {text}" for seed, text in each)
        if name == "error":
            known = estimate_mean(row.values("error"), row.done[0].record.images(), row.planned)
            if known is not None and math.isfinite(known.value):
                low, high = known.interval()
                how = f"moderated spread, {known.freedom:.0f} degrees of freedom"
                yield f"  90 % interval of the mean: {low:.2f} to {high:.2f} ({how})"
    if (against := row.against) is None:
        return
    published, difference = against.published, f"  difference {against.difference:+.4f}"
    number = f"published {published.number} % (n = {published.n}, {published.rule} epoch)"
    yield from (f"{number}: {published.source}", f"  it rests on: {published.rests_on}")
    if against.half is None:
        yield f"{difference}; no verdict: {against.reason}"
        return
    low, high = against.difference - against.half, against.difference + against.half
    yield f"{difference}, interval of 90 % {low:+.2f} to {high:+.2f}: {against.word}"
    yield f"  p = {against.p:.3g}, with all rows {against.adjusted:.3g} (Holm)"
    seeds = seeds_to_tell(published, row.values("error"))
    yield f"  {seeds or 'no number of'} seeds would make it ±0.5 points"


def _results(row: Row) -> list[tuple[Stored, RunResult]]:
    return list(zip(row.done, row.results, strict=True))


def _runs(row: Row) -> Iterator[str]:
    """A paragraph for each run that is done."""
    for run, result in _results(row):
        yield f"seed {run.record.seed}: {run.folder}"
        yield from (f"  {line}" for line in (*_epochs(run, result), *_machines(result)))


def _epochs(run: Stored, result: RunResult) -> Iterator[str]:
    try:
        epochs = load_epochs(run.folder)
    except (OSError, ValueError) as error:
        yield str(error)
        return
    timing = time_epochs(epochs)
    text = f"{timing.epochs} epochs timed" + (
        f", {timing.fastest:.4g} to {timing.slowest:.4g} s" if timing.epochs else ""
    )
    if timing.untimed:
        left_out = [f"{n} {reason or 'for no known reason'}" for reason, n in timing.untimed.items()]
        text += f"; left out: {', '.join(left_out)}"
    if result.widths:
        text += f"; DDP width {'→'.join(map(str, result.widths))}, requested {result.workers}"
    yield text
    if skews := [(epoch.skew, epoch) for epoch in epochs if epoch.timed and epoch.skew is not None]:
        largest, epoch = max(skews, key=lambda skew: skew[0])
        which = f"rank {epoch.slowest_rank} in epoch {epoch.epoch}"
        middle = median(skew for skew, _ in skews)
        yield f"slowest over fastest rank's epoch: median {middle:.3f}, at most {largest:.3f} ({which})"
    yield from (f"but {problem}" for problem in check_epochs(run.record, epochs))


def _machines(result: RunResult) -> Iterator[str]:
    """Memory beside the metrics. Ranks, where there are several: medians over the timed epochs of the last attempt, and
    peaks. Nodes: sampled each second from the workers' start to their end, all processes on them."""
    shown = [metric.record_name for metric in METRICS.values()]
    more = [
        (n, m) for n, m in result.memory if n not in shown and isinstance(m, Measurement) and m.value is not None
    ]
    yield from [_words(more)] if more else []
    if result.memory.by_category_mib:
        yield f"MiB by category: {categories.in_words(result.memory.by_category_mib)}"
    yield from map(_words, result.ranks if len(result.ranks) > 1 else ())
    for node in result.nodes:
        yield from (_words(node), *(f"  {_words(gpu)}" for gpu in node.gpus))


def _without_result(row: Row) -> Iterator[str]:
    for stored in (*row.failed, *row.pruned):
        if outcome := stored.record.failure or stored.record.pruned:
            yield f"seed {stored.record.seed} {stored.record.status}: {_words(outcome)}"
            yield f"  {stored.folder}"
    for partial in row.interrupted:
        yield from (f"{partial.name} is not done: {progress(partial)}", f"  {partial.folder}")


def _words(named: Iterable[tuple[str, object]]) -> str:
    """ "rank 1, host a, train_seconds 4.02, rss_mib 900", without what is empty."""
    known = [
        (name, value) for name, value in named if value not in (None, ()) and name not in ("gpus", "traceback")
    ]
    return ", ".join(f"{name} {_word(value)}" for name, value in known)


def _word(value: object) -> str:
    if isinstance(value, Measurement):
        return f"null ({value.reason or 'no reason given'})" if value.value is None else _word(value.value)
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}") if isinstance(value, float) else str(value)
