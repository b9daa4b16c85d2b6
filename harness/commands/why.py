"""What is behind a row's figures: what `harness why` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.commands.report import load_runs, make_rows, print_text
from harness.plan import check_word
from harness.spec import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from harness.results.rows import Row


def print_why(row: str, path: Path, console: Console) -> None:
    """Print the records, epochs and formulas behind every row of that name (msra-20), or the row of that number."""
    from harness.results.explain import why

    rows = make_rows(load_runs([path]))
    print_text("\n".join(why(match) for match in _find_rows(rows, row, path)), console)


def _find_rows(rows: Sequence[Row], wanted: str, path: Path) -> list[Row]:
    if wanted.isdecimal():
        if 1 <= int(wanted) <= len(rows):
            return [rows[int(wanted) - 1]]
        raise UserError(
            f"row {wanted}: {str(path)!r} has rows 1 to {len(rows)}" if rows else f"no runs in {str(path)!r}"
        )
    matches = [row for row in rows if row.name == wanted]
    if not matches:
        check_word(wanted, sorted({row.name for row in rows}), "row")
    return matches
