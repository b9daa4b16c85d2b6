"""Nodes that are taken away or hang, for tests: `python leaving_nodes.py OUT` trains over two of three, each time anew.

    drained     Ray drains a node in mid-run, then another while the run recovers
    stopped     a worker's process is stopped (SIGSTOP), and does not answer
    frozen      a raylet's process is stopped, and its node is lost

The nodes are those of two_nodes.py. Prints one JSON object: by name the command's exit code and lines, the seconds from
the fault until the run was tried again and until its next epoch, and which nodes its workers were on then.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from two_nodes import ENVIRONMENT, EPOCHS, IMAGES, MARK, MEMORY, ROOT, add_node

WORDS = f"""run --dataset digits --depths 8 --limit-train {IMAGES} --epochs {EPOCHS} --gpus 0 --loader resident --workers 2
            --placement spread --stall-seconds 10"""
DRAIN_SECONDS = 60
Act = Callable[[], None]


def workers_of(node: Any) -> list[int]:
    """The processes that train on a node: its raylet's children."""
    found = []
    raylet = node.all_processes["raylet"][0].process.pid
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            if parent == raylet and b"RayTrainWorker" in path.with_name("cmdline").read_bytes():
                found.append(int(path.parent.name))
    return found


def drain(cluster: Any, node: Any) -> None:
    """As a cloud's notice does."""
    import ray
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int(1000 * (time.time() + DRAIN_SECONDS))
    gcs = ray._raylet.GcsClient(address=cluster.address)
    accepted, why = gcs.drain_node(node.node_id, reason, "a test", deadline)
    assert accepted, why


def train(cluster: Any, nodes: dict[str, Any], out: Path, faults: list[tuple[str, Act]]) -> dict[str, Any]:
    """Train, with a fault at the first line that contains its words, one after the other."""
    process = subprocess.Popen(
        [sys.executable, "-m", "harness.cli", *WORDS.split(), "--address", cluster.address, "--out", str(out)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines: list[str] = []
    answer: dict[str, Any] = {"lines": lines}
    at = 0.0
    for line in process.stdout:
        lines.append(line.rstrip())
        now = time.monotonic()
        if at and "trying again" in line and "noticed_seconds" not in answer:
            answer["noticed_seconds"] = now - at
        if at and not faults and "epoch" in line.replace("of epoch", "") and "recovery_seconds" not in answer:
            answer["recovery_seconds"] = now - at
            answer["on"] = [name for name, node in nodes.items() if workers_of(node)]
        if faults and faults[0][0] in line:
            faults.pop(0)[1]()
            at = at or time.monotonic()
    return answer | {"code": process.wait()}


def main(out: Path) -> None:
    """Start, train three times, print."""
    os.environ |= {**ENVIRONMENT, **dict([MARK.split("=")])}
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": MEMORY}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes: dict[str, Any] = {}
    number = 1

    def add() -> str:
        nonlocal number
        number += 1
        nodes[f"127.0.0.{number}"] = add_node(cluster, f"127.0.0.{number}")
        return f"127.0.0.{number}"

    def busy() -> str:
        return next(name for name, node in reversed(nodes.items()) if workers_of(node))

    def drain_one() -> None:
        drain(cluster, nodes.pop(busy()))

    def drain_during_recovery() -> None:
        """The node that the run has not been on, and is about to use: the others are there but for one."""
        add()
        drain(cluster, nodes.pop(spare[-1]))

    def stop_worker() -> None:
        spare.append(busy())
        os.kill(workers_of(nodes[spare[-1]])[0], signal.SIGSTOP)

    def stop_raylet() -> None:
        spare.append(busy())
        os.kill(nodes.pop(spare[-1]).all_processes["raylet"][0].process.pid, signal.SIGSTOP)

    spare: list[str] = []
    answers = {}
    faults: dict[str, list[tuple[str, Act]]] = {
        "drained": [
            ("epoch 3/", lambda: (spare.append(add()), drain_one())[0]),
            ("trying again (2)", drain_during_recovery),
        ],
        "stopped": [("epoch 3/", stop_worker)],
        "frozen": [("epoch 3/", stop_raylet)],
    }
    add()
    add()
    for name in sys.argv[2:] or faults:
        if name == "stopped" or name == "frozen":
            add()
        answers[name] = train(cluster, nodes, out / name, faults[name])
        answers[name]["blamed"] = spare[-1]
    print(json.dumps(answers))
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
