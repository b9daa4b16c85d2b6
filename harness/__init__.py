"""A benchmark harness for deep residual networks.

In a notebook: `import harness; harness.load("runs")`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas


def load(*paths: str | Path, epochs: bool = False) -> pandas.DataFrame:
    """Read stored runs (default: the folder runs) as a DataFrame: one line a run, or one line an epoch of a run.

    Errors are in percent; units are in the names of the columns. Folders that cannot be read are named on standard
    error and left out. Raises UserError for a path that is no folder.
    """
    from harness.commands.report import load_runs
    from harness.results.frame import make_frame

    loaded = load_runs([Path(path) for path in paths or ("runs",)])
    return make_frame(loaded.records, epochs=epochs)
