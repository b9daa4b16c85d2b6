"""How the ranks of one run find each other where all are in this machine: by a port of loopback alone.

torch's own store listens on every address of a machine, and has no word for another; but it takes over a socket that
listens already. Ray Train knows "env" and "tcp", so this stands in the place of its backend.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

from harness.cluster.job import LOOPBACK

_listening: list[socket.socket] = []  # rank 0's, from when its port is known until the store takes it over


def listen() -> int:
    """In rank 0: take a free port of loopback. Returns it."""
    _listening.append(socket.create_server((LOOPBACK, 0), backlog=1024))
    return int(_listening[-1].getsockname()[1])


def join(rank: int, world_size: int, port: int, backend: str, timeout_seconds: int) -> None:
    """In every rank: make the process group."""
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if backend == "nccl" and "TORCH_NCCL_BLOCKING_WAIT" not in os.environ:
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # as Ray Train's own
    timeout = timedelta(seconds=timeout_seconds)
    taken: dict[str, Any] = {"master_listen_fd": _listening.pop().detach()} if rank == 0 else {}
    store = TCPStore(LOOPBACK, port, world_size, rank == 0, timeout=timeout, **taken)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


class LoopbackBackend(_TorchBackend):
    """Ray Train's, but for how the process group begins."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Called in Ray Train's controller once the workers are placed."""
        import ray

        worker_group.execute(_set_torch_distributed_env_vars)
        ranks, port = range(len(worker_group)), worker_group.execute_single(0, listen)
        given = len(worker_group), port, backend_config.backend, backend_config.timeout_s
        ray.get([worker_group.execute_single_async(rank, join, rank, *given) for rank in ranks])


@dataclass
class LoopbackConfig(TorchConfig):
    """Takes the place of TorchConfig; `backend` must be named."""

    @property
    def backend_cls(self) -> type[LoopbackBackend]:
        return LoopbackBackend
