"""Searches for better settings: the values in <out>/tune/<sweep>/trials.json, for the search that writes them and the
reports that read them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from harness.results.store import SWEEPS, Problem, first_error
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
        """Append an epoch's metric."""
        self.curve.append((epoch, metric))
        self.epochs, self.last, self.seconds = epoch, metric, round(self.seconds + seconds, 3)

    def end(self, state: State, value: float | None = None, reason: str = "") -> None:
        """Set the outcome. `value` is the metric of the whole run."""
        self.state, self.value, self.reason = state, value, reason
        self.last = self.last if value is None else value


class FieldImportance(Value):
    """How much a field mattered for the metric, from 0 to 1, and which way."""

    field: str
    value: float
    sign: str


class Importance(Value):
    """Importance of the fields, over `trials` trials at the last epoch that all of them reached."""

    how: str
    epoch: int
    trials: int
    fields: list[FieldImportance]


class Sweep(Value):
    """A whole trials.json."""

    schema_version: Literal[1] = 1
    name: str
    variant: str
    depth: int | None = None  # None where depth is searched
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

    @model_validator(mode="after")
    def _check(self) -> Self:
        for trial in self.trials:
            for d in self.dimensions:
                if d.field not in trial.fields:
                    raise ValueError(f"trial {trial.number} has no {d.field}")
        for d in self.dimensions:
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
        return self.variant if self.depth is None else f"{self.variant}-{self.depth}"

    @property
    def heading(self) -> str:
        """The metric as a table calls it."""
        return METRICS.get(self.metric, self.metric)

    @property
    def judged_by(self) -> str:
        """The metric and the images that it is of."""
        if self.metric in ("loss", "epoch_seconds"):
            return f"{self.heading} of the training set"
        if self.selected_on == "test":
            return f"{self.heading} of the TEST SET, by which the best was chosen"
        return f"{self.heading} of {self.val or 0:,} held-out training images"

    def to_json(self) -> str:
        """The text of trials.json."""
        return json.dumps(self.model_dump(), indent=1, default=str) + "\n"


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
    """Read <path>/tune/*/trials.json, each once, by name. A broken one is a problem that names it."""
    loaded = Sweeps([], [])
    for path in sorted({file.resolve() for folder in paths for file in folder.glob(f"{SWEEPS}/*/{TRIALS}")}):
        try:
            loaded.sweeps.append(Sweep.model_validate(json.loads(path.read_bytes())))
        except ValidationError as error:
            loaded.problems.append(Problem(path.parent, f"{TRIALS} is broken: {first_error(error)}"))
        except (OSError, ValueError, RecursionError) as error:
            loaded.problems.append(Problem(path.parent, f"{TRIALS} is broken: {error}"))
    return loaded


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
