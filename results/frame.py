"""Stored runs as a tidy pandas DataFrame, for notebooks."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

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
        lines = ({**_identity(run), **epoch.model_dump()} for run in runs for epoch in load_epochs(run.folder))
    else:
        lines = ({**_identity(run), **_figures(run)} for run in runs)
    return pandas.DataFrame(list(lines))


DTYPES = {"string": str, "integer": "Int64", "number": "float64", "boolean": "boolean"}


def read_table(file: str | Path | IO[str]) -> pandas.DataFrame:
    """The CSV of `harness report`, each column of its type whatever its text looks like; seeds are lists."""
    import pandas

    from harness.results.report.files import file_fields

    known = {name: DTYPES[field.kind] for name, field in file_fields().items() if field.kind in DTYPES}
    dtypes: Any = defaultdict(lambda: str, known | {"schema_version": "Int64"})  # what is noted of runs is text
    frame = pandas.read_csv(file, dtype=dtypes, keep_default_na=False, na_values=[""])
    return frame.assign(seeds=frame["seeds"].map(json.loads)) if "seeds" in frame else frame


def _identity(run: Stored) -> dict[str, Any]:
    record, result = run.record, run.record.result
    own = {name: getattr(record, name) for name in ("name", "status", "dataset", "variant", "depth", "seed")}
    spec = {name: value for name, value in record.spec.items() if name not in ("dataset", "device", "fingerprint")}
    return own | _cells(spec) | {"device": result.device if result else record.spec.get("device")}


def _cells(values: Mapping[str, Any]) -> dict[str, Any]:
    """Measurements as their values (the reason for a missing one is in the record), and lists of a spec as text."""
    cells = {n: value.value if isinstance(value, Measurement) else value for n, value in flatten(values)}
    return {n: ",".join(map(str, value)) if isinstance(value, list) else value for n, value in cells.items()}


def _figures(run: Stored) -> dict[str, Any]:
    """What a run measured, or why it did not."""
    record, result, failure = run.record, run.record.result, run.record.failure
    figures: dict[str, Any] = {}
    if result is not None:
        measured = result.model_dump(exclude={"epochs", "memory", "machine", "device", "workers", "timing"})
        timing = {name: value for name, value in result.timing or () if name != "untimed"}
        figures = measured | run_figures(result) | _cells({"timing": timing, **dict(result.memory)})
    return figures | {
        "failure": failure and f"{failure.kind}: {failure.message}", "commit": record.environment.get("commit"),
        "code": record.environment.get("code"), "started_at": record.started_at, "finished_at": record.finished_at, "folder": str(run.folder),
    }  # fmt: skip
