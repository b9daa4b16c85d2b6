"""Rows -> CSV and JSON, for programs: raw numbers with units in their names, each column declared once with its type.

docs/report.schema.json is made of `FIELDS`; a change that a reader must know of has another `SCHEMA_VERSION`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from harness.results.metrics import METRICS, UNKNOWN, Metric
from harness.results.report.columns import (
    check_names,
    cost_entry,
    epoch_seconds_ratio,
    make_columns,
    progress,
    pruned_at,
)
from harness.results.report.notes import make_notes
from harness.results.rows import Row
from harness.results.values import MEMORY_CATEGORIES, finite, setting
from harness.results.verdict import seeds_to_tell

SCHEMA_VERSION = 1


class Field(NamedTuple):
    """A column; in JSON and in a DataFrame each may be null, but for lists."""

    name: str
    kind: Literal["string", "integer", "number", "boolean", "list of integers"]
    read: Callable[[Row], Any]
    means: str = ""


def _setting(path: str, *kinds: type) -> Callable[[Row], Any]:
    return lambda row: setting(row.spec, path, *kinds)


def _field(name: str) -> Callable[[Row], Any]:
    return lambda row: row.fields.get(name)


def _find(path: str, row: Row) -> Any:
    """A value by its path, "against.published.error"; None where a part of it is missing."""
    value: Any = row
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def _read_figure(metric: Metric, name: str, row: Row) -> Any:
    return metric.plain(row.figures.get(metric.name, UNKNOWN))[name]


def _predicted(metric: Metric, row: Row) -> Any:
    return metric.measure(row.predicted).value if row.predicted else None


def _seeds_to_tell(row: Row) -> int | None:
    against = row.against
    known = against is not None and against.half is not None
    return seeds_to_tell(against.published, row.values("error")) if against and known else None


def _failures(row: Row) -> str:
    known = ((stored.record.seed, stored.record.failure) for stored in row.failed)
    return "; ".join(f"seed {seed}: {failure.kind}" for seed, failure in known if failure)


FIELDS: tuple[Field, ...] = (
    Field("variant", "string", attrgetter("variant")),
    Field("depth", "integer", attrgetter("depth")),
    Field("dataset", "string", attrgetter("dataset")),
    Field("dataset_is_original", "boolean", attrgetter("original"), "the images are the published data set's own"),
    Field("evaluated_on", "string", attrgetter("evaluated_on"), "test, or val: training images that were held out"),
    Field("images", "integer", lambda r: r.done[0].record.images() if r.done else None, "of which the errors are"),
    Field("fingerprint", "string", _setting("fingerprint", str), "a hash of the images"),
    Field("limit_train", "integer", _setting("limit_train", int), "training images used; null: all"),
    Field("limit_test", "integer", _setting("limit_test", int), "test images used; null: all"),
    Field("duration", "number", _setting("recipe.duration", int, float)),
    Field("duration_unit", "string", _setting("recipe.unit", str), "epoch or step"),
    Field("loader", "string", _setting("loader", str)),
    Field("precision", "string", _setting("precision", str)),
    Field("overrides", "string", lambda r: " ".join(map(str, setting(r.spec, "overrides", list) or ())),
          "what differs from the variant's own recipe"),
    *(Field(name, "string", _field(name)) for name in ("engine", "torch", "code")),
    Field("device", "string", attrgetter("device")),
    *(Field(name, "integer", attrgetter(name)) for name in ("workers", "batch_size", "batch_norm_images")),
    Field("differs", "string", lambda r: " ".join(r.differs), "what else tells the row from others"),
    Field("averaged_over", "string", lambda r: " ".join(f"{name}={'/'.join(v)}" for name, v in r.averaged_over.items())),
    Field("n", "integer", lambda r: len(r.done), "runs that are done, one a seed"),
    Field("seeds", "list of integers", lambda r: [stored.record.seed for stored in r.done], "of these runs"),
    *(Field(name, "integer" if name.endswith("_n") else "number", partial(_read_figure, metric, name), metric.means)
      for metric in METRICS.values() for name in metric.plain(UNKNOWN)),
    Field("timed_epochs", "integer", partial(_find, "timing.epochs")),
    Field("fastest_epoch_seconds", "number", partial(_find, "timing.fastest")),
    Field("slowest_epoch_seconds", "number", partial(_find, "timing.slowest")),
    Field("best_minus_last_points", "number", attrgetter("best_minus_last")),
    *(Field(f"predicted_{name}", "number", partial(_predicted, metric), "by a probe of some steps")
      for name, metric in METRICS.items() if metric.predict),
    *(Field(f"memory_{name.lower().replace(' ', '_')}_mib", "number", lambda r, n=name: r.by_category_mib.get(n))  # type: ignore[misc]
      for name in MEMORY_CATEGORIES),
    Field("published_error_percent", "number", partial(_find, "against.published.error")),
    Field("published_top5_error_percent", "number", partial(_find, "against.published.top5_error")),
    Field("published_difference_points", "number", partial(_find, "against.difference"), "ours minus the published"),
    Field("published_half_width_points", "number", partial(_find, "against.half"), "of the interval of 90 %"),
    Field("published_verdict", "string", partial(_find, "against.word")),
    Field("published_no_verdict", "string", lambda r: _find("against.reason", r) or None, "why there is none"),
    Field("published_p", "number", partial(_find, "against.p")),
    Field("published_p_holm", "number", partial(_find, "against.adjusted"), "Holm's, over the rows"),
    Field("published_seeds_to_tell", "integer", _seeds_to_tell),
    Field("published_source", "string", partial(_find, "against.published.source")),
    *(Field(f"published_{name}", kind, lambda r, n=name: getattr(cost_entry(r), n, None))  # type: ignore[arg-type, misc]
      for name, kind in {"epoch_seconds": "number", "memory_mib": "number", "hardware": "string", "year": "integer"}.items()),
    Field("published_epoch_seconds_ratio", "number", epoch_seconds_ratio),
    Field("failed", "string", _failures),
    Field("pruned", "string", lambda r: "; ".join(f"seed {s.record.seed}: {pruned_at(s)}" for s in r.pruned)),
    Field("interrupted", "string", lambda r: "; ".join(f"{run.name}: {progress(run)}" for run in r.interrupted)),
)  # fmt: skip


def plain_values(rows: Sequence[Row], columns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows as CSV and JSON have them, with all that is noted of any: every value of it, in the order of the runs.

    `columns` chooses and orders what there is. Raises ValueError for one that does not exist.
    """
    noted = sorted({name for row in rows for name in row.conditions})
    every: list[dict[str, Any]] = []
    for row in rows:
        notes = {n.lower().replace(" ", "_"): "; ".join(row.conditions.get(n, ())) or None for n in noted}
        every.append(finite({field.name: field.read(row) for field in FIELDS}) | notes)
    if columns and every:
        check_names(columns, list(every[0]))
        every = [{name: values[name] for name in columns} for values in every]
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
    notes = [
        {"text": text, "cells": [{"row": i, "column": name} for i, name in sorted(at)]}
        for text, at in make_notes(rows).items()
    ]
    definitions = [{"column": column.name, "means": column.means} for column in make_columns() if column.means]
    parts: Mapping[str, Sequence[Any]] = {
        "rows": plain_values(rows, columns),
        "notes": notes,
        "definitions": definitions,
    }
    # one value a line: json's own indenting takes twenty times as long
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    lines = [f'"{name}": [\n' + ",\n".join(map(encode, values)) + "\n]" for name, values in parts.items()]
    return "{\n" + ",\n".join([f'"schema_version": {SCHEMA_VERSION}', *lines]) + "\n}\n"
