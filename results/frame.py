"""Stored runs as a tidy pandas DataFrame, for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from harness.results.store import Stored, load_epochs

if TYPE_CHECKING:
    import pandas


def make_frame(runs: Iterable[Stored], *, epochs: bool = False) -> pandas.DataFrame:
    """One line a run, whatever became of it; or one line an epoch of a run, as `epochs.jsonl` holds them.

    Columns carry the names and units of the store: "final_error" (percent), "epoch_seconds", "nvml_process_mib". The
    spec's own are spelt "recipe.lr", "network.block". Nothing measured is NaN. Raises ValueError for a line of
    epochs.jsonl that does not parse.
    """
    import pandas

    lines: Iterable[dict[str, Any]]
    if epochs:
        lines = (
            {**_identity(run), **epoch.model_dump()} for run in runs for epoch in load_epochs(run.folder)
        )  # fmt: skip
    else:
        lines = ({**_identity(run), **_figures(run)} for run in runs)
    return pandas.DataFrame(list(lines))


def _identity(run: Stored) -> dict[str, Any]:
    """What tells a run from others."""
    record = run.record
    spec = {name: value for name, value in record.spec.items() if name not in ("dataset", "device", "fingerprint")}
    return {
        "name": record.name, "status": record.status, "dataset": record.dataset, "variant": record.variant,
        "depth": record.depth, "seed": record.seed, **dict(_flatten(spec)),
        "device": record.result.device if record.result else record.spec.get("device"),
    }  # fmt: skip


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, ",".join(map(str, value)) if isinstance(value, list) else value


def _figures(run: Stored) -> dict[str, Any]:
    """What a run measured, or why it did not."""
    record, figures = run.record, {}
    if record.result is not None:
        figures = record.result.model_dump(exclude={"epochs", "memory", "machine", "device", "workers"})
        figures = dict(_readings(figures)) | dict(_readings(record.result.memory.model_dump()))
    failure = record.failure
    return {
        **figures,
        "failure": None if failure is None else f"{failure.kind}: {failure.message}",
        "commit": record.environment.get("commit"),
        "started_at": record.started_at, "finished_at": record.finished_at, "folder": str(run.folder),
    }  # fmt: skip


def _readings(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A reading counts with its value: the reason for a missing one is in the record."""
    for name, value in values.items():
        if name == "by_category_mib":
            yield from _flatten(value, f"{name}.")
        else:
            yield name, value["value"] if isinstance(value, dict) and set(value) == {"value", "reason"} else value
