"""The published JSON Schemas of record.json and of the report's CSV and JSON: what the code says, and what all files obey."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import pandas
import pytest
from jsonschema import Draft202012Validator

from harness.results.frame import read_table
from harness.results.report.files import SCHEMA_VERSION, file_fields, plain_values, to_csv, to_json
from harness.results.rows import Row, summarise
from harness.results.store import load_records
from harness.results.values import Record

ROOT = Path(__file__).resolve().parent.parent
RECORDS = sorted((ROOT / "results" / "records").glob("*/runs/*/record.json"))


DIALECT = "https://json-schema.org/draft/2020-12/schema"


def make_report_schema() -> dict[str, Any]:
    """Of `harness report --format json`; the columns of CSV are those of a row."""
    columns = {}
    for name, field in file_fields().items():
        kind: dict[str, Any] = {"type": [field.kind, "null"]}
        if field.kind == "list of integers":
            kind = {"type": "array", "items": {"type": "integer"}}
        columns[name] = kind | ({"description": field.means} if field.means else {})
    texts = {"type": "object", "additionalProperties": {"type": "string"}}
    cell = {"type": "object", "properties": {"row": {"type": "integer"}, "column": {"type": "string"}}}
    note = {
        "type": "object",
        "properties": {"text": {"type": "string"}, "cells": {"type": "array", "items": cell}},
    }
    row = {"type": "object", "properties": columns, "additionalProperties": {"type": ["string", "null"]}}
    parts = {"rows": row, "notes": note, "definitions": texts}
    lists = {name: {"type": "array", "items": items} for name, items in parts.items()}
    return {
        "$schema": DIALECT, "title": "harness report --format json", "type": "object",
        "properties": {"schema_version": {"const": SCHEMA_VERSION}, **lists}, "required": ["schema_version", *lists],
        "additionalProperties": False,
    }  # fmt: skip


def make_schema() -> dict[str, Any]:
    return {
        "$schema": DIALECT,
        **Record.model_json_schema(mode="serialization"),
    }


@pytest.mark.parametrize(("name", "made"), [("record", make_schema()), ("report", make_report_schema())])
def test_the_published_schema_is_that_of_the_code(name: str, made: dict[str, Any]) -> None:
    text, path = json.dumps(made, indent=1, ensure_ascii=False) + "\n", ROOT / "docs" / f"{name}.schema.json"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text, "UPDATE_GOLDEN=1 pytest tests/test_schema.py writes it"


def test_stored_records_obey_it() -> None:
    validator = Draft202012Validator(make_schema())
    assert len(RECORDS) >= 12
    for path in RECORDS:
        stored = Record.model_validate_json(path.read_bytes())  # fields added since have their defaults
        validator.validate(json.loads(stored.model_dump_json()))


@pytest.mark.parametrize(
    ("field", "value"),
    [("status", "finished"), ("seed", "zero"), ("depth", None), ("result", {}), ("unknown", 1), ("started_at", 5)],
)
def test_a_wrong_record_does_not(field: str, value: object) -> None:
    validator = Draft202012Validator(make_schema())
    record = json.loads(Record.model_validate_json(RECORDS[0].read_bytes()).model_dump_json())
    assert validator.is_valid(record)
    assert not validator.is_valid(record | {field: value})


# --- the report's files ---


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Of every stored run, with one that failed and one that is not finite."""
    loaded = load_records(sorted((ROOT / "results" / "records").glob("*/runs")))
    return summarise(loaded.records, loaded.interrupted)


def test_the_json_of_stored_runs_obeys_its_schema(rows: list[Row]) -> None:
    validator = Draft202012Validator(make_report_schema())
    text = to_json(rows)
    report = json.loads(text)
    validator.validate(report)
    assert len(report["rows"]) == len(rows) >= 12
    for change in ({"depth": "20"}, {"seeds": "0 1"}, {"error_percent_mean": "8.3"}, {"n": 1.5}, {"new": 1}):
        assert not validator.is_valid(report | {"rows": [report["rows"][0] | change]})
    assert not validator.is_valid(report | {"schema_version": 2})


def test_csv_opens_as_what_was_written(rows: list[Row]) -> None:
    """Each value, of its type: by `read_table`, and but for whole numbers that are missing by pandas alone."""
    values = plain_values(rows)
    frame, plain = read_table(io.StringIO(to_csv(rows))), pandas.read_csv(io.StringIO(to_csv(rows)))
    assert list(frame.columns) == list(plain.columns) == ["schema_version", *values[0]]
    for name, field in file_fields().items():
        written = [row[name] for row in values]
        read = [None if not isinstance(v, list) and pandas.isna(v) else v for v in frame[name]]
        assert read == [None if v == "" else v for v in written], name
        known = [v for v in written if v not in (None, "")]
        if field.kind == "list of integers":
            assert [json.loads(v) for v in plain[name]] == written
        elif known and field.kind in ("integer", "number"):
            assert [v for v in plain[name] if v == v] == known, name  # not NaN
        kinds = {"integer": "Int64", "number": "float64", "boolean": "boolean"}
        assert str(frame[name].dtype) == kinds.get(field.kind, str(frame[name].dtype)), name


@pytest.mark.parametrize(
    ("name", "word"), [("code", "0314201"), ("driver", "570.10"), ("host", "007"), ("dataset", "NA")]
)
def test_text_of_digits_stays_text(rows: list[Row], name: str, word: str) -> None:
    """Noted columns too; pandas alone makes a number of it, or nothing."""
    (line,) = csv.DictReader(io.StringIO(to_csv(rows[:1])))
    text = io.StringIO()
    writer = csv.DictWriter(text, line | {name: word})
    writer.writeheader()
    writer.writerow(line | {name: word})
    assert list(read_table(io.StringIO(text.getvalue()))[name]) == [word]
    assert pandas.read_csv(io.StringIO(text.getvalue()))[name][0] != word
