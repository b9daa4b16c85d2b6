"""Rows -> the page a person reads, or numbers for a program."""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import textwrap
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
from harness.results.rows import NONE, Against, Row, summarise
from harness.results.statistics import Sample, seeds_to_tell
from harness.results.store import Interrupted, Stored
from harness.results.values import MEMORY_CATEGORIES, Measurement, Prediction

__all__ = ["FORMATS", "Format", "Row", "render", "sort_rows", "summarise"]

Format = Literal["table", "markdown", "csv", "json", "latex"]
FORMATS: tuple[Format, ...] = ("table", "markdown", "csv", "json", "latex")


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the page. `means` stands under the table; `stays` keeps it there when all rows agree."""

    name: str
    header: str
    text: Callable[[Row], str]
    means: str = ""
    right: bool = True
    stays: bool = False


def _percent(value: Sample | None) -> str:
    if value is None:
        return NONE
    return f"{value.mean:.2f}" if value.std is None else f"{value.mean:.2f} ± {value.std:.2f}"


def _signed(value: float | None) -> str:
    return NONE if value is None else f"{value:+.2f}".replace("-", "−")


def figures(value: float | None) -> str:
    """Three figures, never in powers of ten: 0.0123, 1.23, 12.3, 123, 12,345."""
    if value is None or not math.isfinite(value):
        return NONE if value is None else str(value)
    if value == 0:
        return "0"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _million(value: int | None) -> str:
    return NONE if value is None else f"{value / 1e6:.2f}M"


def _mib(reading: Measurement) -> str:
    return NONE if reading.value is None else f"{reading.value:,.0f}"


def _either(row: Row, name: str, text: str) -> str:
    """A descriptor, or all its values where the row was told to average over them."""
    return "/".join(row.averaged_over[name]) if name in row.averaged_over else text


def _width(row: Row) -> str:
    if "workers" in row.averaged_over:
        return f"{'/'.join(row.averaged_over['workers'])} of {row.batch_size}"
    return f"{row.workers}×{row.batch_size // max(1, row.workers)}"


def _duration(row: Row) -> str:
    if math.isnan(row.duration):
        return NONE
    return f"{row.duration:,g} {row.duration_unit}s" if row.duration != 1 else f"1 {row.duration_unit}"


def _error(row: Row) -> str:
    """The error, or in its place why there is none."""
    if row.error is not None:
        return _percent(row.error)
    if row.failed:
        return _kinds(row.failed)
    if row.pruned:
        return _stop(row.pruned[0])
    return _progress(row.interrupted[0])


def _kinds(failed: Sequence[Stored]) -> str:
    kinds = dict.fromkeys(stored.record.failure.kind for stored in failed if stored.record.failure)
    return ", ".join(kinds)


def _stop(stored: Stored) -> str:
    pruned = stored.record.pruned
    return f"pruned at {pruned.epoch} of {pruned.of}" if pruned else NONE


def _progress(partial: Interrupted) -> str:
    if partial.epochs == 0:
        return "no epoch yet"
    return f"epoch {partial.epochs} of {partial.of}" if partial.of else f"epoch {partial.epochs}"


def _beside(row: Row) -> str:
    if row.against is None:
        return NONE
    published = row.against.published
    number = published.error if published.error is not None else published.top5_error
    return f"{number:.2f} ({_signed(row.against.difference)})"


def _verdict(row: Row) -> str:
    if row.against is None:
        return NONE
    verdict = row.against.verdict
    return "~" if verdict is None else f"{verdict.verdict} {_p(verdict.p)}"


def _p(p: float) -> str:
    return "p<.001" if p < 0.001 else f"p={p:.2g}".replace("0.", ".", 1)


def _runs(row: Row) -> str:
    missing = len(row.failed) + len(row.pruned) + len(row.interrupted)
    return f"{len(row.done)} of {len(row.done) + missing}" if missing else str(len(row.done))


DESCRIPTORS: tuple[Column, ...] = (
    Column("variant", "variant", lambda r: _either(r, "variant", r.variant), right=False, stays=True),
    Column("depth", "depth", lambda r: _either(r, "network.depth", str(r.depth or NONE)), stays=True),
    Column("dataset", "data set", lambda r: _either(r, "label", r.dataset), right=False),
    Column(
        "limit_train", "images", lambda r: "all" if r.limit_train is None else f"{r.limit_train:,}",
        "of the training set that were used",
    ),
    Column("duration", "trained", _duration, right=False),
    Column(
        "overrides", "changed", lambda r: ", ".join(r.overrides) or NONE,
        "what differs from the variant's own recipe", right=False,
    ),
    Column("loader", "loader", lambda r: _either(r, "loader", r.loader), right=False),
    Column("precision", "precision", lambda r: _either(r, "precision", r.precision), right=False),
    Column("engine", "engine", lambda r: _either(r, "engine", r.engine), right=False),
    Column("width", "width", _width, "DDP workers × images per step and worker", right=False),
    Column("device", "device", lambda r: _either(r, "hardware", r.device), right=False),
)  # fmt: skip
NUMBER = Column("number", "#", lambda r: r.name)  # only where one row takes several tables
DIFFERS = Column("differs", "differs in", lambda r: ", ".join(r.differs) or NONE, right=False)

ERRORS: tuple[Column, ...] = (
    Column("parameters", "params", lambda r: _million(r.parameters), "trainable parameters", stays=True),
    Column("n", "n", _runs, "runs that are done, one a seed", stays=True),
    Column("error", "error %", _error, "top-1 after the last epoch, mean ± std (n − 1) over the seeds", stays=True),
    Column(
        "best", "best %", lambda r: NONE if r.best_error is None else f"{r.best_error.mean:.2f}",
        "mean of each run's best epoch", stays=True,
    ),
    Column(
        "best_minus_last", "b−l", lambda r: _signed(r.best_minus_last),
        "best minus last, in points: what choosing the epoch on the evaluated images takes off", stays=True,
    ),
    Column("top5", "top-5 %", lambda r: _percent(r.top5_error), "top-5 after the last epoch", stays=True),
    Column("test", "test %", lambda r: _percent(r.test_error),
           "top-1 of the test set after the last epoch, where the other errors are of images held out", stays=True),
    Column("published", "published", _beside, "the published error (and ours minus it, in points)", stays=True),
    Column(
        "verdict", "verdict", _verdict, "could the published number be one more run of ours? prediction interval of 95 %",
        right=False, stays=True,
    ),
)  # fmt: skip
COSTS: tuple[Column, ...] = (
    Column(
        "epoch_seconds", "s/epoch", lambda r: figures(r.epoch_seconds),
        "training only, median over the epochs after warm-up, then over the runs; evaluation, set-up and compilation "
        "are left out", stays=True,
    ),
    Column("predicted_epoch_seconds", "predicted", lambda r: figures(r.predicted_epoch_seconds),
           "s/epoch as a probe of some steps predicted it before", stays=True),
    Column("images_per_second", "img/s", lambda r: figures(r.images_per_second), "of all workers, same medians", stays=True),
    Column(
        "data_stall_percent", "wait %", lambda r: NONE if r.data_stall_percent is None else f"{r.data_stall_percent:.1f}",
        "share of the training time spent waiting for the loader", stays=True,
    ),
    Column("energy_joules", "kJ", lambda r: figures(None if r.energy_joules is None else r.energy_joules / 1000),
           "energy of all GPUs while a run trained, by NVML's counter; median over the runs", stays=True),
    Column("torch_allocated_mib", "alloc", lambda r: _mib(r.torch_allocated_mib),
           "MiB, torch.cuda.max_memory_allocated: tensors alive at the peak", stays=True),
    Column("torch_reserved_mib", "resvd", lambda r: _mib(r.torch_reserved_mib),
           "MiB, torch.cuda.max_memory_reserved: the same with the allocator's slack", stays=True),
    Column("nvml_process_mib", "NVML", lambda r: _mib(r.nvml_process_mib),
           "MiB, all the process holds on the GPU: with CUDA context, NCCL and DALI", stays=True),
    Column("rss_mib", "RSS", lambda r: _mib(r.rss_mib), "MiB, peak resident memory on the host", stays=True),
)  # fmt: skip
COLUMNS = (*DESCRIPTORS, DIFFERS, *ERRORS, *COSTS)
FIELDS = {"best": "best_error", "top5": "top5_error", "test": "test_error", "width": "workers"}
"""Columns that are called otherwise in `Row`."""


def sort_value(name: str, row: Row) -> float | str | None:
    """What a column is sorted by: a number where it shows one; None, or NaN, where there is nothing."""
    if name == "n":
        return len(row.done)
    if name == "published":
        return row.against.difference if row.against else None
    if name == "verdict":
        return row.against.verdict.p if row.against and row.against.verdict else None
    value = getattr(row, FIELDS.get(name, name), None)
    if isinstance(value, Sample):
        return value.mean
    if isinstance(value, Measurement):
        return value.value
    return ", ".join(value) if isinstance(value, tuple) else value


def sort_rows(rows: Sequence[Row], by: str) -> list[Row]:
    """Order rows by a column, smallest first; "-error": largest first. Rows without a value stand last either way.

    Raises ValueError for a column that does not exist.
    """
    name, descending = by.removeprefix("-"), by.startswith("-")
    _check_columns([name], [column.name for column in COLUMNS])
    have: list[Row] = []
    lack: list[Row] = []
    for row in rows:
        value = sort_value(name, row)
        nothing = value is None or (isinstance(value, float) and math.isnan(value))
        (lack if nothing else have).append(row)
    return [*sorted(have, key=lambda row: sort_value(name, row), reverse=descending), *lack]  # type: ignore[arg-type, return-value]


def _check_columns(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"no column {name!r}: "
                + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}")
            )


# --- notes ---


@dataclass(frozen=True, slots=True)
class Note:
    """A footnote and the cells it belongs to: (row, column name)."""

    text: str
    cells: frozenset[tuple[int, str]]


def make_notes(rows: Sequence[Row]) -> list[Note]:
    """Everything a reader must know about single cells, in the order of the columns they stand in."""
    cells: dict[str, set[tuple[int, str]]] = {}

    def note(text: str, row: int, *columns: str) -> None:
        cells.setdefault(text, set()).update((row, column) for column in columns)

    for i, row in enumerate(rows):
        if not row.original and row.done:
            note(
                f"{row.dataset} is not a published data set's own images: never compared with published errors",
                i,
                "dataset",
            )
    for i, row in enumerate(rows):
        if row.limit_train is not None:
            note("trained on a part of the training set: not comparable with published errors", i, "limit_train")
        if row.limit_test is not None:
            note(f"of {row.limit_test:,} of the test images: not comparable with published errors", i, "error")
        for name, values in row.averaged_over.items():
            note(f"averaged over {name}: {', '.join(values)}, as asked for", i, "n")
        if row.evaluated_on == "val":
            note("of held-out training images, not of the test set", i, "error")
        together = {str(stored.record.environment.get("concurrent_runs", 1)) for stored in row.done}
        if together - {"1"}:
            note(f"timed with {' or '.join(sorted(together))} runs going on at a time", i, "epoch_seconds")
        shares = {str(stored.record.environment.get("gpu_share", 1)) for stored in row.done}
        if shares - {"1"}:
            note(f"packed: timed on {' or '.join(sorted(shares))} of a GPU, beside other runs", i, "epoch_seconds")
        for result in (stored.record.result for stored in row.done):
            if result is not None and result.runs_per_gpu > 1:
                note(f"{result.runs_per_gpu} runs shared each GPU: their epochs are not timed", i, "epoch_seconds")
            for warning in result.warnings if result is not None else ():
                if warning.startswith("engine "):
                    note(warning, i, "engine")
        for cause in dict.fromkeys(
            t for stored in row.done if stored.record.result for t in stored.record.result.interference
        ):
            note(f"{cause} in some epochs: they are left out", i, "epoch_seconds")
        if widths := row.fields.get("widths"):
            note(f"DDP width {widths}: the cluster had no room for {row.workers} workers; epochs at another width are "
                 "left out of the seconds", i, "epoch_seconds", "error")  # fmt: skip
        if row.repeated:
            note("a seed that was run more than once counts with its last run", i, "n")
        for stored in row.failed:
            if failure := stored.record.failure:
                why = f"{failure.kind}: {failure.message}" if failure.message else failure.kind
                note(
                    f"{row.name} seed {stored.record.seed} failed, {_shorten(why)}",
                    i,
                    "n" if row.done else "error",
                )
        for stored in row.pruned:
            if row.done:
                note(f"{row.name} seed {stored.record.seed} was {_stop(stored)} epochs by a search", i, "n")
            else:
                note("pruned by a search before its end: averaged with nothing", i, "error")
        for partial in row.interrupted:
            seed = partial.spec.get("seed")
            who = f"{row.name} seed {seed}" if seed is not None else partial.name
            note(f"{who} is not done: {_progress(partial)}", i, "n" if row.done else "error")
        if row.against is not None:
            note(_cite(row.against.published), i, "published")
        missing: dict[str, list[Column]] = defaultdict(list)
        if row.done and row.epoch_seconds is None:
            note("no epoch was timed: each was the first of its attempt, which is warm-up", i, "epoch_seconds")
        for column in COSTS if row.done else ():
            if row.fields.get("device") == "cpu" and column.name != "rss_mib":
                continue  # nobody misses a GPU's memory where none was asked for
            reading = getattr(row, column.name)
            if isinstance(reading, Measurement) and reading.value is None and reading.reason:
                missing[reading.reason].append(column)
        for reason, columns in missing.items():
            headers = ", ".join(column.header for column in columns)
            note(f"{headers} not measured: {_shorten(reason)}", i, *(column.name for column in columns))
    return [Note(text, frozenset(at)) for text, at in cells.items()]


def _cite(published: Published) -> str:
    """Where a published number comes from, and what is to be known about it."""
    parts = [published.source, f"mean of {published.n} runs" if published.n > 1 else "one run"]
    if published.std is not None:
        parts[1] += f", std {published.std:.2f}"
    if published.rule == "best":
        parts.append("best epoch, set beside our best")
    if published.error is None:
        parts.append("top-5")
    if published.note:
        parts.append(published.note)
    return "; ".join(parts)


def _shorten(text: str, limit: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


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
    `COLUMNS`, or for csv and json names of theirs; none: all that say something. Raises ValueError for an unknown one.
    """
    if format == "csv":
        return _csv(_chosen(rows, columns))
    if format == "json":
        return _json(rows, _chosen(rows, columns))
    if not rows:
        return "no runs\n"
    layout = lay_out(rows, columns)
    if format == "markdown":
        return _markdown(layout)
    return _latex(layout) if format == "latex" else _terminal(layout, rows, width, colour)


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
    _check_columns(wanted, [column.name for column in COLUMNS])
    cpu = all(row.torch_allocated_mib.value is None for row in rows)
    columns, shared = [NUMBER], []
    words = {column.name: [column.text(row) for row in rows] for column in COLUMNS}
    for column in COLUMNS:
        texts = set(words[column.name])
        if column.name == "rss_mib" and not cpu:
            continue  # on the GPU it is in csv and json
        if texts == {NONE} or (column.name == "limit_train" and texts == {"all"}):
            continue
        if column.name == "device" and any(row.done for row in rows):
            texts -= {NONE}  # a run that failed does not know its device
        if len(texts) == 1 and not column.stays:
            shared.append(column)
        else:
            columns.append(column)
    if wanted:
        by_name = {column.name: column for column in COLUMNS}
        columns = [NUMBER, *(by_name[name] for name in dict.fromkeys(wanted))]
        shared = [column for column in shared if column not in columns]
    shown = {column.name for column in columns}
    everywhere: dict[str, list[int]] = defaultdict(list)
    marks: dict[tuple[int, str], list[int]] = defaultdict(list)
    notes = make_notes(rows)
    if wanted:  # what is said of other columns goes with them
        notes = [note for note in notes if any(name in shown for _, name in note.cells)]
    for number, note in enumerate(notes, 1):
        for name in dict.fromkeys(name for _, name in sorted(note.cells)):
            where = [i for i, n in note.cells if n == name]
            if len(where) == len(rows) or name not in shown:
                everywhere[name].append(number)
            else:
                for i in where:
                    marks[i, name].append(number)
    pieces = []
    for column in shared:
        text = next(text for text in words[column.name] if text != NONE)
        if column.name == "limit_train":
            text = f"training images: {text}"
        pieces.append(text + _mark(everywhere[column.name]))
    words[NUMBER.name] = [str(i) for i in range(1, len(rows) + 1)]
    words = {column.name: [clean(text) for text in words[column.name]] for column in columns}
    marked = {name: list(texts) for name, texts in words.items()}
    for (i, name), numbers in marks.items():
        marked[name][i] += _mark(numbers)
    sheet = Sheet(
        [column.header + _mark(everywhere[column.name]) for column in columns],
        [column.right for column in columns],
        [[marked[column.name][i] for column in columns] for i in range(len(rows))],
    )
    return Layout(
        caption=clean(" · ".join(pieces)),
        columns=columns,
        words=words,
        marks=dict(marks),
        header_marks=dict(everywhere),
        sheet=sheet,
        notes=[clean(note.text) for note in notes],
        means=[f"{column.header}: {column.means}" for column in columns if column.means],
    )


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
    groups = {c.name: k for k, columns in enumerate(((*DESCRIPTORS, DIFFERS), ERRORS, COSTS)) for c in columns}
    number, *rest = range(len(layout.columns))
    what, errors, costs = ([j for j in rest if groups[layout.columns[j].name] == k] for k in range(3))
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
        for_markdown(_whole(layout)),
        "  \n".join(map(escape_markdown, layout.numbered)),
        "\n".join(f"- {escape_markdown(line)}" for line in layout.means),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _latex(layout: Layout) -> str:
    small = [*layout.numbered, "; ".join(layout.means)]
    parts = [
        "% needs \\usepackage{booktabs}",
        rf"\noindent {escape_latex(layout.caption)}\par\smallskip" if layout.caption else "",
        for_latex(_whole(layout)),
        "\\par\\smallskip{\\footnotesize\n" + " \\\\\n".join(map(escape_latex, small)) + "\\par}",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _whole(layout: Layout) -> Sheet:
    """Every column but the numbers of the rows."""
    return layout.sheet.select(range(1, len(layout.columns)))


# --- rows -> numbers ---


def _raw(row: Row) -> dict[str, Any]:
    """A row as plain values, nothing rounded."""
    against = row.against
    values: dict[str, Any] = {
        "variant": row.variant,
        "depth": row.depth,
        "dataset": row.dataset,
        "dataset_is_original": row.original,
        "fingerprint": row.fields.get("fingerprint"),
        "limit_train": row.limit_train,
        "limit_test": row.limit_test,
        "evaluated_on": row.evaluated_on,
        "duration": row.duration,
        "duration_unit": row.duration_unit,
        "overrides": " ".join(row.overrides),
        "loader": row.loader,
        "precision": row.precision,
        "engine": row.engine,
        "device": row.device,
        "workers": row.workers,
        "batch_size": row.batch_size,
        "differs": " ".join(row.differs),
        "averaged_over": " ".join(f"{name}={'/'.join(v)}" for name, v in row.averaged_over.items()),
        "parameters": row.parameters,
        "n": len(row.done),
        "seeds": " ".join(str(stored.record.seed) for stored in row.done),
    }
    for name, value in (
        ("error", row.error),
        ("best_error", row.best_error),
        ("top5_error", row.top5_error),
        ("test_error", row.test_error),
        ("test_top5_error", row.test_top5_error),
    ):
        values[f"{name}_percent_mean"] = value.mean if value else None
        values[f"{name}_percent_std"] = value.std if value else None
    values |= {
        "best_minus_last_points": row.best_minus_last,
        "epoch_seconds": row.epoch_seconds,
        **_predicted(row.predicted),
        "eval_seconds": row.eval_seconds,
        "setup_seconds": row.setup_seconds,
        "images_per_second": row.images_per_second,
        "wait_percent": row.data_stall_percent,
        "energy_joules": row.energy_joules,
        "torch_allocated_mib": row.torch_allocated_mib.value,
        "torch_reserved_mib": row.torch_reserved_mib.value,
        "nvml_process_mib": row.nvml_process_mib.value,
        "rss_mib": row.rss_mib.value,
        **{f"{_name(category)}_mib": row.by_category_mib.get(category) for category in MEMORY_CATEGORIES},
        "published_error_percent": against.published.error if against else None,
        "published_top5_error_percent": against.published.top5_error if against else None,
        "published_difference_points": against.difference if against else None,
        "published_verdict": against.verdict.verdict if against and against.verdict else None,
        "published_seeds_to_tell": _seeds_to_tell(against),
        "published_p": against.verdict.p if against and against.verdict else None,
        "published_source": against.published.source if against else None,
        "failed": "; ".join(
            f"seed {s.record.seed}: {s.record.failure.kind}" for s in row.failed if s.record.failure
        ),
        "pruned": "; ".join(f"seed {s.record.seed}: {_stop(s)}" for s in row.pruned),
        "interrupted": "; ".join(f"{p.name}: {_progress(p)}" for p in row.interrupted),
    }
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _predicted(probe: Prediction | None) -> dict[str, float | None]:
    """What a probe predicted, by the names of what was then measured."""
    return {
        "predicted_epoch_seconds": probe.epoch_seconds if probe else None,
        "predicted_eval_seconds": probe.eval_seconds if probe else None,
        "predicted_energy_joules": probe.run_joules.value if probe else None,
        **{
            f"predicted_{name}": getattr(probe.memory, name).value if probe else None
            for name in ("torch_allocated_mib", "torch_reserved_mib", "nvml_process_mib", "rss_mib")
        },
    }


def _name(category: str) -> str:
    """ "optimizer state" -> "memory_optimizer_state" """
    return f"memory_{category.lower().replace(' ', '_')}"


def _seeds_to_tell(against: Against | None) -> int | None:
    if against is None or not against.ours.std:
        return None
    return seeds_to_tell(against.ours.std, against.difference, against.published.n)


def _chosen(rows: Sequence[Row], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Every row as plain values, or only those asked for."""
    raw = [_raw(row) for row in rows]
    if not columns or not raw:
        return raw
    _check_columns(columns, list(raw[0]))
    return [{name: values[name] for name in columns} for values in raw]


def _csv(raw: list[dict[str, Any]]) -> str:
    output = io.StringIO()
    writer = csv.DictWriter(output, list(raw[0]) if raw else [], lineterminator="\n")
    if raw:
        writer.writeheader()
        writer.writerows(raw)
    return output.getvalue()


def _json(rows: Sequence[Row], raw: list[dict[str, Any]]) -> str:
    notes = [
        {"text": note.text, "cells": [{"row": i, "column": name} for i, name in sorted(note.cells)]}
        for note in make_notes(rows)
    ]
    definitions = [{"column": column.name, "means": column.means} for column in COLUMNS if column.means]
    parts = {"rows": raw, "notes": notes, "definitions": definitions}
    # one value a line: json's own indenting takes twenty times as long, and nobody reads it
    lines = (
        f"{json.dumps(name)}: [\n"
        + ",\n".join(json.dumps(value, ensure_ascii=False, allow_nan=False) for value in values)
        + "\n]"
        for name, values in parts.items()
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"
