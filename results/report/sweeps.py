"""Searches for better settings, as `harness tune` leaves them: trials.json -> a value, and its charts in Vega-Lite."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, ValidationError, model_validator

from harness.results.report.charts import FIGURE, VEGA_LITE, draw
from harness.results.report.text import clean
from harness.results.store import SWEEPS, Problem
from harness.results.values import Value

TRIALS = "trials.json"
METRICS = {
    "error": "error %",
    "top5_error": "top-5 error %",
    "loss": "training loss",
    "epoch_seconds": "s/epoch",
}
"""What can be made small, and its heading."""
MAX_DRAWN = 400  # trials in the plots, the best ones; more lines than that are one wood
RANGE = ("#3b7dd8", "#8a63d2", "#c2447d", "#e8743b")
"""From the best value to the worst: told apart on white and on black, and by the colour-blind."""
FAINT = 0.28  # a trial that did not come to its end
NUMBERS = ("loguniform", "uniform", "randint")


class SearchedField(Value):
    """One field's share of the space. `values`: lowest and highest, or all that could be chosen."""

    field: str
    function: Literal["loguniform", "uniform", "randint", "choice", "grid"]
    values: list[Any] = Field(min_length=1)
    log: bool = False


class SweepTrial(Value):
    """One point of the space. `curve`: (epoch, metric); `value`: of the whole run, None unless it is finished."""

    number: int
    run: str
    key: str
    fields: dict[str, Any]
    state: Literal["running", "finished", "pruned", "failed"]
    value: float | None
    last: float | None  # the metric as far as it is known
    epochs: int
    seconds: float
    reason: str = ""
    curve: list[tuple[int, float]] = Field(default_factory=list)


class FieldWeight(Value):
    """How much a field mattered for the metric, from 0 to 1, and which way."""

    field: str
    value: float
    sign: str


class Importance(Value):
    """Of each field, over `trials` trials at the last epoch that all of them reached."""

    how: str
    epoch: int
    trials: int
    fields: list[FieldWeight]


class SweepSummary(Value):
    """A whole trials.json. `importance`: None before the sweep's end, and where it cannot be told."""

    schema_version: Literal[1]
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
    dimensions: list[SearchedField] = Field(min_length=1)
    trials: list[SweepTrial]
    importance: Importance | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for trial in self.trials:
            for d in self.dimensions:
                if d.field not in trial.fields:
                    raise ValueError(f"trial {trial.number} has no {d.field}")
        for d in self.dimensions:
            if d.function in NUMBERS:
                seen = [*d.values, *(trial.fields[d.field] for trial in self.trials)]
                if wrong := [v for v in seen if not _is_number(v) or (d.log and v <= 0)]:
                    raise ValueError(f"{d.field} is {wrong[0]!r}, and {d.function} gives no such value")
                if len(d.values) != 2 or d.values[0] > d.values[1]:
                    raise ValueError(f"{d.field}: {d.values} are no bounds")
        return self

    @property
    def title(self) -> str:
        """msra-20, and what else a heading says."""
        return self.variant if self.depth is None else f"{self.variant}-{self.depth}"

    @property
    def heading(self) -> str:
        """The metric as a table calls it."""
        return METRICS.get(self.metric, clean(self.metric))

    @property
    def judged(self) -> str:
        """What the trials were judged by."""
        if self.metric in ("loss", "epoch_seconds"):
            return f"{self.heading} of the training set"
        if self.selected_on == "test":
            return f"{self.heading} of the TEST SET, by which the best was chosen"
        return f"{self.heading} of {self.val or 0:,} held-out training images"

    def best_first(self) -> list[SweepTrial]:
        """Whole runs by their value; then pruned and running ones, the longest first; failed ones last."""

        def rank(trial: SweepTrial) -> tuple[float, ...]:
            place = {"finished": 0, "running": 1, "pruned": 1}.get(trial.state, 2)
            last = finite(trial.last)
            last = math.inf if last is None else last
            return (place, last) if place == 0 else (place, -trial.epochs, last)

        return sorted(self.trials, key=rank)


class Sweeps(NamedTuple):
    """Every sweep found under some paths, and what could not be read."""

    sweeps: list[SweepSummary]
    problems: list[Problem]


def load_sweeps(paths: Iterable[Path]) -> Sweeps:
    """Read <path>/tune/*/trials.json, each once, by name. A broken one is a problem that names it."""
    found = Sweeps([], [])
    for path in sorted({file.resolve() for folder in paths for file in folder.glob(f"{SWEEPS}/*/{TRIALS}")}):
        try:
            found.sweeps.append(SweepSummary.model_validate(json.loads(path.read_bytes())))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            found.problems.append(Problem(path.parent, f"{TRIALS} is broken: {place + ': ' if place else ''}{first['msg']}"))  # fmt: skip
        except (OSError, ValueError, RecursionError) as error:
            found.problems.append(Problem(path.parent, f"{TRIALS} is broken: {error}"))
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def finite(value: float | None) -> float | None:
    """None for what is no number: a diverged trial's last loss."""
    return value if value is not None and math.isfinite(value) else None


def show(value: object) -> str:
    """A field's value as it is typed: 0.05, true, A, 90,135."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(map(show, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else clean(str(value))


# --- charts ---


def make_sweep_charts(sweep: SweepSummary) -> dict[str, tuple[str, dict[str, Any]]]:
    """Chart -> (caption, spec with its data): "parallel", then "slice-<field>" for each field.

    Empty where no trial has a value yet. Names of fields stand in titles alone, never where Vega reads a path or an
    expression.
    """
    drawn = [t for t in sweep.best_first() if t.state != "failed" and finite(t.last) is not None][:MAX_DRAWN]
    if not drawn:
        return {}
    caption = f"Every trial is a line through its values to its {sweep.heading}"
    faint = "; faint: a trial that was pruned, at the value it had come to"
    if all(trial.state == "finished" for trial in drawn):
        faint = ""
    if len(drawn) < len(sweep.trials):
        faint += f"; {len(sweep.trials) - len(drawn)} of {len(sweep.trials)} trials are not drawn: they have no value" + (
            f", or are not among the best {MAX_DRAWN}" if len(drawn) == MAX_DRAWN else ""
        )  # fmt: skip
    charts = {"parallel": (caption + faint, _parallel_spec(sweep, drawn))}
    for d in sweep.dimensions:
        said = f"{sweep.heading} against {clean(d.field)}{' on a log scale' if d.log else ''}"
        charts[f"slice-{clean(d.field)}"] = (said + faint, _slice_spec(sweep, d, drawn))
    return charts


def _colour(sweep: SweepSummary, drawn: Sequence[SweepTrial]) -> dict[str, Any]:
    """By value. Of the finished ones' range, where there is one: a trial pruned at 90 % would leave them one colour."""
    finished = [t.last for t in drawn if t.state == "finished" and t.last is not None]
    values = finished if len(set(finished)) > 1 else [t.last for t in drawn if t.last is not None]
    scale = {"domain": [min(values), max(values)], "range": list(RANGE), "clamp": True}
    return {"field": "value", "type": "quantitative", "scale": scale, "legend": None}


def _facts(sweep: SweepSummary, trial: SweepTrial) -> dict[str, Any]:
    """What the pointer is told of a trial."""
    fields = " · ".join(f"{clean(d.field)} {show(trial.fields[d.field])}" for d in sweep.dimensions)
    return {"trial": trial.number, "value": trial.last, "fields": fields, "whole": trial.state == "finished",
            "state": f"{trial.state} after {trial.epochs} of {sweep.epochs} epochs"}  # fmt: skip


# titles in a tooltip become part of an expression: no name stands there
TOOLTIP = [
    {"field": "trial", "type": "quantitative", "title": "trial", "format": "d"},
    {"field": "value", "type": "quantitative", "title": "value", "format": ",.4~g"},
    {"field": "fields", "type": "nominal", "title": "fields"},
    {"field": "state", "type": "nominal", "title": "state"},
]


def _opacity(whole: float) -> dict[str, Any]:
    return {"condition": {"test": "datum.whole", "value": whole}, "value": FAINT}


def _slice_spec(sweep: SweepSummary, d: SearchedField, drawn: Sequence[SweepTrial]) -> dict[str, Any]:
    x: dict[str, Any] = {"field": "x", "title": clean(d.field)}
    if d.function in NUMBERS:
        low, high = d.values
        bounds = [low, high] if low < high else [low - 0.5, low + 0.5] if not d.log else [low / 2, low * 2]
        x |= {"type": "quantitative", "scale": {"type": "log" if d.log else "linear", "domain": bounds, "nice": False},
              "axis": {"format": "~g", "tickCount": 6, "grid": False, "labelOverlap": True}}  # fmt: skip
    else:
        x |= {"type": "ordinal", "scale": {"type": "point", "padding": 0.5, "domain": list(dict.fromkeys(map(show, d.values)))},
              "sort": None, "axis": {"labelAngle": 0, "grid": False}}  # fmt: skip
    values = [
        {**_facts(sweep, t), "x": t.fields[d.field] if d.function in NUMBERS else show(t.fields[d.field])}
        for t in reversed(drawn)  # the best on top
    ]
    y = {"field": "value", "type": "quantitative", "title": sweep.heading,
         "scale": {"zero": False, "nice": True, "padding": 10}, "axis": {"tickCount": 6}}  # fmt: skip
    return {
        "data": {"values": values},
        "mark": {"type": "point", "filled": True, "size": 60},
        "encoding": {"x": x, "y": y, "color": _colour(sweep, drawn), "opacity": _opacity(0.9), "tooltip": TOOLTIP},
    }  # fmt: skip


class _Axis(NamedTuple):
    title: str
    places: list[float]  # of the trials, from 0 to 1
    ticks: list[tuple[float, str]]


def _parallel_spec(sweep: SweepSummary, drawn: Sequence[SweepTrial]) -> dict[str, Any]:
    """Vega-Lite has one scale a direction: every axis is brought to 0..1 here, its labels are marks."""
    axes = [_axis(d, [trial.fields[d.field] for trial in drawn]) for d in sweep.dimensions]
    lasts = [trial.last for trial in drawn if trial.last is not None]
    axes.append(_number_axis(sweep.heading, lasts, min(lasts), max(lasts), log=False))
    lines = [
        {**_facts(sweep, trial), "axis": j, "place": axis.places[i]}
        for i, trial in reversed(list(enumerate(drawn)))
        for j, axis in enumerate(axes)
    ]
    ticks = [
        {"axis": j, "place": place, "text": text} for j, axis in enumerate(axes) for place, text in axis.ticks
    ]
    heads = [{"axis": j, "text": axis.title, "place": 1.0} for j, axis in enumerate(axes)]
    x = {"field": "axis", "type": "quantitative", "axis": None,
         "scale": {"domain": [-0.45, len(axes) - 0.75], "nice": False, "zero": False}}  # fmt: skip
    y = {"field": "place", "type": "quantitative", "axis": None, "scale": {"domain": [0, 1], "nice": False}}
    colour = _colour(sweep, drawn)
    return {
        "encoding": {"x": x, "y": y},
        "layer": [
            {
                "data": {"values": heads},
                "mark": {"type": "rule", "color": "#8888", "strokeWidth": 1.2},
                "encoding": {"y": {"datum": 0, "type": "quantitative"}, "y2": {"datum": 1}},
            },
            {
                "data": {"values": lines},
                "mark": {"type": "line", "strokeWidth": 1.8, "strokeJoin": "round"},
                "encoding": {
                    "detail": {"field": "trial"}, "order": {"field": "axis", "type": "quantitative"}, "color": colour,
                    "strokeOpacity": _opacity(0.85), "tooltip": TOOLTIP,
                },
            },
            {
                "data": {"values": ticks},
                "mark": {"type": "text", "align": "right", "baseline": "middle", "dx": -6, "fontSize": 11},
                "encoding": {"text": {"field": "text"}},
            },
            {
                "data": {"values": heads},
                "mark": {"type": "text", "dy": -14, "fontSize": 12, "fontWeight": 600, "limit": 130},
                "encoding": {"text": {"field": "text"}},
            },
        ],
    }  # fmt: skip


def _axis(d: SearchedField, points: Sequence[Any]) -> _Axis:
    if d.function in NUMBERS:
        return _number_axis(clean(d.field), points, *d.values, log=d.log)
    names = list(dict.fromkeys(map(show, [*d.values, *points])))
    place = {name: k / (len(names) - 1) if len(names) > 1 else 0.5 for k, name in enumerate(names)}
    return _Axis(clean(d.field), [place[show(point)] for point in points], [(place[n], n) for n in names])


def _number_axis(title: str, points: Sequence[float], low: float, high: float, *, log: bool) -> _Axis:
    scale = math.log10 if log else float

    def place(value: float) -> float:
        share = (scale(value) - scale(low)) / (scale(high) - scale(low)) if high > low else 0.5
        return round(min(max(share, 0.0), 1.0), 5)

    marks = [low, high]
    if log:
        marks += [10.0**k for k in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    elif high > low:
        step = 10.0 ** math.floor(math.log10(high - low))
        step = next(s for s in (step / 5, step / 2, step, 2 * step, 5 * step) if (high - low) / s <= 6)
        marks += [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    ticks: list[tuple[float, str]] = []
    for mark in marks:  # the bounds first; round ones where there is room
        if all(abs(place(mark) - other) > 0.06 for other, _ in ticks):
            ticks.append((place(mark), f"{mark:.4g}"))
    return _Axis(title, [place(point) for point in points], sorted(ticks))


def _importance_chart(sweep: SweepSummary) -> dict[str, tuple[str, dict[str, Any]]]:
    """For files alone: the page has a table of it."""
    if sweep.importance is None:
        return {}
    how = sweep.importance
    values = [
        {"field": clean(f.field), "value": min(max(finite(f.value) or 0.0, 0.0), 1.0), "sign": clean(f.sign)}
        for f in how.fields
    ]
    y = {"field": "field", "type": "nominal", "sort": None, "title": None}
    x = {"field": "value", "type": "quantitative", "title": "importance", "scale": {"domain": [0, 1.25]},
         "axis": {"values": [0, 0.25, 0.5, 0.75, 1], "format": "~g", "grid": False}}  # fmt: skip
    spec = {
        "data": {"values": values},
        "encoding": {"x": x, "y": y},
        "layer": [
            {"mark": {"type": "bar", "color": RANGE[0], "height": {"band": 0.5}}},
            {"mark": {"type": "text", "align": "left", "dx": 6}, "encoding": {"text": {"field": "sign"}}},
        ],
    }
    said = (
        f"Importance of each field for {sweep.heading}; {clean(how.how)}, {how.trials} trials at epoch {how.epoch}"
    )
    return {"importance": (said, spec)}


# --- files ---


def write_sweep_charts(sweeps: Sequence[SweepSummary], folder: Path) -> list[Path]:
    """EpochSample every sweep's charts into a folder, as SVG and PNG: <sweep>-parallel.svg, <sweep>-slice-lr.svg and so on.

    Returns the files. Raises OSError where one cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    stems: set[str] = set()
    for sweep in sweeps:
        for chart, (caption, spec) in (make_sweep_charts(sweep) | _importance_chart(sweep)).items():
            stem = re.sub(r"[^A-Za-z0-9.+_]+", "-", f"{sweep.name[:80]}-{chart[:40]}").strip("-.") or "x"
            while stem in stems:
                stem += "-x"
            stems.add(stem)
            title: dict[str, Any] = {
                "text": f"{clean(sweep.title)} on {clean(sweep.dataset)}",
                "subtitle": caption.split("; "),
            }
            schema = f"https://vega.github.io/schema/vega-lite/v{VEGA_LITE}.json"
            if chart == "parallel":
                title["offset"] = 18  # the names of the axes stand above the plot
            size = {**FIGURE, "height": {"step": 44}} if chart == "importance" else FIGURE
            written += draw({"$schema": schema, **spec, **size, "title": title}, folder, stem)
    return written
