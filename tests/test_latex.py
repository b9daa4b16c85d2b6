"""The LaTeX table: what stands in it, and that TeX sets it within a page without a complaint."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_table import make_run

from harness.results.report.table import render
from harness.results.report.text import Sheet, for_latex
from harness.results.rows import Row, summarise
from harness.results.values import Failure

PACKAGES = {r"\toprule": "booktabs", r"\caption": ""}


def make_rows() -> list[Row]:
    """Published and not, of two precisions, one that failed, and a name that TeX would read as commands."""
    runs = [make_run(seed, 8.3 + seed / 10, precision=p) for seed in range(3) for p in ("fp32", "bf16")]
    runs += [make_run(seed, 12.3 + 2 * seed, depth=110) for seed in range(2)]
    runs += [make_run(0, depth=56, failure=Failure(kind="OOM", message="no room: 100 % & more_of #1"))]
    runs += [make_run(0, dataset="a_b&c%$#{}~^\\", original=False, workers=2, result={"widths": (2, 1)})]
    return summarise(runs)


def split(page: str) -> tuple[list[str], list[list[str]]]:
    """The columns of the tabular, and its header and lines of cells."""
    found = re.search(r"\\begin{tabular}{@{}(.*)@{}}\n", page)
    assert found
    columns = re.findall("[lr]", found[1])
    body = page.split(r"\toprule")[1].split(r"\bottomrule")[0].replace("\\midrule\n", "")
    return columns, [line.removesuffix(r" \\").split(" & ") for line in body.strip().splitlines()]


def test_a_floating_table_with_caption_label_and_notes() -> None:
    page = render(make_rows(), "latex")
    order = [r"% \usepackage{booktabs}", r"\begin{table*}", r"\caption{", r"\label{tab:results}",
             r"\begin{tabular}", r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}",
             "\n\\textsuperscript{1} ", r"\end{table*}"]  # fmt: skip
    assert sorted(order, key=page.index) == order
    for sign, package in PACKAGES.items():
        assert sign in page
        assert package in page.splitlines()[0]
    assert page.count("{") - page.count(r"\{") == page.count("}") - page.count(r"\}")
    assert r"a\_b\&c\%\$\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}" in page
    assert all(ord(letter) < 256 for letter in page)
    assert r"no room: 100 \% \& more\_of \#1" in page


def test_numbers_are_aligned_at_the_point() -> None:
    sheet = Sheet(
        ["name", "error %¹", "s", "wide", "word"],
        [False, True, True, True, True],
        [["a", "8.40 ± 0.14²", "1,234", "8.29 (+0.11 ± 0.51)", "one"], ["b", "11.40 ± 1.14", "0.125", "–", "two"],
         ["c", "OOM", "−4.5 ± 0.25", "27", "three"]],
    )  # fmt: skip
    columns, (header, *lines) = split(for_latex(sheet))
    assert columns == ["l", "r", "l", "r", "l", "r", "l", "r", "l"]
    assert header == ["name", r"\multicolumn{2}{c}{error \%\textsuperscript{1}}", r"\multicolumn{2}{c}{s}",
                      r"\multicolumn{2}{c}{wide}", r"\multicolumn{2}{c}{word}"]  # fmt: skip
    assert lines == [
        ["a", "8", r".40 $\pm$ 0.14\textsuperscript{2}", "1,234", "", "8", r".29 (+0.11 $\pm$ 0.51)", "", "one"],
        ["b", "11", r".40 $\pm$ 1.14", "0", ".125", "", "--", "", "two"],
        ["c", "", "OOM", "$-$4", r".5 $\pm$ 0.25", "27", "", "", "three"],
    ]
    whole = Sheet(["n"], [True], [["3"], ["1,234"]])
    assert split(for_latex(whole)) == (["r"], [["n"], ["3"], ["1,234"]])


def test_every_line_has_every_column() -> None:
    page = render(make_rows(), "latex")
    columns, lines = split(page)
    for line in lines:
        assert len(line) + sum(r"\multicolumn{2}" in cell for cell in line) == len(columns)
    assert "--columns chooses" in page, "what a page has no room for is named"
    assert "--columns" not in render(make_rows(), "latex", columns=("variant", "depth", "error"))


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no TeX is installed: pdflatex with booktabs")
@pytest.mark.parametrize("options", ["", "twocolumn"])
def test_tex_sets_it_within_the_page(options: str, tmp_path: Path) -> None:
    runs: list[Any] = [make_run(seed, depth=depth) for seed in range(3) for depth in (20, 56, 110)]
    for name, rows in {"mixed": make_rows(), "plain": summarise(runs)}.items():
        table = render(rows, "latex")
        text = rf"\documentclass[{options}]{{article}}\usepackage{{booktabs}}\begin{{document}}"
        (tmp_path / f"{name}.tex").write_text(f"{text}\nWords.\n{table}\\end{{document}}\n", encoding="utf-8")
        made = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", f"{name}.tex"],
                              cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)  # fmt: skip
        assert made.returncode == 0, made.stdout[-2000:]
        if options or name == "plain":  # twocolumn: where the names of rows alone are as wide as one column
            assert "Overfull" not in made.stdout, made.stdout
        assert (tmp_path / f"{name}.pdf").stat().st_size > 10_000
