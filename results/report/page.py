"""Rows -> one page for a browser: table, charts, runs, environments. It loads nothing from the network.

Values are prepared here; `page.html` lays them out and escapes them.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from harness.results.metrics import METRICS, NONE, rounded
from harness.results.prediction import predicted_figures
from harness.results.report import memory
from harness.results.report.charts import category_colours, make_labels
from harness.results.report.columns import Column
from harness.results.report.sweeps import clamp, draw_all, is_finite, show
from harness.results.report.table import lay_out, style_of
from harness.results.report.text import MARKS, ORDINARY, clean
from harness.results.rows import Row
from harness.results.store import Problem, Stored
from harness.results.sweeps import Sweep, best_first
from harness.results.values import Measurement, Record

HERE = Path(__file__).parent
NETWORK = Column("network", "network", lambda r: r.name, key=lambda r: f"{r.variant} {r.depth:06}", right=False)
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
    layout = lay_out(rows, columns)
    labels = make_labels(rows, None if columns else layout)
    panels, searches = draw_all(rows, sweeps, labels)
    every = [*panels, *searches]
    environments: dict[str, _Group] = {}
    runs = [[_run(stored, environments) for stored in row.done] for row in rows]
    if not environments:  # a run that failed knows less of its environment
        for stored in (stored for row in rows for stored in row.failed):
            _add_environment(environments, stored.record)
    trials = {trial.run for sweep in sweeps for trial in sweep.trials}
    row_of = {s.folder.name: i for i, row in enumerate(rows) for s in row.done if s.folder.name in trials}
    # variant and depth are one column: the first stays in place when the others scroll
    joined = [column.name for column in layout.columns[:2]] == ["variant", "depth"]
    drawn = [
        {"title": p.title, "rows": p.rows, "datasets": p.datasets, "charts": {c.name: c.spec for c in p.charts}}
        for p in every
    ]
    facets = [[clean(r.variant), r.depth, clean(r.dataset), clean(r.text("loader"))] for r in rows]
    named = [[*values, label] for values, label in zip(facets, labels, strict=True)]
    data = {"panels": drawn, "columns": RUN_COLUMNS, "runs": runs, "facets": FACETS, "rows": named}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    bundle = bundle if any(panel.charts for panel in every) else ""
    css, script = (Markup((HERE / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined,
        extensions=["jinja2.ext.do"],
        finalize=lambda value: clean(value) if type(value) is str else value,  # no control characters in what is printed
    )  # fmt: skip
    return environment.get_template("page.html").render(
        made_at=made_at, rows=rows, sheet=layout.sheet, labels=labels, panels=panels, joined=joined,
        columns=[NETWORK, *layout.columns[2:]] if joined else layout.columns, sweeps=list(zip(sweeps, searches, strict=True)), problems=problems,
        swatches={(panel.title, label): style.colour for panel in panels for label, style in panel.rows.items()}, row_of=row_of,
        probed=[(labels[i], pairs) for i, row in enumerate(rows) if (pairs := predicted_figures(row))],
        each=lambda name: [(row, run) for row in rows for run in getattr(row, name)],
        environments=list(environments.values()), css=css, script=script, packed={"data": _pack(text), "vega": _pack(bundle)},
        NONE=NONE, category_colours=category_colours, clean=clean, best_first=best_first, clamp=clamp, Counter=Counter, is_finite=is_finite,
        link_marks=_link_marks, memory=memory, number=_number, rounded=rounded, show=show, sort_key=_sort_key, style_of=style_of,
    )  # fmt: skip


def _pack(text: str) -> str:
    """For the page's script: a tenth of the size, and nothing in it that could end a script."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _link_marks(text: str) -> Markup:
    """The text, escaped, with a link to each footnote whose mark it has."""
    return Markup(MARKS.sub(_link, escape(text)))


def _link(mark: re.Match[str]) -> str:
    links = [f'<a href="#note-{number}">{number}</a>' for number in mark[0].translate(ORDINARY).split(",")]
    return f"<sup>{','.join(links)}</sup>"


def _number(value: float | Measurement | None, digits: int = 0) -> str:
    value = value.value if isinstance(value, Measurement) else value
    return NONE if value is None else f"{value:,.{digits}f}"


def _sort_key(column: Column, row: Row) -> str | None:
    key = column.sort_key(row)
    if isinstance(key, float):
        return f"{key:.6g}" if math.isfinite(key) else None
    return None if key is None else str(key)


def _run(stored: Stored, environments: dict[str, _Group]) -> list[str]:
    """The cells of a run, in the order of `RUN_COLUMNS`."""
    record, result = stored.record, stored.record.result
    assert result is not None  # a row's finished runs
    attempts = record.environment.get("attempts")
    whys = [a.get("reason") for a in attempts if isinstance(a, dict)] if isinstance(attempts, list) else []
    reasons = "; ".join(dict.fromkeys(clean(str(why)) for why in whys if why))
    return [
        str(record.seed), *(metric.text(metric.value(result)) for metric in RUN_METRICS),
        f"{result.attempts}: {reasons}" if reasons else str(result.attempts),
        f"{record.finished_at:%Y-%m-%d %H:%M}", clean(stored.folder.name), str(_add_environment(environments, record)),
    ]  # fmt: skip


@dataclass(slots=True)
class _Group:
    """Runs that were made in one environment: commit, versions, machine."""

    number: int  # from 1
    fields: dict[str, object]
    commands: dict[str, None] = field(default_factory=dict)
    runs: int = 0


def _add_environment(groups: dict[str, _Group], record: Record) -> int:
    """Count a run with those that share all but command and attempts with it; the number of their environment."""
    environment, result = record.environment, record.result
    machine = {"device": result.device, "threads a worker": result.threads, **result.machine} if result else {}
    machine = {name: value for name, value in machine.items() if value is not None}
    fields = machine | environment | machine
    fields = {n: v for n, v in fields.items() if v is not None and n not in ("command", "attempts", "dirty")}
    if isinstance(versions := fields.get("versions"), Mapping):
        fields["versions"] = ", ".join(f"{package} {version}" for package, version in versions.items())
    if environment.get("dirty"):
        fields["commit"] = f"{fields.get('commit')} and uncommitted changes"
    group = groups.setdefault(repr(fields), _Group(len(groups) + 1, fields))
    group.runs += 1
    if isinstance(command := environment.get("command"), list):
        group.commands[shlex.join(map(str, command))] = None
    return group.number
