"""A grid from start to finish: what `harness run` does."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from harness import plan, until_ci
from harness.cluster.connect import ClusterError
from harness.cluster.job import Report, Started, Telemetry, Worker
from harness.commands.report import choose_rows, export_runs, make_rows, print_report, print_text, say_page
from harness.deadline import SIGTERM_SECONDS, TimeUp, format_moment, stopping_at, stopping_on_sigterm
from harness.grid_file import format_config, read_command, save_grid
from harness.loaders.datasets import Dataset
from harness.options import Grid, ReportOptions, RunOptions, fill
from harness.plugins import sources
from harness.preflight import check_nodes
from harness.progress import LINES, JsonLines, Progress, load_data, print_columns, say, width_of
from harness.record import Recorder, lease, lock_run, name_other_code
from harness.resources import Session, check_resources, choose_launcher, make_allocation
from harness.results.remote import CHECKPOINTS, StorageError, pull_results, push_file, push_run, redact
from harness.results.store import ESTIMATES, load_records, partial_dir
from harness.results.values import EpochMetrics, RunResult
from harness.selfcheck import RefusedError, check_first
from harness.spec import RunPaths, RunSpec, UserError, mistakes
from harness.until_ci import Goal

EXIT_DONE, EXIT_FAILED, EXIT_STOPPED = 0, 1, 130
SHARED = ("epochs", "batch", "loader", "precision", "engine", "width", "set")  # said once where runs agree


def run_command(given: Mapping[str, Any], file: Path | None, console: Console) -> tuple[int, RunOptions]:
    """`harness run`, with the options that are given on top of a grid file's. Returns the exit code and how it was carried
    out. Raises UserError."""
    command = read_command(given, file)
    options, grid = fill(RunOptions, command), plan.make_grid(command)
    if options.print_config or options.save is not None:
        check_options(grid, options)
    if options.print_config:
        print_text(format_config(command), console)
        return EXIT_DONE, options
    if options.save is not None:
        save_grid(command, options.save)
    return run_grid(grid, options, console), options


def run_grid(grid: Grid, options: RunOptions, console: Console) -> int:
    """Train what is missing of a grid, store it, print the table. Returns the exit code.

    Raises UserError, before anything is started or written, for whatever cannot work.
    """
    goal = check_options(grid, options)
    if options.format in LINES:
        console = Console(stderr=True)  # standard output is for programs
    out, remote = plan.open_out(options.out, write=not options.dry_run)
    paths = RunPaths(
        out=out, data_dir=plan.find_data_dir(options.data_dir, grid.dataset), remote=remote, plugins=sources(),
        checkpoint_every=options.checkpoint_every,
    )  # fmt: skip
    until = None if options.dry_run else options.until
    if until is not None:
        say(console, f"until {until:%A} {format_moment(until)}")
    try:
        with ExitStack() as stack, stopping_at(until):
            allocation = make_allocation(grid, options, stack, options.elastic)
            dataset = load_data(grid.dataset, paths, console, scan=options.scan)
            images = len(dataset.train)
            specs = plan.expand(grid, allocation, fingerprint=dataset.fingerprint, train_images=images)
            plan.check_images(specs, dataset)
            sizes = plan.fallback_world_sizes(options.elastic, specs)
            plan.check_epochs(() if grid.specs or options.estimate or options.profile else specs, images)
            stall = float(options.stall_seconds)
            allocation = replace(allocation, fallback_world_sizes=sizes, stall_seconds=stall)
            paths = replace(paths, label=dataset.label)
            resources = choose_launcher(options, allocation, until_ci.MAX_SEEDS if goal else len(specs))
            environment, warn = {"launcher": resources.launcher}, partial(say, console)
            recorder = Recorder(paths, dataset.original, environment, warn, classes=dataset.num_classes)
            session = Session(allocation, resources, paths, stack)
            if options.gpus is None and allocation.device == "cpu" and not grid.specs:
                say(console, "no GPU found: training on the CPU (harness check has the reason)")
            runs = Runs(options, console, session, dataset, recorder, goal, specs)
            todo = runs.find_missing(specs)
            if any(spec.plugins for spec in todo):
                from harness.training.fit import check_fit

                check_fit(todo, dataset, paths)
            for line in runs.remarks(todo):
                say(console, line)
            if options.dry_run or options.estimate or options.profile:
                return runs.preview(todo)
            code = runs.train_all(runs.check_devices(todo))
    except TimeUp as up:
        say(console, f"{up}; the same command goes on")
        return EXIT_STOPPED
    except (RefusedError, ClusterError) as error:
        say(console, str(error))
        return EXIT_FAILED
    return code if runs.print_results() else EXIT_FAILED


def check_options(grid: Grid, options: RunOptions) -> Goal | None:
    """Every check that needs neither data nor devices; the goal of --until-ci. Raises UserError."""
    plan.check_grid(grid)
    check_resources(options)
    ways = {
        "--estimate": options.estimate, "--profile": options.profile, "--dry-run": options.dry_run,
        f"--format {options.format}": options.format in LINES,
    }  # fmt: skip
    probe, *others = [name for name, given in ways.items() if given] or [""]
    if others and probe in ("--estimate", "--profile"):
        raise UserError(f"{probe} and {others[0]} cannot be combined: {probe} only probes and prints a table")
    seeds = max(len(group.seeds) for group in grid.groups or (grid,))
    return until_ci.make_goal(options.until_ci, options.max_seeds, seeds)


def train_run(spec: RunSpec, worker: Worker, report: Report, *, paths: RunPaths) -> RunResult:
    """Train a run. The driver names this function, and only workers import torch."""
    from harness.training.train import train

    return train(spec, worker, report, paths=paths)


@dataclass(slots=True)
class Runs:
    """The runs of a command, and all that is known before the first of them is trained."""

    options: RunOptions
    console: Console
    session: Session
    dataset: Dataset
    recorder: Recorder
    goal: Goal | None  # of --until-ci
    specs: list[RunSpec]  # grow by the seeds that --until-ci adds

    def find_missing(self, specs: Sequence[RunSpec]) -> list[RunSpec]:
        """Those that are not stored yet; all, by --force."""
        return plan.pending(specs, self.recorder.find_finished(specs, force=self.options.force))

    # --- before training ---

    def remarks(self, todo: Sequence[RunSpec]) -> Iterator[str]:
        """What is to be known before training. Raises UserError for a goal of --until-ci that is out of reach."""
        again = {spec.key for spec in todo}
        kept = (record for record, _ in self.recorder.known.values() if record.key not in again)
        others = Counter(filter(None, map(name_other_code, kept)))
        for code, runs in others.items():  # the table will have them as they are
            yield f"{runs} run{'s' * (runs != 1)} done already, by {code}; --force trains again"
        # several workers with statistics of their own train another network than the published one
        if local := [spec for spec in todo if spec.workers > 1 and spec.recipe.batch_norm == "local"]:
            shares = "/".join(map(str, sorted({spec.recipe.batch_size // spec.workers for spec in local})))
            yield (
                f"batch norm over {shares} images per worker makes this a different network from the published one: "
                + f"{local[0].workers} runs side by side with --workers 1 train that one and finish sooner; "
                * (len(todo) > 1)
                + "--batch-norm sync trains it with several workers"
            )
        if self.goal is not None:
            yield from until_ci.forecast(self.goal, until_ci.known_errors(self.recorder, self.specs), self.dataset)

    def preview(self, todo: Sequence[RunSpec]) -> int:
        """Print the plan, or probe what is missing of it. Returns the exit code."""
        options, failed = self.options, False
        if options.dry_run:
            self.print_plan()
        else:
            from harness.commands.probe import probe

            if todo:
                self.check_nodes()
            what = "estimate" if options.estimate else "profile"
            measured = self.recorder.environment.get("preflight", {}).get("all_reduce")
            failed = probe(what, todo, self.session, self.console, measured)
            if options.estimate:
                self.recorder.remote.push(push_run, self.recorder.paths.out / ESTIMATES)
        if self.goal is not None and not options.profile:
            known = f"until its error is known to ±{self.goal.half:g} points"
            say(self.console, f"plus further seeds, up to {self.goal.max_seeds} per row, {known}")
        return EXIT_FAILED if failed else EXIT_DONE

    def print_plan(self) -> None:
        """Print what is planned and what is done; what all runs share stands in a line of its own."""
        specs, recorder, dataset = self.specs, self.recorder, self.dataset
        finished, again = recorder.find_finished(specs), ", again by --force" * self.options.force

        def line(spec: RunSpec) -> dict[str, object]:
            waiting = "resumes" if recorder.paths.partial(spec).is_dir() else "to do"
            return {
                "variant": spec.variant, "depth": spec.network.depth, "seed": spec.seed,
                "epochs": plan.count_epochs(spec, len(dataset.train)), "batch": spec.recipe.batch_size,
                "loader": spec.loader, "precision": spec.precision, "engine": spec.engine,
                "width": f"{width_of(spec)} on {'GPU' if spec.device == 'cuda' else 'CPU'}",
                "set": " ".join(text for text in spec.overrides if not text.startswith(("epochs=", "batch_size="))),
                "key": spec.key[:8], "state": f"done{again}" if spec.key in finished else waiting,
            }  # fmt: skip

        lines = list(map(line, specs))
        columns = {name: [str(line[name]) for line in lines] for name in lines[0]}
        same = {name: columns.pop(name)[0] for name in SHARED if len(set(columns[name])) == 1}
        done = sum(spec.key in finished for spec in specs)
        title = f"{len(specs)} run{'s' * (len(specs) != 1)} on {dataset.label}, {done} already done"
        shared = ", ".join(f"{name} {value}" for name, value in same.items() if value)
        left, spare = ("variant", *SHARED[2:], "key", "state"), ("key", *reversed(SHARED))
        print_columns(columns, self.console, title=f"{title}\n{shared}", left=left, spare=spare)

    def check_nodes(self) -> None:
        """Refuse a cluster of several nodes that differ, and keep what was measured of them. Raises UserError."""
        if self.options.address is not None:
            how = {"exclude": self.options.exclude_outliers, "widest": self.options.estimate}
            self.recorder.environment |= check_nodes(self.dataset, self.session, self.console, **how)

    def check_devices(self, todo: Sequence[RunSpec]) -> list[RunSpec]:
        """Give all runs a loader and an engine that work on their devices. Returns those to do. Raises RefusedError."""
        checked = check_first(todo, self.session, self.console, self.dataset, skip=self.options.no_check)
        self.recorder.environment |= checked.environment
        self.recorder.warnings = checked.warnings
        adapted = {spec: checked.adapt(spec) for spec in todo}
        self.specs = list(dict.fromkeys(adapted.get(spec, spec) for spec in self.specs))
        return self.find_missing(list(dict.fromkeys(adapted.values())))

    # --- training ---

    def train_all(self, todo: Sequence[RunSpec]) -> int:
        """Train what is missing, then the further seeds of --until-ci. Returns the exit code."""
        recorder, goal = self.recorder, self.goal
        failures = self.train_batch(todo) if todo else 0
        while goal is not None and not (failures and self.options.fail_fast):
            known = until_ci.known_errors(recorder, self.specs)
            more = until_ci.more_seeds(self.specs, known, goal, self.session.allocation.concurrent_runs)
            if not more:
                break
            first = {row for row, runs in known.items() if len(runs.errors) < until_ci.FIRST}
            recorder.added |= {spec.key: goal.half for spec in more if replace(spec, seed=0) not in first}
            self.specs = [*self.specs, *more]
            if todo := self.find_missing(more):
                failures += self.train_batch(todo)
        return EXIT_FAILED if failures else EXIT_DONE

    def train_batch(self, specs: Sequence[RunSpec]) -> int:
        """Launch some runs and store what each comes to. Returns how many failed, or could not be stored at --out."""
        from harness.training.host import NodeTelemetry

        options, recorder, session = self.options, self.recorder, self.session
        if not recorder.started:
            self.check_nodes()
        paths = session.paths
        # each lock is an open file, and 1024 is a usual limit: raise it as far as needed and allowed
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = soft + len(specs) if hard == resource.RLIM_INFINITY else min(soft + len(specs), hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        for spec in specs:
            session.stack.callback(lock_run(spec, paths).release)
        lease(session.stack, paths.remote, list(map(paths.name, specs)), partial(say, self.console))
        with mistakes(StorageError, "--out "):
            recorder.remote.copy(pull_results, paths.out)
        if not (specs := self.find_missing(specs)):  # another command has finished them meanwhile
            return 0
        concurrent_runs = min(session.allocation.concurrent_runs, len(specs))
        epochs = {spec.key: plan.count_epochs(spec, len(self.dataset.train)) for spec in specs}
        display: Progress | JsonLines
        if options.format in LINES:
            display = LINES[options.format](sys.stdout, epochs)
        else:
            display = Progress(specs, epochs, self.console, concurrent_runs=concurrent_runs)

        def note(spec: RunSpec, event: Any) -> None:
            if isinstance(event, Telemetry):
                recorder.nodes[spec.key].append(event.node)
            display.event(spec, event)
            if isinstance(event, Started):
                display.event(spec, recorder.begin(spec, event))

        failures = 0
        session.join()  # a SIGTERM meanwhile ends the command at once
        try:
            with ExitStack() as stack:
                leaving = stack.enter_context(stopping_on_sigterm(SIGTERM_SECONDS))
                outcomes = session.launch(
                    partial(train_run, paths=paths),
                    specs,
                    progress=note,
                    telemetry=NodeTelemetry,
                    progress_of=lambda event: event.epoch if isinstance(event, EpochMetrics) else 0,
                    leaving=leaving,
                    row=lambda spec: replace(spec, seed=0),
                )
                stack.enter_context(display.live())
                stack.enter_context(closing(outcomes))
                for spec, outcome in outcomes:
                    failures += not recorder.end(spec, outcome, concurrent_runs=concurrent_runs)
                    display.event(spec, outcome)
                    if failures and options.fail_fast:
                        break
                if leaving() and options.until_ci:  # which would go on with further seeds
                    raise KeyboardInterrupt
        except TimeUp:  # perhaps just after the last run was stored: then nothing is left to stop
            if options.until_ci or self.find_missing(specs):
                raise
        except KeyboardInterrupt:
            saved = paths.remote or any(any((paths.partial(spec) / CHECKPOINTS).glob("*")) for spec in specs)
            say(self.console, "stopped; the same command goes on" + " from the last checkpoints" * bool(saved))
            raise
        return failures

    # --- after training ---

    def print_results(self) -> bool:
        """Print the table of the command's runs, and write the page of all runs in the folder.

        Returns whether the runs meet what their preset demands.
        """
        options, recorder, console = self.options, self.recorder, self.console
        paths, out = recorder.paths, recorder.paths.out
        names = dict.fromkeys(map(paths.name, self.specs))
        folders = (folder for name in names for folder in (out / name, partial_dir(out, name)) if folder.is_dir())
        loaded = load_records([out], recorder.known)
        mine = load_records(folders, {run.folder: run for run in loaded.records})
        if options.tensorboard:
            export_runs(mine.records, "tensorboard")
            for stored in mine.records:
                recorder.remote.push(push_run, stored.folder)
        if options.format in LINES:
            met = choose_rows(make_rows(mine), options.preset).met
        else:
            met = print_report([out], console, ReportOptions(preset=options.preset), mine).met
        if self.goal is not None:
            for line in until_ci.describe(self.goal, until_ci.known_errors(recorder, self.specs)):
                say(console, line)
        note = partial(say, console, style="dim")
        if not recorder.started:
            what = "this run was" if len(self.specs) == 1 else f"all {len(self.specs)} runs were"
            note(f"{what} done already; --force trains again")
        note(f"stored in {redact(paths.remote).partition('?')[0] or out}")
        if page := say_page(out, console, loaded):
            recorder.remote.push(push_file, page)
        return met
