"""Nodes that come, are taken away or hang, for tests: `python leaving_nodes.py OUT [NAME ...]` trains over two nodes.

    grows       it begins on one node, and another comes
    drained     Ray drains a node in mid-run, then another while the run recovers
    stopped     a worker's process is stopped (SIGSTOP), and does not answer
    frozen      a raylet's process is stopped, and its node is lost
    sweep       Ray drains a node in mid-trial, then kills one without notice
    quiet       the same sweep, and nothing happens

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

from two_nodes import ENVIRONMENT, EPOCHS, IMAGES, MARK, MEMORY, ROOT, add_node, paused_workers

WORDS = f"""run --dataset digits --depths 8 --limit-train {IMAGES} --epochs {EPOCHS} --gpus 0 --loader resident --workers 2
            --placement spread --stall-seconds 10"""
SWEEP = f"""tune --dataset digits --variant he2015 --depth 8 --search lr=choice(0.02,0.1) --samples 2 --concurrent 1
            --scheduler none --limit-train {IMAGES} --epochs {EPOCHS} --gpus 0 --loader resident --workers 2"""
WORKERS = b"RayTrainWorker", b"ray::Rank0", b"ray::Peer"
DRAIN_SECONDS = 60
ALIVE = 0  # Ray's GcsNodeInfo.GcsNodeState
Act = Callable[[], None]


def workers_of(node: Any) -> list[int]:
    """The processes that train on a node: its raylet's children."""
    found = []
    raylet = node.all_processes["raylet"][0].process.pid
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            title = path.with_name("cmdline").read_bytes()
            if parent == raylet and any(name in title for name in WORKERS):
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


def train(
    cluster: Any, nodes: dict[str, Any], out: Path, faults: list[tuple[str, Act]], words: str
) -> dict[str, Any]:
    """Train, with a fault at the first line that contains its words, one after the other."""
    process = subprocess.Popen(
        [sys.executable, "-m", "harness.cli", *words.split(), "--address", cluster.address, "--out", str(out)],
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
        if not faults and "noticed_seconds" in answer and f"/{EPOCHS}  loss" in line and "on" not in answer:
            answer["recovery_seconds"] = now - at
            answer["on"] = [name for name, node in nodes.items() if workers_of(node)]
        if faults and faults[0][0] in line:
            faults.pop(0)[1]()
            at = at or time.monotonic()
    return answer | {"code": process.wait()}


def main(out: Path, *names: str) -> None:
    """Start, train as often as there are names, print."""
    os.environ |= {**ENVIRONMENT, **dict([MARK.split("=")])}
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": MEMORY}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes: dict[str, Any] = {}
    hit: list[str] = []
    addresses = (f"127.0.0.{number}" for number in range(2, 99))

    def add() -> None:
        address = next(addresses)
        nodes[address] = add_node(cluster, address)

    def choose(busy: bool = True) -> str:
        """The node, of those that train or of the others, that came last."""
        hit.append(next(name for name, node in reversed(nodes.items()) if bool(workers_of(node)) == busy))
        return hit[-1]

    def drain_one() -> None:
        add()
        drain(cluster, nodes.pop(choose()))

    def drain_another() -> None:
        """The one that the run is about to use."""
        idle = choose(busy=False)
        add()
        drain(cluster, nodes.pop(idle))

    def kill_one() -> None:
        add()
        cluster.remove_node(nodes.pop(choose()), allow_graceful=False)

    def stop_worker() -> None:
        os.kill(workers_of(nodes[choose()])[0], signal.SIGSTOP)

    def stop_raylet() -> None:
        """Until Ray gives up its node, which takes longer than what is left of the run."""
        import ray

        node = nodes.pop(choose())
        os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGSTOP)
        gcs, lost = ray._raylet.GcsClient(address=cluster.address), ray.NodeID.from_hex(node.node_id)
        while gcs.get_all_node_info()[lost].state == ALIVE:
            time.sleep(0.5)

    faults: dict[str, list[tuple[str, Act]]] = {
        "grows": [("epoch 3/", paused_workers()(add))],
        "drained": [("epoch 3/", drain_one), ("trying again (2)", drain_another)],
        "stopped": [("epoch 3/", stop_worker)],
        "frozen": [("epoch 3/", paused_workers()(stop_raylet))],
        "sweep": [("epoch 3/", drain_one), ("trial 2/2: epoch 3/", kill_one)],
        "quiet": [],
    }
    answers = {}
    for name in names or faults:
        while len(nodes) < {"grows": 1, "drained": 2}.get(name, 3):
            add()
        words = SWEEP if name in ("sweep", "quiet") else f"{WORDS} {'--elastic 1' * (name == 'grows')}"
        answers[name] = train(cluster, nodes, out / name, faults[name], words)
        answers[name]["hit"] = list(hit)
        hit.clear()
    print(json.dumps(answers))
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
