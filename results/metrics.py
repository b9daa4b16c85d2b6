"""Every measured figure of a run, declared once, in metrics.toml: a new figure is one entry there."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any, Literal

from harness.results.statistics import mean, std
from harness.results.values import Measurement, Prediction, RunResult, measured

NONE = "–"


@dataclass(frozen=True, slots=True)
class Figure:
    """A metric over the runs of a row. `value` is None where too few runs measured it."""

    value: float | None
    std: float | None = None  # of a mean; None: one run, or another aggregation
    n: int = 0  # runs in which it was measured
    reason: str | None = None  # of the first run that did not measure it
    remarks: tuple[str, ...] = ()  # beside the values, of each run that has any


COMBINE: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": mean,
    "median": median,
    # the median of the reciprocals: of two runs, images over the mean of their seconds
    "rate": lambda values: 1 / median([1 / value for value in values]) if min(values) > 0 else median(values),
    "max": max,
    "first": lambda values: values[0],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A measured figure: its names, meaning, how it is read, combined, written and compared. By default an error."""

    name: str  # in CSV and JSON, and for --sort, --columns, --fail-on
    title: str  # header of its column
    means: str  # the definition under a table
    read: Callable[[Any], float | Measurement | None]  # of a RunResult
    record_name: str  # of its field in the record: the column of a DataFrame, the key in other tools
    unit: Literal["%", "s", "images/s", "J", "MiB", ""] = "%"
    kind: Literal["size", "error", "time", "energy", "memory"] = "error"
    over_seeds: Literal["mean", "median", "rate", "max", "first"] = "mean"  # how the runs of a row are combined
    digits: int | None = None  # after the point; None: three significant figures
    scale: float = 1.0  # from the unit to the one shown
    suffix: str = ""
    show_std: bool = True
    missing: str | None = None  # the reason, where the record holds a bare null
    predict: Callable[[Any], float | Measurement] | None = None  # of a Prediction; None: no probe predicts it
    better: Literal["lower", "higher", ""] = "lower"  # "": not compared
    ratio: bool = False  # of a percentage: compared by its ratio all the same
    margin: float | None = None  # `compare` calls two sides equivalent within it: points of a %, else percent
    device: Literal["cpu", "cuda"] | None = None  # the only one on which it is measured or shown
    in_table: bool = True  # False: only in CSV, JSON, the page's list of runs, exports and `why`

    @property
    def heading(self) -> str:
        """The title, with the unit where the title leaves it to the definition."""
        return f"{self.title} {self.unit}" if self.unit == "MiB" else self.title

    @property
    def relative(self) -> bool:
        """Whether two values are compared by their ratio; percentages are compared by their difference in points."""
        return self.unit != "%" or self.ratio

    def measure(self, of: RunResult | Prediction) -> Measurement:
        """The figure of one run, or what a probe predicted of it."""
        value = self.predict(of) if self.predict and isinstance(of, Prediction) else self.read(of)
        return value if isinstance(value, Measurement) else measured(value, self.missing)

    def value(self, result: RunResult) -> float | None:
        """The figure of one run; None where it was not measured."""
        return self._reading(result)[0]

    def _reading(self, result: RunResult) -> tuple[float | None, str | None]:
        """The figure of one run, and why there is none or what else is said of it."""
        value = self.read(result)
        if value is None or isinstance(value, int | float):  # to ask for a Measurement would take 20 times as long
            return value, self.missing if value is None else None
        return value.value, value.reason

    def summarise(self, results: Sequence[RunResult]) -> Figure:
        """The figure of a row, from its runs; a mean only where all of them have it."""
        readings = list(map(self._reading, results))
        values = [value for value, _ in readings if value is not None]
        reason = next((why for value, why in readings if value is None and why), None)
        remarks = tuple(said for value, said in readings if value is not None and said)
        if not values or (self.over_seeds == "mean" and len(values) < len(results)):
            return Figure(None, reason=reason)
        spread = std(values) if self.over_seeds == "mean" else None
        return Figure(COMBINE[self.over_seeds](values), spread, len(values), reason, remarks)

    def text(self, value: float | None) -> str:
        """A value as tables show it."""
        if value is None:
            return NONE
        scaled = value * self.scale
        return (figures(scaled) if self.digits is None else f"{scaled:,.{self.digits}f}") + self.suffix

    def summary(self, figure: Figure) -> str:
        """The figure of a row as tables show it: "8.31 ± 0.12"."""
        spread = f" ± {self.text(figure.std)}" if self.show_std and figure.std is not None else ""
        return self.text(figure.value) + spread


def decimals(value: float) -> int:
    """Digits after the point where three figures are significant; none for 0 and what is not finite."""
    return max(0, 2 - math.floor(math.log10(abs(value)))) if value and math.isfinite(value) else 0


def figures(value: float | None) -> str:
    """Three significant figures, never in powers of ten: 0.0123, 1.23, 12.3, 123, 12,345."""
    return NONE if value is None else f"{value or 0.0:,.{decimals(value)}f}"


LONG_NUMBER = re.compile(r"(?<![\w.])\d+\.\d{7,}(e[+-]?\d+)?(?![\w.])")


def rounded(text: str) -> str:
    """The text with six figures of each number that has many more: "lr=0.0037037", for people alone."""
    return LONG_NUMBER.sub(lambda number: f"{float(number[0]):.6g}", text)


def _make_metric(name: str, *, read: str = "", predict: str = "", **entry: Any) -> Metric:
    path, predicted = read or name, attrgetter(predict) if predict else None
    return Metric(
        name=name, record_name=path.rpartition(".")[2], read=attrgetter(path), predict=predicted, **entry
    )


_TEXT = Path(__file__).with_name("metrics.toml").read_text(encoding="utf-8")
METRICS = {name: _make_metric(name, **entry) for name, entry in tomllib.loads(_TEXT).items()}


def run_figures(result: RunResult) -> dict[str, float | None]:
    """Every metric of one run, by the names of the record."""
    return {metric.record_name: metric.value(result) for metric in METRICS.values()}
