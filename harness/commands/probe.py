"""Short probes of the runs that are missing: what they will cost (--estimate), where a step's time goes (--profile).

A cell is all runs that differ in the seed only. Its probe trains some steps as the run would, on the same loader, ranks
and devices, and writes nothing.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from harness.cluster.job import Failed, Report, Started, Worker
from harness.cluster.workers import gather
from harness.deadline import stopping_on_sigterm
from harness.loaders.loader import Loader
from harness.progress import duration, print_columns, say, width_of
from harness.record import classify
from harness.resources import Session
from harness.results.metrics import NONE, figures
from harness.results.report.text import fill_template
from harness.results.store import keep_prediction, load_predictions
from harness.results.values import EpochMetrics, Measurement, Prediction, measured
from harness.spec import RunPaths, RunSpec
from harness.training import rates
from harness.training.engine import Engine
from harness.training.evaluation import evaluating
from harness.training.memory import largest
from harness.training.recipe import total_steps
from harness.training.setup import Trainer, make_step, prepare, training
from harness.training.step import deterministic_algorithms, make_autocast, synchronize
from harness.training.telemetry import EpochTelemetry, device_name
from harness.training.train import run_steps, why_no_energy
from harness.training.watchdog import Watchdog

WARMUP_STEPS = 10  # not timed
STEPS = 30
QUEUE_STEPS = 5  # of STEPS, or as many batches as were made ahead: they do not show the loader's pace
EVAL_BATCHES = 3
ENERGY_SECONDS = 0.2  # NVML's counter changes about ten times a second
MEMORY = {
    "alloc": "torch_allocated_mib", "resvd": "torch_reserved_mib", "NVML": "nvml_process_mib", "RSS": "rss_mib",
}  # fmt: skip
SPARE = ("RSS", "resvd", "kJ", "GPU-h", "eval", "alloc", "width", "runs", "NVML", "sum")  # on a narrow terminal
PARTS = ("data", "forward", "backward", "all-reduce", "optimizer")
Outcomes = Sequence[tuple[RunSpec, Any]]  # by cell: a Prediction or a Breakdown, or Failed
Predict = Callable[[RunSpec, Worker, Report], Prediction]
UNPROBED = Measurement(value=None, reason="only one worker was probed")


def count_cells(specs: Sequence[RunSpec]) -> dict[RunSpec, int]:
    """Each spec as of seed 0, and how many of these runs it has."""
    return dict(Counter(replace(spec, seed=0) for spec in specs))


def probe(
    what: str, todo: Sequence[RunSpec], session: Session, console: Console, measured: rates.Measured | None = None
) -> bool:
    """Probe every cell of the missing runs where its runs would be, and print what comes of it: "estimate", whose
    predictions are stored, or "profile". Returns whether a probe failed.

    A single worker on this machine is probed in this process. `measured`: all-reduces of a cluster, over which an
    estimate then says how far each cell scales.
    """
    if not todo:
        say(console, f"nothing to {what}: all runs are done already; --force probes them all the same")
        return False
    allocation, paths, cells = session.allocation, session.paths, count_cells(todo)
    if allocation.workers == 1 and session.resources.address is None:
        session = replace(session, resources=replace(session.resources, launcher="local"))
    at_once = -(-allocation.concurrent_runs // allocation.runs_per_gpu)
    alone = replace(allocation, runs_per_gpu=1, concurrent_runs=at_once)
    session = replace(session, allocation=alone)  # no two probes share a GPU

    def progress(spec: RunSpec, event: Any) -> None:
        if isinstance(event, Started):
            say(console, f"{spec.name}: probing", style="dim")

    function = partial(predict if what == "estimate" else break_down, paths=paths)
    with stopping_on_sigterm(), closing(session.launch(function, list(cells), progress=progress)) as runs:
        by_cell = dict(runs)
    outcomes = [(cell, by_cell[cell]) for cell in cells]
    for cell, outcome in outcomes:
        if isinstance(outcome, Prediction):
            keep_prediction(paths.out, cell.key, outcome)
    if what == "estimate":
        print_estimate(outcomes, todo, allocation.concurrent_runs, console, alone=alone.concurrent_runs)
        for cell in cells if measured else ():
            predict_scaling(cell, session, partial(predict, paths=paths), measured or {}, console)
    else:
        print_profile(outcomes, console)
    return any(isinstance(outcome, Failed) for _, outcome in outcomes)


def print_outcomes(
    outcomes: Outcomes, columns: Sequence[str], lines_of: Callable[[RunSpec, Any], list[list[str]]],
    console: Console, note: str = "",
) -> None:  # fmt: skip
    """Print the lines of each cell, without the columns that nothing is known of, and why probes failed."""
    lines, failures = list[list[str]](), list[str]()
    for spec, outcome in outcomes:
        if isinstance(outcome, Failed):
            failure = classify(outcome)
            failures.append(f"{spec.name} failed, {failure.kind}: {failure.message}")
            own = [[failure.kind, *[NONE] * (len(columns) - 1)]]
        else:
            own = lines_of(spec, outcome)
        lines += [[spec.name, width_of(spec), *own[0]], *(["", "", *more] for more in own[1:])]
    cells = dict(zip(("run", "width", *columns), zip(*lines, strict=True), strict=True))
    known = {name: column for name, column in cells.items() if set(column) - {NONE, ""}}
    first = outcomes[0][0]
    title = f"{first.loader} · {first.precision} · {'GPU' if first.device == 'cuda' else 'CPU'}{note}"
    print_columns(known, console, title=title, left=("run", "width"), spare=SPARE)
    for line in failures:
        say(console, line)


# --- --estimate ---


def count_steps(loader: Loader) -> tuple[int, int]:
    """Steps of a probe that use up what a loader made ahead, and all of them: those after it are whole calls."""
    queue = max(QUEUE_STEPS, loader.call_steps * (1 + loader.calls_ahead))
    return queue, queue + loader.call_steps * -(-(STEPS - QUEUE_STEPS) // loader.call_steps)


def time_steps(trainer: Trainer, epoch: int) -> tuple[EpochMetrics, float]:
    """Train as many steps as show the loader's pace. Returns them, and the seconds of a whole epoch."""
    loader, device = trainer.run.train_loader, trainer.run.device
    queue, steps = count_steps(loader)
    requested_at = 0.0

    def batches(epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal requested_at
        for step, batch in enumerate(loader.epoch(epoch, first_step), 1):
            yield batch
            if step == queue:
                synchronize(device)
                requested_at = time.perf_counter()

    paced: Any = SimpleNamespace(epoch=batches, steps=loader.steps)
    metrics = run_steps(replace(trainer, run=replace(trainer.run, train_loader=paced)), epoch=epoch, steps=steps)
    # where all steps come from the queue, they are the epoch
    pace = (time.perf_counter() - requested_at) / max(1, metrics.steps - queue)
    return metrics, metrics.train_seconds + (loader.steps - metrics.steps) * pace


def time_eval(trainer: Trainer, loader: Loader) -> float:
    """Seconds of a batch of an evaluation: the mean of the first EVAL_BATCHES."""
    batches, started_at = min(EVAL_BATCHES, loader.steps), time.perf_counter()
    device, precision = trainer.run.device, trainer.run.spec.precision
    with evaluating(trainer.run.network):
        for images, _ in itertools.islice(loader.epoch(0), batches):
            with make_autocast(device, precision):
                trainer.forward(images)
        synchronize(device)
    return (time.perf_counter() - started_at) / max(1, batches)


def predict(spec: RunSpec, worker: Worker, report: Report, *, paths: RunPaths) -> Prediction:
    """Train some steps of a run, evaluate some batches, and predict the whole. Raises what `prepare` does.

    The steps belong to two epochs: WARMUP_STEPS of the first, up to `count_steps` of the second.
    """
    entered_at = time.perf_counter()
    prepared = prepare(spec, worker, paths)
    device, loader, test_loader = prepared.device, prepared.train_loader, prepared.test_loader
    with (
        deterministic_algorithms(spec), closing(prepared), closing(EpochTelemetry(device)) as telemetry,
        training(prepared) as trainer,
    ):  # fmt: skip
        run_steps(trainer, epoch=0, steps=WARMUP_STEPS)
        setup_seconds = worker.launch_seconds + time.perf_counter() - entered_at
        time_eval(trainer, prepared.eval_loader)
        prepared.meter.reset()
        telemetry.start()
        metrics, epoch_seconds = time_steps(trainer, 1)
        reading = telemetry.stop(metrics.train_seconds)
        eval_batches = prepared.eval_loader.steps + (test_loader.steps if test_loader else 0)
        eval_seconds = time_eval(trainer, prepared.eval_loader) * eval_batches
        memory = largest(gather(trainer.measure_memory()))

    joules, reason = reading.energy_joules, why_no_energy(worker)
    if joules is not None and metrics.train_seconds < ENERGY_SECONDS:
        joules, reason = None, f"{metrics.steps} steps are too short for NVML's energy counter"
    energy = measured(joules and joules * loader.steps / metrics.steps, reason)
    values = spec.to_json()
    del values["seed"]
    return Prediction(
        spec=values, steps=metrics.steps, epoch_seconds=epoch_seconds, eval_seconds=eval_seconds,
        setup_seconds=setup_seconds, epochs=total_steps(spec.recipe, loader.steps) / loader.steps,
        energy_joules=energy, memory=memory, interference=reading.interference, workers=worker.world_size,
        threads=worker.threads, device=device_name(device), made_at=datetime.now(UTC), epoch_steps=loader.steps,
        gradient_bytes=sum(4 * p.numel() for p in prepared.network.parameters() if p.requires_grad),  # fp32
    )  # fmt: skip


def all_seconds(todo: Sequence[RunSpec], predicted: Mapping[RunSpec, float], concurrent_runs: int) -> float:
    """Seconds until all runs are done, `concurrent_runs` at a time, each started in its order when another ends."""
    free_at = [0.0] * concurrent_runs
    for spec in todo:
        heapq.heapreplace(free_at, free_at[0] + predicted.get(replace(spec, seed=0), 0.0))
    return max(free_at)


def print_estimate(
    outcomes: Outcomes, todo: Sequence[RunSpec], concurrent_runs: int, console: Console, *, alone: int = 0
) -> None:
    """Print a line for each cell, the sums of those that were predicted, and notes. `alone`: how many of the concurrent
    runs can have a GPU to themselves, as a probe has (0: all); where they cannot, they are counted as if they took turns."""
    runs, on_gpu = count_cells(todo), outcomes[0][0].device == "cuda"
    predicted = {spec: outcome for spec, outcome in outcomes if isinstance(outcome, Prediction)}
    hours = {s: runs[s] * one.workers * one.run_seconds / 3600 for s, one in predicted.items()}
    joules = {s: one.run_joules.value for s, one in predicted.items()}
    kilojoules = {s: None if value is None else runs[s] * value / 1000 for s, value in joules.items()}
    missing: dict[str, dict[str, None]] = defaultdict(dict)  # reason -> columns

    def line(spec: RunSpec, one: Prediction) -> list[list[str]]:
        memory = {name: getattr(one.memory, field) for name, field in MEMORY.items()}
        for name, figure in {**memory, "kJ": one.energy_joules}.items():
            if figure.value is None:
                missing[str(figure.reason)][name] = None
        seconds = [figures(one.epoch_seconds), duration(one.eval_seconds), duration(one.run_seconds)]
        held = (figure.value for figure in memory.values())
        rest = map(figures, (hours[spec] if on_gpu else None, *held, kilojoules[spec]))
        return [[*seconds, str(runs[spec]), *rest]]

    print_outcomes(outcomes, ("s/epoch", "eval", "a run", "runs", "GPU-h", *MEMORY, "kJ"), line, console)
    known = [value for value in kilojoules.values() if value is not None]
    seconds = all_seconds(todo, {s: one.run_seconds for s, one in predicted.items()}, alone or concurrent_runs)
    text = fill_template(
        "estimate.txt.j2", count=sum(map(runs.__getitem__, predicted)), concurrent_runs=concurrent_runs, on_gpu=on_gpu,
        duration=duration(seconds), hours=sum(hours.values()), predicted=predicted, missing=missing, figures=figures,
        shared=0 < alone < concurrent_runs, kilojoules=sum(known) if len(known) == len(predicted) else None,
    )  # fmt: skip
    say(console, text.rstrip())


def predict_scaling(
    cell: RunSpec, session: Session, run: Predict, measured: rates.Measured, console: Console
) -> None:
    """Probe one worker with its share of the batch at 1, 2, 4, ... workers, as many as all-reduces were measured between;
    print what epochs take at these widths by `measured`, and store it for runs that no probe has predicted."""
    batch, out = cell.recipe.batch_size, session.paths.out
    most = int(max(way["ranks"] for way in measured.values()))
    counts = [n for n in (2**power for power in range(most.bit_length())) if batch % n == 0]
    shares = [replace(cell, workers=1, recipe=replace(cell.recipe, batch_size=batch // n)) for n in counts]
    job = replace(session.allocation, workers=1, concurrent_runs=1, fallback_world_sizes=())
    alone, known = replace(session, allocation=job), dict[int, Prediction]()  # by the number of workers
    for share, outcome in alone.launch(run, shares, progress=lambda *_: None, row=lambda _: None):
        images = share.recipe.batch_size
        if isinstance(outcome, Failed):
            failure = classify(outcome)
            say(console, f"{cell.name} with {images} images a worker: {failure.kind}: {failure.message}")
        else:
            known[batch // images] = outcome
    if not known:
        return
    fewest = min(known)
    steps, size = -(-(known[fewest].epoch_steps or 0) // fewest), known[fewest].gradient_bytes or 0
    seconds = {workers: one.epoch_seconds / (one.epoch_steps or 1) for workers, one in known.items()}
    widths = rates.predict_widths(steps, size, seconds, measured)
    print_widths(cell, widths, size, console)
    probed = [prediction.spec for prediction in load_predictions([out]) if prediction.hidden_epoch_seconds is None]
    for width in widths:
        wide, one = replace(cell, workers=width.workers), known[width.workers]
        spec = {name: value for name, value in wide.to_json().items() if name != "seed"}
        if width.workers > 1 and spec not in probed:
            changes = {
                "spec": spec, "workers": width.workers, "epoch_seconds": width.apart, "epoch_steps": steps,
                "hidden_epoch_seconds": width.hidden, "eval_seconds": one.eval_seconds / width.workers,
                "energy_joules": UNPROBED,
            }  # fmt: skip
            keep_prediction(out, wide.key, one.model_copy(update=changes))


def print_widths(cell: RunSpec, widths: Sequence[rates.Width], size: int, console: Console) -> None:
    """A line for each width, how many workers pay, and what is assumed."""
    apart, hidden = rates.efficiencies(widths, "apart"), rates.efficiencies(widths, "hidden")
    columns = {
        "workers": [str(width.workers) for width in widths],
        "images each": [str(cell.recipe.batch_size // width.workers) for width in widths],
        "step ms": [figures(1000 * width.step_seconds) for width in widths],
        "all-reduce ms": [figures(1000 * width.reduce_seconds) for width in widths],
        "s/epoch": [figures(width.apart) for width in widths],
        "if hidden": [figures(width.hidden) for width in widths],
        "efficient": [f"{100 * a:.0f}–{100 * h:.0f} %" for a, h in zip(apart, hidden, strict=True)],
    }
    title = f"{cell.name} over the cluster, predicted from its measurements"
    print_columns(columns, console, title=title, left=(), spare=("images each",))
    pays = "{} ({}) if no all-reduce is hidden behind computation, {} ({}) if as much as possible is"
    limits = (*rates.find_limit(widths, "apart"), *rates.find_limit(widths, "hidden"))
    say(console, f"workers that pay off: {pays.format(*limits)}", style="bold")
    about = (
        f"more workers pay off while they are faster and at least {100 * rates.LEAST_EFFICIENCY:.0f} % efficient; DDP hides a part, so "
        f"a run lies between the two; {size / 1e6:.3g} MB of gradients, by the measured latency and bus bandwidth"
    )
    sync = "; the all-reduces of synchronised batch norm are left out" * (cell.recipe.batch_norm == "sync")
    say(console, about + sync, style="dim")


# --- --profile ---


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Milliseconds of a step: means over the middle half of some steps by their length, of the slowest rank."""

    parts: dict[str, float]  # by PARTS; no all-reduce with one rank
    eager_ms: float  # a step of which these are the parts
    engine_ms: float  # a step as the run takes it
    engine: str
    steps: int


class StepClock:
    """Records when each part of a step has been queued; knows the milliseconds that each took on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._marks = device, list[tuple[str, Any]]()

    def mark(self, name: str) -> None:
        """This part has been queued."""
        self._marks.append((name, rates.instant(self._device)))

    def read(self) -> dict[str, list[float]]:
        """Milliseconds of each part, step after step; a part lasts from the mark before it, so the first step is
        left out."""
        synchronize(self._device)
        parts = defaultdict[str, list[float]](list)
        for (_, before), (name, after) in itertools.pairwise(self._marks):
            parts[name].append(1000 * rates.seconds_between(before, after))
        return {name: parts[name][-len(parts["data"]) :] for name in PARTS if name in parts}


def break_down(spec: RunSpec, worker: Worker, report: Report, *, paths: RunPaths) -> Breakdown:
    """Train some steps of a run twice: part by part with eager kernels, and as its engine does. Raises what `prepare`
    does."""
    prepared = prepare(spec, worker, paths)
    device, loader = prepared.device, prepared.train_loader
    with deterministic_algorithms(spec), closing(prepared):
        if loader.steps < 2:
            raise ValueError("an epoch of one step is too short to profile")
        # several ranks' gradients are summed after backward here, not by DDP inside it, where they hide behind it
        step, clock = make_step(prepared, ddp=False), StepClock(device)
        plain = Engine("eager", step)
        with closing(Watchdog(device)) as watchdog:
            by_parts = Trainer(prepared, step, plain, plain, watchdog)
            run_steps(by_parts, epoch=0, steps=WARMUP_STEPS)
            step.mark = clock.mark
            run_steps(by_parts, epoch=1, steps=STEPS)
            parts = clock.read()
        with training(prepared) as trainer:
            run_steps(trainer, epoch=2, steps=WARMUP_STEPS)
            metrics = run_steps(trainer, epoch=3, steps=STEPS)
    took = np.array(list(parts.values()))  # (parts, steps)
    quarter = took.shape[1] // 4  # the same steps of all parts, or they would not add up
    middle = took.sum(0).argsort()[quarter : took.shape[1] - quarter]
    means = dict(zip(parts, took[:, middle].mean(1).tolist(), strict=True))
    engine_ms = 1000 * metrics.train_seconds / metrics.steps
    ranks = gather(Breakdown(means, sum(means.values()), engine_ms, trainer.engine.name, took.shape[1]))
    slowest = max(ranks, key=lambda rank: rank.eager_ms)
    return replace(slowest, engine_ms=max(rank.engine_ms for rank in ranks))


def print_profile(outcomes: Outcomes, console: Console) -> None:
    """Print two lines for each cell, milliseconds and shares, and what they are."""
    steps = {o.steps for _, o in outcomes if isinstance(o, Breakdown)} or {STEPS}
    engines = "/".join(dict.fromkeys(o.engine for _, o in outcomes if isinstance(o, Breakdown)))
    columns = (*PARTS, "sum", engines or outcomes[0][0].engine)

    def lines(spec: RunSpec, one: Breakdown) -> list[list[str]]:
        took = [one.parts.get(name) for name in PARTS]
        shares = [NONE if ms is None else f"{100 * ms / one.eager_ms:.0f} %" for ms in took]
        return [list(map(figures, [*took, one.eager_ms, one.engine_ms])), [*shares, "", ""]]

    print_outcomes(outcomes, columns, lines, console, " · milliseconds of a step")
    about = (
        f"means over the middle half of {'/'.join(map(str, sorted(steps)))} steps of the slowest rank, with eager kernels; data: from the end of the last "
        f"step until the batch is there; all-reduce: after backward, which DDP would overlap. {columns[-1]}: a step as in runs"
    )
    say(console, about, style="dim")
