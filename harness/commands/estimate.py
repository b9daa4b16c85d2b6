"""What a sweep will cost, by a short probe of each of its cells. What `harness run --estimate` does.

A cell is all runs that differ in nothing but the seed. Its probe trains some steps as the run would (same loader,
same ranks) and keeps no weights.
"""

from __future__ import annotations

import contextlib
import gc
import heapq
import itertools
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.cluster.launch import Failed, Started, Worker
from harness.commands.report import classify
from harness.results.store import keep_prediction
from harness.results.values import Measurement, Prediction
from harness.spec import RunPaths, RunSpec
from harness.training.memory import MemoryMeter, largest
from harness.training.optim import total_steps
from harness.training.setup import make_trainer, prepare
from harness.training.step import synchronize
from harness.training.telemetry import EpochTelemetry, device_name, gather
from harness.training.train import run_eval, run_steps

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.commands.run import Options
    from harness.loaders.datasets import Dataset
    from harness.loaders.loader import Loader
    from harness.plan import Allocation

Found = TypeVar("Found")
WARMUP_STEPS = 10  # not timed
STEPS = 30
QUEUE_STEPS = 5  # of STEPS: taken from what the loader made ahead, so no measure of its pace
EVAL_BATCHES = 3
MEMORY = {
    "alloc": "torch_allocated_mib", "resvd": "torch_reserved_mib", "NVML": "nvml_process_mib", "RSS": "rss_mib",
}  # fmt: skip
ENERGY_SECONDS = 0.2  # NVML's counter moves about ten times a second


class Part:
    """The first `steps` batches of a loader's epochs, and when the one after QUEUE_STEPS was asked for."""

    def __init__(self, loader: Loader, steps: int, device: torch.device) -> None:
        self.loader = loader
        self.steps = min(steps, loader.steps)
        self.device = device
        self.paced_at = 0.0

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of one rank, as the loader's."""
        for step, batch in enumerate(itertools.islice(self.loader.epoch(epoch, first_step), self.steps)):
            if step == QUEUE_STEPS:
                synchronize(self.device)
                self.paced_at = time.perf_counter()
            yield batch

    def close(self) -> None:
        """Close the loader."""
        self.loader.close()

    def images(self) -> int:
        """How many images these batches hold over all ranks."""
        seen = torch.tensor(sum(len(labels) for _, labels in self.epoch(0)), device=self.device)
        if dist.is_initialized():
            dist.all_reduce(seen)
        return int(seen)


def extrapolate(seconds: float, paced_seconds: float, *, steps: int, of: int) -> float:
    """Seconds of `of` steps, from `steps` of them: what these took, and the others at the pace of the last ones.

    `paced_seconds` are those after QUEUE_STEPS; where there are none, all steps set the pace.
    """
    pace = paced_seconds / (steps - QUEUE_STEPS) if steps > QUEUE_STEPS else seconds / steps
    return seconds + (of - steps) * pace


def probe(spec: RunSpec, worker: Worker, report: Callable[[Any], None], *, places: RunPaths) -> Prediction:
    """Train some steps of a run, evaluate some batches, and predict the whole. Writes nothing.

    The steps belong to two epochs: WARMUP_STEPS of the first, up to STEPS of the second. Raises what `prepare` does.
    """
    entered_at = time.perf_counter()
    gc.collect()
    if worker.device != "cpu":
        torch.cuda.empty_cache()  # of an earlier probe in this process
    meter = MemoryMeter(torch.device(worker.device))
    prepared = prepare(spec, worker, places, meter)
    device, loader, eval_loader = prepared.device, prepared.train_loader, prepared.eval_loader
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(prepared))
        telemetry = EpochTelemetry(device)
        trainer = make_trainer(prepared, lambda message: warnings.warn(message, stacklevel=2), meter)
        stack.enter_context(contextlib.closing(trainer))
        eval_part = Part(eval_loader, EVAL_BATCHES, device)
        eval_images = eval_part.images()
        part = trainer.loader = Part(loader, STEPS, device)

        run_steps(trainer, epoch=0, steps=min(WARMUP_STEPS, part.steps))
        setup_seconds = worker.launch_seconds + time.perf_counter() - entered_at
        run_eval(trainer, eval_part, eval_images)
        meter.reset()
        telemetry.start()
        seconds = run_steps(trainer, epoch=1, steps=part.steps).train_seconds
        ended_at = time.perf_counter()
        reading = telemetry.stop(seconds)
        evaluating_at = time.perf_counter()
        run_eval(trainer, eval_part, eval_images)
        eval_seconds = (time.perf_counter() - evaluating_at) * eval_loader.steps / max(1, eval_part.steps)
        meter.sample()
        memory = largest(gather(meter.read(prepared.network, prepared.optimizer, trainer.graphs)))

    if device.type == "cpu":
        energy = Measurement(value=None, reason="no GPU was used")
    elif reading.joules is None:
        energy = Measurement(value=None, reason="NVML does not count this GPU's energy")
    elif seconds < ENERGY_SECONDS:
        energy = Measurement(value=None, reason=f"{part.steps} steps are too short for NVML's energy counter")
    else:
        energy = Measurement(value=reading.joules * loader.steps / part.steps)
    asked = spec.to_json()
    del asked["seed"]
    return Prediction(
        spec=asked,
        steps=part.steps,
        epoch_seconds=extrapolate(seconds, ended_at - part.paced_at, steps=part.steps, of=loader.steps),
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


def count_cells(todo: Sequence[RunSpec]) -> dict[RunSpec, int]:
    """Each missing run's spec, as of seed 0, and how many runs it has."""
    cells: dict[RunSpec, int] = defaultdict(int)
    for spec in todo:
        cells[replace(spec, seed=0)] += 1
    return dict(cells)


def all_seconds(todo: Sequence[RunSpec], predicted: Mapping[RunSpec, float], concurrent_runs: int) -> float:
    """Seconds until all runs are done, `concurrent_runs` at a time, each begun in its order when a slot is free."""
    free_at = [0.0] * concurrent_runs
    for spec in todo:
        heapq.heapreplace(free_at, free_at[0] + predicted.get(replace(spec, seed=0), 0.0))
    return max(free_at)


def estimate(
    todo: Sequence[RunSpec],
    width: Allocation,
    dataset: Dataset,
    options: Options,
    console: Console,
    stack: ExitStack,
) -> int:
    """Probe every cell of the missing runs, keep and print what is predicted. Returns 1 where a probe failed."""
    cells = count_cells(todo)
    probed: list[Cell] = []
    for spec, outcome in probe_cells(probe, list(cells), width, dataset, options, console, stack):
        if isinstance(outcome, Prediction):
            keep_prediction(options.out, spec.key, outcome)
        probed.append(Cell(spec, cells[spec], outcome))
    print_estimate(probed, todo, width.concurrent_runs, console)
    return 1 if any(isinstance(cell.outcome, Failed) for cell in probed) else 0


def probe_cells(
    function: Callable[..., Found],
    cells: Sequence[RunSpec],
    width: Allocation,
    dataset: Dataset,
    options: Options,
    console: Console,
    stack: ExitStack,
) -> list[tuple[RunSpec, Found | Failed]]:
    """Call a probe, of `probe`'s signature, for each cell where its runs would be run; outcomes in the cells' order.

    The cluster at --address is joined already. One worker is probed in this process unless it is there.
    """
    from harness.commands.run import join_cluster, make_paths, stopping_on_sigterm

    here = width.workers == 1 and options.address is None
    if here:
        from harness.cluster.local import launch
    else:
        from harness.cluster.launch import launch
    if cells and not here and options.address is None:
        join_cluster(stack, None, cpus=width.threads * width.workers * width.concurrent_runs, gpus=width.gpus,
                     verbose=options.verbose)  # fmt: skip

    def progress(spec: RunSpec, event: Any) -> None:
        if isinstance(event, Started):
            console.print(f"{name_cell(spec)}: probing", style="dim", soft_wrap=True, markup=False)

    work: AbstractContextManager[Any] = contextlib.closing(
        launch(
            partial(function, places=make_paths(options, dataset)), cells,
            workers=width.workers, concurrent_runs=width.concurrent_runs, gpu=width.device == "cuda", threads=width.threads,
            storage=options.out / ".ray", progress=progress, placement=options.placement,
        )
    )  # fmt: skip
    with stopping_on_sigterm(), work as outcomes:
        found = dict(outcomes)
    return [(spec, found[spec]) for spec in cells]


def name_cell(spec: RunSpec) -> str:
    """ "msra-20" """
    return f"{spec.variant}-{spec.network.depth}"


def print_estimate(cells: Sequence[Cell], todo: Sequence[RunSpec], concurrent_runs: int, console: Console) -> None:
    """Print a line for each cell, one for all, and what is to be known about them."""
    if not cells:
        console.print("nothing to estimate: all runs are done already; --force counts them again")
        return
    told = {cell.spec: cell.outcome for cell in cells if isinstance(cell.outcome, Prediction)}
    columns = ("variant", "depth", "width", "runs", "s/epoch", "eval s", "h/run", "GPU-h", *MEMORY, "kJ")
    lines: list[list[str]] = []
    notes: dict[str, None] = {}
    missing: dict[str, dict[str, None]] = defaultdict(dict)  # reason -> columns
    for cell in cells:
        spec, found = cell.spec, cell.outcome
        width = f"{spec.workers}×{spec.recipe.batch_size // spec.workers}"
        what = [escape(spec.variant), str(spec.network.depth), width, str(cell.runs)]
        if isinstance(found, Failed):
            failure = classify(found)
            lines.append([*what, failure.kind, *["–"] * (len(columns) - len(what) - 1)])
            notes[f"{name_cell(spec)} failed, {failure.kind}: {failure.message}"] = None
            continue
        joules = total_joules([cell])
        memory = {name: getattr(found.memory, field) for name, field in MEMORY.items()}
        seconds = (found.epoch_seconds, found.eval_seconds, found.run_seconds / 3600, cell.gpu_hours)
        figures = [*seconds, *(reading.value for reading in memory.values())]
        lines.append([*what, *map(say, figures), say(joules.value, 1e-3)])
        for name, reading in {**memory, "kJ": joules}.items():
            if reading.value is None:
                missing[str(reading.reason)][name] = None
        notes |= dict.fromkeys(f"while probing {name_cell(spec)}: {cause}" for cause in found.interference)
    shown = [i for i in range(len(columns)) if any(line[i] != "–" for line in lines)]
    first = cells[0].spec
    table = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), title_justify="left", title_style="",
        title=f"{first.loader} · {first.precision} · {'GPU' if first.device == 'cuda' else 'CPU'}",
    )  # fmt: skip
    for i in shown:
        table.add_column(
            columns[i], justify="left" if columns[i] in ("variant", "width") else "right", no_wrap=True
        )
    for line in lines:
        table.add_row(*(line[i] for i in shown))
    console.print(table)
    hours = all_seconds(todo, {spec: found.run_seconds for spec, found in told.items()}, concurrent_runs) / 3600
    gpu_hours = [value for cell in cells if (value := cell.gpu_hours) is not None]
    joules = total_joules(cells)
    sums = [f"{say(hours)} hours"]
    if first.device == "cuda":
        sums += [f"{say(sum(gpu_hours) if gpu_hours else None)} GPU-hours", f"{say(joules.value, 1e-3)} kJ"]
    runs = sum(cell.runs for cell in cells if cell.spec in told)
    console.print(
        f"in all {runs} runs, {concurrent_runs} at a time: {', '.join(sums)}", style="bold", soft_wrap=True
    )
    for note in (*notes, *(f"{', '.join(names)} cannot be had: {reason}" for reason, names in missing.items())):
        console.print(note, soft_wrap=True, markup=False)
    steps = "/".join(str(n) for n in sorted({found.steps for found in told.values()})) or "no"
    console.print(
        f"from {steps} training steps after warm-up and {EVAL_BATCHES} evaluation batches or fewer, one seed each; "
        "GPU-h and kJ (while training) are of all runs of a line, memory in MiB of one worker; runs done are not counted",
        style="dim", soft_wrap=True,
    )  # fmt: skip


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


def say(value: float | None, scale: float = 1) -> str:
    """Three figures, or a dash where there is nothing."""
    if value is None:
        return "–"
    value *= scale
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else f"{value:.1g}"
