"""`harness check`: what is here is ok, what is not is named with what to do, and the exit code follows."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command import harness
from rich.console import Console

from harness.checklist import Result
from harness.cluster.job import Allocation
from harness.cluster.nodes import Node
from harness.commands import check
from harness.commands.check import CHECKS
from harness.options import CheckOptions

pytest_plugins = ["nvml_stub"]


def look(name: str, target: CheckOptions, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """State and detail of one check."""
    monkeypatch.setattr(check, "CHECKS", {name: CHECKS[name]})
    (result,) = check.examine(target)
    return result.state, result.detail


def test_a_machine_that_runs_these_tests_is_ready(tmp_path: Path, capsys: Any) -> None:
    code, out, err = harness(f"check --quick --out {tmp_path}/runs", capsys)
    lines = out.splitlines()
    assert (code, err, lines[-1]) == (0, "", "ready")
    for name in ("torch", "DALI", "Ray", "storage", "disk"):
        assert any(line.startswith(f"ok       {name}: ") for line in lines), name
    assert any(line[9:].startswith(("GPU: ",)) for line in lines)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_what_is_missing_is_one_line_with_advice(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = check.installed_version
    missing = ("nvidia-dali-cuda120", "nvidia-dali-cuda130", "nvidia-dali-cuda110")

    def version(package: str) -> str | None:
        return None if package in missing else {"ray": "2.61.0"}.get(package) or whole(package)

    monkeypatch.setattr(check, "installed_version", version)
    code, out, _ = harness(f"check --quick --out {tmp_path} --data-dir {tmp_path}", capsys)
    assert code == 1
    lines = out.splitlines()
    assert any("missing  DALI: not installed; the default loader" in line for line in lines)
    assert any("missing  Ray: 2.61.0" in line and "<2.61" in line for line in lines)
    assert any("missing  data: nothing known in" in line for line in lines)
    assert lines[-1] == "3 of what a run needs is missing"


def test_data_folders_are_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train").mkdir()
    assert look("data", CheckOptions(out=tmp_path, data_dir=tmp_path), monkeypatch)[0] == "missing"
    for name in ("val", "test"):
        (tmp_path / name).mkdir()
        state, detail = look("data", CheckOptions(out=tmp_path, data_dir=tmp_path), monkeypatch)
        assert (state, detail.startswith("class folders in ")) == ("ok", True)
        (tmp_path / name).rmdir()


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/proc/self").exists(), reason="needs a folder nobody writes to")
def test_a_folder_that_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    state, detail = look("storage", CheckOptions(out="/proc/self/nowhere"), monkeypatch)
    assert (state, "/proc/self" in detail) == ("missing", True)


def test_no_cluster_is_a_finding_and_a_bad_address_a_mistake(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = look("cluster", CheckOptions(out=tmp_path, address="127.0.0.1:1"), monkeypatch)
    assert Result("cluster", *finding).line().startswith("missing  cluster: no Ray cluster answers")
    code, _, err = harness("check --quick --address nonsense", capsys)
    assert (code, err.count("\n")) == (2, 1)


def test_a_check_that_breaks_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(target: CheckOptions) -> str:
        raise OSError("libcudart.so: cannot open\nand more")

    for name in ("torch", "GPU", "DALI"):
        monkeypatch.setitem(CHECKS, name, (broken, "install it"))
    found = {result.name: result for result in check.examine(CheckOptions(out=tmp_path))}
    assert found["DALI"] == Result("DALI", "missing", "libcudart.so: cannot open; install it")


def test_nodes_are_compared_over_out_and_measured_with_two_workers_on_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[Any]()

    def measure_nodes(dataset: Any, session: Any, console: Any) -> dict[str, Any]:
        asked.append(session.paths.out)
        return {}

    def measure_between(session: Any, *, widest: bool) -> dict[str, Any]:
        asked.append((session.allocation.threads, widest))
        return {"reason": "no room"}

    job = Allocation(device="cpu", workers=1, concurrent_runs=1, threads=16)
    nodes = tuple(Node(cpus=cpus, gpus=0) for cpus in (0, 16, 4))
    ranks = SimpleNamespace(name="2 ranks", ranks=True, check=lambda *_: [])
    for name, stub in {
        "make_allocation": lambda *_: job, "measure_nodes": measure_nodes, "measure_between": measure_between,
        "find_devices": lambda _: [], "make_ranks": lambda *_: ranks, "inspect_cluster": lambda: nodes,
    }.items():  # fmt: skip
        monkeypatch.setattr(check, name, stub)
    results = list(check.measure_all(CheckOptions(out=str(tmp_path / "runs"), address="auto"), Console()))
    assert asked == [tmp_path / "runs", (2, True)]
    assert [(result.state, result.name) for result in results] == [("failed", "all-reduce")]


@pytest.mark.parametrize(
    ("build", "driver", "cuda", "wheel", "ok", "words"),
    [
        ("13.0", "580.65.06", 13000, "nvidia-dali-cuda130", True, "driver 580.65.06 for CUDA 13.0"),
        ("12.8", "580.65.06", 13000, "nvidia-dali-cuda120", True, "torch for CUDA 12.8"),
        ("12.6", "535.183.01", 12020, "nvidia-dali-cuda120", True, "CUDA 12.2"),
        ("13.0", "550.54.15", 12040, "nvidia-dali-cuda120", False, "cu126 or cu128: pytorch.org/get-started"),
        ("13.0", "550.54.15", 12040, "nvidia-dali-cuda120", False, "or update the driver to 580 or newer"),
        ("12.8", "470.82.01", 11040, "nvidia-dali-cuda120", False, "built for CUDA 11 (cu118"),
        (None, "550.54.15", 12040, "nvidia-dali-cuda120", False, "this torch uses no GPU; install a torch built for"),
        ("12.8", "550.54.15", 12040, "nvidia-dali-cuda130", False,
         "pip uninstall nvidia-dali-cuda130 && pip install nvidia-dali-cuda120"),
    ],
)  # fmt: skip
def test_builds_that_do_not_fit(
    build: str | None, driver: str, cuda: int, wheel: str, ok: bool, words: str, nvml: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    nvml.set(DRIVER=driver, CUDA=cuda)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check, "installed_version", lambda package: "2.4.0" if package == wheel else None)
    state, detail = look("GPU", CheckOptions(out=Path()), monkeypatch)
    assert (state, words in detail) == ("ok" if ok else "missing", True)
    nvml.set(FAIL="nvmlInitWithFlags=9")
    assert look("GPU", CheckOptions(out=Path()), monkeypatch)[0] == "absent", "no driver"
