"""Two nodes in one machine, for tests: `python two_nodes.py OUT` trains over both, kills one, brings another.

The run waits for the other node; with `elastic` as a further word it goes on with one worker until it is there.

The script holds the nodes, as a person's cluster would; the command under test is a process of its own. Prints one
JSON object: the command's exit code and lines, and the seconds that things took.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MEMORY = 100 * 2**20  # of each node's object store
EPOCHS, IMAGES = 12, 256
MARK = f"TWO_NODES={os.getpid()}"  # in the environment of every process of these nodes
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # these nodes exist for a minute, on loopback
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "PYTHONPATH": str(ROOT),
    # a lost node is noticed within 2 s: 40 s by default
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "0",
}


class EnoughError(Exception):
    """A phase of a run has reached its last epoch."""


def train_plainly(rank: int, world_size: int, rendezvous: str, out: str, last: int = EPOCHS) -> None:
    """The same run without Ray, as one of `world_size` plain processes; up to epoch `last`, then it can be resumed."""
    import contextlib
    import warnings

    import torch.distributed as dist

    warnings.simplefilter("ignore")
    from harness import plan
    from harness.cluster.job import Worker
    from harness.loaders.datasets import load_dataset
    from harness.results.values import EpochMetrics
    from harness.spec import RunPaths
    from harness.training.train import train

    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    dataset = load_dataset("digits")
    sweep = plan.Grid(
        variants=("he2015",), depths=(8,), dataset="digits", loader="resident", epochs=EPOCHS, limit_train=IMAGES
    )
    width = plan.Allocation(device="cpu", gpus=0, workers=2, concurrent_runs=1, threads=1)
    (spec,) = plan.expand(sweep, width, fingerprint=dataset.fingerprint, train_images=len(dataset.train))
    worker = Worker(rank=rank, world_size=world_size, threads=1)

    def report(metrics: EpochMetrics) -> None:
        if metrics.epoch == last < EPOCHS:
            raise EnoughError

    with contextlib.suppress(EnoughError):
        train(spec, worker, report, paths=RunPaths(out=Path(out), label="digits"))
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def add_node(cluster: Any, address: str) -> Any:
    """A node with one CPU and an address of its own, as Ray Train counts nodes by address."""
    return cluster.add_node(num_cpus=1, node_ip_address=address, object_store_memory=MEMORY)


@contextlib.contextmanager
def paused_workers() -> Iterator[None]:
    """The processes that train, on whatever node, stand still meanwhile."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            ours = MARK.encode() in path.with_name("environ").read_bytes()
            if ours and b"RayTrainWorker" in path.read_bytes():
                pids.append(int(path.parent.name))
                os.kill(pids[-1], signal.SIGSTOP)
    yield
    time.sleep(2.5)  # for the driver, which looks once a second, to see what has changed
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # its node was lost meanwhile
            os.kill(pid, signal.SIGCONT)


def train(cluster: Any, doomed: Any, out: Path, *, elastic: bool) -> dict[str, Any]:
    """Train, kill, replace."""
    words = f"""run --dataset digits --depths 8 --limit-train {IMAGES} --epochs {EPOCHS} --gpus 0 --loader resident
                --workers 2 --placement spread --address {cluster.address} {"--elastic 1" * elastic}"""
    process = subprocess.Popen(
        [sys.executable, "-m", "harness.cli", *words.split(), "--out", str(out)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines: list[str] = []
    killed_at = replaced_at = going_on_at = None
    for line in process.stdout:
        lines.append(line.rstrip())
        if killed_at is None and "epoch 3/" in line:
            cluster.remove_node(doomed, allow_graceful=False)
            killed_at = time.monotonic()
        elif killed_at and replaced_at is None and ("with 1 of 2" if elastic else "waiting for room") in line:
            add_node(cluster, "127.0.0.4")
            replaced_at = time.monotonic()
        elif replaced_at and going_on_at is None and "epoch" in line:
            going_on_at = time.monotonic()
            if elastic:
                with paused_workers():
                    pass  # the node is there
    answer = {"code": process.wait(), "lines": lines}
    if killed_at and replaced_at and going_on_at:
        answer |= {"waited_seconds": replaced_at - killed_at, "recovery_seconds": going_on_at - replaced_at}
    return answer


def main(out: Path, *, elastic: bool) -> None:
    """Start, train, print."""
    os.environ |= {**ENVIRONMENT, **dict([MARK.split("=")])}
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": MEMORY}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    add_node(cluster, "127.0.0.2")
    doomed = add_node(cluster, "127.0.0.3")
    print(json.dumps(train(cluster, doomed, out, elastic=elastic)))
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), elastic="elastic" in sys.argv)
