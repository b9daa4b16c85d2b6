"""Two nodes in one machine, measured: `python measured_nodes.py OUT` checks them, estimates over both, and trains on one.

Prints one JSON object: by name the command's exit code and lines; "placed", the nodes on which a run's and a trial's
workers were where the first node is to be avoided, and "nodes", all of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from two_nodes import ENVIRONMENT, IMAGES, MEMORY, ROOT, add_node

TRAIN = f"--dataset digits --depths 8 --limit-train {IMAGES} --epochs 1 --gpus 0 --loader resident"


def where(spec: Any, worker: Any, report: Any) -> str:
    """A run that says on which node it is."""
    import ray

    return ray.get_runtime_context().get_node_id()


class OneTrial:
    """Of a search."""

    def __init__(self) -> None:
        self.left, self.outcomes = [("one", "spec")], list[Any]()

    def propose(self) -> Any:
        return self.left.pop() if self.left else None

    def reported(self, name: str, event: Any) -> bool:
        return False

    def ended(self, name: str, outcome: Any) -> None:
        self.outcomes.append(outcome)


def place(address: str, out: Path) -> dict[str, Any]:
    """Where workers are that avoid one of the nodes; in this process."""
    import ray
    from ray import cloudpickle

    from harness.cluster.connect import connect, disconnect
    from harness.cluster.job import Allocation
    from harness.cluster.launch import launch
    from harness.cluster.nodes import working_nodes
    from harness.cluster.search import search

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    connect(address, cpus=0, gpus=0)
    nodes, trial = list(working_nodes().values()), OneTrial()
    job = Allocation(device="cpu", workers=1, concurrent_runs=1, threads=1, avoid=(nodes[0],), storage=out / "ray")
    ((_, placed),) = launch(where, ["spec"], job, progress=lambda *_: None)
    search(where, trial, job)
    assert ray.is_initialized()
    disconnect()
    return {"nodes": nodes, "placed": [placed, *trial.outcomes]}


def main(out: Path) -> None:
    """Start two nodes, ask, print."""
    os.environ |= ENVIRONMENT  # before any import of Ray, which reads its way of authentication then
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": MEMORY}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for last in (2, 3):
        add_node(cluster, f"127.0.0.{last}")
    answers: dict[str, Any] = {}
    commands = {
        "estimate": f"run {TRAIN} --workers 2 --placement spread --estimate --out {out}/runs",
        "run": f"run {TRAIN} --workers 2 --placement spread --out {out}/runs",
        "check": f"check --gpus 0 --out {out}/runs",
    }
    for name, words in commands.items():
        done = subprocess.run(
            [sys.executable, "-m", "harness.cli", *words.split(), "--address", cluster.address],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        answers[name] = {"code": done.returncode, "lines": (done.stdout + done.stderr).splitlines()}
    print(json.dumps(answers | place(cluster.address, out)))
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
