"""Leaving in time: all ranks of a run stop before the same step where one of them has to leave."""

from __future__ import annotations

import contextlib
import math
import threading
import time

from torch._C._distributed_c10d import HashStore, Store

from harness.cluster.job import Worker
from harness.cluster.workers import count_ranks, gather, store_of_run
from harness.training.host import Repeat

POLL_SECONDS = 0.5
CHECKPOINT_SECONDS = 10.0  # to stop, write a checkpoint and send it


class Halt:
    """All ranks of a run stop before the same step where one of them has to leave: its node is taken away, or it is told to.

    Asked before each step whether it may begin. `worker.notice` says, in a thread, whether this rank has to leave.

    Once any rank has, each publishes how many steps it has begun and begins no other until all have published: the
    largest of these numbers is how many each of them does. Where an epoch like the last one ends before the deadline,
    that is waited for instead.
    """

    def __init__(self, worker: Worker) -> None:
        self._notice = worker.notice
        self._rank, self._ranks = str(worker.rank), [str(rank) for rank in range(count_ranks())]
        self._lock, self._decided = threading.Lock(), threading.Event()
        self._halting, self._begun, self._most = False, 0, 0
        self._deadline: float | None = None
        self._epoch_began, self._epoch_seconds = 0.0, 0.0
        self._thread = None
        if self._notice is not None:
            self._store: Store = store_of_run("halt") if len(self._ranks) > 1 else HashStore()
            self._thread = Repeat(self._poll, POLL_SECONDS)

    def may_begin(self) -> bool:
        """Whether another step, or an evaluation, may begin. The same answer in all ranks at the same step."""
        with self._lock:
            if not self._halting:
                self._begun += 1
                return True
        self._decided.wait()
        self._begun += 1
        return self._begun <= self._most

    def epoch(self) -> None:
        """An epoch begins."""
        now = time.monotonic()
        self._epoch_seconds = now - self._epoch_began if self._epoch_began else 0.0
        self._epoch_began = now

    def leaves(self) -> bool:
        """At the end of an epoch: whether any rank has to leave. A collective."""
        return self._notice is not None and any(gather(self._deadline is not None))

    def close(self) -> None:
        """End the thread."""
        if self._thread:
            self._thread.stop()

    def _poll(self) -> None:
        with contextlib.suppress(Exception):  # of Ray, whose head may be away for a while
            self._deadline = self._notice() if self._notice else None
        if self._deadline is not None and not self._ends_in_time(self._deadline):
            self._store.set("stop", "1")
        if self._decided.is_set() or not self._store.check(["stop"]):
            return
        with self._lock:
            self._halting = True
        self._store.set(self._rank, str(self._begun))
        while not self._store.check(self._ranks):  # not `get`, which would keep the store from all other threads
            time.sleep(0.02)
        self._most = max(int(self._store.get(rank)) for rank in self._ranks)
        self._decided.set()

    def _ends_in_time(self, deadline: float) -> bool:
        """Whether the epoch ends before it, if it lasts as long as the last one, evaluation and checkpoint included."""
        left = max(self._epoch_seconds - (time.monotonic() - self._epoch_began), 0.0)
        in_time = self._epoch_seconds > 0 and time.time() + left + CHECKPOINT_SECONDS < deadline
        return in_time or deadline == math.inf
