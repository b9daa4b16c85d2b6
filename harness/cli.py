"""The `harness` command: parse, call, print, exit code. Imports nothing heavy."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.spec import UserError

app = typer.Typer(
    name="harness",
    help="Train every depth and variant of a family of residual networks, and compare what was measured.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command()
def run(
    depths: Annotated[
        str | None, typer.Option(help="Depths, as in 20,32,56,110. Default: each variant's own.")
    ] = None,
    variants: Annotated[str, typer.Option(help="Variants, as in msra,he2015: see `harness variants`.")] = "he2015",
    seeds: Annotated[str, typer.Option(help="A count (3 is seeds 0,1,2) or the seeds themselves (0,7).")] = "1",
    dataset: Annotated[str, typer.Option(help="cifar10, cifar2, digits, miniplaces or folder:PATH.")] = "cifar10",
    data_dir: Annotated[Path | None, typer.Option(help="Where the images are. Default: downloaded once.")] = None,
    loader: Annotated[str, typer.Option(help="dali, resident, dataloader or synthetic.")] = "dali",
    epochs: Annotated[int | None, typer.Option(help="Instead of the recipe's; its schedule is stretched.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Global, over all workers. Default: the recipe's.")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, tf32, bf16 or fp16.")] = "fp32",
    engine: Annotated[
        str | None, typer.Option(help="eager, compile or graph. Default: graph on GPUs, eager on the CPU.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="FIELD=VALUE of recipe or network, as in lr=0.05. Repeatable."),
    ] = None,
    val: Annotated[int | None, typer.Option(help="Training images to hold out and evaluate on.")] = None,
    limit_train: Annotated[
        int | None, typer.Option(help="Train on so many images only; marked in tables.")
    ] = None,
    limit_test: Annotated[int | None, typer.Option(help="Evaluate on so many test images only; marked.")] = None,
    until_ci: Annotated[
        float | None, typer.Option(help="Add seeds until the 95 % interval of the error is ± so many points.")
    ] = None,
    max_seeds: Annotated[int | None, typer.Option(help="For --until-ci: of one row. Default: 10.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs to use, 0 for the CPU. Default: all there are.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="DDP processes of one run; gpus/workers runs go at a time. Default: --gpus.")
    ] = None,
    out: Annotated[
        str, typer.Option(help="Folder of results, or s3://, gs://; finished runs in it are not repeated.")
    ] = "runs",
    address: Annotated[str | None, typer.Option(help="A running Ray cluster: HOST:PORT or auto.")] = None,
    launcher: Annotated[str, typer.Option(help="ray, or local: one worker in this process.")] = "ray",
    until: Annotated[
        str | None,
        typer.Option(help="Stop then as by Ctrl-C: after 9m or 2h30m, or at 18:00. The same command goes on."),
    ] = None,
    pack: Annotated[
        int, typer.Option(help="Seeds of a row to train at the same time on one GPU; their seconds do not count.")
    ] = 1,
    placement: Annotated[
        str, typer.Option(help="A run's workers: pack (one node if it can be), strict-pack (must), spread.")
    ] = "pack",
    elastic: Annotated[
        int | None, typer.Option(help="Go on with so few workers at least where a cluster lost nodes; marked.")
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Epochs from one checkpoint to the next.")] = 1,
    format: Annotated[str, typer.Option(help="table, or jsonl: a JSON object an epoch, no table.")] = "table",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and what is done already.")] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Probe 30 steps of what is missing; print hours, memory and energy.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Time the parts of a step of what is missing: data, forward, ...")
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write each run's event file beside its record.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Train finished runs again; the old ones are kept.")
    ] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first run that fails.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Ray's own messages.")] = False,
) -> None:
    """Train what is missing of a sweep, and print the table."""
    from rich.console import Console

    from harness import plan
    from harness import search_space as space
    from harness.commands.run import Options, run_grid
    from harness.deadline import parse_until
    from harness.results.remote import is_uri

    sweep = plan.Grid(
        variants=plan.parse_words(variants, "--variants"),
        depths=plan.parse_depths(depths) if depths is not None else (),
        seeds=plan.parse_seeds(seeds),
        dataset=dataset,
        loader=loader,
        precision=precision,
        engine=engine,
        epochs=epochs,
        batch_size=batch_size,
        val=val,
        limit_train=limit_train,
        limit_test=limit_test,
        settings=space.parse_settings(settings or ()),
    )
    options = Options(
        out=plan.cache_of(out) if is_uri(out) else Path(out),
        remote=out if is_uri(out) else "",
        data_dir=data_dir,
        gpus=gpus,
        workers=workers,
        address=address,
        launcher=launcher,
        pack=pack,
        placement=placement,
        elastic=elastic,
        checkpoint_every=checkpoint_every,
        until_ci=until_ci,
        max_seeds=max_seeds,
        until=None if until is None else parse_until(until, datetime.now()),
        tensorboard=tensorboard,
        dry_run=dry_run,
        estimate=estimate,
        profile=profile,
        force=force,
        fail_fast=fail_fast,
        verbose=verbose,
        format=format,
    )
    raise typer.Exit(run_grid(sweep, options, Console()))


@app.command()
def tune(
    context: typer.Context,
    search: Annotated[
        list[str] | None,
        typer.Option(
            help="FIELD=loguniform(a,b), uniform, randint, choice or grid; of recipe or network. Repeatable."
        ),
    ] = None,
    variant: Annotated[str, typer.Option(help="Whose recipe and network: see `harness variants`.")] = "he2015",
    depth: Annotated[int | None, typer.Option(help="Default: the variant's own.")] = None,
    samples: Annotated[
        int | None, typer.Option(help="Trials, or trials of each grid point. Default: 16, with a grid 1.")
    ] = None,
    search_algorithm: Annotated[str, typer.Option(help="random, or optuna (TPE).")] = "random",
    scheduler: Annotated[str, typer.Option(help="Stops poor trials early: asha, median or none.")] = "asha",
    metric: Annotated[
        str, typer.Option(help="To make small: error, top5_error, loss or epoch_seconds.")
    ] = "error",
    seed: Annotated[int, typer.Option(help="Of the proposals, and of every trial.")] = 0,
    dataset: Annotated[str, typer.Option(help="cifar10, cifar2, digits, miniplaces or folder:PATH.")] = "cifar10",
    data_dir: Annotated[Path | None, typer.Option(help="Where the images are. Default: downloaded once.")] = None,
    loader: Annotated[str, typer.Option(help="dali, resident, dataloader or synthetic.")] = "dali",
    epochs: Annotated[int | None, typer.Option(help="Instead of the recipe's; its schedule is stretched.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Global, over all workers. Default: the recipe's.")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, tf32, bf16 or fp16.")] = "fp32",
    engine: Annotated[
        str | None, typer.Option(help="eager, compile or graph. Default: graph on GPUs, eager on the CPU.")
    ] = None,
    val: Annotated[
        int | None,
        typer.Option(
            help="Training images held out to judge by; 0 judges by the test set. Default: 5000 or a tenth."
        ),
    ] = None,
    limit_train: Annotated[
        int | None, typer.Option(help="Train on so many images only; marked in tables.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs to use, 0 for the CPU. Default: all there are.")] = None,
    workers: Annotated[int | None, typer.Option(help="DDP processes of one trial. Default: 1.")] = None,
    gpus_per_trial: Annotated[
        float, typer.Option(help="0.25 packs four trials on a GPU, where only the error matters.")
    ] = 1.0,
    concurrent: Annotated[int | None, typer.Option(help="Trials at a time. Default: all that fit.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of results; trials are runs in it like any other.")] = Path(
        "runs"
    ),
    until: Annotated[
        str | None,
        typer.Option(help="Stop then as by Ctrl-C: after 9m or 2h30m, or at 18:00. --resume goes on."),
    ] = None,
    resume: Annotated[str | None, typer.Option(help="Go on with the sweep of that name in --out.")] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster: HOST:PORT or auto.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Ray's own messages.")] = False,
) -> None:
    """Search for the best recipe; poor trials stop early."""
    from rich.console import Console

    from harness.commands.run import Options
    from harness.commands.tune import Search
    from harness.commands.tune import tune as run_search
    from harness.deadline import parse_until

    asked = Search(
        variant=variant,
        depth=depth,
        search=tuple(search or ()),
        samples=samples,
        search_algorithm=search_algorithm,
        scheduler=scheduler,
        metric=metric,
        seed=seed,
        dataset=dataset,
        data_dir=None if data_dir is None else data_dir.expanduser().absolute(),
        loader=loader,
        precision=precision,
        engine=engine,
        epochs=epochs,
        batch_size=batch_size,
        val=val,
        limit_train=limit_train,
        gpus=gpus,
        workers=workers,
        gpus_per_trial=gpus_per_trial,
        concurrent=concurrent,
    )
    given = {name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"}  # type: ignore[union-attr]
    stop_at = None if until is None else parse_until(until, datetime.now())
    options = Options(out=out, address=address, until=stop_at, verbose=verbose)
    raise typer.Exit(run_search(asked, options, Console(), resume=resume, given=given))


@app.command()
def report(
    paths: Annotated[
        list[str] | None, typer.Argument(help="Folders of results, s3:// or gs://, or of single runs.")
    ] = None,
    format: Annotated[str, typer.Option(help="table, markdown, csv, json, latex or html.")] = "table",
    sort: Annotated[str | None, typer.Option(help="A column, as in error; -error: largest first.")] = None,
    columns: Annotated[str | None, typer.Option(help="Which columns, as in variant,depth,error.")] = None,
    across: Annotated[str | None, typer.Option(help="Fields to average over, as in workers,threads.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write to this file.")] = None,
    curves: Annotated[Path | None, typer.Option(help="Draw the charts into this folder, as SVG and PNG.")] = None,
) -> None:
    """Print the comparison table of stored runs."""
    from rich.console import Console

    from harness.commands.report import find_results, print_report
    from harness.plan import parse_words

    found = print_report(
        find_results(paths or ["runs"]),
        Console(),
        format=format,
        sort=sort,
        columns=parse_words(columns, "--columns") if columns is not None else (),
        across=parse_words(across, "--across") if across is not None else (),
        output=output,
        curves=curves,
    )
    raise typer.Exit(0 if found else 2)


@app.command()
def compare(
    paths: Annotated[list[str], typer.Argument(help="Two folders of results, A and B; or one, with --by.")],
    by: Annotated[str | None, typer.Option(help="Compare runs that differ in this field, as in loader.")] = None,
    fail_on: Annotated[
        str | None, typer.Option(help="Exit code 1 if so, as in 'error>+0.3,epoch_seconds>5%'.")
    ] = None,
    across: Annotated[str | None, typer.Option(help="Fields to average over, as in threads.")] = None,
    format: Annotated[str, typer.Option(help="table, markdown or json.")] = "table",
) -> None:
    """Compare two sets of runs: better, worse or the same?"""
    from rich.console import Console

    from harness.commands.compare import print_comparison
    from harness.commands.report import find_results
    from harness.plan import parse_words

    overlooked = parse_words(across, "--across") if across is not None else ()
    code = print_comparison(
        find_results(paths), Console(), by=by, fail_on=fail_on, format=format, across=overlooked
    )
    raise typer.Exit(code)


@app.command()
def why(
    row: Annotated[str, typer.Argument(help="A row of `harness report PATH`: msra-20, or its number.")],
    path: Annotated[str, typer.Argument(help="Folder of results.")] = "runs",
) -> None:
    """Print what is behind a row's figures."""
    from rich.console import Console

    from harness.commands.compare import print_why
    from harness.commands.report import find_results

    print_why(row, find_results([path])[0], Console())


@app.command()
def export(
    paths: Annotated[list[Path] | None, typer.Argument(help="Folders of results, or of single runs.")] = None,
    to: Annotated[
        str,
        typer.Option(help="tensorboard (event files in the runs' folders), mlflow or wandb (by their variables)."),
    ] = "tensorboard",
) -> None:
    """Give stored runs to TensorBoard, MLflow or W&B."""
    from harness.commands.report import export_runs

    exported = export_runs(paths or [Path("runs")], to)
    print(f"{exported} run{'s' * (exported != 1)} exported to {to}; those it had already were left alone")


@app.command()
def repro(
    run: Annotated[str, typer.Argument(help="A run's folder, or its name or key in PATH.")],
    path: Annotated[Path, typer.Argument(help="Folder of results.")] = Path("runs"),
) -> None:
    """Print how a stored run can be made again."""
    from rich.console import Console

    from harness.commands.compare import print_repro

    print_repro(run, path, Console())


@app.command()
def variants() -> None:
    """List the variants: what they are and where they come from."""
    from rich.console import Console

    from harness.commands.report import print_variants

    print_variants(Console())


@app.command("eval")
def evaluate(
    weights: Annotated[Path, typer.Option(help="A run's weights.safetensors, or a torch checkpoint.")],
    variant: Annotated[str, typer.Option(help="Whose network it is: see `harness variants`.")],
    depth: Annotated[int | None, typer.Option(help="Default: the variant's own.")] = None,
    dataset: Annotated[str, typer.Option(help="cifar10, cifar2, digits, miniplaces or folder:PATH.")] = "cifar10",
    data_dir: Annotated[Path | None, typer.Option(help="Where the images are. Default: downloaded once.")] = None,
    scales: Annotated[
        str | None, typer.Option(help="Average over sizes in pixels, as in 96,112,128, and mirrored.")
    ] = None,
    mean: Annotated[str | None, typer.Option(help="R,G,B of images in 0..1. Default: the recipe's.")] = None,
    std: Annotated[str | None, typer.Option(help="R,G,B of images in 0..1. Default: the recipe's.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="Write each image's likeliest classes (CSV).")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Default: training's 1000, less for large scales.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Evaluate so many images only, classes in turn.")] = None,
) -> None:
    """Print the errors of stored weights on a test set."""
    from rich.console import Console

    from harness.commands import evaluate as ew

    options = ew.EvalOptions(
        weights=weights,
        variant=variant,
        depth=depth,
        dataset=dataset,
        data_dir=data_dir,
        scales=ew.parse_scales(scales) if scales is not None else (),
        normalize=ew.parse_normalize(mean, std),
        predictions=predictions,
        batch_size=batch_size,
        limit=limit,
    )
    ew.print_answer(ew.evaluate_weights(options), Console())


@app.command()
def doctor(
    out: Annotated[Path, typer.Option(help="Where results would go.")] = Path("runs"),
    data_dir: Annotated[Path | None, typer.Option(help="Where the images are.")] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster: HOST:PORT or auto.")] = None,
) -> None:
    """Say what is missing on this machine, if anything."""
    from rich.console import Console

    from harness.commands.doctor import check

    raise typer.Exit(check(out, data_dir, address, Console()))


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2, a bug shows its traceback."""
    # typer brings its own copy of click or uses click itself, by version: the class they share has this name
    usage_error: type[Exception] = next(
        cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException"
    )
    code: Any
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        code = _complain(str(error))
    except usage_error as error:
        message = error.format_message()  # type: ignore[attr-defined]
        if message.startswith("Usage:"):  # no command was named
            print(message)
            code = 2
        else:
            code = _complain(message)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _complain(message: str) -> int:
    print(f"harness: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
