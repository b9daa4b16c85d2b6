"""Rows -> the table a person reads, or numbers for a program."""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from harness.results.metrics import METRICS, NONE, UNKNOWN, Metric, figures, suggest
from harness.results.published import Published
from harness.results.report.text import (
    SUPERSCRIPT,
    Sheet,
    clean,
    escape_latex,
    escape_markdown,
    for_latex,
    for_markdown,
    for_terminal,
    paint,
)
from harness.results.rows import Against, Row
from harness.results.statistics import seeds_to_tell
from harness.results.store import Interrupted, Stored
from harness.results.values import MEMORY_CATEGORIES

Format = Literal["table", "markdown", "csv", "json", "latex"]
FORMATS: tuple[Format, ...] = ("table", "markdown", "csv", "json", "latex")


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the table."""

    name: str
    header: str
    text: Callable[[Row], str]
    means: str = ""  # stands under the table
    right: bool = True
    stays: bool = False  # in the table, even where all rows agree
    part: Literal["what", "errors", "costs"] = "what"  # of a table that is too wide for the terminal
    key: Callable[[Row], float | str | None] | None = None

    def sort_key(self, row: Row) -> float | str | None:
        """What the column is sorted by: a number where it shows one; None, or NaN, where there is nothing."""
        value = self.key(row) if self.key else getattr(row, self.name)
        return ", ".join(value) if isinstance(value, tuple) else value


# --- columns ---


def _signed(value: float | None) -> str:
    return NONE if value is None else f"{value:+.2f}".replace("-", "−")


def _or_averaged(row: Row, name: str, text: object) -> str:
    """A descriptor, or all its values where the row averages over them."""
    return "/".join(row.averaged_over[name]) if name in row.averaged_over else str(text)


def _width(row: Row) -> str:
    if "workers" in row.averaged_over:
        return f"{'/'.join(row.averaged_over['workers'])} of {row.batch_size}"
    return f"{row.workers}×{row.batch_size // max(1, row.workers)}"


def _duration(row: Row) -> str:
    if math.isnan(row.duration):
        return NONE
    return f"{row.duration:,g} {row.duration_unit}s" if row.duration != 1 else f"1 {row.duration_unit}"


def _error(row: Row) -> str:
    """The error, or the reason why there is none."""
    if row.error is not None:
        return METRICS["error"].summary(row.figures["error"])
    if row.failed:
        return ", ".join(dict.fromkeys(s.record.failure.kind for s in row.failed if s.record.failure))
    return pruned_at(row.pruned[0]) if row.pruned else progress(row.interrupted[0])


def pruned_at(stored: Stored) -> str:
    """ "pruned at 3 of 30" """
    pruned = stored.record.pruned
    return f"pruned at {pruned.epoch} of {pruned.of}" if pruned else NONE


def progress(partial: Interrupted) -> str:
    """ "epoch 3 of 30" """
    if partial.epochs == 0:
        return "no epoch yet"
    return f"epoch {partial.epochs} of {partial.of}" if partial.of else f"epoch {partial.epochs}"


def _published(row: Row) -> str:
    if row.against is None:
        return NONE
    published = row.against.published
    number = published.error if published.error is not None else published.top5_error
    return f"{number:.2f} ({_signed(row.against.difference)})"


def _verdict(row: Row) -> str:
    if row.against is None:
        return NONE
    if (verdict := row.against.verdict) is None:
        return "~"
    p = "p<.001" if verdict.p < 0.001 else f"p={verdict.p:.2g}".replace("0.", ".", 1)
    return f"{verdict.verdict} {p}"


def _predicted_seconds(row: Row) -> float | None:
    return row.predicted.epoch_seconds if row.predicted else None


def _runs(row: Row) -> str:
    missing = len(row.failed) + len(row.pruned) + len(row.interrupted)
    return f"{len(row.done)} of {len(row.done) + missing}" if missing else str(len(row.done))


NUMBER = Column("number", "#", lambda r: r.name)  # only where one row takes several tables
DESCRIPTORS: tuple[Column, ...] = (
    Column("variant", "variant", lambda r: _or_averaged(r, "variant", r.variant), right=False, stays=True),
    Column("depth", "depth", lambda r: _or_averaged(r, "network.depth", r.depth or NONE), stays=True),
    Column("dataset", "data set", lambda r: _or_averaged(r, "label", r.dataset), right=False),
    Column("limit_train", "images", lambda r: "all" if r.limit_train is None else f"{r.limit_train:,}",
           "of the training set that were used"),
    Column("duration", "trained", _duration, right=False),
    Column("overrides", "changed", lambda r: ", ".join(r.overrides) or NONE,
           "what differs from the variant's own recipe", right=False),
    Column("loader", "loader", lambda r: _or_averaged(r, "loader", r.loader), right=False),
    Column("precision", "precision", lambda r: _or_averaged(r, "precision", r.precision), right=False),
    Column("engine", "engine", lambda r: _or_averaged(r, "engine", r.engine), right=False),
    Column("workers", "width", _width, "DDP workers × images per step and worker", right=False),
    Column("device", "device", lambda r: _or_averaged(r, "hardware", r.device), right=False),
    Column("differs", "differs in", lambda r: ", ".join(r.differs) or NONE, right=False),
)  # fmt: skip
DERIVED: dict[str, tuple[Column, ...]] = {
    "parameters": (
        Column("n", "n", _runs, "runs that are done, one a seed", stays=True, part="errors", key=lambda r: len(r.done)),
    ),
    "best_error": (
        Column("best_minus_last", "b−l", lambda r: _signed(r.best_minus_last),
               "best minus last, in points: what choosing the epoch on the evaluated images takes off",
               stays=True, part="errors"),
    ),
    "test_error": (
        Column("published", "published", _published, "the published error (and ours minus it, in points)",
               stays=True, part="errors", key=lambda r: r.against.difference if r.against else None),
        Column("verdict", "verdict", _verdict, "could the published number be one more run of ours? prediction "
               "interval of 95 %", right=False, stays=True, part="errors",
               key=lambda r: r.against.verdict.p if r.against and r.against.verdict else None),
    ),
    "epoch_seconds": (
        Column("predicted_epoch_seconds", "predicted", lambda r: figures(_predicted_seconds(r)),
               "s/epoch as a probe of some steps predicted it before", stays=True, part="costs", key=_predicted_seconds),
    ),
}  # fmt: skip
"""Columns that follow a metric's."""


def make_columns() -> list[Column]:
    """All columns, in their order: what a row is, its errors, its costs."""
    columns = list(DESCRIPTORS)
    for name, metric in METRICS.items():
        columns += [_metric_column(metric)] if metric.in_table else []
        columns += DERIVED.get(name, ())
    return columns


def _metric_column(metric: Metric) -> Column:
    def key(row: Row) -> float | None:
        return row.figures.get(metric.name, UNKNOWN).value

    def text(row: Row) -> str:
        return _error(row) if metric.name == "error" else metric.summary(row.figures.get(metric.name, UNKNOWN))

    part: Literal["errors", "costs"] = "errors" if metric.kind in ("size", "error") else "costs"
    return Column(metric.name, metric.title, text, metric.means, stays=True, part=part, key=key)


def find_columns(names: Sequence[str]) -> list[Column]:
    """Columns by name, each once. Raises ValueError for one that does not exist."""
    known = {column.name: column for column in make_columns()}
    _check_names(names, list(known))
    return [known[name] for name in dict.fromkeys(names)]


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"no column {name!r}: {suggest(name, known)}")


def sort_rows(rows: Sequence[Row], by: str) -> list[Row]:
    """Order rows by a column, smallest first; "-error": largest first. Rows without a value stand last either way.

    Raises ValueError for a column that does not exist.
    """
    (column,) = find_columns([by.removeprefix("-")])
    keys: list[Any] = [column.sort_key(row) for row in rows]
    lacking = {i for i, key in enumerate(keys) if key is None or key != key}  # NaN
    having = [i for i in range(len(rows)) if i not in lacking]
    having.sort(key=lambda i: keys[i], reverse=by.startswith("-"))
    return [rows[i] for i in (*having, *sorted(lacking))]


# --- notes ---


@dataclass(frozen=True, slots=True)
class Note:
    """A footnote and the cells it belongs to: (row, column name)."""

    text: str
    cells: frozenset[tuple[int, str]]


def make_notes(rows: Sequence[Row]) -> list[Note]:
    """Everything a reader must know about single cells."""
    cells: dict[str, set[tuple[int, str]]] = defaultdict(set)
    for i, row in enumerate(rows):
        if not row.original and row.done:
            text = f"{row.dataset} is not a published data set's own images: never compared with published errors"
            cells[text].add((i, "dataset"))
    for i, row in enumerate(rows):
        for text, *columns in (*_data_notes(row), *_timing_notes(row), *_run_notes(row), *_missing_notes(row)):
            cells[text] |= {(i, column) for column in columns}
    return [Note(text, frozenset(at)) for text, at in cells.items()]


def _data_notes(row: Row) -> Iterator[tuple[str, ...]]:
    if row.limit_train is not None:
        yield "trained on a part of the training set: not comparable with published errors", "limit_train"
    if row.limit_test is not None:
        yield f"of {row.limit_test:,} of the test images: not comparable with published errors", "error"
    for name, values in row.averaged_over.items():
        yield f"averaged over {name}: {', '.join(values)}, as requested", "n"
    if row.evaluated_on == "val":
        yield "of held-out training images, not of the test set", "error"


def _timing_notes(row: Row) -> Iterator[tuple[str, ...]]:
    concurrent = {str(stored.record.environment.get("concurrent_runs", 1)) for stored in row.done}
    if concurrent - {"1"}:
        yield f"timed with {' or '.join(sorted(concurrent))} runs going on at a time", "epoch_seconds"
    results = [stored.record.result for stored in row.done if stored.record.result is not None]
    for result in results:
        if result.runs_per_gpu > 1:
            yield f"{result.runs_per_gpu} runs shared each GPU: their epochs are not timed", "epoch_seconds"
        for warning in result.warnings:
            if warning.startswith("engine "):
                yield warning, "engine"
    for cause in dict.fromkeys(cause for result in results for cause in result.interference):
        yield f"{cause} in some epochs: they are left out", "epoch_seconds"
    if widths := row.fields.get("widths"):
        yield (
            f"DDP width {widths}: the cluster had no room for {row.workers} workers; epochs at another width are left "
            "out of the seconds"
        ), "epoch_seconds", "error"  # fmt: skip


def _run_notes(row: Row) -> Iterator[tuple[str, ...]]:
    where = "n" if row.done else "error"
    if row.repeated:
        yield "a seed that was run more than once counts with its last run", "n"
    for stored in row.failed:
        if failure := stored.record.failure:
            why = f"{failure.kind}: {failure.message}" if failure.message else failure.kind
            yield f"{row.name} seed {stored.record.seed} failed, {_shorten(why)}", where
    for stored in row.pruned:
        if row.done:
            yield f"{row.name} seed {stored.record.seed} was {pruned_at(stored)} epochs by a search", where
        else:
            yield "pruned by a search before its end: averaged with nothing", where
    for partial in row.interrupted:
        seed = partial.spec.get("seed")
        who = f"{row.name} seed {seed}" if seed is not None else partial.name
        yield f"{who} is not done: {progress(partial)}", where
    if row.against is not None:
        yield _cite(row.against.published), "published"


def _missing_notes(row: Row) -> Iterator[tuple[str, ...]]:
    """Why figures are missing; a GPU's are not expected of a CPU."""
    if not row.done:
        return
    if row.epoch_seconds is None and all(s.record.result.runs_per_gpu == 1 for s in row.done if s.record.result):
        yield "no epoch was timed: each was the first of its attempt, which is warm-up", "epoch_seconds"
    missing: dict[str, list[Metric]] = defaultdict(list)
    for name, metric in METRICS.items():
        figure = row.figures.get(name, UNKNOWN)
        expected = (
            metric.in_table and metric.missing is None and metric.device in (None, "cpu", row.fields.get("device"))
        )
        if expected and figure.value is None and figure.reason:
            missing[figure.reason].append(metric)
    for reason, metrics in missing.items():
        titles = ", ".join(metric.title for metric in metrics)
        yield f"{titles} not measured: {_shorten(reason)}", *(metric.name for metric in metrics)


def _cite(published: Published) -> str:
    """Where a published number comes from, and what is to be known about it."""
    parts = [published.source, f"mean of {published.n} runs" if published.n > 1 else "one run"]
    if published.std is not None:
        parts[1] += f", std {published.std:.2f}"
    if published.rule == "best":
        parts.append("best epoch, set beside our best")
    if published.error is None:
        parts.append("top-5")
    return "; ".join([*parts, published.note] if published.note else parts)


def _shorten(text: str, limit: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


# --- layout ---


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
        """The notes, each with its mark."""
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
    return Layout(
        clean(" · ".join(caption)),
        columns,
        words,
        marks,
        header_marks,
        sheet,
        [clean(n.text) for n in notes],
        means,
    )


def _choose_columns(rows: Sequence[Row], texts: dict[str, list[str]]) -> tuple[list[Column], list[Column]]:
    """The columns that stand in the table, and those that all rows agree in, which are said above it."""
    shown: list[Column] = []
    shared: list[Column] = []
    on_gpu = any(row.fields.get("device") != "cpu" for row in rows)
    for column in make_columns():
        different = set(texts[column.name])
        metric = METRICS.get(column.name)
        if metric is not None and metric.device == "cpu" and on_gpu:
            continue  # CSV and JSON have it
        if different <= {NONE} or (column.name == "limit_train" and different == {"all"}):
            continue
        if column.name == "device" and any(row.done for row in rows):
            different -= {NONE}  # a run that failed does not know its device
        (shown if column.stays or len(different) > 1 else shared).append(column)
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
        plain = [plain_values(row) for row in rows]
        if columns and plain:
            _check_names(columns, list(plain[0]))
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
        output += [*for_terminal(layout.sheet.select(part), width, styles), ""]
    for line in layout.numbered:
        output += textwrap.wrap(line, width, subsequent_indent="  ")
    output += [paint(line, "dim" if colour else "") for line in textwrap.wrap(" · ".join(layout.means), width)]
    return "\n".join(output) + "\n"


def _parts(layout: Layout, width: int) -> list[list[int]]:
    """The columns of each table that is printed: all in one where they fit, else errors and costs apart, and where
    that is still too wide, what the rows are in a table of its own that numbers them."""
    number, *rest = range(len(layout.columns))
    what, errors, costs = (
        [j for j in rest if layout.columns[j].part == part] for part in ("what", "errors", "costs")
    )
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
    if name in ("published", "verdict") and row.against and row.against.verdict:
        return {"better": "green", "worse": "red", "consistent": ""}[row.against.verdict.verdict]
    return "bold" if name in ("variant", "depth", "error") else ""


def _markdown(layout: Layout) -> str:
    parts = [
        escape_markdown(layout.caption),
        for_markdown(_without_numbers(layout)),
        "  \n".join(map(escape_markdown, layout.numbered)),
        "\n".join(f"- {escape_markdown(line)}" for line in layout.means),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _latex(layout: Layout) -> str:
    small = [*layout.numbered, "; ".join(layout.means)]
    parts = [
        "% needs \\usepackage{booktabs}",
        rf"\noindent {escape_latex(layout.caption)}\par\smallskip" if layout.caption else "",
        for_latex(_without_numbers(layout)),
        "\\par\\smallskip{\\footnotesize\n" + " \\\\\n".join(map(escape_latex, small)) + "\\par}",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _without_numbers(layout: Layout) -> Sheet:
    return layout.sheet.select(range(1, len(layout.columns)))


# --- rows -> numbers ---


def plain_values(row: Row) -> dict[str, Any]:
    """A row as CSV and JSON have it: units in the names, nothing rounded, null for what is not finite."""
    done = [stored.record for stored in row.done]
    values: dict[str, Any] = {
        **{name: getattr(row, name) for name in ("variant", "depth", "dataset")},
        "dataset_is_original": row.original,
        "fingerprint": row.fields.get("fingerprint"),
        **{name: getattr(row, name) for name in ("limit_train", "limit_test", "evaluated_on", "duration", "duration_unit")},
        "overrides": " ".join(row.overrides),
        **{name: getattr(row, name) for name in ("loader", "precision", "engine", "device", "workers", "batch_size")},
        "differs": " ".join(row.differs),
        "averaged_over": " ".join(f"{name}={'/'.join(v)}" for name, v in row.averaged_over.items()),
        "n": len(done),
        "seeds": " ".join(str(record.seed) for record in done),
    }  # fmt: skip
    for name, metric in METRICS.items():
        values |= metric.plain(row.figures.get(name, UNKNOWN))
    values["best_minus_last_points"] = row.best_minus_last
    for name, metric in METRICS.items():
        if metric.predict:
            values[f"predicted_{name}"] = metric.predict(row.predicted).value if row.predicted else None
    for category in MEMORY_CATEGORIES:
        values[f"memory_{category.lower().replace(' ', '_')}_mib"] = row.by_category_mib.get(category)
    values |= _published_values(row.against)
    failures = ((stored.record.seed, stored.record.failure) for stored in row.failed)
    values["failed"] = "; ".join(f"seed {seed}: {failure.kind}" for seed, failure in failures if failure)
    values["pruned"] = "; ".join(f"seed {stored.record.seed}: {pruned_at(stored)}" for stored in row.pruned)
    values["interrupted"] = "; ".join(f"{partial.name}: {progress(partial)}" for partial in row.interrupted)
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _published_values(against: Against | None) -> dict[str, Any]:
    names = ("error_percent", "top5_error_percent", "difference_points", "verdict", "seeds_to_tell", "p", "source")
    values: tuple[Any, ...] = (None,) * len(names)
    if against is not None:
        published, ours, verdict = against.published, against.ours, against.verdict
        seeds = seeds_to_tell(ours.std, against.difference, published.n) if ours.std else None
        word, p = (verdict.verdict, verdict.p) if verdict else (None, None)
        values = (published.error, published.top5_error, against.difference, word, seeds, p, published.source)
    return {f"published_{name}": value for name, value in zip(names, values, strict=True)}


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
    # one value a line: json's own indenting takes twenty times as long, and nobody reads it
    lines = (
        f"{json.dumps(name)}: [\n"
        + ",\n".join(json.dumps(value, ensure_ascii=False, allow_nan=False) for value in values)
        + "\n]"
        for name, values in parts.items()
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"
