"""Rows -> charts: error over epochs, whole and zoomed; error against cost; memory by category.

`charts.json` holds the Vega-Lite specs, from which the page in the browser and the SVG and PNG files are drawn alike.
Words "$..." in them are filled in here.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from harness.results.report import memory
from harness.results.report.table import Layout, lay_out
from harness.results.report.text import clean
from harness.results.rows import Row
from harness.results.statistics import mean
from harness.results.store import Interrupted, Stored, load_epochs

MAX_RUNS = 200  # whose epochs are read for one page: more curves than that cannot be told apart
MAX_POINT_NAMES = 24  # beside the points of a frontier; with more of them only the best are named
MAX_BARS = 24
MAX_LEGEND = 40
MAX_LINE = 110  # letters of a caption that fit the width of a file
WIDTH, HEIGHT = 620, 380  # of a file
BAR, AROUND_BARS = 44, 54  # pixels
VEGA_LITE = "6.4"

PALETTE = (
    "#3b7dd8", "#e8743b", "#2a9d6f", "#c2447d", "#8a63d2", "#d1a01f", "#20a4b8", "#d84c4c", "#7a9a34", "#8d7b68",
)  # fmt: skip
"""Distinct on white and on black, the first four also for the colour-blind."""
DASHES = ([1, 0], [7, 3], [2, 2], [10, 3, 2, 3])
SHAPES = ("circle", "square", "triangle-up", "diamond")
"""Colours stand for networks; dashes and shapes for the conditions that one network was trained under."""

DESCRIBING = {
    "limit_train", "duration", "overrides", "loader", "precision", "engine", "width", "device", "differs",
}  # fmt: skip
"""Columns that distinguish rows of one network."""
MEMORIES = {
    "nvml_process_mib": "GPU memory of the process (NVML), MiB",
    "torch_reserved_mib": "GPU memory reserved by torch, MiB",
    "rss_mib": "peak resident memory on the host, MiB",
}
"""Costs, the best one to compare first."""

Values = list[dict[str, Any]]
Bounds = tuple[list[int], list[float]]


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart. Its spec reads the values of its panel by the name of the data set."""

    name: str  # "curves", "slice-lr"
    caption: str
    spec: dict[str, Any]
    wide: bool = False
    height: int | None = None  # pixels in the page, where its rows have a fixed height
    in_page: bool = True  # False: only in files


@dataclass(frozen=True, slots=True)
class Panel:
    """The charts of one data set or sweep."""

    title: str
    stem: str  # of its files
    charts: list[Chart]
    datasets: dict[str, Values]
    rows: dict[str, tuple[str, list[int]]] = field(default_factory=dict)  # label -> colour and dash; can be hidden
    left_out: int = 0  # rows whose curves are not shown
    categories: dict[str, dict[str, float]] = field(default_factory=dict)  # label -> memory by category, MiB


class Style(NamedTuple):
    """How a row looks in all charts."""

    label: str
    colour: str
    dash: list[int]
    shape: str

    @property
    def network(self) -> str:
        """msra-20."""
        return self.label.partition(" · ")[0]


def make_panels(rows: Sequence[Row], labels: Sequence[str] = ()) -> list[Panel]:
    """Charts for every data set that has a finished run or a curve. Reads the epochs of `MAX_RUNS` runs at most.

    `labels` are `make_labels(rows)`, where they have been made.
    """
    labels = labels or make_labels(rows)
    chosen = _choose(rows)
    panels = [
        _make_panel(rows, make_styles({i: labels[i] for i in members}), chosen)
        for members in group_by_dataset(rows)
    ]
    return [panel for panel in panels if panel.charts]


def group_by_dataset(rows: Sequence[Row]) -> list[list[int]]:
    """The rows of each panel."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[row.dataset, row.evaluated_on].append(i)
    return list(groups.values())


def make_labels(rows: Sequence[Row], layout: Layout | None = None) -> list[str]:
    """A name for each row, all different: variant-depth and whatever else distinguishes it from the others.

    `layout` is `lay_out(rows)`, where it has been made.
    """
    layout = layout or lay_out(rows)
    words = [
        layout.words[column.name] for column in layout.columns if column.name in DESCRIBING and not column.stays
    ]
    labels: list[str] = []
    seen: dict[str, int] = defaultdict(int)
    for i, row in enumerate(rows):
        label = " · ".join([clean(row.name), *(texts[i] for texts in words if texts[i] != "–")])
        seen[label] += 1
        labels.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return labels


def make_styles(labels: Mapping[int, str]) -> dict[int, Style]:
    """Colours by network, dashes and shapes by what follows it in the label; colours alone where one of them is enough."""
    parts = {i: label.partition(" · ")[::2] for i, label in labels.items()}
    networks, conditions = (
        {word: k for k, word in enumerate(dict.fromkeys(words))} for words in zip(*parts.values(), strict=True)
    )
    styles = {}
    for i, (network, condition) in parts.items():
        k, j = (networks[network], conditions[condition]) if len(networks) > 1 else (conditions[condition], 0)
        j += k // len(PALETTE)
        styles[i] = Style(labels[i], PALETTE[k % len(PALETTE)], DASHES[j % len(DASHES)], SHAPES[j % len(SHAPES)])
    return styles


def _sort_by_error(rows: Sequence[Row], members: Sequence[int]) -> list[int]:
    def error(i: int) -> float:
        sample = rows[i].error
        return sample.mean if sample and math.isfinite(sample.mean) else math.inf

    return sorted(members, key=error)


def _choose(rows: Sequence[Row]) -> set[int]:
    """The rows whose curves are shown: all, or those with the smallest error."""
    chosen: set[int] = set()
    runs = 0
    for i in _sort_by_error(rows, range(len(rows))):
        runs += len(rows[i].done) + len(rows[i].failed) + len(rows[i].pruned) + len(rows[i].interrupted)
        if runs > MAX_RUNS and chosen:
            break
        chosen.add(i)
    return chosen


def _make_panel(rows: Sequence[Row], styles: Mapping[int, Style], chosen: set[int]) -> Panel:
    members = list(styles)
    first = rows[members[0]]
    error = "test error, %" if first.evaluated_on == "test" else "error of held-out images, %"
    curves = {i: found for i in members if i in chosen and (found := list(_load_curves(rows[i])))}
    charts: list[Chart] = []
    datasets: dict[str, Values] = {}
    if curves:
        shown = [styles[i] for i in curves]
        datasets["curves"] = [_style(styles[i]) | curve for i, some in curves.items() for curve in some]
        charts += _curve_charts(datasets["curves"], error, by_row("colour", shown), by_row("dash", shown))
    memory_name = min(
        MEMORIES, key=lambda name: sum(_figure(rows[i], name) is None for i in members if rows[i].done)
    )
    costs = (("seconds", "epoch_seconds", "seconds per epoch"), ("memory", memory_name, MEMORIES[memory_name]))
    for name, figure, cost in costs:
        if points := {i: point for i in members if (point := _point(rows[i], figure))}:
            shown = [styles[i] for i in points]
            datasets[name] = _mark_best([_style(styles[i]) | point for i, point in points.items()])
            spec = make_spec(
                "frontier", data=name, cost=cost, error=error, colour=by_row("colour", shown), shape=by_row("shape", shown),
                named="true" if len(points) <= MAX_POINT_NAMES else "datum.best",
            )  # fmt: skip
            caption = f"Error against {cost}; the line joins rows that no other row beats in both"
            charts.append(Chart(name, caption, spec))
    having = [i for i in members if memory.known(rows[i].by_category_mib)]
    largest = sorted(_sort_by_error(rows, having)[:MAX_BARS])
    categories = {styles[i].label: memory.known(rows[i].by_category_mib) for i in largest}
    if categories:
        datasets["categories"] = memory.category_values(categories)
        charts.append(_category_chart(categories, on_gpu=rows[having[0]].fields.get("device") == "cuda"))
    name = clean(first.dataset)
    left_out = sum(1 for i in members if rows[i].done and i not in curves) if len(chosen) < len(rows) else 0
    buttons = {styles[i].label: (styles[i].colour, styles[i].dash) for i in curves or members}
    return Panel(name, name, charts, datasets, buttons, left_out, categories)


# --- curves ---


def _load_curves(row: Row) -> Iterator[dict[str, Any]]:
    """Error over epochs, in percent: of the finished runs, their mean, smallest and largest; of each other run.

    The spec spreads the lists. Epochs 1, 2, 3, ... are left out.
    """
    finished = [errors for stored in row.done if (errors := _errors(stored))]
    if common := sorted(set.intersection(*map(set, finished))) if finished else []:
        columns = [[errors[epoch] for errors in finished] for epoch in common]
        band = {"low": _round(map(min, columns)), "high": _round(map(max, columns))} if len(finished) > 1 else {}
        yield _epochs(common) | {"mean": _round(map(mean, columns))} | band
    unfinished: list[Stored | Interrupted] = [*row.failed, *row.pruned, *row.interrupted]
    for run in unfinished:
        if errors := _errors(run):
            yield _epochs(list(errors)) | {"mean": _round(errors.values()), "unfinished": True}


def _errors(run: Stored | Interrupted) -> dict[int, float]:
    """By epoch. None where they cannot be read: the table stands on the record, and `harness why` names the fault."""
    try:
        return {e.epoch: e.error for e in load_epochs(run.folder) if math.isfinite(e.error)}
    except (OSError, ValueError):
        return {}


def _epochs(epochs: list[int]) -> dict[str, Any]:
    return {} if epochs == list(range(1, len(epochs) + 1)) else {"epoch": epochs}


def _round(values: Any) -> list[float]:
    return [round(value, 2) for value in values]


def _curve_charts(curves: Values, error: str, colour: Any, dash: Any) -> Iterator[Chart]:
    caption = "Error after each epoch"
    if any("low" in curve for curve in curves):
        caption += ": mean of the seeds, band from the smallest to the largest"
    if any("unfinished" in curve for curve in curves):
        caption += "; dotted: a run that did not finish"
    (epochs, errors), zoom = _domains(curves)
    shared = {"error": error, "colour": colour, "dash": dash}
    yield Chart(
        "curves", caption, make_spec("curves", epochs=epochs, errors=errors, clip=False, at=_at(epochs), **shared)
    )
    if zoom:
        epochs, errors = zoom
        caption = f"The same from epoch {epochs[0]}, up to {errors[1]:g} %"
        yield Chart(
            "zoom", caption, make_spec("curves", epochs=epochs, errors=errors, clip=True, at=_at(epochs), **shared)
        )


def _at(epochs: list[int]) -> str:
    """Where the rule stands; hidden, inside the plot: outside, it would take its room."""
    return f"at > 0 ? at : {epochs[0]}"


def _domains(curves: Values) -> tuple[Bounds, Bounds | None]:
    """Bounds of epochs and errors, whole and zoomed: the second half, cut above twice the largest final error."""
    spread = [
        (curve.get("epoch") or range(1, len(curve["mean"]) + 1), curve.get("low", curve["mean"]),
         curve.get("high", curve["mean"]), "unfinished" in curve)
        for curve in curves
    ]  # fmt: skip
    last = max(epochs[-1] for epochs, *_ in spread)
    whole = ([min(1, last), max(last, 2)], [0.0, _round_up(max(max(high) for _, _, high, _ in spread), 2)])
    finished = [curve for curve in spread if not curve[-1]]
    half = last // 2 + 1
    inside = [
        pair for epochs, *band, _ in finished for epoch, *pair in zip(epochs, *band, strict=True) if epoch >= half
    ]
    if last < 4 or not inside:
        return whole, None
    lowest, highest = min(low for low, _ in inside), max(high for _, high in inside)
    highest = min(highest, 2 * max(high[-1] for _, _, high, _ in finished))
    margin = 0.05 * (highest - lowest) or 0.5
    step = 10.0 ** math.floor(math.log10(margin))
    bottom = max(0.0, math.floor((lowest - margin) / step) * step)
    return whole, ([half, last], [round(bottom, 6), round(math.ceil((highest + margin) / step) * step, 6)])


def _round_up(value: float, parts: int) -> float:
    """To a multiple of such a part of its power of ten."""
    step = 10.0 ** math.floor(math.log10(value)) / parts if value > 0 else 1.0
    return round(math.ceil(value / step) * step, 6) or 1.0


# --- error against cost ---


def _figure(row: Row, name: str) -> float | None:
    value = getattr(row, name)
    return value if isinstance(value, float | int | None) else value.value


def _point(row: Row, figure: str) -> dict[str, Any] | None:
    cost, error = _figure(row, figure), row.error
    if cost is None or error is None or not math.isfinite(cost) or not math.isfinite(error.mean):
        return None
    std = error.std or 0.0
    return {"cost": float(f"{cost:.6g}"), "error": error.mean, "low": error.mean - std, "high": error.mean + std}


def _mark_best(points: Values) -> Values:
    """`best`: no other row is better in both. The cheapest row of a network has its name beside it."""
    lowest = math.inf
    named: set[str] = set()
    for point in sorted(points, key=lambda p: (p["cost"], p["error"])):
        network = point["row"].partition(" · ")[0]
        point |= {"best": point["error"] < lowest, "name": "" if network in named else network}
        lowest = min(lowest, point["error"])
        named.add(network)
    for point in points:
        point |= {name: round(point[name], 2) for name in ("error", "low", "high")}
    return points


def _category_chart(categories: Mapping[str, Mapping[str, float]], *, on_gpu: bool) -> Chart:
    """A bar a row, its name above it, its parts from left to right; what is below zero goes to the left.

    A tick marks the sum, which is what was measured of the whole.
    """
    of = "GPU memory of the process" if on_gpu else "resident memory"
    caption = f"Who holds the {of}: of the run of a row that used most; the tick is what was measured"
    if any(value < 0 for parts in categories.values() for value in parts.values()):
        caption += "; left of zero: what the categories count twice"
    if len(categories) == MAX_BARS:
        caption += f"; the {MAX_BARS} rows with the smallest error"
    colours = memory.colours(categories)
    spec = make_spec(
        "categories", rows=list(categories), title=f"{of}, MiB", categories=list(colours), colours=list(colours.values())
    )  # fmt: skip
    return Chart("categories", caption, spec, wide=True, height=BAR * len(categories) + AROUND_BARS)


# --- specs and files ---


@cache
def _specs() -> dict[str, Any]:
    specs: dict[str, Any] = json.loads(Path(__file__).with_name("charts.json").read_text(encoding="utf-8"))
    return specs


def make_spec(name: str, **values: Any) -> dict[str, Any]:
    """A spec of `charts.json`, each "$word" in it replaced by a value or by a part of that file."""

    def fill(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: fill(value) for key, value in part.items()}
        if isinstance(part, list):
            return [fill(value) for value in part]
        if isinstance(part, str) and part.startswith("$"):
            word = part[1:]
            return values[word] if word in values else _specs()[word]
        return part

    spec: dict[str, Any] = fill(_specs()[name])
    return spec


def _style(style: Style) -> dict[str, Any]:
    return {"row": style.label, "colour": style.colour, "dash": style.dash, "shape": style.shape}


def by_row(style: str, styles: Sequence[Style]) -> dict[str, Any]:
    """An encoding of rows. Too many for a legend: the values carry their style."""
    if len(styles) > MAX_LEGEND:
        return {"field": style, "type": "nominal", "scale": None, "legend": None}
    scale = {"domain": [each.label for each in styles], "range": [getattr(each, style) for each in styles]}
    return {"field": "row", "type": "nominal", "scale": scale} | ({"legend": None} if len(styles) == 1 else {})


def write_charts(panels: Sequence[Panel], folder: Path) -> list[Path]:
    """Draw every chart into a folder, as SVG and PNG, without a browser: <data set>-curves.svg and so on.

    Returns the files. Raises OSError where one cannot be written.
    """
    import vl_convert

    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    stems: dict[str, int] = defaultdict(int)
    options: dict[str, Any] = {"vl_version": VEGA_LITE, "config": _specs()["light"]}
    for panel in panels:
        for chart in panel.charts:
            stem = re.sub(r"[^A-Za-z0-9.+_]+", "-", f"{panel.stem[:80]}-{chart.name[:40]}").strip("-.") or "x"
            stems[stem] += 1
            stem += f"-{stems[stem]}" if stems[stem] > 1 else ""
            spec = complete_spec(panel, chart)
            for ending, drawn in (
                ("svg", vl_convert.vegalite_to_svg(spec, **options).encode()),
                ("png", vl_convert.vegalite_to_png(spec, scale=2, **options)),
            ):
                written.append(folder / f"{stem}.{ending}")
                written[-1].write_bytes(drawn)
    return written


def complete_spec(panel: Panel, chart: Chart) -> dict[str, Any]:
    """A chart that stands alone: with its values, title and size."""
    height = HEIGHT if chart.height is None else chart.height - AROUND_BARS
    lines = [chart.caption] if len(chart.caption) <= MAX_LINE else chart.caption.split("; ")
    title = {"text": panel.title, "subtitle": lines, "offset": 18}
    return {"width": WIDTH, "height": height, "title": title, "datasets": panel.datasets, **chart.spec}


def load_bundle(cache: Path | None = None) -> str:
    """Vega, Vega-Lite and vega-embed as one script, so that a page needs no network.

    vl-convert bundles it in a second or two; it is kept in the folder `cache`, where that can be written.
    """
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
