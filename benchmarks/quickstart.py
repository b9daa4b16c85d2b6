"""Seconds of the quickstart in a fresh clone: python benchmarks/quickstart.py [--rounds 3] [--json FILE]

The installation (with what the package index and its cache do that day) and `make quickstart` after it, apart.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from rounds import ROOT, make_table, median_and_range, parse_options, process_seconds, publish, take_turns


def measure(targets: dict[str, str]) -> dict[str, float]:
    """Seconds of each target of the Makefile, one after the other in a new clone."""
    own = {
        name: value for name, value in os.environ.items() if name not in ("PYTHON", "MAKEFLAGS", "MAKEOVERRIDES")
    }
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        return {name: process_seconds(["make", target], cwd=clone, env=own) for name, target in targets.items()}


def describe(content: dict[str, Any]) -> str:
    """The table of stored readings."""
    rows = [(name, median_and_range(seconds)) for name, seconds in content["readings"].items()]
    return make_table(("step", "seconds"), rows)


def main() -> None:
    options = parse_options(__doc__, rounds=3)
    targets = {"installation": ".venv/bin/harness", "make quickstart": "quickstart"}
    (turns,) = take_turns({"clone": partial(measure, targets)}, options.rounds).values()
    publish(describe, options.json, readings={name: [turn[name] for turn in turns] for name in targets})


if __name__ == "__main__":
    main()
