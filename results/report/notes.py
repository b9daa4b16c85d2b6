"""Footnotes: what a reader must know about single cells of the table."""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from harness.results.metrics import METRICS, NONE, Metric, figures
from harness.results.report.columns import cost_entry, end_of, printed_entry
from harness.results.rows import TIMED, Row, incomparable
from harness.results.statistics import goal_half, wilson
from harness.results.values import UNMEASURED
from harness.results.verify import contradictions

Noted = Iterator[tuple[str, ...]]
"""A text and the names of the columns that it belongs to."""


MOST_NAMED = 4
_shorten = partial(textwrap.shorten, width=160, placeholder=" …")


def make_notes(rows: Sequence[Row]) -> Mapping[str, Mapping[str, set[int]]]:
    """Everything a reader must know about single cells: a text -> a column's name -> the rows it is of."""
    notes: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    failures: dict[str, list[tuple[int, str]]] = defaultdict(list)  # why -> rows and names
    wrong: list[tuple[int, str]] = []  # rows of runs that contradict themselves, and how
    samples: dict[tuple[str, str, int], dict[int, float]] = defaultdict(dict)
    for i, row in enumerate(rows):
        for source in (_condition_notes, _timing_notes, _run_notes, _published_notes, _reading_notes):
            for text, *columns in source(row):
                for column in columns:
                    notes[text][column].add(i)
        for seed, failure in ((stored.record.seed, stored.record.failure) for stored in row.failed):
            if failure:
                why = _shorten(f"{failure.kind}: {failure.message}".removesuffix(": "))
                failures[why].append((i, f"{row.name} seed {seed}"))
        found = ((run.record.seed, "; ".join(contradictions(run.record))) for run in row.done)
        wrong += [(i, f"{row.name} seed {seed}: {problems}") for seed, problems in found if problems]
        if row.error is not None and 0 <= row.error <= 100 and (images := row.done[0].record.images()):
            samples[row.dataset, row.evaluated_on, images][i] = row.error
    for why, runs in failures.items():
        names = ", ".join(name for _, name in runs[:MOST_NAMED]) + ", …" * (len(runs) > MOST_NAMED)
        said = f"{names} failed, {why}" if len(runs) == 1 else f"{len(runs)} runs failed, {why}: {names}"
        for i, _ in runs:
            notes[said]["n" if rows[i].done else "error"].add(i)
    for i, problem in wrong:
        several = f"{len(wrong)} runs contradict themselves: see harness verify; {wrong[0][1]}"
        notes[several if len(wrong) > MOST_NAMED else f"{problem}; see harness verify"]["n"].add(i)
    for (dataset, on, images), errors in samples.items():  # at the smallest and the largest error of a data set
        ends = [(e, wilson(e, images, len(errors))) for e in sorted({min(errors.values()), max(errors.values())})]
        leave = ", ".join(f"{i.low:.2f} to {i.high:.2f} % at {error:.2f} %" for error, i in ends)
        kind, why = "test", "no other interval includes that: they are of these images"
        if on == "val":
            kind, why = "held-out", "each seed holds out others, so that the spread over seeds includes that"
        level = "95 %" + f" for all {len(errors)} rows at once" * (len(errors) > 1)
        said = f"with {images:,} {kind} images of {dataset}, these networks' error on all such images is {leave} (Wilson, {level})"
        notes[f"{said}; {why}"] = {"error": set(errors)}
    return notes


HELD_OUT = "of held-out training images, not of the test set"
NOTED_APART = {"uncommitted changes", "check", "concurrent runs", "runs per GPU"}


def _condition_notes(row: Row) -> Noted:
    """What its errors are of, and what differs between its runs without splitting it."""
    for text, column in incomparable(row):
        yield f"{text}: not compared with published errors", column
    if row.evaluated_on == "val":
        yield HELD_OUT, "error", "accuracy", "best_error", "top5_error"
    if row.batch_norm_images != row.batch_size:
        yield f"batch norm over {row.batch_norm_images} images a worker", "workers"
    known = {name: [*v, *[NONE] * (sum(v.values()) < len(row.done))] for name, v in row.conditions.items()}
    if mixed := [name for name, values in known.items() if len(values) > 1 and name not in NOTED_APART]:
        told = (f"{name} ({', '.join(value[:40] for value in known[name])})" for name in mixed)
        yield f"its runs differ in {', '.join(told)}", "n"
    if dirty := row.conditions.get("uncommitted changes", {}).get("True"):
        yield f"{dirty} of {len(row.done)} runs had uncommitted changes: the commit alone is not their code", "n"
    checks = row.conditions.get("check", {})
    if row.done and row.fields.get("device") == "cuda" and checks.get("passed", 0) < len(row.done):
        word = "device failed its check" if "failed" in checks else "device never checked: `harness check`"
        some = checks.get("failed") or len(row.done) - checks.get("passed", 0)
        yield word + f" in {some} of {len(row.done)} runs" * (some < len(row.done)), "device"


def comparison_notes(row: Row) -> Iterator[str]:
    """What a reader must know of a row's figures where it is compared with another."""
    if row.evaluated_on == "val":
        yield f"error % is {HELD_OUT}"
    yield from (text for text, *columns in _timing_notes(row) if "epoch_seconds" in columns)
    for stored in row.done:
        yield from (f"seed {stored.record.seed}: {p}; see harness verify" for p in contradictions(stored.record))


def _timing_notes(row: Row) -> Noted:
    if disturbed := [result for result in row.results if result.all_disturbed]:
        causes = ", ".join(dict.fromkeys(cause for result in disturbed for cause in result.interference))
        of = [name for name in TIMED if row.figures[name].value is not None]
        of += ["published_epoch_seconds"] * bool(cost_entry(row))
        yield f"no epoch was undisturbed ({causes}): the seconds are of disturbed ones", *of
    concurrent = row.conditions.get("concurrent runs", {}).keys()
    if concurrent - {"1"}:
        yield f"timed with {' or '.join(sorted(concurrent))} runs training at the same time", "epoch_seconds"
    for stored, result in zip(row.done, row.results, strict=True):
        if result.mfu.value is not None:
            peak = figures((result.peak_flops or 0) / 1e12)
            yield f"over {peak} TFLOP/s a worker: {result.device}, {result.peak_source}", "mfu"
        if result.runs_per_gpu > 1:
            yield f"{result.runs_per_gpu} runs shared each GPU", "epoch_seconds"
        if result.warmup_epochs == 0 and result.epoch_seconds is not None:
            yield "from runs of one epoch: the seconds include the warm-up", "epoch_seconds"
        for warning in result.warnings:
            own = f"{row.name} seed {stored.record.seed}: {_shorten(warning)}", "n"
            yield (warning, "engine") if warning.startswith("engine ") else own
        for cause in () if result.all_disturbed else result.interference:
            yield f"{cause} in some epochs: they are left out", "epoch_seconds"
    if "widths" in row.fields:
        yield f"epochs with fewer than {row.workers} workers are left out", "epoch_seconds"


def _run_notes(row: Row) -> Noted:
    where = "n" if row.done else "error"
    if row.repeated:
        yield "a seed that was run more than once counts with its last run", "n"
    if row.planned:
        until = max(run.record.added_until or 0.0 for run in row.done)
        images = row.done[0].record.images(test=row.evaluated_on == "val")
        half = goal_half(row.values(row.test_metric), images)
        known = f"; the error is known to ±{half:.2f} points (95 %)" if until < half < math.inf else ""
        yield f"seeds after the first {row.planned} were added towards ±{until:g} points{known}", "n"
    for stored in row.pruned:
        beside = f"{row.name} seed {stored.record.seed} was {end_of(stored)} epochs by a search"
        yield beside if row.done else "pruned by a search before its end: not averaged with other runs", where
    for run in row.interrupted:
        name = f"{row.name} seed {run.spec['seed']}" if "seed" in run.spec else run.name
        yield f"{name} is not done: {end_of(run)}", where


RULES = {
    "best": "best epoch, set beside our best",
    "unstated": "epoch not stated: a verdict holds for our last and our best",
}


def _published_notes(row: Row) -> Noted:
    """Where published numbers come from, and what is to be known about them."""
    if row.against is not None:
        entry = row.against.published
        runs = f"{entry.statistic} of {entry.n} runs" if entry.n > 1 else "one run"
        std = "" if entry.std is None else f", std {entry.std:.2f}"
        parts = (entry.source, runs + std, RULES.get(entry.rule), "top-5" * (entry.error is None), entry.note)
        yield "; ".join(filter(None, parts)), "published"
        if row.against.reason:
            yield f"no verdict: {row.against.reason}", "verdict"
    for variant, column in ((row.variant, "published_error"), ("he2015", "paper_error")):
        if (printed := printed_entry(row, variant)) and printed.dataset != row.fields.get("dataset"):
            yield f"the error on {printed.dataset}: not compared with that on {row.dataset}", column
    if (cost := cost_entry(row)) and (cost.epoch_seconds or cost.memory_mib):
        evaluated = "; the seconds include evaluation, ours do not" * cost.evaluation_timed
        text = f"on {cost.hardware}, {cost.year}{evaluated}: {cost.source}"
        yield text, "published_epoch_seconds", "published_memory_mib"


def _reading_notes(row: Row) -> Noted:
    """What is to be known of figures, or why they are missing, in all runs or in some; a GPU's are not expected of a CPU."""
    missing: dict[str, list[Metric]] = defaultdict(list)
    for name, metric in METRICS.items():
        figure = row.figures[name]
        expected = metric.in_table and metric.device in (None, "cpu", row.fields.get("device"))
        if figure.remarks and metric.in_table and metric.device in (None, row.fields.get("device")):
            some = f" in {len(figure.remarks)} of {len(row.done)} runs" * (len(figure.remarks) < len(row.done))
            more = " (of one run; for the others see harness why)" * (len(set(figure.remarks)) > 1)
            yield f"{metric.title}{some}: {_shorten(figure.remarks[0])}{more}", name
        if not expected or figure.reason in (None, UNMEASURED.reason) or not row.done:
            continue
        reason = figure.reason + (_left_out(row) if figure.reason == METRICS["epoch_seconds"].missing else "")
        some = f" in {len(row.done) - figure.n} of {len(row.done)} runs" if figure.n else ""
        missing[f"not measured{some}: {_shorten(reason)}"].append(metric)
    for reason, metrics in missing.items():
        yield f"{', '.join(metric.title for metric in metrics)} {reason}", *(metric.name for metric in metrics)


def _left_out(row: Row) -> str:
    """Why no epoch of some runs was timed, in brackets, each cause once."""
    lacking = (r.timing for r in row.results if r.timing and (r.epoch_seconds is None or r.all_disturbed))
    parts = (part for timing in lacking for why in timing.untimed for part in why.split("; "))
    causes = (cause for part in parts for cause in part.removeprefix("interference: ").split(", ") if cause)
    return f" ({known})" if (known := ", ".join(dict.fromkeys(causes))) else ""
