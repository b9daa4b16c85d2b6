"""Predicted beside measured: the difference in both units, and the reason where there is none."""

from __future__ import annotations

import csv
import io
from typing import Any

from records import NOW, make_memory, make_record

from harness.results.explain import predicted_figures, why
from harness.results.report.page import make_page
from harness.results.report.table import render
from harness.results.rows import Row, summarise
from harness.results.store import Stored
from harness.results.values import Measurement, Prediction

MISSING = Measurement(value=None, reason="NVML lists no process")


def make_row(folder: Any, *, predicted: bool = True, joules: Measurement = MISSING) -> Row:
    """Measured: 4.0 s/epoch, 900 MiB RSS. Predicted: 3.2 s and 1,000 MiB, 100 kJ a run."""
    memory = make_memory(rss_mib=900.0, nvml_process_mib=MISSING)
    record = make_record(0, 8.0, result={"memory": memory, "energy_joules": joules})
    told = make_memory(
        torch_allocated_mib=512.0, torch_reserved_mib=600.0, nvml_process_mib=MISSING, rss_mib=1000.0
    )
    spec = {name: value for name, value in record.spec.items() if name != "seed"}
    prediction = Prediction(
        spec=spec, steps=30, epoch_seconds=3.2, eval_seconds=0.5, setup_seconds=9.0, epochs=200,
        energy_joules=Measurement(value=500.0), memory=told, interference=("the GPU was throttled",), workers=1, threads=8,
        device="NVIDIA H200", made_at=NOW,
    )  # fmt: skip
    (row,) = summarise([Stored(record, folder)], predictions=[prediction] if predicted else [])
    return row


def test_each_figure_has_a_difference_or_a_reason(tmp_path: Any) -> None:
    by_name = {
        pair.figure: pair for pair in predicted_figures(make_row(tmp_path, joules=Measurement(value=97_000.0)))
    }
    assert by_name["s/epoch"].difference == "+0.80 (+25.0 %)"
    assert by_name["RSS MiB"].difference == "−100 (−10.0 %)"
    assert by_name["kJ"].difference == "−3 (−3.0 %)"
    assert by_name["eval s"].difference == "+0.000 (+0.0 %)"
    assert by_name["NVML MiB"].reason == "not predicted: NVML lists no process"
    assert by_name["alloc MiB"].reason == "not measured: no GPU was used"
    assert by_name["alloc MiB"].difference == ""


def test_why_the_page_and_the_numbers_show_it(tmp_path: Any) -> None:
    row = make_row(tmp_path)
    text = why(row)
    assert "predicted by a probe of 30 steps on 2026-01-02 03:04 UTC" in text
    assert "  s/epoch    3.20 → 4.00  +0.80 (+25.0 %)" in text
    assert "  kJ         100 → –  (not measured: NVML lists no process)" in text
    assert "  while probing: the GPU was throttled" in text
    html = make_page([row], bundle="", made_at=NOW)
    assert '<td class="r">3.20 → 4.00<small>+0.80 (+25.0 %)</small></td>' in html
    assert "<li>kJ not measured: NVML lists no process</li>" in html
    (raw,) = csv.DictReader(io.StringIO(render([row], "csv")))
    assert raw["predicted_torch_allocated_mib"] == "512.0"
    assert raw["predicted_energy_joules"] == "100000.0"
    assert raw["predicted_nvml_process_mib"] == ""


def test_without_a_probe_nothing_is_said(tmp_path: Any) -> None:
    row = make_row(tmp_path, predicted=False)
    assert predicted_figures(row) == []
    assert "predicted" not in why(row)
    assert "id=predicted" not in make_page([row], bundle="", made_at=NOW)
