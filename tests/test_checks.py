"""What `harness check` measures: all of it passes here, and each check sees the faults that it is for."""

from __future__ import annotations

import contextlib
import copy
import json
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import ask_two_ranks
from tape import Arena, Tape, install_collectives

import harness.training.train as training
from harness.checklist import BY_NAME, CHECKS, SHOW
from harness.cluster.job import Worker
from harness.loaders.sampling import SamplingPlan
from harness.results.values import EpochMetrics
from harness.training import checks, setup, step
from harness.training.checks import Bench, check_precision, check_ranks, run_check
from harness.training.rates import instant

ALONE = Worker(threads=1)
Plant = Callable[[pytest.MonkeyPatch], None]


# --- faults ---


def feed(change: Callable[[Any, Any], Any]) -> Plant:
    """A loader whose batches are changed so."""
    make = setup.make_loaders

    def made(*args: Any) -> Any:
        loader, other = make(*args)
        epoch = loader.epoch
        return SimpleNamespace(
            epoch=lambda number: (change(*batch) for batch in epoch(number)), steps=loader.steps, close=loader.close
        ), other  # fmt: skip

    return lambda patch: patch.setattr(setup, "make_loaders", made)


def scale_gradients(factor: float, noise: float = 0.0) -> Plant:
    """The optimizer sees gradients that are wrong so."""
    update = torch.optim.SGD.step

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        for gradient in [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]:
            gradient.mul_(factor + noise * torch.randn(gradient.shape, generator=generator))
        return update(self, *args, **kwargs)

    generator = torch.Generator().manual_seed(0)
    return lambda patch: patch.setattr(torch.optim.SGD, "step", scaled)


def freeze_lr(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(training, "set_lr", lambda *_: None)


def break_capture(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Tape, "capture", lambda _: 1 / 0)


def compile_a_copy(patch: pytest.MonkeyPatch) -> None:
    """As a compiler that takes weights for constants."""
    patch.setattr(setup, "compile_network", copy.deepcopy)


def compile_wrongly(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(setup, "compile_network", lambda network: lambda images: network(images) * 1.02)


def compute_in_fp32(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(step, "make_autocast", lambda *_: torch.autocast("cpu", enabled=False))


def keep_weights_in_bf16(patch: pytest.MonkeyPatch) -> None:
    update = torch.optim.SGD.step

    def rounded(self: Any, *args: Any, **kwargs: Any) -> None:
        update(self, *args, **kwargs)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.copy_(parameter.data.bfloat16())

    patch.setattr(torch.optim.SGD, "step", rounded)


def never_unscale(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.amp.GradScaler, "step", lambda _, optimizer: optimizer.step())


def run_fast(patch: pytest.MonkeyPatch) -> None:
    real = checks.time
    fake = SimpleNamespace(perf_counter=lambda: 1.05 * real.perf_counter(), clock_gettime=real.clock_gettime,
                           CLOCK_MONOTONIC_RAW=real.CLOCK_MONOTONIC_RAW)  # fmt: skip
    patch.setattr(checks, "time", fake)


def own(name: str) -> Plant:
    """Less of a run's memory has a category than there is."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(checks, "judge_memory", lambda _: judge({"weights": 90.0, name: 10.0}))

    judge = checks.judge_memory
    return plant


FAULTS: dict[str, list[Plant]] = {
    "eager": [scale_gradients(0.0), scale_gradients(-1.0)],
    **{f"loader {name}": [feed(lambda i, n: (i, n.roll(1))), feed(lambda i, n: (i.flip(3), n)),
                          feed(lambda i, n: (i.roll(1, 0), n)), feed(lambda i, n: (i + 2e-4, n))]
       for name in ("resident", "dataloader", "dali")},
    "engine graph": [freeze_lr, break_capture, scale_gradients(1.02)],
    "engine compile": [compile_a_copy, compile_wrongly, scale_gradients(1.02)],
    "precision bf16": [compute_in_fp32, keep_weights_in_bf16, freeze_lr],
    "precision fp16": [compute_in_fp32, never_unscale, freeze_lr],
    "resume": [lambda patch: patch.setattr(torch.optim.SGD, "load_state_dict", lambda *_: None),
               lambda patch: patch.setattr(checks, "resume", lambda *_: [None] * 2)],
    "memory": [own("unaccounted")],
    "clock": [run_fast],
}  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> list[EpochMetrics]:
    return Bench(ALONE).eager


@pytest.fixture
def bench(reference: list[EpochMetrics], monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The CPU, with tapes for graphs, nothing that compiles, and a memory of which every part has a category."""
    monkeypatch.setattr(setup, "make_graphs", lambda _: Arena())
    monkeypatch.setattr(setup, "compile_network", lambda network: network)
    judge = checks.judge_memory
    monkeypatch.setattr(checks, "judge_memory", lambda _: judge({"weights": 99.0, "unaccounted": 1.0}))
    made = Bench(ALONE)
    made.__dict__["eager"] = list(reference)
    return made


@pytest.fixture
def half(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU computes in fp16, too, where it is not refused."""
    monkeypatch.setattr(Bench, "on_gpu", property(lambda _: sys._getframe(1).f_code.co_name == "run_check"))


@pytest.mark.usefixtures("half")
@pytest.mark.parametrize("name", FAULTS)
def test_a_check_passes_and_sees_each_of_its_faults(
    name: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_check(name, bench)
    assert whole.state == "passed", whole
    for plant in FAULTS[name]:
        with monkeypatch.context() as patch:
            plant(patch)
            if name == "eager":
                del bench.__dict__["eager"]
            faulty = run_check(name, bench)
        assert faulty.state == "failed", faulty


def test_another_order_of_sums_is_no_fault(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits lie above what rounding does: here as that of Winograd's convolutions, 2^-16 of every gradient."""
    scale_gradients(1.0, 2.0**-16)(monkeypatch)
    figure, _ = checks.check_engine(bench, "eager")
    assert 0 < figure < BY_NAME["engine graph"].limit / 3


def test_a_resumed_run_is_compared_by_deterministic_algorithms(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = list[bool]()

    def note(spec: Any) -> Any:
        entered.append(spec.deterministic)
        return contextlib.nullcontext()

    monkeypatch.setattr(checks, "deterministic_algorithms", note)
    assert run_check("resume", bench).state == "passed"
    assert entered == [True] * 3


def test_what_cannot_be_checked_is_skipped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    lines = [run_check(name, bench).line() for name in ("engine graph", "precision fp16", "memory")]
    assert [line.split()[0] for line in lines] == ["skipped"] * 3
    monkeypatch.setitem(sys.modules, "harness.loaders.dali", None)
    assert run_check("loader dali", bench).state == "skipped"


def test_the_program_prints_a_line_for_each(bench: Bench, capsys: Any) -> None:
    checks.main("cpu", "1", "clock", "seconds per step")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row[:3] for row in rows] == [["check", "clock", "passed"], ["check", "seconds per step", "passed"]]


# --- two ranks ---


def reduce_to_mean(patch: pytest.MonkeyPatch) -> None:
    whole = checks.sum_gradients

    def mean(parameters: Any, all_reduce: Any) -> None:
        whole(parameters, all_reduce)
        for parameter in parameters:
            parameter.grad.div_(2)

    patch.setattr(checks, "sum_gradients", mean)
    patch.setattr(step, "sum_gradients", mean)


def one_rank_is_wrong(patch: pytest.MonkeyPatch) -> None:
    """Rank 1 computes gradients that are 5 % too large."""

    def hooked(wrap: Any) -> Any:
        def made(network: Any, *args: Any) -> Any:
            for parameter in network.parameters() if dist.get_rank() == 1 else ():
                parameter.register_hook(lambda gradient: gradient * 1.05)
            return wrap(network, *args)

        return made

    patch.setattr(setup, "wrap_ddp", hooked(setup.wrap_ddp))


def ranks_drift(patch: pytest.MonkeyPatch) -> None:
    """Gradients are not summed at all."""
    patch.setattr(step.Step, "__call__", _alone(step.Step.__call__))


def _alone(whole: Any) -> Any:
    def call(self: Any, *args: Any) -> None:
        ddp = isinstance(self.forward, torch.nn.parallel.DistributedDataParallel)
        with self.forward.no_sync() if ddp else warnings.catch_warnings():
            whole(self, *args)

    return call


def end_slowly(patch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 600, 6))
    patch.setattr(checks, "time", SimpleNamespace(perf_counter=lambda: next(now), monotonic=checks.time.monotonic))


RANK_FAULTS: dict[str, list[Plant]] = {
    "sum of gradients": [reduce_to_mean],
    "ranks eager": [one_rank_is_wrong, ranks_drift],
    "ranks graph": [reduce_to_mean],
    "process group": [end_slowly],
}


def check_rank(rank: int, folder: Path) -> list[list[Any]]:
    """Results without a fault, then with each, as [fault, name, state, detail]."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    install_collectives()
    patch = pytest.MonkeyPatch()
    patch.setattr(setup, "make_graphs", lambda _: Arena())
    patch.setattr(Bench, "on_gpu", property(lambda _: sys._getframe(1).f_code.co_name == "run_check"))
    worker = Worker(rank=rank, world_size=2, threads=1)

    def run(names: list[str], seconds: float) -> Any:
        return checks.run_rank_checks(names, worker, lambda _: None, seconds=seconds)

    found = [["", *vars_of(r)] for r in run(list(RANK_FAULTS), 100.0)]
    for name, plants in RANK_FAULTS.items():
        for plant in plants:
            with patch.context() as own:
                plant(own)
                found += [[plant.__name__, *vars_of(r)] for r in run([name], 100.0)]
    # out of time on one rank alone
    found += [["late", *vars_of(r)] for r in run(["sum of gradients"], 100.0 * rank)]
    dist.destroy_process_group()
    return found


def vars_of(result: Any) -> list[str]:
    return [result.name, result.state, result.detail]


def test_two_ranks_pass_and_see_each_of_their_faults(tmp_path: Path) -> None:
    both = ask_two_ranks(check_rank, tmp_path)
    assert both[0] == both[1], "all ranks come to the same"
    for fault, name, state, detail in both[0]:
        assert state == ("left out" if fault == "late" else "failed" if fault else "passed"), (fault, name, detail)
    assert len(both[0]) == 4 + 5 + 1
    wrong = next(detail for fault, _, _, detail in both[0] if fault == "ranks_drift")
    assert "the ranks end with different weights" in wrong


@pytest.mark.parametrize("ranks", [2, 11, 12, 16, 64])
def test_each_of_many_ranks_has_images_of_every_batch(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a batch is filled up, and they train on others than one rank does."""
    seen = []

    def look(worker: Worker, **changes: Any) -> tuple[list[Any], dict[str, Any]]:
        changes.pop("engine", None)
        with ExitStack() as stack:
            prepared, _ = checks.start(ALONE, stack, **changes)
            images, batch = len(prepared.data.train), prepared.spec.recipe.batch_size
        plans = [SamplingPlan(images, batch, rank=rank, world_size=ranks) for rank in range(ranks)]
        assert sum(len(plan.draw(0).index) for plan in plans) == images
        seen.append({len(plan.draw(0).batch_sizes) for plan in plans})
        return [SimpleNamespace(loss=1.0, steps=5)], {}

    monkeypatch.setattr(checks, "train", look)
    assert check_ranks(Bench(replace(ALONE, world_size=ranks)), "eager")[0] == 0
    assert seen == [{5}, {5}]


def test_a_gpu_without_tf32_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(RuntimeError, match="has no TF32"):
        check_precision(Bench(replace(ALONE, device="cuda:0")), "tf32")


def test_an_instant_is_one_of_the_devices_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event is recorded on the current device's stream, unless it is told another."""
    recorded = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: SimpleNamespace(record=lambda *on: recorded.append(on)))
    instant(torch.device("cuda", 1))
    assert recorded == [("stream of cuda:1",)]


def test_every_check_has_a_fault() -> None:
    seen = {check.function for check in CHECKS if check.name in {**FAULTS, **RANK_FAULTS}}
    assert seen == {check.function for check in CHECKS if check.otherwise != SHOW}
