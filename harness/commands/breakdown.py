"""Where a training step's time goes: data, forward, backward, all-reduce, optimizer. What `harness run --profile` does.

A cell is all runs that differ in nothing but the seed. The parts are told apart with eager kernels, one after another
on the device's own clock; beside their sum stands a step of the engine asked for, which is what a run takes.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.cluster.launch import Failed, Worker
from harness.commands.estimate import Part, count_cells, name_cell, probe_cells, say
from harness.spec import RunPaths, RunSpec
from harness.training.engine import Direct, Engine
from harness.training.setup import Trainer, make_step, make_trainer, prepare
from harness.training.step import synchronize
from harness.training.train import run_steps

if TYPE_CHECKING:
    from harness.commands.run import Options
    from harness.loaders.datasets import Dataset
    from harness.plan import Allocation

WARMUP_STEPS, STEPS = 10, 30
PARTS = ("data", "forward", "backward", "all-reduce", "optimizer")


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Milliseconds of a step: medians over STEPS steps, of the slowest rank."""

    parts: dict[str, float]  # by PARTS; no all-reduce with one rank
    eager_ms: float  # a step of which these are the parts
    engine_ms: float  # a step as the run takes it
    engine: str


class StepClock:
    """Told the name of each part when it has been queued; knows the milliseconds each took on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """Now this part has been queued."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    def read(self) -> dict[str, list[float]]:
        """Milliseconds of each part, step after step, but for the first, before which there is no mark. A part lasts
        from the mark before it."""
        synchronize(self._device)
        parts: dict[str, list[float]] = {}
        for (_, before), (name, after) in itertools.pairwise(self._marks):
            took = before.elapsed_time(after) if self._device.type == "cuda" else 1000 * (after - before)
            parts.setdefault(name, []).append(took)
        steps = len(parts.get("data", ()))
        return {name: took[len(took) - steps :] for name, took in parts.items()}


def break_down(spec: RunSpec, worker: Worker, report: Callable[[Any], None], *, places: RunPaths) -> Breakdown:
    """Train some steps of a run twice, by parts and as its engine does. Writes nothing. Raises what `prepare` does."""

    def warn(message: str) -> None:
        warnings.warn(message, stacklevel=2)

    def take(trainer: Trainer, epoch: int, steps: int) -> float:
        """Train so many steps of an epoch; seconds of one."""
        trainer.loader = part = Part(made.train_loader, steps, device)
        return run_steps(trainer, epoch=epoch, steps=part.steps).train_seconds / part.steps

    made = prepare(spec, worker, places)
    device = made.device
    with ExitStack() as stack:
        stack.enter_context(contextlib.closing(made))
        # several ranks' gradients are summed after backward here, not by DDP inside it, where they hide behind it
        trainer = stack.enter_context(contextlib.closing(make_trainer(made, warn)))
        step, clock = make_step(made, ddp=False), StepClock(device)
        by_parts = replace(trainer, step=step, engine=Engine([("eager", Direct(step))], step.snapshot, warn))
        take(by_parts, 0, WARMUP_STEPS)
        step.mark = clock.mark
        take(by_parts, 1, STEPS)
        parts = clock.read()
        take(trainer, 2, WARMUP_STEPS)
        engine_ms = 1000 * take(trainer, 3, STEPS)
    eager_ms = statistics.median(map(sum, zip(*parts.values(), strict=True)))
    found = {name: statistics.median(parts[name]) for name in PARTS if name in parts}
    told = torch.tensor([*found.values(), eager_ms, engine_ms], device=device)
    if dist.is_initialized():
        dist.all_reduce(told, dist.ReduceOp.MAX)
    *slowest, eager_ms, engine_ms = told.tolist()
    return Breakdown(dict(zip(found, slowest, strict=True)), eager_ms, engine_ms, trainer.engine.name)


def profile(
    todo: Sequence[RunSpec],
    width: Allocation,
    dataset: Dataset,
    options: Options,
    console: Console,
    stack: ExitStack,
) -> int:
    """Break a step of every cell of the missing runs down and print a line for each. Returns 1 where one failed."""
    cells = count_cells(todo)
    found = probe_cells(break_down, list(cells), width, dataset, options, console, stack)
    print_breakdown(found, console)
    return 1 if any(isinstance(outcome, Failed) for _, outcome in found) else 0


def print_breakdown(cells: Sequence[tuple[RunSpec, Breakdown | Failed]], console: Console) -> None:
    """Print a line for each cell: milliseconds of each part with its share, their sum, a step of the engine."""
    if not cells:
        console.print("nothing to profile: all runs are done already; --force counts them again")
        return
    told = [outcome for _, outcome in cells if isinstance(outcome, Breakdown)]
    parts = [name for name in PARTS if any(name in outcome.parts for outcome in told)]
    first = cells[0][0]
    table = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), title_justify="left", title_style="",
        title=f"{first.loader} · {first.precision} · {'GPU' if first.device == 'cuda' else 'CPU'} · milliseconds of a step",
    )  # fmt: skip
    engines = "/".join(dict.fromkeys(outcome.engine for outcome in told)) or first.engine
    for name in ("run", "width", *parts, "sum", engines):
        table.add_column(name, justify="left" if name in ("run", "width") else "right", no_wrap=True)
    notes: list[str] = []
    for spec, outcome in cells:
        line = [escape(name_cell(spec)), f"{spec.workers}×{spec.recipe.batch_size // spec.workers}"]
        if isinstance(outcome, Failed):
            table.add_row(*line, *["–"] * (len(parts) + 2))
            notes.append(f"{name_cell(spec)} failed: {outcome.message}")
            continue
        took = [outcome.parts.get(name) for name in parts]
        table.add_row(*line, *map(say, [*took, outcome.eager_ms, outcome.engine_ms]))
        shares = ["–" if ms is None else f"{100 * ms / outcome.eager_ms:.0f} %" for ms in took]
        table.add_row("", "", *shares, style="dim")
    console.print(table)
    for note in notes:
        console.print(note, soft_wrap=True, markup=False)
    console.print(
        f"data: from the last step's end until its batch is there. Parts by eager kernels, the median of up to {STEPS} "
        f"steps after warm-up, of the slowest rank; all-reduce after backward, where DDP would hide it. {engines}: a step "
        "as runs take it",
        style="dim", soft_wrap=True,
    )  # fmt: skip
