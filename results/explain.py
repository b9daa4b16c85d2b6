"""Where a row's figures come from: each metric's definition and runs, and what is known of every run, as text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from harness.results import prediction
from harness.results.metrics import METRICS, UNKNOWN
from harness.results.report.text import clean, in_words
from harness.results.rows import Row
from harness.results.statistics import estimate_mean, median
from harness.results.store import Stored, load_epochs
from harness.results.values import Measurement, RunResult, Value
from harness.results.verdict import Against, seeds_to_tell
from harness.results.verify import check_epochs

RANKS_SHOWN = 64


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
        counts = {value: f" ({n} of {len(row.done)})" if n < len(row.done) else "" for value, n in found.items()}
        lines.append(f"  {name} = {', '.join(value + count for value, count in counts.items())}")
    return "\n".join(map(clean, lines)) + "\n"


def _figures(row: Row) -> Iterator[str]:
    """Every metric: its value, definition and runs; or why it has none."""
    runs = list(zip(row.done, row.results, strict=True))
    for name, metric in METRICS.items() if runs else ():
        figure = row.figures.get(name, UNKNOWN)
        if figure.value is None:
            yield from [f"{metric.heading} –: {figure.reason}"] if figure.reason else []
            continue
        yield f"{metric.heading} {metric.summary(figure)} = {metric.means}"
        if metric.over_seeds != "first":
            readings = [(run.record.seed, metric.measure(result)) for run, result in runs]
            texts = [metric.text(r.value) if r.value is not None else _word(r) for _, r in readings]
            yield "  " + ", ".join(f"seed {seed}: {text}" for (seed, _), text in zip(readings, texts, strict=True))
        if name == "error":
            yield from _interval(row)
    if row.against is not None:
        yield from _against(row, row.against)


def _interval(row: Row) -> Iterator[str]:
    known = estimate_mean(row.values("error"), row.done[0].record.images(), row.planned)
    if known is not None and math.isfinite(known.value):
        how = f"moderated spread, {known.freedom:.0f} degrees of freedom"
        low, high = known.interval()
        yield f"  90 % interval of the mean: {low:.2f} to {high:.2f} ({how})"


def _against(row: Row, against: Against) -> Iterator[str]:
    published = against.published
    number = f"published {published.number} % (n = {published.n}, {published.rule} epoch)"
    yield f"{number}: {published.source}"
    yield f"  it rests on: {published.rests_on}"
    if against.half is None:
        yield f"  difference {against.difference:+.4f}; no verdict: {against.reason}"
        return
    low, high = against.difference - against.half, against.difference + against.half
    yield f"  difference {against.difference:+.4f}, interval of 90 % {low:+.2f} to {high:+.2f}: {against.word}"
    yield f"  p = {against.p:.3g}, with all rows {against.adjusted:.3g} (Holm)"
    seeds = seeds_to_tell(published, row.values("error"))
    yield f"  {seeds} seeds would make it ±0.5 points" if seeds else "  no number of seeds makes it ±0.5 points"


def _runs(row: Row) -> Iterator[str]:
    """A paragraph for each run that is done."""
    for run, result in zip(row.done, row.results, strict=True):
        yield f"seed {run.record.seed}: {run.folder}"
        yield from (f"  {line}" for line in (*_epochs(run, result), *_memory(result), *_machines(result)))


def _epochs(run: Stored, result: RunResult) -> Iterator[str]:
    try:
        epochs = load_epochs(run.folder)
    except (OSError, ValueError) as error:
        yield str(error)
        return
    if not epochs:
        yield "no epochs.jsonl"
        return
    timed = [epoch for epoch in epochs if epoch.timed]
    seconds = [epoch.train_seconds for epoch in timed]
    text = f"{len(timed)} epochs timed" + (f", {min(seconds):.4g} to {max(seconds):.4g} s" if timed else "")
    if out := Counter(epoch.untimed or "for no known reason" for epoch in epochs if not epoch.timed):
        text += "; left out: " + ", ".join(f"{n} {reason}" for reason, n in out.items())
    if result.widths:
        text += f"; DDP width {'→'.join(map(str, result.widths))}, requested {result.workers}"
    yield text
    if skews := [(epoch.skew, epoch) for epoch in timed if epoch.skew is not None]:
        largest, epoch = max(skews, key=lambda skew: skew[0])
        middle = median([skew for skew, _ in skews])
        which = f"rank {epoch.slowest_rank} in epoch {epoch.epoch}"
        yield f"slowest over fastest rank's epoch: median {middle:.3f}, at most {largest:.3f} ({which})"
    yield from (f"but {problem}" for problem in check_epochs(run.record, epochs))


def _memory(result: RunResult) -> Iterator[str]:
    memory = result.memory
    if memory.warmup_allocated_mib.value is not None:
        peaks = memory.warmup_allocated_mib, memory.warmup_reserved_mib
        yield "MiB in set-up and warm-up: alloc {}, resvd {}".format(*map(_word, peaks))
    if (growth := memory.growth_mib_per_epoch.value) is not None:
        yield f"memory in use grows by {growth:+.2g} MiB an epoch, by least squares over the epochs after warm-up"
    if memory.by_category_mib:
        yield f"MiB by category: {in_words(memory.by_category_mib)}"


def _machines(result: RunResult) -> Iterator[str]:
    """Ranks, where there are several: medians over the timed epochs of the last attempt, and peaks. Nodes: sampled each
    second from the workers' start to their end, all processes on them."""
    ranks = result.ranks if len(result.ranks) > 1 else ()
    yield from map(_words, ranks[:RANKS_SHOWN])
    if len(ranks) > RANKS_SHOWN:
        yield f"and {len(ranks) - RANKS_SHOWN} more ranks in its record"
    for node in result.nodes:
        yield _words(node)
        yield from (f"  {_words(gpu)}" for gpu in node.gpus)


def _without_result(row: Row) -> Iterator[str]:
    for stored in row.failed:
        if failure := stored.record.failure:
            yield f"seed {stored.record.seed} failed: {failure.kind}, {failure.message}"
            yield f"  {stored.folder}"
    for stored in row.pruned:
        if end := stored.record.pruned:
            by = f"pruned by {end.by} of sweep {end.sweep} after epoch {end.epoch} of {end.of}"
            yield f"seed {stored.record.seed} was {by}, at {end.error:g} % of the {end.evaluated_on} set"
            yield f"  {stored.folder}"
    for partial in row.interrupted:
        of = f" of {partial.of}" if partial.of else ""
        yield f"{partial.name} is not done: epoch {partial.epochs}{of}"
        yield f"  {partial.folder}"


def _words(value: Value) -> str:
    """ "rank 1, host a, train_seconds 4.02, rss_mib 900", without what is empty."""
    return ", ".join(f"{name} {_word(each)}" for name, each in value if each not in (None, ()) and name != "gpus")


def _word(value: object) -> str:
    if isinstance(value, Measurement):
        return f"null ({value.reason or 'no reason given'})" if value.value is None else _word(value.value)
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}") if isinstance(value, float) else str(value)
