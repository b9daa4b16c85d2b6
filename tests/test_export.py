"""Stored runs in TensorBoard, MLflow and Weights & Biases: what was stored arrives, once."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from records import make_epoch, make_record

from harness.commands.report import export_runs
from harness.results.export import TARGETS, export
from harness.results.store import finish, load_records, start, write_epochs
from harness.results.values import EpochMetrics, Failure
from harness.spec import UserError


def make_epochs(seed: int) -> tuple[EpochMetrics, ...]:
    return tuple(
        make_epoch(k, loss=1 / k, error=10.0 - k + seed, train_seconds=2.0, eval_seconds=0.5, images_per_second=1.0)
        for k in (1, 2, 3)
    )  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two finished runs and one that failed after two epochs."""
    out = tmp_path / "runs"
    for seed in (0, 1):
        finish(out, make_record(seed, 7.0 + seed, result={"epochs": make_epochs(seed)}))
    failed = make_record(2, 0.0, failure=Failure(kind="NaN", message="loss is not finite"))
    write_epochs(start(out, failed.name, failed.spec), make_epochs(2)[:2])
    finish(out, failed)
    return out


def read_events(path: Path) -> Iterator[Any]:
    """TFRecord: length, its checksum, the event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_tensorboard_holds_every_epoch(runs: Path, capsys: Any) -> None:
    assert export_runs(load_records([runs]).records, "tensorboard") == 3
    for stored in load_records([runs]).records:
        (path,) = stored.folder.glob("events.out.tfevents.*")
        scalars = [
            (v.tag, e.step, v.simple_value, e.wall_time) for e in read_events(path) for v in e.summary.value
        ]
        seed = stored.record.seed
        errors = {step: value for tag, step, value, _ in scalars if tag == "error"}
        assert errors == {k: 10.0 - k + seed for k in ((1, 2) if seed == 2 else (1, 2, 3))}
        times = [time for tag, _, _, time in scalars if tag == "loss"]
        assert times[0] == pytest.approx(stored.record.started_at.timestamp() + 2.5)
        assert times[1] - times[0] == pytest.approx(2.5)
        assert not [tag for tag, *_ in scalars if tag == "top5_error"]  # it was not measured
    assert export_runs(load_records([runs]).records, "tensorboard") == 0
    assert len(load_records([runs]).records) == 3  # an event file is no harm to a run's folder


def test_an_event_file_is_whole_or_is_not_there(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorboardX

    add_scalar, calls = tensorboardX.SummaryWriter.add_scalar, list[str]()

    def add(self: Any, name: str, *args: Any, **kwargs: Any) -> None:
        calls.append(name)
        if len(calls) == 5:
            raise KeyboardInterrupt
        add_scalar(self, name, *args, **kwargs)

    monkeypatch.setattr(tensorboardX.SummaryWriter, "add_scalar", add)
    with pytest.raises(KeyboardInterrupt):
        export_runs(load_records([runs]).records, "tensorboard")
    assert not list(runs.rglob("*events*"))
    assert export_runs(load_records([runs]).records, "tensorboard") == 3
    assert len(list(runs.glob("*/events.out.tfevents.*"))) == 3


@pytest.mark.filterwarnings("ignore")  # MLflow's own, about SQLAlchemy
def test_mlflow_holds_every_epoch(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    with monkeypatch.context() as patched:
        patched.setattr(mlflow, "log_metrics", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):  # what it leaves is exported again
            export(load_records([runs]).records, TARGETS["mlflow"])
    assert export(load_records([runs]).records, TARGETS["mlflow"]) == 3
    assert export(load_records([runs]).records, TARGETS["mlflow"]) == 0
    client = mlflow.MlflowClient()
    found = client.search_runs([client.get_experiment_by_name("cifar10").experiment_id])
    assert sorted(run.info.status for run in found) == ["FAILED", "FINISHED", "FINISHED"]
    by_seed = {int(run.data.params["seed"]): run for run in found}
    history = client.get_metric_history(by_seed[1].info.run_id, "error")
    assert [(m.step, m.value) for m in history] == [(1, 10.0), (2, 9.0), (3, 8.0)]
    assert by_seed[0].data.metrics["final_error"] == 7.0
    assert by_seed[0].data.params["recipe.lr"] == "0.1"


@pytest.mark.filterwarnings("ignore")
def test_wandb_writes_a_run_each(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    assert export(load_records([runs]).records, TARGETS["wandb"]) == 3
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 3


class Wandb:
    """Runs on a server. A resumed one has its summary, and goes on after its last step: an earlier one is dropped there,
    and an error here."""

    def __init__(self) -> None:
        self.runs = dict[str, Any]()
        self.logged, self.stop_after = 0, 0

    def init(self, id: str, resume: str, **about: Any) -> Any:
        assert resume == "allow"
        known = self.runs.setdefault(id, {"history": {}, "summary": {}, "finished": []})
        history, first = known["history"], max(known["history"], default=-1) + 1

        def log(figures: dict[str, float], step: int) -> None:
            self.logged += 1
            if self.logged == self.stop_after:
                raise KeyboardInterrupt
            assert step >= first
            history[step] = figures

        return SimpleNamespace(
            resumed=bool(history or known["summary"]), starting_step=first, summary=known["summary"], log=log,
            finish=lambda exit_code: known["finished"].append(exit_code),
        )  # fmt: skip


def test_an_interrupted_export_to_wandb_is_gone_on_with(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", server)  # type: ignore[arg-type]
    server.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        export(load_records([runs]).records, TARGETS["wandb"])
    assert [list(run["history"]) for run in server.runs.values()] == [[1, 2]]
    assert export(load_records([runs]).records, TARGETS["wandb"]) == 3
    assert export(load_records([runs]).records, TARGETS["wandb"]) == 0
    assert sorted(list(run["history"]) for run in server.runs.values()) == [[1, 2], [1, 2, 3], [1, 2, 3]]
    assert sorted(run["finished"][-1] for run in server.runs.values()) == [0, 0, 1]
    assert [run["summary"].get("final_error") for run in server.runs.values()].count(7.0) == 1


def test_mistakes_are_one_line(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="did you mean tensorboard"):
        export_runs(load_records([runs]).records, "tensorbord")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match=r"pip install 'resnet-harness\[mlflow\]'"):
        export_runs(load_records([runs]).records, "mlflow")
    refused = type("MlflowException", (Exception,), {"__module__": "mlflow.exceptions"})
    for error, expected in ((refused("no server"), UserError), (RuntimeError("a bug"), RuntimeError)):
        monkeypatch.setitem(TARGETS, "mlflow", Mock(side_effect=error))
        with pytest.raises(expected, match=str(error)):
            export_runs(load_records([runs]).records, "mlflow")
    (finished,) = [s.folder for s in load_records([runs]).records if s.record.seed == 0]
    (finished / "epochs.jsonl").write_text("nonsense\n")
    with pytest.raises(UserError, match=r"epochs.jsonl line 1"):
        export_runs(load_records([runs]).records, "tensorboard")
