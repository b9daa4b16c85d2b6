"""The notebooks in examples/: every cell runs, shortened and on the CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SHORT = {
    "GPUS": 0, "HOURS": "9m", "DATASET": "digits", "DEPTHS": "8", "VARIANTS": "msra", "CHECK": "--quick",
    "OPTIONS": "--launcher local --epochs 1 --limit-train 64 --limit-test 20",
}  # fmt: skip


def run_cell(source: str, names: dict[str, Any], folder: Path) -> str:
    """As a notebook does: lines for the shell, in which {NAME} is a value of Python's, and Python; what a shell prints."""
    if not source.startswith(("!", "%")):
        exec(compile(source, "cell", "exec"), names)
        return ""
    assert len(source.splitlines()) == 1, "a line for the shell is a cell of its own"
    line = re.sub(r"\{(\w+)\}", lambda name: str(names[name[1]]), source[1:])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"], cwd=folder, env=os.environ | {"PATH": path}, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_a_free_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "free_gpu.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    names: dict[str, Any] = {}
    printed = []
    for cell in cells:
        source = "".join(cell["source"])
        if "install" in cell["metadata"].get("tags", ()):
            assert source == "%pip install -q {SOURCE}", "it is installed here, and there is no network"
        else:
            printed.append(run_cell(source, names, tmp_path))
        if "GPUS" in names and len(printed) == 1:
            assert set(SHORT) <= set(names)
            names |= SHORT
    assert printed[1].endswith("ready\n")
    assert "msra" in printed[3]
    with ZipFile(tmp_path / "records.zip") as archive:
        kept = archive.namelist()
    names_kept = {Path(name).name for name in kept}
    assert {"check.txt", "record.json", "epochs.jsonl"} <= names_kept
    assert not any(name.endswith((".pt", ".safetensors")) for name in names_kept)


def test_the_quickstart_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            run_cell("".join(cell["source"]), names, tmp_path)
            if len(names["OPTIONS"]) == 5:
                names["OPTIONS"] |= {"epochs": 1, "limit_train": 64, "limit_test": 20, "launcher": "local"}
    assert sorted(names["runs"]["depth"]) == [8, 8, 14, 14]
    assert list(names["table"]["n"]) == [2, 2]
    assert len(names["epochs"]) == 4
    assert "depth 9 is not 6n+2: try 8 or 14" in capsys.readouterr().out
