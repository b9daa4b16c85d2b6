"""Two sets of stored runs: better, worse or the same. What `harness compare` does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.commands.report import load_runs, make_rows, print_text
from harness.plan import check_word
from harness.spec import UserError

if TYPE_CHECKING:
    from rich.console import Console

COMPARISON_FORMATS = ("table", "markdown", "json")


def print_comparison(
    paths: Sequence[Path],
    console: Console,
    *,
    by: str | None = None,
    fail_on: str | None = None,
    format: str = "table",
    across: Sequence[str] = (),
) -> int:
    """Print two folders side by side, or the runs of one by a field. Returns the exit code: 1 where `fail_on` is met.

    Raises UserError for a condition, field or format that cannot be read, and where there is nothing to compare.
    """
    from harness.results.compare import compare, compare_by, parse_fail_on, render_comparison, violations

    check_word(format, COMPARISON_FORMATS, "--format")
    try:
        conditions = parse_fail_on(fail_on) if fail_on is not None else ()
    except ValueError as error:
        raise UserError(f"--fail-on: {error}") from None
    metrics = [condition.metric for condition in conditions]
    if by is None and len(paths) != 2:
        raise UserError(
            f"compare takes two folders, or --by FIELD: {len(paths)} folder{'s' * (len(paths) != 1)} given"
        )
    if by is None:
        a, b = (make_rows(load_runs([path]), across) for path in paths)
        for path, rows in zip(paths, (a, b), strict=True):
            if not any(row.done for row in rows):
                raise UserError(f"no finished run in {str(path)!r}")
        pairs = compare(a, b, metrics)
    else:
        rows = make_rows(load_runs(paths), across)
        if not any(row.done for row in rows):
            raise UserError(f"no finished run in {', '.join(repr(str(path)) for path in paths)}")
        try:
            pairs = compare_by(rows, by, metrics)
        except ValueError as error:
            raise UserError(f"--by: {error}") from None
    if not pairs and not conditions:
        hint = (
            "rows that differ in nothing but --by"
            if by
            else "a row of A and one of B that agree in all but the folder"
        )
        raise UserError(f"nothing to compare: no {hint}; --across FIELD overlooks a difference")
    colour = console.is_terminal and not console.no_color
    print_text(render_comparison(pairs, format, width=console.width, colour=colour), console)
    failed = violations(pairs, conditions)
    for line in failed:
        print(f"harness: --fail-on: {line}", file=sys.stderr)
    return 1 if failed else 0
