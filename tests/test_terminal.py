"""What a terminal of 40, 80 and 140 columns shows: figures whole, nothing wrapped inside a word."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from records import make_epoch
from rich.cells import cell_len
from rich.console import Console
from test_estimate import make_specs
from test_table import make_run

from harness.cluster.job import Entered, Failed, Started
from harness.models.variants import Recipe
from harness.progress import Progress, duration, print_columns
from harness.results.compare import compare
from harness.results.report.table import render, render_comparison
from harness.results.report.text import Sheet, fold, for_markdown, for_terminal
from harness.results.rows import summarise


def draw(width: int, *events: Any, failed: bool = False) -> list[str]:
    """The live table of two runs after these events of the first."""
    file = io.StringIO()
    console = Console(file=file, width=width, height=30, force_terminal=True, color_system=None)
    specs = make_specs(device="cpu", workers=1, seeds=(0, 1), depths=(20,))
    table = Progress(specs, {spec.key: 164 for spec in specs}, console, concurrent_runs=1)
    for event in events:
        table.event(specs[0], event)
    if failed:
        table.event(specs[0], Failed(exception="ValueError", message="x" * 300, traceback="", died=False))
    file.seek(0)
    file.truncate()
    console.print(table.render())
    return [line.rstrip() for line in file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [40, 80, 140])
def test_the_live_table_keeps_figures_whole(width: int) -> None:
    metrics = make_epoch(12, loss=1.23456, error=34.5678, train_seconds=1234.567)
    lines = draw(width, Started(attempt=1), Entered(), metrics)
    assert max(map(len, lines)) <= width
    assert lines[0].split()[:4] == ["run", "epoch", "loss", "error"]
    for figure in ("12/164", "1.235", "34.57", "1234.57"):
        assert figure in lines[1], lines
    assert any(sign in lines[1] for sign in "━╸") == (width > 40), "a bar where there is room"
    assert len(draw(width, Started(attempt=1), failed=True)) == len(lines), "a long note takes no second line"


def test_columns_that_do_not_fit_are_left_out_and_named() -> None:
    columns = {"variant": ["msra", "he2015"], "state": ["to do", "done"], "key": ["01234567"] * 2}
    spare = ("key", "state")
    for width, terminal, left_out in [(24, True, ""), (23, True, "key"), (9, True, "state, key"), (9, False, "")]:
        file = io.StringIO()
        console = Console(file=file, width=width, force_terminal=terminal, color_system=None)
        print_columns(columns, console, title="2 runs", left=("variant", "state", "key"), spare=spare)
        lines = file.getvalue().splitlines()
        assert lines[1].split() == [name for name in columns if name not in left_out.split(", ")]
        assert [line.split()[0] for line in lines[2:4]] == ["msra", "he2015"]
        assert " ".join(" ".join(lines[4:]).split()) == (f"too narrow for {left_out}" if left_out else "")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.034, "0.034 s"), (2.46, "2.5 s"), (25.2, "25 s"), (59.7, "1 min"), (190, "3 min 10 s"), (3599.7, "1 h"),
        (11_400, "3 h 10 min"), (172_799, "2 d"), (442_800, "5 d 3 h"),
    ],
)  # fmt: skip
def test_seconds_in_units_that_people_read(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_the_live_table_of_many_runs_compares_no_run_with_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is drawn four times a second, beside runs that want the CPU."""
    specs = make_specs(device="cpu", workers=1, seeds=tuple(range(300)), depths=(20,))
    specs = [replace(spec, recipe=replace(spec.recipe)) for spec in specs]
    table = Progress(specs, {spec.key: 164 for spec in specs}, Console(file=io.StringIO()), concurrent_runs=1)
    compared = list[str]()
    for name in ("__eq__", "__hash__"):
        monkeypatch.setattr(Recipe, name, lambda *_, name=name: compared.append(name) or 0)
    table.event(specs[0], make_epoch(1))
    table.render()
    assert not compared


@pytest.mark.parametrize("width", [80, 20])
def test_wide_letters_take_two_cells(width: int) -> None:
    sheet = Sheet(["data set", "error"], [False, True], [["数据集数据集", "1.5"], ["a folder of images", "12.5"]])
    lines = for_terminal(sheet, width).splitlines()
    assert max(map(cell_len, lines)) <= width
    ends = {cell_len(line) for line in lines if line.endswith((".5", "error", "─"))}
    assert len(ends) == 1, "the figures stand below each other"


@pytest.mark.parametrize("width", [40, 80, 140])
def test_no_line_of_a_table_runs_past_the_edge(width: int) -> None:
    """Not of rows that differ in so much that no column can be left out, nor of a comparison; and no figure is lost."""
    differences: list[dict[str, Any]] = [
        {"overrides": ["lr=0.05", "weight_decay=0.0005", "label_smoothing=0.1"]}, {"loader": "dataloader"}, {"precision": "bf16"},
        {"engine": "compile"}, {"workers": 8}, {"limit_train": 5000}, {"dataset": "a-data-set-with-a-long-name"}, {},
        {"result": {"device": "NVIDIA A100-SXM4-80GB"}}, {"torch": "2.16.0.dev20260101+cu130"}, {"deterministic": True},
    ]  # fmt: skip
    rows = summarise([make_run(seed, 8.25, **change) for change in differences for seed in range(2)])
    page = render(rows, width=width, fit=True)
    assert max(map(cell_len, page.splitlines())) <= width
    assert page.count("8.25 ± 0.00") == len(rows), "figures are whole"
    words = "".join(page.split())
    assert all(
        word in words for word in ("dataloader", "compile", "a-data-set-with-a-long-name", "weight_decay=0.0005")
    )
    across = ("loader", "engine", "precision")
    changes: list[dict[str, Any]] = [{}, {"loader": "resident", "engine": "compile", "precision": "bf16"}]
    runs = ([make_run(seed, 8.25 - bool(change) / 4, **change) for seed in range(3)] for change in changes)
    pairs = compare(*(summarise(side, (), across) for side in runs), (), across)
    page = render_comparison(pairs, width=width, fit=True)
    assert max(map(cell_len, page.splitlines())) <= width
    assert "−0.25" in page


def test_a_table_that_cannot_be_folded_is_a_paragraph_a_row() -> None:
    cells = [
        ["msra-20", "a_long_word_without_a_space", "8.31 ± 0.12", "–"],
        ["msra-32", "–", "7.50 ± 0.11", "1,890"],
    ]
    sheet = Sheet(["row", "changed", "error %", "MiB"], [False, False, True, True], cells)
    assert for_terminal(sheet, 30).splitlines() == [
        "row msra-20 · changed", "  a_long_word_without_a_space", "  · error % 8.31 ± 0.12",
        "row msra-32 · error %", "  7.50 ± 0.11 · MiB 1,890",
    ]  # fmt: skip
    assert for_terminal(sheet, 42).splitlines()[0] == "row      changed            error %    MiB"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", [""]), ("as it is", ["as it is"]), ("between the words of it", ["between", "  the", "  words of", "  it"]),
        ("abcdefghijklm no", ["abcdefghij", "klm no"]), ("数据集数据集", ["数据集数据", "集"]),
    ],
)  # fmt: skip
def test_text_is_folded_between_words(text: str, lines: list[str]) -> None:
    assert fold(text, 10, "  ") == lines


def test_a_table_without_rows() -> None:
    empty = Sheet(["variant", "error %"], [False, True], [], "nothing yet", [], [], [])
    assert for_terminal(empty, 40).splitlines()[2:] == ["variant  error %", "───────  ───────"]
    assert "| variant   |   error % |" in for_markdown(empty)
