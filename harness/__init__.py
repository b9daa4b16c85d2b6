"""A benchmark harness for deep residual networks.

In a notebook: `import harness; harness.run(depths=[20, 32], seeds=3)`, `harness.load("runs")`.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

# NVML numbers GPUs by PCI bus, CUDA by speed unless this is set before it starts
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")

__all__ = ["UserError", "load", "report", "run", "tune"]


def __getattr__(name: str) -> Any:
    """The functions of `harness.api`, imported when they are used: a worker needs none of them."""
    if name not in __all__:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    return getattr(import_module("harness.api"), name)
