"""A sweep -> its charts: every trial as a line through its values, and the metric against each field."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from harness.results.report.charts import Chart, Panel, make_panels, make_spec
from harness.results.report.text import clean
from harness.results.rows import Row
from harness.results.sweeps import Dimension, Sweep, Trial, best_first, format_value

MAX_DRAWN = 400  # trials, the best ones: more lines than that cannot be told apart
RANGE = ["#3b7dd8", "#8a63d2", "#c2447d", "#e8743b"]
"""From the best value to the worst: distinct on white, on black and for the colour-blind."""


def make_sweep_panel(sweep: Sweep) -> Panel:
    """Charts "parallel", and "slice-<field>" for each field; none where no trial has a value yet.

    Names of fields stand in titles and values alone, never where Vega reads a path or an expression.
    """
    panel = Panel(f"{clean(sweep.title)} on {clean(sweep.dataset)}", clean(sweep.name))
    drawn = [t for t in best_first(sweep.trials) if t.state != "failed" and is_finite(t.last)][:MAX_DRAWN]
    if not drawn:
        return panel
    metric, lasts = clean(sweep.heading), [trial.last or 0.0 for trial in drawn]
    axes = [_Axis(d, [trial.fields[d.field] for trial in drawn]) for d in sweep.dimensions]
    last = _Axis(Dimension(field=metric, function="uniform", values=(min(lasts), max(lasts))), lasts)
    # the best on top
    panel.datasets["trials"] = [_value(sweep, trial, axes, last) for trial in reversed(drawn)]

    faint = any(trial.state != "finished" for trial in drawn)
    note = "; faint: a trial that was pruned, at its last value" if faint else ""
    if missing := len(sweep.trials) - len(drawn):
        note += f"; {missing} of {len(sweep.trials)} trials are not drawn: they have no value"
        note += f", or are not among the best {MAX_DRAWN}" if len(drawn) == MAX_DRAWN else ""
    # over the finished ones, where they differ: a trial pruned at 90 % would leave them one colour
    finished = [trial.last or 0.0 for trial in drawn if trial.state == "finished"]
    ends = finished if len(set(finished)) > 1 else lasts
    low, width = min(ends), max(ends) - min(ends) or 1.0
    for value, trial in zip(panel.datasets["trials"], reversed(drawn), strict=True):
        value["colour"] = panel.colours[trial.run] = _blend((value["value"] - low) / width)
    columns = list(enumerate([*axes, last]))
    heads = [{"axis": j, "place": 1.0, "text": axis.title} for j, axis in columns]
    ticks = [{"axis": j, "place": place, "text": text} for j, axis in columns for place, text in axis.ticks]
    spec = make_spec("parallel", axes=[-0.45, len(axes) + 0.25], heads=heads, ticks=ticks)
    caption = f"Every trial is a line through its values to its {metric}"
    panel.charts.append(Chart("parallel", caption + note, spec, wide=True))
    for j, axis in enumerate(axes):
        x = axis.encoding | {"field": f"x{j}", "title": axis.title}
        caption = f"{metric} against {axis.title}{' on a log scale' if axis.log else ''}"
        spec = make_spec("slice", x=x, metric=metric)
        panel.charts.append(Chart(f"slice-{axis.title}", caption + note, spec))
    return panel


def draw_all(
    rows: Sequence[Row], sweeps: Sequence[Sweep], labels: Sequence[str] = ()
) -> tuple[list[Panel], list[Panel]]:
    """The charts of data sets and of sweeps; a trial has the same colour in all."""
    searches = [make_sweep_panel(sweep) for sweep in sweeps]
    colours = {run: colour for panel in searches for run, colour in panel.colours.items()}
    return make_panels(rows, labels, colours), searches


def _blend(share: float) -> str:
    """The colour at a share of the way from the best value to the worst."""
    place = clamp(share) * (len(RANGE) - 1)
    k = min(int(place), len(RANGE) - 2)
    ends = zip(*(bytes.fromhex(colour[1:]) for colour in RANGE[k : k + 2]), strict=True)
    return "#" + bytes(round(a + (b - a) * (place - k)) for a, b in ends).hex()


def is_finite(value: float | None) -> bool:
    """False also for the last loss of a trial that diverged."""
    return value is not None and math.isfinite(value)


def clamp(share: float) -> float:
    """Between 0 and 1; 0 where it is not a number."""
    return min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0


def show(value: object) -> str:
    """A field's value to six figures."""
    return clean(format_value(value, exact=False))


def _value(sweep: Sweep, trial: Trial, axes: Sequence[_Axis], last: _Axis) -> dict[str, Any]:
    own = [(axis, trial.fields[d.field]) for axis, d in zip(axes, sweep.dimensions, strict=True)]
    return {
        "trial": trial.number, "value": trial.last, "whole": trial.state == "finished",
        "fields": " · ".join(f"{axis.title} {show(value)}" for axis, value in own),
        "state": f"{trial.state} after {trial.epochs} of {sweep.epochs} epochs",
        "place": [axis.place(axis.scale(value)) for axis, value in [*own, (last, trial.last)]],
        **{f"x{j}": value if axis.continuous else show(value) for j, (axis, value) in enumerate(own)},
    }  # fmt: skip


class _Axis:
    """Where the values of one field stand. In the parallel chart, as Vega-Lite has one scale a direction, from 0 to 1."""

    def __init__(self, dimension: Dimension, values: Sequence[Any]) -> None:
        self.title, self.continuous, self.log = clean(dimension.field), dimension.continuous, dimension.log
        self.names = list(dict.fromkeys(map(show, [*dimension.values, *values])))
        self.values = dimension.values
        ends: Sequence[Any] = self.values if self.continuous else self.names
        self.low, self.high = self.scale(ends[0]), self.scale(ends[-1])

    def scale(self, value: Any) -> float:
        """A number for a value: its logarithm, or its place among the words."""
        if not self.continuous:
            return self.names.index(show(value))
        return math.log10(value) if self.log else float(value)

    def place(self, scaled: float) -> float:
        width = self.high - self.low
        return round(clamp((scaled - self.low) / width), 5) if width > 0 else 0.5

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Places and labels: the bounds, and round values where there is room."""
        if not self.continuous:
            return [(self.place(k), name) for k, name in enumerate(self.names)]
        unit = 10.0 ** math.floor(math.log10(self.high - self.low or 1.0))
        steps = (unit / 5, unit / 2, unit, 2 * unit, 5 * unit)
        step = 1.0 if self.log else next(s for s in steps if (self.high - self.low) / s <= 6)
        rounded = [k * step for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        ticks: dict[float, str] = {}
        for mark in (self.low, self.high, *rounded):
            if all(abs(self.place(mark) - other) > 0.06 for other in ticks):
                ticks[self.place(mark)] = f"{10**mark if self.log else mark:.4g}"
        return sorted(ticks.items())

    @property
    def encoding(self) -> dict[str, Any]:
        """The x axis of its own chart, on the scale from which the values were drawn."""
        if not self.continuous:
            scale = {"type": "point", "padding": 0.5, "domain": self.names}
            return {"type": "ordinal", "scale": scale, "sort": None, "axis": {"labelAngle": 0, "grid": False}}
        low, high = float(self.values[0]), float(self.values[-1])
        if low == high:
            low, high = (low / 2, high * 2) if self.log else (low - 0.5, high + 0.5)
        scale = {"type": "log" if self.log else "linear", "domain": [low, high], "nice": False}
        axis = {"format": "~g", "tickCount": 6, "grid": False, "labelOverlap": True}
        return {"type": "quantitative", "scale": scale, "axis": axis}
