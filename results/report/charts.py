"""Rows -> charts, in Vega-Lite: error over epochs, whole and zoomed, and the frontier of error against cost.

The page in the browser and the PNG and SVG files are drawn from the same specs. They are written as plain values:
building them through a library takes longer than everything else that a page needs.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from harness.results.report import memory as categories
from harness.results.report.table import Layout, lay_out
from harness.results.report.text import clean
from harness.results.rows import Row
from harness.results.statistics import mean
from harness.results.store import Interrupted, Stored, load_epochs
from harness.results.values import EpochMetrics

MAX_RUNS = 200
"""Whose epochs are read for one page; more curves than that are one grey wood."""

PALETTE = (
    "#3b7dd8", "#e8743b", "#2a9d6f", "#c2447d", "#8a63d2", "#d1a01f", "#20a4b8", "#d84c4c", "#7a9a34", "#8d7b68",
)  # fmt: skip
"""Told apart on white and on black, and the first four by the colour-blind."""
DASHES: tuple[tuple[int, ...], ...] = ((1, 0), (7, 3), (2, 2), (10, 3, 2, 3))
SHAPES = ("circle", "square", "triangle-up", "diamond")
"""Colour tells networks apart; dash and shape the conditions that one network was trained under."""

MAX_LEGEND = 40  # names beside a chart in a file
FIGURE = {"width": 620, "height": 380}
VEGA_LITE = "6.4"


@dataclass(frozen=True, slots=True)
class Curve:
    """Error over epochs, in percent: of a row's finished runs, or of one run that did not finish."""

    row: int
    runs: int
    epochs: list[int]
    mean: list[float]
    low: list[float]  # smallest and largest of the runs
    high: list[float]
    unfinished: bool = False


@dataclass(frozen=True, slots=True)
class Point:
    """A row's place on the frontier chart: error against a cost. `best`: no other row is better in both."""

    row: int
    cost: float
    error: float
    std: float | None
    best: bool


class Style(NamedTuple):
    """How a row looks in all charts."""

    colour: str
    dash: tuple[int, ...]
    shape: str


@dataclass(frozen=True, slots=True)
class Panel:
    """The charts of one data set: specs without data, and the data."""

    title: str
    labels: dict[int, str]  # row -> name in the charts, all different
    styles: dict[int, Style]
    curves: list[Curve]
    points: dict[str, list[Point]]  # chart -> its points
    specs: dict[str, dict[str, Any]]  # chart -> spec, reading the data set "curves" or "points"
    captions: dict[str, str]
    categories: dict[
        int, dict[str, float]
    ]  # row -> who holds how much of its memory, MiB; those of the chart "categories"
    left_out: int  # rows whose curves are not shown


def make_panels(rows: Sequence[Row], labels: Sequence[str] = ()) -> list[Panel]:
    """Charts for every data set that has a finished run or a curve. Reads the epochs of `MAX_RUNS` runs at most.

    `labels` are `make_labels(rows)`, where they are at hand.
    """
    labels = labels or make_labels(rows)
    chosen = _choose(rows)
    panels: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        panels[row.dataset, row.evaluated_on].append(i)
    made = [_make_panel(rows, labels, members, chosen) for members in panels.values()]
    return [panel for panel in made if panel.specs]


def make_labels(rows: Sequence[Row], layout: Layout | None = None) -> list[str]:
    """A name for each row, all different: variant-depth and whatever else tells it from the others.

    `layout` is `lay_out(rows)`, where it is at hand.
    """
    if not rows:
        return []
    layout = layout or lay_out(rows)
    telling = [
        column.name
        for column in layout.columns
        if not column.stays and column.name not in ("number", "dataset") and column.name in DESCRIBING
    ]
    labels: list[str] = []
    met: dict[str, int] = defaultdict(int)
    for i, row in enumerate(rows):
        words = [layout.words[name][i] for name in telling]
        label = " · ".join([clean(row.name), *(word for word in words if word != "–")])
        met[label] += 1
        labels.append(label if met[label] == 1 else f"{label} ({met[label]})")
    return labels


DESCRIBING = {
    "limit_train", "duration", "overrides", "loader", "precision", "engine", "width", "device", "differs",
}  # fmt: skip


def _choose(rows: Sequence[Row]) -> set[int]:
    """The rows whose curves are shown: all, or those with the smallest error."""

    def error(i: int) -> float:
        sample = rows[i].error
        return sample.mean if sample and math.isfinite(sample.mean) else math.inf

    chosen: set[int] = set()
    runs = 0
    for i in sorted(range(len(rows)), key=error):
        runs += len(rows[i].done) + len(rows[i].failed) + len(rows[i].pruned) + len(rows[i].interrupted)
        if runs > MAX_RUNS and chosen:
            break
        chosen.add(i)
    return chosen


def _make_panel(rows: Sequence[Row], labels: Sequence[str], members: Sequence[int], chosen: set[int]) -> Panel:
    curves = [curve for i in members if i in chosen for curve in _load_curves(i, rows[i])]
    first = rows[members[0]]
    names = {i: labels[i] for i in members}
    styles = _make_styles(names)
    scale = _Scale(list(names.values()), list(styles.values()))
    title = "test error, %" if first.evaluated_on == "test" else "error of held-out images, %"
    specs: dict[str, dict[str, Any]] = {}
    captions: dict[str, str] = {}
    points: dict[str, list[Point]] = {}
    if curves:
        whole, zoom = _domains(curves)
        specs["curves"] = _curves_spec(scale, title, *whole, clip=False)
        captions["curves"] = "Error after each epoch" + (
            ": mean of the seeds, band from the smallest to the largest" if any(c.runs > 1 for c in curves) else ""
        )
        if any(curve.unfinished for curve in curves):
            captions["curves"] += "; dotted: a run that did not finish"
        if zoom:
            specs["zoom"] = _curves_spec(scale, title, *zoom, clip=True)
            captions["zoom"] = f"The same from epoch {zoom[0][0]}, up to {zoom[1][1]:g} %"
    for name, (field, what) in {
        "seconds": ("epoch_seconds", "seconds per epoch"),
        "memory": _memory(rows, members),
    }.items():
        if found := _points(rows, members, field):
            points[name] = found
            specs[name] = _frontier_spec(scale, title, what, labelled=len(found) <= 24)
            captions[name] = f"Error against {what}; the line joins rows that no other row beats in both"
    held = {i: categories.known(rows[i].by_category_mib) for i in categories.choose(rows, members)}
    if held:
        of = (
            "GPU memory of the process"
            if rows[next(iter(held))].fields.get("device") == "cuda"
            else "resident memory"
        )
        labelled = [names[i] for i in held]
        specs["categories"] = categories.categories_spec(categories.colours(held), labelled, f"{of}, MiB")
        captions["categories"] = (
            f"Who holds the {of}: of the run of a row that used most; the tick is what was measured"
        )
        if any(value < 0 for parts in held.values() for value in parts.values()):
            captions["categories"] += "; left of zero: what the categories count twice"
        if len(held) == categories.MAX_BARS:
            captions["categories"] += f"; the {categories.MAX_BARS} rows with the smallest error"
    shown = {curve.row for curve in curves}
    left_out = sum(1 for i in members if rows[i].done and i not in shown) if len(chosen) < len(rows) else 0
    return Panel(clean(first.dataset), names, styles, curves, points, specs, captions, held, left_out)


def _make_styles(names: Mapping[int, str]) -> dict[int, Style]:
    """Colours by network, "msra-20", dashes and shapes by what follows it; colours alone where one of them is enough."""
    networks = {name: k for k, name in enumerate(dict.fromkeys(map(_network, names.values())))}
    rest = {name: k for k, name in enumerate(dict.fromkeys(name.partition(" · ")[2] for name in names.values()))}
    styles = {}
    for i, name in names.items():
        network, _, conditions = name.partition(" · ")
        k, j = (networks[network], rest[conditions]) if len(networks) > 1 else (rest[conditions], 0)
        j += k // len(PALETTE)
        styles[i] = Style(PALETTE[k % len(PALETTE)], DASHES[j % len(DASHES)], SHAPES[j % len(SHAPES)])
    return styles


# --- data ---


def _load_curves(i: int, row: Row) -> Iterator[Curve]:
    finished = [epochs for stored in row.done if (epochs := _epochs(stored))]
    if finished:
        by_epoch = [{e.epoch: e.error for e in epochs if math.isfinite(e.error)} for epochs in finished]
        common = sorted(set.intersection(*map(set, by_epoch)))
        columns = [[errors[epoch] for errors in by_epoch] for epoch in common]
        if common:
            yield Curve(
                i,
                len(finished),
                common,
                list(map(mean, columns)),
                list(map(min, columns)),
                list(map(max, columns)),
            )
    unfinished: list[Stored | Interrupted] = [*row.failed, *row.pruned, *row.interrupted]
    for partial in unfinished:
        if epochs := [e for e in _epochs(partial) if math.isfinite(e.error)]:
            errors = [e.error for e in epochs]
            yield Curve(i, 1, [e.epoch for e in epochs], errors, errors, errors, unfinished=True)


def _epochs(run: Stored | Interrupted) -> list[EpochMetrics]:
    """None where they cannot be read: the table stands on the record, and `harness why` names the fault."""
    try:
        return load_epochs(run.folder)
    except (OSError, ValueError):
        return []


def _domains(
    curves: Sequence[Curve],
) -> tuple[tuple[list[int], list[float]], tuple[list[int], list[float]] | None]:
    """Bounds of epochs and errors, whole and zoomed: the second half, cut above twice the largest final error."""
    last = max(curve.epochs[-1] for curve in curves)
    top = max(max(curve.high) for curve in curves)
    whole = ([min(1, last), max(last, 2)], [0.0, _round_up(top)])
    finished = [curve for curve in curves if not curve.unfinished]
    half = last // 2 + 1
    inside = [
        (low, high)
        for curve in finished
        for epoch, low, high in zip(curve.epochs, curve.low, curve.high, strict=True)
        if epoch >= half
    ]
    if last < 4 or not inside:
        return whole, None
    lowest, highest = min(low for low, _ in inside), max(high for _, high in inside)
    highest = min(highest, 2 * max(curve.high[-1] for curve in finished))
    margin = 0.05 * (highest - lowest) or 0.5
    step = 10.0 ** math.floor(math.log10(margin))
    bottom = max(0.0, math.floor((lowest - margin) / step) * step)
    return whole, ([half, last], [round(bottom, 6), round(math.ceil((highest + margin) / step) * step, 6)])


def _round_up(value: float) -> float:
    if value <= 0:
        return 1.0
    step = 10.0 ** math.floor(math.log10(value)) / 2
    return round(math.ceil(value / step) * step, 6)


MEMORIES = {
    "nvml_process_mib": "GPU memory of the process (NVML), MiB",
    "torch_reserved_mib": "GPU memory reserved by torch, MiB",
    "rss_mib": "peak resident memory on the host, MiB",
}


def _memory(rows: Sequence[Row], members: Sequence[int]) -> tuple[str, str]:
    """The first figure that all of these rows have, else the one that most have."""

    def missing(field: str) -> int:
        return sum(getattr(rows[i], field).value is None for i in members if rows[i].done)

    field = min(MEMORIES, key=missing)
    return field, MEMORIES[field]


def _points(rows: Sequence[Row], members: Sequence[int], field: str) -> list[Point]:
    found: list[tuple[int, float, float, float | None]] = []
    for i in members:
        value, error = getattr(rows[i], field), rows[i].error
        cost = value if isinstance(value, float | int | None) else value.value
        if cost is not None and error is not None and math.isfinite(cost) and math.isfinite(error.mean):
            found.append((i, cost, error.mean, error.std))
    best, lowest = set(), math.inf
    for i, _, error_mean, _ in sorted(found, key=lambda f: (f[1], f[2])):
        if error_mean < lowest:
            best.add(i)
            lowest = error_mean
    return [Point(i, cost, error_mean, std, i in best) for i, cost, error_mean, std in found]


def curve_values(panel: Panel) -> list[dict[str, Any]]:
    """The curves as Vega reads them, one value an epoch."""
    return [
        {"row": panel.labels[c.row], "epoch": epoch, "mean": middle, "low": low, "high": high,
         "unfinished": c.unfinished, "curve": k}
        for k, c in enumerate(panel.curves)
        for epoch, middle, low, high in zip(c.epochs, c.mean, c.low, c.high, strict=True)
    ]  # fmt: skip


def point_values(panel: Panel, chart: str) -> list[dict[str, Any]]:
    """The points of a frontier chart as Vega reads them. The name stands beside the cheapest row of a network alone."""
    cheapest: dict[str, Point] = {}
    for point in sorted(panel.points[chart], key=lambda point: point.cost):
        cheapest.setdefault(_network(panel.labels[point.row]), point)
    return [
        {"row": panel.labels[p.row],
         "name": _network(panel.labels[p.row]) if cheapest[_network(panel.labels[p.row])] is p else "", "cost": p.cost, "error": p.error,
         "low": p.error - (p.std or 0), "high": p.error + (p.std or 0), "best": p.best}
        for p in panel.points[chart]
    ]  # fmt: skip


def _network(label: str) -> str:
    return label.partition(" · ")[0]


# --- specs ---


@dataclass(frozen=True, slots=True)
class _Scale:
    labels: list[str]
    styles: list[Style]

    def by(self, values: list[Any]) -> dict[str, Any]:
        """An encoding that gives each row its value."""
        scale = {"domain": self.labels, "range": values}
        return {"field": "row", "type": "nominal", "scale": scale, "legend": None}

    @property
    def colour(self) -> dict[str, Any]:
        return self.by([style.colour for style in self.styles])

    @property
    def dash(self) -> dict[str, Any]:
        return self.by([list(style.dash) for style in self.styles])

    @property
    def shape(self) -> dict[str, Any]:
        return self.by([style.shape for style in self.styles])


def _lit(value: float) -> dict[str, Any]:
    """Fainter where another row is pointed at."""
    return {"condition": {"test": "lit === null || datum.row === lit", "value": value}, "value": value * 0.12}


PARAMS = [{"name": "hidden", "value": []}, {"name": "lit", "value": None}]
SEEN = [{"filter": "indexof(hidden, datum.row) < 0"}]


def _epoch_ticks(first: float, last: float) -> list[int]:
    """At most ten or so whole epochs, round ones."""
    steps = (size * 10**power for power in range(7) for size in (1, 2, 5))
    step = next(step for step in steps if (last - first) / step <= 10)
    return list(range(math.ceil(first / step) * step, math.floor(last) + 1, step))


def _curves_spec(
    scale: _Scale, title: str, epochs: Sequence[int], errors: Sequence[float], *, clip: bool
) -> dict[str, Any]:
    y_scale = {"domain": list(errors), "zero": False, "nice": False}
    y = {"type": "quantitative", "title": title, "scale": y_scale, "axis": {"tickCount": 7}}
    x = {"field": "epoch", "type": "quantitative", "title": "epoch",
         "scale": {"domain": list(epochs), "nice": False}, "axis": {"format": "d", "grid": False, "values": _epoch_ticks(*epochs)}}  # fmt: skip
    mean_of = {"field": "mean", **y}
    shared = {"color": scale.colour, "detail": {"field": "curve"}}
    return {
        "data": {"name": "curves"},
        "params": [*PARAMS, {"name": "at", "value": 0}],
        "transform": SEEN,
        "encoding": {"x": x},
        "layer": [
            {
                "transform": [{"filter": "!datum.unfinished && datum.low < datum.high"}],
                "mark": {"type": "area", "clip": clip, "line": False},
                "encoding": {"y": {"field": "low", **y}, "y2": {"field": "high"}, "fillOpacity": _lit(0.18),
                             **shared},
            },
            {
                "transform": [{"filter": "!datum.unfinished"}],
                "mark": {"type": "line", "clip": clip, "strokeWidth": 1.8, "strokeJoin": "round"},
                "encoding": {"y": mean_of, "strokeDash": scale.dash, "strokeOpacity": _lit(1.0), **shared},
            },
            {
                "transform": [{"filter": "datum.unfinished"}],
                "mark": {"type": "line", "clip": clip, "strokeWidth": 1.2, "strokeDash": [1, 3], "strokeCap": "round"},
                "encoding": {"y": mean_of, "strokeOpacity": _lit(1.0), **shared},
            },
            {
                "transform": [{"filter": "datum.epoch === at"}],
                "mark": {"type": "circle", "clip": clip, "size": 36},
                "encoding": {"y": mean_of, "opacity": _lit(1.0), **shared},
            },
            {
                "data": {"values": [{}]},  # one rule, not one a value
                "mark": {"type": "rule", "clip": clip, "color": "#8888", "opacity": {"expr": "at > 0 ? 1 : 0"}},
                # hidden, it stands inside the plot: outside, it would take its room
                "encoding": {"x": {"datum": {"expr": f"at > 0 ? at : {epochs[0]}"}, "type": "quantitative"}},
            },
        ],
    }  # fmt: skip


def _frontier_spec(scale: _Scale, title: str, what: str, *, labelled: bool) -> dict[str, Any]:
    x = {
        "field": "cost",
        "type": "quantitative",
        "title": what,
        "scale": {"zero": True, "nice": True},
        "axis": {"tickCount": 8},
    }
    y = {
        "type": "quantitative",
        "title": title,
        "scale": {"zero": False, "nice": True, "padding": 12},
        "axis": {"tickCount": 7},
    }
    error = {"field": "error", **y}
    tooltip = [
        {"field": "row", "type": "nominal", "title": "row"},
        {"field": "error", "type": "quantitative", "title": title, "format": ".2f"},
        {"field": "cost", "type": "quantitative", "title": what, "format": ",.4~g"},
    ]
    text = {} if labelled else {"transform": [{"filter": "datum.best"}]}
    return {
        "data": {"name": "points"},
        "params": PARAMS,
        "transform": SEEN,
        "encoding": {"x": x},
        "layer": [
            {
                "transform": [{"filter": "datum.best"}],
                "mark": {"type": "line", "interpolate": "step-after", "color": "#8888", "strokeWidth": 1.2,
                         "strokeDash": [4, 3]},
                "encoding": {"y": error, "order": {"field": "cost", "type": "quantitative"}},
            },
            {
                "transform": [{"filter": "datum.low < datum.high"}],
                "mark": {"type": "rule", "strokeWidth": 1.4},
                "encoding": {"y": {"field": "low", **y}, "y2": {"field": "high"}, "color": scale.colour,
                             "opacity": _lit(0.7)},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 70},
                "encoding": {"y": error, "color": scale.colour, "shape": scale.shape, "opacity": _lit(1.0),
                             "tooltip": tooltip},
            },
            {
                **text,
                "mark": {"type": "text", "align": "right", "dx": -8, "dy": -7, "fontSize": 11},
                "encoding": {"y": error, "text": {"field": "name"}, "opacity": _lit(1.0)},
            },
        ],
    }  # fmt: skip


# --- files ---


LIGHT = {
    "background": "white",
    "font": "Helvetica, Arial, sans-serif",
    "aria": False,
    "view": {"stroke": None},
    "axis": {"domainColor": "#bbb", "gridColor": "#e8e8e8", "tickColor": "#bbb", "labelColor": "#444",
             "titleColor": "#222", "titleFontWeight": "normal", "labelFontSize": 11, "titleFontSize": 12},
    "text": {"color": "#444"},
    "style": {"category": {"stroke": "white", "strokeWidth": 0.8}, "whole": {"color": "#222"}},
    "title": {"anchor": "start", "fontSize": 13, "fontWeight": 600, "color": "#222", "subtitleColor": "#555"},
    "legend": {"labelColor": "#333", "labelLimit": 320, "symbolStrokeWidth": 2.5, "titleColor": "#333"},
}  # fmt: skip


def write_charts(rows: Sequence[Row], folder: Path) -> list[Path]:
    """EpochSample every chart into a folder, as SVG and PNG, without a browser: <data set>-curves.svg and so on.

    Returns the files. Raises OSError where one cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    names: dict[str, int] = defaultdict(int)
    for panel in make_panels(rows):
        stem = re.sub(r"[^A-Za-z0-9.+]+", "-", panel.title).strip("-.")[:60] or "x"
        names[stem] += 1
        stem += f"-{names[stem]}" if names[stem] > 1 else ""
        for chart in panel.specs:
            written += draw(complete_spec(panel, chart), folder, f"{stem}-{chart}")
    return written


def draw(spec: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """EpochSample a spec that stands alone, as <stem>.svg and <stem>.png. Raises OSError where it cannot be written."""
    import vl_convert

    written = []
    for ending, drawn in (
        ("svg", vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE, config=LIGHT).encode()),
        ("png", vl_convert.vegalite_to_png(spec, vl_version=VEGA_LITE, config=LIGHT, scale=2)),
    ):
        path = folder / f"{stem}.{ending}"
        path.write_bytes(drawn)
        written.append(path)
    return written


def complete_spec(panel: Panel, chart: str) -> dict[str, Any]:
    """A chart that stands alone: with its data, title, size and legend."""
    spec = panel.specs[chart]
    title = {"text": panel.title, "subtitle": panel.captions[chart]}
    schema = {"$schema": f"https://vega.github.io/schema/vega-lite/v{VEGA_LITE}.json"}
    if chart == "categories":
        size = {"width": FIGURE["width"], "height": categories.BAR * len(panel.categories)}
        bars = {**spec["layer"][0], "encoding": dict(spec["layer"][0]["encoding"])}
        legend: dict[str, Any] = {"title": None, "symbolType": "square", "orient": "bottom", "columns": 5}
        bars["encoding"]["color"] = {**bars["encoding"]["color"], "legend": legend}
        values = categories.category_values(panel.labels, panel.categories)
        return {
            **schema,
            **spec,
            **size,
            "layer": [bars, *spec["layer"][1:]],
            "title": title,
            "data": {"values": values},
        }
    of_curves = spec["data"]["name"] == "curves"
    values = curve_values(panel) if of_curves else point_values(panel, chart)
    shown = {value["row"] for value in values}
    layers = [{**layer, "encoding": dict(layer["encoding"])} for layer in spec["layer"]]
    names = [name for name in panel.labels.values() if name in shown]
    if 1 < len(names) <= MAX_LEGEND:
        legend = {"title": None, "values": names, "symbolType": "stroke" if of_curves else "circle"}
        for encoding in (layer["encoding"] for layer in layers):
            for channel in encoding.keys() & {"color", "strokeDash", "shape"}:
                encoding[channel] = {**encoding[channel], "legend": legend}
    return {**schema, **spec, **FIGURE, "layer": layers, "title": title, "data": {"values": values}}


def load_bundle(cache: Path | None = None) -> str:
    """Vega, Vega-Lite and vega-embed as one script, so that a page needs no network.

    vl-convert bundles it in a second or two; it is kept in the folder `cache`, where that can be written.
    """
    from importlib.metadata import version

    path = None if cache is None else cache / f"vega-{version('vl-convert-python')}.js"
    if path is not None and path.is_file():
        return path.read_text(encoding="utf-8")
    import vl_convert

    bundle = vl_convert.javascript_bundle(None, vl_version=VEGA_LITE)  # type: ignore[arg-type]
    if path is not None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(bundle, encoding="utf-8")
            temporary.replace(path)
        except OSError:  # a page can be made without keeping it
            pass
    return bundle
