"""Where a row's figures come from: the records, the epochs and the formula behind each, as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

from harness.results import prediction
from harness.results.metrics import METRICS, UNKNOWN
from harness.results.report import memory as categories
from harness.results.report.text import clean
from harness.results.rows import Row
from harness.results.statistics import estimate_mean, median, seeds_needed
from harness.results.store import Stored, load_epochs
from harness.results.values import EpochMetrics, Measurement, RunResult
from harness.results.verdict import Against, seeds_to_tell

Curve = Sequence[EpochMetrics] | str
"""The epochs of a run, or why there are none."""
Run = tuple[Stored, RunResult, Curve]


def why(row: Row) -> str:
    """Explain a row. Reads epochs.jsonl of its runs and says where it and the record disagree."""
    lines = [f"{row.name} on {row.dataset}", ""]
    runs = [(stored, result, _load_curve(stored)) for stored in row.done if (result := stored.record.result)]
    if runs:
        for section in (_errors, _seconds, _memory, _others, _ranks, _nodes):
            if text := list(section(row, runs)):
                lines += [*text, ""]
        lines += [*prediction.in_words(row), ""] if row.predicted else []
    for stored in row.failed:
        if failure := stored.record.failure:
            lines += [f"seed {stored.record.seed} failed: {failure.kind}, {failure.message}", f"  {stored.folder}"]
    for stored in row.pruned:
        if end := stored.record.pruned:
            by = f"pruned by {end.by} of sweep {end.sweep} after epoch {end.epoch} of {end.of}"
            lines += [f"seed {stored.record.seed} was {by}, at {end.error:g} % of the {end.evaluated_on} set"]
            lines += [f"  {stored.folder}"]
    for partial in row.interrupted:
        of = f" of {partial.of}" if partial.of else ""
        lines += [f"{partial.name} is not done: epoch {partial.epochs}{of}", f"  {partial.folder}"]
    lines += ["what these runs share, beside the seed's own:"]
    lines += [f"  {name} = {value}" for name, value in row.fields.items()]
    lines += [f"  {name} is averaged over: {', '.join(values)}" for name, values in row.averaged_over.items()]
    lines += ["what is known of them beside:"] if row.conditions else []
    for name, found in row.conditions.items():
        values = ", ".join(
            f"{value} ({n} of {len(row.done)})" if n < len(row.done) else value for value, n in found.items()
        )
        lines.append(f"  {name} = {values}")
    return "\n".join(map(clean, lines)) + "\n"


def _load_curve(stored: Stored) -> Curve:
    try:
        return load_epochs(stored.folder) or "no epochs.jsonl"
    except (OSError, ValueError) as error:
        return str(error)


def _summary(row: Row, name: str) -> str:
    return METRICS[name].summary(row.figures.get(name, UNKNOWN))


EXPLAINED = {"error", "best_error", "best_epoch", "test_error", "epoch_seconds"}
"""Metrics with lines of their own; all others get a line in `_others` or, of memory, in `_memory`."""


def _errors(row: Row, runs: Sequence[Run]) -> Iterator[str]:
    if (error := row.error) is None:
        return
    where = "test set" if row.evaluated_on == "test" else "images held out"
    yield (
        f"error {_summary(row, 'error')} % = mean ± std (n − 1) of the last epoch's error over {error.n} run(s), on the {where}"
    )
    for stored, result, curve in runs:
        note = f"  {curve}" if isinstance(curve, str) else ""
        if not isinstance(curve, str) and not _equal(curve[-1].error, result.final_error):
            note = f"  but epochs.jsonl ends with {curve[-1].error:g} in epoch {curve[-1].epoch}"
        yield f"  seed {stored.record.seed}  {result.final_error:.4f}  {stored.folder}{note}"
    known = estimate_mean(row.values("error"), runs[0][0].record.images(), row.planned)
    if known is not None and math.isfinite(error.mean):
        interval, spread = known.interval(), known.error * math.sqrt(error.n)
        how = f"moderated spread, {known.freedom:.0f} degrees of freedom"
        yield f"  90 % interval of the mean: {interval.low:.2f} to {interval.high:.2f} ({how})"
        if seeds := seeds_needed(spread, 0.2):
            yield f"  with this spread it takes {seeds} seeds a side to see 0.2 points (power 80 %, alpha 5 %)"
    yield (
        f"best {_summary(row, 'best_error')} % = mean of each run's smallest error; minus last = {row.best_minus_last:+.2f}"
    )
    for stored, result, _ in runs:
        yield f"  seed {stored.record.seed}  {result.best_error:.4f}  in epoch {result.best_epoch}"
    if row.figures["test_error"].value is not None:
        yield f"test set {_summary(row, 'test_error')} % = the same over the test set, after the last epoch"
        for stored, result, _ in runs:
            yield f"  seed {stored.record.seed}  {_figure(result.test_error)}"
    if row.against is not None:
        yield from _against(row, row.against)


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


def _seconds(row: Row, runs: Sequence[Run]) -> Iterator[str]:
    if row.epoch_seconds is None:
        yield "s/epoch: no epoch was timed"
        return
    yield f"s/epoch {row.epoch_seconds:.4g} = median over the runs of each run's median over its timed epochs"
    for stored, result, curve in runs:
        text = f"  seed {stored.record.seed}  {_figure(result.epoch_seconds)}"
        if isinstance(curve, str):
            yield f"{text}  {curve}"
            continue
        timed = [epoch.train_seconds for epoch in curve if epoch.timed]
        if timed:
            text += f"  {len(timed)} epochs timed, {min(timed):.4g} to {max(timed):.4g}"
        if out := _left_out(curve):
            text += f"; left out: {out}"
        if result.widths:
            text += f"; DDP width {'→'.join(map(str, result.widths))}, requested {result.workers}"
        if timed and result.epoch_seconds is not None and not _equal(median(timed), result.epoch_seconds):
            text += f"; but epochs.jsonl gives {median(timed):.4g}"
        yield text


def _memory(row: Row, runs: Sequence[Run]) -> Iterator[str]:
    yield "memory, MiB = the largest of the runs' peaks after warm-up"
    metrics = [metric for metric in METRICS.values() if metric.kind == "memory"]
    for stored, result, _ in runs:
        memory = result.memory
        readings = ", ".join(f"{metric.title} {_reading(metric.measure(result))}" for metric in metrics)
        yield f"  seed {stored.record.seed}  {readings}"
        if memory.warmup_allocated_mib.value is not None:
            allocated, reserved = map(_reading, (memory.warmup_allocated_mib, memory.warmup_reserved_mib))
            yield f"    in set-up and warm-up: alloc {allocated}, resvd {reserved}"
        if (growth := memory.growth_mib_per_epoch.value) is not None:
            yield f"    what is in use grows by {growth:+.2g} MiB an epoch, by least squares over the epochs after warm-up"
        if memory.by_category_mib:
            yield f"    by category: {categories.in_words(memory.by_category_mib)}"
    if not any(result.memory.by_category_mib for _, result, _ in runs):
        yield f"  {categories.NOT_RECORDED}"


def _others(row: Row, runs: Sequence[Run]) -> Iterator[str]:
    """A line for each other metric that was measured: its value, definition and runs."""
    for name, metric in METRICS.items():
        figure = row.figures.get(name, UNKNOWN)
        if name in EXPLAINED or metric.kind == "memory" or figure.value is None:
            continue
        yield f"{metric.heading} {metric.summary(figure)} = {metric.means}"
        values = [metric.text(metric.value(result)) for _, result, _ in runs]
        if metric.over_seeds != "first":
            yield "  " + ", ".join(f"seed {s.record.seed}: {v}" for (s, *_), v in zip(runs, values, strict=True))


RANKS_SHOWN = 64


def _ranks(row: Row, runs: Sequence[Run]) -> Iterator[str]:
    """Which rank was slowest, and what each used; nothing of runs with one rank."""
    several = [run for run in runs if len(run[1].ranks) > 1]
    if several:
        yield "ranks = medians over the timed epochs of the last attempt, and peaks; they wait for one another in each step"
    for stored, result, curve in several:
        text = f"  seed {stored.record.seed}"
        skews = [] if isinstance(curve, str) else [(e.skew, e) for e in curve if e.timed and e.skew is not None]
        if skews:
            largest, epoch = max(skews, key=lambda skew: skew[0])
            text += f"  slowest over fastest rank's epoch: median {median([skew for skew, _ in skews]):.3f}"
            text += f", at most {largest:.3f} (rank {epoch.slowest_rank} in epoch {epoch.epoch})"
        yield text
        for rank in result.ranks[:RANKS_SHOWN]:
            yield (
                f"    rank {rank.rank} on {rank.host}  {_figure(rank.train_seconds)} s/epoch, waiting "
                f"{_figure(rank.data_stall_seconds)} s  MiB: alloc {_whole(rank.torch_allocated_mib)}, resvd "
                f"{_whole(rank.torch_reserved_mib)}, NVML {_whole(rank.nvml_process_mib)}, RSS {_whole(rank.rss_mib)}"
            )
        if len(result.ranks) > RANKS_SHOWN:
            yield f"    and {len(result.ranks) - RANKS_SHOWN} more in its record"


def _nodes(row: Row, runs: Sequence[Run]) -> Iterator[str]:
    if any(result.nodes for _, result, _ in runs):
        yield "nodes, sampled each second from the workers' start to their end, all processes on them:"
    for stored, result, _ in runs:
        for node in result.nodes:
            yield (
                f"  seed {stored.record.seed}  {node.host}  {node.seconds:.0f} s, {node.samples} samples  CPU "
                f"{_reading(node.cpu_percent)} %, memory at most {_reading(node.memory_peak_mib)} MiB"
                + (f"  no GPU: {node.gpus_reason}" if node.gpus_reason else "")
            )
            for gpu in node.gpus:
                yield (
                    f"    GPU {gpu.gpu}  used {_reading(gpu.utilisation_percent)} %  {_reading(gpu.power_watts)} W, at most "
                    f"{_reading(gpu.power_peak_watts)} W  {_reading(gpu.energy_joules)} J  memory at most "
                    f"{_reading(gpu.memory_peak_mib)} MiB"
                )


def _whole(value: float | None) -> str:
    return "null" if value is None else f"{value:,.0f}"


def _reading(reading: Measurement) -> str:
    return _whole(reading.value) if reading.value is not None else f"null ({reading.reason or 'no reason given'})"


def _figure(value: float | None) -> str:
    return "null" if value is None else f"{value:.4g}"


def _equal(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) or (math.isnan(a) and math.isnan(b))


def _left_out(epochs: Sequence[EpochMetrics]) -> str:
    """ "1 (warm-up), 7-9 (interference: the machine swapped)" """
    by_reason: dict[str, list[int]] = {}
    for epoch in epochs:
        if not epoch.timed:
            by_reason.setdefault(epoch.untimed, []).append(epoch.epoch)
    return ", ".join(f"{_ranges(n)} ({reason})" if reason else _ranges(n) for reason, n in by_reason.items())


def _ranges(numbers: Sequence[int]) -> str:
    """[1, 2, 3, 7] -> "1-3, 7"."""
    runs = [list(run) for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)
