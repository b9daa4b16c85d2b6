"""One optimizer step, whole, and the arithmetic it is done in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness.cluster.workers import count_ranks
from harness.loaders.resident import upload
from harness.spec import Precision, RunSpec
from harness.training.batch_norm import AllReduce, SyncBatchNorm

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # others compute in float32


@dataclass(slots=True)
class Step:
    """Forward, backward, sum over the ranks, the optimizer's step.

    Every call does the same work on tensors that stay where they are, and nothing waits for the device: so it can be
    captured as a CUDA graph.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    spec: RunSpec
    totals: Tensor  # float64, (2,): loss and errors, summed over this rank's images of the epoch so far
    all_reduce: AllReduce | None = None  # sums over the ranks; None with one rank, and under DDP
    mark: Callable[[str], None] = lambda _: None  # called with the name of each part when it has been queued
    forward: Callable[[Tensor], Tensor] | None = None  # the network as it is trained: compiled, or under DDP
    parameters: list[nn.Parameter] = field(init=False)
    norms: list[Any] = field(init=False)  # batch norms that count
    synchronised: list[SyncBatchNorm] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        norms = [m for m in self.network.modules() if isinstance(m, nn.BatchNorm2d)]
        self.norms = [norm for norm in norms if norm.num_batches_tracked is not None and norm.momentum]
        self.synchronised = [norm for norm in norms if isinstance(norm, SyncBatchNorm)]

    def __call__(self, images: Tensor, labels: Tensor, global_images: float) -> None:
        """images (n, 3, H, W), labels (n,): this rank's share of a step over `global_images`."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.all_reduce is not None:
            for norm in self.synchronised:
                norm.all_reduce = self.all_reduce
        with make_autocast(images.device, self.spec.precision), self._counting_together():
            # a compiled network has no truth value
            logits = (self.network if self.forward is None else self.forward)(images)
        smoothing = self.spec.recipe.label_smoothing
        loss_sum = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)
        # ranks may hold shares of unequal size: summed here and divided by the global batch, of which DDP's mean
        # over ranks has done a part
        by_ddp = isinstance(self.forward, DistributedDataParallel)
        loss = loss_sum / (global_images / count_ranks() if by_ddp else global_images)
        self.mark("forward")
        self.scaler.scale(loss).backward()
        self.mark("backward")
        if self.all_reduce is not None:
            sum_gradients(self.parameters, self.all_reduce)
            self.mark("all-reduce")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        wrong = logits.argmax(1).ne(labels).sum()
        self.totals += torch.stack([loss_sum.detach().double(), wrong.double()])
        self.mark("optimizer")

    @contextmanager
    def _counting_together(self) -> Iterator[None]:
        """Batch norms count their batches, a kernel each: as many as there are convolutions. Here one kernel does."""
        counters = [norm.num_batches_tracked for norm in self.norms]
        for norm in self.norms:
            norm.num_batches_tracked = None
        try:
            yield
        finally:
            for norm, counter in zip(self.norms, counters, strict=True):
                norm.num_batches_tracked = counter
        if counters:
            torch._foreach_add_(counters, 1)

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """All that steps change inside is put back at the end, every tensor at its address."""
        tensors = [*self.parameters, *self.network.buffers(), self.totals]
        made = {p: dict(state) for p, state in self.optimizer.state.items()}
        tensors += [v for state in made.values() for v in state.values() if isinstance(v, Tensor)]
        values = [tensor.detach().clone() for tensor in tensors]
        scaler, groups = self.scaler.state_dict(), [dict(group) for group in self.optimizer.param_groups]
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, values, strict=True):
                    tensor.copy_(value)
            self.optimizer.state.clear()  # of what was made inside, too
            self.optimizer.state.update(made)
            for group, before in zip(self.optimizer.param_groups, groups, strict=True):
                group.update(before)
            self.optimizer.zero_grad(set_to_none=True)
            if scaler:
                self.scaler.load_state_dict(scaler)


def sum_gradients(parameters: Sequence[nn.Parameter], all_reduce: AllReduce) -> None:
    """Sum the gradients over the ranks by one all-reduce of all of them, which a CUDA graph can hold.

    DDP's hooks reduce in buckets while backward goes on; these networks' gradients fit into one (0.3 to 19 million
    numbers), and a graph has no use for hooks.
    """
    grads = {p: p.grad for p in parameters if p.grad is not None}
    # dense in some order: flattened as they lie in memory
    flat = torch.cat([g.as_strided((g.numel(),), (1,)) for g in grads.values()])
    all_reduce(flat)
    pieces = flat.split([g.numel() for g in grads.values()])
    for (parameter, grad), piece in zip(grads.items(), pieces, strict=True):
        parameter.grad = piece.as_strided(grad.shape, grad.stride())


def wrap_ddp(network: nn.Module, device: torch.device) -> nn.Module:
    """The network under DDP. Its buffers are broadcast once an epoch, in `train`, and not at every step."""
    devices = [device] if device.type == "cuda" else None
    parallel = DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True)
    parallel.broadcast_buffers = False  # the constructor's argument has another name in newer releases of torch
    return parallel


def mix(images: Tensor, alpha: float, random: np.random.Generator) -> Tensor:
    """Mixup in the form of iamVarunAnand/image_classification: each image keeps the larger part of itself, and so
    its label. lambda = max(l, 1 - l), l ~ Beta(alpha + 1, alpha), drawn for each image."""
    share, partner = draw_mix(len(images), alpha, random)
    other = upload(np.minimum(share, 1 - share), images.device)
    return images.lerp(images[upload(partner, images.device)], other[:, None, None, None])


def draw_mix(
    count: int, alpha: float, random: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Of each image of a batch: l, and the image that it is mixed with."""
    return random.beta(alpha + 1, alpha, count).astype(np.float32), random.permutation(count)


def set_precision(precision: Precision) -> None:
    """What fp32 arithmetic means: TF32 in convolutions and matrix products, or not.

    By these two switches alone: torch's newer `fp32_precision` makes every reader of them raise, Inductor among them,
    while after them the newer names can be read.
    """
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def make_autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """bf16 and fp16 by autocast: weights, momentum and batch norm's statistics stay in fp32. Casts are not kept: a
    captured graph would go on with those of its first step."""
    if precision not in DTYPES:
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision], cache_enabled=False)


@contextmanager
def deterministic_algorithms(spec: RunSpec) -> Iterator[None]:
    """What `spec.deterministic` means while a run goes on; without it, and on a CPU, nothing changes.

    The same bits at every repetition, on the same GPU and versions. Enter it before the first kernel of the process:
    cuBLAS reads its setting once. An operation without a deterministic form raises RuntimeError.
    """
    if not spec.deterministic or spec.device == "cpu":
        yield
        return
    cudnn, enabled = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
    before = cudnn.benchmark, cudnn.deterministic, os.environ.get(CUBLAS)
    os.environ[CUBLAS] = ":4096:8"  # workspaces of its own choice may differ, and the order of sums with them
    cudnn.benchmark, cudnn.deterministic = False, True  # no kernel is chosen by its speed
    torch.use_deterministic_algorithms(True)  # in the compiler too
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled)
        cudnn.benchmark, cudnn.deterministic, workspaces = before
        del os.environ[CUBLAS]
        if workspaces is not None:
            os.environ[CUBLAS] = workspaces


def synchronize(device: torch.device) -> None:
    """Wait for the caller's stream, and not for what a loader prepares on its own."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
