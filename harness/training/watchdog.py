"""A deadline for every wait of a step: a rank that stops without dying is noticed within minutes, and named.

torch's own time-out covers the collectives that it queues, not those that a CUDA graph replays.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from harness.training.host import Repeat
from harness.training.telemetry import gather

STALL_SECONDS = 240.0  # less than the process group's time-out, which ends the process without naming anybody
EVERY_STEPS = 8
BEATS = 12  # of each rank within STALL_SECONDS
ABORT_SECONDS = 10.0


class RankStalledError(dist.DistBackendError):
    """A rank does not go on. The message names it and its host."""


class Watchdog:
    """Bounds how far the host runs ahead of its device, and how long it waits for it.

    Each rank says in the group's store, from a thread, that it is alive and how many steps it has queued: a stopped
    process does not.
    """

    def __init__(self, device: torch.device, *, stall_seconds: float = STALL_SECONDS) -> None:
        self._device = device
        self._stall_seconds = stall_seconds
        self._steps = 0
        self._events: deque[Any] = deque()
        self._hosts = gather(socket.gethostname())
        self._signs: dict[int, tuple[bytes, float]] = {}  # by rank: the last one, when it was first seen here
        self._answered_at = time.monotonic()
        self._thread: Repeat | None = None
        if len(self._hosts) > 1:
            self._rank = dist.get_rank()
            self._store = distributed_c10d.PrefixStore("alive", distributed_c10d._get_default_store())
            self._thread = Repeat(self._beat, stall_seconds / BEATS)

    def step(self) -> None:
        """After each step that was queued: wait for one of a while ago."""
        self._steps += 1
        if self._device.type == "cuda" and self._steps % EVERY_STEPS == 0:
            self._events.append(self._record())
            if len(self._events) > 2:
                self._wait(self._events.popleft())

    def finish(self) -> None:
        """Wait for all steps."""
        if self._device.type == "cuda":
            self._events.clear()
            self._wait(self._record())

    def _record(self) -> Any:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _wait(self, event: Any) -> None:
        started_at = time.monotonic()
        while not event.query():
            waited = time.monotonic() - started_at
            if waited > self._stall_seconds:
                message = self._explain(waited)
                _abort()  # or nothing that waits for the device would come back
                raise RankStalledError(message)
            time.sleep(20e-6 if waited < 1 else 10e-3)

    @contextmanager
    def collectives(self) -> Iterator[None]:
        """Collectives that wait on the CPU (gloo) end by the group's own time-out: this names the rank."""
        started_at = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if len(self._hosts) == 1 or not re.search(r"[Tt]imed out", str(error)):
                raise
            raise RankStalledError(self._explain(time.monotonic() - started_at)) from error

    def _beat(self) -> None:
        """Say that this rank is alive and how many steps it has queued, and note who else is. Raises without a store."""
        self._store.set(str(self._rank), f"{time.monotonic()} {self._steps}")
        for rank in range(len(self._hosts)):
            if self._store.check([str(rank)]):
                sign = self._store.get(str(rank))
                if rank not in self._signs or self._signs[rank][0] != sign:
                    self._signs[rank] = sign, time.monotonic()
        self._answered_at = time.monotonic()

    def _explain(self, waited: float) -> str:
        """Who it is: a rank whose process gives no sign, else the one that is behind."""
        if len(self._hosts) == 1:
            return f"the device has not finished a step in {waited:.0f} s"
        silent_since = time.monotonic() - 4 * self._stall_seconds / BEATS
        never = b"", float("-inf")
        stopped = [r for r in range(len(self._hosts)) if self._signs.get(r, never)[1] < silent_since]
        if self._answered_at < silent_since:  # rank 0 holds the store
            stopped = [0]
        if stopped:
            names = ", ".join(f"rank {rank} on {self._hosts[rank]}" for rank in stopped)
            return f"{names} gives no sign of life; rank {self._rank} has waited {waited:.0f} s for it"
        signs = sorted(self._signs.items())
        steps = ", ".join(f"{int(s.split()[1])} by rank {rank} on {self._hosts[rank]}" for rank, (s, _) in signs)
        return f"no step was finished in {waited:.0f} s, and all ranks are alive; steps queued: {steps}"

    def close(self) -> None:
        """End the thread."""
        if self._thread:
            self._thread.stop()


def _abort() -> None:
    """End the kernels that wait for a peer. It may itself wait for ever, so in a thread."""
    if dist.is_initialized():
        thread = threading.Thread(target=distributed_c10d._abort_process_group, daemon=True)
        thread.start()
        thread.join(timeout=ABORT_SECONDS)
