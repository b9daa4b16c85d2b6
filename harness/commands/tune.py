"""A search space -> trials -> the best run. What `harness tune` does."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import tempfile
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from harness import plan
from harness.cluster.connect import ClusterError
from harness.cluster.job import Report, Worker
from harness.commands.report import print_text, say_page
from harness.commands.run import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from harness.commands.study import JOURNAL, Study, Trials, make_trial_grid
from harness.deadline import TimeUp, stopping_at, stopping_on_sigterm
from harness.options import Resources, Search, TuneOptions, fill, options_of, read_values
from harness.plugins import load_plugins, sources
from harness.preflight import check_nodes
from harness.progress import describe_trial, load_data, say
from harness.record import describe_code, lease, lock_file
from harness.resources import Session, make_allocation
from harness.results.remote import StorageError, join_uri, redact
from harness.results.report.text import Sheet, fill_template, for_terminal
from harness.results.store import RECORD, SWEEP, SWEEPS, load_epochs, sweeps_dir, write_atomic
from harness.results.sweeps import METRICS, Sweep, Trial, best_first, format_value, weigh_both
from harness.results.values import RunResult
from harness.search_space import corners, parse_search
from harness.selfcheck import RefusedError, check_first
from harness.spec import RunPaths, RunSpec, UserError, check_word, mistakes, refuse

WINNER = "winner.json"
SEEDS = 5  # of the command that trains the winner


def tune(given: Mapping[str, Any], console: Console) -> int:
    """Run a search, or continue one, and print what came of it. Returns the exit code.

    `given`: options by name; a resumed search keeps its own, and to contradict them is an error.
    Raises UserError, before anything is started, for whatever cannot work.
    """
    search, options, folder, began = fill(Search, given), fill(TuneOptions, given), None, time.time()
    had_gpus: bool | None = None
    if options.dry_run and options.estimate:
        raise UserError("--estimate and --dry-run cannot be combined: --estimate only probes and prints a table")
    look = options.dry_run or options.estimate
    out, remote = plan.open_out(options.out, write=not look)
    if options.resume is not None:
        known = sorted(path.parent.name for path in sweeps_dir(out).glob(f"*/{SWEEP}"))
        refuse({f"--resume {options.resume!r}: there is no sweep in {redact(remote) or out}": not known})
        check_word(options.resume, known, "--resume")
        folder = sweeps_dir(out) / options.resume
        search, had_gpus = _load_search(folder, search, given)
    search = replace(search, data_dir=plan.find_data_dir(search.data_dir, search.dataset))
    _check(search)
    resources = fill(Resources, asdict(search) | asdict(options) | {"workers": search.workers or 1})
    paths = RunPaths(out=out, data_dir=search.data_dir, remote=remote, plugins=sources())
    with ExitStack() as stack:
        with stopping_at(options.until):
            allocation = make_allocation(make_trial_grid(search, {}), resources, stack)
            other = had_gpus not in (None, allocation.device == "cuda")
            refuse({f"--resume {options.resume}: it was begun on {'GPUs' if had_gpus else 'the CPU'}": other})
            session = Session(allocation, resources, paths, stack)
            trials = Trials(search, load_data(search.dataset, paths, console), session, console)
            if look:
                return _preview(trials, estimate=options.estimate)
            try:
                _begin(trials, folder, skip=options.no_check)
            except RefusedError as error:
                say(console, str(error))
                return EXIT_FAILED
        say(console, f"sweep {trials.sweep.name}: {trials.describe()}", style="dim")
        try:
            with stopping_at(options.until), stopping_on_sigterm():
                session.join()
                from harness.cluster.search import search as run_search

                job = replace(session.allocation, storage=trials.folder / f".ray-{os.getpid()}")
                with trials.table.live():
                    run_search(partial(train_trial, paths=session.paths), trials, job)
        except (KeyboardInterrupt, OSError, StorageError, ClusterError) as stop:
            again = shlex.join(["harness", "tune", "--resume", trials.sweep.name, "--out", redact(options.out)])
            why = getattr(stop, "strerror", None) or str(stop) or "stopped"
            say(console, f"{why}; continue with {again}")
            if not isinstance(stop, KeyboardInterrupt):  # a disk is full, the store is away
                return EXIT_FAILED
            if not isinstance(stop, TimeUp):
                raise
            if not any(trial.epochs for trial in trials.study.trials):
                say(console, trials.what_fits(time.time() - began))
            return EXIT_STOPPED
    _print_sweep(trials, trials.store(**weigh_both(trials.study.trials, trials.sweep.dimensions)))
    trials.push()  # the winner too
    say_page(out, console)
    states = {trial.state for trial in trials.study.trials}
    return EXIT_DONE if "finished" in states and "running" not in states else EXIT_FAILED


def train_trial(spec: RunSpec, worker: Worker, report: Report, *, paths: RunPaths) -> RunResult:
    """Train a run as `harness run` does; one that was interrupted reports its earlier epochs, too.

    Every rank reports equally often, and only rank 0's reports count.
    """
    from harness.cluster.workers import gather
    from harness.training.train import train

    folder, reported = paths.partial(spec), 0

    def catch_up(_: Any = None) -> None:
        nonlocal reported
        epochs = [row for row in load_epochs(folder) if row.epoch > reported] if worker.rank == 0 else []
        for row in gather(epochs)[0]:
            reported = row.epoch
            report(row)

    catch_up()
    # a kill between checkpoint and report leaves epochs that only the checkpoint has, until `train` reads it
    result = train(spec, worker, catch_up, paths=paths)
    catch_up()
    return result


# --- before ---


def _check(search: Search) -> None:
    """Every check that needs neither data nor devices."""
    check_word(search.metric, tuple(METRICS), "--metric")
    dimensions, options = parse_search(search.search), options_of(Search)
    names, gridded = {d.field for d in dimensions}, any(d.function == "grid" for d in dimensions)
    own = [name for name in options if name in names and getattr(search, name) != options[name].default]
    refuse({
        "--search is missing: name a field to search, as in --search 'lr=loguniform(0.01,1)'": not dimensions,
        f"--search-algorithm {search.search_algorithm} chooses its own points: use choice(...) instead of grid(...)":
            search.search_algorithm != "random" and gridded,
        **{f"{name} is searched: leave --set {name}=... out": True for name in search.settings if name in names},
        **{f"{name} is searched: leave {options[name].names[0]} out": True for name in own},
        "--metric epoch_seconds: runs that share a GPU slow each other down; leave --runs-per-gpu out":
            search.runs_per_gpu > 1 and search.metric == "epoch_seconds",
    })  # fmt: skip
    for point in ({}, *corners(dimensions)):
        plan.check_grid(make_trial_grid(search, point))


def _preview(trials: Trials, *, estimate: bool) -> int:
    """Print what would be searched, or probe what its trials cost. Writes nothing but predictions."""
    sweep, session, console = trials.sweep, trials.session, trials.console
    about = f"{sweep.title} on {sweep.dataset}: {trials.describe()}"
    say(console, "\n  ".join([about, *map(str, sweep.dimensions)]))
    if estimate:
        from harness.commands.probe import probe

        # a run costs the same whatever the numbers between two bounds are
        cells = list(map(trials.make_spec, corners(sweep.dimensions, listed=True)))
        failed = probe("estimate", [cells[i % len(cells)] for i in range(sweep.total)], session, console)
        say(console, "for complete trials; those that the scheduler stops early cost less", style="dim")
        return EXIT_FAILED if failed else EXIT_DONE
    known = sweep.total if sweep.search_algorithm == "random" else session.allocation.concurrent_runs
    with tempfile.TemporaryDirectory() as folder:
        study = Study(Path(folder, JOURNAL), sweep, seed=trials.search.seed)
        while len(study.trials) < known and (point := study.propose()) is not None:
            trial = study.add(point)
            try:
                run = session.paths.name(trials.make_spec(point))
                state = "   done already" * (session.paths.out / run / RECORD).exists()
            except UserError as error:
                study.end(trial, "failed")
                state = f"   cannot be trained: {error}"
            say(console, f"trial {trial.number}: {describe_trial(trial)}{state}")
    return EXIT_DONE


def _begin(trials: Trials, folder: Path | None, *, skip: bool) -> None:
    """Check the devices, make the sweep's folder or lock the one that is resumed, open it. Raises RefusedError."""
    search, session, console, paths = trials.search, trials.session, trials.console, trials.session.paths
    checked = check_first(trials.specs, session, console, trials.dataset, skip=skip)
    before, after = trials.specs, [checked.adapt(spec) for spec in trials.specs]
    if len({spec.loader for spec in before}) > 1 and [a.loader for a in after] != [s.loader for s in before]:
        raise UserError("--search loader: one of them failed its check on this device; leave it out")
    if after[0] != before[0]:
        trials.search = search = replace(search, loader=after[0].loader, engine=after[0].engine)
    if session.resources.address is not None:
        measured = check_nodes(trials.dataset, session, console, exclude=session.resources.exclude_outliers)
        checked = replace(checked, environment={**checked.environment, **measured})
    fingerprint, plugins = trials.dataset.fingerprint, [source.identity for source in paths.plugins]
    if folder is None:
        folder = _make_folder(paths.out, trials.sweep)
        stored = {
            "schema_version": 1, "name": folder.name, "options": asdict(search), "fingerprint": fingerprint,
            "created_at": datetime.now(UTC).isoformat(), "plugins": plugins, **describe_code(),
        }  # fmt: skip
        write_atomic(folder / SWEEP, json.dumps(stored, indent=1, default=str) + "\n")
    else:
        known, resumed = json.loads((folder / SWEEP).read_bytes()), f"--resume {folder.name}"
        changed = " and ".join(set(known.get("plugins", ())) - set(plugins))
        refuse({
            f"{resumed}: its images of {search.dataset} differ from those here": known["fingerprint"] != fingerprint,
            f"{resumed}: plug-in {changed} has changed since the sweep began": changed,
        })  # fmt: skip
    busy = f"--resume {folder.name}: another harness command is running it"
    session.stack.callback(lock_file(folder / ".lock", busy).release)
    lease(session.stack, paths.remote, [folder.name], partial(say, console))
    trials.begin(folder, checked)


def _make_folder(out: Path, sweep: Sweep) -> Path:
    """A new folder: runs/tune/msra-20_cifar10_20260102-030405."""
    words = f"{sweep.title}_{sweep.dataset}_{datetime.now(UTC):%Y%m%d-%H%M%S}"
    for number in itertools.count(1):
        name = re.sub(r"[^A-Za-z0-9.+_]+", "-", words + f"-{number}" * (number > 1))
        with suppress(FileExistsError):
            (folder := sweeps_dir(out) / name).mkdir(parents=True)
            break
    return folder


def _load_search(folder: Path, search: Search, given: Collection[str]) -> tuple[Search, bool]:
    """The options a sweep was begun with; the command line may repeat them, not contradict them. Whether it had GPUs: how many
    there are now is another matter."""
    with mistakes((OSError, ValueError, KeyError, TypeError), f"--resume {folder.name}: {SWEEP} is broken: "):
        before = fill(Search, read_values(json.loads((folder / SWEEP).read_bytes())["options"], Search))
    for name, old in asdict(before).items():
        if name in given and getattr(search, name) != old and name not in ("data_dir", "gpus"):
            begun = f"sweep {folder.name} was begun with {old}, and continues with that"
            raise UserError(f"{options_of(Search)[name].names[0]}: {begun}: leave it out")
    load_plugins(before.plugin)
    gpus = search.gpus if "gpus" in given else None if before.gpus else 0
    data_dir = search.data_dir if "data_dir" in given else before.data_dir
    return replace(before, data_dir=data_dir, gpus=gpus), bool(before.gpus)


# --- after ---


def _print_sweep(trials: Trials, sweep: Sweep) -> None:
    """The table of all trials, the fields' importance, and the command that trains the winner."""
    names, ranked, console = [d.field for d in sweep.dimensions], best_first(sweep.trials), trials.console
    cells = [
        [
            str(trial.number), trial.state, f"{trial.epochs}/{sweep.epochs}",
            "–" if trial.last is None else f"{trial.last:.4g}",
            *(format_value(trial.fields[name]) for name in names),
            f"{trial.seconds:.1f}", trial.reason,
        ]
        for trial in ranked
    ]  # fmt: skip
    headers = ["trial", "state", "epochs", sweep.heading, *names, "seconds", ""]
    sheet = Sheet(headers, [True, False, *[True] * (len(names) + 3), False], cells)
    table = for_terminal(sheet, console.width if console.is_terminal else max(console.width, sheet.width))
    finished, remote = ranked and ranked[0].state == "finished", trials.session.paths.remote
    command = shlex.join(write_winner(trials, ranked[0])) if finished else ""
    where = redact(join_uri(join_uri(remote, SWEEPS), sweep.name)).partition("?")[0] if remote else trials.folder
    values = {"sweep": sweep, "ranked": ranked, "table": table, "command": command, "where": where}
    print_text(fill_template("sweep.txt.j2", describe=describe_trial, **values), console)


def write_winner(trials: Trials, trial: Trial) -> list[str]:
    """Write the winner's specification: all its epochs, all training images, the test set; the command that trains it."""
    path, paths = trials.folder / WINNER, trials.session.paths
    spec = trials.make_spec(trial.fields, epochs=None, val=0, limit_train=None)
    write_atomic(path, json.dumps(spec.to_json(), indent=1) + "\n")
    data = [word for file in trials.search.plugin for word in ("--plugin", file)]
    data += [] if paths.data_dir is None else ["--data-dir", str(paths.data_dir)]
    try:
        plan.check_epochs([spec], len(trials.dataset.train))
    except UserError:  # its recipe is made for a larger set
        data += ["--epochs", str(trials.sweep.epochs)]
    out = redact(paths.remote) or str(paths.out)
    return ["harness", "run", "--spec", str(path), "--seeds", str(SEEDS), *data, "--out", out]
