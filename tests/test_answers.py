"""compare, why, repro and the options of report: answers, exit codes, mistakes."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from command import harness
from records import ENVIRONMENT, make_record
from rich.console import Console

from harness import cli, plan
from harness.commands import run
from harness.commands.report import make_command, make_repro, print_why
from harness.models.variants import VARIANTS
from harness.options import ENGINES, RunOptions
from harness.resources import allocate, fill_from_specs
from harness.results.store import Stored, finish
from harness.results.values import Failure


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A: dali, three seeds of two depths. B: dataloader, slower by a tenth and worse by a point. A failed run in A."""
    for seed, error in enumerate((8.0, 8.1, 8.2)):
        for depth in (20, 32):
            finish(tmp_path / "a", make_record(seed, error - depth / 100, depths=(depth,)))
            finish(
                tmp_path / "b",
                make_record(seed, error - depth / 100 + 1, depths=(depth,), loader="dataloader", seconds=4.4),
            )
    finish(tmp_path / "a", make_record(3, 0.0, failure=Failure(kind="OOM", message="out of memory")))
    return tmp_path


def test_compare_folders_and_by_field(runs: Path, capsys: Any) -> None:
    code, out, err = harness(f"compare {runs}/a {runs}/b", capsys)
    assert (code, err) == (0, "")
    assert "loader dali → dataloader" in out
    assert "+1.00" in out
    assert "+10.00 %" in out
    assert out.count("different") >= 2
    code, by, _ = harness(f"compare {runs}/a {runs}/b --by loader --format markdown", capsys)
    assert code == 0
    assert "loader dali → dataloader" in by
    assert by.count("s/epoch") >= 2
    code, text, _ = harness(f"compare {runs}/a {runs}/b --format json", capsys)
    figures = json.loads(text)["pairs"][0]["figures"]
    assert [figure["metric"] for figure in figures] == ["error", "epoch_seconds"]
    assert figures[0]["difference"] == pytest.approx(1.0)


def test_fail_on_decides_the_exit_code(runs: Path, capsys: Any) -> None:
    for condition, expected in (("error>+0.3", 1), ("error>1.5", 0), ("error<1.5,epoch_seconds>5%", 1)):
        code, _, err = harness(f"compare {runs}/a {runs}/b --fail-on '{condition}'", capsys)
        assert code == expected
        assert ("fails" in err) == (expected == 1)


def test_a_name_neither_breaks_a_line_of_fail_on_nor_controls_the_terminal(tmp_path: Path, capsys: Any) -> None:
    for side, error in (("a", 8.0), ("b", 18.0)):
        for seed in range(3):
            record = make_record(seed, error + seed / 10).model_copy(update={"dataset": "pets\x1b[2J\n\u202eb"})
            finish(tmp_path / side, record)
    code, _, err = harness(f"compare {tmp_path}/a {tmp_path}/b --fail-on 'error>1'", capsys)
    assert (code, err.count("\n")) == (1, 1)
    assert "msra-20 pets�[2J��b: error>+1 fails" in err


MISTAKES = {
    "compare A": "compare takes two folders, or --by FIELD: 1 folder given",
    "compare A B A": "3 folders given",
    "compare A nowhere": "no folder of results",
    "compare A empty": "no finished run in",
    "compare A --by loader": "all runs have loader dali",
    "compare A --by lodaer": "did you mean loader?",
    "compare A B --fail-on error=3": "--fail-on: cannot read 'error=3'",
    "compare A B --fail-on eror>3": "did you mean error?",
    "compare A B --format csv": "allowed: table, markdown, json",
    "why mrsa-20 A": "did you mean msra-20",
    "why 0 A": "has rows 1 to 2",
    "why 3 A": "has rows 1 to 2",
    "repro nonsense A": "no run 'nonsense' among the 7",
    "report A --sort eror": "did you mean error?",
    "report A --columns variant,eror": "did you mean error?",
    "report A --columns eror --format csv": "column 'eror' is unknown",
    "report A --across wokers": "field 'wokers' is unknown",
    "report A --output A": "cannot be written",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(line: str, runs: Path, capsys: Any) -> None:
    (runs / "empty").mkdir()
    names = {"A": runs / "a", "B": runs / "b", "nowhere": runs / "nowhere", "empty": runs / "empty"}
    words = [str(names.get(word, word)) for word in line.split()]
    code, out, err = harness(shlex.join(words), capsys)
    assert (code, out) == (2, "")
    assert MISTAKES[line] in err
    assert err.count("\n") == 1


def test_report_sorts_chooses_columns_and_writes_a_file(runs: Path, capsys: Any) -> None:
    line = f"report {runs}/a {runs}/b --sort -error --columns depth,loader,error"
    line += f" --output {runs}/deep/table.csv"
    code, out, _ = harness(line, capsys)
    assert (code, out) == (0, "")
    table = list(csv.reader(io.StringIO((runs / "deep/table.csv").read_text())))
    assert table[0] == ["depth", "loader", "error_percent_mean"]
    assert [row[:2] for row in table[1:]] == [
        ["20", "dataloader"],
        ["32", "dataloader"],
        ["20", "dali"],
        ["32", "dali"],
    ]
    line = f"report {runs}/a --columns depth,error --output {runs}/TABLE.CSV"
    assert harness(line, capsys)[0] == 0
    assert (runs / "TABLE.CSV").read_text().startswith("depth,error_percent_mean")
    code, out, _ = harness(f"report {runs}/a --columns error,depth --sort depth --format markdown", capsys)
    lines = [line.split("|") for line in out.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in lines[0][1:3]] == ["error %²", "depth"]
    assert "alloc" not in out
    code, out, _ = harness(f"report {runs}/a {runs}/b --across loader --format csv", capsys)
    assert [row["n"] for row in csv.DictReader(io.StringIO(out))] == ["6", "6"]


def test_why_by_name_and_by_number(runs: Path, capsys: Any) -> None:
    code, by_name, _ = harness(f"why msra-20 {runs}/a", capsys)
    assert code == 0
    for words in ("error % 7.90 ± 0.10", "seed 3 failed: OOM", "loader = dali"):
        assert words in by_name
    assert harness(f"why 1 {runs}/a", capsys)[1] == by_name
    assert harness(f"why 2 {runs}/a", capsys)[1].startswith("msra-32")


REPEATED: list[dict[str, Any]] = [
    {},
    {"epochs": 30, "batch_size": 256, "val": 5000},
    {"settings": ("lr=0.05", "weight_decay=0.0005")},
    {"workers": 8, "precision": "bf16", "loader": "dataloader", "limit_train": 1000},
    {"variants": ("he2015",), "depths": (110,)},
    *({"variants": (name,), "depths": (), "engine": engine} for name in tuple(VARIANTS) for engine in ENGINES),
]


@pytest.mark.parametrize("changes", REPEATED, ids=lambda changes: ",".join(map(str, changes.values())) or "none")
def test_the_command_of_repro_plans_the_same_run(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is parsed as the command line parses it, and then its plan is expanded."""
    record = make_record(7, 8.0, **changes)
    folder = finish(tmp_path, record)
    command = make_command(Stored(record, folder))
    assert command[command.index("--data-dir") + 1] == "my data"
    grids: list[Any] = []

    def run_grid(grid: plan.Grid, options: RunOptions, console: Any) -> int:
        grids.append((grid, options))
        return 0

    monkeypatch.setattr(run, "run_grid", run_grid)
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        cli.main()
    ((grid, options),) = grids
    assert options.out == "repro"
    resources = fill_from_specs(options, grid, 8)
    allocation = allocate(resources, have_gpus=8, have_cpus=8, precision=grid.precision)
    (spec,) = plan.expand(grid, allocation, fingerprint="f" * 64, train_images=50_000)
    assert (spec.key, spec.engine) == (record.key, record.spec["engine"])


def test_repro_finds_the_images_however_they_were_named() -> None:
    for words in (["--data-dir", "my data"], ["--data-dir=my data"]):
        environment = {"command": ["harness", "run", *words, "--gpus", "0"]}
        command = make_command(
            Stored(make_record(0, 8.0).model_copy(update={"environment": environment}), Path("x"))
        )
        assert command[-2:] == ["--data-dir", "my data"]


def test_repro_says_what_it_cannot_promise(runs: Path, capsys: Any) -> None:
    record = make_record(0, 8.0)
    text = make_repro(Stored(record, Path("x")))
    assert f"git checkout {ENVIRONMENT['commit']}\n" in text
    assert "pip install torch==2.15.0 ray==2.60.0\n" in text
    assert "driver 580.1" in text
    assert "harness run --depths 20,32 --data-dir 'my data'" in text
    assert "harness run --spec x/record.json --out repro --data-dir 'my data'\n" in text
    other = record.model_copy(update={"key": hashlib.sha256(b"x").hexdigest()[:16]})
    dirty = other.model_copy(update={"environment": ENVIRONMENT | {"dirty": True}})
    text = make_repro(Stored(dirty, Path("x")))
    assert "uncommitted changes" in text
    assert "gives it another key" in text
    unknown = record.model_copy(update={"spec": record.spec | {"recipe": {}}})
    assert "cannot train it: recipe.duration: Field required" in make_repro(Stored(unknown, Path("x")))
    assert "not known" in make_repro(Stored(other.model_copy(update={"environment": {}}), Path("x")))
    for name in (record.key[:6], record.name, f"{runs}/a/{record.name}"):
        code, out, _ = harness(f"repro {name} {runs}/a", capsys)
        assert code == 0
        assert f"# {record.name}, done 2026-01-02 03:04 UTC" in out


def test_repro_is_not_led_astray_by_a_name(runs: Path) -> None:
    """What it prints may be run by a shell: a record's words stay words, and comments stay one line."""
    record = make_record(0, 8.0)
    evil = record.model_copy(update={"name": "x\nrm -rf /"})
    lines = make_repro(Stored(evil, Path("a; rm -rf /"))).splitlines()
    assert not [line for line in lines if line.startswith("rm")]
    assert "'a; rm -rf /record.json'" in "\n".join(lines)


def test_a_terminal_folds_prose_at_words(runs: Path) -> None:
    narrow = Console(file=(file := io.StringIO()), width=60, force_terminal=True)
    print_why("1", runs / "a", narrow)
    wide = Console(file=(whole := io.StringIO()), width=60)
    print_why("1", runs / "a", wide)
    assert max(len(line) for line in file.getvalue().splitlines() if " " in line.strip()) <= 60
    assert str(runs / "a") in file.getvalue()
    assert file.getvalue().split() == whole.getvalue().split()
