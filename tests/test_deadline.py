"""`--until`: what it may be, when it rings, and that the same command then goes on."""

from __future__ import annotations

import signal
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from command import harness

from harness import progress as live
from harness.deadline import TimeUp, format_moment, parse_until, stopping_at, stopping_on_sigterm
from harness.results.store import load_epochs, load_records
from harness.results.values import EpochMetrics, RunResult
from harness.spec import UserError

NOW = datetime(2026, 3, 4, 17, 30, 15)
RUN = "run --dataset digits --depths 8 --limit-train 128 --limit-test 64 --gpus 0 --loader resident --launcher local --epochs 3 --seeds 2"


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("9m", NOW + timedelta(minutes=9)),
        ("2h30m", NOW + timedelta(hours=2.5)),
        ("90s", NOW + timedelta(seconds=90)),
        ("1d1s", NOW + timedelta(days=1, seconds=1)),
        ("0.5h", NOW + timedelta(minutes=30)),
        ("18:00", NOW.replace(hour=18, minute=0, second=0)),
        ("17:30:16", NOW + timedelta(seconds=1)),
        ("9:05", datetime(2026, 3, 5, 9, 5)),  # has been today: tomorrow
    ],
)
def test_a_duration_or_the_next_such_time(text: str, moment: datetime) -> None:
    assert parse_until(text, NOW) == moment


@pytest.mark.parametrize(
    "text", ["", "9", "0m", "m", "9x", "30m2h", "-3m", "24:00", "12:60", "noon", "9" * 15 + "d"]
)
def test_anything_else_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"a duration, as in 9m, 2h30m or 90s, or a time of day"):
        parse_until(text, NOW)


def test_a_mistake_ends_the_command(capsys: Any) -> None:
    for command in ("run", "tune --search 'lr=uniform(0.1,1)'"):
        code, _, err = harness(f"{command} --until tomorrow", capsys)
        assert code == 2
        assert err.startswith("harness: error: --until 'tomorrow':")
        assert err.count("\n") == 1


def test_it_wakes_what_waits_and_rings_no_more() -> None:
    moment = datetime.now() + timedelta(seconds=0.1)
    before = signal.getsignal(signal.SIGALRM)
    began = time.monotonic()
    with pytest.raises(TimeUp, match=f"stopped at {format_moment(moment)} as --until said"), stopping_at(moment):
        time.sleep(30)
    assert time.monotonic() - began < 20
    assert signal.getsignal(signal.SIGALRM) is before
    with stopping_at(datetime.now() + timedelta(seconds=0.1)):
        pass
    with stopping_at(None):
        time.sleep(0.15)
    with pytest.raises(TimeUp), stopping_at(NOW - timedelta(days=900)):  # has come already
        time.sleep(30)


def test_python_may_drop_it_once_and_ray_make_another_of_it() -> None:
    class Dropping:
        def __del__(self) -> None:  # what Python calls where nothing can be raised, as it does in a fork
            time.sleep(0.3)

    def drop() -> None:
        Dropping()
        time.sleep(20)

    def replace() -> None:
        try:
            time.sleep(20)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None  # as Ray's get and wait do

    for body in (drop, replace):
        with pytest.raises(TimeUp), stopping_at(datetime.now() + timedelta(seconds=0.1)):
            body()
    with pytest.raises(KeyboardInterrupt) as stop, stopping_at(datetime.now() + timedelta(seconds=60)):
        raise KeyboardInterrupt
    assert not isinstance(stop.value, TimeUp), "somebody's Ctrl-C"


def test_outside_the_main_thread_there_are_no_signals() -> None:
    import threading

    def work() -> None:
        with stopping_on_sigterm() as asked:
            said.append(asked())
        try:
            with stopping_at(datetime.now() + timedelta(seconds=60)):
                said.append("went on")
        except UserError as error:
            said.append(str(error))

    said: list[object] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert said == [False, "--until needs the main thread of its process, whose signals it uses"]


def test_an_alarm_set_before_goes_on() -> None:
    outer = signal.setitimer(signal.ITIMER_REAL, 200.0)
    try:
        with stopping_at(datetime.now() + timedelta(hours=1)):
            assert signal.getitimer(signal.ITIMER_REAL)[0] > 3000
        assert 100 < signal.getitimer(signal.ITIMER_REAL)[0] <= 200
    finally:
        signal.setitimer(signal.ITIMER_REAL, *outer)


def test_a_sweep_stops_then_and_the_same_command_goes_on(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ring_in_epoch_2(self: live.Progress, spec: Any, event: Any) -> None:
        if isinstance(event, EpochMetrics) and event.epoch == 2:
            signal.raise_signal(signal.SIGALRM)

    with monkeypatch.context() as patch:
        patch.setattr(live.Progress, "event", ring_in_epoch_2)
        code, out, err = harness(f"{RUN} --until 3h --out {tmp_path}", capsys)
    assert (code, err) == (130, "")
    assert "until " in out.splitlines()[0]
    assert out.splitlines()[-1].startswith("stopped at ")
    assert out.endswith("as --until said; the same command goes on\n")
    (stopped,) = load_records([tmp_path]).interrupted  # and no run was begun after it
    assert [epoch.epoch for epoch in load_epochs(stopped.folder)] == [1, 2]

    print_event = live.JsonLines.event

    def ring_at_the_end(self: live.JsonLines, spec: Any, event: Any) -> None:
        print_event(self, spec, event)
        if isinstance(event, RunResult) and spec.seed == 1:
            signal.raise_signal(signal.SIGALRM)

    monkeypatch.setattr(live.JsonLines, "event", ring_at_the_end)
    code, out, err = harness(f"{RUN} --until 3h --out {tmp_path} --format jsonl", capsys)
    assert code == 0  # nothing was left to do
    assert all(line.startswith("{") for line in out.splitlines())
    assert [len(load_epochs(stored.folder)) for stored in load_records([tmp_path]).records] == [3, 3]
    assert "stopped" not in err
