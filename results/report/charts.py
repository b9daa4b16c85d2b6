"""Rows -> charts: error over epochs, whole and zoomed; error against cost; memory by category.

`charts.json` holds the Vega-Lite specs, from which the page in the browser and the SVG and PNG files are drawn alike.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from harness.results.metrics import METRICS, NONE
from harness.results.report import memory
from harness.results.report.columns import DESCRIPTORS
from harness.results.report.table import Layout, lay_out
from harness.results.report.text import clean
from harness.results.rows import Row
from harness.results.statistics import mean
from harness.results.store import Interrupted, Stored, load_epochs, write_atomic
from harness.results.values import EpochMetrics

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

DESCRIBING = [column for column in DESCRIPTORS if not column.stays and column.name != "dataset"]
"""Columns that distinguish rows of one network."""
MEMORIES = ("nvml_process_mib", "torch_reserved_mib", "rss_mib")  # the best one to compare first

LEARNING = {"val": "held out", "test": "test"}
"""Images whose curves stand beside the training's."""
Values = list[dict[str, Any]]


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
    title: str
    stem: str  # of its files
    charts: list[Chart] = field(default_factory=list)
    datasets: dict[str, Values] = field(default_factory=dict)
    rows: dict[str, tuple[str, list[int]]] = field(default_factory=dict)  # label -> colour and dash; can be hidden
    categories: dict[str, dict[str, float]] = field(default_factory=dict)  # label -> memory by category, MiB
    left_out: int = 0  # rows whose curves are not shown


class Style(NamedTuple):
    """How a row looks in all charts."""

    row: str  # its label
    colour: str
    dash: list[int]
    shape: str


def make_panels(rows: Sequence[Row], labels: Sequence[str] = ()) -> list[Panel]:
    """Charts for every data set that has a finished run or a curve. Reads the epochs of `MAX_RUNS` runs at most.

    `labels` are `make_labels(rows)`, where they have been made.
    """
    labels = labels or make_labels(rows)
    chosen = _choose(rows)
    groups: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for i, row in enumerate(rows):
        groups[row.dataset, row.evaluated_on][i] = labels[i]
    panels = [_make_panel(rows, make_styles(members), chosen) for members in groups.values()]
    return [panel for panel in panels if panel.charts]


def make_labels(rows: Sequence[Row], layout: Layout | None = None) -> list[str]:
    """A name for each row, all different: variant-depth and whatever else distinguishes it from the others.

    `layout` is `lay_out(rows)`, where it has been made.
    """
    if not rows:
        return []
    layout = layout or lay_out(rows)
    words = [[clean(c.text(row)) for row in rows] for c in layout.columns if c in DESCRIBING]
    labels: list[str] = []
    seen: dict[str, int] = defaultdict(int)
    for i, row in enumerate(rows):
        label = " · ".join([clean(row.name), *(texts[i] for texts in words if texts[i] != NONE)])
        seen[label] += 1
        labels.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return labels


def make_styles(labels: Mapping[int, str]) -> dict[int, Style]:
    """Colours by network, dashes and shapes by the rest of the label; colours alone where one of them is enough."""
    parts = {i: label.partition(" · ")[::2] for i, label in labels.items()}
    networks, conditions = (list(dict.fromkeys(words)) for words in zip(*parts.values(), strict=True))
    styles = {}
    for i, (network, condition) in parts.items():
        k, j = networks.index(network), conditions.index(condition)
        if len(networks) == 1:
            k, j = j, 0
        j += k // len(PALETTE)
        looks = PALETTE[k % len(PALETTE)], DASHES[j % len(DASHES)], SHAPES[j % len(SHAPES)]
        styles[i] = Style(labels[i], *looks)
    return styles


def _sort_by_error(rows: Sequence[Row], members: Sequence[int]) -> list[int]:
    def error(i: int) -> float:
        sample = rows[i].error
        return sample.mean if sample and math.isfinite(sample.mean) else math.inf

    return sorted(members, key=error)


def _choose(rows: Sequence[Row]) -> set[int]:
    """The rows whose curves are shown: all, or those with the smallest error."""
    order = _sort_by_error(rows, range(len(rows)))
    counts = (sum(map(len, (r.done, r.failed, r.pruned, r.interrupted))) for r in (rows[i] for i in order))
    fitting = sum(runs <= MAX_RUNS for runs in accumulate(counts))
    return set(order[: max(1, fitting)])


def _make_panel(rows: Sequence[Row], styles: Mapping[int, Style], chosen: set[int]) -> Panel:
    members = list(styles)
    first = rows[members[0]]
    panel = Panel(clean(first.dataset), clean(first.dataset))
    title = "test error, %" if first.evaluated_on == "test" else "error of held-out images, %"

    curves = {i: some for i in members if i in chosen and (some := list(_load_curves(rows[i])))}
    if curves:
        panel.datasets["curves"] = [styles[i]._asdict() | curve for i, some in curves.items() for curve in some]
        panel.charts.extend(_curve_charts(panel.datasets["curves"], title, [styles[i] for i in curves]))
    if learning := [styles[i]._asdict() | one for i in curves for one in _load_learning(rows[i])]:
        panel.datasets["learning"] = learning
        panel.charts.extend(_learning_charts(learning, [styles[i] for i in curves]))
    panel.rows.update({styles[i].row: (styles[i].colour, styles[i].dash) for i in curves or members})

    done = [rows[i] for i in members if rows[i].done]
    missing = {name: sum(row.figures[name].value is None for row in done) for name in MEMORIES}
    for name, figure in (("seconds", "epoch_seconds"), ("memory", min(MEMORIES, key=missing.__getitem__))):
        points = {i: point for i in members if (point := _point(rows[i], figure))}
        if points:
            panel.datasets[name] = _mark_best([styles[i]._asdict() | point for i, point in points.items()])
            panel.charts.append(_frontier_chart(name, figure, title, [styles[i] for i in points]))

    having = [i for i in members if memory.known(rows[i].by_category_mib)]
    for i in sorted(_sort_by_error(rows, having)[:MAX_BARS]):
        panel.categories[styles[i].row] = memory.known(rows[i].by_category_mib)
    if panel.categories:
        panel.datasets["categories"] = memory.category_values(panel.categories)
        on_gpu = rows[having[0]].fields.get("device") == "cuda"
        panel.charts.append(_category_chart(panel.categories, on_gpu=on_gpu))
    left_out = sum(1 for i in members if rows[i].done and i not in curves) if len(chosen) < len(rows) else 0
    return replace(panel, left_out=left_out)


# --- curves ---


def _load_curves(row: Row) -> Iterator[dict[str, Any]]:
    """Error over epochs, in percent: the mean of the finished runs with smallest and largest; each other run by itself.

    The spec spreads the lists, and fills in epochs 1, 2, 3, ...
    """
    finished = [errors for stored in row.done if (errors := _load_errors(stored))]
    if common := sorted(set.intersection(*map(set, finished))) if finished else []:
        columns = [[errors[epoch] for errors in finished] for epoch in common]
        curve = _epochs(common) | {"mean": [round(mean(column), 2) for column in columns]}
        if len(finished) > 1:
            curve |= {name: [round(of(c), 2) for c in columns] for name, of in (("low", min), ("high", max))}
        if row.against and row.against.published.error is not None:
            curve["published"] = row.against.published.error
        yield curve
    unfinished: list[Stored | Interrupted] = [*row.failed, *row.pruned, *row.interrupted]
    for run in unfinished:
        if errors := _load_errors(run):
            yield _epochs(list(errors)) | {"mean": [round(e, 2) for e in errors.values()], "unfinished": True}


def _load_errors(run: Stored | Interrupted) -> dict[int, float]:
    """By epoch. None where they cannot be read: the table stands on the record, and `harness why` names the fault."""
    return {e.epoch: e.error for e in _load_epochs(run.folder) if math.isfinite(e.error)}


def _load_epochs(folder: Path) -> list[EpochMetrics]:
    with suppress(OSError, ValueError):
        return load_epochs(folder)
    return []


def _load_learning(row: Row) -> Iterator[dict[str, Any]]:
    """Error and loss of what is learnt and of what is not, over epochs: means of the finished runs that recorded both."""
    runs = [{e.epoch: e for e in _load_epochs(s.folder) if e.train_error is not None} for s in row.done]
    common = sorted(set.intersection(*map(set, runs))) if runs else []
    figures = {"training": ("train_error", "loss"), LEARNING[row.evaluated_on]: ("error", "eval_loss")}
    if row.evaluated_on == "val":
        figures["test"] = ("test_error", "")

    def means(name: str) -> list[float | None]:
        columns: list[list[Any]] = [[getattr(run[epoch], name, None) for run in runs] for epoch in common]
        return [
            float(f"{mean(c):.4g}") if all(v is not None and math.isfinite(v) for v in c) else None
            for c in columns
        ]

    for kind, (error, loss) in figures.items() if common else ():
        yield _epochs(common) | {"of": kind, "error": means(error), "loss": means(loss)}


def _epochs(epochs: list[int]) -> dict[str, Any]:
    return {} if epochs == list(range(1, len(epochs) + 1)) else {"epoch": epochs}


def _curve_charts(curves: Values, title: str, styles: Sequence[Style]) -> Iterator[Chart]:
    caption = "Error after each epoch"
    if any("low" in curve for curve in curves):
        caption += ": mean of the seeds, band from the smallest to the largest"
    if any("unfinished" in curve for curve in curves):
        caption += "; dotted: a run that did not finish"
    if any("published" in curve for curve in curves):
        caption += "; level: the published error"
    last = max(max(curve.get("epoch") or [len(curve["mean"])]) for curve in curves)
    top = max(max(curve.get("high") or curve["mean"]) for curve in curves)
    whole = [min(1, last), max(last, 2)], [0.0, _round_up(top) or 1.0]

    def spec(epochs: list[int], errors: list[float], *, clip: bool) -> dict[str, Any]:
        at = f"at > 0 ? at : {epochs[0]}"  # hidden, the rule stands inside the plot: outside, it would take its room
        return make_spec("curves", epochs=epochs, errors=errors, error=title, clip=clip, at=at, **looks)

    looks = {style: _by_row(style, styles) for style in ("colour", "dash")}
    yield Chart("curves", caption, spec(*whole, clip=False))
    if zoom := _zoom(curves, last // 2 + 1) if last >= 4 else None:
        caption = f"The same from epoch {last // 2 + 1}, up to {zoom[1]:g} %"
        yield Chart("zoom", caption, spec([last // 2 + 1, last], zoom, clip=True))


def _learning_charts(curves: Values, styles: Sequence[Style]) -> Iterator[Chart]:
    last = max(max(curve.get("epoch") or [len(curve["loss"])]) for curve in curves)
    kinds = [kind for kind in ("training", *LEARNING.values()) if any(curve["of"] == kind for curve in curves)]
    for figure, title in (("error", "error, %"), ("loss", "loss")):
        spec = make_spec(
            "learning", figure=figure, title=title, epochs=[min(1, last), max(last, 2)], kinds=kinds,
            colour=_by_row("colour", styles),
        )  # fmt: skip
        caption = f"{figure.capitalize()} after each epoch, mean of the seeds; of training images during the epoch"
        yield Chart(f"learning-{figure}", caption, spec)


def _zoom(curves: Values, first: int) -> list[float] | None:
    """Bounds of the errors from an epoch on, cut above twice the largest final error."""
    lows, highs, finals = [], [], []
    for curve in (curve for curve in curves if "unfinished" not in curve):
        low, high = curve.get("low") or curve["mean"], curve.get("high") or curve["mean"]
        inside = [k for k, epoch in enumerate(curve.get("epoch") or range(1, len(low) + 1)) if epoch >= first]
        lows += [low[k] for k in inside] + [curve["published"] for _ in inside[:1] if "published" in curve]
        highs += [high[k] for k in inside]
        finals.append(high[-1])
    if not lows:
        return None
    lowest, highest = min(lows), min(max(highs), 2 * max(finals))
    margin = 0.05 * (highest - lowest) or 0.5
    step = 10.0 ** math.floor(math.log10(margin))
    bottom = max(0.0, math.floor((lowest - margin) / step) * step)
    return [round(bottom, 6), round(math.ceil((highest + margin) / step) * step, 6)]


def _round_up(value: float) -> float:
    """To a multiple of half its power of ten."""
    step = 0.5 * 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return round(math.ceil(value / step) * step, 6)


# --- error against cost, memory by category ---


def _point(row: Row, figure: str) -> dict[str, Any] | None:
    cost, error = row.figures[figure].value, row.error
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
    return [point | {name: round(point[name], 2) for name in ("error", "low", "high")} for point in points]


def _frontier_chart(name: str, figure: str, title: str, styles: Sequence[Style]) -> Chart:
    metric = METRICS[figure]
    cost = "seconds per epoch"
    if metric.unit == "MiB":
        cost = f"{metric.means.removeprefix('MiB, ').partition(':')[0]}, MiB"
    named = "true" if len(styles) <= MAX_POINT_NAMES else "datum.best"
    looks = {style: _by_row(style, styles) for style in ("colour", "shape")}
    spec = make_spec("frontier", data=name, cost=cost, error=title, named=named, **looks)
    return Chart(name, f"Error against {cost}; the line joins rows that no other row beats in both", spec)


def _category_chart(categories: Mapping[str, Mapping[str, float]], *, on_gpu: bool) -> Chart:
    """A bar a row, its parts from left to right; what is below zero goes to the left. A tick marks the sum."""
    whole = "GPU memory of the process" if on_gpu else "resident memory"
    caption = f"Who holds the {whole}: of the run of a row that used most; the tick is what was measured"
    if any(value < 0 for parts in categories.values() for value in parts.values()):
        caption += "; left of zero: what the categories count twice"
    if len(categories) == MAX_BARS:
        caption += f"; the {MAX_BARS} rows with the smallest error"
    names, colours = zip(*memory.colours(categories).items(), strict=True)
    spec = make_spec("categories", rows=list(categories), title=f"{whole}, MiB", categories=names, colours=colours)
    return Chart("categories", caption, spec, wide=True, height=BAR * len(categories) + AROUND_BARS)


# --- specs and files ---


@cache
def _load_specs() -> dict[str, Any]:
    specs: dict[str, Any] = json.loads(Path(__file__).with_name("charts.json").read_text(encoding="utf-8"))
    return specs


def make_spec(name: str, **values: Any) -> dict[str, Any]:
    """A spec of `charts.json`, each "$word" in it replaced by a value or by another part of that file."""

    def fill(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: fill(value) for key, value in part.items()}
        if isinstance(part, list):
            return [fill(value) for value in part]
        if isinstance(part, str) and part.startswith("$"):
            return values[part[1:]] if part[1:] in values else _load_specs()[part[1:]]
        return part

    spec: dict[str, Any] = fill(_load_specs()[name])
    return spec


def _by_row(style: str, styles: Sequence[Style]) -> dict[str, Any]:
    """An encoding of rows. Too many for a legend: the values carry their style."""
    if len(styles) > MAX_LEGEND:
        return {"field": style, "type": "nominal", "scale": None, "legend": None}
    scale = {"domain": [each.row for each in styles], "range": [getattr(each, style) for each in styles]}
    return {"field": "row", "type": "nominal", "scale": scale} | ({"legend": None} if len(styles) == 1 else {})


def write_charts(panels: Sequence[Panel], folder: Path) -> list[Path]:
    """Draw every chart into a folder, as SVG and PNG, without a browser: <data set>-curves.svg and so on.

    Returns the files. Raises OSError where one cannot be written.
    """
    import vl_convert

    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    stems: dict[str, int] = defaultdict(int)
    options: dict[str, Any] = {"vl_version": VEGA_LITE, "config": _load_specs()["light"]}
    for panel, chart in [(p, chart) for p in panels for chart in p.charts]:
        stem = re.sub(r"[^A-Za-z0-9.+_]+", "-", f"{panel.stem[:80]}-{chart.name[:40]}").strip("-.") or "x"
        stems[stem] += 1
        stem += f"-{stems[stem]}" if stems[stem] > 1 else ""
        spec = complete_spec(panel, chart)
        svg, png = folder / f"{stem}.svg", folder / f"{stem}.png"
        svg.write_text(vl_convert.vegalite_to_svg(spec, **options), encoding="utf-8")
        png.write_bytes(vl_convert.vegalite_to_png(spec, scale=2, **options))
        written += [svg, png]
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
        with suppress(OSError):  # a page can be made without keeping it
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, bundle)
    return bundle
