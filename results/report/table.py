"""Rows -> the table a person reads, or numbers for a program."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from harness.results.metrics import METRICS, NONE, UNKNOWN
from harness.results.report import columns as cells
from harness.results.report.columns import SPARE, Column, find_columns, make_columns
from harness.results.report.notes import make_notes
from harness.results.report.text import Sheet, add_mark, clean, for_latex, for_markdown, for_terminal
from harness.results.rows import Row
from harness.results.values import MEMORY_CATEGORIES, setting
from harness.results.verdict import seeds_to_tell

Format = Literal["table", "markdown", "csv", "json", "latex"]
FORMATS: tuple[Format, ...] = ("table", "markdown", "csv", "json", "latex")


class Layout(NamedTuple):
    columns: list[Column]
    sheet: Sheet  # of these columns, with the marks of the notes


def lay_out(rows: Sequence[Row], wanted: Sequence[str] = (), without: Collection[str] = ()) -> Layout:
    """Which columns stand in the table, what is said once above it, and which marks go where.

    Raises ValueError for a wanted column that does not exist.
    """
    chosen = find_columns(wanted)
    words = {column.name: [clean(column.text(row)) for row in rows] for column in make_columns()}
    shown, shared = _choose_columns(rows, words)
    if wanted:
        shown, shared = chosen, [column for column in shared if column.name not in wanted]
    shown = [column for column in shown if column.name not in without]
    heads = {column.name: column.header for column in shown}
    above = {column.name: next(text for text in words[column.name] if text != NONE) for column in shared}
    if "limit_train" in above:
        above["limit_train"] = f"training images: {above['limit_train']}"
    absent = (words.keys() if wanted else set(without)) - heads.keys() - above.keys()
    notes: list[str] = []
    for note, at in make_notes(rows).items():
        members: dict[str, list[int]] = defaultdict(list)
        for i, name in at:
            members[name].append(i)
        if members.keys() <= absent:
            continue
        notes.append(f"{add_mark('', number := len(notes) + 1)} {clean(note)}")
        for name, marked in members.items():
            if name in above:
                above[name] = add_mark(above[name], number)
            elif name in heads and len(marked) == len(rows):
                heads[name] = add_mark(heads[name], number)
            else:
                for i in marked:
                    words[name][i] = add_mark(words[name][i], number)
    body = list(zip(*(words[name] for name in heads), strict=True))
    means = [f"{column.header}: {column.means}" for column in shown if column.means]
    right = [column.right for column in shown]
    return Layout(shown, Sheet([*heads.values()], right, body, " · ".join(above.values()), notes, means))


def _choose_columns(rows: Sequence[Row], words: dict[str, list[str]]) -> tuple[list[Column], list[Column]]:
    """The columns that stand in the table, and those that all rows agree in, which are said above it."""
    shown: list[Column] = []
    shared: list[Column] = []
    on_gpu = any(row.done and row.fields.get("device") == "cuda" for row in rows)
    for column in make_columns():
        different = set(words[column.name])
        metric = METRICS.get(column.name)
        if metric is not None and metric.device == "cpu" and on_gpu:
            continue  # CSV and JSON have it
        if column.hidden or different <= {NONE} or (column.name == "limit_train" and different == {"all"}):
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
    all. csv, json: raw numbers, units in the names, nothing rounded. `columns` chooses and orders what is shown: names of `make_columns`,
    or for csv and json names of theirs; none: all that say something. Raises ValueError for an unknown one.
    """
    if format in ("csv", "json"):
        plain = _all_values(rows)
        if columns and plain:
            cells.check_names(columns, list(plain[0]))
            plain = [{name: values[name] for name in columns} for values in plain]
        return _csv(plain) if format == "csv" else _json(rows, plain)
    if not rows:
        return "no runs\n"
    layout = lay_out(rows, columns)
    if format != "table":
        return for_markdown(layout.sheet) if format == "markdown" else for_latex(layout.sheet)
    widths = dict(zip((column.name for column in layout.columns), layout.sheet.widths, strict=True))
    for name in SPARE if fit and not columns else ():
        if sum(widths.values()) + 2 * (len(widths) - 1) > width:
            widths.pop(name, None)
    if out := {column.name: column.header for column in layout.columns if column.name not in widths}:
        layout = lay_out(rows, without=out)
    styles = [[style_of(column.name, row) for column in layout.columns] for row in rows] if colour else ()
    notes = [*layout.sheet.notes, *([f"too narrow for {', '.join(out.values())}"] if out else ())]
    sheet = replace(layout.sheet, notes=notes, styles=styles)
    return "\n".join(for_terminal(sheet, width if fit else max(width, sheet.width), colour=colour)) + "\n"


def style_of(name: str, row: Row) -> str:
    """How a cell looks: a key of `text.ANSI`, and a class in page.css."""
    if name == "error" and row.error is None:
        return "red" if row.failed else "yellow"
    if name == "verdict" and row.against:
        return {"better": "green", "worse": "red"}.get(row.against.word or "", "")
    return "bold" if name in ("variant", "depth", "error") else ""


# --- rows -> numbers ---


SETTINGS = {
    "fingerprint": "fingerprint", "limit_train": "limit_train", "limit_test": "limit_test", "duration": "recipe.duration",
    "duration_unit": "recipe.unit", "loader": "loader", "precision": "precision",
}  # fmt: skip


def plain_values(row: Row) -> dict[str, Any]:
    """A row as CSV and JSON have it: units in the names, nothing rounded, null for what is not finite."""
    done, timing = [stored.record for stored in row.done], row.timing
    failures = ((stored.record.seed, stored.record.failure) for stored in row.failed)
    against, cost = row.against, cells.cost_entry(row)
    seeds = (
        None if against is None or against.half is None else seeds_to_tell(against.published, row.values("error"))
    )
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
        **{f"predicted_{name}": metric.measure(row.predicted).value if row.predicted else None
           for name, metric in METRICS.items() if metric.predict},
        **{f"memory_{name.lower().replace(' ', '_')}_mib": row.by_category_mib.get(name) for name in MEMORY_CATEGORIES},
        "published_error_percent": against and against.published.error,
        "published_top5_error_percent": against and against.published.top5_error,
        "published_difference_points": against and against.difference,
        "published_half_width_points": against and against.half,
        "published_verdict": against and against.word,
        "published_no_verdict": (against and against.reason) or None,
        "published_p": against and against.p,
        "published_p_holm": against and against.adjusted,
        "published_seeds_to_tell": seeds,
        "published_source": against and against.published.source,
        **{f"published_{name}": getattr(cost, name, None) for name in ("epoch_seconds", "memory_mib", "hardware", "year")},
        "published_epoch_seconds_ratio": cells.epoch_seconds_ratio(row),
        "failed": "; ".join(f"seed {seed}: {failure.kind}" for seed, failure in failures if failure),
        "pruned": "; ".join(f"seed {stored.record.seed}: {cells.pruned_at(stored)}" for stored in row.pruned),
        "interrupted": "; ".join(f"{partial.name}: {cells.progress(partial)}" for partial in row.interrupted),
    }  # fmt: skip
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _all_values(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows, with all that is noted of any: every value of it, in the order of the runs."""
    noted = sorted({name for row in rows for name in row.conditions})
    return [
        plain_values(row)
        | {name.lower().replace(" ", "_"): "; ".join(row.conditions.get(name, ())) or None for name in noted}
        for row in rows
    ]


def _csv(plain: list[dict[str, Any]]) -> str:
    output = io.StringIO()
    if plain:
        writer = csv.DictWriter(output, list(plain[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(plain)
    return output.getvalue()


def _json(rows: Sequence[Row], plain: list[dict[str, Any]]) -> str:
    notes = [
        {"text": text, "cells": [{"row": i, "column": name} for i, name in sorted(at)]}
        for text, at in make_notes(rows).items()
    ]
    means = {column.name: column.means for column in make_columns()}
    definitions = [{"column": name, "means": text} for name, text in means.items() if text]
    parts = {"rows": plain, "notes": notes, "definitions": definitions}
    # one value a line: json's own indenting takes twenty times as long
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    lines = [f'"{name}": [\n' + ",\n".join(map(encode, values)) + "\n]" for name, values in parts.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"
