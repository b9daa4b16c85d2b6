"""How far one run scales over a cluster, from what was measured of its nodes and its network: part of --estimate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console

from harness.cluster.job import Failed, Worker
from harness.network import LEAST_EFFICIENCY, Measured, Width, find_limit, predict_widths
from harness.progress import print_columns, say
from harness.record import classify
from harness.resources import Session
from harness.results.metrics import figures
from harness.results.store import keep_prediction, load_predictions
from harness.results.values import Measurement, Prediction
from harness.spec import RunSpec

Probe = Callable[[RunSpec, Worker, Callable[[Any], None]], Prediction]
UNPROBED = Measurement(value=None, reason="only one worker was probed")


def predict_scaling(cell: RunSpec, session: Session, probe: Probe, measured: Measured, console: Console) -> None:
    """Probe one worker with its share of the batch at 1, 2, 4, ... workers, as many as all-reduces were measured between;
    print and store what epochs take at these widths by `measured`."""
    batch, most = cell.recipe.batch_size, int(max(way["ranks"] for way in measured.values()))
    shares = {
        workers: replace(cell, workers=1, recipe=replace(cell.recipe, batch_size=batch // workers))
        for workers in (2**power for power in range(most.bit_length()))
        if batch % workers == 0
    }
    alone = replace(
        session, allocation=replace(session.allocation, workers=1, concurrent_runs=1, fallback_world_sizes=())
    )
    runs = alone.launch(probe, list(shares.values()), progress=lambda *_: None, row=lambda _: None)
    outcomes = dict(runs)
    known: dict[int, Prediction] = {}
    for workers, share in shares.items():
        outcome = outcomes[share]
        if isinstance(outcome, Failed):
            failure = classify(outcome)
            say(console, f"{cell.name} with {batch // workers} images a worker: {failure.kind}: {failure.message}")
        else:
            known[workers] = outcome
    if not known:
        return
    first = min(known)
    steps, size = math.ceil(known[first].epoch_steps / first), known[first].gradient_bytes
    seconds = {workers: one.epoch_seconds / one.epoch_steps for workers, one in known.items()}
    widths = predict_widths(steps, size, seconds, measured)
    print_widths(cell, widths, size, console)
    keep_widths(cell, widths, known, session)


def keep_widths(cell: RunSpec, widths: list[Width], known: Mapping[int, Prediction], session: Session) -> None:
    """Store the prediction for the run at each width, unless a probe of it was."""
    out = session.paths.out
    probed = [prediction.spec for prediction in load_predictions([out]) if prediction.hidden_epoch_seconds is None]
    for width in widths:
        wide, one = replace(cell, workers=width.workers), known[width.workers]
        spec = {name: value for name, value in wide.to_json().items() if name != "seed"}
        if width.workers > 1 and spec not in probed:
            prediction = one.model_copy(update={
                "spec": spec, "workers": width.workers, "epoch_seconds": width.apart, "epoch_steps": None,
                "hidden_epoch_seconds": width.hidden, "eval_seconds": one.eval_seconds / width.workers,
                "energy_joules": UNPROBED,
            })  # fmt: skip
            keep_prediction(out, wide.key, prediction)


def print_widths(cell: RunSpec, widths: list[Width], size: int, console: Console) -> None:
    """A line for each width, how many workers pay, and what is assumed."""
    efficiencies = [width.efficiency(widths[0]) for width in widths]
    columns = {
        "workers": [str(width.workers) for width in widths],
        "images each": [str(cell.recipe.batch_size // width.workers) for width in widths],
        "step ms": [figures(1000 * width.step_seconds) for width in widths],
        "all-reduce ms": [figures(1000 * width.reduce_seconds) for width in widths],
        "s/epoch": [figures(width.apart) for width in widths],
        "if hidden": [figures(width.hidden) for width in widths],
        "efficient": [f"{100 * apart:.0f}–{100 * hidden:.0f} %" for apart, hidden in efficiencies],
    }
    print_columns(columns, console, title=f"{cell.name} over the cluster, by what was measured of it")
    limits = [find_limit(widths, bound) for bound in (0, 1)]
    pays = [f"{workers} worker{'s' * (workers != 1)} ({why})" for workers, why in limits]
    say(console, f"it pays to have {pays[0]} where no all-reduce is hidden behind computation, {pays[1]} where all that can be is",
        style="bold")  # fmt: skip
    about = (
        f"a width pays while it is faster and at least {100 * LEAST_EFFICIENCY:.0f} % efficient; DDP hides a part, so a run "
        f"lies between; {size / 1e6:.3g} MB of gradients by the latency and bus bandwidth that were measured"
    )
    sync = "; the all-reduces of synchronised batch norm are left out" * (cell.recipe.batch_norm == "sync")
    say(console, about + sync, style="dim")
