"""Who hangs: a rank that makes no step for a stated time, and what each rank waits for.

torch's own time-outs cover the collectives that it queues, not those that a CUDA graph replays, nor a loader that waits
for a file system; and they name nobody.
"""

from __future__ import annotations

import ctypes
import faulthandler
import math
import socket
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from harness.cluster.job import Stalled, Worker
from harness.cluster.workers import gather, store_of_run
from harness.training.host import Repeat

EVERY_STEPS = 8
BEATS, SILENT_BEATS = 30, 3  # of each rank within the time; without so many a process has stopped, or its network
POLLS_PER_BEAT = 5
DUMP_SECONDS = 3.0  # for the other ranks to write their stacks: the first to end its process ends theirs
PLACES = {"_engine_run_backward": "backward", "_wait": "its device"}  # how people call these functions
WRAPPERS = {"wrapper", "inner", "__call__", "_call_impl", "_wrapped_call_impl", "decorate_context", "wait"}


class RankStalledError(dist.DistBackendError):
    """A rank does not go on. The message names it, its host and its device."""


class Watchdog:
    """Bounds how far the host runs ahead of its device, and raises the alarm where a rank makes no step.

    Each rank says in the group's store, from a thread, that it is alive, how far it is and where: a stopped
    process does not. Another thread, which waits for nothing, counts the time without a step; it writes the
    stacks of this rank into the folder `stacks`, and then calls `worker.alarm`.
    """

    def __init__(self, device: torch.device, worker: Worker | None = None, stacks: Path | None = None) -> None:
        self._device, self._worker, self._stacks = device, worker or Worker(device=str(device)), stacks
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._begun = self._steps = 0
        self._events: deque[Any] = deque()
        self._ranks = gather((socket.gethostname(), str(device), self._worker.node))
        # of each rank: the last one, when it was first seen here
        self._signs = [(b"", -math.inf)] * len(self._ranks)
        self._answered_at = time.monotonic()
        self._trains_in = threading.get_ident()
        self._watching, self._moves, self._seen, self._idle = False, 0, -1, 0
        beat = self._worker.stall_seconds / BEATS
        self._threads = [Repeat(self._guard, beat / POLLS_PER_BEAT)]
        if len(self._ranks) > 1:
            self._beats = 0
            self._store = store_of_run("alive")
            self._threads.append(Repeat(self._beat, beat))

    # --- where the run trains ---

    def begin(self) -> None:
        """The batch of a step is there."""
        self._begun += 1
        self.moved()

    def step(self) -> None:
        """After each step that was queued: wait for one of a while ago."""
        self._steps += 1
        self.moved()
        if self._device.type == "cuda" and self._steps % EVERY_STEPS == 0:
            self._events.append(self._record())
            if len(self._events) > 2:
                self._wait(self._events.popleft())

    def finish(self) -> None:
        """Wait for all steps."""
        if self._device.type == "cuda":
            self._events.clear()
            self._wait(self._record())

    def moved(self) -> None:
        """Something was done; from now on the next step is waited for."""
        self._watching, self._moves = True, self._moves + 1

    def rest(self) -> None:
        """What follows is no step, and may take its time."""
        self._watching = False

    def close(self) -> None:
        """End the threads."""
        self._watching = False
        for thread in self._threads:
            thread.stop()

    def _record(self) -> Any:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _wait(self, event: Any) -> None:
        started_at = time.monotonic()
        while not event.query():
            time.sleep(20e-6 if time.monotonic() - started_at < 1 else 10e-3)

    # --- in threads ---

    def _guard(self) -> None:
        """Count the looks without progress, not the seconds: a process that was stopped as a whole has lost none. Between
        steps, where a rank may take its time, those that wait for it look only for its signs of life."""
        if self._moves != self._seen or not (self._watching or self._find_silent()):
            self._seen, self._idle = self._moves, 0
            return
        self._idle += 1
        if self._idle == BEATS * POLLS_PER_BEAT:
            self._raise_alarm()

    def _raise_alarm(self) -> None:
        written = self._write_stacks()
        if len(self._ranks) > 1:
            time.sleep(min(DUMP_SECONDS, self._worker.stall_seconds / 4))
        stalled = self._explain(f"; stacks in {self._stacks}" if written else "")
        if self._worker.alarm is not None:
            self._worker.alarm(stalled)
            return
        # raised when the thread next runs Python, and made there: a class is all that can be given
        error = type("RankStalledError", (RankStalledError,), {"__str__": lambda _: stalled.message})
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._trains_in), ctypes.py_object(error))

    def _write_stacks(self) -> bool:
        """Of all threads of this process; it may run beside others on another node."""
        if self._stacks is None:
            return False
        host, device, _ = self._ranks[self._rank]
        try:
            self._stacks.mkdir(parents=True, exist_ok=True)
            name = f"attempt-{self._worker.attempt}-rank-{self._rank}.txt"
            with (self._stacks / name).open("w", encoding="utf-8") as file:
                print(f"rank {self._rank} on {host}, {device}, after {self._steps} steps", file=file, flush=True)
                faulthandler.dump_traceback(file)
        except OSError:  # the folder may be what hangs the run
            return False
        return True

    def _beat(self) -> None:
        """Say that this rank is alive, and note who else is. Raises without a store."""
        self._beats += 1
        self._store.set(str(self._rank), f"{self._beats} {self._begun + self._steps} {self._place()}")
        for rank, (last, _) in enumerate(self._signs):
            if self._store.check([str(rank)]) and (sign := self._store.get(str(rank))) != last:
                self._signs[rank] = sign, time.monotonic()
        self._answered_at = time.monotonic()

    def _place(self) -> str:
        """The function in which the run waits: the innermost of Python's that is not there to call another."""
        frame = sys._current_frames().get(self._trains_in)
        while frame and frame.f_back and frame.f_code.co_name in WRAPPERS:
            frame = frame.f_back
        name = frame.f_code.co_name if frame else "?"
        return PLACES.get(name, name)

    def _find_silent(self) -> list[int]:
        """Other ranks whose processes give no sign."""
        since = time.monotonic() - SILENT_BEATS * self._worker.stall_seconds / BEATS
        if len(self._ranks) > 1 and self._answered_at < since:  # rank 0 holds the store
            return [0]
        return [rank for rank, (_, seen) in enumerate(self._signs) if seen < since and rank != self._rank]

    def _explain(self, where: str) -> Stalled:
        """Who it is: a rank whose process gives no sign, else those that are behind the others."""
        since = f"no step for {self._worker.stall_seconds:.0f} s"
        names = [f"rank {rank} ({host}, {device})" for rank, (host, device, _) in enumerate(self._ranks)]
        if len(names) == 1:
            return Stalled(message=f"{since}: {names[0]} waits in {self._place()}{where}")
        silent = self._find_silent()
        words = {rank: sign.decode().split(" ", 2)[1:] for rank, (sign, _) in enumerate(self._signs) if sign}
        words[self._rank] = [str(self._begun + self._steps), self._place()]
        done = {rank: int(steps) for rank, (steps, _) in sorted(words.items())}
        blamed = silent or [
            rank for rank, steps in done.items() if steps == min(done.values()) < max(done.values())
        ]
        waiting, at = (
            ", ".join(sorted({place for rank, (_, place) in words.items() if (rank in blamed) == which}))
            for which in (False, True)
        )
        does = "does not answer" if silent else f"is behind, in {at}"
        who = ", ".join(names[rank] for rank in blamed)
        what = f"{who} {does}; the others wait in {waiting}" if blamed else f"all ranks wait in {waiting}"
        nodes = tuple(dict.fromkeys(self._ranks[rank][2] for rank in blamed))
        return Stalled(message=f"{since}: {what}{where}", nodes=tuple(filter(None, nodes)))
