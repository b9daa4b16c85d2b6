"""Every measured figure of a run, declared once.

The table, CSV, JSON, the page, `compare`, `why`, the DataFrame, exports and predictions take names, titles, units and
definitions from `METRICS`: a new figure is one entry here.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from harness.results.statistics import mean, median, std
from harness.results.values import Measurement, Memory, Prediction, RunResult

NONE = "–"


@dataclass(frozen=True, slots=True)
class Figure:
    """A metric over the runs of a row. `value` is None where too few runs measured it."""

    value: float | None
    std: float | None = None  # of a mean; None: one run, or another aggregation
    n: int = 0  # runs in which it was measured
    reason: str | None = None  # of the first run that did not measure it


UNKNOWN = Figure(None)
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
    read: Callable[[RunResult], float | Measurement | None]
    unit: Literal["%", "s", "images/s", "J", "MiB", ""] = "%"
    kind: Literal["size", "error", "time", "energy", "memory"] = "error"
    over_seeds: Literal["mean", "median", "rate", "max", "first"] = "mean"  # how the runs of a row are combined
    digits: int | None = 2  # after the point; None: three significant figures
    scale: float = 1.0  # from the unit to the one shown
    suffix: str = ""
    show_std: bool = True
    stored: str = ""  # the field of the record, where its name is another
    missing: str | None = None  # the reason, where the record holds a bare null
    predict: Callable[[Prediction], Measurement] | None = None  # by a probe
    better: Literal["lower", "higher"] | None = "lower"  # None: not compared
    margin: float | None = None  # `compare` calls two sides equivalent within it: points of a %, else percent
    device: Literal["cpu", "cuda"] | None = None  # the only one on which it is measured or shown
    in_table: bool = True  # False: only in CSV, JSON, the page's list of runs, exports and `why`

    @property
    def heading(self) -> str:
        """The title, with the unit where the title leaves it to the definition."""
        return f"{self.title} {self.unit}" if self.unit == "MiB" else self.title

    @property
    def record_name(self) -> str:
        """The name of its field in the record: the column of a DataFrame, the key in other tools."""
        return self.stored or self.name

    @property
    def relative(self) -> bool:
        """Whether two values are compared by their ratio; percentages are compared by their difference in points."""
        return self.unit != "%"

    def measure(self, result: RunResult) -> Measurement:
        value = self.read(result)
        if isinstance(value, Measurement):
            return value
        return Measurement(value=value, reason=self.missing if value is None else None)

    def value(self, result: RunResult) -> float | None:
        """The figure of one run; None where it was not measured."""
        value = self.read(result)
        return value.value if isinstance(value, Measurement) else value

    def summarise(self, results: Sequence[RunResult]) -> Figure:
        """The figure of a row, from its runs; a mean only where all of them have it."""
        values, reason = [], None
        for result in results:
            if (value := self.value(result)) is not None:
                values.append(value)
            else:
                reason = reason or self.measure(result).reason
        if not values or (self.over_seeds == "mean" and len(values) < len(results)):
            return Figure(None, reason=reason)
        return self.combine(values, reason)

    def combine(self, values: Sequence[float], reason: str | None = None) -> Figure:
        """The figure of a row, from those of its runs, of which there is one at least."""
        spread = std(values) if self.over_seeds == "mean" else None
        return Figure(COMBINE[self.over_seeds](values), spread, len(values), reason)

    def plain(self, figure: Figure) -> dict[str, float | None]:
        """As CSV and JSON have it, with the number of runs that measured it."""
        n = {f"{self.name}_n": figure.n}
        if self.over_seeds != "mean":
            return {self.name: figure.value} | n
        unit = {"%": "_percent"}.get(self.unit, "")
        return {f"{self.name}{unit}_mean": figure.value, f"{self.name}{unit}_std": figure.std} | n

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


def figures(value: float | None) -> str:
    """Three significant figures, never in powers of ten: 0.0123, 1.23, 12.3, 123, 12,345."""
    if value is None or not math.isfinite(value):
        return NONE if value is None else str(value)
    if value == 0:
        return "0"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _memory(
    name: str,
    title: str,
    means: str,
    read: Callable[[Memory], Measurement],
    device: Literal["cpu", "cuda"] = "cuda",
) -> Metric:
    return Metric(
        name=name, title=title, means=f"MiB, {means}", unit="MiB", kind="memory", device=device, over_seeds="max", digits=0,
        read=lambda result: read(result.memory), predict=lambda prediction: read(prediction.memory),
    )  # fmt: skip


ON_TEST_SET = "of the test set after the last epoch, where the other errors are of images held out"
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(name="parameters", title="params", means="trainable parameters", read=lambda r: r.parameters,
               kind="size", over_seeds="first", better=None, scale=1e-6, digits=2, suffix="M"),
        Metric(name="error", title="error %", means="top-1 after the last epoch, mean ± std (n − 1) over the seeds",
               read=lambda r: r.final_error, stored="final_error", margin=0.2),
        Metric(name="accuracy", title="accuracy %", means="100 minus the error", read=lambda r: 100 - r.final_error,
               better=None, in_table=False),
        Metric(name="best_error", title="best %", means="mean of each run's best epoch", read=lambda r: r.best_error,
               show_std=False),
        Metric(name="best_epoch", title="best epoch", means="the epoch with the smallest error, median over the runs",
               read=lambda r: r.best_epoch, unit="", over_seeds="median", digits=0, better=None, in_table=False),
        Metric(name="top5_error", title="top-5 %", means="top-5 after the last epoch",
               read=lambda r: r.final_top5_error, stored="final_top5_error"),
        Metric(name="test_error", title="test %", means=f"top-1 {ON_TEST_SET}", read=lambda r: r.test_error),
        Metric(name="test_accuracy", title="test accuracy %", means="100 minus the test error", better=None,
               read=lambda r: None if r.test_error is None else 100 - r.test_error, in_table=False),
        Metric(name="test_top5_error", title="test top-5 %", means=f"top-5 {ON_TEST_SET}",
               read=lambda r: r.test_top5_error, in_table=False),
        Metric(name="epoch_seconds", title="s/epoch", unit="s", kind="time", over_seeds="median", digits=None,
               means="training only, median over the epochs after warm-up, then over the runs; in brackets how many epochs "
               "were timed, the fastest and the slowest (of early records, the fastest and the slowest run); evaluation, "
               "set-up and compilation are left out", read=lambda r: r.epoch_seconds, missing="no epoch was timed", margin=5.0,
               predict=lambda p: Measurement(value=p.epoch_seconds)),
        Metric(name="images_per_second", title="img/s", unit="images/s", kind="time", over_seeds="rate", digits=None,
               means="of all workers, over the same epochs and runs", missing="no epoch was timed", better="higher",
               read=lambda r: None if r.epoch_seconds is None else r.images_per_second),
        Metric(name="data_stall_percent", title="data wait %", kind="time", over_seeds="median", digits=1,
               means="share of the training time spent waiting for the loader", read=lambda r: r.data_stall_percent),
        Metric(name="eval_seconds", title="eval s", unit="s", kind="time", over_seeds="median", digits=None,
               means="one evaluation, median over the epochs, then over the runs", read=lambda r: r.eval_seconds,
               missing="no epoch was timed", in_table=False, predict=lambda p: Measurement(value=p.eval_seconds)),
        Metric(name="setup_seconds", title="set-up s", unit="s", kind="time", over_seeds="median", digits=None,
               means="from entering the train function to the first training step, median over the runs",
               read=lambda r: r.setup_seconds, in_table=False),
        Metric(name="launch_seconds", title="launch s", unit="s", kind="time", over_seeds="median", digits=None,
               means="from submitting the run to entering the train function, median over the runs",
               read=lambda r: r.launch_seconds, in_table=False),
        Metric(name="train_seconds", title="training s", unit="s", kind="time", over_seeds="median", digits=None,
               means="training only, all epochs, median over the runs", read=lambda r: r.train_seconds, in_table=False),
        Metric(name="energy_joules", title="kJ", unit="J", kind="energy", over_seeds="median", digits=None, scale=1e-3,
               means="energy of all GPUs while a run trained, by NVML's counter; median over the runs",
               read=lambda r: r.energy_joules, device="cuda", predict=lambda p: p.run_joules),
        _memory("torch_allocated_mib", "alloc", "torch.cuda.max_memory_allocated: tensors alive at the peak",
                lambda m: m.torch_allocated_mib),
        _memory("torch_reserved_mib", "resvd", "torch.cuda.max_memory_reserved: the same with the allocator's slack",
                lambda m: m.torch_reserved_mib),
        _memory("nvml_process_mib", "NVML", "all the process holds on the GPU: with CUDA context, NCCL and DALI",
                lambda m: m.nvml_process_mib),
        _memory("rss_mib", "RSS", "peak resident memory on the host", lambda m: m.rss_mib, device="cpu"),
    )
}  # fmt: skip


def run_figures(result: RunResult) -> dict[str, float | None]:
    """Every metric of one run, by the names of the record."""
    return {metric.record_name: metric.value(result) for metric in METRICS.values()}


def suggest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word."""
    close = difflib.get_close_matches(word, known := list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
