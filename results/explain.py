"""Where a row's figures come from: the records, the epochs and the formula behind each, as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from harness.results import prediction as predicted
from harness.results.report import memory as categories
from harness.results.report.text import clean
from harness.results.rows import Row
from harness.results.statistics import Sample, confidence_interval, median, seeds_needed, seeds_to_tell
from harness.results.store import Stored, load_epochs
from harness.results.values import EpochMetrics, Measurement, RunResult


def why(row: Row) -> str:
    """Explain a row. Reads epochs.jsonl of its runs and says where it and the record disagree."""
    lines = [f"{row.name} on {row.dataset}", ""]
    runs = [(stored, stored.record.result) for stored in row.done if stored.record.result is not None]
    epochs = [_epochs(stored) for stored, _ in runs]
    if row.error is not None:
        lines += _errors(row, row.error, runs, epochs)
        lines += _seconds(row, runs, epochs)
        lines += _memory(runs)
        lines += _ranks(runs, epochs)
        lines += _nodes(runs)
        lines += [*predicted.in_words(row), ""] if row.predicted else []
    for stored in row.failed:
        if failure := stored.record.failure:
            lines += [f"seed {stored.record.seed} failed: {failure.kind}, {failure.message}", f"  {stored.folder}"]
    for stored in row.pruned:
        if pruned := stored.record.pruned:
            lines += [
                f"seed {stored.record.seed} was pruned by {pruned.by} of sweep {pruned.sweep} after epoch "
                f"{pruned.epoch} of {pruned.of}, at {pruned.error:g} % of the {pruned.evaluated_on} set",
                f"  {stored.folder}",
            ]
    for partial in row.interrupted:
        of = f" of {partial.of}" if partial.of else ""
        lines += [f"{partial.name} is not done: epoch {partial.epochs}{of}", f"  {partial.folder}"]
    lines += ["what these runs share, beside the seed's own:"]
    lines += [f"  {name} = {value}" for name, value in row.fields.items()]
    lines += [f"  {name} is averaged over: {', '.join(values)}" for name, values in row.averaged_over.items()]
    return "\n".join(map(clean, lines)) + "\n"


def _epochs(stored: Stored) -> Sequence[EpochMetrics] | str:
    """The epochs of a run, or why there are none."""
    try:
        return load_epochs(stored.folder) or "no epochs.jsonl"
    except (OSError, ValueError) as error:
        return str(error)


def _errors(
    row: Row, error: Sample, runs: list[tuple[Stored, RunResult]], epochs: list[Sequence[EpochMetrics] | str]
) -> Iterator[str]:
    yield (
        f"error {_spread(error)} % = mean ± std (n − 1) of the last epoch's error over {error.n} run(s), on the "
        + ("test set" if row.evaluated_on == "test" else "images held out")
    )
    for (stored, result), curve in zip(runs, epochs, strict=True):
        note = f"  {curve}" if isinstance(curve, str) else ""
        if not isinstance(curve, str) and not _equal(curve[-1].error, result.final_error):
            note = f"  but epochs.jsonl ends with {curve[-1].error:g} in epoch {curve[-1].epoch}"
        yield f"  seed {stored.record.seed}  {result.final_error:.4f}  {stored.folder}{note}"
    if interval := confidence_interval(error):
        yield f"  95 % interval of the mean: {interval.low:.2f} to {interval.high:.2f} (Student's t, {error.n - 1} degrees)"
    if error.std and (seeds := seeds_needed(error.std, 0.2)):
        yield f"  with this spread it takes {seeds} seeds a side to see 0.2 points (power 80 %, alpha 5 %)"
    if row.best_error is not None and row.best_minus_last is not None:
        yield f"best {row.best_error.mean:.2f} % = mean of each run's smallest error; minus last = {row.best_minus_last:+.2f}"
        for stored, result in runs:
            yield f"  seed {stored.record.seed}  {result.best_error:.4f}  in epoch {result.best_epoch}"
    if row.test_error is not None:
        yield f"test set {_spread(row.test_error)} % = the same over the test set, after the last epoch"
        for stored, result in runs:
            yield f"  seed {stored.record.seed}  {_figure(result.test_error)}"
    if row.against is not None:
        published, verdict = row.against.published, row.against.verdict
        number = published.error if published.error is not None else published.top5_error
        yield f"published {number} % (n = {published.n}, {published.rule} epoch): {published.source}"
        yield f"  difference = {row.against.ours.mean:.4f} − {number} = {row.against.difference:+.4f}"
        if verdict is None:
            yield "  one run on each side: no verdict"
        else:
            yield (
                f"  {verdict.verdict}: p = {verdict.p:.3g}; from our spread it was expected between "
                f"{verdict.interval.low:.2f} and {verdict.interval.high:.2f} (95 %)"
            )
        if row.against.ours.std:
            seeds = seeds_to_tell(row.against.ours.std, row.against.difference, published.n)
            yield (
                f"  {seeds} seeds would tell such a difference" if seeds else "  no number of seeds would tell it"
            )
    yield ""


def _seconds(
    row: Row, runs: list[tuple[Stored, RunResult]], epochs: list[Sequence[EpochMetrics] | str]
) -> Iterator[str]:
    if row.epoch_seconds is None:
        yield from ("s/epoch: no epoch was timed", "")
        return
    yield f"s/epoch {row.epoch_seconds:.4g} = median over the runs of each run's median over its timed epochs"
    for (stored, result), curve in zip(runs, epochs, strict=True):
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
            text += f"; DDP width {'→'.join(map(str, result.widths))}, asked for {result.workers}"
        if timed and result.epoch_seconds is not None and not _equal(median(timed), result.epoch_seconds):
            text += f"; but epochs.jsonl gives {median(timed):.4g}"
        yield text
    yield f"images/s {_figure(row.images_per_second)}, wait {_figure(row.data_stall_percent)} %: the same medians"
    yield ""


def _memory(runs: list[tuple[Stored, RunResult]]) -> Iterator[str]:
    yield "memory, MiB = the largest of the runs' peaks after warm-up"
    for stored, result in runs:
        memory = result.memory
        yield (
            f"  seed {stored.record.seed}  torch allocated {_reading(memory.torch_allocated_mib)}, reserved "
            f"{_reading(memory.torch_reserved_mib)}, NVML {_reading(memory.nvml_process_mib)}, "
            f"RSS {_reading(memory.rss_mib)}"
        )
        if memory.warmup_allocated_mib.value is not None:
            yield (
                f"    in set-up and warm-up: torch allocated {_reading(memory.warmup_allocated_mib)}, reserved "
                f"{_reading(memory.warmup_reserved_mib)}"
            )
        if (growth := memory.growth_mib_per_epoch.value) is not None:
            yield f"    what is in use grows by {growth:+.2g} MiB an epoch, by least squares over the epochs after warm-up"
        if memory.by_category_mib:
            yield f"    by category: {categories.in_words(memory.by_category_mib)}"
    if not any(result.memory.by_category_mib for _, result in runs):
        yield f"  {categories.NOT_RECORDED}"
    yield ""


RANKS_SHOWN = 64


def _ranks(runs: list[tuple[Stored, RunResult]], epochs: list[Sequence[EpochMetrics] | str]) -> Iterator[str]:
    """Who was slowest, and what each rank used; nothing of runs with one."""
    several = [(stored, result, curve) for (stored, result), curve in zip(runs, epochs, strict=True)
               if len(result.ranks) > 1]  # fmt: skip
    if not several:
        return
    yield "ranks = medians over the timed epochs of the last attempt, and peaks; they wait for one another in each step"
    for stored, result, curve in several:
        skews = [] if isinstance(curve, str) else [row for row in curve if row.timed and row.skew is not None]
        text = f"  seed {stored.record.seed}"
        if skews:
            worst = max(skews, key=lambda row: row.skew or 0.0)
            text += (
                f"  slowest over fastest rank's epoch: median {median([row.skew or 0.0 for row in skews]):.3f}, at most "
                f"{worst.skew:.3f} (rank {worst.slowest_rank} in epoch {worst.epoch})"
            )
        yield text
        for rank in result.ranks[:RANKS_SHOWN]:
            yield (
                f"    rank {rank.rank} on {rank.host}  {_figure(rank.train_seconds)} s/epoch, waiting "
                f"{_figure(rank.data_stall_seconds)} s  MiB: torch allocated {_whole(rank.torch_allocated_mib)}, reserved "
                f"{_whole(rank.torch_reserved_mib)}, NVML {_whole(rank.nvml_process_mib)}, RSS {_whole(rank.rss_mib)}"
            )
        if len(result.ranks) > RANKS_SHOWN:
            yield f"    and {len(result.ranks) - RANKS_SHOWN} more in its record"
    yield ""


def _nodes(runs: list[tuple[Stored, RunResult]]) -> Iterator[str]:
    """What each node did meanwhile."""
    if not any(result.nodes for _, result in runs):
        return
    yield "nodes, sampled each second from the workers' start to their end, all processes on them:"
    for stored, result in runs:
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
    yield ""


def _whole(value: float | None) -> str:
    return "null" if value is None else f"{value:,.0f}"


def _reading(reading: Measurement) -> str:
    return (
        f"{reading.value:,.0f}" if reading.value is not None else f"null ({reading.reason or 'no reason given'})"
    )


def _figure(value: float | None) -> str:
    return "null" if value is None else f"{value:.4g}"


def _spread(value: Sample) -> str:
    return f"{value.mean:.2f}" if value.std is None else f"{value.mean:.2f} ± {value.std:.2f}"


def _equal(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) or (math.isnan(a) and math.isnan(b))


def _left_out(epochs: Sequence[EpochMetrics]) -> str:
    """ "1 (warm-up), 7-9 (interference: the machine swapped)"; older records do not say all."""
    by_reason: dict[str, list[int]] = {}
    for epoch in epochs:
        if not epoch.timed:
            reason = epoch.untimed or (
                "interference: " + ", ".join(epoch.interference) if epoch.interference else ""
            )
            by_reason.setdefault(reason, []).append(epoch.epoch)
    return ", ".join(f"{_ranges(n)} ({reason})" if reason else _ranges(n) for reason, n in by_reason.items())


def _ranges(numbers: Sequence[int]) -> str:
    """[1, 2, 3, 7] -> "1-3, 7"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
