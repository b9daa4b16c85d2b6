"""Two ranks of a test, each a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_two_ranks(script: str, folder: Path, seconds: float) -> list[Any]:
    """Run `script RANK FOLDER` as ranks 0 and 1; what each wrote into FOLDER/RANK.json. Both must succeed in time."""
    started = [
        subprocess.Popen([sys.executable, script, str(rank), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=seconds)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
