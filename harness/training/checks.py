"""What `harness check` measures: does this device train as the reference says? A function for each check.

All of it trains a small network on invented images with the code of runs. On the CPU each check has its CPU form.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.cluster.job import Worker
from harness.loaders.datasets import Split
from harness.loaders.loader import make_loaders
from harness.loaders.sampling import Augment, LoaderConfig, Normalize, SamplingPlan
from harness.models.variants import Variant, find_variant
from harness.results.values import EpochMetrics
from harness.spec import Engine, Precision, RunSpec
from harness.training.memory import MemoryMeter
from harness.training.setup import Data, Prepared, Trainer, assemble, make_trainer
from harness.training.step import sum_gradients, synchronize
from harness.training.train import resume, run_steps, save

LOADERS, ENGINES = ("resident", "dataloader", "dali"), ("compile", "graph")
SIZE, IMAGES, BATCH, EPOCHS, CLASSES = 8, 75, 16, 6, 10  # five steps an epoch, the last one short
BUSY_CYCLES = 20_000_000  # about 10 ms of a GPU, queued before each batch
LIMITS = {"eager": 1e-4, "graph": 1e-4, "compile": 2e-2, "bf16": 0.1, "fp16": 0.05}  # of a loss, relative
MEMORY_SHARE, CLOCK_SHARE, GROUP_SECONDS = 0.05, 0.02, 5.0


@dataclass(frozen=True, slots=True)
class Check:
    """What a check came to."""

    name: str
    passed: bool | None  # None: skipped
    detail: str

    def line(self) -> str:
        """ "passed   loader dali: ..." """
        state = "skipped" if self.passed is None else "passed" if self.passed else "failed"
        return f"{state:7}  {self.name}: {self.detail}"


def run_checks(worker: Worker) -> Iterator[Check]:
    """Every check of one device, as it ends. One that breaks has failed."""
    eager: list[float] = []
    seconds: dict[str, float] = {}

    def reference() -> Check:
        metrics, _ = train(worker)
        eager.extend(row.loss for row in metrics)
        seconds["eager"] = step_seconds(metrics)
        return Check("eager", eager[-1] < eager[0], f"loss {eager[0]:.3f} to {eager[-1]:.3f} in 30 steps")

    checks: list[tuple[str, Callable[[], Check]]] = [("eager", reference)]
    checks += [(f"loader {name}", partial(check_loader, worker, name, seconds)) for name in LOADERS]
    checks += [(f"engine {name}", partial(check_engine, worker, name, eager, seconds)) for name in ENGINES]  # type: ignore[arg-type]
    checks += [(f"precision {name}", partial(check_precision, worker, name, eager)) for name in ("bf16", "fp16")]
    checks += [("resume", partial(check_resume, worker)), ("memory", partial(check_memory, worker))]
    checks += [("clock", partial(check_clock, worker))]
    for name, check in checks:
        yield attempt(name, check)
    figures = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in seconds.items())
    yield Check("seconds per step", True, figures)


def attempt(name: str, check: Callable[[], Check]) -> Check:
    """Its result; a failure where it raises."""
    try:
        return check()
    except ImportError as error:
        return Check(name, None, f"not installed: {error}")
    except Exception as error:
        return Check(name, False, (str(error).strip() or type(error).__name__).splitlines()[0][:200])


# --- a small run ---


def make_split() -> Split:
    """Images whose brightness tells their class, so that a network learns them."""
    random = np.random.default_rng(0)
    labels = random.integers(0, CLASSES, IMAGES)
    images = random.integers(0, 128, (IMAGES, SIZE, SIZE, 3)) + labels[:, None, None, None] * 12
    return Split(images.astype(np.uint8), labels.astype(np.int64))


def make_spec(worker: Worker, **changes: Any) -> RunSpec:
    """A small run on this device, whose lr changes at every step."""
    variant: Variant = find_variant("he2015")(8)
    recipe = replace(
        variant.recipe, duration=EPOCHS, unit="epoch", batch_size=BATCH, lr=0.05, schedule="cosine", milestones=()
    )
    spec = RunSpec(
        variant="he2015", network=variant.network, recipe=recipe, dataset="check", fingerprint="", loader="resident",
        device="cuda" if worker.device.startswith("cuda") else "cpu", workers=worker.world_size,
    )  # fmt: skip
    return replace(spec, **changes)


def start(
    worker: Worker, stack: ExitStack, meter: MemoryMeter | None = None, **changes: Any
) -> tuple[Prepared, Trainer]:
    """A run before its first step, until the stack closes. Raises RuntimeError where its engine does not work."""
    split, given_up = make_split(), list[str]()
    data = Data(split, split, split, "test")
    prepared = assemble(make_spec(worker, **changes), data, worker, num_classes=CLASSES, flip=True, meter=meter)
    stack.enter_context(closing(prepared))
    if worker.world_size > 1 or dist.is_initialized():  # the statistics of a batch are those of a rank's share
        for module in prepared.network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    trainer = stack.enter_context(closing(make_trainer(prepared, given_up.append, meter)))
    if given_up:
        raise RuntimeError(given_up[0])
    return prepared, trainer


def train_epochs(trainer: Trainer, first: int = 0, last: int = EPOCHS) -> list[EpochMetrics]:
    """These epochs of a run."""
    return [run_steps(trainer, epoch=epoch, steps=trainer.loader.steps) for epoch in range(first, last)]


def train(worker: Worker, **changes: Any) -> tuple[list[EpochMetrics], dict[str, Tensor]]:
    """A whole small run: its epochs and its weights."""
    with ExitStack() as stack:
        prepared, trainer = start(worker, stack, **changes)
        metrics = train_epochs(trainer)
        return metrics, {name: value.cpu().clone() for name, value in prepared.network.state_dict().items()}


def step_seconds(metrics: list[EpochMetrics]) -> float:
    """Of its fastest epoch, the first left out."""
    return min(row.train_seconds / row.steps for row in metrics[1:])


def difference(losses: list[float], reference: list[float]) -> float:
    """The largest relative one; NaN counts as infinite."""
    worst = max(abs(one - other) / abs(other) for one, other in zip(losses, reference, strict=True))
    return worst if worst == worst else float("inf")


# --- checks ---


def check_loader(worker: Worker, name: str, seconds: dict[str, float]) -> Check:
    """Its tensors are those of the plan, over three epochs in order and out of order, on a device that is kept busy."""
    split, device, on_gpu = make_split(), torch.device(worker.device), worker.device.startswith("cuda")
    normalize = Normalize(np.array([0.4, 0.5, 0.6], np.float32), np.array([0.2, 0.3, 0.25], np.float32))
    config = LoaderConfig(
        augment=Augment(4, "zero", None, True), normalize=normalize, batch_size=BATCH, eval_batch_size=BATCH,
        device=device, threads=worker.threads,
    )  # fmt: skip
    plan = SamplingPlan(images=IMAGES, batch_size=BATCH, span=(8, 8), flip=True, seed=config.seed)
    worst, wrong, batches, took = 0.0, 0, 0, list[float]()
    with ExitStack() as stack:
        loader, other = (stack.enter_context(closing(each)) for each in make_loaders(name, split, split, config))
        del other
        for epoch in (0, 1, 2, 1, 0, 2):
            kept, started_at = list[tuple[Tensor, Tensor]](), time.perf_counter()
            iterator = loader.epoch(epoch)
            for _ in range(loader.steps):
                if on_gpu:
                    torch.cuda._sleep(BUSY_CYCLES)
                kept.append(next(iterator))
            synchronize(device)
            took.append((time.perf_counter() - started_at) / loader.steps)
            images, labels = torch.cat([i for i, _ in kept]).cpu(), torch.cat([n for _, n in kept]).cpu()
            expected, right = reference_epoch(split, plan, normalize, epoch)
            worst = max(worst, float((images - expected).abs().max()))
            wrong += int((labels != right).sum())
            batches += len(kept)
    if not on_gpu:
        seconds[f"loader {name}"] = min(took)
    detail = f"{batches} batches, largest difference {worst:.1e}, {wrong} wrong labels"
    return Check(f"loader {name}", worst < 1e-4 and not wrong, detail)


def reference_epoch(split: Split, plan: SamplingPlan, normalize: Normalize, epoch: int) -> tuple[Tensor, Tensor]:
    """Images and labels of an epoch, one by one by the definition."""
    sample, padding = plan.draw(epoch), ((0, 0), (4, 4), (4, 4), (0, 0))
    padded = np.pad((split.images / np.float32(255) - normalize.mean) / normalize.std, padding)
    made = []
    for index, (y, x), flip in zip(sample.index, sample.offset, sample.flip, strict=True):
        image = padded[index, y : y + SIZE, x : x + SIZE]
        made.append(image[:, ::-1] if flip else image)
    images = torch.from_numpy(np.stack(made).astype(np.float32)).permute(0, 3, 1, 2)
    return images, torch.from_numpy(split.labels[sample.index])


def check_engine(worker: Worker, engine: Engine, eager: list[float], seconds: dict[str, float]) -> Check:
    """Its losses are eager's, and it is what ran: `start` raises where another one would."""
    name = f"engine {engine}"
    try:
        metrics, _ = train(worker, engine=engine)
    except RuntimeError as error:
        if worker.device == "cpu" and "cannot capture" in str(error):
            return Check(name, None, str(error))
        raise
    seconds[engine] = step_seconds(metrics)
    worst = difference([row.loss for row in metrics], eager)
    bits = "bit for bit eager's" if worst == 0 else f"eager's to {worst:.1e} (limit {LIMITS[engine]:.0e})"
    return Check(name, worst <= LIMITS[engine], f"losses of 30 steps are {bits}")


def check_precision(worker: Worker, precision: Precision, eager: list[float]) -> Check:
    """Its losses are near those of fp32, and it is not fp32."""
    name = f"precision {precision}"
    if precision == "fp16" and worker.device == "cpu":
        return Check(name, None, "the CPU trains in fp32 and bf16")
    metrics, _ = train(worker, precision=precision)
    worst = difference([row.loss for row in metrics], eager)
    detail = f"losses of 30 steps are fp32's to {worst:.1e} (limit {LIMITS[precision]:.0e})"
    return Check(name, 0 < worst <= LIMITS[precision], detail)


def check_resume(worker: Worker) -> Check:
    """Stopped in the middle and resumed from a checkpoint, a run ends with the weights of one left alone."""
    half = EPOCHS // 2
    _, whole = train(worker)
    with tempfile.TemporaryDirectory(prefix="harness-check-") as name, ExitStack() as stack:
        prepared, trainer = start(worker, stack)
        save(prepared, Path(name), train_epochs(trainer, last=half))
        prepared, trainer = start(worker, stack)
        done = resume(prepared, Path(name), lambda _: None)
        train_epochs(trainer, first=len(done))
        resumed = {key: value.cpu() for key, value in prepared.network.state_dict().items()}
    worst = max(float((resumed[key].double() - whole[key].double()).abs().max()) for key in whole)
    limit = 0.0 if worker.device == "cpu" else 1e-3
    detail = f"weights after {half} + {EPOCHS - half} epochs differ by {worst:.1e} from those after {EPOCHS} (limit {limit:g})"
    return Check("resume", len(done) == half and worst <= limit, detail)


def check_memory(worker: Worker) -> Check:
    """What the categories do not account for is little of what the driver counts."""
    meter = MemoryMeter(torch.device(worker.device))
    with ExitStack() as stack:
        engine = "graph" if meter.on_gpu else "eager"
        prepared, trainer = start(worker, stack, meter, engine=engine)
        train_epochs(trainer, last=2)
        memory = meter.read(prepared.network, prepared.optimizer, trainer.graphs).by_category_mib
    return judge_memory(memory, on_gpu=meter.on_gpu)


def judge_memory(by_category_mib: dict[str, float], *, on_gpu: bool) -> Check:
    """Of a run's categories. A CPU has no driver that counts."""
    total, rest = sum(by_category_mib.values()), by_category_mib.get("unaccounted", 0.0)
    if not by_category_mib:
        return Check("memory", None, "the driver does not say how much this process uses")
    detail = f"{rest:.0f} of {total:.0f} MiB belong to no category (limit {100 * MEMORY_SHARE:.0f} %)"
    if not on_gpu:
        return Check("memory", None, f"no driver counts a CPU's memory; {detail}")
    return Check("memory", abs(rest) <= MEMORY_SHARE * total, detail)


def check_clock(worker: Worker) -> Check:
    """A sequence of products, timed as steps are and by another clock: CUDA's events, the kernel's raw clock."""
    device = torch.device(worker.device)
    factor = torch.ones(1024, 1024, device=device) / 1024

    def work(times: int) -> None:
        product = factor
        for _ in range(times):
            product = product @ factor
        synchronize(device)

    work(3)
    times = 2000 if device.type == "cuda" else 10
    if device.type == "cuda":
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        started_at = time.perf_counter()
        before.record()
        work(times)
        after.record()
        synchronize(device)
        seconds, other = time.perf_counter() - started_at, before.elapsed_time(after) / 1000
    else:
        raw, started_at = time.clock_gettime(time.CLOCK_MONOTONIC_RAW), time.perf_counter()
        work(times)
        seconds, other = time.perf_counter() - started_at, time.clock_gettime(time.CLOCK_MONOTONIC_RAW) - raw
    error = abs(seconds / other - 1)
    detail = f"{1000 * seconds:.1f} ms, by the other clock {1000 * other:.1f} ms: {100 * error:.1f} % (limit 2 %)"
    return Check("clock", error <= CLOCK_SHARE, detail)


# --- of several ranks, in each of them ---


def run_rank_checks(spec: RunSpec, worker: Worker, report: Callable[[Any], None]) -> list[Check]:
    """A train function of the launcher's: the checks that need a process group."""
    engine: Engine = "graph" if worker.device.startswith("cuda") else "eager"
    todo: dict[str, Callable[[], Check]] = {
        "sum of gradients": partial(check_sum, worker),
        "ranks equal one": partial(check_ranks, worker, engine),
        "process group": partial(check_group, worker),
    }
    return [attempt(name, check) for name, check in todo.items()]


def check_sum(worker: Worker) -> Check:
    """Gradients summed by the step's own function are their sum."""
    shapes = [(8, 3, 3, 3), (8,), (10, 64)]
    parameters = [nn.Parameter(torch.zeros(shape, device=worker.device)) for shape in shapes]
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, (worker.rank + 1) * (number + 1))
    sum_gradients(parameters, dist.all_reduce)
    ranks = worker.world_size * (worker.world_size + 1) // 2
    grads = [parameter.grad for parameter in parameters]
    right = all(bool((g == ranks * (n + 1)).all()) for n, g in enumerate(grads) if g is not None)
    return Check("sum of gradients", right, f"over {worker.world_size} ranks, {len(shapes)} tensors")


def check_ranks(worker: Worker, engine: Engine = "eager") -> Check:
    """All ranks together train as one does alone, batch norm's statistics held still."""
    one, _ = train(replace(worker, rank=0, world_size=1))
    together, _ = train(worker, engine=engine)
    worst = difference([row.loss for row in together], [row.loss for row in one])
    detail = f"losses of 30 steps on {worker.world_size} ranks are one rank's to {worst:.1e} (limit {LIMITS['eager']:.0e})"
    return Check("ranks equal one", worst <= LIMITS["eager"], detail)


def check_group(worker: Worker) -> Check:
    """A process group that has communicated ends soon."""
    group: Any = dist.new_group()
    dist.all_reduce(torch.ones(1, device=worker.device), group=group)
    synchronize(torch.device(worker.device))
    started_at = time.perf_counter()
    dist.destroy_process_group(group)
    seconds = time.perf_counter() - started_at
    return Check(
        "process group", seconds < GROUP_SECONDS, f"ended after {seconds:.2f} s (limit {GROUP_SECONDS:.0f} s)"
    )
