"""Every measured figure in a page is what the stored readings say."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
UNITS = r"(?:%|s\b|seconds|ms\b|milliseconds|minutes|MiB|GiB|GB|images/s|img/s|times)"
MEASURED = re.compile(rf"\b\d[\d,.]*\s?{UNITS}")


@pytest.fixture(scope="module", autouse=True)
def _benchmarks() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture
def claims() -> ModuleType:
    return importlib.import_module("claims")


def pages() -> list[Path]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        found: list[Path] = importlib.import_module("claims").pages()
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return found


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_text_and_readings_agree(page: Path, claims: ModuleType) -> None:
    text = page.read_text()
    assert claims.write(text) == text, "python benchmarks/claims.py writes it"


def test_a_figure_that_differs_is_noticed(claims: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "load", lambda _: {"readings": {"harness --help": [0.10, 0.12, 0.20]}})
    text = "It starts in <!-- = seconds('x.json', 'harness --help') -->0.11<!-- / --> s."
    assert claims.write(text) == text.replace("0.11", "0.12")


def test_a_table_has_the_notes_that_its_marks_refer_to(claims: ModuleType) -> None:
    table, _, notes = claims.rows("h200_2026-11-27/runs").strip().partition("\n\n")
    assert table.startswith("| variant ")
    marks = set(re.findall("[¹²³⁴-⁹]", table))
    assert [line[0] for line in notes.splitlines()] == sorted(marks, key="¹²³⁴⁵⁶⁷⁸⁹".index)
    assert "- n: " not in notes


def test_the_interval_of_a_ratio_covers_the_truth() -> None:
    rounds = importlib.import_module("rounds")
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        drift = generator.lognormal(0, 0.3, 10)  # of the machine, alike for both
        a, b = (drift * generator.lognormal(level, 0.05, 10) for level in (np.log(1.1), 0.0))
        got = rounds.ratio(list(a), list(b))
        covered += got.low <= 1.1 <= got.high
    assert 180 <= covered <= 199  # the percentile bootstrap of a median of ten is near 95 %
    same = rounds.ratio([1.0, 1.1, 0.9, 1.0], [1.0, 1.0, 1.0, 1.0])
    assert not same.differs
    assert rounds.ratio([2.0, 2.1, 1.9], [1.0, 1.0, 1.0]).differs


def test_rounds_are_counterbalanced() -> None:
    rounds = importlib.import_module("rounds")
    order: list[str] = []
    ways = {name: lambda name=name: order.append(name) for name in "ab"}
    rounds.take_turns(ways, 2)
    assert order == ["a", "b", "b", "a"]


# Figures of no machine: definitions, limits, sizes of published data, error rates that the named tests simulate.
STATED = {
    "README.md": {"0.5 GB", "7 GB"},
    "clusters.md": {"0.5 s", "16 MiB", "20 s", "25 %", "50 %", "60 s", "64 MiB", "120 s", "300 s"},
    "data.md": {"8 GiB", "100 %", "150 GB", "161 MiB", "163 MiB"},
    "gpus.md": {"100 times", "2 %", "5 %", "5 s", "90 seconds"},
    "numbers.md": {
        "0.1 %",
        "0.25 s",
        "1.3 times",
        "2 %",
        "3 %",
        "4 %",
        "5 %",
        "7 %",
        "8 %",
        "8.55 %",
        "20 %",
        "50 %",
        "62 %",
        "87 %",
        "90 %",
        "92 %",
        "94 %",
        "95 %",
    },
    "running.md": {"8 %", "95 %"},
    "sweeps.md": {"100 %", "95 %", "99 %"},
    "variants.md": {"12.9 %", "87 %", "95 %"},
}


@pytest.mark.parametrize("page", [p for p in pages() if "records" not in p.parts], ids=lambda page: page.name)
def test_no_measured_figure_stands_outside_the_written_ones(page: Path, claims: ModuleType) -> None:
    bare = claims.FIGURE.sub("", page.read_text())
    prose = "\n".join(line for line in bare.splitlines() if not line.startswith("    "))
    figures = {match[0] for match in MEASURED.finditer(prose)}
    assert not figures - STATED.get(page.name, set())
    assert not STATED.get(page.name, set()) - figures, "no longer stated"
