"""All that a run needs before its first step: data, loaders, network, optimizer, and the engine that carries it out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from harness.cluster.job import Worker
from harness.loaders.datasets import Dataset, Split, hold_out, limit, load_dataset
from harness.loaders.loader import Loader, make_evaluation_loader, make_loaders
from harness.loaders.sampling import Augment, LoaderConfig, SamplingPlan, make_normalize
from harness.models.build import build
from harness.spec import RunPaths, RunSpec
from harness.training.batch_norm import SyncBatchNorm, synchronise_batch_norms
from harness.training.engine import (
    Captured,
    Direct,
    Engine,
    Inputs,
    compile_network,
    make_graphs,
    nothing_to_restore,
)
from harness.training.evaluation import evaluating
from harness.training.memory import MemoryMeter
from harness.training.optim import make_optimizer
from harness.training.step import Step, make_autocast, set_precision, wrap_ddp
from harness.training.watchdog import Watchdog

EVAL_BATCH_SIZE = 1000


@dataclass(frozen=True, slots=True)
class Data:
    """The three sets of a run."""

    train: Split
    eval: Split  # evaluated after each epoch: the validation split, or the test set where there is none
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


@dataclass(frozen=True, slots=True)
class Prepared:
    """Data, loaders, network and optimizer of a run, before anything is trained."""

    spec: RunSpec
    data: Data
    loader_config: LoaderConfig
    train_loader: Loader
    eval_loader: Loader
    test_loader: Loader | None  # where other images are evaluated after each epoch
    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    @property
    def device(self) -> torch.device:
        """Of this rank."""
        return self.loader_config.device

    def close(self) -> None:
        """Close the loaders."""
        for loader in filter(None, (self.train_loader, self.eval_loader, self.test_loader)):
            loader.close()


def prepare(spec: RunSpec, worker: Worker, paths: RunPaths, meter: MemoryMeter | None = None) -> Prepared:
    """Load the images and make everything of them. Raises DataError, and RuntimeError where they are not the spec's."""
    with meter.category("data loader") if meter else nullcontext():
        dataset = load_dataset(spec.dataset, paths.data_dir, paths.cache_dir)
    if dataset.fingerprint != spec.fingerprint:
        raise RuntimeError(
            f"the images on this node are {dataset.fingerprint[:12]}, the run asks for {spec.fingerprint[:12]}"
        )
    data = split_data(spec, dataset)
    return assemble(spec, data, worker, num_classes=dataset.num_classes, flip=dataset.flip, meter=meter)


def assemble(
    spec: RunSpec, data: Data, worker: Worker, *, num_classes: int, flip: bool, meter: MemoryMeter | None = None
) -> Prepared:
    """Set the device up and make loaders, network and optimizer. `flip`: whether these images may be mirrored."""
    device = torch.device(worker.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(worker.threads)
    set_precision(spec.precision)
    torch.backends.cudnn.benchmark = not spec.deterministic

    recipe = spec.recipe
    torch.manual_seed(spec.seed)
    network = build(spec.network, num_classes, recipe.crop or data.train.images.shape[1])
    if recipe.batch_norm == "sync" and worker.world_size > 1:
        synchronise_batch_norms(network)
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(recipe, network, lr_on_device=is_captured(spec))
    scaler = torch.amp.GradScaler(device.type, enabled=spec.precision == "fp16")
    scaler.scale(torch.zeros((), device=device))  # makes its tensors, which a capture must find
    with meter.category("data loader") if meter else nullcontext():  # last: they must be closed
        config = LoaderConfig(
            augment=Augment(recipe.pad, recipe.pad_mode, recipe.crop, recipe.flip and flip, recipe.scale_range),
            normalize=make_normalize(recipe.normalize, data.train),
            batch_size=recipe.batch_size,
            eval_batch_size=min(EVAL_BATCH_SIZE, len(data.eval)),
            device=device,
            seed=spec.seed,
            rank=worker.rank,
            world_size=worker.world_size,
            threads=worker.threads,
            mixup=recipe.mixup if recipe.mixup_partner == "set" else 0.0,
        )
        train_loader, eval_loader = make_loaders(spec.loader, data.train, data.eval, config)
        test_loader = None
        if data.eval_split == "val":
            test_config = replace(config, eval_batch_size=min(EVAL_BATCH_SIZE, len(data.test)))
            test_loader = make_evaluation_loader(spec.loader, data.test, test_config)
    return Prepared(spec, data, config, train_loader, eval_loader, test_loader, network, optimizer, scaler)


def is_captured(spec: RunSpec) -> bool:
    """Whether its steps are captured and replayed."""
    return spec.engine == "graph" or (spec.engine == "compile" and spec.device == "cuda")


@dataclass(slots=True)
class Trainer:
    """A run's step and evaluation as they are carried out."""

    step: Step
    engine: Engine
    forward: Engine  # of evaluation
    network: nn.Module
    loader: Loader
    images: int  # training images of an epoch, over all ranks
    device: torch.device
    watchdog: Watchdog
    graphs: Any = None  # what captures; None where nothing does

    def global_images(self, step: int) -> int:
        """Images of a step of an epoch, over all ranks."""
        return count_images(self.images, self.step.spec.recipe.batch_size, step, self.step.world_size)

    def close(self) -> None:
        """Give the graphs back, whoever still refers to them."""
        self.engine.reset()
        self.forward.reset()
        self.watchdog.close()


def make_trainer(prepared: Prepared, warn: Callable[[str], None], meter: MemoryMeter | None = None) -> Trainer:
    """Spread the network over the ranks and choose how its steps are carried out: `spec.engine`, or what works.

    Every shape is captured here, before the loaders begin. A collective.
    """
    spec, network, device = prepared.spec, prepared.network, prepared.device
    with meter.category("NCCL") if meter else nullcontext():
        step = make_step(prepared, ddp=spec.engine == "eager")
        watchdog = Watchdog(device)
    graphs = make_graphs(device) if is_captured(spec) else None
    steps: list[tuple[str, Direct | Captured]] = [("eager", Direct(step))]
    forwards: list[tuple[str, Direct | Captured]] = [("eager", Direct(network))]
    if graphs is not None:
        steps.insert(0, ("graph", Captured(step, graphs, without_communication(step))))
        forwards.insert(0, ("graph", Captured(network, graphs)))
    if spec.engine == "compile":
        compiled = replace(step, network=compile_network(network))
        alone = without_communication(compiled)
        steps.insert(0, ("compile", Captured(compiled, graphs, alone) if graphs else Direct(compiled, alone)))
    trainer = Trainer(
        step,
        Engine(steps, step.snapshot, warn),
        Engine(forwards, nothing_to_restore, warn),
        network,
        prepared.train_loader,
        len(prepared.data.train),
        device,
        watchdog,
        graphs,
    )
    try:
        if spec.engine != "eager":
            trainer.engine.prepare(step_calls(prepared))
            with evaluating(network, make_autocast(device, spec.precision)):
                trainer.forward.prepare(eval_calls(prepared))
        if device.type == "cuda":  # pools are filled at the first batch
            with meter.category("data loader") if meter else nullcontext():
                next(prepared.train_loader.epoch(0))
    except BaseException:
        trainer.close()
        raise
    if meter:
        meter.reset()
    return trainer


def step_calls(prepared: Prepared) -> list[Inputs]:
    """Inputs like those of all training steps of this rank, one of each shape: a whole batch, and the last."""
    config, images = prepared.loader_config, len(prepared.data.train)
    plan = SamplingPlan(images, config.batch_size, rank=config.rank, world_size=config.world_size)
    sizes = plan.draw(0).batch_sizes
    world = config.world_size
    calls = [(n, count_images(images, config.batch_size, step, world)) for step, n in enumerate(sizes)]
    batches = {n: _dummy_images(prepared, prepared.data.train, n) for n, _ in calls}
    return [
        (batches[n], torch.zeros(n, dtype=torch.int64, device=prepared.device), count)
        for n, count in dict.fromkeys(calls)
    ]


def count_images(images: int, batch_size: int, step: int, world_size: int) -> int:
    """Images of a step of an epoch. A last batch with fewer images than ranks is filled up."""
    return max(min(batch_size, images - step * batch_size), world_size)


def eval_calls(prepared: Prepared) -> list[Inputs]:
    """Inputs like those of all evaluations of this rank, one of each shape."""
    config, data, calls = prepared.loader_config, prepared.data, list[Inputs]()
    for split in (data.eval, *([data.test] if data.eval_split == "val" else [])):
        batch_size = min(EVAL_BATCH_SIZE, len(split))
        plan = SamplingPlan(len(split), batch_size, rank=config.rank, world_size=config.world_size, train=False)
        sizes = dict.fromkeys(plan.draw(0).batch_sizes)
        calls += [(_dummy_images(prepared, split, n),) for n in sizes]
    return calls


def _dummy_images(prepared: Prepared, split: Split, count: int) -> torch.Tensor:
    """As a loader gives them, but of noise."""
    height, width = prepared.loader_config.augment.crop_size(split)
    random = torch.Generator(prepared.device).manual_seed(0)
    noise = torch.randn(count, 3, height, width, device=prepared.device, generator=random)
    return noise.contiguous(memory_format=torch.channels_last)


def without_communication(step: Step) -> Step:
    """The same step by this rank alone."""
    return replace(step, all_reduce=lambda _: None) if step.all_reduce else step


def make_step(prepared: Prepared, *, ddp: bool) -> Step:
    """The step of a prepared run. Where there are several ranks their gradients are summed by DDP, or by the step."""
    network, world_size, device = prepared.network, prepared.loader_config.world_size, prepared.device
    synchronised = [m for m in network.modules() if isinstance(m, SyncBatchNorm)]
    ddp = ddp and not synchronised  # one order of all-reduces, whatever a rank's autograd does first
    parameters = [p for p in network.parameters() if p.requires_grad]
    trained: nn.Module = network
    if world_size > 1 and ddp:
        trained = wrap_ddp(network, device)
    elif world_size > 1:
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, 0)
        # NCCL connects at the first all-reduce of a size, which no capture may be
        sizes = {(sum(p.numel() for p in parameters), torch.float32)}
        for norm in synchronised:
            sizes |= {(2 * norm.num_features + 1, torch.float64), (2 * norm.num_features, torch.float32)}
        for size, dtype in sorted(sizes, key=str):
            dist.all_reduce(torch.zeros(size, dtype=dtype, device=device))
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    return Step(
        trained,
        parameters,
        prepared.optimizer,
        prepared.scaler,
        prepared.spec,
        torch.zeros(2, dtype=torch.float64, device=device),
        world_size,
        norms=[norm for norm in norms if norm.num_batches_tracked is not None and norm.momentum],
        synchronised=synchronised,
        all_reduce=dist.all_reduce if world_size > 1 and not ddp else None,
    )
