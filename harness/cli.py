"""The `harness` command: parse, call, print, exit code. Imports nothing heavy. Options: `harness.options`."""

from __future__ import annotations

import errno
import io
import sys
from collections.abc import Callable, Mapping
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import typer

from harness import options as groups
from harness.options import Option, default_out, fill, load_named, options_of
from harness.spec import INSTALL, UserError

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    name="harness",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
OTHER_WORDS = {
    "list": "variants", "ls": "report", "show": "report", "results": "report", "plot": "report", "train": "run",
    "benchmark": "run", "bench": "run", "sweep": "tune", "search": "tune", "evaluate": "eval", "test": "eval",
    "doctor": "check", "explain": "why", "reproduce": "repro", "diff": "compare", "help": "--help", "version": "--version",
}  # fmt: skip
"""What people type -> the command."""


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Train every depth and variant of a family of residual networks, and compare what was measured."""
    if version:
        from importlib.metadata import version as installed

        print(f"resnet-harness {installed('resnet-harness')}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def make_console() -> Console:
    """Where tables go."""
    from rich.console import Console

    return Console()


Results = Annotated[list[str] | None, typer.Argument(help="Folders of results or of single runs, s3:// or gs://.")]
Given = Mapping[str, Any]  # the options that stood on the command line


def command(*kinds: type, name: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A command with the options of some dataclasses, beside the parameters of its function, which gets as `given` those
    that stood on the command line. It returns the exit code; None: 0."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        own = [p for p in signature(function, eval_str=True).parameters.values() if p.name != "given"]
        options = options_of(*kinds)

        def call(**words: Any) -> None:
            given = {name: word for name in options if (word := words.pop(name)) not in (None, [], ())}
            if "plugin" in options:
                load_named(given)
            raise typer.Exit(function(*[given] * bool(kinds), **words) or 0)

        derived = [_make_parameter(name, option) for name, option in options.items()]
        call.__signature__ = Signature([*own, *derived])  # type: ignore[attr-defined]
        call.__doc__ = function.__doc__
        app.command(name or function.__name__)(call)
        return function

    return register


def _make_parameter(name: str, option: Option) -> Parameter:
    """What typer reads. Without the default, so that an option that is not given is None."""
    kinds = () if get_origin(option.kind) is tuple else (option.kind, *get_args(option.kind))
    kind = next((kind for kind in (bool, int, float, Path) if kind in kinds), str)
    shown = isinstance(option.default, str | int | Path) and kind is not bool
    notes = [f"env var: {option.variable}"] * bool(option.variable) + [f"default: {option.default}"] * shown
    help = option.help + f"  [{'; '.join(notes)}]" * bool(notes)
    declared = typer.Option(*option.names, help=help, metavar="<str>" if option.repeatable else None)
    return Parameter(
        name, Parameter.KEYWORD_ONLY, default=Parameter.empty if option.required else None,
        annotation=Annotated[list[str] if option.repeatable else kind, declared],
    )  # fmt: skip


# --- training ---


@command(groups.Grid, groups.RunOptions)
def run(
    given: Given,
    file: Annotated[
        Path | None, typer.Argument(help="A grid file (TOML); options of the command line win.")
    ] = None,
) -> int:
    """Train what is missing of a grid of runs, and print the table."""
    from harness.commands.run import run_command

    return run_command(given, file, make_console())[0]


@command(groups.Search, groups.TuneOptions)
def tune(given: Given) -> int:
    """Search for the best recipe; poor trials stop early."""
    from harness.commands.tune import tune as run_search

    return run_search(given, make_console())


# --- stored runs ---


@command(groups.ReportOptions)
def report(given: Given, paths: Results = None) -> int:
    """Print the comparison table of stored runs."""
    from harness.commands.report import find_results, print_report

    options = fill(groups.ReportOptions, given)
    return 0 if print_report(find_results(paths or [default_out()]), make_console(), options).rows else 2


@command(groups.CompareOptions)
def compare(
    given: Given,
    paths: Annotated[list[str], typer.Argument(help="Two folders of results, A and B; or one, with --by.")],
) -> int:
    """Compare two sets of runs: better, worse or the same?"""
    from harness.commands.report import find_results, print_comparison

    return print_comparison(find_results(paths), make_console(), fill(groups.CompareOptions, given))


@command()
def verify(paths: Results = None) -> int:
    """Check stored runs for contradictions and changed files."""
    from harness.commands.report import print_findings

    return print_findings(paths or [default_out()])


@command()
def why(
    row: Annotated[str, typer.Argument(help="A row of `harness report PATH`: msra-20, or its number.")],
    path: Annotated[str, typer.Argument(help="Folder of results.", envvar="HARNESS_OUT")] = "runs",
) -> None:
    """Print what is behind a row's figures."""
    from harness.commands.report import find_results, print_why

    print_why(row, find_results([path])[0], make_console())


@command()
def export(
    paths: Results = None,
    to: Annotated[
        str,
        typer.Option(help="tensorboard (event files in the runs' folders), mlflow or wandb (by their variables)."),
    ] = "tensorboard",
) -> None:
    """Export stored runs to TensorBoard, MLflow or W&B."""
    from harness.commands.report import export_results

    exported = export_results(paths or [default_out()], to)
    print(f"{exported} run{'s' * (exported != 1)} exported to {to}; those it had already were left alone")


@command()
def repro(
    run: Annotated[str, typer.Argument(help="A run's folder, or its name or key in PATH.")],
    path: Annotated[str, typer.Argument(help="Folder of results.", envvar="HARNESS_OUT")] = "runs",
) -> None:
    """Print the commands that train a stored run again."""
    from harness.commands.report import print_repro

    print_repro(run, path, make_console())


@command()
def variants(
    plugin: Annotated[
        list[Path] | None, typer.Option(help="With those of this file. Repeatable.", metavar="<str>")
    ] = None,
) -> None:
    """List the variants: what they are and where they come from."""
    from harness.commands.report import print_variants
    from harness.plugins import load_plugins

    load_plugins(plugin or ())
    print_variants(make_console())


@command(groups.EvalOptions, name="eval")
def evaluate(given: Given) -> None:
    """Print the errors of stored weights on a test set."""
    from harness.commands.evaluate import evaluate_weights
    from harness.commands.report import print_text

    print_text(evaluate_weights(fill(groups.EvalOptions, given)).text, make_console())


@command(groups.CheckOptions)
def check(
    given: Given,
    plugins: Annotated[list[Path] | None, typer.Argument(help="Files of plug-ins to check instead.")] = None,
) -> int:
    """Say what this machine lacks, and measure whether it trains rightly; or whether plug-ins do."""
    from harness.commands.check import print_findings

    if plugins:
        from harness.commands.check_plugins import check_plugins

        return check_plugins(plugins, make_console())
    return print_findings(fill(groups.CheckOptions, given), make_console())


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2, a bug shows its traceback."""
    # typer brings its own copy of click or uses click itself, depending on its version: the class's name is the same
    usage_error: type[Exception] = next(
        cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException"
    )
    for stream in (sys.stdout, sys.stderr):  # ASCII, say: a sign that it lacks is shown as "?"
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    message, code = "", 2
    try:
        code = app(standalone_mode=False, prog_name="harness") or 0
    except UserError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("harness"):
            raise
        message = f"{error.name} is not installed: {INSTALL}"
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        code = 1
        message = f"{error.filename or 'a file'}: {error.strerror}; the same command goes on once there is room"
    except usage_error as error:
        message = _explain(error)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if message:
        from harness.results.remote import redact

        shown = "".join(sign if sign.isprintable() else "?" for sign in " ".join(redact(message).split()))
        print(f"harness: error: {shown}", file=sys.stderr)
    sys.exit(code)


def _explain(error: Any) -> str:
    """A usage error, with what is allowed."""
    message, parameter = str(error.format_message()), getattr(error, "param", None)
    if word := message.partition("No such command '")[2].partition("'")[0]:
        known = ", ".join(each.name for each in app.registered_commands if each.name)
        hint = f" Did you mean {OTHER_WORDS[word]!r}?" if word in OTHER_WORDS else f" Known are {known}."
        return message if "Did you mean" in message else message + hint
    if parameter and hasattr(error.__cause__, "errors"):  # typer's own message does not have the value
        (fault,) = error.__cause__.errors()
        allowed = "a whole number" if fault["type"].startswith("int") else "a number"
        return f"{parameter.opts[0]} {fault['input']!r}: {allowed} is allowed"
    if help := getattr(parameter, "help", None):
        return f"{message.removesuffix('.')}: {help}"
    told = error.ctx is None or "ossible options" in message
    return message if told else f"{message.removesuffix('.')}: see `{error.ctx.command_path} --help`"


if __name__ == "__main__":
    main()
