"""The commands from Python: options by the command line's names, as values or in its words; results as DataFrames."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_origin

from harness.options import Grid, ReportOptions, RunOptions, Search, TuneOptions, fill, options_of
from harness.spec import UserError, check_word

if TYPE_CHECKING:
    import pandas

Function = TypeVar("Function", bound=Callable[..., Any])


def load(*paths: str | Path, epochs: bool = False) -> pandas.DataFrame:
    """Read stored runs (default: the folder runs) as a DataFrame with a line per run, or a line per epoch of each run.

    Errors are in percent; the names of the columns hold the units. Folders that cannot be read are named on standard
    error and left out. Raises UserError for a path that is not a folder.
    """
    from harness.commands.report import find_results, load_runs
    from harness.results.frame import make_frame

    loaded = load_runs(find_results([str(path) for path in paths or ("runs",)]))
    return make_frame(loaded.records, epochs=epochs)


def _options(*groups: type) -> Callable[[Function], Function]:
    """The function's options are those of these dataclasses: what `help` and notebooks show."""

    def sign(function: Function) -> Function:
        own = [p for p in signature(function).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        options = options_of(*groups)
        named = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=option.default, annotation=option.kind)
            for name, option in options.items()
        ]
        function.__signature__ = Signature([*own, *named], return_annotation="pandas.DataFrame")  # type: ignore[attr-defined]
        return function

    return sign


@_options(Grid, RunOptions)
def run(**options: Any) -> pandas.DataFrame:
    """`harness run`: train what is missing of a grid, print progress and table. Returns `load` of the folder `out`.

    A run that failed is a line with its `failure`. Raises UserError for what the command line refuses.
    """
    from rich.console import Console

    from harness.commands.run import run_grid
    from harness.plan import make_grid

    given = _read(options, Grid, RunOptions)
    how = fill(RunOptions, given)
    run_grid(make_grid(given), how, Console())
    return load(how.out)


@_options(Search, TuneOptions)
def tune(**options: Any) -> pandas.DataFrame:
    """`harness tune`: search for the best recipe, print the trials. Returns `load` of the folder `out`, trials included.

    Raises UserError for what the command line refuses.
    """
    from rich.console import Console

    from harness.commands.tune import tune as run_search

    given = _read(options, Search, TuneOptions)
    run_search(given, Console())
    return load(fill(TuneOptions, given).out)


@_options(ReportOptions)
def report(*paths: str | Path, **options: Any) -> pandas.DataFrame:
    """`harness report`: a line per row of the comparison table, with the columns of its CSV.

    With `output` the table is written there too, with `curves` the charts. Raises UserError.
    """
    from rich.console import Console

    from harness.commands.report import find_results, print_report
    from harness.results.frame import read_table

    how = fill(ReportOptions, _read(options, ReportOptions))
    folders = find_results([str(path) for path in paths or ("runs",)])
    if how.output is not None or how.curves is not None:
        print_report(folders, Console(), how)
    text = io.StringIO()
    print_report(folders, Console(file=text), replace(how, format="csv", output=None, curves=None))
    return read_table(io.StringIO(text.getvalue()))


def _read(options: Mapping[str, Any], *groups: type) -> dict[str, Any]:
    """Options by name, of the types that their fields have, or in words that `fill` reads. Raises UserError."""
    from pydantic import TypeAdapter, ValidationError

    known = options_of(*groups)
    given = {}
    for name, value in options.items():
        check_word(name, known, "option")
        option = known[name]
        if option.repeatable:
            if isinstance(value, Mapping) and get_origin(option.kind) is tuple:
                value = [f"{field}={words}" for field, words in value.items()]
            elif not isinstance(value, Mapping):
                value = [value] if isinstance(value, str | Path) else list(value)
        elif get_origin(option.kind) is tuple and isinstance(value, str | int):
            value = str(value)  # depths=20, seeds=3, variants="msra,he2015"
        elif option.kind is str and isinstance(value, Path):
            value = str(value)
        elif not (option.parse and isinstance(value, str)):
            try:
                value = TypeAdapter(option.kind).validate_python(value)
            except ValidationError as error:
                raise UserError(f"{name} {value!r}: {error.errors()[0]['msg']}") from None
        if value is not None:
            given[name] = value
    if "plugin" in known:
        from harness.plugins import load_plugins

        load_plugins(given.get("plugin", ()))
    return given
