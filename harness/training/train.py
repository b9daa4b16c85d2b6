"""One run: `train(spec, worker, report, paths=...)` -> `RunResult`."""

from __future__ import annotations

import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist

from harness.cluster.job import PreemptedError, Worker
from harness.cluster.workers import count_ranks, gather
from harness.loaders.cache import cache_dir
from harness.loaders.loader import Loader
from harness.models.build import count_flops
from harness.results.remote import CHECKPOINTS, Remote, pull_run, push_run
from harness.results.store import append_epoch, write_epochs
from harness.results.values import EpochMetrics, Measurement, RunResult, summarise_epochs
from harness.spec import DivergedError, RunPaths, RunSpec
from harness.training.checkpoint import EpochPart, resume, save
from harness.training.evaluation import Evaluation, evaluate
from harness.training.memory import largest
from harness.training.rates import find_peak
from harness.training.recipe import augment, learning_rate, set_lr, total_epochs, total_steps
from harness.training.setup import Prepared, Trainer, prepare, training
from harness.training.step import deterministic_algorithms, draw_mix, mix
from harness.training.telemetry import (
    INTERFERENCE,
    EpochTelemetry,
    describe_machine,
    device_name,
    summarise_rank,
)

OUTLIER_MADS, OUTLIER_SHARE = 5.0, 0.25
WARMUP_EPOCHS = 1  # of every attempt: first kernels, first allocations, caches that fill
push_all = partial(push_run, checkpoints=True)  # by rank 0 alone


class StoppedError(Exception):
    """An epoch was left; its argument is the part that was done."""


def train(spec: RunSpec, worker: Worker, report: Callable[[EpochMetrics], None], *, paths: RunPaths) -> RunResult:
    """Train and measure one run, in this process as one of `worker.world_size` ranks.

    Resumes from the newest checkpoint in the run's folder. Raises DivergedError when the loss is not finite,
    CheckpointError for another run's checkpoint, DataError when the images are not those of the spec, PreemptedError when
    the worker had to leave, RankStalledError when no step was made for `worker.stall_seconds`.
    """
    entered_at = time.perf_counter()
    warnings_seen: list[str] = []

    def warn(message: str) -> None:
        warnings_seen.append(message)
        warnings.warn(message, stacklevel=2)

    # graphs and loaders are closed however the run ends
    with deterministic_algorithms(spec), ExitStack() as stack:
        # denormal numbers cost a CPU many times as much, and a constant batch's vanishing gradients are full of them
        torch.set_flush_denormal(True)
        stack.callback(torch.set_flush_denormal, False)
        run = stack.enter_context(closing(prepare(spec, worker, paths, warn)))
        folder, remote = paths.partial(spec), Remote(paths.remote, warn)
        for turn in (0, 1):  # rank 0 first: it may have newer checkpoints than the store, which gets them
            if turn == min(worker.rank, 1):
                # each may be on a node of its own
                remote.copy(partial(pull_run, only="" if worker.rank == 0 else CHECKPOINTS), folder)
            gather(turn)
        history, part = resume(run, folder)
        first, before = len(history), part or next(reversed(history), None)
        attempt = before.attempt + 1 if before else 1
        if worker.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_epochs(folder, history)
        trainer = stack.enter_context(training(run, worker, folder / "stacks"))
        telemetry = stack.enter_context(closing(EpochTelemetry(run.device)))
        whole, steps_in_all = run.train_loader.steps, total_steps(spec.recipe, run.train_loader.steps)
        epochs = total_epochs(spec.recipe, whole)
        setup_seconds = time.perf_counter() - entered_at
        on_test: Evaluation | None = None

        for epoch in range(first, epochs):
            steps = min(whole, steps_in_all - epoch * whole)
            try:
                metrics, on_test = run_epoch(trainer, telemetry, epoch=epoch, steps=steps, part=part)
            except StoppedError as stopped:
                done: EpochPart = stopped.args[0]
                reading = telemetry.stop(done.train_seconds)
                spent = {"energy_joules": reading.energy_joules, "interference": reading.interference}
                leave(run, folder, remote, history, done.model_copy(update={"attempt": attempt} | spent))
            shared, other_width = worker.runs_per_gpu > 1, worker.world_size != spec.workers
            untimed = {
                "warm-up": epoch - first < WARMUP_EPOCHS < epochs,
                "partial epoch": steps < whole,
                "stopped within it and resumed": part is not None,
                f"interference: {', '.join(metrics.interference)}": metrics.interference,
                f"{worker.runs_per_gpu} runs share the GPU": shared,
                f"another width: {worker.world_size} workers": other_width,
            }
            why = "; ".join(reason for reason, met in untimed.items() if met)
            update: dict[str, Any] = {"attempt": attempt, "timed": not why, "untimed": why}
            update |= {"workers": worker.world_size} if other_width else {}
            update |= {"energy_joules": None} if shared else {}
            metrics, part = metrics.model_copy(update=update), None
            history.append(metrics)
            run.meter.sample()
            if epoch - first + 1 == WARMUP_EPOCHS < epochs - first:
                run.meter.reset()
            if worker.rank == 0:
                if kept := (epoch + 1) % paths.checkpoint_every == 0 or epoch + 1 == epochs:
                    save(run, folder, history)
                append_epoch(folder, metrics)
                if kept:
                    remote.push(push_all, folder)
            report(metrics)
            if epoch + 1 < epochs and trainer.halt.leaves():
                leave(run, folder, remote, history, None)

        memory = trainer.measure_memory()  # of training alone: weights are saved by way of copies
        if worker.rank == 0:
            save_weights(run, folder)
            remote.copy(push_all, folder)
        history = mark_outliers(history)
        if run.test_loader and on_test is None:  # resumed after the last epoch
            on_test = run_eval(trainer, run.test_loader, len(run.data.test))
        tested: dict[str, Any] = {f"test_{name}": getattr(on_test, name, None) for name in ("error", "top5_error")}
        return RunResult(
            **summarise_history(history, run.data.eval_split, spec.workers),
            parameters=sum(p.numel() for p in trainer.step.parameters),
            evaluated_images=len(run.data.eval),
            test_images=len(run.data.test) if on_test else None, **tested,
            warmup_epochs=WARMUP_EPOCHS if epochs > 1 else 0,
            setup_seconds=setup_seconds, launch_seconds=worker.launch_seconds,
            energy_joules=total_energy(history, worker),
            memory=largest(gather(memory)),
            batch_size=spec.recipe.batch_size, batch_size_per_gpu=spec.recipe.batch_size // spec.workers,
            threads=worker.threads, runs_per_gpu=worker.runs_per_gpu,
            device=device_name(run.device), machine=describe_machine(run.device), **count_work(run, worker, paths),
            engine=trainer.engine.name, attempts=attempt,
            warnings=tuple(dict.fromkeys(chain(*gather(warnings_seen)))),
            ranks=tuple(gather(summarise_rank(worker.rank, memory, history[first:]))),
        )  # fmt: skip


def count_work(run: Prepared, worker: Worker, paths: RunPaths) -> dict[str, Any]:
    """The fields of a result that MFU is of: the network's FLOPs and the device's peak, which is kept for other runs: where runs
    share a GPU, or concurrent ones the processors, none is measured. Known to rank 0 alone."""
    if worker.rank or worker.runs_per_gpu > 1 or (worker.device == "cpu" and worker.concurrent_runs > 1):
        return {}
    try:
        forward = count_flops(run.network, run.loader_config.augment.crop_size(run.data.train)[0])
        peak = find_peak(run.device, run.spec.precision, worker.threads, paths.cache_dir or cache_dir())
    except Exception as error:  # of a network of any kind; the run itself is whole
        run.loader_config.warn(f"no MFU: {type(error).__name__}: {error}")
        return {}
    return {"forward_flops": forward, "peak_flops": peak.flops, "peak_source": peak.source}


def run_epoch(
    trainer: Trainer, telemetry: EpochTelemetry, *, epoch: int, steps: int, part: EpochPart | None = None
) -> tuple[EpochMetrics, Evaluation | None]:
    """Train an epoch, or what is left of it after a part, and evaluate what it came to, on the test set too where other
    images are held out.

    A collective. Raises DivergedError, and StoppedError with the part that was done, whose telemetry goes on.
    """
    run = trainer.run
    trainer.halt.epoch()
    telemetry.start(*([part.energy_joules], part.interference) if part else ())
    metrics = run_steps(trainer, epoch=epoch, steps=steps, part=part)
    trainer.watchdog.moved()
    if not math.isfinite(metrics.loss):
        raise DivergedError(epoch + 1, (epoch + 1) * run.train_loader.steps)
    if count_ranks() > 1:
        for buffer in run.network.buffers():
            dist.broadcast(buffer, 0)
    reading = telemetry.stop(metrics.train_seconds)
    evaluating_at = time.perf_counter()
    evaluation = run_eval(trainer, run.eval_loader, len(run.data.eval))
    on_test = run_eval(trainer, run.test_loader, len(run.data.test)) if run.test_loader else None
    measured = asdict(reading) | asdict(evaluation) | {
        "test_error": on_test.error if on_test else None, "eval_seconds": time.perf_counter() - evaluating_at,
    }  # fmt: skip
    return metrics.model_copy(update=measured), on_test


def leave(
    run: Prepared, folder: Path, remote: Remote, history: Sequence[EpochMetrics], part: EpochPart | None
) -> NoReturn:
    """Write a checkpoint of this very step, if there is none, and raise PreemptedError. A collective."""
    if run.loader_config.rank == 0:
        if history or (part and part.steps):
            save(run, folder, history, part if part and part.steps else None)
        remote.push(push_all, folder)
    gather(None)  # the first rank to raise ends the others
    step = f"step {part.steps + 1} of epoch {len(history) + 1}" if part else f"epoch {len(history) + 1}"
    raise PreemptedError(f"stopped before {step}")


def save_weights(run: Prepared, folder: Path) -> None:
    """Write the trained network, and whose it is."""
    copied = {"memory_format": torch.contiguous_format, "copy": True}  # tied ones may not share memory
    weights = {name: tensor.to("cpu", **copied) for name, tensor in run.network.state_dict().items()}
    about = {"key": run.spec.key, "variant": run.spec.variant, "depth": str(run.spec.network.depth)}
    about["spec"] = json.dumps(run.spec.to_json())
    # not save_file, whose files their owner alone can read
    (folder / "weights.safetensors").write_bytes(safetensors.torch.save(weights, metadata=about))


def run_steps(trainer: Trainer, *, epoch: int, steps: int, part: EpochPart | None = None) -> EpochMetrics:
    """Train the first `steps` steps of an epoch, if it has as many, but for a part that was done before, timed from the request
    for the first batch to the last written weight. No step waits for its own end. Raises StoppedError where the ranks stop."""
    run, loader, recipe = trainer.run, trainer.run.train_loader, trainer.run.spec.recipe
    steps = min(steps, loader.steps)
    rank, world_size = run.loader_config.rank, run.loader_config.world_size
    mixed = recipe.mixup and recipe.mixup_partner == "batch"
    # of mixup alone: the loader's plan has its own, and so has each augmentation
    random = np.random.default_rng([run.spec.seed, epoch, rank])
    part = part or EpochPart(steps=0, sums=[[0.0] * 3] * world_size, train_seconds=0.0, data_stall_seconds=0.0)
    first, stall_seconds, train_seconds = part.steps, part.data_stall_seconds, part.train_seconds
    *before_it, seen = part.sums[rank]
    totals = trainer.step.totals.copy_(trainer.step.totals.new_tensor(before_it))
    for count in run.batch_sizes(run.data.train, recipe.batch_size)[:first] if mixed else ():
        draw_mix(count, recipe.mixup, random)
    lr, stopped, done = float("nan"), False, first
    trainer.watchdog.finish()
    trainer.watchdog.moved()
    started_at = requested_at = time.perf_counter()
    for step, (images, labels) in enumerate(islice(loader.epoch(epoch, first), steps - first), first):
        stall_seconds += time.perf_counter() - requested_at
        if stopped := not trainer.halt.may_begin():
            break
        trainer.watchdog.begin()
        before, lr = lr, learning_rate(recipe, epoch * loader.steps + step, loader.steps)
        if lr != before:
            set_lr(run.optimizer, lr)
        if run.spec.plugins:  # their modules may draw (dropout); none of ours does
            seeds = np.random.SeedSequence([run.spec.seed, epoch, step, rank])
            torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))
        if recipe.augmentations:
            place = run.spec.seed, epoch, step
            images = augment(recipe, images, (rank, world_size), place, run.global_images(step))
        if mixed:
            images = mix(images, recipe.mixup, random)
        trainer.step.mark("data")
        trainer.engine(images, labels, run.global_images(step))
        trainer.watchdog.step()
        seen, done = seen + len(labels), step + 1
        requested_at = time.perf_counter()
    if not stopped and done < steps:
        raise RuntimeError(f"loader {run.spec.loader} gave {done} of the {steps} batches of an epoch")
    stopped = stopped or not trainer.halt.may_begin()  # the evaluation
    trainer.watchdog.finish()
    trainer.watchdog.rest()
    train_seconds += time.perf_counter() - started_at
    if stopped:
        every = gather([*totals.tolist(), seen])
        raise StoppedError(
            EpochPart(steps=done, sums=every, train_seconds=train_seconds, data_stall_seconds=stall_seconds)
        )
    # of its last step, done before or not
    lr = learning_rate(recipe, epoch * loader.steps + steps - 1, loader.steps)
    sums = torch.cat([totals, torch.full_like(totals[:1], seen)])
    if count_ranks() > 1:
        dist.all_reduce(sums)
    loss_sum, wrong, all_seen = sums.tolist()
    return EpochMetrics(
        epoch=epoch + 1, steps=steps, images=round(all_seen), loss=loss_sum / all_seen, lr=lr,
        train_error=100 * wrong / all_seen, error=math.nan, eval_seconds=0.0, train_seconds=train_seconds,
        data_stall_seconds=stall_seconds, images_per_second=all_seen / train_seconds,
    )  # fmt: skip


def run_eval(trainer: Trainer, loader: Loader, images: int) -> Evaluation:
    """Evaluate the network as the run does: by its own engine, in its own precision."""
    evaluation = evaluate(
        trainer.run.network, loader, images=images, precision=trainer.run.spec.precision, forward=trainer.forward,
        on_ranked=lambda _: trainer.watchdog.moved(),
    )  # fmt: skip
    trainer.watchdog.rest()
    return evaluation


def mark_outliers(history: Sequence[EpochMetrics]) -> list[EpochMetrics]:
    """The epochs, those marked as untimed that are far slower than the run's others: a second opinion, at its end.

    Above the median by OUTLIER_MADS median absolute deviations, and by OUTLIER_SHARE of it. From five epochs on.
    """
    timed = [row.train_seconds for row in history if row.timed]
    if len(timed) < 5:
        return list(history)
    centre = statistics.median(timed)
    spread = statistics.median(abs(seconds - centre) for seconds in timed)
    limit = centre + max(OUTLIER_MADS * spread, OUTLIER_SHARE * centre)
    outlier = {"timed": False, "untimed": "outlier: far slower than this run's other epochs"}
    return [row.model_copy(update=outlier) if row.timed and row.train_seconds > limit else row for row in history]


def why_no_energy(worker: Worker) -> str:
    """Of a run with such workers."""
    if worker.runs_per_gpu > 1:
        return f"{worker.runs_per_gpu} runs share the GPU"
    return "no GPU was used" if worker.device == "cpu" else "NVML does not count this GPU's energy"


def total_energy(history: Sequence[EpochMetrics], worker: Worker) -> Measurement:
    """Joules of all epochs, with what they hold beside this run and what they lack; or why there is no such figure."""
    joules = [row.energy_joules for row in history if row.energy_joules is not None]
    if len(joules) < len(history) or worker.runs_per_gpu > 1:
        return Measurement(value=None, reason=why_no_energy(worker))
    shared = sum(INTERFERENCE[0] in row.interference for row in history)
    remarks = {
        "with the energy of other processes in {} epochs": shared,
        "{} disturbed epochs count": sum(bool(row.interference) for row in history) - shared,
        "without what {} interrupted attempts spent on epochs that were lost": history[-1].attempt - 1,
    }
    reason = "; ".join(remark.format(count) for remark, count in remarks.items() if count)
    return Measurement(value=sum(joules), reason=reason or None)


def summarise_history(history: Sequence[EpochMetrics], evaluated_on: str, workers: int) -> dict[str, Any]:
    """The fields of a RunResult that follow from its epochs; `workers` is how many were asked for."""
    widths = tuple(width for width, _ in groupby(row.workers or workers for row in history))
    return summarise_epochs(history) | {
        "evaluated_on": evaluated_on, "epochs": tuple(history),
        "interference": tuple(dict.fromkeys(cause for row in history for cause in row.interference)),
        "workers": workers, "widths": () if widths == (workers,) else widths,
    }  # fmt: skip
