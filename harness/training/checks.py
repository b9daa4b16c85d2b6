"""What `harness check` measures: does this device train as the reference says? A function for each of `CHECKS`.

Each returns a figure, which its check limits, and words about it; it raises Finding where there is nothing to
check. All of it trains a small network on invented images with the code of runs. On the CPU each has its CPU form.

    python -m harness.training.checks DEVICE THREADS NAME...      a line of JSON for each, as it ends
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness.checklist import BY_NAME, Finding, Result, attempt
from harness.cluster.job import Report, Worker
from harness.cluster.workers import gather
from harness.loaders.cache import cache_dir
from harness.loaders.datasets import Dataset, Split
from harness.loaders.sampling import Augment, SamplingPlan
from harness.models.variants import find_variant
from harness.plugins import names_of, used_by
from harness.results.metrics import figures
from harness.results.values import EpochMetrics
from harness.spec import Engine, Precision, RunSpec
from harness.training.checkpoint import resume, save
from harness.training.rates import find_peak, instant, seconds_between
from harness.training.setup import Prepared, Trainer, assemble, training
from harness.training.step import DTYPES, deterministic_algorithms, sum_gradients, synchronize
from harness.training.train import run_steps

SIZE, IMAGES, BATCH, EPOCHS, CLASSES = 8, 75, 16, 6, 10  # five steps an epoch, the last one short
BUSY_CYCLES = 20_000_000  # about 10 ms of a GPU, queued before each batch
Figure = tuple[float, str]


@dataclass
class Bench:
    """A device, and what checks share."""

    worker: Worker
    seconds: dict[str, float] = field(default_factory=dict)  # of a step, by engine or loader

    @property
    def on_gpu(self) -> bool:
        return self.worker.device != "cpu"

    @cached_property
    def eager(self) -> list[EpochMetrics]:
        """The reference: a run kernel by kernel."""
        return self.train("eager")

    def train(self, engine: Engine) -> list[EpochMetrics]:
        """The epochs of a whole small run, timed."""
        metrics, _ = train(self.worker, engine=engine)
        self.seconds[engine] = min(row.train_seconds / row.steps for row in metrics[1:])
        return metrics


def run_check(name: str, bench: Bench) -> Result:
    """Its result."""
    check = BY_NAME[name]
    if check.gpu and not bench.on_gpu:
        return Result(name, "skipped", "only a GPU does it")
    return attempt(name, globals()[check.function], bench, *(check.of or ())[1:], limit=check.limit)


def main(device: str, threads: str, *names: str) -> None:
    """Print a result a line."""
    bench = Bench(Worker(device=device, threads=int(threads)))
    for name in names:
        print(json.dumps(["check", *astuple(run_check(name, bench))]), flush=True)


# --- a small run ---


def make_dataset(size: int = SIZE, count: int = IMAGES) -> Dataset:
    """Images whose brightness tells their class, so that a network learns them."""
    random = np.random.default_rng(0)
    labels = random.integers(0, CLASSES, count)
    images = random.integers(0, 128, (count, size, size, 3)) + labels[:, None, None, None] * 12
    split = Split(images.astype(np.uint8), labels.astype(np.int64))
    return Dataset("check", "check", False, "", tuple(map(str, range(CLASSES))), split, split, flip=True)


def make_spec(worker: Worker, **changes: Any) -> RunSpec:
    """A small run on this device, whose lr changes at every step."""
    variant = find_variant("he2015")(8)
    recipe = replace(
        variant.recipe, duration=EPOCHS, unit="epoch", batch_size=BATCH, lr=0.02, schedule="cosine", milestones=()
    )
    own: dict[str, Any] = {"network": variant.network, "recipe": recipe, "loader": "resident"}
    placed: dict[str, Any] = {"device": worker.device.partition(":")[0], "workers": worker.world_size}
    spec = RunSpec(variant="he2015", dataset="check", fingerprint="", **placed | own | changes)
    return replace(spec, plugins=tuple(plugin.source.identity for plugin in used_by(names_of(spec))))


def start(
    worker: Worker, stack: ExitStack, *, size: int = SIZE, images: int = IMAGES, **changes: Any
) -> tuple[Prepared, Trainer]:
    """A run before its first step, until the stack closes. Raises RuntimeError where its engine does not work."""
    given_up, spec = list[str](), make_spec(worker, **changes)
    stack.enter_context(deterministic_algorithms(spec))
    prepared = assemble(spec, make_dataset(size, images), worker, given_up.append)
    stack.enter_context(closing(prepared))
    if dist.is_initialized():  # no draws of a rank's own, and no statistics of its share
        prepared.network.eval()
        for module in prepared.network.modules() if spec.recipe.batch_norm == "sync" else ():
            module.train(isinstance(module, _BatchNorm))
    trainer = stack.enter_context(training(prepared))
    if given_up:
        raise RuntimeError(given_up[0])
    return prepared, trainer


def train_epochs(trainer: Trainer, first: int, last: int) -> list[EpochMetrics]:
    """These epochs of a run."""
    return [run_steps(trainer, epoch=epoch, steps=trainer.run.train_loader.steps) for epoch in range(first, last)]


def train(worker: Worker, **changes: Any) -> tuple[list[EpochMetrics], dict[str, Tensor]]:
    """A whole small run: its epochs and its weights."""
    with ExitStack() as stack:
        prepared, trainer = start(worker, stack, **changes)
        metrics = train_epochs(trainer, 0, round(prepared.spec.recipe.duration))
        return metrics, {name: value.cpu().clone() for name, value in prepared.network.state_dict().items()}


def compare(metrics: list[EpochMetrics], reference: list[EpochMetrics], whose: str) -> Figure:
    """The largest relative difference of losses."""
    losses = np.array([[row.loss for row in rows] for rows in (metrics, reference)])
    worst = float(np.abs(losses[0] / losses[1] - 1).max())
    how = f"to {worst:.1e}" if worst else "bit for bit"
    return worst, f"losses of {sum(row.steps for row in metrics)} steps equal {whose} {how}"


# --- checks ---


def check_eager(bench: Bench) -> Figure:
    """The losses fall: last / first."""
    first, last = bench.eager[0].loss, bench.eager[-1].loss
    return last / first, f"loss {first:.3f} to {last:.3f} in {EPOCHS * 5} steps, ratio {last / first:.2f}"


def check_loader(bench: Bench, name: str) -> Figure:
    """Its tensors are those of the plan, over three epochs in order and out of order, on a device that is kept busy."""
    worst, wrong, batches, took = 0.0, 0, 0, list[float]()
    with ExitStack() as stack:
        prepared, _ = start(bench.worker, stack, loader=name)
        loader, device = prepared.train_loader, prepared.device
        for epoch in (0, 1, 2, 1, 0, 2):
            kept, started_at = list[tuple[Tensor, Tensor]](), time.perf_counter()
            iterator = loader.epoch(epoch)
            for _ in range(loader.steps):
                if bench.on_gpu:
                    torch.cuda._sleep(BUSY_CYCLES)
                kept.append(next(iterator))
            synchronize(device)
            took.append((time.perf_counter() - started_at) / loader.steps)
            images, labels = (torch.cat(tensors).cpu() for tensors in zip(*kept, strict=True))
            expected, right = reference_epoch(prepared, epoch)
            worst = max(worst, float((images - expected).abs().max()))
            wrong += int((labels != right).sum())
            batches += len(kept)
    if not bench.on_gpu:
        bench.seconds[f"loader {name}"] = min(took)
    words = f"{batches} batches, {wrong} wrong labels, largest difference {worst:.1e}"
    return float("inf") if wrong else worst, words


def reference_epoch(prepared: Prepared, epoch: int) -> tuple[Tensor, Tensor]:
    """Images and labels of an epoch, one by one by the definition: padded by 4 and cropped."""
    split, normalize, seed = prepared.data.train, prepared.loader_config.normalize, prepared.spec.seed
    augment = Augment(pad=4, pad_mode="zero", crop=None, flip=True)
    sample = SamplingPlan(IMAGES, BATCH, seed, augment=augment, size=(SIZE, SIZE)).draw(epoch)
    normalized = (split.pixels / np.float32(255) - normalize.mean) / normalize.std
    padded = np.pad(normalized, ((0, 0), (4, 4), (4, 4), (0, 0)))
    made = []
    for index, (y, x), flip in zip(sample.index, sample.offset, sample.flip, strict=True):
        image = padded[index, y : y + SIZE, x : x + SIZE]
        made.append(image[:, ::-1] if flip else image)
    images = torch.from_numpy(np.stack(made).astype(np.float32)).permute(0, 3, 1, 2)
    return images, torch.from_numpy(split.labels[sample.index])


def check_engine(bench: Bench, engine: Engine) -> Figure:
    """Its losses are eager's, and it is what ran: `start` raises where another one would."""
    return compare(bench.train(engine), bench.eager, "eager's")


def check_precision(bench: Bench, precision: Precision) -> Figure:
    """Its losses are near those of fp32, and it is not fp32."""
    if precision == "tf32" and torch.cuda.get_device_capability(bench.worker.device)[0] < 8:
        raise RuntimeError("this GPU has no TF32 and computes in fp32")
    metrics, weights = train(bench.worker, precision=precision)
    worst, words = compare(metrics, bench.eager, "fp32's")
    if dtype := DTYPES.get(precision):  # of TF32 some kernels are fp32's
        if worst == 0:
            raise RuntimeError("it computes in fp32")
        if all(torch.equal(w, w.to(dtype).to(w.dtype)) for w in weights.values() if w.ndim == 4):
            raise RuntimeError("its weights are not kept in fp32")
    return worst, words


def check_resume(bench: Bench, **changes: Any) -> Figure:
    """Stopped in the middle and resumed from a checkpoint, a deterministic run ends with the weights of one left
    alone."""
    half = EPOCHS // 2
    _, whole = train(bench.worker, deterministic=True, **changes)
    with tempfile.TemporaryDirectory(prefix="harness-check-") as name, ExitStack() as stack:
        prepared, trainer = start(bench.worker, stack, deterministic=True, **changes)
        save(prepared, Path(name), train_epochs(trainer, 0, half))
        prepared, trainer = start(bench.worker, stack, deterministic=True, **changes)
        done, _ = resume(prepared, Path(name))
        train_epochs(trainer, len(done), EPOCHS)
        resumed = {key: value.cpu() for key, value in prepared.network.state_dict().items()}
    worst = max(float((resumed[key].double() - whole[key].double()).abs().max()) for key in whole)
    words = f"weights after {len(done)} + {EPOCHS - half} epochs differ by {worst:.1e} from those after {EPOCHS}"
    return worst if len(done) == half else float("inf"), words


def check_memory(bench: Bench) -> Figure:
    """What the categories do not account for is little of what the driver counts."""
    with ExitStack() as stack:
        _, trainer = start(bench.worker, stack, engine="graph")
        train_epochs(trainer, 0, 2)
        return judge_memory(trainer.measure_memory().by_category_mib)


def judge_memory(by_category_mib: dict[str, float]) -> Figure:
    """Of a run's categories."""
    if not by_category_mib:
        raise Finding("skipped", "no driver says how much this process uses")
    total, rest = sum(by_category_mib.values()), by_category_mib.get("unaccounted", 0.0)
    return abs(rest) / total, f"{rest:.0f} of {total:.0f} MiB belong to no category"


def check_clock(bench: Bench) -> Figure:
    """A sequence of products, timed as steps are and by another clock: CUDA's events, the kernel's raw clock. The best
    of three, since others may use the CPU."""
    device = torch.device(bench.worker.device)
    factor, product = torch.ones(2, 1024, 1024, device=device) / 1024

    seen = list[tuple[float, float, float]]()
    for _ in range(4):
        synchronize(device)
        started_at, before = time.perf_counter(), instant(device)
        for _ in range(2000 if bench.on_gpu else 3):
            torch.mm(factor, factor, out=product)
        after = instant(device)
        synchronize(device)
        seconds, other = time.perf_counter() - started_at, seconds_between(before, after)
        seen.append((abs(seconds / other - 1), seconds, other))
    error, seconds, other = min(seen[1:])  # the first is warm-up
    return error, f"{1000 * seconds:.1f} ms, by the other clock {1000 * other:.1f} ms: a share of {error:.3f}"


def show_peak(bench: Bench) -> Figure:
    """What MFU is over, in each precision; kept for runs where no data sheet says it."""
    device, known = torch.device(bench.worker.device), list[str]()
    precisions: tuple[Precision, ...] = get_args(Precision) if bench.on_gpu else ("fp32", "bf16")
    for precision in precisions:
        peak = find_peak(device, precision, bench.worker.threads, cache_dir(), fresh=True)
        known.append(f"{precision} {figures(peak.flops / 1e12)} TFLOP/s ({peak.source})")
    return 0.0, ", ".join(known)


def show_seconds(bench: Bench) -> Figure:
    """Of a step, by all that was timed."""
    return 0.0, ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in bench.seconds.items())


# --- of several ranks, in each of them ---


def run_rank_checks(names: Sequence[str], worker: Worker, report: Report, *, seconds: float) -> list[Result]:
    """The checks that need a process group. All ranks leave out the same ones, where there is no time for them."""
    bench, until, results = Bench(worker), time.monotonic() + seconds, list[Result]()
    for name in names:
        in_time = all(gather(time.monotonic() < until))
        left_out = Result(name, "left out", f"not begun within {seconds:.0f} s")
        worst = gather(run_check(name, bench) if in_time else left_out)
        failed = (
            replace(r, detail=f"on rank {n}: {r.detail}") for n, r in enumerate(worst) if r.state == "failed"
        )
        results.append(next(failed, worst[0]))
    return results


def check_sum(bench: Bench) -> Figure:
    """Gradients summed by the step's own function are their sum: the largest difference."""
    shapes, world_size = [(8, 3, 3, 3), (8,), (10, 64)], bench.worker.world_size
    parameters = [nn.Parameter(torch.zeros(shape, device=bench.worker.device)) for shape in shapes]
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, (bench.worker.rank + 1) * (number + 1))
    sum_gradients(parameters, dist.all_reduce)
    ranks = world_size * (world_size + 1) // 2
    grads = [parameter.grad for parameter in parameters]
    worst = max(float((g - ranks * (n + 1)).abs().max()) for n, g in enumerate(grads) if g is not None)
    return worst, f"over {world_size} ranks, {len(shapes)} tensors, to {worst:g}"


def check_ranks(bench: Bench, engine: Engine, **changes: Any) -> Figure:
    """All ranks together train as one does alone, batch norm's statistics held still."""
    worker, ranks = bench.worker, bench.worker.world_size
    if ranks > IMAGES % BATCH:  # one that has no image of the last batch would be given another
        recipe = changes.get("recipe") or make_spec(worker).recipe
        changes |= {"recipe": replace(recipe, batch_size=2 * ranks), "images": 9 * ranks}
    one, _ = train(replace(worker, rank=0, world_size=1), **changes)
    together, weights = train(worker, engine=engine, **changes)
    sums = gather([float(value.double().sum()) for value in weights.values()])
    if any(each != sums[0] for each in sums):
        raise RuntimeError("the ranks end with different weights")
    return compare(together, one, f"those of one rank on {worker.world_size} ranks")


def check_group(bench: Bench) -> Figure:
    """A process group that has communicated ends soon: seconds."""
    group: Any = dist.new_group()
    dist.all_reduce(torch.ones(1, device=bench.worker.device), group=group)
    synchronize(torch.device(bench.worker.device))
    started_at = time.perf_counter()
    dist.destroy_process_group(group)
    seconds = time.perf_counter() - started_at
    return seconds, f"ended after {seconds:.2f} s"


if __name__ == "__main__":
    main(*sys.argv[1:])
