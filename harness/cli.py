"""The `harness` command: parse, call, print, exit code. Imports nothing heavy."""

from __future__ import annotations

import errno
import io
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.spec import UserError

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    name="harness",
    add_completion=False,
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


def opt(help: str, *names: str) -> Any:
    """An option."""
    return typer.Option(*names, help=help)


def arg(help: str) -> Any:
    """An argument."""
    return typer.Argument(help=help)


def make_console() -> Console:
    """Where tables go."""
    from rich.console import Console

    return Console()


# --- options that several commands have ---

Dataset = Annotated[str, opt("cifar10, cifar2, cifar100, cifar100-coarse, digits, miniplaces or folder:PATH.")]
DataDir = Annotated[Path | None, opt("Where the images are. Default: downloaded once.")]
Loader = Annotated[str, opt("dali, resident, dataloader or synthetic.")]
Variant = Annotated[
    str, opt("Its network and recipe are used: see `harness variants`.", "--variant", "--variants")
]
Depth = Annotated[int | None, opt("Default: the variant's own.", "--depth", "--depths")]
Depths = Annotated[str | None, opt("As in 20,32 or 20..56. Default: each variant's own.", "--depths", "--depth")]
Variants = Annotated[str, opt("As in msra,he2015, or all: see `harness variants`.", "--variants", "--variant")]
Launcher = Annotated[str, opt("ray; local: in this process; auto: local for one run with one worker.")]
Epochs = Annotated[int | None, opt("Instead of the recipe's; its schedule is stretched.")]
BatchSize = Annotated[int | None, opt("Global, over all workers. Default: the recipe's.")]
BatchNorm = Annotated[
    str | None, opt("Statistics of a batch: local (of each worker's images) or sync (of all workers').")
]
Precision = Annotated[str, opt("fp32, tf32, bf16 or fp16.")]
Engine = Annotated[str | None, opt("eager, compile or graph. Default: graph on GPUs, eager on the CPU.")]
Deterministic = Annotated[
    bool, opt("Deterministic algorithms on GPUs too: slower, and rows of their own.", "--deterministic")
]
LimitTrain = Annotated[int | None, opt("Train on this many images only; marked in tables.")]
Gpus = Annotated[int | None, opt("GPUs to use, 0 for the CPU. Default: all.")]
Workers = Annotated[
    int | None, opt("DDP processes per run; gpus/workers runs train at a time. Default: all GPUs (tune: 1).")
]
RunsPerGpu = Annotated[int, opt("Runs that share a GPU, for errors only: their seconds and energy do not count.")]
Address = Annotated[str | None, opt("A running Ray cluster: HOST:PORT or auto.")]
Until = Annotated[
    str | None, opt("Stop as Ctrl-C does: after 9m or 2h30m, or at 18:00. The run can be continued.")
]
Verbose = Annotated[bool, opt("Show Ray's own messages.", "--verbose")]
Preset = Annotated[str | None, opt("The runs of a source's table: cfmz, fattorib, mpmz, convnet or ladder.")]
Across = Annotated[str | None, opt("Fields to average over, as in workers,threads.")]
NoCheck = Annotated[bool, opt("Train on a GPU that is new without checking it first.", "--no-check")]
Results = Annotated[list[str] | None, arg("Folders of results or of single runs, s3:// or gs://.")]


# --- training ---


@app.command()
def run(
    context: typer.Context,
    depths: Depths = None,
    variants: Variants = "he2015",
    seeds: Annotated[str, opt("A count (3 is seeds 0,1,2) or the seeds themselves (0,7 or 3..6).")] = "1",
    preset: Preset = None,
    spec: Annotated[
        list[Path] | None,
        opt("Train the run of this record.json or spec.json, as changed by other options. Repeatable."),
    ] = None,
    dataset: Dataset = "cifar10",
    data_dir: DataDir = None,
    loader: Loader = "dali",
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    batch_norm: BatchNorm = None,
    precision: Precision = "fp32",
    engine: Engine = None,
    deterministic: Deterministic = False,
    settings: Annotated[
        list[str] | None, opt("FIELD=VALUE of recipe or network, as in lr=0.05. Repeatable.", "--set")
    ] = None,
    val: Annotated[int | None, opt("Training images to hold out and evaluate on.")] = None,
    limit_train: LimitTrain = None,
    limit_test: Annotated[int | None, opt("Evaluate on this many test images only; marked in tables.")] = None,
    until_ci: Annotated[
        float | None, opt("Add seeds until the 95 % interval of the error is ± this many points.")
    ] = None,
    max_seeds: Annotated[int | None, opt("For --until-ci: of one row. Default: 10.")] = None,
    gpus: Gpus = None,
    workers: Workers = None,
    runs_per_gpu: RunsPerGpu = 1,
    out: Annotated[str, opt("Folder of results, or s3://, gs://; runs that it holds are not repeated.")] = "runs",
    address: Address = None,
    launcher: Launcher = "auto",
    until: Until = None,
    placement: Annotated[
        str, opt("A run's workers: pack (on one node if possible), strict-pack (always), spread.")
    ] = "pack",
    elastic: Annotated[
        int | None, opt("Continue with at least this many workers when a cluster loses nodes; marked.")
    ] = None,
    checkpoint_every: Annotated[int, opt("Epochs between checkpoints.")] = 1,
    format: Annotated[str, opt("table, or jsonl: a JSON object per epoch, no table.")] = "table",
    no_check: NoCheck = False,
    dry_run: Annotated[bool, opt("Print the plan and what is done already.", "--dry-run")] = False,
    estimate: Annotated[
        bool, opt("Probe 30 steps of what is missing; print hours, memory and energy.", "--estimate")
    ] = False,
    profile: Annotated[
        bool, opt("Time the parts of a step of what is missing: data, forward, ...", "--profile")
    ] = False,
    tensorboard: Annotated[bool, opt("Write each run's event file beside its record.", "--tensorboard")] = False,
    force: Annotated[bool, opt("Train finished runs again; the old results are kept.", "--force")] = False,
    fail_fast: Annotated[bool, opt("Stop at the first run that fails.", "--fail-fast")] = False,
    verbose: Verbose = False,
) -> None:
    """Train what is missing of a grid of runs, and print the table."""
    values = dict(locals())
    from harness import plan
    from harness.commands.run import RunOptions, run_grid
    from harness.deadline import parse_until
    from harness.resources import Resources
    from harness.search_space import parse_settings

    values |= {
        "variants": (names := plan.parse_variants(variants)),
        "depths": plan.parse_depths(depths, names),
        "seeds": plan.parse_seeds(seeds),
        "settings": parse_settings(settings or ()),
        "until": parse_until(until, datetime.now()) if until is not None else None,
    }
    if preset is not None:
        values |= plan.apply_preset(preset, values, chosen(context))
    grid = plan.fill(plan.Grid, values)
    if spec:
        grid = plan.make_spec_grid(spec, grid, chosen(context))
    options = plan.fill(RunOptions, values | {"resources": plan.fill(Resources, values)})
    raise typer.Exit(run_grid(grid, options, make_console()))


def chosen(context: typer.Context) -> set[str]:
    """The parameters that stood on the command line."""
    return {name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"}  # type: ignore[union-attr]


@app.command()
def tune(
    context: typer.Context,
    search: Annotated[
        list[str] | None,
        typer.Option(
            help="FIELD=loguniform(a,b), uniform, randint, choice or grid; of recipe or network. Repeatable."
        ),
    ] = None,
    variant: Variant = "he2015",
    depth: Depth = None,
    samples: Annotated[
        int | None, opt("Trials, or trials of each grid point. Default: 16, with a grid 1.")
    ] = None,
    search_algorithm: Annotated[str, opt("random, tpe or gp (a Gaussian process).")] = "random",
    scheduler: Annotated[str, opt("Stops poor trials early: asha, hyperband, median or none.")] = "asha",
    metric: Annotated[str, opt("To minimise: error, top5_error, loss or epoch_seconds.")] = "error",
    seed: Annotated[int, opt("Of the proposals, and of every trial.")] = 0,
    dataset: Dataset = "cifar10",
    data_dir: DataDir = None,
    loader: Loader = "dali",
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    batch_norm: BatchNorm = None,
    precision: Precision = "fp32",
    engine: Engine = None,
    deterministic: Deterministic = False,
    val: Annotated[
        int | None,
        typer.Option(
            help="Training images held out to judge by; 0 judges by the test set. Default: 5000 or a tenth."
        ),
    ] = None,
    limit_train: LimitTrain = None,
    gpus: Gpus = None,
    workers: Workers = None,
    runs_per_gpu: RunsPerGpu = 1,
    concurrent: Annotated[int | None, opt("Trials at a time. Default: all that fit.")] = None,
    out: Annotated[Path, opt("Folder of results; trials are runs in it like any other.")] = Path("runs"),
    until: Until = None,
    resume: Annotated[str | None, opt("Continue the sweep of that name in --out.")] = None,
    address: Address = None,
    no_check: NoCheck = False,
    verbose: Verbose = False,
) -> None:
    """Search for the best recipe; poor trials stop early."""
    values = dict(locals())
    from harness.commands.tune import TuneOptions, make_search
    from harness.commands.tune import tune as run_search
    from harness.deadline import parse_until
    from harness.plan import fill

    options = fill(TuneOptions, values | {"until": None if until is None else parse_until(until, datetime.now())})
    raise typer.Exit(run_search(make_search(values), options, make_console(), given=chosen(context)))


# --- stored runs ---


@app.command()
def report(
    paths: Results = None,
    format: Annotated[str, opt("table, markdown, csv, json, latex or html.")] = "table",
    sort: Annotated[str | None, opt("A column, as in error; -error: largest first.")] = None,
    columns: Annotated[str | None, opt("Columns to show, as in variant,depth,error.")] = None,
    preset: Preset = None,
    across: Across = None,
    output: Annotated[Path | None, opt("Write to this file.")] = None,
    curves: Annotated[Path | None, opt("Draw the charts into this folder, as SVG and PNG.")] = None,
) -> None:
    """Print the comparison table of stored runs."""
    values = dict(locals())
    from harness.commands.report import ReportOptions, find_results, print_report
    from harness.plan import fill, parse_words

    values |= {"columns": parse_words(columns, "--columns"), "across": parse_words(across, "--across")}
    options = fill(ReportOptions, values)
    any_run = print_report(find_results(paths or ["runs"]), make_console(), options)
    raise typer.Exit(0 if any_run else 2)


@app.command()
def compare(
    paths: Annotated[list[str], arg("Two folders of results, A and B; or one, with --by.")],
    by: Annotated[
        str | None,
        opt("Compare runs that differ in this field, as in loader, or precision=fp32,bf16: first is A."),
    ] = None,
    fail_on: Annotated[
        str | None, opt("Exit with 1 where this holds, as in 'error>+0.3,epoch_seconds>5%'.")
    ] = None,
    strict: Annotated[bool, opt("Exit with 1, too, where the runs cannot tell.", "--strict")] = False,
    across: Across = None,
    format: Annotated[str, opt("table, markdown or json.")] = "table",
) -> None:
    """Compare two sets of runs: better, worse or the same?"""
    from harness.commands.report import find_results, print_comparison
    from harness.plan import parse_words

    code = print_comparison(
        find_results(paths),
        make_console(),
        by=by,
        fail_on=fail_on,
        strict=strict,
        format=format,
        across=parse_words(across, "--across"),
    )
    raise typer.Exit(code)


@app.command()
def verify(paths: Results = None) -> None:
    """Check stored runs for contradictions and changed files."""
    from harness.commands.report import print_findings

    raise typer.Exit(print_findings(paths or ["runs"]))


@app.command()
def why(
    row: Annotated[str, arg("A row of `harness report PATH`: msra-20, or its number.")],
    path: Annotated[str, arg("Folder of results.")] = "runs",
) -> None:
    """Print what is behind a row's figures."""
    from harness.commands.report import find_results, print_why

    print_why(row, find_results([path])[0], make_console())


@app.command()
def export(
    paths: Results = None,
    to: Annotated[
        str, opt("tensorboard (event files in the runs' folders), mlflow or wandb (by their variables).")
    ] = "tensorboard",
) -> None:
    """Export stored runs to TensorBoard, MLflow or W&B."""
    from harness.commands.report import export_runs, find_results, load_runs

    exported = export_runs(load_runs(find_results(paths or ["runs"])).records, to)
    print(f"{exported} run{'s' * (exported != 1)} exported to {to}; those it had already were left alone")


@app.command()
def repro(
    run: Annotated[str, arg("A run's folder, or its name or key in PATH.")],
    path: Annotated[Path, arg("Folder of results.")] = Path("runs"),
) -> None:
    """Print the commands that train a stored run again."""
    from harness.commands.repro import print_repro

    print_repro(run, path, make_console())


@app.command()
def variants() -> None:
    """List the variants: what they are and where they come from."""
    from harness.commands.report import print_variants

    print_variants(make_console())


@app.command("eval")
def evaluate(
    weights: Annotated[Path, opt("A run's weights.safetensors, or a torch checkpoint.")],
    variant: Annotated[
        str | None,
        opt("Needed for weights that do not name theirs: see `harness variants`.", "--variant", "--variants"),
    ] = None,
    depth: Depth = None,
    dataset: Dataset = "cifar10",
    data_dir: DataDir = None,
    scales: Annotated[
        str | None, opt("Average over sizes in pixels, as in 96,112,128, and mirrored images.")
    ] = None,
    average: Annotated[str, opt("With --scales: of logits, or of probabilities.")] = "logits",
    mirror: Annotated[bool, opt("With --scales: mirrored images too.", "--mirror/--no-mirror")] = True,
    pool_window: Annotated[
        int | None, opt("Pool over whole windows of this side alone, as neon's 7 does. miniplaces and mpmz.")
    ] = None,
    save_probabilities: Annotated[
        Path | None, opt("With --scales: write the classes' probabilities at each scale (.npz).")
    ] = None,
    mean: Annotated[str | None, opt("R,G,B of images in 0..1. Default: the recipe's.")] = None,
    std: Annotated[str | None, opt("R,G,B of images in 0..1. Default: the recipe's.")] = None,
    predictions: Annotated[Path | None, opt("Write each image's most likely classes (CSV).")] = None,
    batch_size: Annotated[int | None, opt("Default: training's 1000, less for large scales.")] = None,
    limit: Annotated[int | None, opt("Evaluate this many images only, the same number of each class.")] = None,
) -> None:
    """Print the errors of stored weights on a test set."""
    values = dict(locals())
    from harness.commands import evaluate as command
    from harness.plan import fill

    values |= {
        "scales": command.parse_scales(scales) if scales is not None else (),
        "normalize": command.parse_normalize(mean, std),
    }
    options = fill(command.EvalOptions, values)
    command.print_errors(command.evaluate_weights(options), make_console())


@app.command()
def check(
    quick: Annotated[bool, opt("Look at what is installed; measure nothing.", "--quick")] = False,
    gpus: Gpus = None,
    out: Annotated[Path, opt("Where results would go.")] = Path("runs"),
    data_dir: Annotated[Path | None, opt("Where the images are.")] = None,
    address: Address = None,
) -> None:
    """Say what this machine lacks, and measure whether it trains rightly."""
    from harness.commands.check import Target, print_findings

    raise typer.Exit(print_findings(Target(out, data_dir, address, gpus, quick), make_console()))


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2, a bug shows its traceback."""
    # typer brings its own copy of click or uses click itself, depending on its version: the class's name is the same
    usage_error: type[Exception] = next(
        cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException"
    )
    for stream in (sys.stdout, sys.stderr):  # ASCII, say: a sign that it lacks is shown as "?"
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    code: Any
    try:
        code = app(standalone_mode=False, prog_name="harness")
    except UserError as error:
        code = _complain(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _complain(f"{error.filename or 'a file'}: {error.strerror}; the same command goes on once there is room")
        code = 1
    except usage_error as error:
        message = str(error.format_message())  # type: ignore[attr-defined]
        word = message.partition("No such command '")[2].partition("'")[0]
        code = _complain(f"{message} Did you mean {OTHER_WORDS[word]!r}?" if word in OTHER_WORDS else message)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _complain(message: str) -> int:
    from harness.results.remote import redact

    shown = "".join(sign if sign.isprintable() else "?" for sign in " ".join(redact(message).split()))
    print(f"harness: error: {shown}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
