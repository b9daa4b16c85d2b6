"""Processes of tests. Each is forked from one that has torch and a run's imports already: those take seconds."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["torch", "sklearn.datasets", "harness.commands.run", "harness.training.train"])


def run_ranks(rank: Callable[..., Any], *args: Any, ranks: int = 2) -> None:
    """`rank(RANK, *args)` in each of so many processes. All must succeed in time."""
    started = [FRESH.Process(target=_rank, args=(rank, number, *args)) for number in range(ranks)]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(250)
            assert process.exitcode == 0, f"{process} ended with {process.exitcode}"
    finally:
        for process in started:
            process.kill()


def ask_two_ranks(rank: Callable[[int, Path], Any], folder: Path) -> list[Any]:
    """What ranks 0 and 1 return, as JSON keeps it; the folder is theirs."""
    run_ranks(_answer, rank, folder)
    return [json.loads((folder / f"{number}.json").read_text()) for number in (0, 1)]


def _rank(rank: Callable[..., Any], *args: Any) -> None:
    warnings.simplefilter("ignore")
    rank(*args)


def _answer(number: int, rank: Callable[[int, Path], Any], folder: Path) -> None:
    (folder / f"{number}.json").write_text(json.dumps(rank(number, folder)))


class Command:
    """A command line in a process of its own, in this one's environment; `stdout` has all that it prints."""

    def __init__(self, line: str) -> None:
        reading, writing = FRESH.Pipe(duplex=False)
        self.process = FRESH.Process(target=_command, args=(shlex.split(line), dict(os.environ), writing))
        self.process.start()
        writing.close()
        self.stdout = os.fdopen(os.dup(reading.fileno()))
        reading.close()

    def send_signal_at(self, text: str, signal: int, *, to_all: bool = False) -> None:
        """Once a line with this text was printed; to all processes of the command, as a scheduler does."""
        for line in self.stdout:
            if text in line:
                mine = self.process.pid
                assert mine is not None
                for pid in (int(path.name) for path in Path("/proc").glob("[0-9]*")):
                    with suppress(ProcessLookupError):
                        if pid == mine or (to_all and os.getsid(pid) == mine):
                            os.kill(pid, signal)
                return
        raise AssertionError(f"{text!r} was never printed")

    def wait(self, seconds: float) -> tuple[int | None, str]:
        """The exit code, minus the signal where one ended it, and the rest of what it prints."""
        with self.stdout:
            rest = self.stdout.read()
        self.process.join(seconds)
        code = self.process.exitcode
        self.process.kill()
        return code, rest


def _command(words: list[str], environment: dict[str, str], output: Any) -> None:
    from harness import cli

    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.argv = ["harness", *words]
    cli.main()
