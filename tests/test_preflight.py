"""Nodes that differ are named, with what differs; nodes that are alike pass, and nothing is left behind."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from harness import preflight
from harness.cluster.nodes import Unanswered
from harness.loaders.datasets import load_dataset
from harness.preflight import PACKAGES, Difference, answer, check_nodes, compare, find_outliers
from harness.results.identity import hash_code
from harness.spec import RunPaths, UserError
from harness.training import rates

HERE = {"python": "3.11.7", "code": "c0de", "data": "da7a", **dict.fromkeys(PACKAGES, "1.0")}
ALIKE = {**HERE, "out": "m-1", "disk": "50.0", "clock": "1000.5"}


def differences(**facts: str) -> list[Difference]:
    return compare(
        HERE, {"n": {**ALIKE, **facts}}, sentinels=frozenset({"m", "m-1"}), sent_at=1000, received_at=1001
    )


def test_equal_nodes_differ_in_nothing() -> None:
    assert differences() == []


@pytest.mark.parametrize(
    ("facts", "what", "there"),
    [
        ({"code": "0ther"}, "code", "0ther"),
        ({"torch": "2.11.0"}, "torch", "2.11.0"),
        ({"nvidia-dali-cuda120": "not installed"}, "nvidia-dali-cuda120", "not installed"),
        ({"data": "/data: no such folder"}, "data", "/data: no such folder"),
        ({"out": "another folder, or none"}, "--out", "another folder, or none"),
        ({"out": "m-2"}, "--out", "m-2"),  # it wrote, and the driver does not see it
        ({"disk": "0.5"}, "disk", "0.5 GiB free"),
        ({"clock": "800.0"}, "clock", "200 s behind"),
        ({"clock": "1100.0"}, "clock", "99 s ahead"),
    ],
)
def test_what_differs_is_found(facts: dict[str, str], what: str, there: str) -> None:
    (difference,) = differences(**facts)
    assert difference[:3] == ("n", what, there)


def test_this_machine_answers(tmp_path: Path) -> None:
    fingerprint = load_dataset("digits").fingerprint
    question: dict[str, Any] = {"paths": RunPaths(out=tmp_path), "dataset": "digits", "sentinel": ".marker"}
    assert answer(**question)["out"] == "another folder, or none"
    assert not list(tmp_path.iterdir()), "a folder that is not the driver's is left alone"
    (tmp_path / ".marker").write_bytes(b"")
    began = time.time()
    facts = answer(**question)
    assert facts["data"] == fingerprint[:12]
    assert facts["code"] == hash_code()
    assert began <= float(facts["clock"]) <= time.time()
    assert (tmp_path / facts["out"]).exists()
    elsewhere = RunPaths(out=tmp_path, data_dir=tmp_path / "no")
    missing = answer(paths=elsewhere, dataset="cifar10", sentinel=".marker")
    assert "no such folder" in missing["data"]


def check(answers: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, Any]]:
    monkeypatch.setattr(preflight, "ask_every_node", answers)
    monkeypatch.setattr(rates, "measure_rates", lambda *_: {"GEMM GFLOP/s": 100.0})
    monkeypatch.setattr(preflight, "working_nodes", lambda: ["a", "b"])
    console = Console(file=io.StringIO(), width=120)
    try:
        stored = check_nodes(load_dataset("digits"), RunPaths(out=out), console)
    finally:
        assert not list(out.iterdir())
        text = console.file.getvalue()  # type: ignore[attr-defined]
    return text, stored


def test_alike_nodes_pass_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, stored = check(lambda ask: {"a": ask(), "b": ask()}, tmp_path, monkeypatch)
    assert text == ""
    measured = {node: {"GEMM GFLOP/s": 100.0} for node in "ab"}
    assert stored == {"preflight": {"rates": measured, "outliers": []}}


def test_a_slow_node_is_named_and_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(ask: Any) -> Any:
        return {"a": ask(), "b": ask(), "c (10.0.0.3)": {**ask(), "rates": '{"GEMM GFLOP/s": 60.0}'}}

    text, stored = check(answers, tmp_path, monkeypatch)
    line = "c (10.0.0.3) is slow: GEMM GFLOP/s 60, 40 % below the median node's 100"
    assert text.splitlines() == [line]
    assert stored["preflight"]["outliers"] == [line]


def test_outliers_are_far_below_the_median_node() -> None:
    of = {"a": 100.0, "b": 104.0, "c": 80.0, "d": 70.0, "e": 130.0}
    (line,) = find_outliers({node: {"disk MB/s": value} for node, value in of.items()})
    assert line.startswith("d is slow: disk MB/s 70, 30 % below")
    (line,) = find_outliers({"a": {"memory GB/s": 10.0, "GEMM GFLOP/s": 1.0}, "b": {"memory GB/s": 5.0}})
    assert line.startswith("b is slow: memory GB/s 5, 50 % below"), "of two, the better one is what can be had"


def test_rates_of_this_machine(tmp_path: Path) -> None:
    measured = rates.measure_rates(tmp_path, load_dataset("digits"))
    assert set(measured) >= {"GEMM GFLOP/s", "memory GB/s", "disk MB/s", "loader images/s"}
    assert all(value > 0 for value in measured.values())
    assert 0.5 < measured["memory GB/s"] < 1000
    assert not list(tmp_path.iterdir())


def test_a_table_says_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(ask: Any) -> Any:
        return {
            "a": ask(),
            "b [red]": {**ask(), "code": "0ther"},
            "c": Unanswered(reason="ModuleNotFoundError: x"),
        }

    console = Console(file=io.StringIO(), width=120)
    monkeypatch.setattr(preflight, "ask_every_node", answers)
    monkeypatch.setattr(preflight, "working_nodes", lambda: ["a", "b"])
    with pytest.raises(UserError, match="2 of 3 nodes are not ready"):
        check_nodes(load_dataset("digits"), RunPaths(out=tmp_path), console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert any(line.split() == ["b", "[red]", "code", "0ther", hash_code()] for line in lines)
    assert any("ModuleNotFoundError: x" in line for line in lines)
    assert not list(tmp_path.iterdir())
