"""What the kernel says of this host: who used its processors during an epoch, memory, times. Linux; elsewhere unknown.

No torch at import.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
STOPPED_SECONDS, JUMP_SECONDS = 1.0, 1.0
LEAST_SECONDS = 0.25  # of a window in which shares are judged: the kernel counts in hundredths of a second
WAIT_SHARE, OTHERS_SHARE = 0.10, 0.05
"""Of what our threads ran and waited for a processor; of the processors that we may use. On two cores, 104 of 104 epochs that a
load had slowed to twice their seconds showed 0.34 and 0.32 at least; of 25 undisturbed ones none showed above 0.035 and
0.027. The first alone would blame a run that has more threads than processors, the second alone a neighbour on cores that
we do not use."""
QUOTA_SHARE, STEAL_SHARE = 0.10, 0.02
CAUSES = (
    "the machine swapped",
    "the clock was set or the machine slept",
    "the process was stopped for a while",
    "other processes used the CPU",
    "the CPU quota was used up",
    "the hypervisor took the CPU",
)


def read_table(path: Path) -> dict[str, list[int]]:
    """The whole numbers of each line of a file of the kernel, by the line's first word; empty where it cannot be read."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        lines = (line.replace(":", " ").split() for line in path.read_text().splitlines())
        return {words[0]: [int(word) for word in words[1:] if word.isdecimal()] for words in lines if words}
    return {}


def count_cpus() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def family() -> list[int]:
    """This process and its workers (those of a DataLoader)."""
    return [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid)]


def read_ticks() -> tuple[int, int, int] | None:
    """(busy, all, stolen) clock ticks of all processors since the node started."""
    ticks = read_table(PROC / "stat").get("cpu", [])[:8]
    if len(ticks) < 8:
        return None
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks), ticks[7]  # not idle, not waiting for a disk


def read_mib(path: str, *names: str) -> float | None:
    """The sum of some lines of a file in /proc, which are in KiB; None where one cannot be read."""
    table = read_table(PROC / path)
    return sum(table[name][0] for name in names) / 1024 if all(table.get(name) for name in names) else None


def _schedule(processes: list[int]) -> dict[str, tuple[int, int]]:
    """Of each living thread: nanoseconds on a processor, and waiting for one."""
    threads = {}
    for process in processes:
        for task in (PROC / str(process) / "task").glob("*/schedstat"):
            with contextlib.suppress(OSError, ValueError):
                ran, waited, _ = map(int, task.read_text().split())
                threads[str(task)] = ran, waited
    return threads


def _throttled_seconds() -> float:
    """For how long this process's control group had used its quota up, since it exists. 0 where it has none."""
    with contextlib.suppress(OSError):
        groups = [line.split(":")[1:] for line in (PROC / "self/cgroup").read_text().splitlines()]
        for controllers, path in groups:
            for folder in (CGROUPS / controllers / path.lstrip("/"), CGROUPS / controllers):
                table = read_table(folder / "cpu.stat")
                if usec := table.get("throttled_usec"):
                    return usec[0] / 1e6
                if nsec := table.get("throttled_time"):
                    return nsec[0] / 1e9
    return 0.0


@dataclass(frozen=True, slots=True)
class HostWindow:
    """What one process saw of its host between two looks."""

    host: str
    seconds: float
    swapped: bool
    jumped: bool
    wait_share: float | None  # None where the kernel does not count it
    own_seconds: float  # of processors, of this process and its workers
    busy_seconds: float  # of processors, of all processes of the host
    cpus: int  # that this process may use
    stolen_share: float
    throttled_share: float

    def causes(self, own_seconds: float, asleep: float) -> tuple[bool, ...]:
        """In the order of CAUSES. `own_seconds` are those of all ranks on this host, `asleep` without a sign of life."""
        others = (self.busy_seconds - own_seconds) / (self.seconds * self.cpus)
        waited = 2 * others if self.wait_share is None else self.wait_share
        judged = self.seconds >= LEAST_SECONDS
        return (
            self.swapped,
            self.jumped,
            asleep > STOPPED_SECONDS,
            judged and waited > WAIT_SHARE and others > OTHERS_SHARE,
            judged and self.throttled_share > QUOTA_SHARE,
            judged and self.stolen_share > STEAL_SHARE,
        )


class HostLook:
    """The host at one moment."""

    def __init__(self) -> None:
        self.wall, self.steady, self.process = time.time(), time.monotonic(), time.process_time()
        self.threads, self.ticks = _schedule(family()), read_ticks()
        self.swaps = read_table(PROC / "vmstat").get("pswpin")
        self.throttled = _throttled_seconds()

    def until(self, later: HostLook) -> HostWindow:
        """The window between this look and a later one of the same process."""
        seconds = max(later.steady - self.steady, 1e-9)
        spent = {thread: self.threads.get(thread, (0, 0)) for thread in later.threads}
        ran, waited = (sum(now[i] - spent[thread][i] for thread, now in later.threads.items()) for i in (0, 1))
        busy = every = stolen = 0
        if self.ticks and later.ticks:
            busy, every, stolen = (after - before for before, after in zip(self.ticks, later.ticks, strict=True))
        own = max(later.process - self.process, ran / 1e9)
        return HostWindow(
            host=socket.gethostname(),
            seconds=seconds,
            swapped=bool(self.swaps and later.swaps and later.swaps > self.swaps),
            jumped=abs((later.wall - self.wall) - (later.steady - self.steady)) > JUMP_SECONDS,
            wait_share=waited / (waited + ran) if ran else None,
            own_seconds=own,
            busy_seconds=busy / os.sysconf("SC_CLK_TCK"),
            cpus=count_cpus(),
            stolen_share=stolen / every if every else 0.0,
            throttled_share=(later.throttled - self.throttled) / seconds,
        )
