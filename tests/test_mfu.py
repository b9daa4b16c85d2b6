"""MFU: FLOPs of any network by torch's counter, the peak of a device, and the figure in every table."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import harness
from records import make_record
from torch import nn

from harness.cluster.job import Allocation, Worker
from harness.models.build import build, count_flops
from harness.models.variants import find_variant
from harness.results.metrics import METRICS
from harness.results.store import load_records
from harness.training import rates
from harness.training.rates import find_peak, load_data_sheets, measure_peak
from harness.training.train import count_work

CPU = torch.device("cpu")


def test_flops_of_any_module_are_counted_and_its_state_is_left_alone() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(), nn.Flatten(), nn.Linear(8 * 100, 5)
    )
    module[1].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert count_flops(module, 10) == 2 * (100 * 8 * 27 + 800 * 5)
    assert [each.training for each in module.modules()] == [True, True, False, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    network = find_variant("he2015")(20).network
    with torch.device("meta"):
        meta = build(network, 10)
    assert count_flops(build(network, 10), 32) == count_flops(meta, 32)


def test_mfu_is_three_forward_passes_over_the_peak_of_all_workers() -> None:
    work = {"forward_flops": 80_000_000, "peak_flops": 1e12, "peak_source": "data sheet"}
    result = make_record(0, 8.0).result.model_copy(update=work | {"images_per_second": 5_000.0, "workers": 2})
    assert result.mfu.value == pytest.approx(100 * 3 * 8e7 * 5_000 / 2e12)
    assert result.model_copy(update={"peak_flops": None}).mfu.value is None
    untimed = result.model_copy(update={"images_per_second": None})
    assert METRICS["mfu"].measure(untimed).model_dump() == {"value": None, "reason": "no epoch was timed"}
    assert result.model_copy(update={"peak_flops": 5e11}).mfu.value is None, (
        "above 100: that peak was measured on a busy device"
    )


def test_no_peak_is_measured_on_a_gpu_or_processors_that_runs_share() -> None:
    """It would be kept for runs to come that have the device to themselves, and make their MFU too large."""
    nothing: Any = None
    assert count_work(nothing, Worker(device="cuda:0", runs_per_gpu=2), nothing) == {}
    trial = Allocation(device="cpu", workers=1, concurrent_runs=2, threads=1).worker()
    assert count_work(nothing, trial, nothing) == {}


def test_data_sheets_are_dense_and_ordered() -> None:
    sheets = load_data_sheets()
    assert sheets["NVIDIA H100 80GB HBM3", "bf16"].flops == 989.5e12
    assert ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16") not in sheets, "a share of a GPU is measured"
    for (name, precision), known in sheets.items():
        assert known.source.endswith("data sheet") or "data sheet, " in known.source
        if precision != "fp32":
            assert known.flops >= sheets[name, "fp32"].flops
            assert known.flops <= 1e15, "with sparsity it would be twice as much"


def test_a_peak_that_no_data_sheet_has_is_measured_once_and_only_rises(tmp_path: Path, monkeypatch: Any) -> None:
    readings = iter([2e11, 1e11, 3e11])
    monkeypatch.setattr(rates, "measure_peak", lambda *_: next(readings))
    for fresh, flops in ((False, 2e11), (False, 2e11), (True, 2e11), (True, 3e11), (False, 3e11)):
        found = find_peak(CPU, "fp32", 2, tmp_path, fresh=fresh)
        assert (found.flops, found.source) == (flops, "measured, products of 2048 x 2048 matrices on 2 threads")
    (tmp_path / rates.PEAKS).write_text("{")
    with pytest.raises(StopIteration):
        find_peak(CPU, "fp32", 2, tmp_path)


def test_a_measured_peak_is_of_real_products(monkeypatch: Any) -> None:
    monkeypatch.setattr(rates, "SECONDS", 0.05)
    asked = []
    original = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda a, b, **more: asked.append((a.shape, a.dtype)) or original(a, b, **more)
    )
    flops = measure_peak(CPU, "bf16", 256)
    assert 1e6 < flops < 1e15
    assert len(asked) >= 4
    assert set(asked) == {(torch.Size([256, 256]), torch.bfloat16)}
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> Path:
    out = tmp_path_factory.mktemp("mfu") / "runs"
    import sys

    from harness import cli

    line = "run --dataset digits --variants msra --depths 8 --epochs 3 --batch-size 64 --gpus 0 --loader resident"
    sys.argv = ["harness", *line.split(), "--limit-train", "256", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARNESS_CACHE", str(out.parent))  # without a peak of an earlier test
        patch.setattr(rates, "measure_peak", lambda *given: 4 * measure_peak(*given))  # too low on a busy machine
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert not stop.value.code
    return out


def test_a_run_knows_its_work_and_every_table_has_mfu(runs: Path, capsys: Any) -> None:
    (stored,) = load_records([runs]).records
    result, network = stored.record.result, find_variant("msra")(8).network
    assert result.forward_flops == count_flops(build(network, 10), 32)
    assert result.peak_source.startswith("measured")
    assert 0 < result.mfu.value < 150
    _, table, _ = harness(f"report {runs}", capsys)
    assert "MFU %" in table
    assert f"TFLOP/s a worker: {result.device}, measured, products" in " ".join(table.split())
    _, text, _ = harness(f"report {runs} --format csv", capsys)
    (row,) = csv.DictReader(io.StringIO(text))
    assert float(row["mfu"]) == pytest.approx(result.mfu.value)
    _, text, _ = harness(f"report {runs} --format json", capsys)
    assert json.loads(text)["rows"][0]["mfu"] == pytest.approx(result.mfu.value)
    assert "MFU %" in (runs / "report.html").read_text()


def test_a_network_that_cannot_be_counted_costs_the_figure_not_the_run(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    from harness.training import train

    def refuse(*_: Any) -> int:
        raise RuntimeError("no formula")

    monkeypatch.setattr(train, "count_flops", refuse)
    line = "run --dataset digits --variants msra --depths 8 --epochs 1 --limit-train 64 --gpus 0 --loader resident"
    with pytest.warns(UserWarning, match="no MFU: RuntimeError: no formula"):
        code, *_ = harness(f"{line} --out {tmp_path}", capsys)
    assert code == 0
    (stored,) = load_records([tmp_path]).records
    assert stored.record.result.mfu.value is None
    assert any("no formula" in warning for warning in stored.record.result.warnings)
