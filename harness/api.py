"""The commands from Python: options by the command line's names, as values or in its words; results as DataFrames."""

from __future__ import annotations

import io
from dataclasses import replace
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from harness import options as groups
from harness.commands.report import find_results, load_runs, print_report
from harness.options import default_out, fill, options_of, read_values
from harness.results.frame import make_frame, read_table
from harness.spec import UserError as UserError

if TYPE_CHECKING:
    import pandas


def load(*paths: str | Path, epochs: bool = False) -> pandas.DataFrame:
    """Read stored runs (default: HARNESS_OUT, or the folder runs) as a DataFrame with a line per run, or per epoch of each.

    Errors are in percent; the names of the columns hold the units. Folders that cannot be read are named on standard
    error and left out. Raises UserError for a path that is not a folder.
    """
    loaded = load_runs(find_results([str(path) for path in paths or (default_out(),)]))
    return make_frame(loaded.records, epochs=epochs)


def run(file: str | Path | None = None, /, **options: Any) -> pandas.DataFrame:
    """`harness run`: train what is missing of a grid, print progress and table. Returns `load` of the folder `out`.

    Options win over those of the grid file, if one is given. A run that failed is a line with its `failure`. Raises UserError for what the command line refuses.
    """
    from harness.commands.run import run_command

    given = read_values(options, groups.Grid, groups.RunOptions)
    _, how = run_command(given, None if file is None else Path(file), Console())
    return _load_made(how.out)


def tune(**options: Any) -> pandas.DataFrame:
    """`harness tune`: search for the best recipe, print the trials. Returns `load` of the folder `out`, trials included.

    Raises UserError for what the command line refuses.
    """
    from harness.commands.tune import tune as run_search

    given = read_values(options, groups.Search, groups.TuneOptions)
    run_search(given, Console())
    return _load_made(fill(groups.TuneOptions, given).out)


def report(*paths: str | Path, **options: Any) -> pandas.DataFrame:
    """`harness report`: a line per row of the comparison table, with the columns of its CSV.

    With `output` the table is written there too, with `curves` the charts. Raises UserError.
    """
    how = fill(groups.ReportOptions, read_values(options, groups.ReportOptions))
    folders = find_results([str(path) for path in paths or (default_out(),)])
    if how.output is not None or how.curves is not None:
        print_report(folders, Console(), how)
    text = io.StringIO()
    print_report(folders, Console(file=text), replace(how, format="csv", output=None, curves=None))
    return read_table(io.StringIO(text.getvalue()))


def _load_made(out: str) -> pandas.DataFrame:
    """All runs of the folder; none, where a plan was printed and there is no folder."""
    return make_frame(load_runs([folder for folder in find_results([out]) if folder.exists()]).records)


def _sign(function: Any, *kinds: type) -> None:
    """The function's options are those of these dataclasses: what `help` and notebooks show."""
    parameters = [p for p in signature(function).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    for name, option in options_of(*kinds).items():
        parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, default=option.default, annotation=option.kind))
    function.__signature__ = Signature(parameters, return_annotation="pandas.DataFrame")


_sign(run, groups.Grid, groups.RunOptions)
_sign(tune, groups.Search, groups.TuneOptions)
_sign(report, groups.ReportOptions)
