"""Short probes of the runs that are missing: what they will cost (--estimate), where a step's time goes (--profile).

A cell is all runs that differ in the seed only. Its probe trains some steps as the run would, on the same loader, ranks
and devices, and writes nothing.
"""

from __future__ import annotations

import contextlib
import gc
import heapq
import itertools
import statistics
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console

from harness.cluster.job import Failed, Started, Worker
from harness.deadline import stopping_on_sigterm
from harness.progress import duration, print_columns, say, width_of
from harness.record import classify
from harness.resources import Session
from harness.results.metrics import NONE, figures
from harness.results.store import keep_prediction
from harness.results.values import Measurement, Prediction
from harness.spec import RunPaths, RunSpec
from harness.training.engine import Engine, Way
from harness.training.memory import largest
from harness.training.optim import total_steps
from harness.training.setup import Trainer, make_step, make_trainer, prepare
from harness.training.step import deterministic_algorithms, synchronize
from harness.training.telemetry import EpochTelemetry, device_name, gather
from harness.training.train import run_eval, run_steps
from harness.training.watchdog import Watchdog

if TYPE_CHECKING:
    from harness.loaders.loader import Loader

Outcome = TypeVar("Outcome")
WARMUP_STEPS = 10  # not timed
STEPS = 30
QUEUE_STEPS = 5  # of STEPS, or as many batches as were made ahead: they do not show the loader's pace
EVAL_BATCHES = 3
ENERGY_SECONDS = 0.2  # NVML's counter changes about ten times a second
MEMORY = {
    "alloc": "torch_allocated_mib", "resvd": "torch_reserved_mib", "NVML": "nvml_process_mib", "RSS": "rss_mib",
}  # fmt: skip
SPARE = (
    "RSS",
    "resvd",
    "kJ",
    "GPU-h",
    "eval",
    "alloc",
    "width",
    "runs",
    "NVML",
    "sum",
)  # dropped on a narrow terminal
PARTS = ("data", "forward", "backward", "all-reduce", "optimizer")


# --- what both share ---


class Part:
    """The first `steps` batches of a loader's epochs, and the instant at which the one after `queue` was wanted."""

    def __init__(self, loader: Loader, steps: int, device: torch.device, queue: int = QUEUE_STEPS) -> None:
        self.loader = loader
        self.call_steps, self.calls_ahead = loader.call_steps, loader.calls_ahead
        self.queue = queue
        self.steps = min(steps, loader.steps)
        self.device = device
        self.paced_at = 0.0

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of one rank, as the loader's."""
        batches = self.loader.epoch(epoch, first_step)
        for step in range(self.steps):
            if step == self.queue:
                synchronize(self.device)
                self.paced_at = time.perf_counter()
            yield next(batches)

    def close(self) -> None:
        """Close the loader."""
        self.loader.close()

    def images(self) -> int:
        """How many images these batches hold over all ranks."""
        seen = torch.tensor(sum(len(labels) for _, labels in self.epoch(0)), device=self.device)
        if dist.is_initialized():
            dist.all_reduce(seen)
        return int(seen)


def train_steps(
    trainer: Trainer, loader: Loader, epoch: int, steps: int, queue: int = QUEUE_STEPS
) -> tuple[float, Part]:
    """Train up to `steps` steps of an epoch. Returns the seconds they took, and the part of the loader."""
    trainer.loader = part = Part(loader, steps, trainer.run.device, queue)
    return run_steps(trainer, epoch=epoch, steps=part.steps).train_seconds, part


def warn(message: str) -> None:
    """Say what a run would record among its warnings."""
    warnings.warn(message, stacklevel=2)


def count_cells(specs: Sequence[RunSpec]) -> dict[RunSpec, int]:
    """Each spec as of seed 0, and how many of these runs it has."""
    return dict(Counter(replace(spec, seed=0) for spec in specs))


def probe_cells(
    probe: Callable[..., Outcome], cells: Iterable[RunSpec], session: Session, console: Console
) -> list[tuple[RunSpec, Outcome | Failed]]:
    """Call `probe(spec, worker, report, paths=...)` for each cell where its runs would be; outcomes in their order.

    A single worker on this machine is probed in this process.
    """

    def progress(spec: RunSpec, event: Any) -> None:
        if isinstance(event, Started):
            say(console, f"{spec.name}: probing", style="dim")

    if not (cells := list(cells)):
        return []
    if session.allocation.workers == 1 and session.resources.address is None:
        session = replace(session, resources=replace(session.resources, launcher="local"))
    runs = session.launch(partial(probe, paths=session.paths), cells, progress=progress)
    with stopping_on_sigterm(), contextlib.closing(runs) as outcomes:
        by_cell = dict(outcomes)
    return [(spec, by_cell[spec]) for spec in cells]


def print_cells(
    spec: RunSpec, note: str, columns: Sequence[str], lines: Sequence[Sequence[str]], console: Console
) -> None:
    """Print a line for each cell, without the columns that nothing is known of; a line without a name is dim."""
    cells = dict(zip(columns, zip(*lines, strict=True), strict=True))
    known = {name: column for name, column in cells.items() if set(column) - {NONE, ""}}
    title = f"{spec.loader} · {spec.precision} · {'GPU' if spec.device == 'cuda' else 'CPU'}{note}"
    print_columns(known, console, title=title, left=("run", "variant", "width"), spare=SPARE)


def kilo(measured: Measurement) -> str:
    """A thousandth of a measurement, in three figures."""
    return figures(None if measured.value is None else measured.value / 1000)


# --- --estimate ---


def count_steps(loader: Loader) -> tuple[int, int]:
    """Steps of a probe that use up what a loader made ahead, and all of them: those after it are whole calls."""
    queue = max(QUEUE_STEPS, loader.call_steps * (1 + loader.calls_ahead))
    return queue, queue + loader.call_steps * -(-(STEPS - QUEUE_STEPS) // loader.call_steps)


def extrapolate(seconds: float, paced_seconds: float, *, steps: int, of: int, queue: int = QUEUE_STEPS) -> float:
    """Seconds of `of` steps, from `steps` of them: what these took, and the others at the pace of the last ones.

    `paced_seconds` are those after `queue` steps; where there are none, all steps set the pace.
    """
    pace = paced_seconds / (steps - queue) if steps > queue else seconds / steps
    return seconds + (of - steps) * pace


def predict(spec: RunSpec, worker: Worker, report: Callable[[Any], None], *, paths: RunPaths) -> Prediction:
    """Train some steps of a run, evaluate some batches, and predict the whole. Raises what `prepare` does.

    The steps belong to two epochs: WARMUP_STEPS of the first, up to `count_steps` of the second.
    """
    entered_at = time.perf_counter()
    gc.collect()
    if worker.device != "cpu":
        torch.cuda.empty_cache()  # of an earlier probe in this process
    prepared = prepare(spec, worker, paths)
    device, loader, eval_loader = prepared.device, prepared.train_loader, prepared.eval_loader
    with (
        deterministic_algorithms(spec),
        contextlib.closing(prepared),
        contextlib.closing(EpochTelemetry(device)) as telemetry,
    ):
        eval_part = Part(eval_loader, EVAL_BATCHES, device)
        eval_images = eval_part.images()
        trainer = make_trainer(prepared, warn)
        train_steps(trainer, loader, 0, WARMUP_STEPS)
        setup_seconds = worker.launch_seconds + time.perf_counter() - entered_at
        run_eval(trainer, eval_part, eval_images)
        prepared.meter.reset()
        telemetry.start()
        queue, steps = count_steps(loader)
        seconds, part = train_steps(trainer, loader, 1, steps, queue)
        ended_at = time.perf_counter()
        reading = telemetry.stop(seconds)
        evaluating_at = time.perf_counter()
        run_eval(trainer, eval_part, eval_images)
        eval_steps = eval_loader.steps + (prepared.test_loader.steps if prepared.test_loader else 0)
        eval_seconds = (time.perf_counter() - evaluating_at) * eval_steps / max(1, eval_part.steps)
        memory = largest(gather(trainer.measure_memory()))

    if device.type == "cpu":
        energy = Measurement(value=None, reason="no GPU was used")
    elif reading.energy_joules is None:
        energy = Measurement(value=None, reason="NVML does not count this GPU's energy")
    elif seconds < ENERGY_SECONDS:
        energy = Measurement(value=None, reason=f"{part.steps} steps are too short for NVML's energy counter")
    else:
        energy = Measurement(value=reading.energy_joules * loader.steps / part.steps)
    values = spec.to_json()
    del values["seed"]
    return Prediction(
        spec=values,
        steps=part.steps,
        epoch_seconds=extrapolate(
            seconds, ended_at - part.paced_at, steps=part.steps, of=loader.steps, queue=queue
        ),
        eval_seconds=eval_seconds,
        setup_seconds=setup_seconds,
        epochs=total_steps(spec.recipe, loader.steps) / loader.steps,
        energy_joules=energy,
        memory=memory,
        interference=reading.interference,
        workers=worker.world_size,
        threads=worker.threads,
        device=device_name(device),
        made_at=datetime.now(UTC),
    )


@dataclass(frozen=True, slots=True)
class Cell:
    """The missing runs of one spec but for the seed, and what is predicted of one of them."""

    spec: RunSpec
    runs: int
    outcome: Prediction | Failed

    @property
    def gpu_hours(self) -> float | None:
        """Of all its runs; None on the CPU and where the probe failed."""
        if isinstance(self.outcome, Failed) or self.spec.device == "cpu":
            return None
        return self.runs * self.outcome.workers * self.outcome.run_seconds / 3600


def all_seconds(todo: Sequence[RunSpec], predicted: Mapping[RunSpec, float], concurrent_runs: int) -> float:
    """Seconds until all runs are done, `concurrent_runs` at a time, each started in its order when another ends."""
    free_at = [0.0] * concurrent_runs
    for spec in todo:
        heapq.heapreplace(free_at, free_at[0] + predicted.get(replace(spec, seed=0), 0.0))
    return max(free_at)


def total_joules(cells: Sequence[Cell]) -> Measurement:
    """Energy of all runs of some cells, or why there is no such figure."""
    total = 0.0
    for cell in cells:
        if isinstance(cell.outcome, Failed):
            return Measurement(value=None, reason="a probe failed")
        one = cell.outcome.run_joules
        if one.value is None:
            return one
        total += cell.runs * one.value
    return Measurement(value=total)


def estimate(todo: Sequence[RunSpec], session: Session, console: Console) -> bool:
    """Probe every cell of the missing runs, store and print what is predicted. Returns whether a probe failed."""
    cells = count_cells(todo)
    probed = [Cell(spec, cells[spec], outcome) for spec, outcome in probe_cells(predict, cells, session, console)]
    for cell in probed:
        if isinstance(cell.outcome, Prediction):
            keep_prediction(session.paths.out, cell.spec.key, cell.outcome)
    print_estimate(probed, todo, session.allocation.concurrent_runs, console)
    return any(isinstance(cell.outcome, Failed) for cell in probed)


def print_estimate(cells: Sequence[Cell], todo: Sequence[RunSpec], concurrent_runs: int, console: Console) -> None:
    """Print a line for each cell, their sums, and notes."""
    if not cells:
        say(console, "nothing to estimate: all runs are done already; --force counts them again")
        return
    columns = ("variant", "depth", "width", "runs", "s/epoch", "eval", "a run", "GPU-h", *MEMORY, "kJ")
    notes: dict[str, None] = {}
    missing: dict[str, dict[str, None]] = defaultdict(dict)  # reason -> columns
    lines: list[list[str]] = []
    for cell in cells:
        line = [cell.spec.variant, str(cell.spec.network.depth), width_of(cell.spec), str(cell.runs)]
        if isinstance(cell.outcome, Failed):
            lines.append(_failed_line(line, cell.spec, cell.outcome, columns, notes))
            continue
        one, joules = cell.outcome, total_joules([cell])
        memory = {name: getattr(one.memory, field) for name, field in MEMORY.items()}
        seconds = [figures(one.epoch_seconds), duration(one.eval_seconds), duration(one.run_seconds)]
        rest = [figures(n) for n in (cell.gpu_hours, *(m.value for m in memory.values()))]
        lines.append([*line, *seconds, *rest, kilo(joules)])
        for name, measured in {**memory, "kJ": joules}.items():
            if measured.value is None:
                missing[str(measured.reason)][name] = None
        notes |= dict.fromkeys(f"while probing {cell.spec.name}: {cause}" for cause in one.interference)
    first = cells[0].spec
    print_cells(first, "", columns, lines, console)
    predicted = {cell.spec: cell.outcome for cell in cells if isinstance(cell.outcome, Prediction)}
    sums = [
        duration(all_seconds(todo, {spec: one.run_seconds for spec, one in predicted.items()}, concurrent_runs))
    ]
    if first.device == "cuda":
        gpu_hours = [value for cell in cells if (value := cell.gpu_hours) is not None]
        sums += [f"{figures(sum(gpu_hours) if gpu_hours else None)} GPU-hours", f"{kilo(total_joules(cells))} kJ"]
    runs = sum(cell.runs for cell in cells if cell.spec in predicted)
    say(
        console,
        f"in all {runs} run{'s' * (runs != 1)}, {concurrent_runs} at a time: {', '.join(sums)}",
        style="bold",
    )
    for note in (*notes, *(f"{', '.join(names)} cannot be had: {reason}" for reason, names in missing.items())):
        say(console, note)
    steps = "/".join(str(n) for n in sorted({one.steps for one in predicted.values()})) or "no"
    say(
        console,
        f"from {steps} training steps after warm-up and {EVAL_BATCHES} evaluation batches or fewer, one seed each; "
        "GPU-h and kJ (while training) are of all runs of a line, memory in MiB of one worker; runs done are not counted",
        style="dim",
    )


def _failed_line(
    line: list[str], spec: RunSpec, failed: Failed, columns: Sequence[str], notes: dict[str, None]
) -> list[str]:
    """The line of a cell whose probe failed; adds why to the notes."""
    failure = classify(failed)
    notes[f"{spec.name} failed, {failure.kind}: {failure.message}"] = None
    return [*line, failure.kind, *[NONE] * (len(columns) - len(line) - 1)]


# --- --profile ---


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Milliseconds of a step: means over the middle half of STEPS steps by their length, of the slowest rank."""

    parts: dict[str, float]  # by PARTS; no all-reduce with one rank
    eager_ms: float  # a step of which these are the parts
    engine_ms: float  # a step as the run takes it
    engine: str


class StepClock:
    """Records when each part of a step has been queued; knows the milliseconds that each took on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """This part has been queued."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    def read(self) -> dict[str, list[float]]:
        """Milliseconds of each part, step after step; a part lasts from the mark before it, so the first step is
        left out."""
        synchronize(self._device)
        parts: dict[str, list[float]] = {}
        for (_, before), (name, after) in itertools.pairwise(self._marks):
            took = before.elapsed_time(after) if self._device.type == "cuda" else 1000 * (after - before)
            parts.setdefault(name, []).append(took)
        steps = len(parts.get("data", ()))
        return {name: took[len(took) - steps :] for name, took in parts.items()}


def break_down(spec: RunSpec, worker: Worker, report: Callable[[Any], None], *, paths: RunPaths) -> Breakdown:
    """Train some steps of a run twice: part by part with eager kernels, and as its engine does. Raises what `prepare`
    does."""
    prepared = prepare(spec, worker, paths)
    device, loader = prepared.device, prepared.train_loader
    with deterministic_algorithms(spec), contextlib.closing(prepared):
        if loader.steps < 2:
            raise ValueError("an epoch of one step is too short to profile")
        # several ranks' gradients are summed after backward here, not by DDP inside it, where they hide behind it
        step, clock = make_step(prepared, ddp=False), StepClock(device)
        plain = Engine([Way("eager", step)], warn)
        by_parts = Trainer(prepared, step, plain, plain, loader, Watchdog(device))
        train_steps(by_parts, loader, 0, WARMUP_STEPS)
        step.mark = clock.mark
        train_steps(by_parts, loader, 1, STEPS)
        parts = clock.read()
        trainer = make_trainer(prepared, warn)
        train_steps(trainer, loader, 2, WARMUP_STEPS)
        seconds, part = train_steps(trainer, loader, 3, STEPS)
    took = [sum(step) for step in zip(*parts.values(), strict=True)]
    # of all parts the same steps, or they would not add up
    middle = sorted(range(len(took)), key=took.__getitem__)[len(took) // 4 : len(took) - len(took) // 4]
    means = {name: statistics.fmean(parts[name][step] for step in middle) for name in PARTS if name in parts}
    own = Breakdown(means, sum(means.values()), 1000 * seconds / part.steps, trainer.engine.way.name)
    ranks = gather(own)
    slowest = max(ranks, key=lambda rank: rank.eager_ms)
    return replace(slowest, engine_ms=max(rank.engine_ms for rank in ranks))


def profile(todo: Sequence[RunSpec], session: Session, console: Console) -> bool:
    """Break down a step of every cell of the missing runs and print it. Returns whether a probe failed."""
    outcomes = probe_cells(break_down, count_cells(todo), session, console)
    if not outcomes:
        say(console, "nothing to profile: all runs are done already; --force counts them again")
        return False
    engines = "/".join(dict.fromkeys(o.engine for _, o in outcomes if isinstance(o, Breakdown)))
    columns = ("run", "width", *PARTS, "sum", engines or outcomes[0][0].engine)
    notes: dict[str, None] = {}
    lines: list[list[str]] = []
    for spec, outcome in outcomes:
        line = [spec.name, width_of(spec)]
        if isinstance(outcome, Failed):
            lines.append(_failed_line(line, spec, outcome, columns, notes))
            continue
        took = [outcome.parts.get(name) for name in PARTS]
        lines.append([*line, *map(figures, [*took, outcome.eager_ms, outcome.engine_ms])])
        lines.append(
            ["", "", *(NONE if ms is None else f"{100 * ms / outcome.eager_ms:.0f} %" for ms in took), "", ""]
        )
    print_cells(outcomes[0][0], " · milliseconds of a step", columns, lines, console)
    for note in notes:
        say(console, note)
    say(
        console,
        "data: from the last step's end until its batch is there. Parts by eager kernels, which add up to the sum: the mean "
        f"of the middle half of up to {STEPS} steps after warm-up, of the slowest rank; all-reduce after backward, where DDP "
        f"would hide it. {columns[-1]}: a step as runs take it",
        style="dim",
    )
    return any(isinstance(outcome, Failed) for _, outcome in outcomes)
