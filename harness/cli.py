"""The `harness` command: parse, call, print, exit code. Imports nothing heavy. Options: `harness.options`."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from harness import options as groups
from harness.cluster.connect import ClusterError
from harness.deadline import TimeUp, stopping_on_sigterm
from harness.options import KINDS, Option, default_out, fill, load_named, options_of
from harness.spec import FULL, INSTALL, UserError

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
Version = Annotated[bool, typer.Option("--version", help="Print the version.")]


@app.callback(invoke_without_command=True)
def start(context: typer.Context, version: Version = False) -> None:
    """Train every depth and variant of a family of residual networks, and compare what was measured."""
    if version:
        from importlib.metadata import version as installed

        print(f"resnet-harness {installed('resnet-harness')}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


Given = Mapping[str, Any]  # the options that stood on the command line


def command(module: str, *kinds: type, name: str | None = None) -> Callable[[Callable[..., Any]], None]:
    """A command with the options of some dataclasses, beside the parameters that its function has after these three: the
    module of `harness.commands` that does it, a console, and the options: a dataclass, or what was given of several. It
    returns the exit code; None: 0."""

    def register(function: Callable[..., Any]) -> None:
        options, own = options_of(*kinds), list(signature(function, eval_str=True).parameters.values())

        def call(**words: Any) -> None:
            from rich.console import Console

            given = {name: word for name in options if (word := words.pop(name)) not in (None, [], ())}
            if "plugin" in options:
                load_named(given)
            chosen = [fill(kinds[0], given) if len(kinds) == 1 else given] * bool(kinds)
            commands = import_module(f"harness.commands.{module}")
            raise typer.Exit(function(commands, Console(), *chosen, **words) or 0)

        derived = [_make_parameter(name, option) for name, option in options.items()]
        parameters = [*own[2 + bool(kinds) :], *derived]
        call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        call.__doc__ = function.__doc__
        app.command(name or function.__name__)(call)

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


# --- words beside the options ---

GridFile = Annotated[Path | None, typer.Argument(help="A grid file (TOML); command-line options override it.")]
Results = Annotated[list[str] | None, typer.Argument(help="Folders of results or of single runs, s3:// or gs://.")]
Sides = Annotated[list[str], typer.Argument(help="Two folders of results, A and B; or one, with --by.")]
Row = Annotated[str, typer.Argument(help="A row of `harness report PATH`, by name (msra-20) or number.")]
Run = Annotated[str, typer.Argument(help="A run's folder, or its name or key in PATH.")]
Folder = Annotated[str, typer.Argument(help="Folder of results.", envvar="HARNESS_OUT")]
Target = Annotated[
    str, typer.Option(help="tensorboard (event files in the runs' folders), mlflow or wandb (by their env vars).")
]
Plugin = Annotated[list[Path] | None, typer.Option(help="Add those of this file. Repeatable.", metavar="<str>")]
Plugins = Annotated[list[Path] | None, typer.Argument(help="Plug-in files to check instead of this machine.")]


# --- training ---


@command("run", groups.Grid, groups.RunOptions)
def run(commands: Any, console: Any, given: Given, file: GridFile = None) -> Any:
    """Train the missing runs of a grid, and print the table."""
    return commands.run_command(given, file, console)[0]


@command("tune", groups.Search, groups.TuneOptions)
def tune(commands: Any, console: Any, given: Given) -> Any:
    """Search for the best recipe; poor trials stop early."""
    return commands.tune(given, console)


# --- stored runs ---


@command("report", groups.ReportOptions)
def report(commands: Any, console: Any, options: groups.ReportOptions, paths: Results = None) -> Any:
    """Print the comparison table of stored runs."""
    folders = commands.find_results(paths or [default_out()])
    with commands.collector_paused():  # until the runs are gone again: it would look through all of them
        return 0 if commands.print_report(folders, console, options).rows else 2


@command("report", groups.CompareOptions)
def compare(commands: Any, console: Any, options: groups.CompareOptions, paths: Sides) -> Any:
    """Compare two sets of runs: equivalent or different?"""
    return commands.print_comparison(commands.find_results(paths), console, options)


@command("report")
def verify(commands: Any, console: Any, paths: Results = None) -> Any:
    """Check stored runs for contradictions and changed files."""
    return commands.print_findings(paths or [default_out()])


@command("report")
def why(commands: Any, console: Any, row: Row, path: Folder = "runs") -> Any:
    """Print what is behind a row's figures."""
    return commands.print_why(row, commands.find_results([path])[0], console)


@command("report")
def export(commands: Any, console: Any, paths: Results = None, to: Target = "tensorboard") -> None:
    """Export stored runs to TensorBoard, MLflow or W&B."""
    exported = commands.export_results(paths or [default_out()], to)
    print(f"{exported} run{'s' * (exported != 1)} exported to {to}; runs that it already had were skipped")


@command("report")
def repro(commands: Any, console: Any, run: Run, path: Folder = "runs") -> Any:
    """Print the commands that train a stored run again."""
    return commands.print_repro(run, path, console)


@command("report")
def variants(commands: Any, console: Any, plugin: Plugin = None) -> Any:
    """List the variants: what they are and where they come from."""
    load_named({"plugin": plugin})
    return commands.print_variants(console)


@command("evaluate", groups.EvalOptions, name="eval")
def evaluate(commands: Any, console: Any, options: groups.EvalOptions) -> None:
    """Print the errors of stored weights on a test set."""
    print(commands.evaluate_weights(options).text.removesuffix("\n"))


@command("check", groups.CheckOptions)
def check(commands: Any, console: Any, options: groups.CheckOptions, plugins: Plugins = None) -> Any:
    """Report what this machine lacks, and test whether it, or a plug-in, trains correctly."""
    if plugins:
        return commands.check_plugins(plugins, console, options.data_dir)
    return commands.print_findings(options, console)


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2, a bug shows its traceback."""
    # typer brings its own copy of click or uses click itself, depending on its version: the class's name is the same
    usage_error: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
    for stream in (sys.stdout, sys.stderr):  # ASCII, say: a sign that it lacks is shown as "?"
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    warnings.formatwarning = lambda message, *_, **__: f"harness: warning: {message}\n"  # no line of our code
    message, code = "", 2
    try:
        with stopping_on_sigterm():
            code = app(standalone_mode=False, prog_name="harness") or 0
    except UserError as error:
        message = str(error)
    except ClusterError as error:
        message, code = str(error), 1
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("harness"):
            raise
        message = f"{error.name} is not installed: {INSTALL}"
    except OSError as error:
        if error.errno not in FULL:
            raise
        code = 1
        message = f"{error.filename or 'a file'}: {error.strerror}; it can go on once there is room"
    except usage_error as error:
        message = _explain(error)
    except (KeyboardInterrupt, typer.Abort) as stop:
        code = 130
        if isinstance(stop, TimeUp):
            print(f"harness: {stop}", file=sys.stderr)
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
    option = message.partition("No such option: ")[2].partition(" ")[0].partition("=")[0]
    if option and any("--set" in each.opts for each in error.ctx.command.params):
        from harness.search_space import FIELDS

        if (field := option.lstrip("-").replace("-", "_")) in FIELDS:
            return f"No such option: {option}; did you mean --set {field}=...?"
    if parameter and hasattr(error.__cause__, "errors"):  # typer's own message does not have the value
        (fault,) = error.__cause__.errors()
        return f"{parameter.opts[0]} {fault['input']!r}: expected {KINDS[fault['type'].partition('_')[0]]}"
    if help := getattr(parameter, "help", None):
        return f"{message.removesuffix('.')}: {help}"
    told = error.ctx is None or "ossible options" in message
    return message if told else f"{message.removesuffix('.')}: see `{error.ctx.command_path} --help`"


if __name__ == "__main__":
    main()
