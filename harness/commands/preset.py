"""A source's own table: which rows it has, what it publishes that nothing was trained for, and whether ours pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from harness.models.presets import Preset, find_preset
from harness.results.metrics import figures
from harness.results.published import Published, find_published
from harness.results.rows import Row
from harness.results.store import load_epochs
from harness.spec import UserError


@dataclass(frozen=True, slots=True)
class PresetTable:
    rows: list[Row]
    columns: tuple[str, ...]
    below: list[str]  # lines
    met: bool  # whether every finished row is as accurate as the source demands


def make_preset_table(name: str, rows: Sequence[Row]) -> PresetTable:
    """The table of a preset out of all rows. Raises UserError for an unknown preset."""
    try:
        preset = find_preset(name)
    except ValueError as error:
        raise UserError(f"--preset: {error}") from None
    mine = select_rows(rows, preset)
    return PresetTable(mine, tuple(preset.columns), *judge_rows(mine, preset))


def select_rows(rows: Sequence[Row], preset: Preset) -> list[Row]:
    """The rows of the preset's variants on its data set, in the order of its table; other depths follow its own."""
    own = preset.select()
    names = [name for name, _ in own]
    mine = [row for row in rows if row.variant in names and row.fields.get("dataset") == preset.dataset]

    def place(row: Row) -> tuple[int, int]:
        return (own.index(key) if (key := (row.variant, row.depth)) in own else len(own), names.index(row.variant))

    return sorted(mine, key=place)


def judge_rows(rows: Sequence[Row], preset: Preset) -> tuple[list[str], bool]:
    """What is said below the table, and whether every finished row is as accurate as the source demands."""
    ran = {(row.variant, row.depth) for row in rows}
    lines = [
        f"not run yet: {name}-{depth}, published {_cite(entry)}"
        for name, depth in preset.select()
        if (name, depth) not in ran and (entry := find_published(preset.dataset, name, depth))
    ]
    passed = True
    for row in rows:
        if preset.least_accuracy is None or row.error is None:
            continue
        accuracy = 100 - row.error.mean
        met = accuracy > preset.least_accuracy
        passed &= met
        published = find_published(preset.dataset, row.variant, row.depth)
        beside = f"; published {100 - published.number:.2f} %" if published else ""
        lines += [*_progress(row, published)]
        lines.append(
            f"{'PASS' if met else 'FAIL'}: {row.name} on {row.dataset} is {accuracy:.2f} % accurate after "
            f"{row.duration}, above {preset.least_accuracy:g} % is demanded{beside}"
        )
    return lines, passed


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
