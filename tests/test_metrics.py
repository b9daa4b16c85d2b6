"""The registry of measured figures: one entry is found in everything that shows or checks figures."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from records import NOW, make_epoch, make_record, make_result
from test_export import read_events
from test_prediction import make_row

import harness
from harness.results.compare import check_conditions, compare, parse_fail_on
from harness.results.explain import predicted_figures, why
from harness.results.export import TARGETS, export, summary
from harness.results.metrics import METRICS, Figure, Metric, figures
from harness.results.report.columns import sort_rows
from harness.results.report.page import make_page
from harness.results.report.table import Format, render, render_comparison
from harness.results.rows import Row, summarise
from harness.results.store import Stored, finish, load_records, write_epochs
from harness.words import FEW, unknown

DECIBEL = {0: 31.25, 1: 33.25}


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Metric:
    """A figure that no one else has heard of, read from the machine's description."""
    metric = Metric(
        name="fan_noise", title="dB", unit="", kind="energy", means="how loud the fans were, mean over the seeds",
        read=lambda result: result.machine.get("decibel"), record_name="fan_noise", over_seeds="mean", digits=3, margin=5.0,
        predict=lambda _: 30.5,
    )  # fmt: skip
    monkeypatch.setitem(METRICS, metric.name, metric)
    return metric


@pytest.fixture
def runs(tmp_path: Path) -> list[Stored]:
    for seed, noise in DECIBEL.items():
        folder = finish(tmp_path, make_record(seed, 8.0 + seed, result={"machine": {"decibel": noise}}))
        write_epochs(folder, [make_epoch(1, error=8.0 + seed)])
    return load_records([tmp_path]).records


@pytest.fixture
def rows(runs: list[Stored]) -> list[Row]:
    return summarise(runs)


@pytest.mark.parametrize("format", ["table", "markdown", "latex"])
def test_a_new_figure_is_in_every_table(format: Format, made_up: Metric, rows: list[Row]) -> None:
    text = render(rows, format, width=400)
    assert "dB: how loud the fans were" in text
    assert ("32 & .250 $\\pm$ 1.414" if format == "latex" else "32.250 ± 1.414") in text
    assert "32.250" in render(rows, format, columns=["variant", "fan_noise"], width=400).replace(" & ", "")
    assert sort_rows(rows, "-fan_noise") == rows


def test_a_new_figure_is_in_csv_and_json(made_up: Metric, rows: list[Row]) -> None:
    (line,) = csv.DictReader(io.StringIO(render(rows, "csv")))
    assert line["fan_noise_mean"] == "32.25"
    values = json.loads(render(rows, "json"))
    assert values["rows"][0]["fan_noise_std"] == pytest.approx(2**0.5)
    assert values["rows"][0]["predicted_fan_noise"] is None
    assert {"column": "fan_noise", "means": made_up.means} in values["definitions"]


def test_a_new_figure_is_on_the_page(made_up: Metric, rows: list[Row]) -> None:
    page = make_page(rows, bundle="", made_at=NOW)
    assert "32.250 ± 1.414" in page
    assert "how loud the fans were" in page


def test_a_new_figure_is_compared(made_up: Metric, rows: list[Row]) -> None:
    pairs = compare(rows, rows)
    assert [figure.metric.name for figure in pairs[0].figures] == ["error", "epoch_seconds", "fan_noise"]
    assert "32.250 ± 1.414" in render_comparison(pairs, width=200)
    gate = check_conditions(pairs, parse_fail_on("fan_noise<+1"))
    assert any("fan_noise<+1" in line for line in (*gate.failed, *gate.unclear))


def test_a_new_figure_is_explained(made_up: Metric, rows: list[Row]) -> None:
    text = why(rows[0])
    assert "dB 32.250 ± 1.414 = how loud the fans were, mean over the seeds" in text
    assert "seed 0: 31.250, seed 1: 33.250" in text


def test_a_new_figure_is_in_the_frame(made_up: Metric, runs: list[Stored], tmp_path: Path) -> None:
    frame = harness.load(tmp_path)
    assert frame.sort_values("seed")["fan_noise"].tolist() == list(DECIBEL.values())


def test_a_new_figure_is_in_tensorboard(made_up: Metric, runs: list[Stored]) -> None:
    assert export(runs, TARGETS["tensorboard"]) == 2
    for run in runs:
        (path,) = run.folder.glob("events.out.tfevents.*")
        scalars = {v.tag: v.simple_value for event in read_events(path) for v in event.summary.value}
        assert scalars["fan_noise"] == DECIBEL[run.record.seed]


def test_a_new_figure_is_in_the_summary_for_mlflow_and_wandb(made_up: Metric, runs: list[Stored]) -> None:
    assert [summary(run)["fan_noise"] for run in runs] == list(DECIBEL.values())
    assert summary(runs[0])["final_error"] == 8.0
    assert summary(runs[0])["run_eval_seconds"] == 0.5  # an epoch has one of that name


def test_predictions_take_theirs_from_the_registry(made_up: Metric, rows: list[Row]) -> None:
    predicted = make_row(Path("nowhere")).predicted
    pairs = {pair.figure: pair for pair in predicted_figures(replace(rows[0], predicted=predicted))}
    assert pairs["dB"].difference.startswith("+1.8 ")


# --- the built-in ones ---


def test_every_figure_has_a_name_a_meaning_and_a_unit() -> None:
    assert all(name == metric.name for name, metric in METRICS.items())
    for metric in METRICS.values():
        assert metric.title
        assert metric.means
        assert metric.record_name
        for ending, unit in {"_seconds": "s", "_mib": "MiB", "_joules": "J", "error": "%"}.items():
            assert not metric.name.endswith(ending) or metric.unit == unit
    assert len({metric.heading for metric in METRICS.values()}) == len(METRICS)


def test_runs_are_combined_as_declared() -> None:
    results = [make_result(8.0, final_error=e, epoch_seconds=s) for e, s in ((8.0, 3.0), (9.0, None), (10.0, 5.0))]
    assert METRICS["error"].summarise(results) == Figure(9.0, 1.0, 3)
    assert METRICS["epoch_seconds"].summarise(results) == Figure(4.0, None, 2, "no epoch was timed"), "its own n"
    assert METRICS["parameters"].summarise(results).value == 272_292
    assert METRICS["rss_mib"].summarise(results) == Figure(900.0, None, 3)
    assert METRICS["top5_error"].summarise(results) == Figure(None)
    assert METRICS["nvml_process_mib"].summarise(results).reason == "no GPU was used"
    assert METRICS["epoch_seconds"].summarise([results[1]]).reason == "no epoch was timed"
    assert METRICS["error"].summarise([]) == Figure(None)
    some = [make_result(8.0, final_top5_error=1.0), make_result(8.0)]
    assert METRICS["top5_error"].summarise(some).value is None, "no mean over some of the runs"


def test_numbers_are_written_as_declared() -> None:
    assert METRICS["parameters"].text(272_292) == "0.27M"
    assert METRICS["energy_joules"].text(52_345.0) == "52.3"
    assert METRICS["error"].summary(Figure(8.314, 0.126, 3)) == "8.31 ± 0.13"
    assert METRICS["best_error"].summary(Figure(8.314, 0.126, 3)) == "8.31"
    assert [figures(value) for value in (0.01234, 12345.6, 0.0, None)] == ["0.0123", "12,346", "0", "–"]


def test_unknown_words() -> None:
    assert (
        unknown("column", "eror", ["error", "n"])
        == "column 'eror' is unknown; did you mean error? (allowed: error, n)"
    )
    assert unknown("column", "xyz", ["error", "n"]) == "column 'xyz' is unknown (allowed: error, n)"
    many = [f"field{number}" for number in range(FEW + 1)]
    assert unknown("field", "feild7", many) == "field 'feild7' is unknown; did you mean field7?"
    assert unknown("field", "xyz", many).endswith("field19, field20)")
    assert unknown("field", "wd", ["lr", "weight_decay"]).startswith(
        "field 'wd' is unknown; did you mean weight_decay?"
    )
