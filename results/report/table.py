"""Rows -> the table a person reads, or numbers for a program."""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from harness.results.metrics import METRICS, NONE, UNKNOWN
from harness.results.report import text as cells
from harness.results.report.columns import (
    NUMBER,
    Column,
    check_names,
    cost_entry,
    epoch_seconds_ratio,
    find_columns,
    make_columns,
    progress,
    pruned_at,
)
from harness.results.report.notes import Note, make_notes
from harness.results.report.text import SUPERSCRIPT, Sheet, clean, escape_latex, escape_markdown, paint
from harness.results.rows import Row
from harness.results.values import MEMORY_CATEGORIES, setting
from harness.results.verdict import seeds_to_tell

Format = Literal["table", "markdown", "csv", "json", "latex"]
FORMATS: tuple[Format, ...] = ("table", "markdown", "csv", "json", "latex")


@dataclass(frozen=True, slots=True)
class Layout:
    """What stands in the table, above it and below it."""

    caption: str  # what all rows share
    columns: list[Column]  # the first numbers the rows
    words: dict[str, list[str]]  # column -> a cell for each row, without marks
    marks: dict[tuple[int, str], list[int]]  # (row, column) -> numbers of notes
    header_marks: dict[str, list[int]]  # column -> numbers of notes that hold for all its cells
    sheet: Sheet  # the words with their marks
    notes: list[str]
    means: list[str]  # "error %: ..."

    @property
    def numbered(self) -> list[str]:
        return [f"{_mark([number])} {note}" for number, note in enumerate(self.notes, 1)]


def _mark(numbers: Sequence[int]) -> str:
    return ",".join(str(number).translate(SUPERSCRIPT) for number in numbers)


def lay_out(rows: Sequence[Row], wanted: Sequence[str] = ()) -> Layout:
    """Which columns stand in the table, what is said once above it, and which marks go where.

    Raises ValueError for a wanted column that does not exist.
    """
    chosen = find_columns(wanted)
    texts = {column.name: [column.text(row) for row in rows] for column in make_columns()}
    shown, shared = _choose_columns(rows, texts)
    if wanted:
        shown, shared = chosen, [column for column in shared if column.name not in wanted]
    columns = [NUMBER, *shown]
    names = {column.name for column in columns}
    notes = [note for note in make_notes(rows) if not wanted or any(name in names for _, name in note.cells)]
    marks, header_marks = _place_marks(notes, names, len(rows))
    caption = []
    for column in shared:
        text = next(text for text in texts[column.name] if text != NONE)
        text = f"training images: {text}" if column.name == "limit_train" else text
        caption.append(text + _mark(header_marks.get(column.name, ())))
    texts[NUMBER.name] = [str(i) for i in range(1, len(rows) + 1)]
    words = {name: [clean(text) for text in texts[name]] for name in names}
    sheet = Sheet(
        [column.header + _mark(header_marks.get(column.name, ())) for column in columns],
        [column.right for column in columns],
        [[words[c.name][i] + _mark(marks.get((i, c.name), ())) for c in columns] for i in range(len(rows))],
    )
    means = [f"{column.header}: {column.means}" for column in columns if column.means]
    texts_of_notes = [clean(note.text) for note in notes]
    return Layout(clean(" · ".join(caption)), columns, words, marks, header_marks, sheet, texts_of_notes, means)


def _choose_columns(rows: Sequence[Row], texts: dict[str, list[str]]) -> tuple[list[Column], list[Column]]:
    """The columns that stand in the table, and those that all rows agree in, which are said above it."""
    shown: list[Column] = []
    shared: list[Column] = []
    on_gpu = any(row.done and row.fields.get("device") == "cuda" for row in rows)
    for column in make_columns():
        different = set(texts[column.name])
        metric = METRICS.get(column.name)
        if metric is not None and metric.device == "cpu" and on_gpu:
            continue  # CSV and JSON have it
        if column.hidden or different <= {NONE} or (column.name == "limit_train" and different == {"all"}):
            continue
        if column.name == "device" and any(row.done for row in rows):
            different -= {NONE}  # a run that failed does not know its device
        (shared if len(different) == 1 and not column.stays else shown).append(column)
    return shown, shared


def _place_marks(
    notes: Sequence[Note], shown: set[str], rows: int
) -> tuple[dict[tuple[int, str], list[int]], dict[str, list[int]]]:
    """Numbers of notes by cell, and by column where a note holds for every row or the column is not shown."""
    marks: dict[tuple[int, str], list[int]] = defaultdict(list)
    header_marks: dict[str, list[int]] = defaultdict(list)
    for number, note in enumerate(notes, 1):
        for name in dict.fromkeys(name for _, name in sorted(note.cells)):
            members = [i for i, n in note.cells if n == name]
            if len(members) == rows or name not in shown:
                header_marks[name].append(number)
            else:
                for i in members:
                    marks[i, name].append(number)
    return dict(marks), dict(header_marks)


# --- rows -> text ---


def render(
    rows: Sequence[Row],
    format: Format = "table",
    *,
    width: int = 100,
    colour: bool = False,
    columns: Sequence[str] = (),
) -> str:
    """The table as text, with a line of what all rows share above it and its definitions below.

    table: for a terminal of that width; in two or three parts where it would not fit. markdown, latex: one table.
    csv, json: raw numbers, units in the names, nothing rounded. `columns` chooses and orders what is shown: names of
    `make_columns`, or for csv and json names of theirs; none: all that say something. Raises ValueError for an
    unknown one.
    """
    if format in ("csv", "json"):
        plain = _all_values(rows)
        if columns and plain:
            check_names(columns, list(plain[0]))
            plain = [{name: values[name] for name in columns} for values in plain]
        return _csv(plain) if format == "csv" else _json(rows, plain)
    if not rows:
        return "no runs\n"
    layout = lay_out(rows, columns)
    if format == "markdown":
        return _markdown(layout)
    return _latex(layout) if format == "latex" else _terminal(layout, rows, width, colour)


def _terminal(layout: Layout, rows: Sequence[Row], width: int, colour: bool) -> str:
    output = [paint(line, "bold" if colour else "") for line in textwrap.wrap(layout.caption, width)]
    output += [""] if output else []
    for part in _parts(layout, width):
        styles = [[_style(layout.columns[j].name, row) for j in part] for row in rows] if colour else None
        output += [*cells.for_terminal(layout.sheet.select(part), width, styles), ""]
    for line in layout.numbered:
        output += textwrap.wrap(line, width, subsequent_indent="  ")
    output += [paint(line, "dim" if colour else "") for line in textwrap.wrap(" · ".join(layout.means), width)]
    return "\n".join(output) + "\n"


def _parts(layout: Layout, width: int) -> list[list[int]]:
    """The columns of each table that is printed: all in one where they fit, else errors and costs apart, and where
    that is still too wide, what the rows are in a table of its own that numbers them."""
    number, *rest = range(len(layout.columns))
    parts = ("what", "errors", "costs")
    what, errors, costs = ([j for j in rest if layout.columns[j].part == part] for part in parts)
    widths = layout.sheet.widths

    def fits(part: list[int]) -> bool:
        return sum(widths[j] for j in part) + 2 * (len(part) - 1) <= width

    if fits(rest):
        return [rest]
    pair = [part for part in ([*what, *errors], [*what, *costs]) if len(part) > len(what)]
    if all(map(fits, pair)):
        return pair
    short = [number, *(j for j in what if layout.columns[j].name in ("variant", "depth"))]
    return [part for part in ([number, *what], [*short, *errors], [*short, *costs]) if len(part) > len(short)]


def _style(name: str, row: Row) -> str:
    if name == "error" and row.error is None:
        return "red" if row.failed else "yellow"
    if name in ("published", "verdict") and row.against:
        return {"better": "green", "worse": "red"}.get(row.against.word or "", "")
    return "bold" if name in ("variant", "depth", "error") else ""


def _markdown(layout: Layout) -> str:
    parts = [
        escape_markdown(layout.caption),
        cells.for_markdown(_without_numbers(layout)),
        "  \n".join(map(escape_markdown, layout.numbered)),
        "\n".join(f"- {escape_markdown(line)}" for line in layout.means),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _latex(layout: Layout) -> str:
    small = [*layout.numbered, "; ".join(layout.means)]
    parts = [
        "% needs \\usepackage{booktabs}",
        rf"\noindent {escape_latex(layout.caption)}\par\smallskip" if layout.caption else "",
        cells.for_latex(_without_numbers(layout)),
        "\\par\\smallskip{\\footnotesize\n" + " \\\\\n".join(map(escape_latex, small)) + "\\par}",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _without_numbers(layout: Layout) -> Sheet:
    return layout.sheet.select(range(1, len(layout.columns)))


# --- rows -> numbers ---


SETTINGS = {
    "fingerprint": "fingerprint", "limit_train": "limit_train", "limit_test": "limit_test", "duration": "recipe.duration",
    "duration_unit": "recipe.unit", "loader": "loader", "precision": "precision",
}  # fmt: skip


def plain_values(row: Row) -> dict[str, Any]:
    """A row as CSV and JSON have it: units in the names, nothing rounded, null for what is not finite."""
    done, timing = [stored.record for stored in row.done], row.timing
    failures = ((stored.record.seed, stored.record.failure) for stored in row.failed)
    values: dict[str, Any] = {
        **{name: getattr(row, name) for name in ("variant", "depth", "dataset")},
        "dataset_is_original": row.original,
        "evaluated_on": row.evaluated_on,
        "images": done[0].images() if done else None,
        **{name: setting(row.spec, path, str, int, float) for name, path in SETTINGS.items()},
        "overrides": " ".join(map(str, setting(row.spec, "overrides", list) or ())),
        **{name: row.fields.get(name) for name in ("engine", "torch", "code")},
        **{name: getattr(row, name) for name in ("device", "workers", "batch_size", "batch_norm_images")},
        "differs": " ".join(row.differs),
        "averaged_over": " ".join(f"{name}={'/'.join(v)}" for name, v in row.averaged_over.items()),
        "n": len(done),
        "seeds": " ".join(str(record.seed) for record in done),
    }  # fmt: skip
    for name, metric in METRICS.items():
        values |= metric.plain(row.figures.get(name, UNKNOWN))
    values |= {
        "timed_epochs": timing and timing.epochs,
        "fastest_epoch_seconds": timing and timing.fastest,
        "slowest_epoch_seconds": timing and timing.slowest,
        "best_minus_last_points": row.best_minus_last,
    }
    values |= {
        f"predicted_{name}": metric.measure(row.predicted).value if row.predicted else None
        for name, metric in METRICS.items()
        if metric.predict
    }
    for category in MEMORY_CATEGORIES:
        values[f"memory_{category.lower().replace(' ', '_')}_mib"] = row.by_category_mib.get(category)
    values |= _published_values(row)
    cost = cost_entry(row)
    for name in ("epoch_seconds", "memory_mib", "hardware", "year"):
        values[f"published_{name}"] = getattr(cost, name) if cost else None
    values["published_epoch_seconds_ratio"] = epoch_seconds_ratio(row)
    values["failed"] = "; ".join(f"seed {seed}: {failure.kind}" for seed, failure in failures if failure)
    values["pruned"] = "; ".join(f"seed {stored.record.seed}: {pruned_at(stored)}" for stored in row.pruned)
    values["interrupted"] = "; ".join(f"{partial.name}: {progress(partial)}" for partial in row.interrupted)
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _all_values(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows, with all that is noted of any: every value of it, in the order of the runs."""
    noted = sorted({name for row in rows for name in row.conditions})
    return [
        plain_values(row)
        | {name.lower().replace(" ", "_"): "; ".join(row.conditions.get(name, ())) or None for name in noted}
        for row in rows
    ]


def _published_values(row: Row) -> dict[str, Any]:
    values = dict.fromkeys(("error_percent", "top5_error_percent", "difference_points", "half_width_points", "verdict",
                            "no_verdict", "p", "p_holm", "seeds_to_tell", "source"))  # fmt: skip
    if (against := row.against) is not None:
        published = against.published
        values |= {
            "error_percent": published.error, "top5_error_percent": published.top5_error,
            "difference_points": against.difference, "half_width_points": against.half, "verdict": against.word,
            "no_verdict": against.reason or None, "p": against.p, "p_holm": against.adjusted, "source": published.source,
            "seeds_to_tell": None if against.half is None else seeds_to_tell(published, row.values("error")),
        }  # fmt: skip
    return {f"published_{name}": value for name, value in values.items()}


def _csv(plain: list[dict[str, Any]]) -> str:
    output = io.StringIO()
    if plain:
        writer = csv.DictWriter(output, list(plain[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(plain)
    return output.getvalue()


def _json(rows: Sequence[Row], plain: list[dict[str, Any]]) -> str:
    notes = [
        {"text": note.text, "cells": [{"row": i, "column": name} for i, name in sorted(note.cells)]}
        for note in make_notes(rows)
    ]
    means = {column.name: column.means for column in make_columns()}
    means |= {name: metric.means for name, metric in METRICS.items()}
    definitions = [{"column": name, "means": text} for name, text in means.items() if text]
    parts = {"rows": plain, "notes": notes, "definitions": definitions}
    # one value a line: json's own indenting takes twenty times as long
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    lines = [f'"{name}": [\n' + ",\n".join(map(encode, values)) + "\n]" for name, values in parts.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"
