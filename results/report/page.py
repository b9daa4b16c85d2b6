"""Rows -> one page for a browser: table, charts, runs, environments. It loads nothing from the network. Runs -> model cards.

Values are prepared here; `page.html` lays them out and escapes them.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime

from markupsafe import Markup, escape

from harness.results.explain import predicted_figures
from harness.results.metrics import METRICS, NONE, figures, rounded
from harness.results.report.charts import category_colours, is_finite, make_labels, name_images
from harness.results.report.columns import Column, end_of
from harness.results.report.sweeps import clamp, draw_all, show
from harness.results.report.table import lay_out
from harness.results.report.text import HERE, MARKS, NOT_RECORDED, ORDINARY, clean, fill_template, mib
from harness.results.rows import Row
from harness.results.store import Problem, Stored
from harness.results.sweeps import Sweep, best_first
from harness.results.values import Measurement, Record, RunResult, setting

NETWORK = Column("network", "network", right=False)
RUN_METRICS = [metric for metric in METRICS.values() if metric.kind != "size"]
FACETS = ("variant", "depth", "data set", "loader")
"""What the rows of the page can be filtered and grouped by."""
RUN_COLUMNS = ("seed", *(m.heading for m in RUN_METRICS), "attempts", "finished", "folder", "environment")


def make_page(
    rows: Sequence[Row], *, bundle: str, made_at: datetime, columns: Sequence[str] = (), problems: Sequence[Problem] = (),
    sweeps: Sequence[Sweep] = (),
) -> str:  # fmt: skip
    """The whole page as one HTML text; `bundle` is `charts.load_bundle()`.

    Raises ValueError for a column that does not exist.
    """
    shown, sheet = lay_out(rows, columns)
    labels = make_labels(rows)
    panels, searches = draw_all(rows, sweeps, labels)
    groups: dict[str, list[Stored]] = {}  # by environment; a run that failed knows less of its own
    done, failed = ([run for row in rows for run in getattr(row, name)] for name in ("done", "failed"))
    for run in done or failed:
        groups.setdefault(repr(_environment(run.record)), []).append(run)
    number = {run.folder: str(n) for n, runs in enumerate(groups.values(), 1) for run in runs}
    trials = {trial.run for sweep in sweeps for trial in sweep.trials}
    # variant and depth are one column: the first stays in place when the others scroll
    joined = [column.name for column in shown[:2]] == ["variant", "depth"]
    data = {
        "panels": [
            {"title": p.title, "rows": p.rows, "datasets": p.datasets, "charts": {c.name: c.spec for c in p.charts}}
            for p in (*panels, *searches)
        ],
        "columns": RUN_COLUMNS, "runs": [[[*_cells(*run), number[run[0].folder]] for run in zip(row.done, row.results, strict=True)] for row in rows],
        "facets": FACETS,
        "rows": [
            [clean(row.variant), row.depth, clean(row.dataset), clean(row.text("loader")), label]
            for row, label in zip(rows, labels, strict=True)
        ],
    }  # fmt: skip
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    css, script = (Markup((HERE / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    return fill_template(
        "page.html",
        made_at=made_at, rows=rows, sheet=sheet, labels=labels, panels=panels, joined=joined, problems=problems,
        columns=[NETWORK, *shown[2:]] if joined else shown, sweeps=list(zip(sweeps, searches, strict=True)),
        swatches={(panel.title, label): style for panel in panels for label, style in panel.rows.items()},
        row_of={run.folder.name: i for i, row in enumerate(rows) for run in row.done if run.folder.name in trials},
        probed=[(labels[i], pairs) for i, row in enumerate(rows) if (pairs := predicted_figures(row))],
        each=lambda name: [(row, run) for row in rows for run in getattr(row, name)],
        environments=[(_environment(runs[0].record), list(dict.fromkeys(map(_command, runs))), len(runs)) for runs in groups.values()],
        css=css, script=script,
        packed={"data": _pack(text), "vega": _pack(bundle if any(p.charts for p in (*panels, *searches)) else "")},
        NONE=NONE, category_colours=category_colours, clean=clean, best_first=best_first, clamp=clamp, Counter=Counter, end_of=end_of, is_finite=is_finite,
        link_marks=_link_marks, name_images=name_images, NOT_RECORDED=NOT_RECORDED, mib=mib, number=_number, rounded=rounded, show=show,
    )  # fmt: skip


def _pack(text: str) -> str:
    """For the page's script: a tenth of the size, and nothing in it that could end a script."""
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def _link_marks(text: str) -> Markup:
    """The text, escaped, with a link to each footnote whose mark it has."""

    def link(mark: re.Match[str]) -> str:
        links = [f'<a href="#note-{number}">{number}</a>' for number in mark[0].translate(ORDINARY).split(",")]
        return f"<sup>{','.join(links)}</sup>"

    return Markup(MARKS.sub(link, escape(text)))


def _number(value: float | Measurement | None, digits: int = 0) -> str:
    value = value.value if isinstance(value, Measurement) else value
    return NONE if value is None else f"{value:,.{digits}f}"


def _cells(stored: Stored, result: RunResult) -> list[str]:
    """A run's, in the order of `RUN_COLUMNS`, but the last."""
    record = stored.record
    whys = [setting(attempt, "reason") for attempt in setting(record.environment, "attempts", list) or ()]
    reasons = "; ".join(dict.fromkeys(clean(str(why)) for why in whys if why))
    return [
        str(record.seed), *(metric.text(metric.value(result)) for metric in RUN_METRICS),
        f"{result.attempts}{f': {reasons}' * bool(reasons)}", f"{record.finished_at:%Y-%m-%d %H:%M}", clean(stored.folder.name),
    ]  # fmt: skip


def _command(stored: Stored) -> str:
    return shlex.join(map(str, setting(stored.record.environment, "command", list) or ()))


def _environment(record: Record) -> dict[str, object]:
    """Commit, versions, machine: what runs share that were made in one environment, whatever their command and attempts."""
    environment, result = record.environment, record.result
    machine = {"device": result.device, "threads a worker": result.threads, **result.machine} if result else {}
    every = machine | environment | machine  # what the machine says wins, and stands first
    fields = {n: v for n, v in every.items() if v is not None and n not in ("command", "attempts", "dirty")}
    if isinstance(versions := fields.get("versions"), Mapping):
        fields["versions"] = ", ".join(f"{package} {version}" for package, version in versions.items())
    if environment.get("dirty"):
        fields["commit"] = f"{fields.get('commit')} and uncommitted changes"
    return fields


# --- what stands beside a run's weights, from its record alone ---

CARD = "README.md"


def make_card(record: Record, *, about: str = "", classes: int | None = None) -> str:
    """Markdown with the front matter of model hubs: figures, network, recipe, how to load it and train it again.

    `about`: a sentence on the variant. `classes`: of the data set. Raises ValueError for a run without a result.
    """
    if record.result is None:
        raise ValueError(f"{record.name} has no result")
    version = (record.environment.get("versions") or {}).get("resnet-harness")
    known = {"record": record, "result": record.result, "images": record.images(), "metrics": METRICS.values()}
    return fill_template("card.md.j2", figures=figures, about=about, classes=classes, version=version, **known)
