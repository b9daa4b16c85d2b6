"""The commands from Python: options by the command line's names, as values or in its words; results as DataFrames."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from harness.options import (
    Grid,
    ReportOptions,
    RunOptions,
    Search,
    TuneOptions,
    default_out,
    fill,
    options_of,
    read_values,
)
from harness.spec import UserError as UserError

if TYPE_CHECKING:
    import pandas

Function = TypeVar("Function", bound=Callable[..., Any])


def load(*paths: str | Path, epochs: bool = False) -> pandas.DataFrame:
    """Read stored runs (default: HARNESS_OUT, or the folder runs) as a DataFrame with a line per run, or per epoch of each.

    Errors are in percent; the names of the columns hold the units. Folders that cannot be read are named on standard
    error and left out. Raises UserError for a path that is not a folder.
    """
    from harness.commands.report import find_results, load_runs
    from harness.results.frame import make_frame

    loaded = load_runs(find_results([str(path) for path in paths or (default_out(),)]))
    return make_frame(loaded.records, epochs=epochs)


def _options(*groups: type) -> Callable[[Function], Function]:
    """The function's options are those of these dataclasses: what `help` and notebooks show."""

    def sign(function: Function) -> Function:
        parameters = [p for p in signature(function).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        for name, option in options_of(*groups).items():
            parameters.append(
                Parameter(name, Parameter.KEYWORD_ONLY, default=option.default, annotation=option.kind)
            )
        function.__signature__ = Signature(parameters, return_annotation="pandas.DataFrame")  # type: ignore[attr-defined]
        return function

    return sign


@_options(Grid, RunOptions)
def run(file: str | Path | None = None, /, **options: Any) -> pandas.DataFrame:
    """`harness run`: train what is missing of a grid, print progress and table. Returns `load` of the folder `out`.

    Options win over those of the grid file, if one is given. A run that failed is a line with its `failure`. Raises UserError for what the command line refuses.
    """
    from harness.commands.run import run_command

    _, how = run_command(read_values(options, Grid, RunOptions), None if file is None else Path(file), Console())
    return load(how.out)


@_options(Search, TuneOptions)
def tune(**options: Any) -> pandas.DataFrame:
    """`harness tune`: search for the best recipe, print the trials. Returns `load` of the folder `out`, trials included.

    Raises UserError for what the command line refuses.
    """
    from harness.commands.tune import tune as run_search

    given = read_values(options, Search, TuneOptions)
    run_search(given, Console())
    return load(fill(TuneOptions, given).out)


@_options(ReportOptions)
def report(*paths: str | Path, **options: Any) -> pandas.DataFrame:
    """`harness report`: a line per row of the comparison table, with the columns of its CSV.

    With `output` the table is written there too, with `curves` the charts. Raises UserError.
    """
    from harness.commands.report import find_results, print_report
    from harness.results.frame import read_table

    how = fill(ReportOptions, read_values(options, ReportOptions))
    folders = find_results([str(path) for path in paths or (default_out(),)])
    if how.output is not None or how.curves is not None:
        print_report(folders, Console(), how)
    text = io.StringIO()
    print_report(folders, Console(file=text), replace(how, format="csv", output=None, curves=None))
    return read_table(io.StringIO(text.getvalue()))
