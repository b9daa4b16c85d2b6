"""Stored runs as a tidy pandas DataFrame, for notebooks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from harness.results.identity import code_of
from harness.results.metrics import run_figures
from harness.results.store import Stored, load_epochs
from harness.results.values import Measurement, flatten

if TYPE_CHECKING:
    import pandas


def make_frame(runs: Iterable[Stored], *, epochs: bool = False) -> pandas.DataFrame:
    """One line a run, whatever became of it; or one line an epoch of a run, as `epochs.jsonl` holds them.

    Columns carry the names and units of the store: "final_error" (percent), "epoch_seconds", "nvml_process_mib". The
    spec's own are spelt "recipe.lr", "network.block". Nothing measured is NaN. Raises ValueError for a line of
    epochs.jsonl that does not parse.
    """
    import pandas

    if epochs:
        return pandas.DataFrame(
            [{**_identity(run), **e.model_dump()} for run in runs for e in load_epochs(run.folder)]
        )
    return pandas.DataFrame([{**_identity(run), **_figures(run)} for run in runs])


def _identity(run: Stored) -> dict[str, Any]:
    record = run.record
    spec = {name: value for name, value in record.spec.items() if name not in ("dataset", "device", "fingerprint")}
    return {
        "name": record.name, "status": record.status, "dataset": record.dataset, "variant": record.variant,
        "depth": record.depth, "seed": record.seed, **{name: _cell(value) for name, value in flatten(spec)},
        "device": record.result.device if record.result else record.spec.get("device"),
    }  # fmt: skip


def _cell(value: Any) -> Any:
    """A list of a spec as text, a measurement as its value: the reason for a missing one is in the record."""
    if isinstance(value, Measurement):
        return value.value
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _figures(run: Stored) -> dict[str, Any]:
    """What a run measured, or why it did not."""
    record, result, figures = run.record, run.record.result, dict[str, Any]()
    if result is not None:
        figures = result.model_dump(exclude={"epochs", "memory", "machine", "device", "workers", "timing"})
        figures |= run_figures(result)
        figures |= (
            dict(flatten({"timing": result.timing.model_dump(exclude={"untimed"})})) if result.timing else {}
        )
        figures |= {name: _cell(value) for name, value in flatten(dict(result.memory))}
    failure = record.failure
    return {
        **figures,
        "failure": None if failure is None else f"{failure.kind}: {failure.message}",
        "commit": record.environment.get("commit"), "code": code_of(record),
        "started_at": record.started_at, "finished_at": record.finished_at, "folder": str(run.folder),
    }  # fmt: skip
