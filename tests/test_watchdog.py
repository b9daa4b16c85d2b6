"""Who hangs is noticed and named; the host does not run far ahead of its device."""

from __future__ import annotations

import itertools
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import FRESH
from test_train import _port

from harness.cluster.job import Stalled, Worker
from harness.training.watchdog import EVERY_STEPS, RankStalledError, Watchdog

STALL_SECONDS = 6.0
HOST = os.uname().nodename


def read_a_lost_disk() -> None:
    """Where a rank hangs by itself."""
    threading.Event().wait()


def _rank(rank: int, port: int, stops: int, how: str, stacks: Path, parent: Connection) -> None:
    """All-reduce without end; one says so and stops or hangs; the others say what the alarm was."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

    def alarm(stalled: Stalled) -> None:
        if rank != stops:  # else the one that is to answer would lose its peer first, on a busy machine
            parent.send(stalled)
            os._exit(0)

    worker = Worker(rank=rank, world_size=2, stall_seconds=STALL_SECONDS, node=f"node{rank}", alarm=alarm)
    dog = Watchdog(torch.device("cpu"), worker, stacks)
    for step in itertools.count():
        if step == 20 and rank == stops:
            parent.send("stopping")
            if how != "hangs":
                os.kill(os.getpid(), signal.SIGSTOP)
            read_a_lost_disk()
        dog.begin()
        if step == 20 and how == "stopped between steps":
            dog.rest()
        dist.all_reduce(torch.ones(1))
        dog.step()
        time.sleep(0.02)


@contextmanager
def groups(stacks: Path) -> Iterator[dict[tuple[int, str], tuple[list[Any], list[Connection]]]]:
    """Of two ranks each, at the same time, by which one stops and how; rank 0 holds the group's store, rank 1 does not."""
    started: dict[tuple[int, str], Any] = {}
    for stops, how in ((0, "stopped"), (1, "hangs"), (1, "stopped between steps")):
        port, pipes = _port(), [FRESH.Pipe(duplex=False) for _ in (0, 1)]
        ranks = [
            FRESH.Process(target=_rank, args=(rank, port, stops, how, stacks / f"{stops}-{how}", pipes[rank][1]))
            for rank in (0, 1)
        ]
        for process in ranks:
            process.start()
        started[stops, how] = ranks, [pipe for pipe, _ in pipes]
    try:
        yield started
    finally:
        for ranks, _ in started.values():
            for process in ranks:
                process.kill()
                process.join()


def test_who_hangs_is_named_with_what_each_rank_waits_for(tmp_path: Path) -> None:
    answers: dict[tuple[int, str], Stalled] = {}
    with groups(tmp_path) as started:
        for (stops, _), (_, pipes) in started.items():
            assert pipes[stops].poll(200)
            assert pipes[stops].recv() == "stopping"
        for (stops, how), (_, pipes) in started.items():
            assert pipes[1 - stops].poll(20 * STALL_SECONDS)
            answers[stops, how] = pipes[1 - stops].recv()
    for (stops, how), stalled in answers.items():
        does = "is behind, in read_a_lost_disk" if how == "hangs" else "does not answer"
        stacks = tmp_path / f"{stops}-{how}"
        assert stalled.message == (
            f"no step for 6 s: rank {stops} ({HOST}, cpu) {does}; the others wait in all_reduce; stacks in {stacks}"
        )
        assert stalled.nodes == (f"node{stops}",)
        waiting = (stacks / f"attempt-1-rank-{1 - stops}.txt").read_text()
        assert waiting.startswith(f"rank {1 - stops} on {HOST}, cpu, after 20 steps\n")
        assert re.search(r'in all_reduce\n(.*\n)*.*test_watchdog.py", line \d+ in _rank', waiting)
        own = stacks / f"attempt-1-rank-{stops}.txt"
        assert own.exists() == (how == "hangs"), "a stopped process writes nothing"
        assert how != "hangs" or "in read_a_lost_disk" in own.read_text()


def test_without_an_alarm_the_error_is_raised_where_the_run_trains(tmp_path: Path) -> None:
    dog = Watchdog(torch.device("cpu"), Worker(stall_seconds=1.0), tmp_path)

    def poll_a_queue() -> None:
        while True:
            time.sleep(0.01)

    dog.step()
    named = rf"no step for 1 s: rank 0 \({HOST}, cpu\) waits in poll_a_queue; stacks in {tmp_path}"
    with pytest.raises(RankStalledError, match=named):
        poll_a_queue()
    assert "in poll_a_queue" in (tmp_path / "attempt-1-rank-0.txt").read_text()
    dog.close()


def test_what_is_no_step_may_take_its_time() -> None:
    dog = Watchdog(torch.device("cpu"), Worker(stall_seconds=0.3))
    time.sleep(1.0)  # before the first
    for _ in range(20):
        dog.moved()
        time.sleep(0.05)
    dog.rest()
    time.sleep(1.0)
    dog.close()


def _alone(parent: Connection) -> None:
    dog = Watchdog(
        torch.device("cpu"), Worker(stall_seconds=3.0, alarm=lambda stalled: parent.send(stalled.message))
    )
    dog.step()
    parent.send("stop me")
    time.sleep(1.0)
    dog.step()
    parent.send("done")
    time.sleep(600)


def test_a_process_that_was_stopped_as_a_whole_has_lost_no_time() -> None:
    """Ctrl-Z, or a laptop that slept."""
    mine, theirs = FRESH.Pipe(duplex=False)
    process = FRESH.Process(target=_alone, args=(theirs,))
    process.start()
    try:
        assert mine.poll(200)
        assert mine.recv() == "stop me"
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(4.0)
        os.kill(process.pid, signal.SIGCONT)
        assert mine.poll(60)
        assert mine.recv() == "done"
        assert mine.poll(60), "the next step never came"
        assert "no step for 3 s" in mine.recv()
    finally:
        process.kill()
        process.join()


class Event:
    """Of a device that has done all steps but the last `behind`."""

    recorded: list[Event] = []  # noqa: RUF012
    behind = 0
    most_unfinished = 0

    def record(self, stream: Any) -> None:
        Event.recorded.append(self)

    def query(self) -> bool:
        position = Event.recorded.index(self)
        unfinished = len(Event.recorded) - 1 - position
        Event.most_unfinished = max(Event.most_unfinished, unfinished)
        return unfinished >= Event.behind


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(Event, "recorded", [])
    return torch.device("cuda", 0)


def test_the_host_waits_for_the_steps_before_the_last_ones(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    dog = Watchdog(cuda, Worker(stall_seconds=1.0))
    monkeypatch.setattr(Event, "behind", 2)
    for _ in range(20 * EVERY_STEPS):  # the device is two events behind: no wait
        dog.step()
    assert Event.most_unfinished == 2
    monkeypatch.setattr(Event, "behind", 3)
    steps = iter(dog.step, "never")
    with pytest.raises(RankStalledError, match=r"rank 0 .* waits in its device$"):
        list(itertools.islice(steps, 20 * EVERY_STEPS))
    dog.close()


def test_a_device_that_stops_is_noticed_at_the_epochs_end(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    dog = Watchdog(cuda, Worker(stall_seconds=1.0))
    dog.step()
    monkeypatch.setattr(Event, "behind", 1)
    with pytest.raises(RankStalledError, match=r"its device"):
        dog.finish()
    dog.close()


def test_other_errors_stay_what_they_are() -> None:
    dog = Watchdog(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="shape"):
        raise RuntimeError("shape mismatch")
    dog.close()
