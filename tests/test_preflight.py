"""Nodes that differ are named, with what differs; nodes that are alike pass, and nothing is left behind."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from harness import preflight
from harness.cluster import nodes
from harness.cluster.job import Allocation
from harness.cluster.nodes import Node, Unanswered
from harness.loaders.datasets import load_dataset
from harness.options import Resources
from harness.preflight import (
    PACKAGES,
    Difference,
    answer,
    check_nodes,
    compare,
    find_outliers,
    find_wrong_clocks,
    read_clock,
)
from harness.resources import Session
from harness.results.identity import hash_code
from harness.spec import RunPaths, UserError
from harness.training import rates

HERE = {"python": "3.11.7", "code": "c0de", "data": "da7a", **dict.fromkeys(PACKAGES, "1.0")}
ALIKE = {**HERE, "out": "m-1", "disk": 50.0, "clock": (0.1, 0.01)}


def differences(**facts: Any) -> list[Difference]:
    return compare(HERE, {"n": {**ALIKE, **facts}}, frozenset({"m", "m-1"}))


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
        ({"disk": 0.5}, "disk", "0.5 GiB free"),
        ({"clock": (-200.0, 0.1)}, "clock", "200 s behind"),
        ({"clock": (99.0, 0.1)}, "clock", "99 s ahead"),
    ],
)
def test_what_differs_is_found(facts: dict[str, Any], what: str, there: str) -> None:
    (difference,) = differences(**facts)
    assert difference[:3] == ("n", what, there)


def test_this_machine_answers(tmp_path: Path) -> None:
    fingerprint = load_dataset("digits").fingerprint
    question: dict[str, Any] = {
        "paths": RunPaths(out=tmp_path),
        "dataset": "digits",
        "sentinel": ".marker",
        "clock": time.time,
    }
    assert answer(**question)["out"] == "another folder, or none"
    assert not list(tmp_path.iterdir()), "a folder that is not the driver's is left alone"
    (tmp_path / ".marker").write_bytes(b"")
    facts = answer(**question)
    assert facts["data"] == fingerprint[:12]
    assert facts["code"] == hash_code()
    ahead, uncertainty = facts["clock"]
    assert abs(ahead) <= uncertainty < 1, "the same clock"
    assert (tmp_path / facts["out"]).exists()
    elsewhere = RunPaths(out=tmp_path, data_dir=tmp_path / "no")
    missing = answer(paths=elsewhere, dataset="cifar10", sentinel=".marker", clock=time.time)
    assert "no such folder" in missing["data"]


def make_session(out: Path, **options: Any) -> Session:
    job = Allocation(**{"device": "cpu", "workers": 1, "concurrent_runs": 2, "threads": 1, **options})
    return Session(job, Resources(), RunPaths(out=out), ExitStack())


@contextmanager
def clock_of_this_machine() -> Iterator[Any]:
    yield time.time


def check(
    answers: Any, out: Path, monkeypatch: pytest.MonkeyPatch, session: Session | None = None, **options: Any
) -> tuple[str, dict[str, Any]]:
    every = {name: f"id of {name}" for name in ("a", "b", "c (10.0.0.3)")}
    monkeypatch.setattr(nodes, "ask_every_node", answers)
    monkeypatch.setattr(rates, "measure_rates", lambda *_: {"GEMM GFLOP/s": 100.0})
    monkeypatch.setattr(nodes, "working_nodes", lambda: every)
    monkeypatch.setattr(nodes, "only_this_one", lambda: False)
    monkeypatch.setattr(preflight, "driver_clock", clock_of_this_machine)
    sizes = {identity: Node(cpus=2, gpus=0) for identity in every.values()}
    left = lambda avoid=(): tuple(node for name, node in sizes.items() if name not in avoid)  # noqa: E731
    monkeypatch.setattr(nodes, "inspect_cluster", left)
    console = Console(file=io.StringIO(), width=200)
    try:
        stored = check_nodes(load_dataset("digits"), session or make_session(out), console, **options)
    finally:
        assert not list(out.iterdir())
        first, text = console.file.getvalue().split("\n", 1)  # type: ignore[attr-defined]
        assert first == "asking 3 nodes; one that has to decode images takes minutes"
    return text, stored["preflight"]


def test_alike_nodes_pass_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, stored = check(lambda ask: {"a": ask(), "b": ask()}, tmp_path, monkeypatch)
    assert text == ""
    clocks = stored.pop("clocks")
    assert stored == {"rates": {node: {"GEMM GFLOP/s": 100.0} for node in "ab"}, "outliers": []}
    for clock in clocks.values():
        assert abs(clock["ahead_seconds"]) <= clock["uncertainty_seconds"] < 0.1


def one_is_slow(ask: Any) -> Any:
    return {"a": ask(), "b": ask(), "c (10.0.0.3)": {**ask(), "rates": {"GEMM GFLOP/s": 60.0}}}


SLOW = "c (10.0.0.3) is slow: GEMM GFLOP/s 60, 40 % below the median node's 100"


def test_a_slow_node_is_named_and_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_session(tmp_path)
    text, stored = check(one_is_slow, tmp_path, monkeypatch, session)
    assert text.splitlines() == [SLOW]
    assert stored["outliers"] == [SLOW]
    assert "excluded" not in stored
    assert session.allocation.avoid == ()


def test_a_slow_node_is_left_out_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_session(tmp_path, concurrent_runs=6)
    text, stored = check(one_is_slow, tmp_path, monkeypatch, session, exclude=True)
    assert text.splitlines() == [SLOW, "left out, as --exclude-outliers says: c (10.0.0.3)"]
    assert stored["excluded"] == ["c (10.0.0.3)"]
    assert session.allocation.avoid == ("id of c (10.0.0.3)",)
    assert session.allocation.concurrent_runs == 4, "as many as the others have CPUs"


def test_too_few_nodes_that_stay_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = r"^--exclude-outliers: 2 of 3 nodes stay, without c \(10.0.0.3\): no room for a run of 5 workers$"
    with pytest.raises(UserError, match=needed):
        check(one_is_slow, tmp_path, monkeypatch, make_session(tmp_path, workers=5), exclude=True)
    took = {"ranks": 4, "latency_us": 30.0, "algorithm_gb_per_s": 1.0, "bus_gb_per_s": 1.5}
    measured = {"all_reduce": {"between nodes": took}}
    monkeypatch.setattr(preflight, "measure_network", lambda _, workers: measured if workers == 4 else {})
    elastic = make_session(tmp_path, workers=5, fallback_world_sizes=(4, 2))
    _, stored = check(one_is_slow, tmp_path, monkeypatch, elastic, exclude=True)
    assert elastic.allocation.concurrent_runs == 1, "it begins narrower"
    assert stored["all_reduce"] == measured["all_reduce"]


def test_all_reduces_are_measured_of_a_runs_workers_or_of_all_that_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def measure(session: Session, workers: int) -> dict[str, Any]:
        asked.append(workers)
        return {"reason": "no room in the cluster"}

    def alike(ask: Any) -> Any:
        return {"a": ask(), "b": ask()}

    monkeypatch.setattr(preflight, "measure_network", measure)
    for options, session in (
        ({}, make_session(tmp_path, workers=2)), ({"widest": True}, make_session(tmp_path)), ({}, make_session(tmp_path)),
    ):  # fmt: skip
        text, stored = check(alike, tmp_path, monkeypatch, session, **options)
        assert ("all-reduces were not measured: no room in the cluster" in text) == ("reason" in stored)
    assert asked == [2, 6], "one worker alone has none"


class Clocks:
    """This machine's clock and one that is ahead of it; a reading of the other takes a while, more one way than back."""

    def __init__(self, ahead: float, there: float, back: float) -> None:
        self.now, self.ahead, self.there, self.back, self.readings = 1e9, ahead, there, back, 0

    def time(self) -> float:
        return self.now

    def read(self) -> float:
        self.readings += 1
        slow = 50.0 if self.readings == 1 else 1.0  # the first one starts a process
        self.now += slow * self.there
        read = self.now + self.ahead
        self.now += slow * self.back
        return read


@pytest.mark.parametrize("ahead", [0.0, 0.2, -3.0])
@pytest.mark.parametrize(("there", "back"), [(0.01, 0.01), (0.09, 0.01), (0.0, 0.2)])
def test_a_clock_is_known_to_half_a_round_trip(
    ahead: float, there: float, back: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = Clocks(ahead, there, back)
    monkeypatch.setattr(preflight, "time", SimpleNamespace(time=clocks.time))
    here, uncertainty = read_clock(clocks.read)
    assert uncertainty == pytest.approx((there + back) / 2, abs=1e-6)
    assert abs(here + ahead) <= uncertainty + 1e-6, "this clock is behind by what the other is ahead"
    if there == back:
        assert here == pytest.approx(-ahead, abs=1e-6)


def test_clocks_that_are_off_by_more_than_half_a_second_are_named() -> None:
    clocks = {"a": (0.4, 0.01), "b": (-1.5, 0.02), "c": (0.9, 0.6), "d": (0.6, 0.01)}
    b, d = find_wrong_clocks(clocks)
    assert b.startswith("the clock of b is 1.5 s behind this machine's, ± 0.02 s")
    assert d.startswith("the clock of d is 0.6 s ahead of this machine's, ± 0.01 s")


def test_outliers_are_far_below_the_median_node() -> None:
    of = {"a": 100.0, "b": 104.0, "c": 80.0, "d": 70.0, "e": 130.0}
    ((node, (line,)),) = find_outliers({node: {"disk MB/s": value} for node, value in of.items()}).items()
    assert node == "d"
    assert line.startswith("d is slow: disk MB/s 70, 30 % below")
    ((line,),) = find_outliers(
        {"a": {"memory GB/s": 10.0, "GEMM GFLOP/s": 1.0}, "b": {"memory GB/s": 5.0}}
    ).values()
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
    monkeypatch.setattr(nodes, "ask_every_node", answers)
    monkeypatch.setattr(nodes, "working_nodes", lambda: {"a": "1", "b": "2"})
    monkeypatch.setattr(nodes, "only_this_one", lambda: False)
    monkeypatch.setattr(preflight, "driver_clock", clock_of_this_machine)
    with pytest.raises(UserError, match="2 of 3 nodes are not ready"):
        check_nodes(load_dataset("digits"), make_session(tmp_path), console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert any(line.split() == ["b", "[red]", "code", "0ther", hash_code()] for line in lines)
    assert any("ModuleNotFoundError: x" in line for line in lines)
    assert not list(tmp_path.iterdir())
