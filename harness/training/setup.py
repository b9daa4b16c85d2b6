"""All that a run needs before its first step: data, loaders, network, optimizer, and the engine that carries it out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.cluster.job import Worker
from harness.cluster.workers import gather
from harness.loaders.datasets import Dataset, Split, hold_out, limit, load_dataset
from harness.loaders.loader import Loader, make_evaluation_loader, make_loaders
from harness.loaders.sampling import Augment, LoaderConfig, SamplingPlan, make_augment, make_normalize
from harness.models.build import build
from harness.plugins import load_sources
from harness.results.values import Memory
from harness.spec import RunPaths, RunSpec
from harness.training.batch_norm import synchronise_batch_norms
from harness.training.engine import Engine, Inputs, choose, compile_network, make_graphs
from harness.training.evaluation import evaluating
from harness.training.halt import Halt
from harness.training.memory import MemoryMeter
from harness.training.recipe import make_optimizer
from harness.training.step import Step, make_autocast, set_precision, wrap_ddp
from harness.training.watchdog import Watchdog

EVAL_BATCH_SIZE = 1000
EVAL_BATCH_PIXELS = 2**24  # in a batch of large images, which would fill gigabytes


def eval_batch_size(split: Split, augment: Augment) -> int:
    """Global, of evaluation."""
    height, width = augment.crop_size(split)
    return min(EVAL_BATCH_SIZE, len(split), max(1, EVAL_BATCH_PIXELS // (height * width)))


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
    meter: MemoryMeter

    @property
    def device(self) -> torch.device:
        """Of this rank."""
        return self.loader_config.device

    def global_images(self, step: int) -> int:
        """Images of a step of an epoch, over all ranks. A last batch with fewer images than ranks is filled up."""
        batch_size = self.loader_config.batch_size
        return max(min(batch_size, len(self.data.train) - step * batch_size), self.loader_config.world_size)

    def batch_sizes(self, split: Split, batch_size: int, *, train: bool = True) -> list[int]:
        """Images of each of this rank's batches."""
        rank, world_size = self.loader_config.rank, self.loader_config.world_size
        plan = SamplingPlan(len(split), batch_size, rank=rank, world_size=world_size, train=train)
        return plan.draw(0).batch_sizes

    def close(self) -> None:
        """Close the loaders."""
        for loader in filter(None, (self.train_loader, self.eval_loader, self.test_loader)):
            loader.close()


def prepare(
    spec: RunSpec, worker: Worker, paths: RunPaths, warn: Callable[[str], None] = warnings.warn
) -> Prepared:
    """Load the images and make everything of them. Raises DataError, and RuntimeError where they are not the spec's."""
    meter = MemoryMeter(torch.device(worker.device))
    load_sources(spec.plugins, paths)  # before anything is looked up
    with meter.category("data loader"):
        dataset = load_dataset(spec.dataset, paths.data_dir, paths.cache_dir)
    here, wanted = dataset.fingerprint, spec.fingerprint
    if here != wanted:
        raise RuntimeError(f"the images on this node are {here[:12]}, the run asks for {wanted[:12]}")
    return assemble(spec, dataset, worker, warn, meter)


def assemble(
    spec: RunSpec, dataset: Dataset, worker: Worker, warn: Callable[[str], None] = warnings.warn,
    meter: MemoryMeter | None = None,
) -> Prepared:  # fmt: skip
    """Set the device up and make loaders, network and optimizer. A collective."""
    device, data = torch.device(worker.device), split_data(spec, dataset)
    meter = meter or MemoryMeter(device)  # before anything touches the device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with meter.category("NCCL"):  # which takes its buffers where the ranks first meet
        gather(None)
    torch.set_num_threads(worker.threads)
    set_precision(spec.precision)
    torch.backends.cudnn.benchmark = not spec.deterministic

    recipe = spec.recipe
    torch.manual_seed(spec.seed)
    augment = make_augment(recipe, flip=dataset.flip)
    network = build(spec.network, dataset.num_classes, min(augment.crop_size(data.train)))
    if recipe.batch_norm == "sync" and worker.world_size > 1:
        synchronise_batch_norms(network)
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(recipe, network, lr_on_device=is_captured(spec))
    scaler = torch.amp.GradScaler(device.type, enabled=spec.precision == "fp16")
    scaler.scale(torch.zeros((), device=device))  # makes its tensors, which a capture must find
    with meter.category("data loader"):  # last: they must be closed
        config = LoaderConfig(
            augment=augment,
            normalize=make_normalize(recipe.normalize, data.train),
            batch_size=recipe.batch_size, eval_batch_size=eval_batch_size(data.eval, augment),
            device=device, threads=worker.threads, rank=worker.rank, world_size=worker.world_size, seed=spec.seed,
            mixup=recipe.mixup if recipe.mixup_partner == "set" else 0.0, warn=warn,
        )  # fmt: skip
        train_loader, eval_loader = make_loaders(spec.loader, data.train, data.eval, config)
        test_loader = None
        if data.eval_split == "val":
            test_config = replace(config, eval_batch_size=eval_batch_size(data.test, augment))
            test_loader = make_evaluation_loader(spec.loader, data.test, test_config)
    return Prepared(spec, data, config, train_loader, eval_loader, test_loader, network, optimizer, scaler, meter)


def is_captured(spec: RunSpec) -> bool:
    """Whether its steps are captured and replayed."""
    return spec.engine == "graph" or (spec.engine == "compile" and spec.device == "cuda")


@dataclass(slots=True)
class Trainer:
    """A run's step and evaluation as they are carried out."""

    run: Prepared
    step: Step
    engine: Engine
    forward: Engine  # of evaluation
    watchdog: Watchdog
    halt: Halt = field(default_factory=lambda: Halt(Worker()))  # by default nothing stops it

    def measure_memory(self) -> Memory:
        """The peaks so far, and who holds how much."""
        captured = self.engine.reserved_bytes() + self.forward.reserved_bytes()
        return self.run.meter.read(self.run.network, self.run.optimizer, captured)


@contextmanager
def training(run: Prepared, worker: Worker | None = None, stacks: Path | None = None) -> Iterator[Trainer]:
    """Spread the network over the ranks and choose how its steps are carried out: `spec.engine`, or what works. At the end
    graphs are given back, whoever still refers to them.

    Every shape is captured here, before the loaders begin. A collective. Without a `worker` nobody stops the run or hears
    of its hanging; `stacks` is the folder for what its ranks then wait for.
    """
    spec, network, device, warn = run.spec, run.network, run.device, run.loader_config.warn
    with ExitStack() as stack:
        with run.meter.category("NCCL"):
            step = make_step(run, ddp=spec.engine == "eager")
            watchdog = stack.enter_context(closing(Watchdog(device, worker, stacks)))
        halt = stack.enter_context(closing(Halt(worker or Worker())))
        steps, forwards = [Engine("eager", step)], [Engine("eager", network)]
        graphs = make_graphs(device) if is_captured(spec) else None
        if graphs is not None:
            steps.insert(0, Engine("graph", step, graphs, without_communication(step)))
            forwards.insert(0, Engine("graph", network, graphs))
        if spec.engine == "compile":
            compiled = replace(step, forward=compile_network(network))
            steps.insert(0, Engine("compile", compiled, graphs, without_communication(compiled)))
        for each in (*forwards, *steps):
            stack.callback(each.reset)
        engine, forward = steps[-1], forwards[-1]
        if spec.engine != "eager":
            engine = choose(steps, step_calls(run), warn, step.restoring)
            with evaluating(network), make_autocast(device, spec.precision):
                forward = choose(forwards, eval_calls(run), warn)
        elif run.loader_config.world_size > 2 and step.all_reduce is None:
            # after its first step DDP lays gradients out in another order, in which more than two ranks sum them otherwise
            with step.restoring():
                engine(*step_calls(run)[0])
        if device.type == "cuda":  # pools are filled at the first batch
            with run.meter.category("data loader"):
                next(run.train_loader.epoch(0))
        run.meter.reset()
        yield Trainer(run, step, engine, forward, watchdog, halt)


def step_calls(run: Prepared) -> list[Inputs]:
    """Inputs like those of all training steps of this rank, one of each shape: a whole batch, and the last."""
    sizes = run.batch_sizes(run.data.train, run.loader_config.batch_size)
    calls = dict.fromkeys((n, run.global_images(step)) for step, n in enumerate(sizes))
    images = {n: make_noise(run, run.data.train, n) for n, _ in calls}
    return [(images[n], torch.zeros(n, dtype=torch.int64, device=run.device), count) for n, count in calls]


def eval_calls(run: Prepared) -> list[Inputs]:
    """Inputs like those of all evaluations of this rank, one of each shape."""
    calls = list[Inputs]()
    for split in (run.data.eval, run.data.test) if run.test_loader else (run.data.eval,):
        sizes = run.batch_sizes(split, eval_batch_size(split, run.loader_config.augment), train=False)
        calls += [(make_noise(run, split, n),) for n in dict.fromkeys(sizes)]
    return calls


def make_noise(run: Prepared, split: Split, count: int) -> Tensor:
    """Images as a loader gives them, but of noise."""
    size = run.loader_config.augment.crop_size(split)
    random = torch.Generator(run.device).manual_seed(0)
    noise = torch.randn(count, 3, *size, device=run.device, generator=random)
    return noise.contiguous(memory_format=torch.channels_last)


def without_communication(step: Step) -> Step:
    """The same step by this rank alone."""
    return replace(step, all_reduce=lambda _: None) if step.all_reduce else step


def make_step(run: Prepared, *, ddp: bool) -> Step:
    """The step of a prepared run. Where there are several ranks their gradients are summed by DDP, or by the step."""
    totals = torch.zeros(2, dtype=torch.float64, device=run.device)
    step = Step(run.network, run.optimizer, run.scaler, run.spec, totals)
    if run.loader_config.world_size == 1:
        return step
    if ddp and not step.synchronised:  # else one order of all-reduces, whatever a rank's autograd does first
        return replace(step, forward=wrap_ddp(run.network, run.device))
    for tensor in run.network.state_dict().values():
        dist.broadcast(tensor, 0)
    # NCCL connects at the first all-reduce of a size, which no capture may be
    sizes = {(sum(p.numel() for p in step.parameters), torch.float32)}
    for norm in step.synchronised:
        sizes |= {(2 * norm.num_features + 1, torch.float64), (2 * norm.num_features, torch.float32)}
    for size, dtype in sorted(sizes, key=str):
        dist.all_reduce(torch.zeros(size, dtype=dtype, device=run.device))
    return replace(step, all_reduce=dist.all_reduce)
