"""A sweep -> its charts: every trial as a line through its values, the metric against each field, importance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from harness.results.report.charts import AROUND_BARS, BAR, Chart, Panel, make_spec
from harness.results.report.text import clean
from harness.results.sweeps import Dimension, Sweep, Trial, best_first, format_value

MAX_DRAWN = 400  # trials, the best ones: more lines than that cannot be told apart
RANGE = ["#3b7dd8", "#8a63d2", "#c2447d", "#e8743b"]
"""From the best value to the worst: distinct on white, on black and for the colour-blind."""


def make_sweep_panel(sweep: Sweep) -> Panel:
    """Charts "parallel", "slice-<field>" for each field, and "importance"; none where no trial has a value yet.

    Names of fields stand in titles and values alone, never where Vega reads a path or an expression.
    """
    panel = Panel(f"{clean(sweep.title)} on {clean(sweep.dataset)}", clean(sweep.name), [], {})
    drawn = [t for t in best_first(sweep.trials) if t.state != "failed" and is_finite(t.last)][:MAX_DRAWN]
    if not drawn:
        return panel
    metric, lasts = clean(sweep.heading), [trial.last or 0.0 for trial in drawn]
    axes = [_Axis(d, [trial.fields[d.field] for trial in drawn]) for d in sweep.dimensions]
    axes.append(_Axis(Dimension(field=metric, function="uniform", values=(min(lasts), max(lasts))), lasts))
    # the best on top
    panel.datasets["trials"] = [_value(sweep, trial, axes) for trial in reversed(drawn)]

    faint = any(trial.state != "finished" for trial in drawn)
    note = "; faint: a trial that was pruned, at its last value" if faint else ""
    if missing := len(sweep.trials) - len(drawn):
        note += f"; {missing} of {len(sweep.trials)} trials are not drawn: they have no value"
        note += f", or are not among the best {MAX_DRAWN}" if len(drawn) == MAX_DRAWN else ""
    # over the finished ones, where they differ: a trial pruned at 90 % would leave them one colour
    finished = [trial.last or 0.0 for trial in drawn if trial.state == "finished"]
    ends = finished if len(set(finished)) > 1 else lasts
    scale = {"domain": [min(ends), max(ends)], "range": RANGE, "clamp": True}
    colour = {"field": "value", "type": "quantitative", "scale": scale, "legend": None}
    spec = make_spec(
        "parallel", colour=colour, axes=[-0.45, len(axes) - 0.75],
        heads=[{"axis": j, "place": 1.0, "text": axis.title} for j, axis in enumerate(axes)],
        ticks=[{"axis": j, "place": place, "text": text} for j, axis in enumerate(axes) for place, text in axis.ticks],
    )  # fmt: skip
    caption = f"Every trial is a line through its values to its {metric}"
    panel.charts.append(Chart("parallel", caption + note, spec, wide=True))
    for j, axis in enumerate(axes[:-1]):
        x = axis.encoding | {"field": f"x{j}", "title": axis.title}
        caption = f"{metric} against {axis.title}{' on a log scale' if axis.log else ''}"
        spec = make_spec("slice", x=x, metric=metric, colour=colour)
        panel.charts.append(Chart(f"slice-{axis.title}", caption + note, spec))
    if (weights := sweep.importance) is not None:
        panel.datasets["importance"] = [
            {"field": clean(f.field), "value": clamp(f.value), "sign": clean(f.sign), "chance": weights.null}
            for f in weights.fields
        ]
        caption = f"Importance of each field for {metric}; {clean(weights.heading)}"
        height = BAR * len(weights.fields) + AROUND_BARS
        panel.charts.append(Chart("importance", caption, make_spec("importance"), height=height, in_page=False))
    return panel


def is_finite(value: float | None) -> bool:
    """False also for the last loss of a trial that diverged."""
    return value is not None and math.isfinite(value)


def clamp(share: float) -> float:
    """Between 0 and 1; 0 where it is not a number."""
    return min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0


def _value(sweep: Sweep, trial: Trial, axes: Sequence[_Axis]) -> dict[str, Any]:
    own = [*(trial.fields[d.field] for d in sweep.dimensions), trial.last]
    shown = zip(axes, own[:-1], strict=False)
    return {
        "trial": trial.number, "value": trial.last, "whole": trial.state == "finished",
        "fields": " · ".join(f"{axis.title} {show(value)}" for axis, value in shown),
        "state": f"{trial.state} after {trial.epochs} of {sweep.epochs} epochs",
        "place": [axis.place(value) for axis, value in zip(axes, own, strict=True)],
        **{f"x{j}": value if axis.continuous else show(value) for j, (axis, value) in enumerate(zip(axes, own, strict=True))},
    }  # fmt: skip


def show(value: object) -> str:
    """A field's value to six figures."""
    return clean(format_value(value, exact=False))


class _Axis:
    """Where the values of one field stand. In the parallel chart, as Vega-Lite has one scale a direction, from 0 to 1."""

    def __init__(self, dimension: Dimension, values: Sequence[Any]) -> None:
        self.title, self.continuous, self.log = clean(dimension.field), dimension.continuous, dimension.log
        self.names = list(dict.fromkeys(map(show, [*dimension.values, *values])))
        self.low, self.high = dimension.values[0], dimension.values[-1]

    def place(self, value: Any) -> float:
        if not self.continuous:
            return self.names.index(show(value)) / (len(self.names) - 1) if len(self.names) > 1 else 0.5
        scale = math.log10 if self.log else float
        low, high = scale(self.low), scale(self.high)
        return round(clamp((scale(value) - low) / (high - low)), 5) if high > low else 0.5

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Places and labels: the bounds, and round values where there is room."""
        if not self.continuous:
            return [(self.place(name), name) for name in self.names]
        marks = [self.low, self.high]
        if self.log:
            powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            marks += [10.0**power for power in powers]
        elif (width := self.high - self.low) > 0:
            unit = 10.0 ** math.floor(math.log10(width))
            step = next(s for s in (unit / 5, unit / 2, unit, 2 * unit, 5 * unit) if width / s <= 6)
            marks += [k * step for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        ticks: list[tuple[float, str]] = []
        for mark in marks:
            if all(abs(self.place(mark) - other) > 0.06 for other, _ in ticks):
                ticks.append((self.place(mark), f"{mark:.4g}"))
        return sorted(ticks)

    @property
    def encoding(self) -> dict[str, Any]:
        """The x axis of its own chart, on the scale from which the values were drawn."""
        if not self.continuous:
            scale = {"type": "point", "padding": 0.5, "domain": self.names}
            return {"type": "ordinal", "scale": scale, "sort": None, "axis": {"labelAngle": 0, "grid": False}}
        bounds = [self.low, self.high]
        if self.low == self.high:
            bounds = [self.low / 2, self.high * 2] if self.log else [self.low - 0.5, self.high + 0.5]
        scale = {"type": "log" if self.log else "linear", "domain": bounds, "nice": False}
        axis = {"format": "~g", "tickCount": 6, "grid": False, "labelOverlap": True}
        return {"type": "quantitative", "scale": scale, "axis": axis}
