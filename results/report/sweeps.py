"""A sweep -> its charts: every trial as a line through its values, and the metric against each field."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from harness.results.report.charts import Chart, Panel, is_finite, make_panels, make_spec
from harness.results.report.text import clean
from harness.results.rows import Row
from harness.results.sweeps import Dimension, Sweep, best_first, format_value

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
    axes = [_make_axis(d, [trial.fields[d.field] for trial in drawn]) for d in sweep.dimensions]
    result = Dimension(field=metric, function="uniform", values=(min(lasts), max(lasts)))
    every = [*axes, _make_axis(result, lasts)]
    # over the finished ones, where they differ: a trial pruned at 90 % would leave them one colour
    finished = [trial.last or 0.0 for trial in drawn if trial.state == "finished"]
    ends = finished if len(set(finished)) > 1 else lasts
    width = max(ends) - min(ends) or 1.0
    panel.colours = {t.run: _blend((last - min(ends)) / width) for t, last in zip(drawn, lasts, strict=True)}
    panel.datasets["trials"] = [
        {
            "trial": trial.number, "value": trial.last, "whole": trial.state == "finished",
            "fields": " · ".join(f"{clean(name)} {show(value)}" for name, value in trial.fields.items()),
            "state": f"{trial.state} after {trial.epochs} of {sweep.epochs} epochs", "colour": panel.colours[trial.run],
            "place": [axis.places[i] for axis in every], **{f"x{j}": axis.values[i] for j, axis in enumerate(axes)},
        }
        for i, trial in reversed(list(enumerate(drawn)))  # the best on top
    ]  # fmt: skip
    note = "; faint: a trial that was pruned, at its last value" * any(t.state != "finished" for t in drawn)
    if missing := len(sweep.trials) - len(drawn):
        note += f"; {missing} of {len(sweep.trials)} trials are not drawn: they have no value"
        note += f", or are not among the best {MAX_DRAWN}" * (len(drawn) == MAX_DRAWN)
    heads = [{"axis": j, "place": 1.0, "text": axis.title} for j, axis in enumerate(every)]
    ticks = [{"axis": j, "place": at, "text": text} for j, axis in enumerate(every) for at, text in axis.ticks]
    spec = make_spec("parallel", axes=[-0.45, len(axes) + 0.25], heads=heads, ticks=ticks)
    panel.charts.append(Chart("parallel", f"Every trial is a line through its values to its {metric}{note}", spec))
    for j, (axis, d) in enumerate(zip(axes, sweep.dimensions, strict=True)):
        kind, scale = "numbers" if d.continuous else "words", "log" if d.log else "linear"
        x = make_spec(kind, field=f"x{j}", title=axis.title, scale=scale, ends=axis.ends)
        caption = f"{metric} against {axis.title}{' on a log scale' * d.log}{note}"
        spec = make_spec("slice", x=x, metric=metric, zero=len(set(lasts)) == 1)
        panel.charts.append(Chart(f"slice-{axis.title}", caption, spec))
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


def clamp(share: float) -> float:
    """Between 0 and 1; 0 where it is not a number."""
    return min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0


def show(value: object) -> str:
    """A field's value to six figures."""
    return clean(format_value(value, exact=False))


class _Axis(NamedTuple):
    """Where the values of one field stand. In the parallel chart from 0 to 1, as Vega-Lite has one scale a direction."""

    title: str
    ends: Sequence[Any]  # of the scale of its own chart, or all words
    values: Sequence[Any]  # of the trials
    places: Sequence[float]
    ticks: Sequence[tuple[float, str]]


def _make_axis(d: Dimension, values: Sequence[Any]) -> _Axis:
    title = clean(d.field)
    if not d.continuous:
        names, texts = list(dict.fromkeys(map(show, [*d.values, *values]))), list(map(show, values))
        at = {name: k / max(1, len(names) - 1) for k, name in enumerate(names)}
        return _Axis(title, names, texts, [at[text] for text in texts], [(k, name) for name, k in at.items()])
    low, high = map(float, d.values)
    scale: Callable[[float], float] = math.log if d.log else float
    middle = math.sqrt(low * high) if d.log else (low + high) / 2
    width = scale(high) - scale(low) or 1.0
    places = [round(clamp((scale(value) - scale(low)) / width), 5) for value in values]
    ticks = [(place, f"{value:.4g}") for place, value in ((0.0, low), (0.5, middle), (1.0, high))]
    return _Axis(title, (low, high), values, places, ticks if high > low else ticks[:1])
