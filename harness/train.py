"""One run: `train(spec, worker, report, places=...)` -> `RunResult`. The training step stands here, whole."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cluster.launch import Worker
from harness import profiler
from harness.checkpoint import load_checkpoint, save_checkpoint
from harness.evaluate import evaluate
from harness.optim import learning_rate, make_optimizer, total_epochs, total_steps
from harness.ranks import find_slowest, gather_ranks
from harness.run import DivergedError, Places, Precision, RunSpec
from loaders.datasets import Dataset, Split, hold_out, limit, load_dataset
from loaders.loader import Augment, Loader, Normalize, make_evaluation_loader, make_loaders, make_normalize
from models.resnet import build
from results.storage import Mirror
from results.store import (
    EpochMetrics,
    Memory,
    Reading,
    RunResult,
    append_epoch,
    partial_dir,
    run_name,
    write_epochs,
)

EVAL_BATCH_SIZE = 1000
WARMUP_EPOCHS = 1  # of every attempt: first kernels, first allocations, caches that fill


@dataclass(frozen=True, slots=True)
class Data:
    """The three sets of a run, of which it uses two."""

    train: Split
    held: Split  # evaluated after each epoch: the validation split, or the test set where there is none
    test: Split
    held_name: Literal["val", "test"]


def split_data(spec: RunSpec, dataset: Dataset) -> Data:
    """Cut the run's sets out of the data set: first the limit, then the validation split by seed."""
    test = dataset.test if spec.limit_test is None else limit(dataset.test, spec.limit_test)
    train = dataset.train if spec.limit_train is None else limit(dataset.train, spec.limit_train)
    if spec.recipe.val:
        train, val = hold_out(train, spec.recipe.val, spec.seed, stratified=spec.recipe.val_stratified)
        return Data(train, val, test, "val")
    return Data(train, test, test, "test")


def mix(images: torch.Tensor, alpha: float, random: np.random.Generator) -> torch.Tensor:
    """Mixup in the form of iamVarunAnand/image_classification: each image keeps the larger part of itself, and so
    its label. lambda = max(l, 1 - l), l ~ Beta(alpha + 1, alpha), drawn for each image."""
    share = random.beta(alpha + 1, alpha, len(images)).astype(np.float32)
    other = torch.from_numpy(np.minimum(share, 1 - share)).to(images.device, non_blocking=True)
    partner = torch.from_numpy(random.permutation(len(images))).to(images.device, non_blocking=True)
    return images.lerp(images[partner], other[:, None, None, None])


def set_precision(precision: Precision) -> None:
    """What fp32 arithmetic means: TF32 in convolutions and matrix products, or not."""
    mode = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cudnn.conv.fp32_precision = mode  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = mode


def make_autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """bf16 and fp16 by autocast: weights, momentum and batch norm's statistics stay in fp32."""
    if precision in ("fp32", "tf32"):
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype, cache_enabled=True)


class _Place(TypedDict):
    device: torch.device
    threads: int
    rank: int
    world: int
    channels_last: bool


class _View(TypedDict):
    augment: Augment
    normalize: Normalize


class Averages:
    """Sums over an epoch; the loss stays on the device, so that no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.images = 0

    def add(self, loss_sum: torch.Tensor, images: int) -> None:
        """Add the loss summed over this rank's images of one step."""
        self.loss_sum += loss_sum
        self.images += images

    def read(self) -> tuple[float, int]:
        """Mean loss and number of images over all ranks; waits for the device."""
        sums = torch.stack([self.loss_sum, torch.full_like(self.loss_sum, self.images)])
        if dist.is_initialized():
            dist.all_reduce(sums)
        loss, images = sums.tolist()
        return loss / images, round(images)


def train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loader: Loader,
    spec: RunSpec,
    *,
    epoch: int,
    steps: int,
    images: int,
    world_size: int,
    device: torch.device,
    on_first_step: Callable[[], None],
) -> EpochMetrics:
    """`steps` optimizer steps of one epoch, timed from the first batch asked for to the last weight written."""
    recipe = spec.recipe
    rank = dist.get_rank() if dist.is_initialized() else 0
    random = np.random.default_rng([spec.seed, epoch, rank])  # of mixup alone: the loader's plan has its own
    averages = Averages(device)
    waiting = profiler.Waiting()
    lr = 0.0
    profiler.synchronize(device)
    started_at = time.perf_counter()
    for step, (batch, labels) in enumerate(waiting.over(loader.epoch(epoch))):
        lr = learning_rate(recipe, epoch * loader.steps + step, loader.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        if recipe.mixup:
            batch = mix(batch, recipe.mixup, random)
        with make_autocast(device, spec.precision):
            logits = network(batch)
        # ranks may hold shares of unequal size: summed here, divided by the global batch, so that DDP's mean
        # over ranks gives the gradient of one process
        share = max(min(recipe.batch_size, images - step * recipe.batch_size), world_size) / world_size
        loss_sum = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=recipe.label_smoothing)
        scaler.scale(loss_sum / share).backward()
        scaler.step(optimizer)
        scaler.update()
        averages.add(loss_sum.detach(), len(labels))
        if step == 0:
            on_first_step()
        if step + 1 == steps:
            break
    profiler.synchronize(device)
    train_seconds = time.perf_counter() - started_at
    loss, seen = averages.read()
    return EpochMetrics(
        epoch=epoch + 1,
        steps=steps,
        images=seen,
        loss=loss,
        error=float("nan"),
        lr=lr,
        train_seconds=train_seconds,
        wait_seconds=waiting.seconds,
        eval_seconds=0.0,
        images_per_second=seen / train_seconds,
    )


def over_ranks(watched: profiler.Watched, device: torch.device) -> tuple[float | None, tuple[str, ...]]:
    """Joules summed over the ranks, None unless all have them; and what tainted the epoch of any of them."""
    marks = [float(taint in watched.taints) for taint in profiler.TAINTS]
    told = torch.tensor([watched.joules or 0.0, float(watched.joules is None), *marks], device=device)
    if dist.is_initialized():
        dist.all_reduce(told)
    joules, missing, *marks = told.tolist()
    return None if missing else joules, tuple(t for t, mark in zip(profiler.TAINTS, marks, strict=True) if mark)


def total_energy(history: Sequence[EpochMetrics], device: torch.device) -> Reading:
    """Joules of all epochs, or why there is no such figure."""
    joules = [row.energy_joules for row in history if row.energy_joules is not None]
    if len(joules) == len(history):
        return Reading(value=sum(joules))
    reason = "no GPU was used" if device.type == "cpu" else "NVML does not count this GPU's energy"
    return Reading(value=None, reason=reason)


def widths_of(history: Sequence[EpochMetrics], workers: int) -> tuple[int, ...]:
    """The DDP widths that the epochs went through, (2, 1, 2); () where they were always `workers`."""
    widths = [row.workers or workers for row in history]
    changes = tuple(width for width, before in zip(widths, [0, *widths], strict=False) if width != before)
    return () if changes == (workers,) else changes


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run needs before its first step."""

    data: Data
    place: _Place
    view: _View
    train_loader: Loader
    held_loader: Loader
    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


def prepare(spec: RunSpec, worker: Worker, places: Places) -> Prepared:
    """Set the device up and make data, loaders, network and optimizer. Raises DataError and RuntimeError where the
    images are not those of the spec."""
    device = torch.device(worker.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(worker.threads)
    set_precision(spec.precision)
    torch.backends.cudnn.benchmark = True

    dataset = load_dataset(spec.dataset, places.data_dir, places.cache_dir)
    if dataset.fingerprint != spec.fingerprint:
        raise RuntimeError(
            f"the images on this node are {dataset.fingerprint[:12]}, the run asks for {spec.fingerprint[:12]}"
        )
    data = split_data(spec, dataset)
    recipe = spec.recipe
    place = _Place(
        device=device, threads=worker.threads, rank=worker.rank, world=worker.world_size, channels_last=True
    )
    view = _View(
        augment=Augment(recipe.pad, recipe.pad_mode, recipe.crop, recipe.flip and dataset.flip),
        normalize=make_normalize(recipe.normalize, data.train),
    )
    train_loader, held_loader = make_loaders(
        spec.loader,
        data.train,
        data.held,
        **view,
        **place,
        batch_size=recipe.batch_size,
        eval_batch_size=min(EVAL_BATCH_SIZE, len(data.held)),
        seed=spec.seed,
    )

    torch.manual_seed(spec.seed)
    network = build(spec.network, dataset.num_classes, recipe.crop or dataset.image_size)
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(recipe, network)
    scaler = torch.amp.GradScaler(device.type, enabled=spec.precision == "fp16")
    return Prepared(data, place, view, train_loader, held_loader, network, optimizer, scaler)


def spread(network: nn.Module, world_size: int, device: torch.device) -> nn.Module:
    """The network as it is trained: under DDP where there are several ranks."""
    if world_size == 1:
        return network
    parallel = DistributedDataParallel(
        network, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )
    # Once an epoch, in `train`, in place of once a step: rank 0's either way. Set here and not above, since the
    # argument is called otherwise in newer releases of torch.
    parallel.broadcast_buffers = False
    return parallel


def memory_over_ranks(memory: Memory, world_size: int) -> Memory:
    """The peak of each figure over the ranks."""
    if world_size == 1:
        return memory
    of_ranks: list[Any] = [None] * world_size
    dist.all_gather_object(of_ranks, memory)
    return profiler.largest(of_ranks)


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Denormal numbers cost a CPU many times as much, and a constant batch's vanishing gradients are full of them."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@flushed_denormals()
def train(spec: RunSpec, worker: Worker, report: Callable[[EpochMetrics], None], *, places: Places) -> RunResult:
    """Train and measure one run, in this process as one of `worker.world_size` ranks.

    Resumes from the newest checkpoint in the run's folder. Raises DivergedError when the loss is not finite,
    CheckpointError for another run's checkpoint, and DataError when the images are not those of the spec.
    """
    entered_at = time.perf_counter()
    prepared = prepare(spec, worker, places)
    data, network, optimizer, scaler = prepared.data, prepared.network, prepared.optimizer, prepared.scaler
    train_loader, held_loader = prepared.train_loader, prepared.held_loader
    recipe, rank, world_size, device = spec.recipe, worker.rank, worker.world_size, prepared.place["device"]
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    folder = partial_dir(places.out, run_name(places.label, spec.variant, spec.network.depth, spec.seed, spec.key))

    warnings_seen: list[str] = []

    def warn(message: str) -> None:
        warnings_seen.append(message)
        warnings.warn(message, stacklevel=2)

    history: list[EpochMetrics] = []
    attempt = 1
    mirror = Mirror(places.mirror, folder, warn)
    mirror.bring(rank)
    state = load_checkpoint(folder / "checkpoints", spec.key, warn)
    if state is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        history = [EpochMetrics.model_validate(row) for row in state["history"]]
        attempt = int(state["attempt"]) + 1
        del state
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_epochs(folder, history)

    trained = spread(network, world_size, device)
    steps_all = total_steps(recipe, train_loader.steps)
    epochs = total_epochs(recipe, train_loader.steps)
    meter, watch = profiler.MemoryMeter(device), profiler.Watch(device)
    setup_seconds = 0.0

    def first_step_done() -> None:
        nonlocal setup_seconds
        if setup_seconds == 0.0:
            profiler.synchronize(device)
            setup_seconds = time.perf_counter() - entered_at

    first = len(history)
    for epoch in range(first, epochs):
        steps = min(train_loader.steps, steps_all - epoch * train_loader.steps)
        watch.begin()
        metrics = train_epoch(
            trained, optimizer, scaler, train_loader, spec,
            epoch=epoch, steps=steps, images=len(data.train), world_size=world_size, device=device,
            on_first_step=first_step_done,
        )  # fmt: skip
        if not torch.tensor(metrics.loss).isfinite():
            raise DivergedError(epoch + 1, (epoch + 1) * train_loader.steps)
        if world_size > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)
        joules, taints = over_ranks(watch.end(), device)
        skew, slowest_rank = find_slowest(metrics.train_seconds, world_size, device)
        evaluation_at = time.perf_counter()
        evaluation = evaluate(
            network, held_loader, images=len(data.held), autocast=make_autocast(device, spec.precision)
        )
        warm = epoch - first >= WARMUP_EPOCHS or epochs == 1
        metrics = metrics.model_copy(
            update={
                "error": evaluation.error,
                "top5_error": evaluation.top5_error,
                "eval_seconds": time.perf_counter() - evaluation_at,
                "timed": warm and steps == train_loader.steps and not taints and world_size == spec.workers,
                "energy_joules": joules,
                "taints": taints,
                "attempt": attempt,
                "workers": None if world_size == spec.workers else world_size,
                "skew": skew,
                "slowest_rank": slowest_rank,
            }
        )
        history.append(metrics)
        meter.sample()
        if epoch - first + 1 == WARMUP_EPOCHS < epochs - first:
            meter.reset()
        if rank == 0:
            if (epoch + 1) % places.checkpoint_every == 0 or epoch + 1 == epochs:
                save_checkpoint(
                    folder / "checkpoints",
                    epoch + 1,
                    {
                        "key": spec.key,
                        "network": network.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "scaler": scaler.state_dict(),
                        "history": [row.model_dump() for row in history],
                        "attempt": attempt,
                    },
                )
            append_epoch(folder, metrics)
            if (epoch + 1) % places.checkpoint_every == 0:
                mirror.send()
        report(metrics)

    if rank == 0:
        weights = {name: tensor.contiguous().cpu() for name, tensor in network.state_dict().items()}
        about = {"key": spec.key, "variant": spec.variant, "depth": str(spec.network.depth)}
        save_file(weights, folder / "weights.safetensors", metadata=about)
        mirror.send(must=True)
    on_test = None
    if data.held_name != "test":
        test_loader = make_evaluation_loader(
            spec.loader,
            data.test,
            **prepared.view,
            **prepared.place,
            eval_batch_size=min(EVAL_BATCH_SIZE, len(data.test)),
        )
        on_test = evaluate(
            network, test_loader, images=len(data.test), autocast=make_autocast(device, spec.precision)
        )
        test_loader.close()
    memory = meter.read()
    ranks = gather_ranks(rank, world_size, memory, history[first:])
    memory = memory_over_ranks(memory, world_size)
    train_loader.close()
    held_loader.close()

    timed = [row for row in history if row.timed]
    best = min(history, key=lambda row: row.error)
    return RunResult(
        parameters=parameters,
        evaluated_on=data.held_name,
        epochs=tuple(history),
        final_error=history[-1].error,
        best_error=best.error,
        best_epoch=best.epoch,
        final_top5_error=history[-1].top5_error,
        test_error=on_test.error if on_test else None,
        test_top5_error=on_test.top5_error if on_test else None,
        epoch_seconds=statistics.median(row.train_seconds for row in timed) if timed else None,
        warmup_epochs=WARMUP_EPOCHS if epochs > 1 else 0,
        eval_seconds=statistics.median(row.eval_seconds for row in history),
        images_per_second=statistics.median(row.images_per_second for row in timed) if timed else None,
        setup_seconds=setup_seconds,
        start_seconds=worker.start_seconds,
        train_seconds=sum(row.train_seconds for row in history),
        energy_joules=total_energy(history, device),
        taints=tuple(dict.fromkeys(taint for row in history for taint in row.taints)),
        memory=memory,
        workers=spec.workers,
        widths=widths_of(history, spec.workers),
        batch_size=recipe.batch_size,
        batch_size_per_gpu=recipe.batch_size // spec.workers,
        threads=worker.threads,
        device=profiler.device_name(device),
        machine=profiler.describe_machine(device),
        attempts=attempt,
        ranks=ranks,
    )
