"""How the ranks of one run find each other where all are in this machine: by a file.

torch's own store of keys listens on every address of a machine, and has no word for another. Ray Train knows "env" and
"tcp", so this stands in the place of its backend.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend


def make_file_url() -> str:
    """A place for the ranks of one run to meet: among Ray's own files, since ranks that are killed leave it behind."""
    import ray

    node: Any = ray._private.worker._global_node
    return Path(node.get_session_dir_path(), f"ranks-{uuid.uuid4().hex}").as_uri()


class LoopbackBackend(_TorchBackend):
    """Ray Train's, but for how the process group begins."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Called in Ray Train's controller once the workers are placed."""
        import ray

        worker_group.execute(_set_torch_distributed_env_vars)
        world, backend, seconds = len(worker_group), backend_config.backend, backend_config.timeout_s
        file = make_file_url()
        make = _setup_torch_process_group
        ray.get(
            [worker_group.execute_single_async(r, make, backend, r, world, file, seconds) for r in range(world)]
        )


@dataclass
class LoopbackConfig(TorchConfig):
    """Takes the place of TorchConfig; `backend` must be named."""

    @property
    def backend_cls(self) -> type[LoopbackBackend]:
        return LoopbackBackend
