"""Memory by category: the figure of the run that used most, as a chart, as words and as numbers."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from chromium import Browser, find_chromium
from numpy.typing import NDArray
from records import NOW, make_memory, make_record
from test_page import page_data

from harness.results.explain import why
from harness.results.frame import make_frame
from harness.results.report.charts import (
    MAX_BARS,
    category_colours,
    load_bundle,
    load_specs,
    make_panels,
    write_charts,
)
from harness.results.report.page import make_page
from harness.results.report.table import render
from harness.results.report.text import NOT_RECORDED, in_words, known, mib
from harness.results.rows import Row, summarise
from harness.results.store import finish, load_records
from harness.results.values import MEMORY_CATEGORIES

COLOURS = load_specs()["memory"]
COUNTED_TWICE = {"weights": 1.04, "activations": 300.0, "CUDA context": 480.0, "NCCL": 0.0, "unaccounted": -31.04}
SIMPLE = {"weights": 1.04, "activations": 250.0, "CUDA context": 480.0, "unaccounted": 18.96}


def store(out: Path, seed: int, categories: dict[str, float], **options: object) -> None:
    """A run whose whole memory is what its categories hold, or 900 MiB where none is told."""
    memory = make_memory(nvml_process_mib=sum(categories.values()) if categories else 900.0, rss_mib=2000.0)
    result = {"memory": memory.model_copy(update={"by_category_mib": categories})}
    finish(out, make_record(seed, 8.0 + seed / 10, result=result, **options))  # type: ignore[arg-type]


def load(out: Path) -> list[Row]:
    loaded = load_records([out])
    assert not loaded.problems
    return summarise(loaded.records)


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """msra-20: two seeds, whose larger run counts some of it twice; msra-32: not recorded."""
    store(tmp_path / "runs", 0, COUNTED_TWICE)
    store(tmp_path / "runs", 1, SIMPLE | {"activations": 200.0})
    store(tmp_path / "runs", 0, {}, depths=(32,))
    return load(tmp_path / "runs")


def test_a_row_shows_the_run_that_used_most_and_says_so(rows: list[Row]) -> None:
    shallow, deep = rows
    assert shallow.by_category_mib == COUNTED_TWICE
    assert sum(shallow.by_category_mib.values()) == pytest.approx(shallow.figures["nvml_process_mib"].value)
    assert not deep.by_category_mib
    text = why(shallow)
    assert "by category: weights 1.04, activations 300, CUDA context 480, unaccounted −31.0 (some of it" in text
    assert all("NCCL" not in line for line in text.splitlines() if "by category" in line), "it holds nothing"
    assert "by category" not in why(deep)
    raw = json.loads(render(rows, "json"))["rows"]
    assert [row["memory_activations_mib"] for row in raw] == [300.0, None]
    assert [row["memory_unaccounted_mib"] for row in raw] == [-31.04, None]
    (first, second) = csv.DictReader(io.StringIO(render(rows, "csv")))
    assert (first["memory_cuda_context_mib"], second["memory_cuda_context_mib"]) == ("480.0", "")
    frame = make_frame([*shallow.done, *deep.done])
    assert frame["by_category_mib.activations"].dropna().tolist() == [300.0, 200.0]


def test_figures_that_are_none_are_left_out() -> None:
    assert known({"weights": math.nan, "activations": 2.0, "new category": 1.0}) == {
        "activations": 2.0,
        "new category": 1.0,
    }
    assert list(known(dict.fromkeys(("unaccounted", "weights"), 1.0))) == ["weights", "unaccounted"]
    assert in_words({"unaccounted": 3.0}) == "unaccounted 3.00"
    assert [mib(x) for x in (0.52, 12.34, 1234.5, -12.0)] == ["0.52", "12.3", "1,234", "−12.0"]
    assert set(COLOURS) == {*MEMORY_CATEGORIES, "other"}
    assert category_colours({"row": {"new category": 1.0}})["new category"]


def test_the_chart_holds_every_part(rows: list[Row], tmp_path: Path) -> None:
    text = make_page(rows, bundle="", made_at=NOW)
    (panel,) = page_data(text)["panels"]
    values = panel["datasets"]["categories"]
    assert {v["row"] for v in values} == {"msra-20"}
    assert {v["category"]: v["mib"] for v in values} == known(COUNTED_TWICE)
    assert "count twice" in text
    assert NOT_RECORDED not in text
    assert '<td class="r">−31.0</td><td class="r">750</td>' in text  # the table beside it ends with the whole
    written = {path.name: path for path in write_charts(make_panels(rows), tmp_path / "charts")}
    svg = written["cifar10-categories.svg"].read_text()
    assert "msra-20: 750 MiB" in svg.replace("\u00a0", " ").replace(":  ", ": ")
    assert COLOURS["activations"] in svg
    assert COLOURS["NCCL"] not in svg


def test_without_a_record_of_it_one_line_says_so(rows: list[Row]) -> None:
    text = make_page(rows[1:], bundle="", made_at=NOW)
    assert text.count(NOT_RECORDED) == 1
    assert 'data-chart="categories"' not in text


def test_many_rows_keep_to_the_best(tmp_path: Path) -> None:
    for k in range(MAX_BARS + 3):
        store(tmp_path, 0, SIMPLE, settings=(f"lr={0.1 + k / 1000}",))
    (panel,) = make_panels(load(tmp_path))
    assert len(panel.categories) == MAX_BARS
    assert f"the {MAX_BARS} rows" in panel.charts[-1].caption


# Machado, Oliveira, Fernandes 2009: a colour as seen without one of the cones (linear RGB)
SEEN = np.array([
    np.eye(3),
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
])  # fmt: skip
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> NDArray[np.float64]:
    values = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def cielab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    share = XYZ @ np.clip(rgb, 0, 1) / np.array([0.9505, 1, 1.089])
    x, y, z = np.where(share > 0.008856, np.cbrt(share), 7.787 * share + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_categories_are_told_apart_by_the_colour_blind() -> None:
    of_gpu = [
        category for category in MEMORY_CATEGORIES if category != "process at its start"
    ]  # that of a CPU has the CUDA context's place
    assert COLOURS["process at its start"] == COLOURS["CUDA context"]
    for sight in SEEN:
        seen = [cielab(sight @ linear(COLOURS[category])) for category in of_gpu]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 15
        assert min(np.linalg.norm(a - b) for a, b in itertools.pairwise(seen)) > 25


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed")
def test_bars_in_a_real_browser(rows: list[Row], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(make_page(rows, bundle=load_bundle(Path(os.environ["HARNESS_CACHE"])), made_at=NOW))
    with Browser() as browser:
        browser.open(path, width=390, height=844)
        bars = "[...document.querySelectorAll('[data-chart=categories] .mark-rect path')].map((p) => p.getBoundingClientRect())"
        widths = browser.ask(f"{bars}.map((b) => b.width)")
        assert sum(width > 0.5 for width in widths) >= 3
        assert browser.ask("document.documentElement.scrollWidth") <= 390
        # what is counted twice lies left of where the others begin; the tick is left of where they end
        lefts = browser.ask(f"{bars}.map((b) => b.left)")
        assert sorted(lefts)[0] < sorted(lefts)[1] - 3
        browser.ask("document.querySelector('.chips button')?.click()")
        assert browser.complaints == []
