"""The columns of the table: what a row is, its errors, its costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from harness.results.metrics import METRICS, NONE, UNKNOWN, Metric, figures, suggest
from harness.results.published import Published, find_published
from harness.results.rows import Row
from harness.results.store import Interrupted, Stored
from harness.results.values import setting
from harness.results.verdict import ALPHA, MAX_HALF_WIDTH


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    header: str
    text: Callable[[Row], str]
    means: str = ""  # stands under the table
    right: bool = True
    stays: bool = False  # in the table, even where all rows agree
    hidden: bool = False  # from the table, unless it is chosen
    part: Literal["what", "errors", "costs"] = "what"  # of a table that is too wide for the terminal
    key: Callable[[Row], float | str | None] | None = None

    def sort_key(self, row: Row) -> float | str | None:
        """What the column is sorted by: a number where it shows one; None, or NaN, where there is nothing."""
        if self.key:
            return self.key(row)
        text = self.text(row)
        return None if text == NONE else text


def _signed(value: float | None) -> str:
    return NONE if value is None else f"{value:+.2f}".replace("-", "−")


def _width(row: Row) -> str:
    if "workers" in row.averaged_over:
        return f"{row.text('workers')} of {row.batch_size}"
    return f"{row.workers}×{row.batch_size // max(1, row.workers)}"


def _limit(row: Row) -> str:
    limit = setting(row.spec, "limit_train", int)
    return "all" if limit is None else f"{limit:,}"


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
    half = "" if row.against.half is None else f" ± {row.against.half:.2f}"
    return f"{published.number:.2f} ({_signed(row.against.difference)}{half})"


def cost_entry(row: Row) -> Published | None:
    """The published entry whose seconds and memory are of such runs as the row's: images by number and size, network.

    How the images were compressed does not matter to a cost, nor does the number of epochs.
    """
    overrides = setting(row.spec, "overrides", list) or ()
    other = any(not str(text).startswith(("epochs=", "val=")) for text in overrides)
    if other or setting(row.spec, "limit_train", int) is not None:
        return None
    return find_published(row.fields.get("dataset", ""), row.variant, row.depth)


def epoch_seconds_ratio(row: Row) -> float | None:
    """Published seconds over ours."""
    entry = cost_entry(row)
    return entry.epoch_seconds / row.epoch_seconds if entry and entry.epoch_seconds and row.epoch_seconds else None


def _published_seconds(row: Row) -> str:
    entry, ratio = cost_entry(row), epoch_seconds_ratio(row)
    if entry is None or entry.epoch_seconds is None:
        return NONE
    return f"{entry.epoch_seconds:g} s" + (f" ({figures(ratio)}×)" if ratio else "")


def _published_memory(row: Row) -> str:
    entry = cost_entry(row)
    return f"{entry.memory_mib:,g} MiB" if entry and entry.memory_mib else NONE


def _published_number(row: Row, variant: str | None = None) -> float | None:
    entry = find_published(row.fields.get("dataset", ""), variant or row.variant, row.depth)
    return entry.number if entry else None


def _published_error(row: Row, variant: str | None = None) -> str:
    entry = find_published(row.fields.get("dataset", ""), variant or row.variant, row.depth)
    return NONE if entry is None else f"{entry.number:.2f}{' (top-5)' if entry.error is None else ''}"


def _verdict(row: Row) -> str:
    if row.against is None:
        return NONE
    if row.against.word is None:
        return "not judged"
    if row.against.word in ("consistent", "cannot tell") or row.against.adjusted is None:
        return row.against.word
    p = row.against.adjusted
    return f"{row.against.word} " + ("p<.001" if p < 0.001 else f"p={p:.2g}".replace("0.", ".", 1))


def _seconds(row: Row) -> str:
    """ "1.74 (27, 1.60–1.96)": the row's figure, how many epochs were timed, the fastest and the slowest."""
    text = METRICS["epoch_seconds"].summary(row.figures.get("epoch_seconds", UNKNOWN))
    values = row.values("epoch_seconds")
    if (timing := row.timing) is not None:
        low, high = figures(timing.fastest), figures(timing.slowest)
        return f"{text} ({timing.epochs:,}{f', {low}–{high}' if low != high else ''})"
    low, high = (figures(end(values, default=None)) for end in (min, max))
    return f"{text} ({low}–{high})" if low != high else text


def _predicted_seconds(row: Row) -> float | None:
    return row.predicted.epoch_seconds if row.predicted else None


def _runs(row: Row) -> str:
    missing = len(row.failed) + len(row.pruned) + len(row.interrupted)
    return f"{len(row.done)} of {len(row.done) + missing}" if missing else str(len(row.done))


NUMBER = Column("number", "#", lambda r: r.name)  # only where one row takes several tables
DESCRIPTORS: tuple[Column, ...] = (
    Column("variant", "variant", lambda r: r.text("variant", r.variant), right=False, stays=True),
    Column("depth", "depth", lambda r: r.text("network.depth", str(r.depth or NONE)), stays=True,
           key=lambda r: r.depth),
    Column("dataset", "data set", lambda r: r.text("label", r.dataset), right=False),
    Column("limit_train", "images", _limit, "of the training set that were used",
           key=lambda r: setting(r.spec, "limit_train", int)),
    Column("duration", "trained", lambda r: r.duration, right=False, key=lambda r: setting(r.spec, "recipe.duration", int, float)),
    Column("overrides", "changed", lambda r: ", ".join(map(str, setting(r.spec, "overrides", list) or ())) or NONE,
           "what differs from the variant's own recipe", right=False),
    Column("loader", "loader", lambda r: r.text("loader"), right=False),
    Column("precision", "precision", lambda r: r.text("precision"), right=False),
    Column("engine", "engine", lambda r: r.text("engine"), right=False),
    Column("workers", "width", _width, "DDP workers × images per step and worker", right=False, key=lambda r: r.workers),
    Column("device", "device", lambda r: r.text("hardware", r.device), right=False),
    Column("differs", "differs in", lambda r: ", ".join(r.differs) or NONE, right=False),
)  # fmt: skip
DERIVED: dict[str, tuple[Column, ...]] = {
    "parameters": (
        Column("n", "n", _runs, "runs that are done, one a seed", stays=True, part="errors", key=lambda r: len(r.done)),
    ),
    "best_error": (
        Column("best_minus_last", "best − last", lambda r: _signed(r.best_minus_last),
               "in points: what choosing the epoch on the evaluated images takes off", stays=True, part="errors",
               key=lambda r: r.best_minus_last),
    ),
    "test_error": (
        Column("published", "published", _published, "the published error; in brackets ours minus it, in points, with the "
               "interval of 90 % for one more run of ours", stays=True, part="errors",
               key=lambda r: r.against.difference if r.against else None),
        Column("verdict", "verdict", _verdict, f"could the published number be one more run of ours? better, worse: no, by "
               f"Holm's p over the rows, below {ALPHA:g}; consistent: the interval holds 0 and is at most ±{MAX_HALF_WIDTH:g}; cannot tell: "
               "neither", right=False, stays=True, part="errors",
               key=lambda r: r.against.adjusted if r.against else None),
    ),
    "accuracy": (
        Column("published_error", "published %", _published_error, "as printed by the source, whatever the images here",
               hidden=True, part="errors", key=_published_number),
        Column("paper_error", "paper %", lambda r: _published_error(r, "he2015"),
               "of the same depth in arXiv:1512.03385", hidden=True, part="errors",
               key=lambda r: _published_number(r, "he2015")),
    ),
    "epoch_seconds": (
        Column("published_epoch_seconds", "published s", _published_seconds,
               "published s/epoch, on the hardware named below (and how many times as long as ours)",
               stays=True, part="costs", key=epoch_seconds_ratio),
        Column("predicted_epoch_seconds", "predicted", lambda r: figures(_predicted_seconds(r)),
               "s/epoch as a probe of some steps predicted it before", stays=True, part="costs", key=_predicted_seconds),
    ),
    "nvml_process_mib": (
        Column("published_memory_mib", "published MiB", _published_memory, "published memory, on the same hardware",
               stays=True, part="costs", key=lambda r: e.memory_mib if (e := cost_entry(r)) else None),
    ),
}  # fmt: skip
"""Columns that follow a metric's."""


def make_columns() -> list[Column]:
    """All columns, in their order: what a row is, its errors, its costs."""
    columns = list(DESCRIPTORS)
    for name, metric in METRICS.items():
        columns.append(_metric_column(metric))
        columns += DERIVED.get(name, ())
    return columns


def _metric_column(metric: Metric) -> Column:
    def key(row: Row) -> float | None:
        return row.figures.get(metric.name, UNKNOWN).value

    def text(row: Row) -> str:
        own = {"error": _error, "epoch_seconds": _seconds}.get(metric.name)
        return own(row) if own else metric.summary(row.figures.get(metric.name, UNKNOWN))

    part: Literal["errors", "costs"] = "errors" if metric.kind in ("size", "error") else "costs"
    return Column(metric.name, metric.title, text, metric.means, stays=True, hidden=not metric.in_table, part=part,
                  key=key)  # fmt: skip


def find_columns(names: Sequence[str]) -> list[Column]:
    """Columns by name, each once. Raises ValueError for one that does not exist."""
    known = {column.name: column for column in make_columns()}
    check_names(names, list(known))
    return [known[name] for name in dict.fromkeys(names)]


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
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
