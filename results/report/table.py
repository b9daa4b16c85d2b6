"""Rows, or a comparison of them -> the table a person reads, or numbers for a program."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, Literal

from harness.results.compare import Comparison, Pair, signed
from harness.results.metrics import METRICS, NONE
from harness.results.report.columns import DESCRIPTORS, SPARE, Column, find_columns, make_columns
from harness.results.report.files import to_csv, to_json
from harness.results.report.notes import comparison_notes, make_notes
from harness.results.report.text import Sheet, add_mark, clean, for_latex, for_markdown, for_terminal
from harness.results.rows import Row, incomparable

Format = Literal["table", "markdown", "csv", "json", "latex"]
LATEX_WIDTH = 80
"""Letters of \\footnotesize, about, beside each other on a page of `article`."""


def lay_out(
    rows: Sequence[Row], wanted: Sequence[str] = (), without: Collection[str] = ()
) -> tuple[list[Column], Sheet]:
    """The columns of the table, and the table: with what is said once above it, and the marks of the notes.

    Beside wanted columns stand those that tell rows apart. Raises ValueError for a wanted column that does not exist.
    """
    chosen = find_columns(wanted)
    known = make_columns()
    columns = [column for column in known if not column.hidden or column in chosen]
    words = {column.name: [clean(column.text(row)) for row in rows] for column in columns}
    shown, shared = _choose_columns(rows, columns, words)
    if wanted:
        telling = [c for c in shown if c in DESCRIPTORS and c not in chosen and len(set(words[c.name])) > 1]
        first = list(takewhile(DESCRIPTORS.__contains__, chosen))
        shown = [*first, *telling, *chosen[len(first) :]]
        shared = [column for column in shared if column not in chosen]
    shown = [column for column in shown if column.name not in without]
    above = [column.name for column in shared]
    lines = {column.name: [column.header, *words[column.name]] for column in (*shared, *shown)}
    for name in above:
        once = next(text for text in words[name] if text != NONE)
        lines[name][0] = f"training images: {once}" if name == "limit_train" else once
    order = list(lines)
    absent = {c.name for c in known if wanted or c.hidden or c.name in without} - lines.keys()
    forbidding = tuple(text for row in rows for text, _ in incomparable(row))
    placed: list[tuple[list[tuple[int, int]], str]] = []  # line, 0 for header and caption, and place in `order`
    for note, cells in make_notes(rows).items():
        if cells.keys() <= absent:
            if not note.startswith(forbidding):
                continue
            cells = {shown[0].name: set.union(*cells.values())}
        marks = set[tuple[int, int]]()
        for place, name in enumerate(order):
            if len(marked := cells.get(name, ())) == len(rows):
                marks.add((0, place))
            else:  # of some rows: what stands above is of all
                marks |= {(i + 1, max(place, len(above))) for i in marked}
        placed.append((sorted(marks), note))
    placed.sort(key=lambda note: note[0][:1] or [(len(rows) + 1, 0)])  # as a reader meets them
    notes = list[str]()
    for number, (places, note) in enumerate(placed, 1):
        notes.append(f"{add_mark('', number)} {clean(note)}" if places else clean(note))
        for i, place in places:
            line = lines[order[place]]
            line[i] = add_mark(line[i], number)
    heads, right = [lines[column.name][0] for column in shown], [column.right for column in shown]
    body = list(zip(*(lines[column.name][1:] for column in shown), strict=True))
    means = [f"{column.header}: {column.means}" for column in shown if column.means]
    styles = [[style_of(column.name, row) for column in shown] for row in rows]
    return shown, Sheet(heads, right, body, " · ".join(lines[name][0] for name in above), notes, means, styles)


def _choose_columns(
    rows: Sequence[Row], columns: Sequence[Column], words: dict[str, list[str]]
) -> tuple[list[Column], list[Column]]:
    """The columns that stand in the table, and those that all rows agree in, which are said above it."""
    shown, shared = list[Column](), list[Column]()
    on_gpu = any(row.done and row.fields.get("device") == "cuda" for row in rows)
    for column in columns:
        different = set(words[column.name])
        of_cpu = column.name in METRICS and METRICS[column.name].device == "cpu"
        nothing = {NONE, "all"} if column.name == "limit_train" else {NONE}
        if column.hidden or different <= nothing or (on_gpu and of_cpu):  # CSV and JSON have them
            continue
        if column.name == "device" and any(row.done for row in rows):
            different -= {NONE}  # a run that failed does not know its device
        (shared if len(different) == 1 and not column.stays else shown).append(column)
    return shown, shared


# --- rows -> text ---


def render(
    rows: Sequence[Row], format: Format = "table", *, columns: Sequence[str] = (), width: int = 100, fit: bool = False,
    colour: bool = False,
) -> str:  # fmt: skip
    """The table as text, with a line of what all rows share above it and its definitions below.

    table: for a terminal of that width; `fit`: without some columns, which it names, where there is no room for
    all, as latex always is. csv, json: `files`. `columns` chooses and orders what is shown: names of `make_columns`, or
    for csv and json names of theirs; none: all that say something. Raises ValueError for an unknown one.
    """
    if format in ("csv", "json"):
        return to_csv(rows, columns) if format == "csv" else to_json(rows, columns)
    if not rows:
        return "no runs\n"
    shown, sheet = lay_out(rows, columns)
    left_out: dict[str, str] = {}  # by name, with their headers
    if not columns and (format == "latex" or (fit and format == "table")):
        width = LATEX_WIDTH if format == "latex" else width
        widths = dict(zip((column.name for column in shown), sheet.widths, strict=True))
        for name in SPARE:
            if sum(widths.values()) + 2 * (len(widths) - 1) > width:
                widths.pop(name, None)
        left_out = {column.name: column.header for column in shown if column.name not in widths}
        shown, sheet = lay_out(rows, without=left_out) if left_out else (shown, sheet)
    if format != "table":
        return for_markdown(sheet) if format == "markdown" else for_latex(sheet, [*left_out])
    if left_out:
        sheet = replace(sheet, notes=[*sheet.notes, f"too narrow for {', '.join(left_out.values())}"])
    return for_terminal(sheet, width, fit=fit, colour=colour)


def style_of(name: str, row: Row) -> str:
    """How a cell looks: a key of `text.ANSI`, and a class in page.css."""
    if name == "error" and row.error is None:
        return "red" if row.failed else "yellow"
    if name == "verdict" and row.against:
        return {"better": "green", "worse": "red"}.get(row.against.word or "", "")
    return "bold" if name in ("variant", "depth", "error") else ""


# --- comparisons ---

DEFINITIONS = (
    "A, B: over n runs, as in harness report: mean ± std of errors, median of seconds, maximum of memory",
    "B − A: their difference: in points for percentages, in percent of A for everything else",
    "interval: the 90 % interval on which the verdict rests; of errors: on these test images",
    "verdict: equivalent where the interval lies within the margin, different where it lies beyond it; none on disturbed epochs",
)
HEADERS = ["what", "metric", "n", "A", "B", "B − A", "interval", "margin", "verdict"]
COLOURS = {"equivalent": "green", "different": "red"}


def render_comparison(
    pairs: Sequence[Pair], format: str = "table", *, width: int = 100, fit: bool = False, colour: bool = False
) -> str:
    """Every pair and metric in a line; then what else forbids a conclusion, and what the tests were."""
    figures = [figure for pair in pairs for figure in pair.figures]
    tests = dict.fromkeys(f"{figure.metric.title}: {figure.how}" for figure in figures if figure.how)
    definitions = [*DEFINITIONS, *tests]
    if format == "json":
        values = {"schema_version": 1, "pairs": list(map(_plain_pair, pairs)), "definitions": definitions}
        plain = json.loads(json.dumps(values), parse_constant=lambda _: None)  # JSON has no NaN
        return json.dumps(plain, indent=1, ensure_ascii=False) + "\n"
    if not pairs:
        return "nothing to compare: no row of A has a counterpart in B\n"
    both = [pair for pair in pairs if pair.a and pair.b]
    shared = set.intersection(*({(n, *v) for n, v in pair.differs.items()} for pair in both)) if both else set()
    caption = "B against A: " + (", ".join(f"{n} {a} → {b}" for n, a, b in sorted(shared)) or "same settings")
    cells = [line for pair in pairs for line in _lines(pair, {*pair.apart, *(name for name, *_ in shared)})]
    right = [name not in ("what", "metric", "verdict") for name in HEADERS]
    notes = [clean(f"{pair.name}: {problem}") for pair in pairs for problem in (*pair.problems(), *_notes(pair))]
    styles = [["bold", *[""] * 7, COLOURS.get(line[-1], "")] for line in cells]
    sheet = Sheet(HEADERS, right, cells, clean(caption), notes, definitions, styles)
    return for_markdown(sheet) if format == "markdown" else for_terminal(sheet, width, fit=fit, colour=colour)


def _lines(pair: Pair, named: set[str]) -> Iterator[list[str]]:
    own = ", ".join(f"{n} {a} → {b}" for n, (a, b) in pair.differs.items() if n not in named)
    what = clean(f"{pair.name} {own}".strip())
    for number, figure in enumerate(pair.figures):
        metric, interval, margin = figure.metric, figure.interval, figure.metric.margin
        unit = " %" if metric.relative else ""
        yield [
            what if number == 0 else "", metric.heading, f"{figure.a.n}, {figure.b.n}", metric.summary(figure.a),
            metric.summary(figure.b), NONE if figure.difference is None else f"{signed(figure.difference)}{unit}",
            NONE if interval is None else f"{signed(interval.low)} … {signed(interval.high)}",
            *([NONE, NONE] if margin is None else [f"±{margin:g}{unit}", figure.verdict + ": disturbed epochs" * figure.disturbed]),
        ]  # fmt: skip
    if not pair.figures:
        counts = ", ".join(str(len(side.done)) if side else NONE for side in (pair.a, pair.b))
        yield [what, NONE, counts, *[NONE] * 5, f"no result in {'B' if pair.a and pair.a.done else 'A'}"]


def _notes(pair: Pair) -> list[str]:
    """What a reader must know about its figures."""
    sides = [(side, row) for side, row in (("A", pair.a), ("B", pair.b)) if row and pair.figures]
    return [f"{side}: {text}" for side, row in sides for text in dict.fromkeys(comparison_notes(row))]


def _plain_pair(pair: Pair) -> dict[str, Any]:
    return {
        "name": pair.name, "a": pair.a and pair.a.name, "b": pair.b and pair.b.name, "differs": pair.differs,
        "problems": list(pair.problems()), "notes": _notes(pair), "figures": list(map(_plain_figure, pair.figures)),
    }  # fmt: skip


def _plain_figure(figure: Comparison) -> dict[str, Any]:
    metric = figure.metric
    sides = {side: {"n": f.n, "value": f.value, "std": f.std} for side, f in (("a", figure.a), ("b", figure.b))}
    return {
        "metric": metric.name, "unit": "percent" if metric.relative else "points", **sides, "difference": figure.difference,
        "interval": figure.interval, "margin": metric.margin, "verdict": figure.verdict, "disturbed": figure.disturbed, "test": figure.how,
    }  # fmt: skip
