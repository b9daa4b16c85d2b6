"""The ranks of a run beside one another: which was the slowest, what each used."""

from __future__ import annotations

import socket
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from harness.results.values import EpochMetrics, Memory, RankUse


def find_slowest(train_seconds: float, world_size: int, device: torch.device) -> tuple[float | None, int | None]:
    """Slowest over fastest rank's training seconds of an epoch, and who was slowest; None of one rank alone.

    A collective: called by all ranks, outside of what is timed. The ranks wait for one another in every step, so
    this is small where one of them computes slowly, and tells of the epoch's ends and of uneven clocks at most;
    a slow rank shows in its own GPU's utilisation and in how long the others wait.
    """
    if world_size == 1:
        return None, None
    own = torch.tensor([train_seconds], dtype=torch.float64, device=device)
    every = [torch.zeros_like(own) for _ in range(world_size)]
    dist.all_gather(every, own)
    seconds = [float(each) for each in every]
    return max(seconds) / min(seconds), seconds.index(max(seconds))


def gather_ranks(
    rank: int, world_size: int, memory: Memory, epochs: Sequence[EpochMetrics]
) -> tuple[RankUse, ...]:
    """What each rank used, in order. A collective. `epochs` are this attempt's, as this rank measured them."""
    timed = [row for row in epochs if row.timed]
    own = RankUse(
        rank=rank,
        host=socket.gethostname(),
        train_seconds=statistics.median(row.train_seconds for row in timed) if timed else None,
        data_stall_seconds=statistics.median(row.data_stall_seconds for row in timed) if timed else None,
        torch_allocated_mib=memory.torch_allocated_mib.value,
        torch_reserved_mib=memory.torch_reserved_mib.value,
        nvml_process_mib=memory.nvml_process_mib.value,
        rss_mib=memory.rss_mib.value,
    )
    if world_size == 1:
        return (own,)
    of_ranks: list[Any] = [None] * world_size
    dist.all_gather_object(of_ranks, own)
    return tuple(of_ranks)
