"""Searches for better settings: the values in <out>/tune/<sweep>/trials.json, for the search that writes them and the
reports that read them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from harness.results.store import Problem, first_error, sweeps_dir
from harness.results.values import Value

TRIALS = "trials.json"
METRICS = {"error": "error %", "top5_error": "top-5 error %", "loss": "training loss", "epoch_seconds": "s/epoch"}
"""What a search can minimise, and its heading."""

Function = Literal["loguniform", "uniform", "randint", "choice", "grid"]
State = Literal["running", "finished", "pruned", "failed"]


class Dimension(Value):
    """One field's share of the search space."""

    field: str
    function: Function
    values: tuple[Any, ...] = Field(min_length=1)  # lowest and highest, both included; or all that can be chosen
    log: bool = Field(default_factory=lambda data: data["function"] == "loguniform")

    def __str__(self) -> str:
        return f"{self.field}={self.function}({format_value(self.values)})"

    @property
    def continuous(self) -> bool:
        """Whether the values are numbers between two bounds."""
        return self.function in ("loguniform", "uniform", "randint")


class Trial(Value):
    """One point of the search space and what its run reached. The search changes it while the run goes on."""

    model_config = ConfigDict(frozen=False)

    number: int  # from 1
    run: str = ""  # folder of its run
    key: str = ""
    fields: dict[str, Any]
    state: State = "running"
    value: float | None = None  # the metric of the whole run; None unless it is finished
    last: float | None = None  # the metric after the last epoch known
    epochs: int = 0  # done
    seconds: float = 0.0  # of training and evaluation
    reason: str = ""
    curve: list[tuple[int, float]] = Field(default_factory=list)  # (epoch, metric)

    def add_epoch(self, epoch: int, metric: float, seconds: float) -> None:
        self.curve.append((epoch, metric))
        self.epochs, self.last, self.seconds = epoch, metric, round(self.seconds + seconds, 3)

    def end(self, state: State, value: float | None = None, reason: str = "") -> None:
        """Set the outcome. `value` is the metric of the whole run."""
        self.state, self.value, self.reason = state, value, reason
        self.last = self.last if value is None else value


class FieldImportance(Value):
    """How much of the metric's ranking a field explains by itself, from 0 to 1, and which of its values are best."""

    field: str
    value: float
    sign: str
    p: float  # of so much by chance, over all fields


class Importance(Value):
    """Importance of the fields, over `trials` trials at an epoch that all of these reached."""

    how: str
    epoch: int
    trials: int
    fields: list[FieldImportance]
    null: float  # what the first of all fields stays below in 95 % where none has an effect

    @property
    def heading(self) -> str:
        """For a list: what it shows, and how much of it chance explains."""
        return f"{self.how}, {self.trials} trials at epoch {self.epoch}; by chance up to {self.null:.2f}"


class Sweep(Value):
    schema_version: Literal[1] = 1
    name: str
    variant: str  # "msra+he2015" where it is searched
    depth: int | None = None  # None where it is searched, or each variant has its own
    dataset: str
    metric: str
    selected_on: Literal["val", "test"]
    val: int | None
    epochs: int
    scheduler: str
    search_algorithm: str
    total: int
    dimensions: list[Dimension] = Field(min_length=1)
    trials: list[Trial]
    importance: Importance | None = None  # None before the sweep's end, and where it is not defined
    late_importance: Importance | None = None  # of the trials that went on furthest, where at least 12 did

    @model_validator(mode="after")
    def _check(self) -> Self:
        for d in self.dimensions:
            if lacking := [trial for trial in self.trials if d.field not in trial.fields]:
                raise ValueError(f"trial {lacking[0].number} has no {d.field}")
            if d.continuous:
                seen = [*d.values, *(trial.fields[d.field] for trial in self.trials)]
                if wrong := [v for v in seen if not _is_number(v) or (d.log and v <= 0)]:
                    raise ValueError(f"{d.field} is {wrong[0]!r}, and {d.function} gives no such value")
                if len(d.values) != 2 or d.values[0] > d.values[1]:
                    raise ValueError(f"{d.field}: {list(d.values)} are no bounds")
        return self

    @property
    def title(self) -> str:
        """Variant and depth: msra-20."""
        return self.variant if not self.depth else f"{self.variant}-{self.depth}"

    @property
    def heading(self) -> str:
        return METRICS.get(self.metric, self.metric)

    @property
    def importances(self) -> list[Importance]:
        """At the last epoch of all trials; and of those that went on, as what acts early chose them."""
        both = {one.epoch: one for one in (self.late_importance, self.importance) if one}
        return list(both.values())[::-1]

    @property
    def judged_by(self) -> str:
        if self.metric in ("loss", "epoch_seconds"):
            return f"{self.heading} of the training set"
        held_out = f"{self.val or 0:,} held-out training images"
        return f"{self.heading} of {held_out if self.selected_on == 'val' else 'the TEST SET, by which the best was chosen'}"

    def to_json(self) -> str:
        return json.dumps(self.model_dump(), indent=1, default=str) + "\n"


HOW = "functional ANOVA, main effects: leave-one-out R² of a parabola in the ranks"
PERMUTATIONS = 199


def weigh(trials: Sequence[Trial], dimensions: Sequence[Dimension], *, late: bool = False) -> Importance | None:
    """Importance of each field at the last epoch that all trials reached, or with `late` that 12 of them did.

    The share of the metric's ranks that a parabola in the field's ranks, or a mean for each word, predicts for the
    trial that is left out: a best value between two poor ones counts, and a field without effect has about 0. The
    null level is that of the metric in random order. None for fewer than 8 trials, or 12, and without a spread.
    """
    import numpy as np
    from scipy.stats import rankdata

    least = 12 if late else 8
    known = [trial for trial in trials if trial.curve and trial.state in ("finished", "pruned")]
    if len(known) < least:
        return None
    epoch = sorted(trial.epochs for trial in known)[-least if late else 0]
    points = [(trial.fields, value) for trial in known for at, value in trial.curve if at == epoch]
    columns = {d.field: [fields[d.field] for fields, _ in points] for d in dimensions}
    columns = {name: column for name, column in columns.items() if len(set(map(str, column))) > 1}
    if len(points) < least or len({value for _, value in points}) == 1 or not columns:
        return None
    n, ranks, draw = len(points), rankdata([value for _, value in points]), np.random.default_rng(0)
    targets = np.column_stack([ranks, *(draw.permutation(ranks) for _ in range(PERMUTATIONS))])
    by_mean = (targets - targets.mean(0)) * n / (n - 1)  # from the mean of the others
    weighed = []
    for name, column in columns.items():
        numbers = all(map(_is_number, column))
        u = rankdata(column) / n - 0.5 if numbers else np.array(list(map(str, column)))
        basis = np.vander(u, 3) if numbers else np.equal.outer(u, np.unique(u)).astype(float)
        hat = basis @ np.linalg.pinv(basis)
        free = 1 - hat.diagonal()[:, None]  # 0 where no other is of its kind: then the mean is the prediction
        alone = free < 1e-9
        left = np.where(alone, by_mean, (targets - hat @ targets) / (free + alone))
        best = column[int(np.argmin(hat @ ranks))]
        ends = {min(column): "less is better", max(column): "more is better"} if numbers else {}
        sign = ends.get(best, f"{format_value(best, exact=False)} is best")
        scores = 1 - (left**2).sum(0) / (by_mean**2).sum(0)
        weighed.append((name, scores.round(9), sign))  # orders that are equal but for rounding are ties
    null = np.max([scores[1:] for _, scores, _ in weighed], axis=0)
    fields = [
        FieldImportance(field=name, value=max(float(score), 0.0), sign=sign,
                        p=float(1 + (null >= score).sum()) / (PERMUTATIONS + 1))
        for name, (score, *_), sign in weighed
    ]  # fmt: skip
    fields.sort(key=lambda item: -item.value)
    level = max(float(np.quantile(null, 0.95)), 0.0)
    return Importance(how=HOW, epoch=epoch, trials=n, fields=fields, null=level)


def weigh_both(trials: Sequence[Trial], dimensions: Sequence[Dimension]) -> dict[str, Importance | None]:
    """The fields of a `Sweep` that are known at its end."""
    return {"importance": weigh(trials, dimensions), "late_importance": weigh(trials, dimensions, late=True)}


def best_first(trials: Sequence[Trial]) -> list[Trial]:
    """Finished runs by their value; then pruned and running ones, the longest first; failed ones last."""

    def rank(trial: Trial) -> tuple[float, ...]:
        place = {"finished": 0, "running": 1, "pruned": 1}.get(trial.state, 2)
        last = math.inf if trial.last is None or not math.isfinite(trial.last) else trial.last
        return (place, last) if place == 0 else (place, -trial.epochs, last)

    return sorted(trials, key=rank)


def format_value(value: object, *, exact: bool = True) -> str:
    """A field's value as it is typed: 0.05, true, A, 90,135. Not `exact`: floats to six figures."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(format_value(item, exact=exact) for item in value)
    if isinstance(value, float):
        short = f"{value:g}"
        return short if not exact or float(short) == value else repr(value)
    return "none" if value is None else str(value)


class Sweeps(NamedTuple):
    """Every sweep under some paths, and what could not be read."""

    sweeps: list[Sweep]
    problems: list[Problem]


def load_sweeps(paths: Iterable[Path]) -> Sweeps:
    """Read the searches of some folders of results, each once, by name. A broken one is a problem that names it."""
    loaded = Sweeps([], [])
    for path in sorted({file.resolve() for folder in paths for file in sweeps_dir(folder).glob(f"*/{TRIALS}")}):
        try:
            loaded.sweeps.append(Sweep.model_validate_json(path.read_bytes()))
        except (OSError, ValidationError) as error:
            why = first_error(error) if isinstance(error, ValidationError) else error
            loaded.problems.append(Problem(path.parent, f"{TRIALS} is broken: {why}"))
    return loaded


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
