"""A source's own table: which rows it has, what it publishes that nothing was trained for, and whether ours pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import NamedTuple

from harness.models.variants import find_preset
from harness.results.metrics import figures
from harness.results.published import Published, find_published
from harness.results.rows import Row
from harness.results.store import load_epochs
from harness.spec import UserError


class PresetTable(NamedTuple):
    rows: list[Row]
    columns: tuple[str, ...]
    below: list[str]  # lines
    met: bool  # whether every finished row is as accurate as the source demands


def make_preset_table(name: str, rows: Sequence[Row]) -> PresetTable:
    """A source's table out of all rows: those of its variants on its data set, in its order; other depths follow its own.

    Raises UserError for an unknown preset.
    """
    try:
        preset = find_preset(name)
    except ValueError as error:
        raise UserError(f"--preset: {error}") from None
    own = list(preset.select())
    names = [variant for variant, _ in own]

    def place(row: Row) -> tuple[int, int]:
        return (own.index(key) if (key := (row.variant, row.depth)) in own else len(own), names.index(row.variant))

    mine = [row for row in rows if row.variant in names and row.fields.get("dataset") == preset.dataset]
    mine.sort(key=place)
    ran = {(row.variant, row.depth) for row in mine}
    lines, passed = [], True
    for variant, depth in own:
        if (variant, depth) not in ran and (entry := find_published(preset.dataset, variant, depth)):
            lines.append(f"not run yet: {variant}-{depth}, published {_cite(entry)}")
    for row in mine:
        if preset.least_accuracy is None or row.error is None:
            continue
        accuracy = 100 - row.error
        met = accuracy > preset.least_accuracy
        passed &= met
        published = find_published(preset.dataset, row.variant, row.depth)
        beside = f"; published {100 - published.number:.2f} %" if published else ""
        lines += _progress(row, published)
        lines.append(
            f"{'PASS' if met else 'FAIL'}: {row.name} on {row.dataset} is {accuracy:.2f} % accurate after "
            f"{row.duration}, above {preset.least_accuracy:g} % is demanded{beside}"
        )
    return PresetTable(mine, tuple(preset.columns), lines, passed)


def _cite(entry: Published) -> str:
    costs = ((entry.epoch_seconds, "s/epoch"), (entry.memory_mib, "MiB"))
    words = [f"{figures(value)} {unit}" for value, unit in costs if value is not None]
    return ", ".join([f"{entry.number:.2f} %{' top-5' if entry.error is None else ''}", *words])


def _progress(row: Row, published: Published | None) -> Iterator[str]:
    """Accuracy by epoch, a mean over the runs, beside the published one."""
    theirs = published.progress if published else ()
    runs = [[100 - epoch.error for epoch in load_epochs(stored.folder)] for stored in row.done]
    means = [fmean(column) for column in zip(*runs, strict=True)]
    yield "accuracy % by epoch: " + ", ".join(f"{value:.2f}" for value in means)
    if theirs:
        yield "          published: " + ", ".join(f"{100 - value:.2f}" for value in theirs)
