"""One run: `train(spec, worker, report, places=...)` -> `RunResult`. The training step stands here, whole.

`training` is the same as a generator that pauses after each step, so that `train_packed` can train several seeds of a
spec at a time, each exactly as it is alone.
"""

from __future__ import annotations

import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypedDict, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from harness.cluster.launch import Failed, Worker
from harness.loaders.datasets import Dataset, Split, hold_out, limit, load_dataset
from harness.loaders.loader import Augment, Loader, Normalize, make_evaluation_loader, make_loaders, make_normalize
from harness.models.resnet import build
from harness.results.remote import RemoteRun
from harness.results.store import WEIGHTS, append_epoch, partial_dir, run_name, write_epochs
from harness.results.values import EpochMetrics, Measurement, Memory, RunResult
from harness.spec import DivergedError, Precision, RunPaths, RunSpec
from harness.training import profiler
from harness.training.checkpoint import load_checkpoint, save_checkpoint
from harness.training.engine import (
    Captured,
    Engine,
    compile_network,
    make_graphs,
    nothing_to_restore,
    sum_gradients,
)
from harness.training.evaluation import evaluate
from harness.training.optim import (
    learning_rate,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    set_lr,
    total_epochs,
    total_steps,
)
from harness.training.ranks import find_slowest, gather_ranks

EVAL_BATCH_SIZE = 1000
WARMUP_EPOCHS = 1  # of every attempt: first kernels, first allocations, caches that fill


@dataclass(frozen=True, slots=True)
class Data:
    """The three sets of a run, of which it uses two."""

    train: Split
    held: Split  # evaluated after each epoch: the validation split, or the test set where there is none
    test: Split
    eval_split: Literal["val", "test"]


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
    """bf16 and fp16 by autocast: weights, momentum and batch norm's statistics stay in fp32. Casts are not kept: a
    captured graph would go on with those of its first step."""
    if precision in ("fp32", "tf32"):
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype, cache_enabled=False)


class _Place(TypedDict):
    device: torch.device
    threads: int
    rank: int
    world: int
    channels_last: bool


class _View(TypedDict):
    augment: Augment
    normalize: Normalize


Result = TypeVar("Result")
Paused = Generator[None, None, Result]  # pauses after each training step


def ignore(_: str) -> None:
    """Nobody asks where a step's time goes."""


@dataclass(slots=True)
class Step:
    """One optimizer step, whole: forward, backward, sum over the ranks, SGD.

    Every call does the same work on tensors that stay where they are and nothing waits for the device, so that it
    can be captured as a CUDA graph.
    """

    network: Callable[[torch.Tensor], torch.Tensor]  # as it is trained: compiled, or under DDP
    parameters: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    spec: RunSpec
    loss_sum: torch.Tensor  # float64, (), over this rank's images of the epoch so far
    world_size: int
    mark: Callable[[str], None] = ignore  # told the name of each part when it has been queued
    norms: Sequence[Any] = ()  # batch norms that count

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, global_images: float) -> None:
        """images (n, 3, H, W), labels (n,): this rank's share of a step over `global_images`."""
        self.optimizer.zero_grad(set_to_none=True)
        with make_autocast(images.device, self.spec.precision), self._counted_at_once():
            logits = self.network(images)
        loss_sum = F.cross_entropy(
            logits.float(), labels, reduction="sum", label_smoothing=self.spec.recipe.label_smoothing
        )
        # ranks may hold shares of unequal size: summed here and divided by the global batch, of which DDP's mean
        # over ranks has done a part
        by_ddp = isinstance(self.network, DistributedDataParallel)
        loss = loss_sum / (global_images / self.world_size if by_ddp else global_images)
        self.mark("forward")
        self.scaler.scale(loss).backward()
        self.mark("backward")
        if self.world_size > 1 and not by_ddp:
            sum_gradients(self.parameters)
            self.mark("all-reduce")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.loss_sum += loss_sum.detach()
        self.mark("optimizer")

    @contextmanager
    def _counted_at_once(self) -> Iterator[None]:
        """Batch norms count their batches, a kernel each: as many as there are convolutions. Here they count by one."""
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

    def snapshot(self) -> Callable[[], None]:
        """Remember all that a step changes. What is returned puts it back, every tensor at its place."""
        with torch.no_grad():
            places = [*self.parameters, *self.buffers(), self.loss_sum]
            places += [v for state in self.optimizer.state.values() for v in state.values() if v is not None]
            values = [tensor.detach().clone() for tensor in places]
            scaler = self.scaler.state_dict()

        def restore() -> None:
            with torch.no_grad():
                for place, value in zip(places, values, strict=True):
                    place.copy_(value)
            self.optimizer.zero_grad(set_to_none=True)
            if scaler:
                self.scaler.load_state_dict(scaler)

        return restore

    def buffers(self) -> list[torch.Tensor]:
        """Batch norm's statistics."""
        return list(self.network.buffers()) if isinstance(self.network, nn.Module) else []


def train_epoch(
    run: Trainer, *, epoch: int, steps: int, images: int, on_first_step: Callable[[], None]
) -> Paused[EpochMetrics]:
    """`steps` optimizer steps of one epoch over `images`, timed from the first batch asked for to the last weight
    written. No step waits for the device."""
    recipe, device, loader = run.step.spec.recipe, run.device, run.loader
    rank = dist.get_rank() if dist.is_initialized() else 0
    random = np.random.default_rng(
        [run.step.spec.seed, epoch, rank]
    )  # of mixup alone: the loader's plan has its own
    waiting = profiler.Waiting()
    run.step.loss_sum.zero_()
    seen, lr = 0, float("nan")
    profiler.synchronize(device)
    started_at = time.perf_counter()
    for step, (batch, labels) in enumerate(waiting.over(loader.epoch(epoch))):
        before, lr = lr, learning_rate(recipe, epoch * loader.steps + step, loader.steps)
        if lr != before:
            set_lr(run.step.optimizer, lr)
        if recipe.mixup:
            batch = mix(batch, recipe.mixup, random)
        run.step.mark("data")
        # a last batch smaller than the ranks are many was filled up
        run.engine(
            batch, labels, max(min(recipe.batch_size, images - step * recipe.batch_size), run.step.world_size)
        )
        seen += len(labels)
        if step == 0:
            on_first_step()
        if step + 1 == steps:
            break
        yield
    profiler.synchronize(device)
    train_seconds = time.perf_counter() - started_at
    sums = torch.stack([run.step.loss_sum, torch.full_like(run.step.loss_sum, seen)])
    if dist.is_initialized():
        dist.all_reduce(sums)
    loss, all_seen = sums.tolist()
    return EpochMetrics(
        epoch=epoch + 1,
        steps=steps,
        images=round(all_seen),
        loss=loss / all_seen,
        error=float("nan"),
        lr=lr,
        train_seconds=train_seconds,
        data_stall_seconds=waiting.seconds,
        eval_seconds=0.0,
        images_per_second=all_seen / train_seconds,
    )


def over_ranks(watched: profiler.Watched, device: torch.device) -> tuple[float | None, tuple[str, ...]]:
    """Joules summed over the ranks, None unless all have them; and what tainted the epoch of any of them."""
    marks = [float(cause in watched.interference) for cause in profiler.INTERFERENCE]
    told = torch.tensor([watched.joules or 0.0, float(watched.joules is None), *marks], device=device)
    if dist.is_initialized():
        dist.all_reduce(told)
    joules, missing, *marks = told.tolist()
    return None if missing else joules, tuple(
        t for t, mark in zip(profiler.INTERFERENCE, marks, strict=True) if mark
    )


def total_energy(history: Sequence[EpochMetrics], device: torch.device, packed: int) -> Measurement:
    """Joules of all epochs, or why there is no such figure."""
    if packed > 1:
        return Measurement(value=None, reason=f"{packed} runs shared the device")
    joules = [row.energy_joules for row in history if row.energy_joules is not None]
    if len(joules) == len(history):
        return Measurement(value=sum(joules))
    reason = "no GPU was used" if device.type == "cpu" else "NVML does not count this GPU's energy"
    return Measurement(value=None, reason=reason)


def widths_of(history: Sequence[EpochMetrics], workers: int) -> tuple[int, ...]:
    """The DDP widths that the epochs went through, (2, 1, 2); () where they were always `workers`."""
    widths = [row.workers or workers for row in history]
    changes = tuple(width for width, before in zip(widths, [0, *widths], strict=False) if width != before)
    return () if changes == (workers,) else changes


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run needs before its first step."""

    spec: RunSpec
    data: Data
    place: _Place
    view: _View
    train_loader: Loader
    eval_loader: Loader
    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


def prepare(
    spec: RunSpec, worker: Worker, places: RunPaths, meter: profiler.MemoryMeter | None = None
) -> Prepared:
    """Load the images and make everything of them. Raises DataError and RuntimeError where they are not those of the
    spec."""
    with meter.category("data loader") if meter else nullcontext():
        dataset = load_dataset(spec.dataset, places.data_dir, places.cache_dir)
    if dataset.fingerprint != spec.fingerprint:
        raise RuntimeError(
            f"the images on this node are {dataset.fingerprint[:12]}, the run asks for {spec.fingerprint[:12]}"
        )
    data = split_data(spec, dataset)
    return assemble(spec, data, worker, num_classes=dataset.num_classes, flip=dataset.flip, meter=meter)


def assemble(
    spec: RunSpec,
    data: Data,
    worker: Worker,
    *,
    num_classes: int,
    flip: bool,
    meter: profiler.MemoryMeter | None = None,
) -> Prepared:
    """Set the device up and make loaders, network and optimizer. `flip`: whether these images may be mirrored."""
    device = torch.device(worker.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(worker.threads)
    set_precision(spec.precision)
    torch.backends.cudnn.benchmark = True

    recipe = spec.recipe
    place = _Place(
        device=device, threads=worker.threads, rank=worker.rank, world=worker.world_size, channels_last=True
    )
    with meter.category("data loader") if meter else nullcontext():
        view = _View(
            augment=Augment(recipe.pad, recipe.pad_mode, recipe.crop, recipe.flip and flip),
            normalize=make_normalize(recipe.normalize, data.train),
        )
        train_loader, eval_loader = make_loaders(
            spec.loader,
            data.train,
            data.held,
            **view,
            **place,
            batch_size=recipe.batch_size,
            eval_batch_size=min(EVAL_BATCH_SIZE, len(data.held)),
            seed=spec.seed,
        )
        if device.type == "cuda":  # pools are filled at the first batch
            next(train_loader.epoch(0))

    torch.manual_seed(spec.seed)
    network = build(spec.network, num_classes, recipe.crop or data.train.images.shape[1])
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(recipe, network, lr_on_device=captures(spec))
    scaler = torch.amp.GradScaler(device.type, enabled=spec.precision == "fp16")
    scaler.scale(torch.zeros((), device=device))  # makes its tensors, which a capture must find
    return Prepared(spec, data, place, view, train_loader, eval_loader, network, optimizer, scaler)


def captures(spec: RunSpec) -> bool:
    """Whether its steps are captured and replayed."""
    return spec.engine == "graph" or (spec.engine == "compile" and spec.device == "cuda")


@dataclass(slots=True)
class Trainer:
    """A run's step and evaluation as they are carried out."""

    step: Step
    engine: Engine
    forward: Engine  # of evaluation
    loader: Loader
    device: torch.device
    graphs: Any = None  # what captures, None where nothing does


def make_trainer(made: Prepared, warn: Callable[[str], None]) -> Trainer:
    """Spread the network over the ranks and choose how its steps are carried out: `spec.engine`, or what works."""
    spec, network, device = made.spec, made.network, made.place["device"]
    step = make_step(made, ddp=spec.engine == "eager")
    graphs = make_graphs(device) if captures(spec) else None
    steps: list[tuple[str, Callable[..., Any]]] = [("eager", step)]
    forwards: list[tuple[str, Callable[..., Any]]] = [("eager", network)]
    if graphs is not None:
        steps.insert(0, ("graph", Captured(step, step.snapshot, graphs)))
        forwards.insert(0, ("graph", Captured(network, nothing_to_restore, graphs)))
    if spec.engine == "compile":
        compiled: Callable[..., Any] = replace(step, network=compile_network(network))
        if graphs is not None:
            compiled = Captured(compiled, step.snapshot, graphs)
        steps.insert(0, ("compile", compiled))
    return Trainer(
        step,
        Engine(steps, step.snapshot, warn),
        Engine(forwards, nothing_to_restore, warn),
        made.train_loader,
        device,
        graphs,
    )


def make_step(made: Prepared, *, ddp: bool) -> Step:
    """The step of a prepared run. Where there are several ranks their gradients are summed by DDP, or by the step."""
    network, device, world_size = made.network, made.place["device"], made.place["world"]
    trained: nn.Module = network
    if world_size > 1 and ddp:
        trained = spread(network, device)
    elif world_size > 1:
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, 0)
    return Step(
        trained,
        [p for p in network.parameters() if p.requires_grad],
        made.optimizer,
        made.scaler,
        made.spec,
        torch.zeros((), dtype=torch.float64, device=device),
        world_size,
        norms=[
            m
            for m in network.modules()
            if isinstance(m, nn.BatchNorm2d) and m.num_batches_tracked is not None and m.momentum
        ],
    )


def spread(network: nn.Module, device: torch.device) -> nn.Module:
    """The network under DDP."""
    parallel = DistributedDataParallel(
        network, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )
    # Once an epoch, in `training`, in place of once a step: rank 0's either way. Set here and not above, since the
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


def finish_run(run: Paused[Result]) -> Result:
    """Let a run go on to its end, without pauses."""
    while True:
        try:
            next(run)
        except StopIteration as end:
            result: Result = end.value
            return result


@flushed_denormals()
def train(spec: RunSpec, worker: Worker, report: Callable[[EpochMetrics], None], *, places: RunPaths) -> RunResult:
    """Train and measure one run, in this process as one of `worker.world_size` ranks.

    Resumes from the newest checkpoint in the run's folder. Raises DivergedError when the loss is not finite,
    CheckpointError for another run's checkpoint, and DataError when the images are not those of the spec.
    """
    return finish_run(training(spec, worker, report, places=places))


@flushed_denormals()
def train_packed(
    specs: tuple[RunSpec, ...], worker: Worker, report: Callable[[int, EpochMetrics], None], *, places: RunPaths
) -> tuple[RunResult | Failed, ...]:
    """Train several seeds of one spec at the same time, step by step in turn, each on a CUDA stream of its own.

    Each has exactly the result that it has alone. One that fails becomes a Failed, and the others go on; a lack of
    memory is raised. `report` is given the index of a run and its metrics.
    """
    device = torch.device(worker.device)

    def on_stream(index: int) -> AbstractContextManager[Any]:
        return torch.cuda.stream(streams[index]) if streams else nullcontext()

    if device.type == "cuda":
        torch.cuda.set_device(device)
    streams = [torch.cuda.Stream(device) for _ in specs] if device.type == "cuda" else []
    runs = {
        index: training(spec, worker, partial(report, index), places=places, packed=len(specs))
        for index, spec in enumerate(specs)
    }
    outcomes: dict[int, RunResult | Failed] = {}
    while runs:
        for index in list(runs):
            try:
                with on_stream(index):
                    next(runs[index])
            except StopIteration as end:
                outcomes[index] = end.value
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:
                outcomes[index] = Failed(
                    exception=type(error).__name__,
                    message=str(error),
                    traceback=traceback.format_exc(),
                    died=False,
                )
            if index in outcomes:
                del runs[index]
    return tuple(outcomes[index] for index in range(len(specs)))


def training(
    spec: RunSpec, worker: Worker, report: Callable[[EpochMetrics], None], *, places: RunPaths, packed: int = 1
) -> Paused[RunResult]:
    """`train`, pausing after each step; `packed` says how many such runs are taken in turn."""
    entered_at = time.perf_counter()
    meter = profiler.MemoryMeter(torch.device(worker.device))
    prepared = prepare(spec, worker, places, meter)
    data, network, optimizer, scaler = prepared.data, prepared.network, prepared.optimizer, prepared.scaler
    train_loader, eval_loader = prepared.train_loader, prepared.eval_loader
    recipe, rank, world_size, device = spec.recipe, worker.rank, worker.world_size, prepared.place["device"]
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    folder = partial_dir(places.out, run_name(places.label, spec.variant, spec.network.depth, spec.seed, spec.key))

    warnings_seen: list[str] = []

    def warn(message: str) -> None:
        warnings_seen.append(message)
        warnings.warn(message, stacklevel=2)

    history: list[EpochMetrics] = []
    attempt = 1
    remote = RemoteRun(places.remote, folder, warn)
    remote.pull(rank)
    state = load_checkpoint(folder / "checkpoints", spec.key, warn)
    if state is not None:
        network.load_state_dict(state["network"])
        load_optimizer_state(optimizer, state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        history = [EpochMetrics.model_validate(row) for row in state["history"]]
        attempt = int(state["attempt"]) + 1
        del state
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_epochs(folder, history)

    with meter.category("NCCL"):
        trainer = make_trainer(prepared, warn)
    steps_all = total_steps(recipe, train_loader.steps)
    epochs = total_epochs(recipe, train_loader.steps)
    watch = profiler.Watch(device)
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
        metrics = yield from train_epoch(
            trainer, epoch=epoch, steps=steps, images=len(data.train), on_first_step=first_step_done
        )
        if not torch.tensor(metrics.loss).isfinite():
            raise DivergedError(epoch + 1, (epoch + 1) * train_loader.steps)
        if world_size > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)
        joules, interference = over_ranks(watch.end(), device)
        skew, slowest_rank = find_slowest(metrics.train_seconds, world_size, device)
        evaluation_at = time.perf_counter()
        evaluation = evaluate(
            network, eval_loader, images=len(data.held), autocast=make_autocast(device, spec.precision),
            forward=trainer.forward,
        )  # fmt: skip
        reasons = (
            "warm-up" if epoch - first < WARMUP_EPOCHS and epochs > 1 else "",
            "partial epoch" if steps < train_loader.steps else "",
            f"interference: {', '.join(interference)}" if interference else "",
            f"{packed} runs at the same time" if packed > 1 else "",
            f"another width: {world_size} workers" if world_size != spec.workers else "",
        )
        untimed = "; ".join(filter(None, reasons))
        metrics = metrics.model_copy(
            update={
                "error": evaluation.error,
                "top5_error": evaluation.top5_error,
                "eval_seconds": time.perf_counter() - evaluation_at,
                "timed": not untimed,
                "untimed": untimed,
                "energy_joules": joules if packed == 1 else None,
                "interference": interference,
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
                        "optimizer": optimizer_state(optimizer),
                        "scaler": scaler.state_dict(),
                        "history": [row.model_dump() for row in history],
                        "attempt": attempt,
                    },
                )
            append_epoch(folder, metrics)
            if (epoch + 1) % places.checkpoint_every == 0:
                remote.push()
        report(metrics)

    if rank == 0:
        weights = {name: tensor.contiguous().cpu() for name, tensor in network.state_dict().items()}
        about = {"key": spec.key, "variant": spec.variant, "depth": str(spec.network.depth)}
        save_file(weights, folder / WEIGHTS, metadata=about)
        remote.push(required=True)
    on_test = None
    if data.eval_split != "test":
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
    memory = meter.read(network, optimizer, trainer.graphs)
    ranks = gather_ranks(rank, world_size, memory, history[first:])
    memory = memory_over_ranks(memory, world_size)
    train_loader.close()
    eval_loader.close()

    timed = [row for row in history if row.timed]
    best = min(history, key=lambda row: row.error)
    return RunResult(
        parameters=parameters,
        evaluated_on=data.eval_split,
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
        launch_seconds=worker.launch_seconds,
        train_seconds=sum(row.train_seconds for row in history),
        energy_joules=total_energy(history, device, packed),
        interference=tuple(dict.fromkeys(cause for row in history for cause in row.interference)),
        memory=memory,
        workers=spec.workers,
        widths=widths_of(history, spec.workers),
        batch_size=recipe.batch_size,
        batch_size_per_gpu=recipe.batch_size // spec.workers,
        threads=worker.threads,
        device=profiler.device_name(device),
        machine=profiler.describe_machine(device),
        attempts=attempt,
        engine=trainer.engine.name,
        runs_per_gpu=packed,
        warnings=tuple(warnings_seen),
        ranks=ranks,
    )
