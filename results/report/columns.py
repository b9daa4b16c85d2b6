"""The columns of the table: what a row is, its errors, its costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

from harness.results.metrics import METRICS, NONE, UNKNOWN, Metric, figures, rounded, suggest
from harness.results.published import Published, find_published
from harness.results.rows import Row
from harness.results.statistics import MAX_HALF_WIDTH, VERDICT_ALPHA
from harness.results.store import Interrupted, Stored
from harness.results.values import setting


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    header: str
    text: Callable[[Row], str]
    means: str = ""  # stands under the table
    key: Callable[[Row], Any] | None = None  # what it is sorted by: a number, None or NaN; by default its text
    right: bool = True
    stays: bool = True  # in the table, even where all rows agree
    hidden: bool = False  # from the table, unless it is chosen

    def sort_key(self, row: Row) -> float | str | None:
        """What the column is sorted by; None, or NaN, where there is nothing."""
        value: float | str | None = (self.key or self.text)(row)
        return None if value == NONE else value


def _width(row: Row) -> str:
    if "workers" in row.averaged_over:
        return f"{row.text('workers')} of {row.batch_size}"
    return f"{row.workers}×{row.batch_size // max(1, row.workers)}"


def _limit(row: Row) -> Any:
    return setting(row.spec, "limit_train", int)


def _overrides(row: Row) -> list[str]:
    return list(map(str, setting(row.spec, "overrides", list) or ()))


_descriptor = partial(Column, right=False, stays=False)
DESCRIPTORS: tuple[Column, ...] = (
    _descriptor("variant", "variant", lambda r: r.text("variant", r.variant), stays=True),
    _descriptor("depth", "depth", lambda r: r.text("network.depth", str(r.depth)) if r.depth else NONE, stays=True, right=True,
              key=lambda r: r.depth),
    _descriptor("dataset", "data set", lambda r: r.text("label", r.dataset)),
    _descriptor("limit_train", "images", lambda r: f"{limit:,}" if (limit := _limit(r)) else "all",
              "of the training set that were used", right=True, key=_limit),
    _descriptor("duration", "trained", lambda r: r.duration, key=lambda r: setting(r.spec, "recipe.duration", int, float)),
    _descriptor("overrides", "changed", lambda r: rounded(", ".join(_overrides(r))) or NONE,
              "what differs from the variant's own recipe"),
    _descriptor("loader", "loader", lambda r: r.text("loader")),
    _descriptor("precision", "precision", lambda r: r.text("precision")),
    _descriptor("engine", "engine", lambda r: r.text("engine")),
    _descriptor("workers", "width", _width, "DDP workers × images per step and worker", key=lambda r: r.workers),
    _descriptor("device", "device", lambda r: r.text("hardware", r.device)),
    _descriptor("differs", "differs in", lambda r: ", ".join(r.differs) or NONE),
)  # fmt: skip


# --- its figures ---


def _signed(value: float | None) -> str:
    return NONE if value is None else f"{value:+.2f}".replace("-", "−")


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
    return f"epoch {partial.epochs}" + (f" of {partial.of}" if partial.of else "")


def _seconds(row: Row) -> str:
    """ "1.74 (27, 1.60–1.96)": the row's figure, how many epochs were timed, the fastest and the slowest."""
    timing, words = row.timing, list[str]()
    ends = row.values("epoch_seconds")
    if timing is not None:
        words, ends = [f"{timing.epochs:,}"], [timing.fastest or 0.0, timing.slowest or 0.0]
    if ends and (low := figures(min(ends))) != (high := figures(max(ends))):
        words.append(f"{low}–{high}")
    text = METRICS["epoch_seconds"].summary(row.figures.get("epoch_seconds", UNKNOWN))
    return text + (f" ({', '.join(words)})" if words else "")


def _runs(row: Row) -> str:
    missing = len(row.failed) + len(row.pruned) + len(row.interrupted)
    return f"{len(row.done)}" + (f" of {len(row.done) + missing}" if missing else "")


def _published(row: Row) -> str:
    if row.against is None:
        return NONE
    half = "" if row.against.half is None else f" ± {row.against.half:.2f}"
    return f"{row.against.published.number:.2f} ({_signed(row.against.difference)}{half})"


def _verdict(row: Row) -> str:
    if row.against is None:
        return NONE
    word, p = row.against.word, row.against.adjusted
    if word in (None, "consistent", "cannot tell") or p is None:
        return word or "not judged"
    return f"{word} " + ("p<.001" if p < 0.001 else f"p={p:.2g}".replace("0.", ".", 1))


def cost_entry(row: Row) -> Published | None:
    """The published entry whose seconds and memory are of such runs as the row's: images by number and size, network.

    How the images were compressed does not matter to a cost, nor does the number of epochs.
    """
    other = any(not text.startswith(("epochs=", "val=")) for text in _overrides(row))
    return None if other or _limit(row) is not None else _entry(row)


def _entry(row: Row, variant: str = "") -> Published | None:
    return find_published(row.fields.get("dataset", ""), variant or row.variant, row.depth)


def _quote(row: Row, variant: str = "") -> str:
    entry = _entry(row, variant)
    return NONE if entry is None else f"{entry.number:.2f}{' (top-5)' if entry.error is None else ''}"


def epoch_seconds_ratio(row: Row) -> float | None:
    """Published seconds over ours."""
    seconds = getattr(cost_entry(row), "epoch_seconds", None)
    return seconds / row.epoch_seconds if seconds and row.epoch_seconds else None


def _published_seconds(row: Row) -> str:
    seconds, ratio = getattr(cost_entry(row), "epoch_seconds", None), epoch_seconds_ratio(row)
    return (f"{seconds:g} s" if seconds else NONE) + (f" ({figures(ratio)}×)" if ratio else "")


def _published_memory(row: Row) -> Any:
    return getattr(cost_entry(row), "memory_mib", None)


DERIVED: dict[str, tuple[Column, ...]] = {
    "parameters": (
        Column("n", "n", _runs, "runs that are done, one a seed", lambda r: len(r.done)),
    ),
    "best_error": (
        Column("best_minus_last", "best − last", lambda r: _signed(r.best_minus_last),
               "in points: what choosing the epoch on the evaluated images takes off", lambda r: r.best_minus_last),
    ),
    "test_error": (
        Column("published", "published", _published, "the published error; in brackets ours minus it, in points, with the "
               "interval of 90 % for one more run of ours", lambda r: getattr(r.against, "difference", None)),
        Column("verdict", "verdict", _verdict, f"could the published number be one more run of ours? better, worse: no, by "
               f"Holm's p over the rows, below {VERDICT_ALPHA:g}; consistent: the interval holds 0 and is at most ±{MAX_HALF_WIDTH:g}; cannot tell: "
               "neither", lambda r: getattr(r.against, "adjusted", None), right=False),
    ),
    "accuracy": (
        Column("published_error", "published %", _quote, "as printed by the source, whatever the images here",
               lambda r: getattr(_entry(r), "number", None), hidden=True),
        Column("paper_error", "paper %", lambda r: _quote(r, "he2015"), "of the same depth in arXiv:1512.03385",
               lambda r: getattr(_entry(r, "he2015"), "number", None), hidden=True),
    ),
    "epoch_seconds": (
        Column("published_epoch_seconds", "published s", _published_seconds,
               "published s/epoch, on the hardware named below (and how many times as long as ours)", epoch_seconds_ratio),
        Column("predicted_epoch_seconds", "predicted", lambda r: figures(getattr(r.predicted, "epoch_seconds", None)),
               "s/epoch as a probe of some steps predicted it before", lambda r: getattr(r.predicted, "epoch_seconds", None)),
    ),
    "nvml_process_mib": (
        Column("published_memory_mib", "published MiB", lambda r: f"{mib:,g} MiB" if (mib := _published_memory(r)) else NONE,
               "published memory, on the same hardware", _published_memory),
    ),
}  # fmt: skip
"""Columns that follow a metric's."""
SPARE = (
    "mfu", "best_minus_last", "data_stall_percent", "images_per_second", "energy_joules", "parameters", "torch_allocated_mib",
    "published_memory_mib", "predicted_epoch_seconds", "published_epoch_seconds", "best_error", "torch_reserved_mib",
    "top5_error", "published", "verdict",
)  # fmt: skip
"""What a terminal that is too narrow goes without, in this order."""


def make_columns() -> list[Column]:
    """All columns, in their order: what a row is, its errors, its costs."""
    columns = list(DESCRIPTORS)
    for name, metric in METRICS.items():
        columns += [_metric_column(metric), *DERIVED.get(name, ())]
    return columns


def _metric_column(metric: Metric) -> Column:
    def text(row: Row) -> str:
        return metric.summary(row.figures.get(metric.name, UNKNOWN))

    def key(row: Row) -> float | None:
        return row.figures.get(metric.name, UNKNOWN).value

    own = {"error": _error, "epoch_seconds": _seconds}.get(metric.name, text)
    return Column(metric.name, metric.title, own, metric.means, key, hidden=not metric.in_table)


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
    keyed = [(column.sort_key(row), row) for row in rows]
    having: list[tuple[Any, Row]] = [(key, row) for key, row in keyed if key is not None and key == key]  # not NaN
    having.sort(key=itemgetter(0), reverse=by.startswith("-"))
    lacking = [row for key, row in keyed if key is None or key != key]
    return [*(row for _, row in having), *lacking]
