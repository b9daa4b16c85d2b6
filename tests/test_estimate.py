"""A probe predicts what a run then measures, and the sums over a sweep are those of a hand calculation."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command import harness as harness_
from records import NO_GPU, make_memory
from rich.console import Console

import harness.commands.probe
import harness.resources
import harness.training.train
from harness import plan
from harness.cluster.job import Failed, Worker
from harness.commands.probe import all_seconds, count_cells, predict, print_estimate
from harness.loaders.datasets import load_dataset
from harness.options import Resources
from harness.resources import Session
from harness.results.store import load_predictions, load_records
from harness.results.values import Measurement, Prediction
from harness.spec import RunPaths, RunSpec

QUICK = "--dataset digits --depths 8 --limit-train 128 --gpus 0 --loader resident --launcher local --epochs 1"
MEANS = "predicted:"  # the column's definition, under the table


def make_specs(*, device: str = "cuda", workers: int = 2, **sweep: Any) -> list[RunSpec]:
    values: dict[str, Any] = {"variants": ("msra",), "depths": (20, 56), "seeds": (0, 1, 2)} | sweep
    width = plan.Allocation(device=device, gpus=4, workers=workers, concurrent_runs=2, threads=4)  # type: ignore[arg-type]
    return plan.expand(plan.Grid(**values), width, fingerprint="f" * 64, train_images=50_000)


def make_prediction(spec: RunSpec, seconds: float, joules: Measurement = NO_GPU) -> Prediction:
    """10 s of set-up, 2.5 epochs, 1 s an evaluation."""
    asked = spec.to_json()
    del asked["seed"]
    return Prediction(
        spec=asked, steps=30, epoch_seconds=seconds, eval_seconds=1.0, setup_seconds=10.0, epochs=2.5,
        energy_joules=joules, workers=spec.workers, threads=4, device="NVIDIA H200", made_at=datetime.now(UTC),
        memory=make_memory(torch_allocated_mib=1234.4, torch_reserved_mib=2000.0, rss_mib=900.0),
    )  # fmt: skip


def test_a_run_is_set_up_epochs_and_evaluations() -> None:
    prediction = make_prediction(make_specs()[0], 100.0, Measurement(value=4000.0))
    assert prediction.run_seconds == 10 + 2.5 * 100 + 3 * 1
    assert prediction.run_joules.value == 10_000
    assert make_prediction(make_specs()[0], 100.0).run_joules == NO_GPU


def test_seeds_share_a_cell_and_runs_wait_for_a_slot() -> None:
    todo = make_specs()
    cells = count_cells(todo[1:])  # the first run is done
    assert {(spec.network.depth, spec.seed): n for spec, n in cells.items()} == {(56, 0): 3, (20, 0): 2}
    seconds = {spec: 100.0 if spec.network.depth == 20 else 300.0 for spec in cells}
    # 56, 20, 56, 20, 56 on two concurrent_runs: 0-300, 0-100, 100-400, 300-400, 400-700
    assert all_seconds(todo[1:], seconds, 2) == 700
    assert all_seconds(todo[1:], seconds, 1) == 1100
    assert all_seconds(todo[1:], {}, 1) == 0


def test_the_sums_of_a_grid(capsys: Any) -> None:
    todo = make_specs()
    shallow, deep = count_cells(todo)
    one = make_prediction(shallow, 720.0, Measurement(value=4000.0))
    two = make_prediction(deep, 1434.8, Measurement(value=8000.0))
    console = Console(width=200)
    print_estimate([(shallow, one), (deep, two)], todo, 2, console)
    text = capsys.readouterr().out
    # 1813 and 3600 s in turn, on two concurrent_runs: 1813 + 1813 + 1813 + 3600 beside 3600 + 3600; 2 GPUs each
    assert "in all 6 runs, 2 at a time: 2 h 31 min, 9.02 GPU-hours, 90.0 kJ" in text
    assert "3   3.02  1,234  2,000  900  30.0" in text
    assert "1,234" in text
    assert "NVML not available: no GPU was used" in text

    failed = Failed(exception="OutOfMemoryError", message="CUDA out of memory", traceback="", died=False)
    print_estimate([(shallow, one), (deep, failed)], todo, 2, console)
    text = capsys.readouterr().out
    assert "msra-56 failed, OOM: CUDA out of memory" in text
    assert "in all 3 runs, 2 at a time: 1 h, 3.02 GPU-hours, 30.0 kJ" in text
    print_estimate([(shallow, make_prediction(shallow, 720.0))], todo, 2, console)
    assert "– kJ" in capsys.readouterr().out

    on_cpu = [(replace(spec, device="cpu"), outcome) for spec, outcome in ((shallow, one), (deep, two))]
    print_estimate(on_cpu, [replace(spec, device="cpu") for spec in todo], 2, console)
    text = capsys.readouterr().out
    assert "GPU-h" not in text
    assert "MiB is per worker" in text


def test_runs_that_share_a_gpu_take_turns_on_it(capsys: Any) -> None:
    """Four runs of an hour on one GPU are four GPU-hours, and four hours."""
    todo = make_specs(depths=(20,), seeds=(0, 1, 2, 3), workers=1)
    (cell,) = count_cells(todo)
    outcomes = [(cell, make_prediction(cell, 1434.8))]
    console = Console(width=200)
    shared = "; runs that share a GPU slow each other down and are counted as if they took turns\n"
    print_estimate(outcomes, todo, 4, console, alone=1)
    text = capsys.readouterr().out
    assert "in all 4 runs, 4 at a time: 4 h, 4.00 GPU-hours" in text
    assert shared in text
    print_estimate(outcomes, todo, 4, console)
    text = capsys.readouterr().out
    assert "4 at a time: 1 h, 4.00 GPU-hours" in text
    assert shared not in text


def test_no_two_probes_share_a_gpu(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[plan.Allocation] = []

    def launch(function: Any, specs: list[RunSpec], job: plan.Allocation, **callbacks: Any) -> Any:
        launched.append(job)
        yield from ((spec, make_prediction(spec, 1434.8)) for spec in specs)

    monkeypatch.setattr(harness.resources.launch, "launch", launch)
    job = plan.Allocation(device="cuda", gpus=2, workers=1, concurrent_runs=7, threads=4, runs_per_gpu=4)
    where, todo = Resources(address="auto", launcher="ray"), make_specs(workers=1, seeds=(0, 1))
    with ExitStack() as stack:
        session = Session(job, where, RunPaths(out=tmp_path), stack)
        assert not harness.commands.probe.probe("estimate", todo, session, Console(width=200))
    assert [(job.concurrent_runs, job.runs_per_gpu) for job in launched] == [(2, 1)]
    assert "in all 4 runs, 7 at a time: 2 h, 4.00 GPU-hours" in capsys.readouterr().out


def test_a_probe_times_steps_and_writes_nothing(tmp_path: Path) -> None:
    dataset = load_dataset("digits")
    sweep = plan.Grid(variants=("he2015",), depths=(8,), dataset="digits", loader="resident", limit_train=500,
                       limit_test=50, batch_size=10, epochs=2)  # fmt: skip
    width = plan.Allocation(device="cpu", gpus=0, workers=1, concurrent_runs=1, threads=1)
    (spec,) = plan.expand(sweep, width, fingerprint=dataset.fingerprint, train_images=len(dataset.train))
    prediction = predict(spec, Worker(launch_seconds=5.0), print, paths=RunPaths(out=tmp_path))
    assert prediction.steps == 30  # of 50
    assert prediction.epochs == 2
    assert prediction.setup_seconds > 5
    assert 0 < prediction.eval_seconds < prediction.epoch_seconds < 60
    assert prediction.energy_joules == NO_GPU
    assert prediction.memory.torch_allocated_mib.reason
    assert (prediction.memory.rss_mib.value or 0) > 50
    assert "seed" not in prediction.spec
    assert list(tmp_path.iterdir()) == []


class Queueing:
    """A loader that makes ten batches by a call, which takes 0.2 s, and 30 before they are requested; nothing else takes
    any time."""

    call_steps, calls_ahead = 10, 2
    now = 0.0

    def __init__(self, loader: Any) -> None:
        self.steps, self.close, self._loader = loader.steps, loader.close, loader

    def epoch(self, epoch: int, first_step: int = 0) -> Any:
        for step, batch in enumerate(self._loader.epoch(epoch, first_step)):
            Queueing.now += 0.2 if step >= 30 and step % 10 == 0 else 1e-6
            yield batch


def test_a_probe_outlasts_what_the_loader_made_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, prepare = load_dataset("digits"), harness.commands.probe.prepare
    grid = plan.Grid(variants=("he2015",), depths=(8,), dataset="digits", loader="resident", limit_train=500,
                     limit_test=50, batch_size=5)  # fmt: skip
    width = plan.Allocation(device="cpu", gpus=0, workers=1, concurrent_runs=1, threads=1)
    (spec,) = plan.expand(grid, width, fingerprint=dataset.fingerprint, train_images=len(dataset.train))

    def prepared(*args: Any) -> Any:
        made = prepare(*args)
        return replace(made, train_loader=Queueing(made.train_loader))

    monkeypatch.setattr(harness.commands.probe, "prepare", prepared)
    for module in (harness.commands.probe, harness.training.train):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: Queueing.now))
    prediction = predict(spec, Worker(), print, paths=RunPaths(out=tmp_path))
    assert prediction.steps == 60  # of 100
    assert prediction.epoch_seconds == pytest.approx(7 * 0.2, rel=0.01), "70 batches have to be waited for"


def test_predicted_stands_beside_actual(tmp_path: Path, capsys: Any) -> None:
    line = f"run {QUICK} --seeds 2 --out {tmp_path}/runs"
    code, out, err = harness_(f"{line} --estimate", capsys)
    assert (code, err) == (0, "")
    assert "in all 2 runs, 1 at a time" in out
    assert "alloc, resvd, NVML, kJ not available: no GPU was used" in out
    (prediction,) = load_predictions([tmp_path / "runs"])
    assert prediction.steps == 1  # an epoch has no more
    assert load_records([tmp_path / "runs"]) == ([], [], [])

    train = f"{line} --format jsonl"
    assert harness_(f"{train} --limit-test 50", capsys)[0] == 0  # nothing was predicted of these
    assert MEANS not in harness_(f"report {tmp_path}/runs", capsys)[1]
    assert harness_(train, capsys)[0] == 0
    assert MEANS in harness_(f"report {tmp_path}/runs", capsys)[1]
    rows = json.loads(harness_(f"report {tmp_path}/runs --format json", capsys)[1])["rows"]
    predicted = {row["limit_test"]: row["predicted_epoch_seconds"] for row in rows}
    assert predicted == {None: prediction.epoch_seconds, 50: None}
    rss = {row["limit_test"]: row["predicted_rss_mib"] for row in rows}
    assert rss == {None: prediction.memory.rss_mib.value, 50: None}

    code, out, _ = harness_(f"{line} --estimate", capsys)
    assert (code, "nothing to estimate: all runs are done already" in out) == (0, True)
    # a prediction of another device, or one that cannot be read, is nobody's
    (path,) = (tmp_path / "runs" / ".estimates").iterdir()
    path.write_text(prediction.model_copy(update={"device": "another"}).model_dump_json())
    (path.parent / "broken.json").write_text("{")
    _, out, _ = harness_(f"report {tmp_path}/runs", capsys)
    assert MEANS not in out


def test_a_probe_that_fails_is_a_line(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stub(spec: RunSpec, worker: Worker, report: Any, *, paths: RunPaths) -> Prediction:
        if spec.variant == "msra":
            raise MemoryError("no room for the activations")
        return make_prediction(spec, 36.0)

    monkeypatch.setattr(harness.commands.probe, "predict", stub)
    line = f"run {QUICK} --variants msra,he2015 --estimate --out {tmp_path}/runs"
    code, out, _ = harness_(line, capsys)
    assert code == 1
    assert "msra-8 failed, OOM: no room for the activations" in out
    assert "in all 1 run, " in out
    assert len(load_predictions([tmp_path / "runs"])) == 1


@pytest.mark.parametrize("other", ["--dry-run", "--format jsonl"])
def test_estimate_excludes(other: str, tmp_path: Path, capsys: Any) -> None:
    code, _, err = harness_(f"run {QUICK} --estimate {other} --out {tmp_path}/runs", capsys)
    assert code == 2
    assert f"--estimate and {other} cannot be combined" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
