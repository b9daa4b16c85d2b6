"""A sweep as an Optuna study: what to try next, which trials to prune, and the journal that remembers both; its trials
while they run: proposed, judged, stored as ordinary runs.

Proposals and prunings depend on the journal and the seed alone, so a sweep whose driver was killed continues from its
journal as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from filelock import FileLock
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages.journal import BaseJournalBackend, JournalStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from rich.console import Console

from harness import plan
from harness import search_space as space
from harness.cluster.job import Allocation, Failed, Started
from harness.loaders.datasets import Dataset
from harness.models.variants import default_depth, find_variant
from harness.options import Grid, Search, fill
from harness.progress import TrialTable, clock, describe_trial, duration
from harness.record import Recorder, check_storage, classify, lock_run
from harness.resources import Session
from harness.results.remote import join_uri, push_run
from harness.results.store import SWEEPS, load_epochs, load_predictions, write_atomic
from harness.results.sweeps import TRIALS, Dimension, State, Sweep, Trial
from harness.results.values import EpochMetrics, Pruned, RunResult
from harness.selfcheck import Checked
from harness.spec import RunSpec, UserError

SAMPLERS: dict[str, Callable[..., BaseSampler]] = {"random": RandomSampler, "tpe": TPESampler, "gp": GPSampler}
STATES: dict[State, TrialState] = {
    "running": TrialState.RUNNING,
    "finished": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
REDUCTION = 3  # of this many trials one continues, at each rung
MEDIAN_TRIALS = 3  # must have finished before the median prunes
ATTEMPTS = 20  # at a point that was not tried
JOURNAL = "journal.log"
COMMITTED = b'"commit": true}\n'  # ends the last line of an event
VAL = 5_000  # images held out, if there are enough
FIGURES = 4  # significant ones of a drawn number, so that a command can be typed again


class Journal(BaseJournalBackend):
    """A file in the format of Optuna's journal in which all lines of one event count, or none.

    The last line of each event is marked. Lines after the last mark were cut off by a kill, and are removed.
    """

    def __init__(self, path: Path) -> None:
        path.touch()
        lines = path.read_bytes().splitlines(keepends=True)
        while lines and not lines[-1].endswith(COMMITTED):
            lines.pop()
        os.truncate(path, sum(map(len, lines)))
        self.path, self.logs, self.written = path, [json.loads(line) for line in lines], len(lines)
        self.open = False

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        """For Optuna."""
        return self.logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """For Optuna."""
        self.logs += json.loads(json.dumps(logs))
        if not self.open:
            self.commit()

    @contextlib.contextmanager
    def event(self) -> Iterator[None]:
        """Everything appended in the body is one event."""
        self.open = True
        yield
        self.open = False
        self.commit()

    def commit(self) -> None:
        """Write what was appended."""
        if new := self.logs[self.written :]:
            new[-1]["commit"] = True
            with self.path.open("ab") as file:
                file.write("".join(json.dumps(log) + "\n" for log in new).encode())
                file.flush()
                os.fsync(file.fileno())
            self.written = len(self.logs)


def count_trials(dimensions: Sequence[Dimension], samples: int | None) -> int:
    """How many trials a sweep has: `samples` of each grid point; fewer where the space has fewer points."""
    grid = len(space.grid_points(dimensions))
    samples = samples or (1 if grid > 1 else 16)
    points = space.count_points(dimensions)
    return grid * samples if points is None else min(points, grid * samples)


def make_pruner(scheduler: str, epochs: int) -> BasePruner:
    """Of one of options.SCHEDULERS. No trial is pruned in the first tenth of its epochs."""
    grace = max(1, math.ceil(epochs / 10))
    if scheduler == "asha":
        return SuccessiveHalvingPruner(min_resource=grace, reduction_factor=REDUCTION)
    if scheduler == "hyperband":
        return HyperbandPruner(min_resource=grace, max_resource=epochs, reduction_factor=REDUCTION)
    return MedianPruner(MEDIAN_TRIALS, n_warmup_steps=grace) if scheduler == "median" else NopPruner()


class Study:
    """The trials of a sweep and the decisions about them. Opening its journal again gives the same."""

    def __init__(self, path: Path, sweep: Sweep, *, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.sweep, self.seed, self._journal = sweep, seed, Journal(path)
        self._storage = JournalStorage(self._journal)
        self._study = optuna.create_study(
            storage=self._storage, study_name="sweep", sampler=RandomSampler(), load_if_exists=True,
            pruner=make_pruner(sweep.scheduler, sweep.epochs),
        )  # fmt: skip
        self.distributions = {d.field: _distribution(d) for d in sweep.dimensions}
        known = self._study.get_trials(deepcopy=False)
        self.trials = list(map(self._read, known))
        running = [frozen for frozen in known if frozen.state == TrialState.RUNNING]
        self.to_prune = {frozen.number + 1 for frozen in running if "pruned_at" in frozen.user_attrs}
        """Trials whose pruning was decided and is not recorded as done yet."""

    def propose(self) -> dict[str, Any] | None:
        """The next point: a function of the seed and of what is known of earlier trials. None: every point was tried."""
        number, tried = len(self.trials), [trial.fields for trial in self.trials]
        dimensions = self.sweep.dimensions
        points, grid = space.count_points(dimensions), space.grid_points(dimensions)
        if points is not None and number >= points:
            return None
        for attempt in range(ATTEMPTS):
            drawn = self._sample([self.seed, number, attempt]) | grid[number % len(grid)]
            if (fields := {d.field: drawn[d.field] for d in dimensions}) not in tried:
                return fields
        if points is None:
            return None
        # few points are left: one of them
        values = [[(d.field, value) for value in space.finite_values(d) or ()] for d in dimensions]
        left = [fields for fields in map(dict, itertools.product(*values)) if fields not in tried]
        return left[int(np.random.default_rng([self.seed, number]).integers(len(left)))]

    def add(self, fields: Mapping[str, Any], run: str = "", key: str = "") -> Trial:
        """A new trial, running."""
        self._study.add_trial(create_trial(
            state=TrialState.RUNNING, params=dict(fields), distributions=self.distributions,
            user_attrs={"run": run, "key": key},
        ))  # fmt: skip
        self.trials.append(self._read(self._study.get_trials(deepcopy=False)[-1]))
        return self.trials[-1]

    def report(self, trial: Trial, epoch: int, metric: float, seconds: float) -> bool:
        """The metric after one more epoch; a known epoch changes nothing. True: prune the trial."""
        storage, number = self._storage, trial.number - 1  # Optuna's, and its id as there is one study
        if epoch > trial.epochs:
            with self._journal.event():
                trial.add_epoch(epoch, metric, seconds)
                storage.set_trial_intermediate_value(number, epoch, metric)
                storage.set_trial_user_attr(number, "seconds", trial.seconds)
                # asked of the last epoch, too: the others are judged by it
                prune = self._study.pruner.prune(self._study, storage.get_trial(number))
                if prune and epoch < self.sweep.epochs:
                    storage.set_trial_user_attr(number, "pruned_at", epoch)
                    self.to_prune.add(trial.number)
        return trial.number in self.to_prune

    def end(self, trial: Trial, state: State, value: float | None = None, reason: str = "") -> None:
        """A trial is over."""
        with self._journal.event():
            trial.end(state, value, reason)
            self._storage.set_trial_user_attr(trial.number - 1, "reason", reason)
            self._study.tell(trial.number - 1, value, state=STATES[state])
        self.to_prune.discard(trial.number)

    def _read(self, frozen: FrozenTrial) -> Trial:
        curve, known = sorted(frozen.intermediate_values.items()), {"seconds", "reason", "run", "key"}
        state = next(name for name, state in STATES.items() if state == frozen.state)
        value = frozen.value if state == "finished" else None
        epochs, last = curve[-1] if curve else (0, None)
        return Trial(
            number=frozen.number + 1, state=state, value=value, last=last if value is None else value, epochs=epochs,
            fields={d.field: _convert(d, frozen.params[d.field]) for d in self.sweep.dimensions}, curve=curve,
            **{name: attribute for name, attribute in frozen.user_attrs.items() if name in known},
        )  # fmt: skip

    def _sample(self, seed: Sequence[int]) -> dict[str, Any]:
        """One draw of every dimension but grids, by a sampler of its own over the trials that have ended.

        Pruned trials count with their curves, failed ones as the worst.
        """
        number = int(np.random.default_rng(seed).integers(2**31))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(sampler=SAMPLERS[self.sweep.search_algorithm](seed=number))
            ended = [STATES[state] for state in ("finished", "pruned", "failed")]
            for trial in self._study.get_trials(states=ended) if self.sweep.search_algorithm != "random" else ():
                point: dict[str, Any] = {"params": trial.params, "distributions": trial.distributions}
                worst = create_trial(state=TrialState.PRUNED, **point)
                study.add_trial(worst if trial.state == TrialState.FAIL else trial)
            own = [d for d in self.sweep.dimensions if d.function != "grid"]
            params = study.ask({d.field: self.distributions[d.field] for d in own}).params
        return {d.field: _convert(d, params[d.field]) for d in own}


def _distribution(d: Dimension) -> BaseDistribution:
    if d.function == "randint":
        return IntDistribution(int(d.values[0]), int(d.values[1]))
    if d.continuous:
        return FloatDistribution(d.values[0], d.values[1], log=d.log)
    return CategoricalDistribution(d.values)


def _convert(d: Dimension, value: Any) -> Any:
    """Optuna's value as the field's; a drawn number to `FIGURES` figures, within the bounds."""
    if d.function in ("loguniform", "uniform"):
        low, high = d.values
        return float(min(max(float(f"{value:.{FIGURES}g}"), low), high))
    return type(d.values[0])(value) if d.function == "randint" else value


# --- trials while they run ---


def make_trial_grid(search: Search, point: Mapping[str, Any]) -> Grid:
    """The one run of a point of the search space."""
    own = {name: point.get(name, getattr(search, name)) for name in space.SEARCHED}
    fields = {name: value for name, value in point.items() if name not in space.SEARCHED}
    return fill(Grid, asdict(search) | {
        "variants": (own["variant"],), "depths": () if own["depth"] is None else (own["depth"],),
        "loader": own["loader"], "seeds": (search.seed,), "settings": {**search.settings, **fields},
    })  # fmt: skip


def allocate_trials(allocation: Allocation, concurrent: int) -> Allocation:
    """`concurrent` at a time, or as many as there is room for: a core for each worker, on GPUs as many trials as they hold."""
    if allocation.device == "cuda":
        return replace(allocation, concurrent_runs=min(allocation.concurrent_runs, concurrent))
    cpus = allocation.concurrent_runs * allocation.workers * allocation.threads
    concurrent = min(cpus // allocation.workers, concurrent)
    return replace(allocation, concurrent_runs=concurrent, threads=cpus // (concurrent * allocation.workers))


class Trials:
    """A search before its first trial; after `begin`, its trials as `harness.cluster.search` sees them: proposes runs, judges
    epochs, stores outcomes."""

    def __init__(self, search: Search, dataset: Dataset, session: Session, console: Console) -> None:
        """Fix what was left to the devices and the data: a sweep that is resumed keeps it. Raises UserError."""
        dimensions, train_images = space.parse_search(search.search), len(dataset.train)
        if search.metric == "top5_error" and (n := dataset.num_classes) <= 10:
            raise UserError(f"--metric top5_error: {search.dataset} has {n} classes, too few for a top-5")
        listed, allocation = {d.field: d.values for d in dimensions}, session.allocation
        names = listed.get("variant", (search.variant,))
        variants = list(map(find_variant, names))
        depths = {search.depth or default_depth(function) for function in variants}
        val = search.val
        if val is None:
            own = max(function(default_depth(function)).recipe.val for function in variants)
            val = own or min(VAL, min(search.limit_train or train_images, train_images) // 10)
        total = count_trials(dimensions, search.samples)
        session.allocation = allocate_trials(allocation, min(search.concurrent or total, total))
        session.paths = replace(session.paths, label=dataset.label)
        self.search = replace(search, val=val, gpus=allocation.gpus, workers=allocation.workers)
        self.dataset, self.session, self.console = dataset, session, console
        self.specs = list(map(self.make_spec, space.corners(dimensions)))  # a fault is a fault of one of them
        space.check_settings(listed, self.specs, "--search")
        space.check_settings(search.settings, self.specs)
        plan.check_epochs(self.specs, train_images)
        if any(spec.plugins for spec in self.specs):
            from harness.training.fit import check_fit

            check_fit(self.specs, dataset, session.paths)
        epochs = sorted({plan.count_epochs(spec, train_images) for spec in self.specs})
        if len(epochs) > 1 and "variant" in listed:
            several = " and ".join(map(str, epochs))
            raise UserError(f"the recipes of these variants have {several} epochs: choose with --epochs")
        self.sweep = Sweep(
            name="", variant="+".join(names), depth=None if "depth" in listed or len(depths) > 1 else depths.pop(),
            dataset=dataset.label, metric=search.metric, selected_on="val" if val else "test", val=val,
            epochs=plan.count_epochs(self.specs[0], train_images), scheduler=search.scheduler,
            search_algorithm=search.search_algorithm, total=total, dimensions=list(dimensions), trials=[],
        )  # fmt: skip

    def make_spec(self, point: Mapping[str, Any], **changes: Any) -> RunSpec:
        """The run of one point. Raises UserError where it cannot be one."""
        grid, data = make_trial_grid(replace(self.search, **changes), point), self.dataset
        grid = replace(grid, specs=tuple(plan.make_specs(grid)), settings={})  # which not every trial reads
        job, images = self.session.allocation, len(data.train)
        (spec,) = plan.expand(grid, job, fingerprint=data.fingerprint, train_images=images)
        plan.check_images([spec], data)
        return spec

    def describe(self) -> str:
        """In a line: how many trials, how long, judged by what."""
        trials = f"{self.sweep.total} trials of {self.sweep.epochs} epoch{'s' * (self.sweep.epochs != 1)}"
        at_a_time = f"{self.session.allocation.concurrent_runs} at a time"
        return f"{trials}, {at_a_time}; judged by {self.sweep.judged_by}"

    def begin(self, folder: Path, checked: Checked) -> None:
        """Open the journal in the sweep's folder: trials that an earlier command began go on."""
        data, at_once = self.dataset, self.session.allocation.concurrent_runs
        self.folder, self.sweep = folder, self.sweep.model_copy(update={"name": folder.name})
        self.study = Study(folder / JOURNAL, self.sweep, seed=self.search.seed)
        self.table = TrialTable(self.sweep, self.study.trials, self.console, at_once)
        self.interrupted = [trial for trial in self.study.trials if trial.state == "running"]
        self.running = dict[str, tuple[Trial, RunSpec, FileLock, list[EpochMetrics]]]()
        about = {"launcher": "tune", "concurrent_runs": at_once, "sweep": folder.name, **checked.environment}
        paths, warn = self.session.paths, self.table.say
        self.recorder = Recorder(paths, data.original, about, warn, checked.warnings, classes=data.num_classes)
        self.push()

    def what_fits(self, seconds: float) -> str:
        """What to do where no epoch was done within so many seconds."""
        images = self.search.limit_train or len(self.dataset.train)
        none = f"not one epoch of {images:,} images was done"
        own = self.make_spec(space.corners(self.sweep.dimensions, listed=True)[0]).to_json() | {"seed": None}
        known = [p for p in load_predictions([self.session.paths.out]) if p.spec | {"seed": None} == own]
        if not known:
            return f"{none}: allow more time or use fewer images (--limit-train); --estimate says how many"
        setup, epoch = known[-1].setup_seconds, known[-1].epoch_seconds + known[-1].eval_seconds
        fit, needs = max(0, int(images * (seconds - setup) / epoch)), duration(setup + epoch)
        needs = f"it takes {needs} from the start, by --estimate"
        return f"{none}: {needs}; in {duration(seconds)} --limit-train {fit} would have fitted"

    # --- while they run ---

    def store(self, **changes: Any) -> Sweep:
        """Write trials.json."""
        sweep = self.sweep.model_copy(update={"trials": self.study.trials, **changes})
        write_atomic(self.folder / TRIALS, sweep.to_json())
        self.push()
        return sweep

    def push(self) -> None:
        """Copy the sweep's own files to the URI, if there is one."""
        self.recorder.remote.push(lambda uri, folder: push_run(join_uri(uri, SWEEPS), folder), self.folder)

    def propose(self) -> tuple[str, RunSpec] | None:
        """The next trial that needs training; those that are stored already end here."""
        study, paths = self.study, self.session.paths
        while True:
            if self.interrupted:
                trial = self.interrupted.pop(0)
                spec = self.make_spec(trial.fields)
            elif len(study.trials) < self.sweep.total and (point := study.propose()) is not None:
                try:
                    spec = self.make_spec(point)
                except UserError as error:  # values that cannot be had together
                    self._end(study.add(point), "failed", reason=str(error))
                    continue
                trial = study.add(point, paths.name(spec), spec.key)
            else:
                return None
            try:
                lock = lock_run(spec, paths)
            except UserError as error:  # by another command
                self.table.say(f"trial {trial.number} is left out: {error}; --resume takes it")
                continue
            name, result = str(trial.number), self.recorder.find_finished([spec]).get(spec.key)
            if result is not None:  # by whatever command
                rows = load_epochs(paths.out / trial.run)
                for i in range(len(rows)):
                    self._report(trial, rows[: i + 1])
                self._end(trial, "finished", measure(rows, self.sweep.metric, result), "was done already")
                lock.release()
            else:
                self.running[name] = trial, spec, lock, []
                self.session.stack.callback(lock.release)  # where it is not ended
                self.table.line(trial, f"starting, {describe_trial(trial)}")
                return name, spec

    def reported(self, name: str, event: Any) -> bool:
        """An attempt began, or an epoch ended; True prunes the trial."""
        trial, spec, _, rows = self.running[name]
        if isinstance(event, Started):
            self.recorder.begin(spec, event)
            if event.reason:
                rows.clear()
                self.table.say(f"trial {name}: {event.reason}; trying again ({event.attempt})")
            return False
        rows.append(event)
        prune, value = self._report(trial, rows), measure(rows, self.sweep.metric)
        progress = f"epoch {event.epoch}/{self.sweep.epochs}  {self.sweep.metric} {value:.4g}"
        self.table.line(trial, f"{progress}  {event.train_seconds:.2f} s/epoch")
        return prune and event.epoch >= trial.epochs  # an earlier command decided that, and was killed

    def ended(self, name: str, outcome: RunResult | Failed | None) -> None:
        """Store what came of a trial; None: it was pruned. Raises OSError and StorageError: the trial can go on."""
        if isinstance(outcome, Failed):
            check_storage(outcome)
        (trial, spec, lock, rows), sweep = self.running.pop(name), self.sweep
        stored = outcome or Pruned(
            by=sweep.scheduler, sweep=sweep.name, epoch=rows[-1].epoch, of=sweep.epochs, error=rows[-1].error,
            evaluated_on=sweep.selected_on,
        )  # fmt: skip
        self.recorder.keep(spec, stored, trial=trial.number)
        if isinstance(stored, Pruned):
            self._end(trial, "pruned", reason=f"by {stored.by} after epoch {stored.epoch}")
        elif isinstance(stored, Failed):
            failure = classify(stored)
            self._end(trial, "failed", reason=f"{failure.kind}: {failure.message}")
        else:
            self._end(trial, "finished", measure(stored.epochs, sweep.metric, stored))
        lock.release()

    def waiting(self, seconds: float, reason: str) -> None:
        """No trial trains, for want of room."""
        self.table.say(f"waiting for room since {clock(seconds)}: {reason}")

    def _report(self, trial: Trial, rows: Sequence[EpochMetrics]) -> bool:
        """The last of a trial's epochs; True prunes it."""
        seconds = rows[-1].train_seconds + rows[-1].eval_seconds
        return self.study.report(trial, rows[-1].epoch, measure(rows, self.sweep.metric), seconds)

    def _end(self, trial: Trial, state: State, value: float | None = None, reason: str = "") -> None:
        self.study.end(trial, state, value, reason)
        self.store()
        shown = f", {self.sweep.metric} {value:.4g}" if value is not None else ""
        self.table.line(trial, f"{state}{shown}{f' ({reason})' * bool(reason)}   [{self.table.summary()}]")


def measure(rows: Sequence[EpochMetrics], metric: str, result: RunResult | None = None) -> float:
    """The metric after some epochs, or of a whole run, as its record has it."""
    whole = {"error": result.final_error, "epoch_seconds": result.epoch_seconds} if result else {}
    if (known := whole.get(metric)) is not None:
        return known
    if metric == "epoch_seconds":
        return statistics.median([row.train_seconds for row in rows if row.timed] or [rows[-1].train_seconds])
    value: float | None = getattr(rows[-1], metric)
    return math.inf if value is None else value
