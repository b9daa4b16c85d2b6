"""A rank that stops without dying is noticed and named; the host does not run far ahead of its device."""

from __future__ import annotations

import itertools
import multiprocessing as mp
import os
import signal
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_train import _port

from harness.training import watchdog
from harness.training.watchdog import EVERY_STEPS, RankStalledError, Watchdog

STALL_SECONDS = 6.0


def _rank(rank: int, port: int, stops: int, parent: Connection) -> None:
    """All-reduce without end; the rank that is to be stopped says so, the other one says what it got."""
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2,
        timeout=timedelta(seconds=STALL_SECONDS),
    )  # fmt: skip
    dog = Watchdog(torch.device("cpu"), stall_seconds=STALL_SECONDS)
    try:
        with dog.collectives():
            for step in itertools.count():
                dist.all_reduce(torch.ones(1))
                dog.step()
                if step == 20 and rank == stops:
                    parent.send("stop me")
                time.sleep(0.02)
    except Exception as error:
        parent.send(f"{type(error).__name__}: {error}")
    os._exit(0)


def test_a_stopped_rank_is_named() -> None:
    """Rank 0 holds the group's store, rank 1 does not: two groups at the same time, and each loses one of them."""
    context = mp.get_context("spawn")
    groups = []
    for stops in (0, 1):
        port, pipes = _port(), [context.Pipe(duplex=False) for _ in (0, 1)]
        ranks = [context.Process(target=_rank, args=(rank, port, stops, pipes[rank][1])) for rank in (0, 1)]
        for rank in ranks:
            rank.start()
        groups.append((ranks, pipes))
    answers = []
    try:
        for stops, (ranks, pipes) in enumerate(groups):
            stopped, pid = pipes[stops][0], ranks[stops].pid
            assert pid is not None
            assert stopped.poll(120)
            assert stopped.recv() == "stop me"
            os.kill(pid, signal.SIGSTOP)
        for stops, (_, pipes) in enumerate(groups):
            assert pipes[1 - stops][0].poll(20 * STALL_SECONDS)
            answers.append(pipes[1 - stops][0].recv())
    finally:
        for ranks, _ in groups:
            for rank in ranks:
                rank.kill()
                rank.join()
    for stops, answer in enumerate(answers):
        named = f"RankStalledError: rank {stops} on {os.uname().nodename} gives no sign of life"
        assert answer.startswith(named), answer
        assert f"rank {1 - stops} has waited" in answer


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
    dog = Watchdog(cuda, stall_seconds=0.2)
    monkeypatch.setattr(Event, "behind", 2)
    for _ in range(20 * EVERY_STEPS):  # the device is two events behind: no wait
        dog.step()
    assert Event.most_unfinished == 2
    monkeypatch.setattr(Event, "behind", 3)
    steps = iter(dog.step, "never")
    with pytest.raises(RankStalledError, match="the device has not finished a step in 0 s"):
        list(itertools.islice(steps, 20 * EVERY_STEPS))


def test_a_device_that_stops_is_noticed_at_the_epochs_end(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    dog = Watchdog(cuda, stall_seconds=0.2)
    aborted: list[bool] = []
    monkeypatch.setattr(watchdog, "_abort", lambda: aborted.append(True))
    monkeypatch.setattr(Event, "behind", 1)
    with pytest.raises(RankStalledError):
        dog.finish()
    assert aborted == [True]


def test_other_errors_stay_what_they_are() -> None:
    dog = Watchdog(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="shape"), dog.collectives():
        raise RuntimeError("shape mismatch")
