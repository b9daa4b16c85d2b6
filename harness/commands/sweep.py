"""A sweep's values, and its trials while they run: proposed, judged, stored as ordinary runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from harness import plan
from harness.cluster.job import Failed, Started
from harness.commands.study import Study
from harness.options import Grid, Search, fill
from harness.progress import TrialTable, describe_trial, duration
from harness.record import Recorder, classify, lock_run, name_of
from harness.resources import Session
from harness.results.remote import join_uri, push_run
from harness.results.store import SWEEPS, load_epochs, load_predictions, write_atomic
from harness.results.sweeps import TRIALS, Dimension, State, Sweep, Trial
from harness.results.values import EpochMetrics, Pruned, RunResult
from harness.search_space import SEARCHED, finite_values
from harness.selfcheck import Checked
from harness.spec import RunSpec, UserError

if TYPE_CHECKING:
    from filelock import FileLock

    from harness.loaders.datasets import Dataset


def make_trial_grid(search: Search, point: Mapping[str, Any]) -> Grid:
    """The one run of a point of the search space."""
    own = {name: point.get(name, getattr(search, name)) for name in SEARCHED}
    fields = {name: value for name, value in point.items() if name not in SEARCHED}
    return fill(Grid, asdict(search) | {
        "variants": (own["variant"],), "depths": () if own["depth"] is None else (own["depth"],),
        "loader": own["loader"], "seeds": (search.seed,), "settings": {**search.settings, **fields},
    })  # fmt: skip


def corners(dimensions: Sequence[Dimension], *, listed: bool = False) -> list[dict[str, Any]]:
    """A few points of the space that between them have every listed value and, unless only these are asked for, every
    bound: an error in one of them is reported before anything starts."""
    lists = {d.field: finite_values(d) or d.values[: 1 if listed else 2] for d in dimensions}
    points = range(max(map(len, lists.values())))
    return [{name: values[min(i, len(values) - 1)] for name, values in lists.items()} for i in points]


@dataclass(slots=True)
class Prepared:
    """What is known before the first trial."""

    search: Search
    dataset: Dataset
    session: Session
    sweep: Sweep = field(init=False)  # without its trials
    folder: Path = Path()
    checked: Checked = field(default_factory=Checked)

    def make_spec(self, point: Mapping[str, Any], **changes: Any) -> RunSpec:
        """The run of one point. Raises UserError where it cannot be one."""
        grid, data = make_trial_grid(replace(self.search, **changes), point), self.dataset
        (spec,) = plan.expand(
            grid, self.session.allocation, fingerprint=data.fingerprint, train_images=len(data.train)
        )
        plan.check_images([spec], data)
        return spec

    def describe(self) -> str:
        """In a line: how many trials, how long, judged by what."""
        trials = f"{self.sweep.total} trials of {self.sweep.epochs} epoch{'s' * (self.sweep.epochs != 1)}"
        at_a_time = f"{self.session.allocation.concurrent_runs} at a time"
        return f"{trials}, {at_a_time}; judged by {self.sweep.judged_by}"

    def what_fits(self, seconds: float) -> str:
        """What to do where no epoch was done within so many seconds."""
        images = self.search.limit_train or len(self.dataset.train)
        none = f"not one epoch of {images:,} images was done"
        own = self.make_spec(corners(self.sweep.dimensions, listed=True)[0]).to_json() | {"seed": None}
        known = [p for p in load_predictions([self.session.paths.out]) if p.spec | {"seed": None} == own]
        if not known:
            return f"{none}: more time or fewer images, --limit-train, would have fitted; --estimate says how many"
        setup, epoch = known[-1].setup_seconds, known[-1].epoch_seconds + known[-1].eval_seconds
        fit, needs = max(0, int(images * (seconds - setup) / epoch)), duration(setup + epoch)
        needs = f"it takes {needs} from the start, by --estimate"
        return f"{none}: {needs}; in {duration(seconds)} --limit-train {fit} would have fitted"


class _Running(NamedTuple):
    trial: Trial
    spec: RunSpec
    lock: FileLock
    rows: list[EpochMetrics]


class SweepTrials:
    """The sweep as `harness.cluster.search` sees it: proposes runs, judges epochs, stores outcomes."""

    def __init__(self, prepared: Prepared, study: Study, table: TrialTable) -> None:
        self.prepared, self.study, self.table = prepared, study, table
        self.sweep, self.paths = prepared.sweep, prepared.session.paths
        self.running: dict[str, _Running] = {}
        self.interrupted = [trial for trial in study.trials if trial.state == "running"]
        environment = {
            "launcher": "tune", "concurrent_runs": prepared.session.allocation.concurrent_runs, "sweep": self.sweep.name,
            **prepared.checked.environment,
        }  # fmt: skip
        dataset, warnings = prepared.dataset, prepared.checked.warnings
        self.recorder = Recorder(
            self.paths, dataset.original, environment, table.say, warnings, classes=dataset.num_classes
        )

    def store(self, **changes: Any) -> Sweep:
        """Write trials.json."""
        sweep = self.sweep.model_copy(update={"trials": self.study.trials, **changes})
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
        study, out = self.study, self.paths.out
        while True:
            if self.interrupted:
                trial = self.interrupted.pop(0)
                spec = self.prepared.make_spec(trial.fields)
            elif len(study.trials) < self.sweep.total and (point := study.propose()) is not None:
                spec = self.prepared.make_spec(point)
                trial = study.add(point, name_of(spec, self.paths.label), spec.key)
            else:
                return None
            try:
                lock = lock_run(spec, self.paths.label, out)
            except UserError as error:
                self._end(trial, "failed", reason=str(error))
                continue
            name, result = str(trial.number), self.recorder.find_finished([spec]).get(spec.key)
            if result is not None:  # by whatever command
                rows = load_epochs(out / trial.run)
                for i in range(len(rows)):
                    self._report(trial, rows[: i + 1])
                self._end(trial, "finished", measure(rows, self.sweep.metric, result), "was done already")
                lock.release()
            elif trial.number in study.to_prune:  # the driver was killed between the decision and the record
                self.running[name] = _Running(trial, spec, lock, load_epochs(self.recorder.partial(spec)))
                self.recorder.started.setdefault(spec.key, datetime.now(UTC))
                self.ended(name, None)
            else:
                self.running[name] = _Running(trial, spec, lock, [])
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
        return prune

    def ended(self, name: str, outcome: RunResult | Failed | None) -> None:
        """Store what came of a trial; None: it was pruned."""
        (trial, spec, lock, rows), sweep = self.running.pop(name), self.sweep
        stored = outcome or Pruned(
            by=sweep.scheduler, sweep=sweep.name, epoch=rows[-1].epoch, of=sweep.epochs, error=rows[-1].error,
            evaluated_on=sweep.selected_on,
        )  # fmt: skip
        self.recorder.end(spec, stored, trial=trial.number)
        if isinstance(stored, Pruned):
            self._end(trial, "pruned", reason=f"by {stored.by} after epoch {stored.epoch}")
        elif isinstance(stored, Failed):
            failure = classify(stored)
            self._end(trial, "failed", reason=f"{failure.kind}: {failure.message}")
        else:
            self._end(trial, "finished", measure(stored.epochs, sweep.metric, stored))
        lock.release()

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
