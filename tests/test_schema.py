"""The published JSON Schema of record.json: what `results/values.py` says, and what every stored record obeys."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from harness.results.values import Record

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = ROOT / "docs" / "record.schema.json"
RECORDS = sorted((ROOT / "results" / "records").glob("*/runs/*/record.json"))


def make_schema() -> dict[str, Any]:
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Record.model_json_schema(mode="serialization"),
    }


def test_the_published_schema_is_that_of_the_code() -> None:
    text = json.dumps(make_schema(), indent=1) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        SCHEMA.write_text(text, encoding="utf-8")
    assert SCHEMA.read_text(encoding="utf-8") == text, "UPDATE_GOLDEN=1 pytest tests/test_schema.py writes it"


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
