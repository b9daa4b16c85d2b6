"""Rows -> charts: error over epochs, whole and zoomed; error against cost; memory by category.

`charts.json` holds the Vega-Lite specs, from which the page in the browser and the SVG and PNG files are drawn alike.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
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
LETTER, LINE = 0.022, 0.07  # of such a name's, in shares of the chart
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
Values = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart. Its spec reads the values of its panel by the name of the data set."""

    name: str  # "curves", "slice-lr"
    caption: str
    spec: dict[str, Any]
    wide: bool = False
    height: int | None = None  # pixels in the page, where its rows have a fixed height


class Style(NamedTuple):
    """How a row looks in all charts."""

    colour: str
    dash: list[int]
    shape: str


@dataclass(slots=True)
class Panel:
    """The charts of a data set or a sweep."""

    title: str
    stem: str  # of its files
    charts: list[Chart] = field(default_factory=list)
    datasets: dict[str, Values] = field(default_factory=dict)
    rows: dict[str, Style] = field(default_factory=dict)  # by label; each can be hidden
    categories: dict[str, dict[str, float]] = field(default_factory=dict)  # label -> memory by category, MiB
    left_out: int = 0  # rows whose curves are not shown
    colours: dict[str, str] = field(default_factory=dict)  # of a sweep's trials, by run


def make_panels(
    rows: Sequence[Row], labels: Sequence[str] = (), colours: Mapping[str, str] | None = None
) -> list[Panel]:
    """Charts for every data set that has a finished run or a curve. Reads the epochs of `MAX_RUNS` runs at most.

    `labels` are `make_labels(rows)`, where they have been made; `colours` those of runs that have one already.
    """
    groups: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for row, label in zip(rows, labels or make_labels(rows), strict=True):
        groups[row.dataset, row.evaluated_on][label] = row
    left, chosen = MAX_RUNS, set[int]()
    for row in sorted(rows, key=_final_error):  # those with the smallest error
        left -= sum(map(len, (row.done, row.failed, row.pruned, row.interrupted)))
        if left >= 0 or not chosen:
            chosen.add(id(row))
    panels = [_make_panel(members, chosen, colours or {}) for members in groups.values()]
    return [panel for panel in panels if panel.charts]


def make_labels(rows: Sequence[Row], layout: Layout | None = None) -> list[str]:
    """A name for each row, all of a data set different: variant-depth and whatever else distinguishes it from the others.

    `layout` is `lay_out(rows)`, where it has been made.
    """
    shown = (layout or lay_out(rows)).columns if rows else []
    describing = [column for column in shown if column in DESCRIBING]
    labels: list[str] = []
    seen: Counter[tuple[str, str]] = Counter()
    for row in rows:
        words = [row.name, *(text for column in describing if (text := column.text(row)) != NONE)]
        label = clean(" · ".join(words))
        seen[row.dataset, label] += 1
        number = seen[row.dataset, label]
        labels.append(label if number == 1 else f"{label} ({number})")
    return labels


def make_styles(labels: Sequence[str]) -> dict[str, Style]:
    """Colours by network, dashes and shapes by the rest of the label; colours alone where one of them is enough."""
    parts = [label.partition(" · ")[::2] for label in labels]
    networks = {name: k for k, name in enumerate(dict.fromkeys(network for network, _ in parts))}
    conditions = {name: k for k, name in enumerate(dict.fromkeys(condition for _, condition in parts))}
    styles = {}
    for label, (network, condition) in zip(labels, parts, strict=True):
        k, j = networks[network], conditions[condition]
        if len(networks) == 1:
            k, j = j, 0
        j += k // len(PALETTE)
        styles[label] = Style(PALETTE[k % len(PALETTE)], DASHES[j % len(DASHES)], SHAPES[j % len(SHAPES)])
    return styles


def _final_error(row: Row) -> float:
    return row.error if row.error is not None and math.isfinite(row.error) else math.inf


def _make_panel(rows: Mapping[str, Row], chosen: set[int], colours: Mapping[str, str]) -> Panel:
    first = next(iter(rows.values()))
    panel = Panel(clean(first.dataset), clean(first.dataset))
    styles = make_styles(list(rows))
    for label, row in rows.items():
        if known := [c for stored in (*row.done, *row.pruned) if (c := colours.get(stored.folder.name))]:
            styles[label] = styles[label]._replace(colour=known[0])
    title = "test error, %" if first.evaluated_on == "test" else "error of held-out images, %"

    curved, curves, learning = dict[str, Style](), Values(), Values()
    for label, row in rows.items():
        if id(row) in chosen and (own := list(_load_curves(row))):
            curved[label] = styles[label]
            curves += [{"row": label} | curve for curve in own if "of" not in curve]
            learning += [{"row": label} | curve for curve in own if "of" in curve]
    panel.rows = curved or styles
    if curves:
        panel.datasets["curves"] = curves
        panel.charts += _curve_charts(curves, title, curved)
    if learning:
        panel.datasets["learning"] = learning
        panel.charts += _learning_charts(learning, curved)

    done = [row for row in rows.values() if row.done]
    missing = {name: sum(row.figures[name].value is None for row in done) for name in MEMORIES}
    for name, figure in (("seconds", "epoch_seconds"), ("memory", min(MEMORIES, key=missing.__getitem__))):
        if points := _points(rows, figure):
            panel.datasets[name] = points
            shown = {point["row"]: styles[point["row"]] for point in points}
            panel.charts.append(_frontier_chart(name, figure, title, shown))

    having = {label: parts for label, row in rows.items() if (parts := memory.known(row.by_category_mib))}
    best = sorted(having, key=lambda label: _final_error(rows[label]))[:MAX_BARS]
    panel.categories = {label: parts for label, parts in having.items() if label in best}
    if best:
        panel.datasets["categories"] = [
            {"row": label, "category": name, "mib": round(value, 2)}
            for label, parts in panel.categories.items() for name, value in parts.items()
        ]  # fmt: skip
        panel.charts.append(_category_chart(panel.categories, on_gpu=first.fields.get("device") == "cuda"))
    if not all(id(row) in chosen for row in rows.values()):
        panel.left_out = len([row for label, row in rows.items() if row.done and label not in curved])
    return panel


# --- curves ---


def _load_curves(row: Row) -> Iterator[dict[str, Any]]:
    """Error over epochs, in percent: the mean of the finished runs with smallest and largest; each other run by itself.

    Then, of the finished runs that recorded both, means of error and loss of what is learnt and of what is not. The specs
    spread the lists, and fill in epochs 1, 2, 3, ...
    """
    runs = [_load_epochs(stored) for stored in row.done]
    if epochs := _common_epochs([[e for e in run if math.isfinite(e.error)] for run in runs]):
        curve = _number(epochs) | {"mean": _combine(epochs, "error")}
        if len(epochs[0]) > 1:
            curve |= {"low": _combine(epochs, "error", min), "high": _combine(epochs, "error", max)}
        if row.against and row.against.published.error is not None:
            curve["published"] = row.against.published.error
        yield curve
    partials: list[Stored | Interrupted] = [*row.failed, *row.pruned, *row.interrupted]
    for number, partial in enumerate(partials, 1):
        if epochs := [[e] for e in _load_epochs(partial) if math.isfinite(e.error)]:
            yield _number(epochs) | {"mean": _combine(epochs, "error"), "unfinished": number}
    if epochs := _common_epochs([[e for e in run if e.train_error is not None] for run in runs]):
        on_test = row.evaluated_on == "test"
        names = {"training": ("train_error", "loss"), "test" if on_test else "held out": ("error", "eval_loss")}
        for kind, (error, loss) in (names | ({} if on_test else {"test": ("test_error", "")})).items():
            yield _number(epochs) | {"of": kind, "error": _combine(epochs, error), "loss": _combine(epochs, loss)}


def _load_epochs(run: Stored | Interrupted) -> list[EpochMetrics]:
    """None where they cannot be read: the table stands on the record, and `harness why` names the fault."""
    with suppress(OSError, ValueError):
        return load_epochs(run.folder)
    return []


def _common_epochs(runs: Sequence[Sequence[EpochMetrics]]) -> list[list[EpochMetrics]]:
    """The epochs that all runs have, each as it was in every run; runs without an epoch do not count."""
    by_number = [{e.epoch: e for e in run} for run in runs if run]
    common = sorted(set.intersection(*map(set, by_number))) if by_number else []
    return [[run[number] for run in by_number] for number in common]


def _combine(
    epochs: Sequence[Sequence[EpochMetrics]], name: str, of: Callable[[list[float]], float] = mean
) -> list[float | None]:
    """A figure after each epoch over the runs, to four digits; None where a run does not have it."""
    columns = [[getattr(e, name, None) for e in epoch] for epoch in epochs]
    return [
        float(f"{of(column):.4g}") if all(v is not None and math.isfinite(v) for v in column) else None  # type: ignore[arg-type]
        for column in columns
    ]


def _number(epochs: Sequence[Sequence[EpochMetrics]]) -> dict[str, Any]:
    numbers = [epoch[0].epoch for epoch in epochs]
    return {} if numbers == list(range(1, len(numbers) + 1)) else {"epoch": numbers}


def _curve_charts(curves: Values, title: str, styles: Mapping[str, Style]) -> Iterator[Chart]:
    parts = {
        "low": ": mean of the seeds, band from the smallest to the largest",
        "unfinished": "; dotted: a run that did not finish",
        "published": "; level: the published error",
    }
    said = (text for name, text in parts.items() if any(name in curve for curve in curves))
    looks = {"colour": _encode(styles, "colour"), "dash": _encode(styles, "dash"), "error": title}
    last = max(max(curve.get("epoch") or [len(curve["mean"])]) for curve in curves)
    top = max(max(curve.get("high") or curve["mean"]) for curve in curves)
    spec = make_spec("curves", epochs=[1, max(last, 2)], errors=[0, top or 1], clip=False, first=1, **looks)
    yield Chart("curves", "".join(["Error after each epoch", *said]), spec)

    first, lows, highs, finals = last // 2 + 1, list[float](), list[float](), list[float]()
    for curve in (curve for curve in curves if "unfinished" not in curve):
        low, high = curve.get("low") or curve["mean"], curve.get("high") or curve["mean"]
        late = [k for k, epoch in enumerate(curve.get("epoch") or range(1, len(low) + 1)) if epoch >= first]
        lows += [low[k] for k in late] + [curve["published"] for _ in late[:1] if "published" in curve]
        highs += [high[k] for k in late]
        finals.append(high[-1])
    if lows and last >= 4:
        errors = [min(lows), max(min(max(highs), 2 * max(finals)), min(lows) + 0.5)]
        spec = make_spec("curves", epochs=[first, last], errors=errors, clip=True, first=first, **looks)
        yield Chart("zoom", f"The same from epoch {first}", spec)


def _learning_charts(curves: Values, styles: Mapping[str, Style]) -> Iterator[Chart]:
    last = max(max(curve.get("epoch") or [len(curve["loss"])]) for curve in curves)
    kinds = list(dict.fromkeys(curve["of"] for curve in curves))
    for figure, title in (("error", "error, %"), ("loss", "loss")):
        looks = {"epochs": [1, max(last, 2)], "kinds": kinds, "colour": _encode(styles, "colour")}
        caption = f"{figure.capitalize()} after each epoch, mean of the seeds; of training images during the epoch"
        yield Chart(f"learning-{figure}", caption, make_spec("learning", figure=figure, title=title, **looks))


# --- error against cost, memory by category ---


def _points(rows: Mapping[str, Row], figure: str) -> Values:
    """`best`: no other row is better in both. The cheapest row of a network has its name beside it."""
    every = ((row.figures[figure].value, _final_error(row), label) for label, row in rows.items())
    order = sorted(
        (cost, error, label) for cost, error, label in every if cost is not None and cost + error < math.inf
    )
    lowest, named, points = math.inf, set[str](), Values()
    for cost, error, label in order:
        network, std = label.partition(" · ")[0], rows[label].figures["error"].std or 0.0
        best = error < lowest
        shown = network not in named and (best or len(order) <= MAX_POINT_NAMES)
        points.append({
            "row": label, "cost": float(f"{cost:.6g}"), "error": round(error, 2), "low": round(error - std, 2),
            "high": round(error + std, 2), "best": best, "name": network if shown else "",
        })  # fmt: skip
        lowest = min(lowest, error)
        named.add(network)
    _place_names(points)
    return points


def _place_names(points: Values) -> None:
    """Names stand at a corner of their points where they cover no other, or not at all, in a chart as small as a phone's."""
    if not points:
        return
    width, low = max(p["cost"] for p in points) or 1.0, min(p["low"] for p in points)
    height = max(p["high"] for p in points) - low or 1.0
    at = [(p["cost"] / width, (p["error"] - low) / height) for p in points]
    taken = [(x - 0.015, y - 0.02, x + 0.015, y + 0.02) for x, y in at]
    for point, (x, y) in zip(points, at, strict=True):
        long, name = LETTER * len(point["name"]), point["name"]
        point["name"] = ""
        for right, up in ((False, True), (True, True), (False, False), (True, False)) if name else ():
            left, bottom = x + 0.02 if right else x - 0.02 - long, y + 0.02 if up else y - 0.02 - LINE
            box = (left, bottom, left + long, bottom + LINE)
            free = all(
                box[0] > other[2] or box[2] < other[0] or box[1] > other[3] or box[3] < other[1] for other in taken
            )
            if free and box[0] >= 0 and box[2] <= 1.04:
                point |= {"name": name, "right": right, "up": up}
                taken.append(box)
                break


def _frontier_chart(name: str, figure: str, title: str, styles: Mapping[str, Style]) -> Chart:
    metric = METRICS[figure]
    cost = "seconds per epoch"
    if metric.unit == "MiB":
        cost = f"{metric.means.removeprefix('MiB, ').partition(':')[0]}, MiB"
    looks = {"colour": _encode(styles, "colour"), "shape": _encode(styles, "shape")}
    spec = make_spec("frontier", data=name, cost=cost, error=title, **looks)
    return Chart(name, f"Error against {cost}; the line joins rows that no other row beats in both", spec)


def _category_chart(categories: Mapping[str, Mapping[str, float]], *, on_gpu: bool) -> Chart:
    """A bar a row, its parts from left to right; what is below zero goes to the left. A tick marks the sum."""
    whole = "GPU memory of the process" if on_gpu else "resident memory"
    caption = f"Who holds the {whole}: of the run of a row that used most; the tick is what was measured"
    if any(value < 0 for parts in categories.values() for value in parts.values()):
        caption += "; left of zero: what the categories count twice"
    if len(categories) == MAX_BARS:
        caption += f"; the {MAX_BARS} rows with the smallest error"
    colours, title = category_colours(categories), f"{whole}, MiB"
    looks = {"categories": list(colours), "colours": list(colours.values())}
    spec = make_spec("categories", rows=list(categories), title=title, **looks)
    return Chart("categories", caption, spec, wide=True, height=BAR * len(categories) + AROUND_BARS)


def category_colours(categories: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """The categories that hold something in any row, in their order, with their colours.

    These are distinct also for the colour-blind, neighbours most of all: chosen by a search over CIELAB distances as seen
    without one of the cones, on white and on the dark page. A GPU has no "process at its start", a CPU no CUDA context.
    """
    names = {name for parts in categories.values() for name in parts}
    colours = load_specs()["memory"]
    return {name: colours.get(name, colours["other"]) for name in memory.known(dict.fromkeys(names, 1.0))}


# --- specs and files ---


@cache
def load_specs() -> dict[str, Any]:
    specs: dict[str, Any] = json.loads(Path(__file__).with_name("charts.json").read_text(encoding="utf-8"))
    return specs


def make_spec(name: str, **values: Any) -> dict[str, Any]:
    """A spec of `charts.json`, each "$word" in it replaced by a value or by another part of that file."""
    known = load_specs() | values
    text = re.sub(r'"\$(\w+)"', lambda word: json.dumps(known[word[1]]), json.dumps(load_specs()[name]))
    spec: dict[str, Any] = json.loads(text)
    return spec


def _encode(styles: Mapping[str, Style], channel: str) -> dict[str, Any]:
    """The colours, dashes or shapes of rows, with a legend where it helps."""
    scale = {"domain": list(styles), "range": [getattr(style, channel) for style in styles.values()]}
    legend = {} if 1 < len(styles) <= MAX_LEGEND else {"legend": None}
    return {"field": "row", "type": "nominal", "scale": scale} | legend


def write_charts(panels: Sequence[Panel], folder: Path) -> list[Path]:
    """Draw every chart into a folder, as SVG and PNG, without a browser: <data set>-curves.svg and so on.

    Returns the files. Raises OSError where one cannot be written.
    """
    import vl_convert

    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    stems: dict[str, int] = defaultdict(int)
    options: dict[str, Any] = {"vl_version": VEGA_LITE, "config": load_specs()["light"]}
    for panel, chart in [(p, chart) for p in panels for chart in p.charts]:
        stem = re.sub(r"[^A-Za-z0-9.+_]+", "-", f"{panel.stem[:80]}-{chart.name[:40]}").strip("-.") or "x"
        stems[stem] += 1
        stem += f"-{stems[stem]}" if stems[stem] > 1 else ""
        height = HEIGHT if chart.height is None else chart.height - AROUND_BARS
        lines = [chart.caption] if len(chart.caption) <= MAX_LINE else chart.caption.split("; ")
        title = {"text": panel.title, "subtitle": lines, "offset": 18}
        spec = {"width": WIDTH, "height": height, "title": title, "datasets": panel.datasets, **chart.spec}
        svg, png = folder / f"{stem}.svg", folder / f"{stem}.png"
        svg.write_text(vl_convert.vegalite_to_svg(spec, **options), encoding="utf-8")
        png.write_bytes(vl_convert.vegalite_to_png(spec, scale=2, **options))
        written += [svg, png]
    return written


def load_bundle(cache: Path) -> str:
    """Vega, Vega-Lite and vega-embed as one script, so that a page needs no network.

    vl-convert bundles it in a second or two; it is kept in the folder `cache`, where that can be written.
    """
    path = cache / f"vega-{version('vl-convert-python')}.js"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    import vl_convert

    bundle = vl_convert.javascript_bundle(None, vl_version=VEGA_LITE)  # type: ignore[arg-type]
    with suppress(OSError):  # a page can be made without keeping it
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, bundle)
    return bundle
