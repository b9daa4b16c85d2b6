"""A run that has to leave stops before the same step in all ranks, and goes on from there bit for bit."""

from __future__ import annotations

import os
import re
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from processes import Command, ask_two_ranks, run_ranks
from records import make_epoch
from safetensors.torch import load_file
from test_train import RunPaths, Worker, folder, small

import harness.training.setup
from harness.cluster.job import PreemptedError
from harness.cluster.workers import store_of_run
from harness.results.store import load_epochs
from harness.results.values import EpochMetrics, RunResult
from harness.spec import RunSpec
from harness.training import checkpoint, halt
from harness.training.halt import Halt
from harness.training.setup import prepare
from harness.training.train import train

STEPS, EPOCHS = 3, 2
MIXED = {"mixup": 0.4, "mixup_partner": "batch", "duration": EPOCHS, "milestones": ()}


def mixed(recipe: dict[str, Any] | None = None, **changes: Any) -> RunSpec:
    """Three steps an epoch, and numbers drawn at each."""
    return small(recipe=MIXED | (recipe or {}), **changes)


def run(asked: RunSpec, out: Path, **worker: Any) -> RunResult:
    return train(asked, Worker(threads=1, **worker), lambda _: None, paths=RunPaths(out=out, label="digits"))


def content(asked: RunSpec, out: Path) -> list[Any]:
    """All that a run comes to, but for its seconds."""
    weights = load_file(folder(asked, out) / "weights.safetensors")
    epochs = load_epochs(folder(asked, out))
    figures = ("epoch", "steps", "images", "loss", "train_error", "error", "eval_loss", "lr")
    return [
        {name: sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in weights.items()},
        [[getattr(row, name) for name in figures] for row in epochs],
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunSpec, list[Any]]:
    out = tmp_path_factory.mktemp("whole")
    run(mixed(), out)
    return mixed(), content(mixed(), out)


class StopAt(Halt):
    """Stops before the step that is the `stop`th to be asked for, evaluations among them."""

    stop = 0

    def may_begin(self) -> bool:
        self._begun += 1
        return self._begun != self.stop


@pytest.mark.parametrize("stop", range(1, (STEPS + 1) * EPOCHS + 1))
def test_stopped_at_any_step_the_run_is_the_same(
    stop: int, whole: tuple[RunSpec, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, expected = whole
    epoch, step = divmod(stop - 1, STEPS + 1)
    with monkeypatch.context() as patch:
        patch.setattr(harness.training.setup, "Halt", StopAt)
        patch.setattr(StopAt, "stop", stop)
        with pytest.raises(PreemptedError, match=f"stopped before step {step + 1} of epoch {epoch + 1}"):
            run(asked, tmp_path)
    resumed = run(asked, tmp_path)
    assert content(asked, tmp_path) == expected
    attempts = [row.attempt for row in resumed.epochs]
    assert attempts == [1] * epoch + [2 if stop > 1 else 1] * (EPOCHS - epoch)
    marked = ["stopped within it and resumed" in row.untimed for row in resumed.epochs]
    assert marked == [step > 0 and row == epoch for row in range(EPOCHS)]
    assert not any(row.timed for row, mark in zip(resumed.epochs, marked, strict=True) if mark)
    kept = sorted(path.name for path in (folder(asked, tmp_path) / "checkpoints").iterdir())
    assert kept == ["epoch-000001.pt", "epoch-000002.pt"], "those within an epoch go when it ends"


def test_stopped_again_and_again(
    whole: tuple[RunSpec, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, expected = whole
    with monkeypatch.context() as patch:
        patch.setattr(harness.training.setup, "Halt", StopAt)
        patch.setattr(StopAt, "stop", 2)  # one step, and then no other
        for left in range((STEPS + 1) * EPOCHS - 1, 0, -1):
            with pytest.raises(PreemptedError):
                run(asked, tmp_path)
            kept = [path.name for path in (folder(asked, tmp_path) / "checkpoints").iterdir()]
            assert len(kept) <= 3, left
            assert sum("step" in name for name in kept) <= 1
    resumed = run(asked, tmp_path)
    assert content(asked, tmp_path) == expected
    assert not any(row.timed for row in resumed.epochs)
    assert all(row.train_seconds > row.data_stall_seconds > 0 for row in resumed.epochs)


def test_another_width_begins_the_epoch_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of an epoch are of ranks that no longer are."""
    asked = mixed()
    monkeypatch.setattr(harness.training.setup, "Halt", StopAt)
    monkeypatch.setattr(StopAt, "stop", STEPS + 3)
    with pytest.raises(PreemptedError):
        run(asked, tmp_path)
    path = folder(asked, tmp_path) / "checkpoints" / "epoch-000001_step-000001.pt"
    import torch

    state = torch.load(path, weights_only=True)
    state["part"]["sums"] *= 2
    torch.save(state, path)
    monkeypatch.setattr(StopAt, "stop", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PreemptedError, match="before step 2 of epoch 2"):
            run(asked, tmp_path)
    assert torch.load(path, weights_only=True)["part"]["sums"] != state["part"]["sums"]


def test_a_notice_stops_a_run_and_nothing_before(tmp_path: Path) -> None:
    """Asked from a thread while the run trains; the end of an epoch is waited for where there is time."""
    asked, ended = mixed(), list[EpochMetrics]()
    paths = RunPaths(out=tmp_path, label="digits")

    def notice() -> float | None:
        return time.time() + 1000 if len(ended) > 1 else None

    long = mixed(limit_train=1400, recipe={"duration": 40})
    with pytest.raises(PreemptedError, match="stopped before epoch"):
        train(long, Worker(threads=1, notice=notice), ended.append, paths=paths)
    newest = sorted((folder(long, tmp_path) / "checkpoints").iterdir())[-1]
    assert "step" not in newest.name
    with pytest.raises(PreemptedError, match=r"stopped before step \d+ of epoch"):
        run(long, tmp_path / "now", notice=time.time)
    assert run(asked, tmp_path / "never", notice=lambda: None).attempts == 1


def test_an_epoch_is_ended_only_where_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(halt.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(halt.time, "time", lambda: 1e9 + now[0])
    one = Halt(Worker())
    one.epoch()
    assert not one._ends_in_time(1e9 + 9999), "how long an epoch takes is not known"
    now[0] = 160.0
    one.epoch()
    now[0] = 190.0  # half of it
    left = 30 + halt.CHECKPOINT_SECONDS
    assert one._ends_in_time(1e9 + now[0] + left + 1)
    assert not one._ends_in_time(1e9 + now[0] + left - 1)


def train_two(rank: int, out: Path) -> list[Any]:
    """One rank of an undisturbed run, and of one in which rank 1 is told to leave twice. What each came to."""
    asked, stopped = mixed(workers=2, limit_train=320, recipe={"duration": 6}), list[str]()

    def attempt(name: str, number: int, notice: Any) -> None:
        meeting = f"file://{out / f'{name}-{number}'}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
        try:
            run(asked, out / name, rank=rank, world_size=2, notice=notice)
        except PreemptedError as error:
            stopped.append(str(error))
        dist.barrier()
        dist.destroy_process_group()

    attempt("whole", 0, None)
    for number in (1, 2):
        began = time.monotonic()
        after = began + 0.4 * number if rank == 1 else float("inf")
        attempt("left", number, lambda after=after: time.time() if time.monotonic() > after else None)
    attempt("left", 3, lambda: None)
    return [stopped, *(content(asked, out / name) for name in ("whole", "left"))]


def test_two_ranks_stop_before_the_same_step(tmp_path: Path) -> None:
    mine, theirs = ask_two_ranks(train_two, tmp_path)
    assert mine[0] == theirs[0], "where they stopped"
    assert len(mine[0]) == 2
    assert mine[1] == mine[2] == theirs[2], "bit for bit"


def train_three(rank: int, out: Path) -> None:
    """One rank of an undisturbed run, and of one that is begun twice: DDP sums in another order after its first step."""
    asked = mixed(workers=3)
    for name, number, stop in (("whole", 0, None), ("left", 1, 3), ("left", 2, None)):
        dist.init_process_group("gloo", init_method=f"file://{out / f'{name}-{number}'}", rank=rank, world_size=3)
        harness.training.setup.Halt, StopAt.stop = StopAt, stop or 0
        with suppress(PreemptedError):
            run(asked, out / name, rank=rank, world_size=3)
        dist.barrier()
        dist.destroy_process_group()
    assert content(asked, out / "whole") == content(asked, out / "left")


def test_three_ranks_go_on_bit_for_bit(tmp_path: Path) -> None:
    run_ranks(train_three, tmp_path, ranks=3)


def resume_two(rank: int, out: Path) -> list[Any]:
    """Rank 1's node does not see the newest checkpoint, as with NFS. From which epoch each goes on, and what it says."""
    dist.init_process_group("gloo", init_method=f"file://{out / 'meeting'}", rank=rank, world_size=2)
    said, paths = list[str](), RunPaths(out=out / str(rank), label="digits")
    row = make_epoch(1)
    asked = mixed(workers=2)
    with closing(prepare(asked, Worker(threads=1, rank=rank, world_size=2), paths, said.append)) as prepared:
        for epochs in (1, 2)[: 2 - rank]:
            checkpoint.save(prepared, paths.partial(asked), [row] * epochs)
        history, _ = checkpoint.resume(prepared, paths.partial(asked))
    dist.destroy_process_group()
    return [len(history), said]


def test_ranks_resume_from_the_same_checkpoint(tmp_path: Path) -> None:
    (mine, said), (theirs, nothing) = ask_two_ranks(resume_two, tmp_path)
    assert (mine, theirs, nothing) == (1, 1, [])
    assert re.fullmatch(r"not every rank can read checkpoint .*/epoch-000002\.pt, taking the one before", *said)


def test_the_next_run_of_kept_workers_does_not_read_that_the_last_one_had_to_stop(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        stores = [store_of_run("halt") for _ in (1, 2)]
        stores[0].set("stop", "1")
        assert [store.check(["stop"]) for store in stores] == [True, False]
    finally:
        dist.destroy_process_group()


RUN = "run --dataset digits --depths 8 --limit-train 640 --limit-test 64 --batch-size 8 --gpus 0 --loader resident --launcher local --epochs 2"


def test_sigterm_stops_a_command_at_a_step(tmp_path: Path) -> None:
    stopped = Command(f"{RUN} --out {tmp_path}/stopped")
    stopped.send_signal_at("epoch 1/2", signal.SIGTERM)
    code, rest = stopped.wait(60)
    assert code == 130, rest
    assert "stopped; the same command goes on from the last checkpoints" in rest
    assert len(list((tmp_path / "stopped").glob("*.partial/checkpoints/epoch-000001_step-*.pt"))) == 1
    for out in ("stopped", "whole"):
        _, text = Command(f"{RUN} --out {tmp_path}/{out}").wait(200)
        assert "done, final error" in text
    found = {
        out: [
            (path.parent.name, row.loss, row.error)
            for path in sorted((tmp_path / out).glob("*/epochs.jsonl"))
            for row in load_epochs(path.parent)
        ]
        for out in ("stopped", "whole")
    }
    assert len(found["whole"]) == 2
    assert found["stopped"] == found["whole"]


RANKS = "--dataset digits --limit-train 640 --batch-size 8 --gpus 0 --loader resident --workers 2 --epochs 2"


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.parametrize(
    ("words", "title"),
    [
        (f"run --depths 8 {RANKS} --launcher ray", b"RayTrainWorker"),
        (f"tune --depth 8 {RANKS} --samples 1 --search lr=choice(0.1)", b"ray::Peer"),
        (f"tune --depth 8 {RANKS} --samples 1 --search lr=choice(0.1)", b"ray::Rank0"),
    ],
)
def test_sigterm_to_one_worker_alone_ends_all_ranks_at_a_step(
    words: str, title: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def workers() -> Iterator[int]:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                ours = str(tmp_path).encode() in path.with_name("environ").read_bytes()
                if ours and title in path.read_bytes():
                    yield int(path.parent.name)

    monkeypatch.setenv("MARK", str(tmp_path))
    command = Command(f"{words} --out {tmp_path}/stopped")
    for line in command.stdout:
        if "epoch 1/2" in line:
            os.kill(next(workers()), signal.SIGTERM)
            break
    code, rest = command.wait(200)
    assert code == 0, rest
    assert re.search(r"a worker had to leave: stopped before step \d+ of epoch 2; trying again \(2\)", rest), rest
    code, rest = Command(f"{words} --out {tmp_path}/whole").wait(200)
    assert code == 0, rest
    (stopped,), (whole,) = (
        [[(row.loss, row.error) for row in load_epochs(path.parent)] for path in out.glob("*/record.json")]
        for out in (tmp_path / "stopped", tmp_path / "whole")
    )
    assert stopped == whole
    assert len(whole) == 2
