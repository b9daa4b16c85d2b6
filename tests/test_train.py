"""One run: the same seed gives the same losses, ranks add up to one process, nothing is lost by an interruption."""

from __future__ import annotations

import os
import resource
import socket
import time
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from safetensors.torch import load_file
from torch import nn

import harness.training.setup
from harness.cluster.job import Worker
from harness.loaders.datasets import limit, load_dataset
from harness.loaders.loader import make_loaders
from harness.loaders.resident import ResidentLoader
from harness.loaders.sampling import Augment, LoaderConfig, make_normalize
from harness.models.build import build
from harness.models.variants import find_variant
from harness.results.store import load_epochs, partial_dir, run_name
from harness.results.values import EpochMetrics, Measurement, RunResult
from harness.spec import CheckpointError, DivergedError, RunPaths, RunSpec
from harness.training.engine import Engine
from harness.training.memory import MemoryMeter
from harness.training.recipe import learning_rate, set_lr
from harness.training.setup import Data, Prepared, Trainer
from harness.training.step import Step, mix
from harness.training.telemetry import EpochReading, EpochTelemetry
from harness.training.train import run_steps, save_weights, train
from harness.training.watchdog import Watchdog


@cache
def fingerprint() -> str:
    return load_dataset("digits").fingerprint


def spec(**changes: Any) -> RunSpec:
    """ResNet-8 on 150 digits: two steps of 64 and a tail of 22."""
    variant = find_variant("he2015")(8)
    recipe = replace(variant.recipe, duration=3, unit="epoch", milestones=(2,), batch_size=64, lr=0.05)
    recipe = replace(recipe, **changes.pop("recipe", {}))
    whole: dict[str, Any] = {
        "variant": "he2015",
        "network": variant.network,
        "recipe": recipe,
        "dataset": "digits",
        "fingerprint": fingerprint(),
        "limit_train": 150,
        "loader": "resident",
        "device": "cpu",
    }
    return RunSpec(**(whole | changes))


def small(**changes: Any) -> RunSpec:
    """The same network on 40 digits, evaluated on 16: two steps of 16 and a tail of 8."""
    recipe = {"batch_size": 16} | changes.pop("recipe", {})
    return spec(**({"limit_train": 40, "limit_test": 16} | changes), recipe=recipe)


def run(asked: RunSpec, out: Path, stop_after: int | None = None) -> RunResult:
    def report(metrics: EpochMetrics) -> None:
        if metrics.epoch == stop_after:
            raise KeyboardInterrupt

    return train(asked, Worker(threads=1), report, paths=RunPaths(out=out, label="digits"))


def losses(result: RunResult) -> list[float]:
    return [row.loss for row in result.epochs]


def folder(asked: RunSpec, out: Path) -> Path:
    return partial_dir(out, run_name("digits", asked.variant, asked.network.depth, asked.seed, asked.key))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """An undisturbed run."""
    return run(spec(), tmp_path_factory.mktemp("whole"))


def test_a_run_learns_and_measures(whole: RunResult, tmp_path: Path) -> None:
    assert [row.epoch for row in whole.epochs] == [1, 2, 3]
    assert [row.images for row in whole.epochs] == [150, 150, 150]
    assert losses(whole)[-1] < 0.9 * losses(whole)[0]
    assert [row.lr for row in whole.epochs] == pytest.approx([0.05, 0.05, 0.005])
    assert [row.timed for row in whole.epochs] == [False, True, True]
    assert [row.untimed for row in whole.epochs] == ["warm-up", "", ""]
    assert whole.final_error == whole.epochs[-1].error
    assert whole.best_error == min(row.error for row in whole.epochs)
    assert whole.epoch_seconds == pytest.approx(np.median([row.train_seconds for row in whole.epochs[1:]]))
    assert whole.setup_seconds > 0
    assert whole.memory.rss_mib.value is not None
    assert whole.memory.rss_mib.value > 50
    assert whole.memory.nvml_process_mib.value is None
    assert whole.memory.nvml_process_mib.reason
    assert whole.parameters == sum(p.numel() for p in build(spec().network, 10).parameters())


def test_an_untimed_epoch_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = EpochReading(None, ("the machine swapped",))
    monkeypatch.setattr(EpochTelemetry, "stop", lambda *_: swapped)
    short = spec()
    short = replace(short, recipe=replace(short.recipe, duration=4, unit="step", milestones=()))  # 3 an epoch
    epochs = run(short, tmp_path).epochs
    assert [row.steps for row in epochs] == [3, 1]
    assert [row.untimed for row in epochs] == [
        "warm-up; interference: the machine swapped",
        "partial epoch; interference: the machine swapped",
    ]
    assert not any(row.timed for row in epochs)


def test_the_same_seed_gives_the_same_losses_bit_for_bit(whole: RunResult, tmp_path: Path) -> None:
    again = run(spec(), tmp_path / "again")
    assert losses(again) == losses(whole)
    assert [row.error for row in again.epochs] == [row.error for row in whole.epochs]
    assert losses(run(spec(seed=1), tmp_path / "other")) != losses(whole)


def test_what_is_learnt_is_counted_as_an_independent_loop_counts_it(tmp_path: Path) -> None:
    """Training errors are of each step's own logits, before it learns from them; evaluation's loss is the plain one."""
    asked = spec(recipe={"label_smoothing": 0.1})
    result = run(asked, tmp_path)
    made = harness.training.setup.prepare(asked, Worker(threads=1), RunPaths(out=tmp_path, label="digits"))
    network, optimizer = made.network, made.optimizer
    for epoch, row in enumerate(result.epochs):
        wrong, before = 0, row.train_seconds
        assert row.eval_seconds > 0 < before
        for step, (images, labels) in enumerate(made.train_loader.epoch(epoch)):
            set_lr(optimizer, learning_rate(asked.recipe, 3 * epoch + step, 3))
            logits = network(images)
            wrong += int((logits.argmax(1) != labels).sum())
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1).backward()
            optimizer.step()
        assert row.train_error is not None
        assert row.train_error == pytest.approx(100 * wrong / 150, abs=1.0), "of 150 images one may fall otherwise"
        network.eval()
        with torch.no_grad():
            every = [(network(images), labels) for images, labels in made.eval_loader.epoch(0)]
        network.train()
        logits, labels = (torch.cat(part) for part in zip(*every, strict=True))
        assert row.eval_loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-3)
        assert row.test_error is None, "the error is the test set's already"
    made.close()


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_interrupted_and_resumed_is_the_same_run(whole: RunResult, tmp_path: Path, stop_after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(spec(), tmp_path, stop_after=stop_after)
    assert [row.epoch for row in load_epochs(folder(spec(), tmp_path))] == list(range(1, stop_after + 1))
    resumed = run(spec(), tmp_path)
    assert losses(resumed) == losses(whole)
    for name in ("train_error", "error", "eval_loss"):
        assert [getattr(row, name) for row in resumed.epochs] == [getattr(row, name) for row in whole.epochs]
    assert resumed.final_error == whole.final_error
    assert resumed.attempts == 2
    assert [row.attempt for row in resumed.epochs] == [1] * stop_after + [2] * (3 - stop_after)
    assert len(load_epochs(folder(spec(), tmp_path))) == 3


def test_a_damaged_checkpoint_falls_back_aloud(whole: RunResult, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(spec(), tmp_path, stop_after=2)
    kept = sorted((folder(spec(), tmp_path) / "checkpoints").glob("*.pt"))
    assert [path.name for path in kept] == ["epoch-000001.pt", "epoch-000002.pt"]
    kept[-1].write_bytes(kept[-1].read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"epoch-000002.pt is damaged, taking the one before"):
        resumed = run(spec(), tmp_path)
    assert losses(resumed) == losses(whole)
    assert [row.attempt for row in resumed.epochs] == [1, 2, 2]


def flip(path: Path) -> None:
    """Change a byte of a tensor, as a failing disk does."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewrite(path: Path, **changes: Any) -> None:
    torch.save(torch.load(path, weights_only=True) | changes, path)


DAMAGES: dict[str, Any] = {
    "checksum": flip,
    "not those of this run": lambda path: torch.save({"key": spec().key, "network": {}}, path),
    "directory": lambda path: (path.unlink(), path.mkdir()),
    "valid": lambda path: rewrite(path, history=[]),  # "Input should be a valid ..."
    "tensors": lambda path: rewrite(path, network={"conv.weight": torch.zeros(1)}),
}


@pytest.mark.parametrize("says", DAMAGES)
def test_a_checkpoint_that_is_wrong_inside_is_named_and_the_older_one_taken(
    says: str, whole: RunResult, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(spec(), tmp_path, stop_after=2)
    DAMAGES[says](folder(spec(), tmp_path) / "checkpoints" / "epoch-000002.pt")
    with pytest.warns(UserWarning, match=rf"epoch-000002.pt is damaged, taking the one before: .*{says}"):
        resumed = run(spec(), tmp_path)
    assert losses(resumed) == losses(whole)
    assert [row.attempt for row in resumed.epochs] == [1, 2, 2]


def test_a_damaged_checkpoint_costs_no_later_one(tmp_path: Path) -> None:
    """What is written after it has an older name, and is what counts."""
    with pytest.raises(KeyboardInterrupt):
        run(spec(), tmp_path, stop_after=2)
    folder_ = folder(spec(), tmp_path) / "checkpoints"
    (folder_ / "epoch-000009.pt").write_bytes(b"of another number of workers")
    (folder_ / "epoch-000009_step-000004.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(KeyboardInterrupt):
        run(spec(), tmp_path, stop_after=3)
    assert sorted(path.name for path in folder_.iterdir()) == ["epoch-000002.pt", "epoch-000003.pt"]


def test_a_disk_that_takes_no_checkpoint_is_named(whole: RunResult, tmp_path: Path) -> None:
    """torch says "unexpected pos 64 vs 0" of it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # bytes, of which a checkpoint has more
    try:
        with pytest.raises(OSError, match="File too large"):
            run(spec(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert losses(run(spec(), tmp_path)) == losses(whole)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(spec(), tmp_path, stop_after=1)
    other = spec(seed=3)
    folder(spec(), tmp_path).rename(folder(other, tmp_path))
    with pytest.raises(CheckpointError, match=f"belongs to run {spec().key}, not to {other.key}"):
        run(other, tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="not finite in epoch 1"):
        run(spec(recipe={"lr": 1e30}), tmp_path)


def test_other_images_than_planned_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the images on this node are"):
        run(spec(fingerprint="0" * 64), tmp_path)


def test_a_validation_split_and_the_test_set_are_evaluated_after_each_epoch(tmp_path: Path) -> None:
    held_out = spec(recipe={"val": 30, "mixup": 0.4, "label_smoothing": 0.1, "duration": 2})
    result = run(held_out, tmp_path)
    assert result.evaluated_on == "val"
    assert result.epochs[0].images == 120
    assert result.test_error is not None
    assert (result.final_error * 30 / 100) % 1 == pytest.approx(0, abs=1e-6)
    assert (result.test_error * 360 / 100) % 1 == pytest.approx(0, abs=1e-6)
    assert result.test_error == result.epochs[-1].test_error != result.epochs[0].test_error
    again = run(held_out, tmp_path)
    assert (again.test_error, again.epochs) == (result.test_error, result.epochs), "resumed after the last epoch"


def test_mixup_keeps_the_larger_part() -> None:
    images = torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    mixed = mix(images, 0.4, np.random.default_rng(0))
    reference = np.random.default_rng(0)
    share = np.maximum(lam := reference.beta(1.4, 0.4, 6), 1 - lam)
    partner = reference.permutation(6)
    expected = share * np.arange(6) + (1 - share) * partner
    assert mixed[:, 0, 0, 0].numpy() == pytest.approx(expected, abs=1e-6)
    assert share.min() >= 0.5
    assert mixed.is_contiguous(memory_format=torch.channels_last)


# --- two ranks against one ---


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


ENGINES = ("eager", "graph")


def _rank(rank: int, world: int, port: int, out: Path) -> None:
    """Two epochs of one rank by each engine, with batch norm frozen; rank 0 saves losses and weights."""
    torch.set_num_threads(1)
    if world > 1:
        address = f"tcp://127.0.0.1:{port}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    found = {engine: _train_rank(rank, world, spec(engine=engine)) for engine in ENGINES}
    if rank == 0:
        torch.save(found, out)
    if world > 1:
        torch.distributed.destroy_process_group()


def _train_rank(rank: int, world: int, asked: RunSpec) -> dict[str, Any]:
    data = load_dataset("digits")
    train_split = limit(data.train, 150)
    device = torch.device("cpu")
    config = LoaderConfig(
        augment=Augment(4, "zero", None, False),
        normalize=make_normalize("pixel-mean", train_split),
        batch_size=64,
        eval_batch_size=100,
        device=device,
        rank=rank,
        world_size=world,
    )
    loader, _ = make_loaders("resident", train_split, data.test, config)
    torch.manual_seed(0)
    network = build(asked.network, 10).double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    trained = nn.Sequential(_Double(), network)
    ddp = nn.parallel.DistributedDataParallel(trained) if world > 1 and asked.engine == "eager" else None
    step = Step(
        trained, optimizer, torch.amp.GradScaler("cpu", enabled=False), asked, torch.zeros(2, dtype=torch.float64),
        forward=ddp,
        all_reduce=torch.distributed.all_reduce if world > 1 and asked.engine == "graph" else None,
    )  # fmt: skip
    splits = Data(train_split, data.test, data.test, "test")
    prepared = Prepared(
        asked, splits, config, loader, loader, None, network, optimizer, step.scaler, MemoryMeter(device)
    )
    with closing(Watchdog(device)) as watchdog:
        trainer = Trainer(prepared, step, Engine("eager", step), Engine("eager", network), watchdog)
        seen = [run_steps(trainer, epoch=epoch, steps=loader.steps).loss for epoch in range(2)]
    return {"losses": seen, "weights": list(network.state_dict().values())}


class _Double(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.double()


def test_two_ranks_equal_one_on_the_same_global_batch(tmp_path: Path) -> None:
    """By DDP, and by the one all-reduce of a step that can be captured."""
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    _rank(0, 1, 0, one)
    run_ranks(_rank, 2, _port(), two)
    alone, together = torch.load(one, weights_only=True), torch.load(two, weights_only=True)
    for engine in ENGINES:
        a, b = alone[engine], together[engine]
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-6), engine
        for mine, theirs in zip(a["weights"], b["weights"], strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-6, atol=1e-9), engine


def test_seconds_of_waiting_for_the_loader_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(self: Any, epoch: int, first_step: int = 0) -> Any:
        for item in whole_epoch(self, epoch, first_step):
            time.sleep(0.05)
            yield item

    whole_epoch = ResidentLoader.epoch
    monkeypatch.setattr(ResidentLoader, "epoch", slow)
    result = run(spec(recipe={"duration": 2}), tmp_path)
    for row in result.epochs:
        assert 0.15 <= row.data_stall_seconds < 0.15 + row.train_seconds / 2
        assert row.data_stall_seconds < row.train_seconds


def test_runs_that_share_a_gpu_are_not_timed(tmp_path: Path) -> None:
    worker = Worker(threads=1, runs_per_gpu=2)
    paths = RunPaths(out=tmp_path, label="digits")
    result = train(spec(recipe={"duration": 2}), worker, lambda _: None, paths=paths)
    reason = "2 runs share the GPU"
    assert [row.untimed for row in result.epochs] == [f"warm-up; {reason}", reason]
    assert (result.epoch_seconds, result.runs_per_gpu) == (None, 2)
    assert result.energy_joules == Measurement(value=None, reason=reason)


def test_a_run_leaves_the_processors_arithmetic_as_it_was(tmp_path: Path) -> None:
    run(spec(recipe={"duration": 1}), tmp_path)
    assert float(torch.tensor(1e-310, dtype=torch.float64) * 1.0) != 0.0


def test_a_rank_alone_in_its_process_group_calls_no_collective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Train makes a group for one worker too, of NCCL on a GPU, which sets itself up at the first collective."""
    collectives = ("all_reduce", "broadcast", "all_gather_object", "barrier", "broadcast_object_list", "new_group")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a collective")

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for name in collectives:
            monkeypatch.setattr(dist, name, refuse)
        result = run(small(), tmp_path / "out")
    finally:
        monkeypatch.undo()
        dist.destroy_process_group()
    assert result.epochs


def test_others_may_read_weights_as_other_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_weights(SimpleNamespace(network=nn.Linear(3, 3), spec=spec()), tmp_path)  # type: ignore[arg-type]
    finally:
        os.umask(before)
    assert (tmp_path / "weights.safetensors").stat().st_mode & 0o777 == 0o640


def test_tied_weights_are_stored(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
            self.other.weight = self.one.weight

    network = Tied()
    save_weights(SimpleNamespace(network=network, spec=spec()), tmp_path)  # type: ignore[arg-type]
    Tied().load_state_dict(stored := load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(stored["other.weight"], network.one.weight)
