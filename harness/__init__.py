"""A benchmark harness for deep residual networks.

In a notebook: `import harness; harness.load("runs")`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas

# NVML numbers GPUs by PCI bus, CUDA by speed unless this is set before it starts
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def load(*paths: str | Path, epochs: bool = False) -> pandas.DataFrame:
    """Read stored runs (default: the folder runs) as a DataFrame with a line per run, or a line per epoch of each run.

    Errors are in percent; the names of the columns hold the units. Folders that cannot be read are named on standard
    error and left out. Raises UserError for a path that is not a folder.
    """
    from harness.commands.report import load_runs
    from harness.results.frame import make_frame

    loaded = load_runs([Path(path) for path in paths or ("runs",)])
    return make_frame(loaded.records, epochs=epochs)
