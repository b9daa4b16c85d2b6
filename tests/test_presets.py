"""Presets: each source's runs from one line, and its table beside the published one."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import harness
from records import make_epoch, make_record

from harness.commands.report import choose_rows
from harness.models.variants import PRESETS, find_variant
from harness.results.metrics import METRICS
from harness.results.published import load_published
from harness.results.report.charts import make_panels
from harness.results.report.columns import find_columns
from harness.results.rows import summarise
from harness.results.store import Stored, write_epochs
from harness.results.values import Record

Store = Callable[..., Path]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Write records as `runs`, each with curves."""
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.chdir(tmp_path)

    def write(*records: Record, errors: tuple[float, ...] = (30.0, 9.0)) -> Path:
        for record in records:
            folder = tmp_path / "runs" / record.name
            folder.mkdir(parents=True)
            (folder / "record.json").write_text(record.model_dump_json())
            epochs = [make_epoch(k, error=error) for k, error in enumerate(errors, 1)]
            write_epochs(folder, epochs)
        return tmp_path / "runs"

    return write


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_what_there_is(name: str) -> None:
    preset = PRESETS[name]
    published = {(entry.variant, entry.depth) for entry in load_published() if entry.dataset == preset.dataset}
    for variant, depth in preset.select():
        assert find_variant(variant)(depth).network.depth == depth
        assert (variant, depth) in published
    assert {column.name for column in find_columns(preset.columns)} == set(preset.columns)


def test_the_command_line_wins_over_the_preset(tmp_path: Path, capsys: Any) -> None:
    def plan(words: str) -> list[tuple[str, str]]:
        code, out, err = harness(
            f"run {words} --epochs 9 --dataset digits --gpus 0 --dry-run --out {tmp_path}", capsys
        )
        assert (code, err) == (0, "")
        return re.findall(r"^ *│? *([a-z0-9-]+) +│? *(\d+) +│? *0 ", out, re.MULTILINE)

    assert plan("--preset cfmz") == [("msra", "20"), ("msra", "32"), ("msra", "56"), ("msra", "110")]
    assert plan("--preset cfmz --depths 8") == [("msra", "8")]
    assert plan("--preset cfmz --variants he2015 --depths 14") == [("he2015", "14")]
    assert len(plan("--preset ladder --val 100")) == 14


def test_a_validation_split_that_does_not_fit_names_one_that_does(tmp_path: Path, capsys: Any) -> None:
    line = f"run --preset fattorib --epochs 9 --dataset digits --gpus 0 --dry-run --out {tmp_path}"
    code, _, err = harness(line, capsys)
    assert code == 2
    assert "fattorib-20 would hold out 2,500 training images, but there are only 1,437" in err
    (val,) = re.findall(r"--val \d+", err)
    assert harness(f"{line} {val}", capsys)[0] == 0


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("run --preset cfmx", "did you mean cfmz?"),
        ("report --preset x .", "(allowed: cfmz, fattorib, mpmz, convnet, ladder)"),
        ("run --preset ladder --depths 8 --dataset digits", "depth 8 is not 9n+2"),
        ("run --preset cfmz --spec record.json", "--spec and --preset cannot be combined"),
    ],
)
def test_mistakes_are_one_line(line: str, complaint: str, capsys: Any) -> None:
    code, _, err = harness(line, capsys)
    assert code == 2
    assert complaint in err


def test_the_table_of_2016_beside_ours(store: Store, capsys: Any) -> None:
    store(make_record(0, 7.2, depths=(56,), seconds=2.0), make_record(0, 8.4), make_record(1, 8.2))
    code, out, _ = harness("report --preset cfmz", capsys)
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    rows = [words for words in lines if words and words[0] in ("20", "56")]
    assert [words[0] for words in rows] == ["20", "56"]
    assert {"521", "MiB", "4.00", "11", "s", "(2.75×)", "8.29"} <= set(rows[0])
    assert {"860", "2.00", "30", "(15.0×)", "6.31"} <= set(rows[1])
    assert "on GeForce GTX TITAN X, 2016" in out
    assert "not run yet: msra-110, published 6.00 %, 60.0 s/epoch, 1,277 MiB" in out
    # and, without a preset, in every table that has such runs
    assert "11 s (2.75×)" in harness("report", capsys)[1]
    assert "11 s (2.75×)" in harness("report --format markdown", capsys)[1]
    (first, *_) = csv.DictReader(io.StringIO(harness("report --format csv", capsys)[1]))
    assert (first["published_epoch_seconds"], first["published_memory_mib"]) == ("11", "521")
    assert (first["published_hardware"], first["published_year"]) == ("GeForce GTX TITAN X", "2016")
    assert float(first["published_epoch_seconds_ratio"]) == 2.75


def test_seconds_with_evaluation_are_in_no_ratio_to_ours(store: Store, capsys: Any) -> None:
    record = make_record(0, 3.6, variants=("convnet",), depths=(8,), dataset="cifar2")
    store(record.model_copy(update={"dataset": "cifar2"}))
    out = harness("report --preset convnet", capsys)[1]
    assert re.search(r"8\.05 s.? ", out)
    assert (
        "on 8 threads of a Xeon E5-2698 v4, 2017; the seconds include evaluation, ours do not: github.com/" in out
    )
    assert "×)" not in out
    (first,) = csv.DictReader(io.StringIO(harness("report --format csv", capsys)[1]))
    assert (first["published_epoch_seconds"], first["published_epoch_seconds_ratio"]) == ("8.05", "")


@pytest.mark.parametrize("change", [{"limit_train": 1000}, {"batch_size": 64}, {"settings": ("crop=28",)}])
def test_a_cost_stands_only_beside_such_runs(store: Store, change: dict[str, Any], capsys: Any) -> None:
    store(make_record(0, 8.4, **change))
    assert "2.75×" not in harness("report", capsys)[1]


@pytest.mark.parametrize(("error", "word"), [(3.05, "PASS"), (5.0, "FAIL")])
def test_convnet_passes_above_95_percent(store: Store, error: float, word: str, capsys: Any) -> None:
    record = make_record(0, error, variants=("convnet",), depths=(8,), dataset="cifar2")
    store(record, errors=(10.25, 5.15, 3.75, 3.2, error))
    out = harness("report --preset convnet", capsys)[1]
    assert f"{word}: convnet-8 is {100 - error:.2f} % accurate on the test set of cifar10 after 5 epochs" in out
    assert f"accuracy % by epoch: 89.75, 94.85, 96.25, 96.80, {100 - error:.2f}" in out
    assert "published: 87.80, 94.45, 95.25, 96.00, 96.50" in out


@pytest.mark.parametrize(
    ("spec", "record", "result", "line"),
    [
        ({"val": 1000}, {}, {"evaluated_on": "val", "test_error": 7.0}, "FAIL: convnet-8 is 93.00 % accurate"),
        ({"val": 1000}, {}, {"evaluated_on": "val"}, "not all runs have an error of the test set"),
        ({"limit_test": 100}, {}, {}, "of 100 of the test images"),
        ({}, {"original": False}, {}, "cifar2 is not a published data set's own images"),
    ],
)
def test_a_preset_judges_the_whole_test_set_alone(
    store: Store, spec: dict[str, Any], record: dict[str, Any], result: dict[str, Any], line: str
) -> None:
    """An error of 4 % passes, but not of other images."""
    made = make_record(0, 4.0, variants=("convnet",), depths=(8,), dataset="cifar2", **spec)
    assert made.result
    whole = made.result.model_copy(update=result)
    made = made.model_copy(update={"dataset": "cifar2", "result": whole} | record)
    table = choose_rows(summarise([Stored(made, store(made) / made.name)]), "convnet")
    assert not table.met
    assert table.below[-1].startswith(line if "FAIL" in line else f"convnet-8 on cifar2 is not judged: {line}")
    assert any(text.startswith("accuracy % by epoch") for text in table.below) == ("val" not in spec)


def test_the_networks_of_a_preset_on_other_images(store: Store, capsys: Any) -> None:
    """They have their rows and are not missing; nothing is judged of them."""
    store(
        make_record(0, 4.0, dataset="digits"),
        make_record(0, 4.0, variants=("convnet",), depths=(8,), dataset="digits"),
    )
    code, out, _ = harness("report --preset cfmz", capsys)
    assert (code, "not run yet: msra-20," in out, "not run yet: msra-32," in out) == (0, False, True)
    (row,) = (words for line in out.splitlines() if (words := line.split())[:1] == ["20"])
    assert "8.29" in row, "as printed by the source, whatever the images"
    assert "TITAN" not in out
    assert "521" not in row, "costs are of as many images of that size"
    said = "the error on cifar10: not compared with that on cifar10"  # of a label that is invented
    assert said in out
    assert said not in harness("report", capsys)[1], "a table without that column"
    assert (
        "convnet-8 on cifar10 is not judged: its images are not those of cifar2"
        in harness("report --preset convnet", capsys)[1]
    )


def test_a_run_without_its_epochs_leaves_the_verdict(store: Store, capsys: Any) -> None:
    runs = store(*(make_record(s, 4.0, variants=("convnet",), depths=(8,), dataset="cifar2") for s in (0, 1)))
    next(runs.glob("*_s1_*/epochs.jsonl")).unlink()
    code, out, _ = harness("report --preset convnet", capsys)
    assert (code, "PASS: convnet-8 is 96.00 %" in out, "by epoch" in out) == (0, True, False)


def test_accuracy_and_total_time_are_columns(store: Store, capsys: Any) -> None:
    store(make_record(0, 8.4))
    out = harness("report --columns depth,accuracy,train_seconds", capsys)[1]
    assert re.search(r"20 +91\.60 +720", out)
    assert not METRICS["accuracy"].in_table


def test_the_published_error_is_a_line_in_the_chart(store: Store) -> None:
    record = make_record(0, 8.4)
    runs = store(record)
    (panel,) = make_panels(summarise([Stored(record, runs / record.name)]))
    (curve,) = panel.datasets["curves"]
    assert curve["published"] == 8.29
    assert "level: the published error" in panel.charts[0].caption
    other = make_record(0, 8.4, settings=("lr=0.05",))
    (panel,) = make_panels(summarise([Stored(other, store(other) / other.name)]))
    assert "published" not in panel.datasets["curves"][0]


def test_records_of_msras_older_recipe_have_rows_of_their_own_and_no_verdict(store: Store, capsys: Any) -> None:
    record = make_record(0, 8.4)
    older = record.model_copy(deep=True, update={"key": "0" * 16, "name": "cifar10_msra-20_s0_00000000"})
    older.spec["recipe"]["pad_mode"] = "zero"
    store(record, older)
    out = harness("report", capsys)[1]
    assert "recipe.pad_mode=mean" in out
    assert "recipe.pad_mode=zero" in out
    assert "pad_mode zero, theirs mean" in out
