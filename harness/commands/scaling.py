"""How far one run scales over a cluster, from what was measured of its nodes and its network: part of --estimate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from harness.cluster.job import Failed, Worker
from harness.network import LEAST_EFFICIENCY, Measured, Width, efficiencies, find_limit, predict_widths
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
    print what epochs take at these widths by `measured`, and store it for runs that no probe has predicted."""
    batch, most, out = (
        cell.recipe.batch_size,
        int(max(way["ranks"] for way in measured.values())),
        session.paths.out,
    )
    shares = {
        replace(cell, workers=1, recipe=replace(cell.recipe, batch_size=batch // workers)): workers
        for workers in (2**power for power in range(most.bit_length()))
        if batch % workers == 0
    }
    job = replace(session.allocation, workers=1, concurrent_runs=1, fallback_world_sizes=())
    known: dict[int, Prediction] = {}
    runs = replace(session, allocation=job).launch(
        probe, list(shares), progress=lambda *_: None, row=lambda _: None
    )
    for share, outcome in runs:
        if isinstance(outcome, Failed):
            failure, images = classify(outcome), share.recipe.batch_size
            say(console, f"{cell.name} with {images} images a worker: {failure.kind}: {failure.message}")
        else:
            known[shares[share]] = outcome
    if not known:
        return
    fewest = min(known)
    steps, size = -(-(known[fewest].epoch_steps or 0) // fewest), known[fewest].gradient_bytes or 0
    seconds = {workers: one.epoch_seconds / (one.epoch_steps or 1) for workers, one in known.items()}
    widths = predict_widths(steps, size, seconds, measured)
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


def print_widths(cell: RunSpec, widths: Sequence[Width], size: int, console: Console) -> None:
    """A line for each width, how many workers pay, and what is assumed."""
    shares = zip(efficiencies(widths, "apart"), efficiencies(widths, "hidden"), strict=True)
    lines = [
        {
            "workers": str(width.workers), "images each": str(cell.recipe.batch_size // width.workers),
            "step ms": figures(1000 * width.step_seconds), "all-reduce ms": figures(1000 * width.reduce_seconds),
            "s/epoch": figures(width.apart), "if hidden": figures(width.hidden),
            "efficient": f"{100 * apart:.0f}–{100 * hidden:.0f} %",
        }
        for width, (apart, hidden) in zip(widths, shares, strict=True)
    ]  # fmt: skip
    columns = {name: [line[name] for line in lines] for name in lines[0]}
    title = f"{cell.name} over the cluster, predicted from its measurements"
    print_columns(columns, console, title=title, left=(), spare=("images each",))
    pays = "{} ({}) if no all-reduce is hidden behind computation, {} ({}) if as much as possible is"
    limits = (*find_limit(widths, "apart"), *find_limit(widths, "hidden"))
    say(console, f"workers that pay off: {pays.format(*limits)}", style="bold")
    about = (
        f"more workers pay off while they are faster and at least {100 * LEAST_EFFICIENCY:.0f} % efficient; DDP hides a part, so "
        f"a run lies between the two; {size / 1e6:.3g} MB of gradients, by the measured latency and bus bandwidth"
    )
    sync = "; the all-reduces of synchronised batch norm are left out" * (cell.recipe.batch_norm == "sync")
    say(console, about + sync, style="dim")
