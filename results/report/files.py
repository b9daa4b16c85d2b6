"""Rows -> CSV and JSON, for programs: raw numbers with units in their names.

A change that a reader must know of has another `SCHEMA_VERSION`.
"""

from __future__ import annotations

import csv
import io
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.results.metrics import METRICS, NONE
from harness.results.report.columns import check_names, find, make_columns
from harness.results.report.notes import make_notes
from harness.results.rows import Row
from harness.results.values import MEMORY_CATEGORIES, finite, setting

SCHEMA_VERSION = 1
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "list of integers": (list,),
}  # fmt: skip


class Field(NamedTuple):
    """A column: one of `TYPES`, the path of its value (`columns.find`), what it means, of which other fields it is made."""

    kind: str
    path: str
    means: str = ""
    made_of: Sequence[str] = ()


_PARTS = tomllib.loads(Path(__file__).with_name("files.toml").read_text(encoding="utf-8"))


def file_fields() -> dict[str, Field]:
    """The columns that every file has, in their order."""
    before, after, published = ({name: Field(*f) for name, f in part.items()} for part in _PARTS.values())
    figures, predicted = dict[str, Field](), dict[str, Field]()
    for name, metric in METRICS.items():
        unit = "_percent" * (metric.unit == "%")
        parts = {f"{unit}_mean": "value", f"{unit}_std": "std"} if metric.over_seeds == "mean" else {"": "value"}
        for ending, part in (parts | {"_n": "n"}).items():
            kind = "integer" if part == "n" else "number"
            figures[name + ending] = Field(kind, f"figures.{name}.{part}", metric.means)
        if metric.predict:
            predicted[f"predicted_{name}"] = Field("number", f"predictions.{name}", "by a probe of some steps")
    known = {f"memory_{n.lower().replace(' ', '_')}_mib": f"by_category_mib.{n}" for n in MEMORY_CATEGORIES}
    memory = {name: Field("number", path) for name, path in known.items()}
    return before | figures | after | predicted | memory | published


def plain_values(rows: Sequence[Row], columns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows as CSV and JSON have them, with all that is noted of any: every value of it, in the order of the runs.

    Null: what a row averages over. `columns` chooses and orders what there is; a metric's name in the table is that of
    its value. Raises ValueError for an unknown one.
    """
    named = {name.lower().replace(" ", "_"): name for row in rows for name in sorted(row.conditions)}
    known = file_fields()
    noted = {name: named[name] for name in sorted(named) if name not in known}
    starts = {field.path.partition(".")[0] for field in known.values()}
    every: list[dict[str, Any]] = []
    for row in rows:
        parts = {start: find(row, start) for start in starts}
        # of its type alone: nothing has checked a spec that was edited by hand
        typed = {name: setting(parts, field.path, *TYPES[field.kind]) for name, field in known.items()}
        averaged = {name.rpartition(".")[2] for name in row.averaged_over}
        typed |= {n: None for n, f in known.items() if averaged & {n, f.path.rpartition(".")[2], *f.made_of}}
        notes = {n: "; ".join(row.conditions.get(name, ())) or None for n, name in noted.items()}
        every.append({n: None if value == NONE else value for n, value in finite(typed).items()} | notes)
    if columns and every:
        of = {field.path: name for name, field in known.items()}
        chosen = [of.get(f"figures.{name}.value", name) for name in columns]
        check_names(chosen, list(every[0]))
        every = [{name: values[name] for name in chosen} for values in every]
    return every


def to_csv(rows: Sequence[Row], columns: Sequence[str] = ()) -> str:
    """A line a row; lists as JSON has them. The first column is the version of the schema, unless columns are chosen."""
    version = {} if columns else {"schema_version": SCHEMA_VERSION}
    lines = [version | values for values in plain_values(rows, columns)]
    output = io.StringIO()
    if lines:
        writer = csv.DictWriter(output, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return output.getvalue()


def to_json(rows: Sequence[Row], columns: Sequence[str] = ()) -> str:
    """An object with the version of the schema, the rows, notes on single cells, and what the columns mean."""
    notes = []
    for text, cells in make_notes(rows).items():
        sorted_cells = sorted((i, name) for name in cells for i in cells[name])
        notes.append({"text": text, "cells": [{"row": i, "column": name} for i, name in sorted_cells]})
    definitions = [{"column": column.name, "means": column.means} for column in make_columns() if column.means]
    parts: Mapping[str, Any] = {"rows": plain_values(rows, columns), "notes": notes, "definitions": definitions}
    # one value a line: json's own indenting takes twenty times as long
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    lines = [f'"{name}": [\n' + ",\n".join(map(encode, values)) + "\n]" for name, values in parts.items()]
    return "{\n" + ",\n".join([f'"schema_version": {SCHEMA_VERSION}', *lines]) + "\n}\n"
