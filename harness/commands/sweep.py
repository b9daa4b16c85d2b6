"""A search as it is remembered: trials, their curves, what to try next and whom to stop.

Everything is told to the log first, `log.jsonl` in the sweep's folder. Proposals and stops depend on the log and the
seed alone, so a search whose driver was killed reads it and goes on as if nothing had happened.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from harness.search_space import Dimension, count_points, grid_points
from harness.spec import UserError

Algorithm = Literal["random", "optuna"]
State = Literal["running", "finished", "pruned", "failed"]
REDUCTION = 3  # of as many trials one goes on, at each rung
MEDIAN_LEAST = 3  # trials that must have come as far before the median is asked


@dataclass(slots=True)
class Trial:
    """One point of the space. `curve` holds the metric after each epoch reported so far."""

    number: int  # from 1
    fields: dict[str, Any]
    run: str = ""  # folder of its run
    key: str = ""
    state: State = "running"
    curve: dict[int, float] = field(default_factory=dict)
    value: float | None = None  # of the whole run; None unless finished
    reason: str = ""
    seconds: float = 0.0  # of training and evaluation

    @property
    def epochs(self) -> int:
        """Epochs done."""
        return max(self.curve, default=0)

    @property
    def last(self) -> float | None:
        """The metric as far as it is known."""
        return self.value if self.value is not None else self.curve.get(self.epochs)


# --- whom to stop ---


class Rule(Protocol):
    """Stops trials. `stops` is asked once for each trial and epoch, in the order in which they were reported."""

    def stops(self, trial: int, epoch: int, value: float) -> bool:
        """Whether the trial should end here."""


class Never:
    """Every trial runs to its end."""

    def stops(self, trial: int, epoch: int, value: float) -> bool:
        return False


class Asha:
    """Asynchronous successive halving, one bracket: arXiv:1810.05934, algorithm 2, in Ray Tune's stopping form.

    Rungs stand at grace, 3 grace, 9 grace, ... epochs. A trial that reaches one with a value worse than the best
    third of those that were there before it ends.
    """

    def __init__(self, *, grace: int, epochs: int) -> None:
        count = int(math.log(epochs / grace) / math.log(REDUCTION) + 1e-9) + 1
        self.rungs: dict[int, dict[int, float]] = {grace * REDUCTION**k: {} for k in range(count)}

    def stops(self, trial: int, epoch: int, value: float) -> bool:
        for milestone in sorted(self.rungs, reverse=True):
            there = self.rungs[milestone]
            if epoch < milestone or trial in there:
                continue
            stop = bool(there) and value > float(np.percentile(list(there.values()), 100 / REDUCTION))
            there[trial] = value
            return stop
        return False


class Median:
    """The median stopping rule (Vizier, section 3.2.2): a trial whose best value so far is worse than the median of the
    other trials' means up to the same epoch ends."""

    def __init__(self, *, grace: int) -> None:
        self.grace = grace
        self.curves: dict[int, dict[int, float]] = {}

    def stops(self, trial: int, epoch: int, value: float) -> bool:
        self.curves.setdefault(trial, {})[epoch] = value
        means = [
            statistics.fmean(v for e, v in curve.items() if e <= epoch)
            for other, curve in self.curves.items()
            if other != trial and max(curve) >= epoch
        ]
        if epoch < self.grace or len(means) < MEDIAN_LEAST:
            return False
        return min(self.curves[trial].values()) > statistics.median(means)


def make_rule(scheduler: str, epochs: int) -> Rule:
    """asha, median or none. No trial is pruned in the first tenth of its epochs."""
    grace = max(1, math.ceil(epochs / 10))
    if scheduler == "asha":
        return Asha(grace=grace, epochs=epochs)
    return Median(grace=grace) if scheduler == "median" else Never()


# --- what to try next ---


def count_trials(dimensions: Sequence[Dimension], samples: int | None) -> int:
    """How many trials a search has: `samples` of each grid point; fewer where the space has fewer points."""
    grid = len(grid_points(dimensions))
    samples = samples or (1 if grid > 1 else 16)
    points = count_points(dimensions)
    return grid * samples if points is None else min(points, grid * samples)


def propose(
    dimensions: Sequence[Dimension], algorithm: Algorithm, seed: int, trials: Sequence[Trial]
) -> dict[str, Any] | None:
    """The next point: a function of the seed and of what is known of earlier trials. None: every point was tried."""
    tried = [trial.fields for trial in trials]
    points = count_points(dimensions)
    if points is not None and len(tried) >= points:
        return None
    number = len(tried)
    if algorithm == "optuna":
        for again in range(4):
            fields = _ask_optuna(dimensions, [seed, number, again], trials)
            if fields not in tried:
                return fields
    grid = grid_points(dimensions)
    random = np.random.default_rng([seed, number])
    drawn = [dimension for dimension in dimensions if dimension.function != "grid"]
    # a grid point whose other fields are used up gives its turn to the next
    for turn in range(len(grid)):
        for _ in range(1000):
            fields = {d.field: d.draw(random) for d in drawn} | grid[(number + turn) % len(grid)]
            fields = {d.field: fields[d.field] for d in dimensions}
            if fields not in tried:
                return fields
    return None


def _ask_optuna(dimensions: Sequence[Dimension], seed: list[int], trials: Sequence[Trial]) -> dict[str, Any]:
    """TPE over the earlier trials. Pruned ones count with their curves, diverged ones as the worst."""
    import optuna

    study = make_optuna_study(dimensions, trials)
    study.sampler = optuna.samplers.TPESampler(seed=int(np.random.default_rng(seed).integers(2**31)))
    asked = study.ask({d.field: _distribution(d) for d in dimensions}).params
    return {
        d.field: d.round(asked[d.field]) if d.function in ("uniform", "loguniform") else d.finite[asked[d.field]]  # type: ignore[index]
        for d in dimensions
    }


def _distribution(dimension: Dimension) -> Any:
    import optuna

    if dimension.finite is None:
        low, high = dimension.values
        return optuna.distributions.FloatDistribution(low, high, log=dimension.function == "loguniform")
    # as indices: categories may be anything, whole numbers keep their order
    if dimension.function == "randint":
        return optuna.distributions.IntDistribution(0, len(dimension.finite) - 1)
    return optuna.distributions.CategoricalDistribution(tuple(range(len(dimension.finite))))


def make_optuna_study(dimensions: Sequence[Dimension], trials: Sequence[Trial]) -> Any:
    """An Optuna study in memory that knows the trials that have ended."""
    try:
        import optuna
    except ImportError:
        raise UserError(
            "--search-algorithm optuna: Optuna is not installed; `pip install 'resnet-harness[tune]'`"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize")
    distributions = {d.field: _distribution(d) for d in dimensions}
    for trial in trials:
        if trial.state == "running":
            continue
        params = {
            d.field: trial.fields[d.field] if d.finite is None else d.finite.index(trial.fields[d.field])
            for d in dimensions
        }
        finished = trial.state == "finished" and trial.value is not None
        study.add_trial(
            optuna.trial.create_trial(
                params=params,
                distributions=distributions,
                state=optuna.trial.TrialState.COMPLETE if finished else optuna.trial.TrialState.PRUNED,
                value=trial.value if finished else None,
                intermediate_values=trial.curve if trial.state == "pruned" else None,
            )
        )
    return study


# --- the log ---


class Log:
    """The trials of a search, and the file that remembers them. Measurement it back gives the same trials and rule."""

    def __init__(self, path: Path, rule: Rule, epochs: int) -> None:
        self.path, self.rule, self.epochs = path, rule, epochs
        self.trials: list[Trial] = []
        self.to_stop: set[int] = set()  # pruned by the rule, and the log ends before it says so
        if path.exists():
            whole = path.read_bytes()
            kept = whole[: whole.rfind(b"\n") + 1]  # a line cut off by a kill goes
            if kept != whole:
                path.write_bytes(kept)
            for line in kept.splitlines():
                self._apply(json.loads(line))

    def proposed(self, fields: Mapping[str, Any], run: str, key: str) -> Trial:
        """A new trial."""
        self._tell({"proposed": len(self.trials) + 1, "fields": dict(fields), "run": run, "key": key})
        return self.trials[-1]

    def reported(self, trial: Trial, epoch: int, value: float, seconds: float) -> bool:
        """The metric after one more epoch; an epoch known already changes nothing. True: stop the trial."""
        if epoch not in trial.curve:
            self._tell({"trial": trial.number, "epoch": epoch, "value": value, "seconds": round(seconds, 3)})
        return trial.number in self.to_stop

    def ended(self, trial: Trial, state: State, value: float | None = None, reason: str = "") -> None:
        """A trial is over."""
        self._tell({"trial": trial.number, "ended": state, "value": value, "reason": reason})

    def _tell(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._apply(json.loads(json.dumps(line)))

    def _apply(self, line: dict[str, Any]) -> None:
        if "proposed" in line:
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in line["fields"].items()}
            self.trials.append(Trial(line["proposed"], fields, line["run"], line["key"]))
            return
        trial = self.trials[line["trial"] - 1]
        if "ended" in line:
            trial.state, trial.value, trial.reason = line["ended"], line["value"], line["reason"]
            self.to_stop.discard(trial.number)
            return
        epoch, value = line["epoch"], line["value"]
        trial.curve[epoch] = value
        trial.seconds += line["seconds"]
        # the rule sees the last epoch too, since others are judged by it; but who is there is not pruned
        if self.rule.stops(trial.number, epoch, value) and epoch < self.epochs:
            self.to_stop.add(trial.number)
