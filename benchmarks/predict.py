"""Seconds per epoch on 1, 8, 64 and 512 GPUs, predicted from the time of a step and of an all-reduce.

    python benchmarks/predict.py                                # the tables of cluster/SCALING.md
    python benchmarks/predict.py --fixed-ms 0.6 --image-us 1.5  # with a step as you measured it
    python benchmarks/predict.py --measure                      # step and all-reduce of this machine's processors

Nothing here was measured on a GPU: every input is named below with where it comes from.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

DEPTHS = (20, 32, 44, 56, 110)
GPUS = (1, 8, 64, 512)
IMAGES, BATCH = 50_000, 128
GPUS_PER_NODE = 8
PARAMETERS = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962}  # `harness variants`, he2015


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Seconds of a training step of b images on one GPU: what its kernels cost to start, or what its images cost."""

    name: str
    fixed_seconds: dict[int, float]  # by depth: whatever the batch
    image_seconds: dict[int, float]  # by depth: of each image

    def seconds(self, depth: int, images: float) -> float:
        """The larger one: a GPU computes while the next kernels are started."""
        return max(self.fixed_seconds[depth], self.image_seconds[depth] * images)


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """An all-reduce in the alpha-beta model: seconds of each of its rounds, seconds of each byte."""

    launch_seconds: float  # the call, and the rounds within a node
    hop_seconds: float  # a message from node to node
    node_bytes_per_second: float  # of a GPU, within a node
    bytes_per_second: float  # of a GPU, between nodes

    def seconds(self, gpus: int, size_bytes: float) -> float:
        """Within each node; then between nodes up a tree and down again; a GPU sends 2 (n - 1) / n of the bytes.

        Nothing is hidden behind the backward pass: these gradients fill one or two of DDP's buckets.
        """
        if gpus == 1:
            return 0.0
        inside = min(gpus, GPUS_PER_NODE)
        seconds = self.launch_seconds + 2 * (inside - 1) / inside * size_bytes / self.node_bytes_per_second
        nodes = math.ceil(gpus / GPUS_PER_NODE)
        if nodes > 1:
            share = size_bytes / inside  # each GPU of a node carries its part between nodes
            seconds += 2 * math.ceil(math.log2(nodes)) * self.hop_seconds
            seconds += 2 * (nodes - 1) / nodes * share / self.bytes_per_second
        return seconds


def h200(
    name: str, *, kernels_per_conv: float, kernels: float, kernel_us: float, tensors: float, blocks: float
) -> Step:
    """A step on an H200, by arithmetic: so many kernels of so many microseconds, or so many bytes at 4.3 TB/s.

    A network of depth 6n + 2 has 6n + 1 convolutions, whose outputs for 128 images of 32x32 in bf16 are
    4.194 + 14.68 n MB (`tensors` times read or written in a step), those of its blocks 7.34 n MB (`blocks` times).
    """
    fixed, image = {}, {}
    for depth in DEPTHS:
        n = (depth - 2) // 6
        fixed[depth] = (kernels_per_conv * (6 * n + 1) + kernels) * kernel_us * 1e-6
        image[depth] = (tensors * (4.194 + 14.68 * n) + blocks * 7.34 * n) * 1e6 / 4.3e12 / 128
    return Step(name=name, fixed_seconds=fixed, image_seconds=image)


EAGER = h200("eager, 7.5 µs a kernel", kernels_per_conv=15, kernels=30, kernel_us=7.5, tensors=19, blocks=6)
GRAPH = h200(
    "compiled, in a CUDA graph, 2.5 µs a kernel",
    kernels_per_conv=8.5,
    kernels=20,
    kernel_us=2.5,
    tensors=14,
    blocks=3,
)
ASSUMED = Network(launch_seconds=20e-6, hop_seconds=10e-6, node_bytes_per_second=300e9, bytes_per_second=40e9)
"""NVLink within a node, a 400 Gbit/s port for each GPU between nodes. Assumed: round figures of such machines."""


def epoch_seconds(step: Step, network: Network, depth: int, gpus: int, batch: int) -> float | None:
    """Seconds to train on every image once; None where a batch has fewer images than GPUs, or more than there are."""
    if not gpus <= batch <= IMAGES:
        return None
    each = step.seconds(depth, math.ceil(batch / gpus)) + network.seconds(gpus, 4 * PARAMETERS[depth])
    return math.ceil(IMAGES / batch) * each


def last_useful(step: Step, network: Network, depth: int, batch: int, *, gain: float = 1.25) -> int:
    """The most GPUs, a power of two, up to which each doubling makes the epoch shorter by `gain`."""
    gpus, best = 1, epoch_seconds(step, network, depth, 1, batch)
    while (twice := epoch_seconds(step, network, depth, 2 * gpus, batch)) is not None and best is not None:
        if best < gain * twice:
            break
        gpus, best = 2 * gpus, twice
    return gpus


def print_tables(steps: Sequence[Step], network: Network) -> None:
    """Markdown."""

    def row(cells: Sequence[object]) -> None:
        print("| " + " | ".join(map(str, cells)) + " |")

    def table(corner: str, cell: Callable[[int, int], str], columns: Sequence[int] = GPUS) -> None:
        row([corner, *(f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in columns)])
        row(["---", *("---:" for _ in columns)])
        for depth in DEPTHS:
            row([depth, *(cell(depth, gpus) for gpus in columns)])
        print()

    def show(seconds: float | None) -> str:
        return "–" if seconds is None else f"{seconds:.3f}"

    for step in steps:
        print(f"### {step.name}\n")
        print("Seconds per epoch, global batch 128:\n")
        table("depth", lambda depth, gpus: show(epoch_seconds(step, network, depth, gpus, BATCH)))  # noqa: B023
        print("Seconds per epoch, 128 images a GPU (another recipe):\n")
        table("depth", lambda depth, gpus: show(epoch_seconds(step, network, depth, gpus, BATCH * gpus)))  # noqa: B023
        print("Epochs a second of separate runs on one GPU each, batch 128 (seeds, depths, trials):\n")
        table("depth", lambda depth, gpus: f"{gpus / (epoch_seconds(step, network, depth, 1, BATCH) or 1):,.1f}")  # noqa: B023
        useful = {depth: last_useful(step, network, depth, BATCH) for depth in DEPTHS}
        print("Most GPUs up to which doubling them makes an epoch at batch 128 shorter by a fifth: "
              + ", ".join(f"depth {depth}: {gpus}" for depth, gpus in useful.items()) + "\n")  # fmt: skip
    print("All-reduce, milliseconds:\n")
    table("depth", lambda depth, gpus: f"{1000 * network.seconds(gpus, 4 * PARAMETERS[depth]):.3f}", GPUS[1:])


def measure() -> None:
    """Print the step's two figures on one core, and the all-reduce's over two processes on loopback."""
    import torch
    import torch.multiprocessing
    import torch.nn.functional as F

    from harness.models.build import build
    from harness.models.variants import find_variant

    torch.set_num_threads(1)
    seconds = {}
    network = build(find_variant("he2015")(20).network, 10, 32)
    for images in (16, 64):
        batch, labels = torch.rand(images, 3, 32, 32), torch.zeros(images, dtype=torch.long)
        times = []
        for _ in range(6):
            began = time.perf_counter()
            F.cross_entropy(network(batch), labels).backward()
            times.append(time.perf_counter() - began)
        seconds[images] = min(times)
    image = (seconds[64] - seconds[16]) / 48
    print(
        f"depth 20, one core: {1000 * (seconds[16] - 16 * image):.1f} ms a step and {1000 * image:.2f} ms an image"
    )
    torch.multiprocessing.spawn(_measure_reduce, nprocs=2)


def _measure_reduce(rank: int) -> None:
    import os

    import torch
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for depth in DEPTHS:
        gradients = torch.rand(PARAMETERS[depth])
        times = []
        for _ in range(20):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(gradients)
            times.append(time.perf_counter() - began)
        if rank == 0:
            print(f"all-reduce of depth {depth}, {4 * PARAMETERS[depth] / 1e6:.2f} MB, two processes: "
                  f"{1000 * min(times):.2f} ms")  # fmt: skip
    dist.destroy_process_group()


def main() -> int:
    """Print the tables, or what this machine does."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--fixed-ms", type=float, help="of a step, whatever the batch; for every depth")
    parser.add_argument("--image-us", type=float, help="of each image of a step; for every depth")
    parser.add_argument("--start-us", type=float, default=ASSUMED.launch_seconds * 1e6)
    parser.add_argument("--hop-us", type=float, default=ASSUMED.hop_seconds * 1e6)
    parser.add_argument("--node-gb-per-second", type=float, default=ASSUMED.node_bytes_per_second / 1e9)
    parser.add_argument("--gb-per-second", type=float, default=ASSUMED.bytes_per_second / 1e9)
    options = parser.parse_args()
    if options.measure:
        measure()
        return 0
    steps = [EAGER, GRAPH]
    if options.fixed_ms is not None or options.image_us is not None:
        steps = [Step(
            name="as given", fixed_seconds=dict.fromkeys(DEPTHS, (options.fixed_ms or 0) / 1e3),
            image_seconds=dict.fromkeys(DEPTHS, (options.image_us or 0) / 1e6),
        )]  # fmt: skip
    print_tables(steps, Network(
        launch_seconds=options.start_us / 1e6, hop_seconds=options.hop_us / 1e6,
        node_bytes_per_second=options.node_gb_per_second * 1e9, bytes_per_second=options.gb_per_second * 1e9,
    ))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
