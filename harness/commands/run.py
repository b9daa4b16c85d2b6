"""A sweep from start to finish: plan, launch, record, table. What `harness run` does."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness import plan
from harness.cluster.launch import (
    PLACEMENTS,
    Cluster,
    ClusterError,
    Failed,
    Started,
    Watched,
    connect,
    disconnect,
    fit,
)
from harness.commands.report import make_record, name_of
from harness.deadline import TimeUp, say_moment, stopping_at
from harness.loaders.datasets import DataError, Dataset, load_dataset
from harness.plan import Allocation, Grid
from harness.progress import JsonLines, Progress
from harness.results import remote as storage
from harness.results.store import (
    ESTIMATES,
    fail,
    finish,
    finished_dir,
    finished_keys,
    load_epochs,
    load_records,
    partial_dir,
    start,
)
from harness.results.values import NodeUse, Record
from harness.spec import RunPaths, RunSpec, UserError
from harness.training.nvml import count_gpus
from harness.training.optim import total_epochs
from harness.training.telemetry import NodeTelemetry, count_cpus

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.cluster.launch import Worker
    from harness.results.values import RunResult

MAX_SEEDS = 10  # of a row, for --until-ci
ATTEMPTS = "attempts.jsonl"
EXIT_DONE, EXIT_FAILED, EXIT_USER, EXIT_STOPPED = 0, 1, 2, 130


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How a sweep is carried out; none of it changes what a run computes."""

    out: Path
    remote: str = ""  # the URI that `out` stands for, if it does
    data_dir: Path | None = None
    cache_dir: Path | None = None
    gpus: int | None = None
    workers: int | None = None
    address: str | None = None
    launcher: str = "ray"
    pack: int = 1  # seeds of one row in a process
    placement: str = "pack"
    elastic: int | None = None  # fewest workers that a run may go on with
    checkpoint_every: int = 1
    until_ci: float | None = None  # points
    max_seeds: int | None = None
    until: datetime | None = None  # local time, at which to stop
    tensorboard: bool = False
    force: bool = False
    fail_fast: bool = False
    dry_run: bool = False
    estimate: bool = False  # probe what is missing, train nothing
    profile: bool = False  # the same, for where a step's time goes
    verbose: bool = False
    format: str = "table"  # jsonl: a JSON object an epoch, and no table


def run_grid(sweep: Grid, options: Options, console: Console) -> int:
    """Train what is missing of a sweep, store it, print the table. Returns the exit code.

    Raises UserError, before anything is started or written, for whatever cannot work.
    """
    try:
        return _run_grid(sweep, options, console)
    except TimeUp as up:
        say(f"{up}; the same command goes on", options, console)
        return EXIT_STOPPED


def say(text: str, options: Options, console: Console) -> None:
    """A line for people; where the output is for programs, to standard error."""
    if options.format == "jsonl":
        print(text, file=sys.stderr)
    else:
        console.print(text, soft_wrap=True, markup=False, highlight=False)


def _run_grid(sweep: Grid, options: Options, console: Console) -> int:
    plan.check_grid(sweep)
    plan.check_word(options.launcher, plan.LAUNCHERS, "--launcher")
    plan.check_word(options.placement, PLACEMENTS, "--placement")
    plan.check_pack(options.pack, options.workers)
    plan.check_count(options.checkpoint_every, "--checkpoint-every")
    plan.check_until_ci(sweep, options.until_ci, options.max_seeds)
    plan.check_word(options.format, ("table", "jsonl"), "--format")
    if options.estimate or options.profile:
        asked = "--estimate" if options.estimate else "--profile"
        others = {
            "--profile": options.estimate and options.profile, "--dry-run": options.dry_run,
            "--format jsonl": options.format == "jsonl",
        }  # fmt: skip
        if other := next((name for name, given in others.items() if given), None):
            raise UserError(f"{asked} and {other} exclude each other: {asked} probes and prints a table")
    if not options.dry_run:
        options = replace(options, out=plan.check_out(options.out))
        if options.until is not None:
            say(f"until {options.until:%A} {say_moment(options.until)}", options, console)
    if options.remote:
        plan.pull_out(options.remote, write=not options.dry_run)
    with ExitStack() as stack, stopping_at(None if options.dry_run else options.until):
        width = lay_out(sweep, options, stack)
        dataset = load_data(sweep, options, console)
        specs = plan.expand(sweep, width, fingerprint=dataset.fingerprint, train_images=len(dataset.train))
        plan.narrower_widths(options.elastic, specs)
        finished = finished_keys(options.out)
        todo = specs if options.force else plan.pending(specs, finished)
        code = EXIT_DONE
        if options.dry_run:
            console.print(_plan_table(specs, dataset, options, finished))
        elif options.estimate or options.profile:
            from harness.commands.breakdown import profile
            from harness.commands.estimate import estimate

            if todo and options.address is not None:
                _check_nodes(sweep, dataset, options, console)
            probe = estimate if options.estimate else profile
            code = probe(todo, width, dataset, options, console, stack)
            if options.profile:
                return code
            send(storage.push_run, options.remote, options.out / ESTIMATES, console)
        if options.dry_run or options.estimate:
            if options.until_ci is not None:
                console.print(f"and further seeds, to {options.max_seeds or MAX_SEEDS} of a row, until its error is known "
                              f"to ±{options.until_ci:g} points")  # fmt: skip
            return code
        batch, trained = todo, False
        while True:
            if batch and not trained:
                trained = True
                if options.address is not None:
                    _check_nodes(sweep, dataset, options, console)
                elif options.launcher == "ray":
                    join_cluster(stack, None, cpus=width.threads * width.workers * width.concurrent_runs, gpus=width.gpus,
                                 verbose=options.verbose)  # fmt: skip
            if batch:
                try:
                    code = max(code, _train(batch, width, dataset, options, console, stack))
                except TimeUp:  # as the last run was being stored, perhaps: then there is nothing left
                    if options.force or options.until_ci or plan.pending(specs, finished_keys(options.out)):
                        raise
            if options.until_ci is None or (code != EXIT_DONE and options.fail_fast):
                break
            more = plan.more_seeds(
                specs, finished_errors(options.out), until_ci=options.until_ci,
                max_seeds=options.max_seeds or MAX_SEEDS, concurrent_runs=width.concurrent_runs,
            )  # fmt: skip
            if not more:
                break
            specs += more
            batch = plan.pending(more, finished_keys(options.out))
    from harness.commands.report import export_runs, print_report, write_page

    if options.tensorboard:
        folders = [finished_dir(options.out, name_of(spec, dataset.label)) for spec in specs]
        export_runs([folder for folder in folders if folder.is_dir()], "tensorboard")
        for folder in folders:
            if folder.is_dir():
                send(storage.push_run, options.remote, folder, console)
    if options.format == "jsonl":
        return code

    names = [name_of(spec, dataset.label) for spec in specs]
    folders = [finished_dir(options.out, name) for name in names] + [
        partial_dir(options.out, name) for name in names
    ]
    print_report([folder for folder in folders if folder.is_dir()], console)
    if options.until_ci is not None:
        for row, half in plan.error_half_widths(specs, finished_errors(options.out)).items():
            if half is not None and half > options.until_ci:
                seeds = sum(replace(spec, seed=0) == row for spec in specs)
                console.print(f"{row.variant}-{row.network.depth}: after {seeds} seeds its error is known to ±{half:.2f} points, not to "
                              f"±{options.until_ci:g}", soft_wrap=True)  # fmt: skip
    if not trained:
        console.print(f"all {len(specs)} runs were done already; --force trains them again", style="dim")
    console.print(
        f"stored in {escape(options.remote.partition('?')[0] or str(options.out))}", style="dim", soft_wrap=True
    )
    try:
        page = write_page(options.out)
        send(storage.push_file, options.remote, page, console)
        console.print(f"page: {escape(str(page))}", style="dim", soft_wrap=True)
    except UserError as error:  # the runs are stored, whatever becomes of their page
        console.print(f"no page: {error}", style="dim", soft_wrap=True, markup=False)
    return code


def finished_errors(out: Path) -> dict[str, float]:
    """The last-epoch errors of all finished runs in a folder, by key."""
    records = (stored.record for stored in load_records([out]).records)
    return {record.key: record.result.final_error for record in records if record.result is not None}


def lay_out(sweep: Grid, options: Options, stack: ExitStack) -> Allocation:
    """Count what there is, in the cluster at --address or in this machine, and lay the runs over it."""
    if options.address is not None:
        if options.launcher == "local":
            raise UserError("--address is for --launcher ray: the local launcher uses this process alone")
        cluster = join_cluster(stack, options.address, cpus=0, gpus=0, verbose=options.verbose)
        have_gpus, have_cpus, where = cluster.gpus, cluster.cpus, f"the cluster at {options.address}"
    else:
        have_gpus, have_cpus, where = count_gpus(), count_cpus(), "this machine"
    workers = options.workers if options.pack == 1 else 1
    if options.launcher == "local":
        workers = workers or 1
        if workers != 1:
            raise UserError(f"--launcher local runs one worker, not {workers}; --launcher ray runs more")
    width = plan.allocate(
        gpus=options.gpus, workers=workers, have_gpus=have_gpus, have_cpus=have_cpus,
        precision=sweep.precision, where=where,
    )  # fmt: skip
    if options.address is not None:
        return _fit(width, cluster, options)
    return replace(width, concurrent_runs=1) if options.launcher == "local" else width


def _fit(width: Allocation, cluster: Cluster, options: Options) -> Allocation:
    """Lay the runs over the nodes as they are. Raises UserError where not one run can ever be placed."""
    concurrent_runs, threads = fit(
        cluster,
        workers=width.workers,
        concurrent_runs=width.concurrent_runs,
        gpu=width.device == "cuda",
        placement=options.placement,
    )
    if not concurrent_runs:
        what = "GPUs" if width.device == "cuda" else "CPUs"
        largest = max((n.gpus if width.device == "cuda" else n.cpus for n in cluster.members), default=0)
        raise UserError(
            f"--workers {width.workers} --placement {options.placement}: no room in the cluster at "
            f"{options.address}, whose largest node has {largest} {what} (each worker needs a CPU)"
        )
    return replace(width, concurrent_runs=concurrent_runs, threads=threads)


def join_cluster(stack: ExitStack, address: str | None, *, cpus: int, gpus: int, verbose: bool) -> Cluster:
    """Connect to Ray until the stack closes. Raises UserError where no cluster answers."""
    try:
        cluster = connect(address, cpus=cpus, gpus=gpus, verbose=verbose)
    except ClusterError as error:
        raise UserError(str(error)) from None
    stack.callback(disconnect)
    return cluster


def load_data(sweep: Grid, options: Options, console: Console) -> Dataset:
    """Load the data set, with a bar while it is downloaded and unpacked. Raises UserError where that fails."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    with Bar(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(escape(what), total=total)
            bar.update(tasks[what], completed=done, total=total)

        try:
            return load_dataset(sweep.dataset, options.data_dir, options.cache_dir, progress)
        except DataError as error:
            raise UserError(str(error)) from None


def count_epochs(spec: RunSpec, dataset: Dataset) -> int:
    """Epochs of the whole run."""
    images = (spec.limit_train or len(dataset.train)) - spec.recipe.val
    return total_epochs(spec.recipe, -(-images // spec.recipe.batch_size))


def _plan_table(specs: list[RunSpec], dataset: Dataset, options: Options, finished: set[str]) -> Table:
    table = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), title_justify="left", title_style="",
        title=f"{len(specs)} runs on {escape(dataset.label)}, "
        f"{sum(spec.key in finished for spec in specs)} of them done already",
    )  # fmt: skip
    for name in (
        "variant",
        "depth",
        "seed",
        "epochs",
        "batch",
        "loader",
        "precision",
        "engine",
        "width",
        "key",
        "state",
    ):
        table.add_column(name, justify="right" if name in ("depth", "seed", "epochs", "batch") else "left")
    for spec in specs:
        name = name_of(spec, dataset.label)
        if spec.key in finished:
            state = "done" + (", again by --force" if options.force else "")
        elif partial_dir(options.out, name).is_dir():
            state = "resumes"
        else:
            state = "to do"
        per = spec.recipe.batch_size // spec.workers
        table.add_row(
            spec.variant, str(spec.network.depth), str(spec.seed), str(count_epochs(spec, dataset)),
            str(spec.recipe.batch_size), spec.loader, spec.precision, spec.engine,
            f"{spec.workers} × {per} on {'GPU' if spec.device == 'cuda' else 'CPU'}", spec.key[:8], state,
        )  # fmt: skip
    return table


def _check_nodes(sweep: Grid, dataset: Dataset, options: Options, console: Console) -> None:
    """Refuse a cluster of several nodes that are not alike. Raises UserError."""
    from harness.cluster.nodes import working_nodes
    from harness.preflight import check_nodes

    if len(working_nodes()) > 1:
        places = make_paths(options, dataset)
        check_nodes(
            sweep.dataset, dataset.fingerprint,
            out=places.out, data_dir=places.data_dir, cache_dir=places.cache_dir, console=console, remote=places.remote,
        )  # fmt: skip


@contextlib.contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """A scheduler's SIGTERM stops as Ctrl-C does."""

    def stop(number: int, frame: types.FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def lock_run(spec: RunSpec, label: str, out: Path) -> FileLock:
    """Lock a run: two commands must not train it into one folder. Raises UserError where another one does."""
    (out / ".locks").mkdir(exist_ok=True)
    lock = FileLock(out / ".locks" / f"{name_of(spec, label)}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"{spec.title} is being trained by another harness command in --out {out}") from None
    except OSError as error:
        raise UserError(f"{spec.title} cannot be locked in --out {out}: {error.strerror}") from None
    return lock


def _allow_open_files(more: int) -> None:
    """Each lock is an open file, and 1024 is a usual limit: raise it as far as is needed and allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + more if hard == resource.RLIM_INFINITY else min(soft + more, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def make_paths(options: Options, dataset: Dataset) -> RunPaths:
    """Where the runs find their data and keep their files."""
    return RunPaths(
        out=options.out,
        data_dir=None if options.data_dir is None else options.data_dir.expanduser().absolute(),
        cache_dir=None if options.cache_dir is None else options.cache_dir.expanduser().absolute(),
        label=dataset.label,
        checkpoint_every=options.checkpoint_every,
        remote=options.remote,
    )


def send(how: Callable[[str, Path], None], remote: str, path: Path, console: Console) -> bool:
    """Send to --out URI, if it is one; whether that went well. If not, the path stays here, and it is said."""
    try:
        if remote:
            how(remote, path)
    except storage.StorageError as error:
        console.print(f"not sent: {error}; it is kept in {path}, and the same command sends it", markup=False,
                      soft_wrap=True)  # fmt: skip
        return False
    return True


def bring(remote: str, folder: Path) -> None:
    """Bring a partial run from --out URI, if it is one. Raises UserError."""
    try:
        if remote:
            storage.pull_run(remote, folder)
    except storage.StorageError as error:
        raise UserError(f"--out {error}") from None


def _note_attempt(folder: Path, event: Started) -> None:
    """Add a line to attempts.jsonl: when an attempt began, why there was another after the first, and with how many
    workers where these were fewer."""
    path, reason = folder / ATTEMPTS, event.reason
    if path.exists() and not reason:
        reason = "the command was given again"
    line: dict[str, Any] = {"started_at": datetime.now(UTC).isoformat(), "reason": reason}
    if event.workers is not None:
        line["workers"] = event.workers
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _with_attempts(record: Record, folder: Path) -> Record:
    """The record with all attempts at the run, those of earlier commands too."""
    attempts = []
    for line in (folder / ATTEMPTS).read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # cut off by a kill
            attempts.append(json.loads(line))
    update: dict[str, Any] = {"environment": {**record.environment, "attempts": attempts}}
    if record.result is not None:
        # training counts from its checkpoints, and there may have been none
        most = max(record.result.attempts, len(attempts))
        update["result"] = record.result.model_copy(update={"attempts": most})
    return record.model_copy(update=update)


def _train(
    specs: list[RunSpec],
    width: Allocation,
    dataset: Dataset,
    options: Options,
    console: Console,
    stack: ExitStack,
) -> int:
    """Launch every spec and record every outcome."""
    if options.launcher == "ray":
        from harness.cluster.launch import launch
    else:
        from harness.cluster.local import launch
    _allow_open_files(len(specs))
    for spec in specs:
        stack.callback(lock_run(spec, dataset.label, options.out).release)
    places = make_paths(options, dataset)
    packs = plan.make_packs(specs, options.pack)
    at_a_time = min(width.concurrent_runs, len(packs))
    started: dict[str, datetime] = {}
    nodes: dict[str, list[NodeUse]] = {}
    failures = 0
    display: Progress | JsonLines
    if options.format == "jsonl":
        display = JsonLines(console.file)
    else:
        epochs = {spec.key: count_epochs(spec, dataset) for spec in specs}
        display = Progress(specs, epochs, console, concurrent_runs=at_a_time * options.pack)

    def progress(pack: tuple[RunSpec, ...], event: Any) -> None:
        """An epoch is of one run of the pack, all else of all its runs."""
        if isinstance(event, OfOne):
            display.event(pack[event.index], event.event)
            return
        for spec in pack:
            if isinstance(event, Watched):
                nodes[spec.key].append(event.node)
                continue
            if isinstance(event, Started):
                name = name_of(spec, dataset.label)
                nodes[spec.key] = []
                if spec.key not in started:
                    started[spec.key] = datetime.now(UTC)
                    bring(options.remote, partial_dir(options.out, name))
                    folder = start(options.out, name, spec.to_json())
                    display.resumes(spec, load_epochs(folder))
                _note_attempt(partial_dir(options.out, name), event)
                send(storage.push_run, options.remote, partial_dir(options.out, name), console)
            display.event(spec, event)

    work: AbstractContextManager[Any] = contextlib.closing(
        launch(
            partial(_train_pack, places=places), packs,
            workers=width.workers, concurrent_runs=width.concurrent_runs, gpu=width.device == "cuda", threads=width.threads,
            storage=storage.join_uri(options.remote, ".ray") if options.remote and options.address else options.out / ".ray", progress=progress, placement=options.placement,
            fewer=plan.narrower_widths(options.elastic, specs), watch=NodeTelemetry,
            reached=lambda event: event.event.epoch if isinstance(event, OfOne) else 0,
        )
    )  # fmt: skip
    try:
        with stopping_on_sigterm(), display, work as ended:
            for pack, outcomes in ended:
                for spec, outcome in zip(
                    pack, [outcomes] * len(pack) if isinstance(outcomes, Failed) else outcomes, strict=True
                ):
                    if not isinstance(outcome, Failed):
                        of_run = tuple(sorted(nodes[spec.key], key=lambda node: node.host))
                        outcome = outcome.model_copy(update={"nodes": of_run})
                    record = make_record(
                        spec, outcome, places=places, original=dataset.original, started_at=started[spec.key],
                        concurrent=at_a_time, launcher=options.launcher,
                    )  # fmt: skip
                    record = _with_attempts(record, partial_dir(options.out, record.name))
                    if isinstance(outcome, Failed):
                        send(storage.push_run, options.remote, fail(options.out, record), console)
                        failures += 1
                    else:
                        bring(
                            options.remote, partial_dir(options.out, record.name)
                        )  # what rank 0 wrote on its node
                        folder = finish(options.out, record)
                        failures += not send(storage.push_finished, options.remote, folder, console)
                    display.ended(spec, outcome)
                if failures and options.fail_fast:
                    break
    except TimeUp:
        raise
    except KeyboardInterrupt:
        say("stopped; the same command goes on from the last finished epochs", options, console)
        raise
    return EXIT_FAILED if failures else EXIT_DONE


@dataclass(frozen=True, slots=True)
class OfOne:
    """What one run of a pack reports."""

    index: int
    event: Any


def _train_pack(
    pack: tuple[RunSpec, ...], worker: Worker, report: Callable[[OfOne], None], *, places: RunPaths
) -> tuple[RunResult | Failed, ...]:
    """Train the runs of a pack in this process; one alone is trained as ever."""
    from harness.training.train import train

    return tuple(
        train(spec, worker, lambda metrics, index=index: report(OfOne(index, metrics)), paths=places)  # type: ignore[misc]
        for index, spec in enumerate(pack)
    )
