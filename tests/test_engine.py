"""Engines: the same losses from the same seed, drops of the lr that act, no trace of a warm-up."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import FRESH
from tape import Tape
from test_train import RunPaths, folder, losses, run, small, spec
from torch import Tensor, nn

import harness.training.setup
from harness.cluster.job import Worker
from harness.models.build import build
from harness.results.values import RunResult
from harness.training.engine import Engine, choose, compile_network, make_graphs
from harness.training.recipe import make_optimizer, set_lr
from harness.training.step import Step, make_autocast
from harness.training.train import train


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Graphs of the CPU in place of CUDA's; the list holds those that were made."""
    made: list[Tape] = []

    def make(device: torch.device) -> Callable[[], Tape]:
        def one() -> Tape:
            made.append(Tape())
            return made[-1]

        return one

    monkeypatch.setattr(harness.training.setup, "make_graphs", make)
    return made


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(small(), tmp_path_factory.mktemp("eager"))


def make_step(**changes: Any) -> Step:
    asked = spec(**changes)
    torch.manual_seed(0)
    network = build(asked.network, 10).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(asked.recipe, network, lr_on_device=asked.engine == "graph")
    return Step(
        network, optimizer, torch.amp.GradScaler("cpu", enabled=False), asked, torch.zeros(2, dtype=torch.float64),
    )  # fmt: skip


def capture(step: Step, make_graph: Callable[[], Any] = Tape, images: int = 16) -> Engine:
    """An engine that has captured the step for such a batch."""
    calls = [(*(tensor.to(step.totals.device) for tensor in batch(images)), images)]
    return choose([Engine("graph", step, make_graph), Engine("eager", step)], calls, pytest.fail, step.restoring)


def batch(images: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(images)
    pixels = torch.randn(images, 3, 32, 32, generator=random).contiguous(memory_format=torch.channels_last)
    return pixels, torch.randint(10, (images,), generator=random)


def everything(step: Step) -> list[Tensor]:
    momentum = [state["momentum_buffer"] for state in step.optimizer.state.values()]
    return [t.detach().clone() for t in (*step.parameters, *step.network.buffers(), *momentum, step.totals)]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_a_captured_run_is_the_eager_one_bit_for_bit(eager: RunResult, tapes: list[Tape], tmp_path: Path) -> None:
    captured = run(small(engine="graph"), tmp_path)
    assert losses(captured) == losses(eager)
    for name in ("train_error", "error", "eval_loss"):
        assert [getattr(row, name) for row in captured.epochs] == [getattr(row, name) for row in eager.epochs]
    assert (captured.engine, eager.engine) == ("graph", "eager")
    # 16 and the tail of 8 each have a graph of their own, and so has the evaluation's one batch
    assert len(tapes) == 3
    assert captured.warnings == ()


def test_batch_norms_count_their_batches(tmp_path: Path, tapes: list[Tape]) -> None:
    from safetensors.torch import load_file

    for engine in ("eager", "graph"):
        asked = small(engine=engine)
        run(asked, tmp_path / engine)
        weights = load_file(folder(asked, tmp_path / engine) / "weights.safetensors")
        counts = [int(v) for name, v in weights.items() if name.endswith("num_batches_tracked")]
        assert set(counts) == {9}  # three epochs of three steps
        assert len(counts) == 7


def test_a_captured_run_resumes_bit_for_bit(eager: RunResult, tapes: list[Tape], tmp_path: Path) -> None:
    asked = small(engine="graph")
    with pytest.raises(KeyboardInterrupt):
        run(asked, tmp_path, stop_after=2)
    resumed = run(asked, tmp_path)
    assert losses(resumed) == losses(eager)
    assert resumed.attempts == 2


def test_a_checkpoint_serves_every_engine(
    eager: RunResult, tapes: list[Tape], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lr of the one is a tensor beside the weights, that of the other a number."""
    asked = small(engine="graph")
    with pytest.raises(KeyboardInterrupt):
        run(asked, tmp_path, stop_after=1)
    capture = Tape.capture
    monkeypatch.setattr(Tape, "capture", lambda _: 1 / 0)
    with pytest.warns(UserWarning, match="going on with eager"), contextlib.suppress(KeyboardInterrupt):
        run(asked, tmp_path, stop_after=2)
    monkeypatch.setattr(Tape, "capture", capture)
    resumed = run(asked, tmp_path)
    assert losses(resumed) == losses(eager)
    assert (resumed.engine, resumed.attempts) == ("graph", 3)


def test_the_lr_drops_inside_a_graph(tapes: list[Tape]) -> None:
    """A number that Python holds is frozen in a graph: with lr = 0 after the capture, nothing may move."""
    step = make_step(engine="graph", recipe={"weight_decay": 0.0, "momentum": 0.0})
    captured = capture(step)
    set_lr(step.optimizer, 0.1)
    captured(*batch(16), 16)
    moved = everything(step)
    set_lr(step.optimizer, 0.0)
    captured(*batch(16), 16)
    weights = len(step.parameters)
    assert equal(everything(step)[:weights], moved[:weights])
    set_lr(step.optimizer, 0.1)
    captured(*batch(16), 16)
    assert not equal(everything(step)[:weights], moved[:weights])


def test_the_stand_in_freezes_a_python_number() -> None:
    """The test above can fail: an lr that is no tensor goes on as it was captured."""
    step = make_step(recipe={"weight_decay": 0.0, "momentum": 0.0})
    captured = capture(step)
    set_lr(step.optimizer, 0.1)
    captured(*batch(16), 16)
    before = everything(step)
    set_lr(step.optimizer, 0.0)
    captured(*batch(16), 16)
    assert not equal(everything(step)[: len(step.parameters)], before[: len(step.parameters)])


def test_images_in_any_memory_format_are_replayed() -> None:
    """Those of a plug-in, say; a call of the function itself would be many times slower on a GPU, and still be called "graph"."""
    tapes: list[Tape] = []
    step, alone = make_step(engine="graph"), make_step(engine="graph")
    captured, (images, labels) = capture(step, lambda: tapes.append(Tape()) or tapes[-1]), batch(16)
    before = tapes[0].replays
    captured(images.contiguous(), labels, 16)
    assert tapes[0].replays == before + 1
    alone(images, labels, 16)
    assert equal(everything(step), everything(alone))


def test_warm_up_and_capture_leave_no_trace() -> None:
    step, alone = make_step(engine="graph"), make_step()

    class Idle(Tape):
        """Does nothing at a replay: what is left then was left by warm-up and capture."""

        def replay(self) -> None:
            pass

    for one in (step, alone):  # with a momentum and statistics that are not those of the start
        one(*batch(16), 16)
    before = everything(step)
    capture(step, Idle)
    assert equal(everything(step), before)
    assert equal(before, everything(alone))


def test_no_trace_of_a_warm_up_in_the_loss_scale() -> None:
    """fp16's scaler counts its steps: its tensors are put back too."""
    step = make_step(engine="graph")
    step.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    step.scaler.scale(torch.zeros(()))
    with step.restoring():
        for _ in range(3):
            step(*batch(16), 16)
        assert step.scaler.get_scale() == 128.0
    assert step.scaler.get_scale() == 64.0
    assert step.scaler.state_dict()["_growth_tracker"] == 0


def test_an_engine_that_does_not_work_is_given_up_with_a_warning(
    eager: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(device: torch.device) -> Callable[[], Tape]:
        class Broken(Tape):
            def replay(self) -> None:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")

        return Broken

    monkeypatch.setattr(harness.training.setup, "make_graphs", broken)
    with pytest.warns(UserWarning, match="engine graph does not work here"):
        result = run(small(engine="graph"), tmp_path)
    assert losses(result) == losses(eager)
    assert result.engine == "eager"
    assert "going on with eager: operation not permitted when stream is capturing" in result.warnings[0]


def test_a_lack_of_memory_is_no_reason_to_give_an_engine_up() -> None:
    def hungry(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    engines = Engine("graph", hungry), Engine("eager", lambda x: x)
    with pytest.raises(torch.OutOfMemoryError):
        choose(engines, [(torch.zeros(1),)], pytest.fail)


class Small(nn.Module):
    """Without a length, as ours are: a compiled one then has no truth value."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, 10),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Any:
        return self.body(images)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: a CPU's kernels cannot be compiled")
def test_compiled_kernels_give_the_same_losses() -> None:
    """The sums of a batch norm are taken in another order, so equal to rounding alone."""
    plain, compiled = make_step(), make_step()
    for step in (plain, compiled):
        torch.manual_seed(0)
        network = Small()
        step.network, step.parameters = network, list(network.parameters())
        step.optimizer = make_optimizer(step.spec.recipe, network)
    compiled.forward = compile_network(compiled.network)
    seen = []
    for step in (plain, compiled):
        step(*batch(16), 16)
        first = float(step.totals[0])
        for _ in range(9):
            step(*batch(16), 16)
        seen.append(float(step.totals[0]))
        assert seen[-1] < 0.97 * 10 * first
    assert seen[1] == pytest.approx(seen[0], rel=1e-5)


def test_a_network_that_cannot_be_compiled_is_trained_all_the_same(
    eager: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(network: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(images: Tensor) -> Tensor:
            raise RuntimeError("no compiler")

        return forward

    monkeypatch.setattr(harness.training.setup, "compile_network", fails)
    with pytest.warns(UserWarning, match="engine compile does not work here, going on with eager: no compiler"):
        result = run(small(engine="compile"), tmp_path)
    assert losses(result) == losses(eager)
    assert result.engine == "eager"


def test_memory_does_not_grow_over_epochs(tmp_path: Path) -> None:
    asked = small(limit_train=16, recipe={"duration": 10})
    # a fresh process, free of what other tests left behind
    with ProcessPoolExecutor(1, FRESH) as fresh:
        results = [fresh.submit(run, asked, tmp_path / str(number)).result() for number in range(2)]
    growths = [result.memory.growth_mib_per_epoch.value for result in results]
    assert None not in growths
    assert min(growths) < 0.5  # what a process does for the first time stays in memory, whatever it trains
    result = results[-1]
    categories = result.memory.by_category_mib
    assert sum(categories.values()) == pytest.approx(result.memory.rss_mib.value)
    kernels = sum(p.numel() for p in nn.ParameterList(build(asked.network, 10).parameters()))
    assert categories["gradients"] == pytest.approx(kernels * 4 / 2**20)


def test_half_precision_weights_are_not_frozen_in_a_graph() -> None:
    """Autocast may keep weights that it has cast, and a graph would go on with those for ever."""
    network = nn.Conv2d(3, 4, 3)
    captured = Engine("graph", network, Tape)
    images, _ = batch(2)
    seen = []
    for _ in range(2):
        with torch.no_grad(), make_autocast(torch.device("cpu"), "bf16"):
            captured.prepare(images)
            seen.append(captured(images).clone())
        with torch.no_grad():
            network.weight.mul_(2)
    assert seen[0].dtype == torch.bfloat16
    assert not torch.equal(*seen)


# --- on a GPU ---


def run_on_gpu(out: Path, **changes: Any) -> RunResult:
    paths = RunPaths(out=out, label="digits")
    return train(spec(device="cuda", **changes), Worker(device="cuda:0", threads=1), lambda _: None, paths=paths)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("loader", ["resident", "dali"])
def test_a_cuda_graph_gives_eagers_losses(tmp_path: Path, precision: str, loader: str) -> None:
    """The same kernels on the same numbers; cuDNN may sum a weight's gradient in any order, so to rounding."""
    ways = {
        engine: run_on_gpu(tmp_path / engine, engine=engine, precision=precision, loader=loader)
        for engine in ("eager", "graph", "compile")
    }
    assert {engine: way.engine for engine, way in ways.items()} == {engine: engine for engine in ways}
    tolerance = 1e-3 if precision == "fp32" else 2e-2
    for engine in ("graph", "compile"):
        assert losses(ways[engine]) == pytest.approx(losses(ways["eager"]), rel=tolerance)


@pytest.mark.gpu
def test_a_real_capture_leaves_no_trace_and_reads_the_lr(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    asked = spec(device="cuda", engine="graph", recipe={"momentum": 0.0, "weight_decay": 0.0})
    made = harness.training.setup.prepare(
        asked, Worker(device="cuda:0", threads=1), RunPaths(out=tmp_path, label="digits")
    )
    step = harness.training.setup.make_step(made, ddp=False)
    before = everything(step)
    captured = capture(step, make_graphs(device), 64)
    images, labels = (tensor.to(device) for tensor in batch(64))
    assert equal(everything(step), before)
    set_lr(step.optimizer, 0.0)
    captured(images, labels, 64)
    weights = len(step.parameters)
    assert equal(everything(step)[:weights], before[:weights])
    counts = [int(norm.num_batches_tracked) for norm in step.norms]
    assert set(counts) == {1}, "one replay, and nothing of warm-up and capture"
    set_lr(step.optimizer, 0.1)
    captured(images, labels, 64)
    assert not equal(everything(step)[:weights], before[:weights])


@pytest.mark.gpu
def test_categories_add_up_to_what_nvml_counts(tmp_path: Path) -> None:
    memory = run_on_gpu(tmp_path, engine="graph").memory
    assert memory.by_category_mib["activations"] > 0
    assert memory.by_category_mib["CUDA context"] > 100
    if memory.nvml_process_mib.value is not None:
        assert sum(memory.by_category_mib.values()) == pytest.approx(memory.nvml_process_mib.value)
