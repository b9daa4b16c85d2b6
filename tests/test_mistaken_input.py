"""Mistaken input is one line that says what is wrong, the value given and what is allowed; exit code 2."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import harness

from harness import resources
from harness.cluster.job import Allocation
from harness.options import Grid
from harness.plan import expand

ONE = Allocation(device="cpu", workers=1, concurrent_runs=1, threads=2)
HERE = "run --dataset digits --gpus 0 --dry-run"


def refusal(line: str, capsys: Any) -> str:
    """The one line."""
    code, _, err = harness(line, capsys)
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("harness: error: ")
    return err.removeprefix("harness: error: ").removesuffix("\n")


@pytest.fixture(autouse=True)
def _an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HARNESS_OUT", raising=False)


# --- a record of another machine, a file that is not there ---


def write_spec(**changes: Any) -> None:
    (spec,) = expand(Grid(dataset="digits"), ONE, fingerprint="", train_images=1437)
    Path("spec.json").write_text(
        json.dumps(replace(spec, **{"device": "cuda", "engine": "graph"} | changes).to_json())
    )


@pytest.mark.parametrize(
    ("have", "changes", "words", "says"),
    [
        (0, {}, "", "this machine has no GPU: --gpus 0 --engine eager trains them on the CPU"),
        (0, {"engine": "eager"}, "", "this machine has no GPU: --gpus 0 trains them on the CPU"),
        (0, {"precision": "tf32", "workers": 4}, "",
         "this machine has no GPU: --gpus 0 --workers 1 --engine eager --precision fp32 trains them on the CPU"),
        (2, {"workers": 4}, "", "this machine has 2 GPUs: --workers 2 trains them on those"),
        (0, {}, "--engine eager", "this machine has no GPU: --gpus 0 trains them on the CPU"),
    ],
)  # fmt: skip
def test_a_run_of_gpus_that_are_not_here(
    have: int, changes: dict[str, Any], words: str, says: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "count_gpus", lambda: have)
    monkeypatch.setattr(resources, "count_cpus", lambda: 2)
    write_spec(**changes)
    of = f"--spec: these runs need GPUs ({changes.get('workers', 1)} each); "
    assert refusal(f"run --spec spec.json --dry-run {words}", capsys) == of + says


def test_the_advice_for_a_run_of_gpus_works(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "count_gpus", lambda: 0)
    write_spec(precision="tf32", workers=4)
    advice = refusal("run --spec spec.json --dry-run", capsys).partition("GPU: ")[2].partition(" trains")[0]
    code, out, err = harness(f"run --spec spec.json --dry-run {advice}", capsys)
    assert (code, err) == (0, ""), err
    assert "he2015" in out


def test_an_engine_that_needs_a_gpu_and_was_not_typed(capsys: Any) -> None:
    write_spec()
    says = "engine graph needs a GPU; the CPU supports --engine eager and compile"
    assert refusal("run --spec spec.json --gpus 0 --dry-run", capsys) == says


def test_a_plugin_that_is_not_there_is_no_option_that_was_not_typed(capsys: Any) -> None:
    assert refusal("check nofile.py", capsys) == "plug-in nofile.py: no such file"
    assert refusal(f"{HERE} --plugin nofile.py", capsys) == "plug-in nofile.py: no such file"
    Path("text.txt").write_text("")
    assert refusal("check text.txt", capsys) == "plug-in text.txt: a Python file is needed"
