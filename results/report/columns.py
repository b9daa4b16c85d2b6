"""The columns of the table: what a row is, its errors, its costs. `columns.toml` declares them; here is what they say."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from harness.results.compare import signed
from harness.results.metrics import METRICS, NONE, figures, rounded
from harness.results.published import Published, find_published
from harness.results.rows import Row
from harness.results.statistics import MAX_HALF_WIDTH, VERDICT_ALPHA
from harness.results.store import Interrupted, Stored
from harness.results.values import setting
from harness.words import unknown


class Column(NamedTuple):
    """As columns.toml says."""

    name: str
    header: str
    means: str = ""
    key: str = ""
    field: str = ""
    right: bool = True
    stays: bool = True
    hidden: bool = False

    def text(self, row: Row) -> str:
        """Its cell."""
        if own := TEXT.get(self.name):
            return own(row)
        if metric := METRICS.get(self.name):
            return metric.summary(row.figures[self.name])
        return row.text(self.field or self.name, getattr(row, self.name, NONE))

    def sort_key(self, row: Row) -> float | str | None:
        """What the column is sorted by; None where there is nothing, and for what is not finite."""
        value = find(row, self.key) if self.key else self.text(row)
        known = isinstance(value, int | float) and math.isfinite(value) if self.key else value != NONE
        return value if known else None


def find(row: Row, path: str) -> Any:
    """The value at a path that begins at a row, or at one of `DERIVED`; None where there is none."""
    first, _, rest = path.partition(".")
    value = DERIVED[first](row) if first in DERIVED else getattr(row, first)
    return setting(value, rest) if rest else value


# --- what is made of a row's values ---


def _overrides(row: Row) -> list[str]:
    own = list(map(str, setting(row.spec, "overrides", list) or ()))
    return [row.text("overrides")] if "overrides" in row.averaged_over else own


def printed_entry(row: Row, variant: str = "") -> Published | None:
    """The published entry of the row's network or of the variant's at its depth, whatever the images."""
    if row.averaged_over.keys() & {"dataset", "variant", "network.depth"}:
        return None
    return find_published(None, variant or row.variant, row.depth)


def cost_entry(row: Row) -> Published | None:
    """The published entry whose seconds and memory are of such runs as the row's: images by number and size, network.

    How the images were compressed does not matter to a cost, nor does the number of epochs.
    """
    other = any(not text.startswith("epochs=") for text in _overrides(row))
    part = setting(row.spec, "limit_train", int) is not None or "limit_train" in row.averaged_over
    entry = printed_entry(row)
    return None if other or part or (entry and entry.dataset != row.fields.get("dataset")) else entry


def _ratio(row: Row) -> float | None:
    ours, theirs = row.figures["epoch_seconds"].value, find(row, "cost.epoch_seconds")
    return theirs / ours if theirs and ours and not find(row, "cost.evaluation_timed") else None


def end_of(run: Stored | Interrupted) -> str:
    """Of a run that is not done: "OOM", "pruned at 3 of 30", "epoch 3 of 30", "epoch 30 of 30, no result"."""
    if isinstance(run, Interrupted):
        of = f" of {run.of}" * bool(run.of) + ", no result" * (run.epochs == run.of)
        return f"epoch {run.epochs}{of}" if run.epochs else "no epoch yet"
    pruned, failure = run.record.pruned, run.record.failure
    return f"pruned at {pruned.epoch} of {pruned.of}" if pruned else failure.kind if failure else NONE


DERIVED: dict[str, Callable[[Row], Any]] = {
    "images": lambda row: row.done[0].record.images() if row.done else None,
    "changed": lambda row: " ".join(_overrides(row)),
    "differences": lambda row: " ".join(f"{name}={row.fields.get(name, NONE)}" for name in row.differs),
    "averaged": lambda row: " ".join(f"{name}={'/'.join(values)}" for name, values in row.averaged_over.items()),
    "n": lambda row: len(row.done),
    "seeds": lambda row: [stored.record.seed for stored in row.done],
    "no_verdict": lambda row: (row.against and row.against.reason) or None,
    "predictions": lambda row: row.predicted and {n: m.measure(row.predicted).value for n, m in METRICS.items() if m.predict},
    "entry": printed_entry, "paper": lambda row: printed_entry(row, "he2015"), "cost": cost_entry, "ratio": _ratio,
    "failures": lambda row: "; ".join(f"seed {run.record.seed}: {end_of(run)}" for run in row.failed),
    "prunings": lambda row: "; ".join(f"seed {run.record.seed}: {end_of(run)}" for run in row.pruned),
    "interruptions": lambda row: "; ".join(f"{run.name}: {end_of(run)}" for run in row.interrupted),
}  # fmt: skip
"""Where a path can begin, beside the fields of a row."""


# --- cells that are more than a figure ---


def _images(row: Row) -> str:
    return "/".join(f"{int(n):,}" if n.isdecimal() else "all" for n in row.text("limit_train").split("/"))


def _width(row: Row) -> str:
    if row.averaged_over.keys() & {"workers", "recipe.batch_size"}:
        return f"{row.text('workers', str(row.workers))} of {row.text('recipe.batch_size', str(row.batch_size))}"
    return f"{row.workers}×{row.batch_size // max(1, row.workers)}"


def _error(row: Row) -> str:
    """The error, or the reason why there is none."""
    if row.error is not None:
        return METRICS["error"].summary(row.figures["error"])
    return ", ".join(dict.fromkeys(map(end_of, row.failed))) or end_of((row.pruned or row.interrupted)[0])


def _seconds(row: Row) -> str:
    """ "1.74 (27, 1.60–1.96)": the row's figure, how many epochs were timed, the fastest and the slowest."""
    timing = row.timing
    words = [f"{timing.epochs:,}"] if timing and timing.epochs else []
    ends = [timing.fastest or 0.0, timing.slowest or 0.0] if timing and words else row.values("epoch_seconds")
    if ends and (low := figures(min(ends))) != (high := figures(max(ends))):
        words.append(f"{low}–{high}")
    text = METRICS["epoch_seconds"].summary(row.figures["epoch_seconds"])
    return text + f" ({', '.join(words)})" * bool(words)


def _runs(row: Row) -> str:
    missing = len(row.failed) + len(row.pruned) + len(row.interrupted)
    return f"{len(row.done)}{f' of {len(row.done) + missing}' * bool(missing)}"


def _published(row: Row) -> str:
    if row.against is None:
        return NONE
    half = "" if row.against.half is None else f" ± {row.against.half:.2f}"
    return f"{row.against.published.number:.2f} ({signed(row.against.difference)}{half})"


def _verdict(row: Row) -> str:
    if row.against is None:
        return NONE
    word, p = row.against.word, row.against.adjusted
    if word in (None, "consistent", "cannot tell") or p is None:
        return word or "not judged"
    return f"{word} " + ("p<.001" if p < 0.001 else f"p={p:.2g}".replace("0.", ".", 1))


def _quote(entry: Published | None) -> str:
    return NONE if entry is None else f"{entry.number:.2f}{' (top-5)' * (entry.error is None)}"


def _published_seconds(row: Row) -> str:
    seconds, ratio = find(row, "cost.epoch_seconds"), _ratio(row)
    return (f"{seconds:g} s" if seconds else NONE) + (f" ({figures(ratio)}×)" if ratio else "")


TEXT: dict[str, Callable[[Row], str]] = {
    "depth": lambda row: row.text("network.depth", str(row.depth)) if row.depth else NONE,
    "network": lambda row: f"{row.variant} {row.depth:06}",  # of the page, which sorts by it
    "limit_train": _images,
    # `duration` says the number of epochs
    "overrides": lambda row: (
        rounded(", ".join(t for t in _overrides(row) if not t.removeprefix("epochs=").isdecimal())) or NONE
    ),
    "workers": _width,
    "differs": lambda row: ", ".join(f"{name}={text}" for name, text in row.differs.items()) or NONE,
    "n": _runs,
    "error": _error,
    "best_minus_last": lambda row: NONE if row.best_minus_last is None else signed(row.best_minus_last),
    "published": _published,
    "verdict": _verdict,
    "published_error": lambda row: _quote(printed_entry(row)),
    "paper_error": lambda row: _quote(printed_entry(row, "he2015")),
    "epoch_seconds": _seconds,
    "published_epoch_seconds": _published_seconds,
    "predicted_epoch_seconds": lambda row: figures(find(row, "predicted.epoch_seconds")),
    "published_memory_mib": lambda row: f"{mib:,g} MiB" if (mib := find(row, "cost.memory_mib")) else NONE,
}
"""By columns; the others show a metric, a field, or what a row has of that name."""


# --- all columns ---


_TEXT = Template(Path(__file__).with_name("columns.toml").read_text(encoding="utf-8"))
_DECLARED = tomllib.loads(_TEXT.substitute(ALPHA=VERDICT_ALPHA, MAX_HALF_WIDTH=MAX_HALF_WIDTH))
SPARE: list[str] = _DECLARED["spare"]
DESCRIPTORS = [Column(name, **entry) for name, entry in _DECLARED["descriptors"].items()]


def make_columns() -> list[Column]:
    """All columns, in their order: what a row is, its errors, its costs."""
    columns = list(DESCRIPTORS)
    for name, metric in METRICS.items():
        key = f"figures.{name}.value"
        columns.append(Column(name, metric.title, metric.means, key, hidden=not metric.in_table))
        columns += [Column(n, **entry) for n, entry in _DECLARED["derived"].get(name, {}).items()]
    return columns


def find_columns(names: Sequence[str]) -> list[Column]:
    """Columns by name, each once. Raises ValueError for one that does not exist."""
    known = {column.name: column for column in make_columns()}
    check_names(names, list(known))
    return [known[name] for name in dict.fromkeys(names)]


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(unknown("column", name, known))


def sort_rows(rows: Sequence[Row], by: str) -> list[Row]:
    """Order rows by a column, smallest first; "-error": largest first. Rows without a value stand last either way.

    Raises ValueError for a column that does not exist.
    """
    (column,) = find_columns([by.removeprefix("-")])
    keyed: list[tuple[Any, Row]] = [(column.sort_key(row), row) for row in rows]
    known = sorted((pair for pair in keyed if pair[0] is not None), key=itemgetter(0), reverse=by.startswith("-"))
    return [row for _, row in (*known, *(pair for pair in keyed if pair[0] is None))]
