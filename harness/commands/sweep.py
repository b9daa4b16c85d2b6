"""A sweep's values, and its trials while they run: proposed, judged, stored as ordinary runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import plan
from harness.cluster.job import Allocation, Failed, Started
from harness.commands.study import Study
from harness.options import Grid, Search, fill
from harness.progress import TrialTable, describe_trial
from harness.record import Recorder, classify, lock_run, name_of
from harness.results.remote import join_uri, push_run
from harness.results.store import SWEEPS, load_epochs, write_atomic
from harness.results.sweeps import TRIALS, State, Sweep, Trial
from harness.results.values import EpochMetrics, Pruned, RunResult
from harness.selfcheck import Checked
from harness.spec import RunPaths, RunSpec, UserError

if TYPE_CHECKING:
    from filelock import FileLock

    from harness.loaders.datasets import Dataset


def make_trial_grid(search: Search, point: Mapping[str, Any]) -> Grid:
    """The one run of a point of the search space."""
    depth = point.get("depth", search.depth)
    return fill(Grid, asdict(search) | {
        "variants": (search.variant,), "depths": () if depth is None else (depth,), "seeds": (search.seed,),
        "settings": {name: value for name, value in point.items() if name != "depth"},
    })  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known before the first trial."""

    search: Search
    sweep: Sweep  # without its trials
    folder: Path
    dataset: Dataset
    paths: RunPaths
    allocation: Allocation
    checked: Checked

    def make_spec(self, point: Mapping[str, Any], **changes: Any) -> RunSpec:
        """The run of one point. Raises UserError where it cannot be one."""
        return make_trial_spec(replace(self.search, **changes), point, self.allocation, self.dataset)


def make_trial_spec(search: Search, point: Mapping[str, Any], allocation: Allocation, dataset: Dataset) -> RunSpec:
    grid, images = make_trial_grid(search, point), len(dataset.train)
    (spec,) = plan.expand(grid, allocation, fingerprint=dataset.fingerprint, train_images=images)
    plan.check_images([spec], dataset)
    return spec


@dataclass(slots=True)
class _Running:
    """A trial that is running."""

    trial: Trial
    spec: RunSpec
    lock: FileLock
    rows: list[EpochMetrics] = field(default_factory=list)


class SweepTrials:
    """The sweep as `harness.cluster.search` sees it: proposes runs, judges epochs, stores outcomes."""

    def __init__(self, prepared: Prepared, study: Study, table: TrialTable) -> None:
        self.prepared, self.study, self.table = prepared, study, table
        self.metric = prepared.sweep.metric
        self.running: dict[str, _Running] = {}
        self.interrupted = [trial for trial in study.trials if trial.state == "running"]
        environment = {
            "launcher": "tune", "concurrent_runs": prepared.allocation.concurrent_runs, "sweep": prepared.sweep.name,
            **prepared.checked.environment,
        }  # fmt: skip
        original, warnings = prepared.dataset.original, prepared.checked.warnings
        self.recorder = Recorder(prepared.paths, original, environment, table.say, warnings)

    def store(self, **changes: Any) -> Sweep:
        """Write trials.json."""
        sweep = self.prepared.sweep.model_copy(update={"trials": self.study.trials, **changes})
        write_atomic(self.prepared.folder / TRIALS, sweep.to_json())
        self.push()
        return sweep

    def push(self) -> None:
        """Copy the sweep's own files to the URI, if there is one."""
        self.recorder.push(lambda uri, folder: push_run(join_uri(uri, SWEEPS), folder), self.prepared.folder)

    def close(self) -> None:
        """Unlock the runs that have not ended."""
        for running in self.running.values():
            running.lock.release()

    def propose(self) -> tuple[str, RunSpec] | None:
        """The next trial that needs training; those that are stored already end here."""
        prepared, study, label = self.prepared, self.study, self.prepared.paths.label
        while True:
            if self.interrupted:
                trial = self.interrupted.pop(0)
                spec = prepared.make_spec(trial.fields)
            else:
                point = study.propose() if len(study.trials) < prepared.sweep.total else None
                if point is None:
                    return None
                spec = prepared.make_spec(point)
                trial = study.add(point, name_of(spec, label), spec.key)
            try:
                lock = lock_run(spec, label, prepared.paths.out)
            except UserError as error:
                self._end(trial, "failed", reason=str(error))
                continue
            if self._end_stored(trial, spec):
                lock.release()
                continue
            name = str(trial.number)
            running = self.running[name] = _Running(trial, spec, lock)
            if trial.number in study.to_prune:  # the driver was killed between the decision and the record
                running.rows = load_epochs(self.recorder.partial(spec))
                self.recorder.started.setdefault(spec.key, datetime.now(UTC))
                self.ended(name, None)
                continue
            self.table.line(trial, f"starting, {describe_trial(trial)}")
            return name, spec

    def reported(self, name: str, event: Any) -> bool:
        """An attempt began, or an epoch ended; True prunes the trial."""
        running = self.running[name]
        if isinstance(event, Started):
            self.recorder.begin(running.spec, event)
            if event.reason:
                running.rows.clear()
                self.table.say(f"trial {name}: {event.reason}; trying again ({event.attempt})")
            return False
        running.rows.append(event)
        prune = self._report(running.trial, running.rows)
        value = measure(running.rows, self.metric)
        progress = f"epoch {event.epoch}/{self.prepared.sweep.epochs}  {self.metric} {value:.4g}"
        self.table.line(running.trial, f"{progress}  {event.train_seconds:.2f} s/epoch")
        return prune

    def ended(self, name: str, outcome: RunResult | Failed | None) -> None:
        """Store what came of a trial."""
        running, sweep = self.running.pop(name), self.prepared.sweep
        stored: RunResult | Failed | Pruned
        if outcome is None:
            last = running.rows[-1]
            stored = Pruned(by=sweep.scheduler, sweep=sweep.name, epoch=last.epoch, of=sweep.epochs, error=last.error,
                            evaluated_on=sweep.selected_on)  # fmt: skip
        else:
            stored = outcome
        self.recorder.end(running.spec, stored, trial=running.trial.number)
        if isinstance(stored, Pruned):
            self._end(running.trial, "pruned", reason=f"by {stored.by} after epoch {stored.epoch}")
        elif isinstance(stored, Failed):
            failure = classify(stored)
            self._end(running.trial, "failed", reason=f"{failure.kind}: {failure.message}")
        else:
            self._end(running.trial, "finished", measure_run(stored, stored.epochs, self.metric))
        running.lock.release()

    def _end_stored(self, trial: Trial, spec: RunSpec) -> bool:
        """End a trial whose run was finished already, by whatever command."""
        result = self.recorder.find_finished([spec]).get(spec.key)
        if result is None:
            return False
        rows = load_epochs(self.prepared.paths.out / trial.run)
        for i in range(len(rows)):
            self._report(trial, rows[: i + 1])
        self._end(trial, "finished", measure_run(result, rows, self.metric), "was done already")
        return True

    def _report(self, trial: Trial, rows: Sequence[EpochMetrics]) -> bool:
        """The last of a trial's epochs; True prunes it."""
        last = rows[-1]
        seconds = last.train_seconds + last.eval_seconds
        return self.study.report(trial, last.epoch, measure(rows, self.metric), seconds)

    def _end(self, trial: Trial, state: State, value: float | None = None, reason: str = "") -> None:
        self.study.end(trial, state, value, reason)
        self.store()
        shown = f", {self.metric} {value:.4g}" if value is not None else ""
        self.table.line(trial, f"{state}{shown}{f' ({reason})' if reason else ''}   [{self.table.summary()}]")


def measure(rows: Sequence[EpochMetrics], metric: str) -> float:
    """The metric after some epochs."""
    last = rows[-1]
    if metric == "epoch_seconds":
        timed = [row.train_seconds for row in rows if row.timed]
        return statistics.median(timed) if timed else last.train_seconds
    if metric == "top5_error":
        return last.top5_error if last.top5_error is not None else math.inf
    return last.loss if metric == "loss" else last.error


def measure_run(result: RunResult, rows: Sequence[EpochMetrics], metric: str) -> float:
    """The metric of a whole run, as its record has it."""
    if metric == "error":
        return result.final_error
    if metric == "epoch_seconds" and result.epoch_seconds is not None:
        return result.epoch_seconds
    return measure(rows, metric)
