"""Rows -> charts: error over epochs, whole and zoomed; error against cost; memory by category.

`charts.json` holds the Vega-Lite specs, from which the page in the browser and the SVG and PNG files are drawn alike.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from harness.results.metrics import METRICS, NONE
from harness.results.report.columns import DESCRIPTORS
from harness.results.report.text import clean, known
from harness.results.rows import Row
from harness.results.statistics import mean
from harness.results.store import Interrupted, Stored, load_epochs, write_atomic
from harness.results.values import EpochMetrics

MAX_RUNS = 200  # whose epochs are read for one page: more curves than that cannot be told apart
LETTER, LINE = 0.022, 0.07  # of a name beside a point, in shares of the chart
MAX_BARS = 24
MAX_LEGEND = 40
MAX_LINE = 110  # letters of a caption that fit the width of a file
WIDTH, HEIGHT = 620, 380  # of a file
BAR = 44  # pixels
VEGA_LITE = "6.4"

PALETTE = (
    "#3b7dd8", "#e8743b", "#2a9d6f", "#c2447d", "#8a63d2", "#d1a01f", "#20a4b8", "#d84c4c", "#7a9a34", "#8d7b68",
)  # fmt: skip
"""Distinct on white and on black, the first four also for the colour-blind."""
UNLIKE_TRIALS = tuple(PALETTE[k] for k in (2, 5, 6, 8, 9))  # beside a search's own colours, `sweeps.RANGE`
DASHES = ([1, 0], [7, 3], [2, 2], [10, 3, 2, 3])
SHAPES = ("circle", "square", "triangle-up", "diamond")
"""Colours stand for networks; dashes and shapes, as many, for the conditions that one network was trained under."""
DESCRIBING = [column for column in DESCRIPTORS if not column.stays and column.name != "dataset"]
"""Columns that distinguish rows of one network."""
MEMORIES = ("nvml_process_mib", "torch_reserved_mib", "rss_mib")  # the best one to compare first
Values = list[dict[str, Any]]
Figures = Mapping[str, tuple[str, Callable[[list[float]], float]]]
"""Name -> field of an epoch, and how runs are combined."""


class Chart(NamedTuple):
    """One chart. Its spec reads the values of its panel by the name of the data set."""

    name: str  # "curves", "slice-lr"
    caption: str
    spec: dict[str, Any]


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

    def add(self, name: str, values: Values, charts: Iterable[Chart]) -> None:
        """Values and the charts of them, which are made only where there are any."""
        if values:
            self.datasets[name] = values
            self.charts += charts


def make_panels(rows: Sequence[Row], labels: Sequence[str] = (), colours: Mapping[str, str] = {}) -> list[Panel]:
    """Charts for every data set that has a finished run or a curve. Reads the epochs of `MAX_RUNS` runs at most.

    `labels` are `make_labels(rows)`, where they have been made; `colours` those of runs that have one already.
    """
    groups: dict[str, dict[str, Row]] = defaultdict(dict)
    for row, label in zip(rows, labels or make_labels(rows), strict=True):
        groups[name_images(row)][label] = row
    best = sorted(rows, key=_final_error)
    runs = accumulate(sum(map(len, (row.done, row.failed, row.pruned, row.interrupted))) for row in best)
    chosen = {id(row) for row, so_far in zip(best, runs, strict=True) if so_far <= MAX_RUNS or row is best[0]}
    panels = [_make_panel(members, chosen, colours) for members in groups.values()]
    return [panel for panel in panels if panel.charts]


def name_images(row: Row) -> str:
    """What its errors are of, so that no two panels have one title."""
    prints = row.differs.get("fingerprint")  # another data set of the same name
    return clean(row.dataset + f" {prints}" * bool(prints) + ", images held out" * (row.evaluated_on == "val"))


def make_labels(rows: Sequence[Row]) -> list[str]:
    """A name for each row, all of a data set different: variant-depth and whatever else distinguishes it from the others."""
    texts = {c: {c.text(row) for row in rows if row.done or c.name != "device"} for c in DESCRIBING}
    describing = [column for column, different in texts.items() if len(different) > 1]
    labels, seen = list[str](), Counter[tuple[str, str]]()
    for row in rows:
        words = [row.name, *(text for column in describing if (text := column.text(row)) != NONE)]
        label = clean(" · ".join(words))
        seen[row.dataset, label] += 1
        labels.append(label + f" ({seen[row.dataset, label]})" * (seen[row.dataset, label] > 1))
    return labels


def make_styles(labels: Sequence[str], own: Mapping[str, str] = {}) -> dict[str, Style]:
    """Colours by network, dashes and shapes by the rest of the label; all in turn where one network or too many are there.

    `own`: colours that rows have already. Where two are close to each other, dashes and shapes differ.
    """
    others, palette = [label for label in labels if label not in own], UNLIKE_TRIALS if own else PALETTE
    parts = [label.partition(" · ")[::2] for label in others]
    networks, conditions = ({n: k for k, n in enumerate(dict.fromkeys(p[i] for p in parts))} for i in (0, 1))
    places = [(networks[network], conditions[condition]) for network, condition in parts]
    if not 1 < len(networks) <= len(palette) or len(conditions) > len(SHAPES):
        places = [(k, k // len(palette)) for k in range(len(others))]
    looks = {label: (palette[k % len(palette)], j) for label, (k, j) in zip(others, places, strict=True)}
    looks |= {label: (own[label], j) for j, label in enumerate(sorted(own, key=own.__getitem__))}
    return {label: Style(c, DASHES[j % 4], SHAPES[j % 4]) for label in labels for c, j in [looks[label]]}


def _final_error(row: Row) -> float:
    return row.error if row.error is not None and is_finite(row.error) else math.inf


def _make_panel(rows: Mapping[str, Row], chosen: set[int], colours: Mapping[str, str]) -> Panel:
    own = {label: c for label, row in rows.items() for run in row.done if (c := colours.get(run.folder.name))}
    first, styles = next(iter(rows.values())), make_styles(list(rows), own)
    panel = Panel(name_images(first), clean(first.dataset))
    error = "test error, %" if first.evaluated_on == "test" else "error of held-out images, %"

    shown = {label: row for label, row in rows.items() if id(row) in chosen}
    every = [{"row": label} | curve for label, row in shown.items() for curve in _load_curves(row)]
    panel.rows = {curve["row"]: styles[curve["row"]] for curve in every} or styles
    panel.left_out = sum(bool(row.done) for row in rows.values() if id(row) not in chosen)
    curves, learning = ([c for c in every if ("of" in c) is learnt] for learnt in (False, True))
    panel.add("curves", curves, _curve_charts(curves, error, panel.rows))
    panel.add("learning", learning, _learning_charts(learning, panel.rows))

    done = [row for row in rows.values() if row.done]
    held = min(MEMORIES, key=lambda name: sum(row.figures[name].value is None for row in done))
    for name, figure in (("seconds", "epoch_seconds"), ("memory", held)):
        points = _points(rows, figure)
        drawn = {point["row"]: styles[point["row"]] for point in points}
        panel.add(name, points, _frontier_charts(points, figure, error, drawn))

    having = {label: parts for label, row in rows.items() if (parts := known(row.by_category_mib))}
    best = sorted(having, key=lambda label: _final_error(rows[label]))[:MAX_BARS]
    panel.categories = {label: parts for label, parts in having.items() if label in best}
    bars = [
        {"row": label, "category": name, "mib": round(value, 2)}
        for label, parts in panel.categories.items() for name, value in parts.items()
    ]  # fmt: skip
    panel.add("categories", bars, _category_charts(panel.categories, on_gpu=first.fields.get("device") == "cuda"))
    return panel


# --- curves ---


def _load_curves(row: Row) -> Iterator[dict[str, Any]]:
    """Error over epochs, in percent: the mean of the finished runs with smallest and largest; each other run by itself.

    Then, of the finished runs that recorded both, means of error and loss of what is learnt and of what is not. The specs
    spread the lists.
    """
    done = [_load_epochs(run) for run in row.done]
    errors: Figures = {"mean": ("error", mean), "low": ("error", min), "high": ("error", max)}
    partials: list[Stored | Interrupted] = [*row.failed, *row.pruned, *row.interrupted]
    if curve := _combine(done, "error", errors):
        published = row.against.published.error if row.against else None
        yield curve if published is None else curve | {"published": published}
    for number, partial in enumerate(partials, 1):
        if curve := _combine([_load_epochs(partial)], "error", errors):
            yield curve | {"unfinished": number}
    on_test = row.evaluated_on == "test"
    names = {"training": ("train_error", "loss"), "test" if on_test else "held out": ("error", "eval_loss")}
    for kind, (error, loss) in (names | ({} if on_test else {"test": ("test_error", "")})).items():
        if curve := _combine(done, "train_error", {"error": (error, mean), "loss": (loss, mean)}):
            yield curve | {"of": kind}


def _load_epochs(run: Stored | Interrupted) -> list[EpochMetrics]:
    """None where they cannot be read: the table stands on the record, and `harness why` names the fault."""
    with suppress(OSError, ValueError):
        return load_epochs(run.folder)
    return []


def is_finite(value: float | None) -> bool:
    """False also for the last loss of a run that diverged."""
    return value is not None and math.isfinite(value)


def _combine(runs: Sequence[Sequence[EpochMetrics]], needed: str, figures: Figures) -> dict[str, Any]:
    """Figures of the epochs in which all runs have the one that is needed, to four digits; None where a run lacks another.

    Runs without any such epoch do not count; nothing where none has one.
    """
    numbered = [{e.epoch: e for e in run if is_finite(getattr(e, needed))} for run in runs]
    having = [run for run in numbered if run]
    if not having or not (epochs := sorted(set.intersection(*map(set, having)))):
        return {}
    curve: dict[str, Any] = {"epoch": epochs}
    for name, (own, of) in figures.items():
        columns: list[list[Any]] = [[getattr(run[number], own, None) for run in having] for number in epochs]
        curve[name] = [float(f"{of(column):.4g}") if all(map(is_finite, column)) else None for column in columns]
    return curve


def _curve_charts(curves: Values, error: str, styles: Mapping[str, Style]) -> Iterator[Chart]:
    said = {
        ": mean of the seeds, band from the smallest to the largest": any(c["low"] != c["high"] for c in curves),
        "; thin, with a mark at its end: a run that did not finish": any("unfinished" in c for c in curves),
        "; level: the published error": any("published" in c for c in curves),
    }
    caption = "".join(["Error after each epoch", *(words for words, true in said.items() if true)])
    last = max(curve["epoch"][-1] for curve in curves)
    spec = make_spec("curves", styles, first=1, last=max(last, 2), zero=True, error=error)
    yield Chart("curves", caption, spec)
    if last >= 4 and not all("unfinished" in curve for curve in curves):
        first = last // 2 + 1
        spec = make_spec("curves", styles, first=first, last=last, zero=False, error=error)
        yield Chart("zoom", f"The same from epoch {first}", spec)


def _learning_charts(curves: Values, styles: Mapping[str, Style]) -> Iterator[Chart]:
    last = max(curve["epoch"][-1] for curve in curves)
    kinds = list(dict.fromkeys(curve["of"] for curve in curves))
    for figure, title, of in (("error", "error, %", kinds), ("loss", "loss", kinds[:2])) if last > 1 else ():
        on = " and ".join(of[1:]).replace("held out", "held-out")
        caption = f"Mean {figure} of the seeds on {on} images after each epoch"
        spec = make_spec("learning", styles, figure=figure, title=title, last=last, kinds=of)
        yield Chart(f"learning-{figure}", f"{caption}; thin: on training images, during it", spec)


# --- error against cost, memory by category ---


def _points(rows: Mapping[str, Row], figure: str) -> Values:
    """`best`: no other row is better in both. These, and others where rows are few, have their names beside them, where
    that covers nothing, in a chart as small as a phone's."""
    costs = ((row.figures[figure].value, _final_error(row), label) for label, row in rows.items())
    lowest, points = math.inf, Values()
    for cost, error, label in sorted((c, e, label) for c, e, label in costs if c is not None and c + e < math.inf):
        std = rows[label].figures["error"].std or 0.0
        disturbed = figure == "epoch_seconds" and any(result.all_disturbed for result in rows[label].results)
        points.append({
            "row": label, "cost": float(f"{cost:.6g}"), "error": round(error, 2), "low": round(error - std, 2),
            "high": round(error + std, 2), "best": error < lowest, **({"disturbed": True} if disturbed else {}),
        })  # fmt: skip
        lowest = min(lowest, error)
    width = max((p["cost"] for p in points), default=0.0) or 1.0
    height = max((p["high"] for p in points), default=0.0) - min((p["low"] for p in points), default=0.0) or 1.0
    few, one_network = len(points) <= MAX_BARS, len({p["row"].partition(" · ")[0] for p in points}) == 1
    spots = [(p["cost"] / width, p["cost"] / width, p["error"] / height) for p in points if few]
    taken: dict[str, tuple[float, float, float]] = {}  # by names: from left to right, and their height
    for point in sorted((p for p in points if few or p["best"]), key=lambda p: not p["best"]):
        network, _, condition = point["row"].partition(" · ")
        name = (condition or network if one_network else point["row"]) if few else network
        x, y, long = point["cost"] / width, point["error"] / height, LETTER * len(name)
        left, right = (x - long, x) if x > long else (x, x + long)
        others = (*taken.values(), *(() if point["best"] else spots))
        clear = right <= 1 and all(right <= a or b <= left or abs(y - c) > LINE for a, b, c in others)
        if clear and name not in taken:
            taken[name] = left, right, y
            point |= {"name": name, "right": x <= long}
    return points


def _frontier_charts(points: Values, figure: str, error: str, styles: Mapping[str, Style]) -> Iterator[Chart]:
    means = METRICS[figure].means.removeprefix("MiB, ").partition(":")[0]
    name, cost = ("seconds", "seconds per epoch") if figure == "epoch_seconds" else ("memory", f"{means}, MiB")
    caption = f"Error against {cost}; the line joins rows that no other row beats in both"
    caption += "; hollow: of a run without an undisturbed epoch" * any("disturbed" in point for point in points)
    one = len({point[end] for point in points for end in ("low", "high")}) == 1  # which gives an axis one tick
    yield Chart(name, caption, make_spec("frontier", styles, data=name, cost=cost, error=error, zero=one))


def _category_charts(categories: Mapping[str, Mapping[str, float]], *, on_gpu: bool) -> Iterator[Chart]:
    """A bar a row, its parts from left to right; what is below zero goes to the left. A tick marks the sum."""
    whole = "GPU memory of the process" if on_gpu else "resident memory"
    caption = f"Who holds the {whole}: of the run of a row that used most; the tick is what was measured"
    if any(value < 0 for parts in categories.values() for value in parts.values()):
        caption += "; left of zero: what the categories count twice"
    if len(categories) == MAX_BARS:
        caption += f"; the {MAX_BARS} rows with the smallest error"
    parts, title = category_colours(categories), f"{whole}, MiB"
    spec = make_spec("categories", bars=[*categories], title=title, parts=[*parts], shades=[*parts.values()])
    yield Chart("categories", caption, spec)


def category_colours(categories: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """The categories that hold something in any row, in their order, with their colours.

    These are distinct also for the colour-blind, neighbours most of all: chosen by a search over CIELAB distances as seen
    without one of the cones, on white and on the dark page. A GPU has no "process at its start", a CPU no CUDA context.
    """
    names = {name: 1.0 for parts in categories.values() for name in parts}
    colours = load_specs()["memory"]
    return {name: colours.get(name, colours["other"]) for name in known(names)}


# --- specs and files ---


@cache
def load_specs() -> dict[str, Any]:
    specs: dict[str, Any] = json.loads(Path(__file__).with_name("charts.json").read_text(encoding="utf-8"))
    return specs


def make_spec(name: str, styles: Mapping[str, Style] | None = None, **values: Any) -> dict[str, Any]:
    """A spec of `charts.json`, each "$word" in it replaced by a value or by another part of that file.

    `styles`: of the rows in it, which a legend explains where it helps.
    """
    rows, parts = styles or {}, load_specs()
    values |= {"rows": [*rows], **dict(zip(Style._fields, zip(*rows.values(), strict=True), strict=False))}
    text = json.dumps(parts[name])
    for given in (parts, values):  # in a value nothing is replaced
        text = re.sub(r'"\$(\w+)"', lambda word: json.dumps(given.get(word[1], word[0].strip('"'))), text)  # noqa: B023
    if 1 < len(rows) <= MAX_LEGEND:
        text = text.replace(', "legend": null', "")
    spec: dict[str, Any] = json.loads(text)
    return spec


def write_charts(panels: Sequence[Panel], folder: Path) -> list[Path]:
    """Draw every chart into a folder, as SVG and PNG, without a browser: <data set>-curves.svg and so on.

    Returns the files. Raises OSError where one cannot be written.
    """
    import vl_convert

    folder.mkdir(parents=True, exist_ok=True)
    written, stems = list[Path](), Counter[str]()
    options: dict[str, Any] = {"vl_version": VEGA_LITE, "config": load_specs()["light"]}
    for panel, chart in [(p, chart) for p in panels for chart in p.charts]:
        stem = re.sub(r"[^A-Za-z0-9.+_]+", "-", f"{panel.stem[:80]}-{chart.name[:40]}").strip("-.") or "x"
        stems[stem] += 1
        stem += f"-{stems[stem]}" * (stems[stem] > 1)
        height = BAR * len(panel.categories) if chart.name == "categories" else HEIGHT
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
