"""Rows -> one page for a browser: table, charts, runs, environments. It loads nothing from the network.

Values are prepared here; `page.html` lays them out and escapes them.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from harness.results.metrics import METRICS, NONE
from harness.results.prediction import predicted_figures
from harness.results.report import memory
from harness.results.report.charts import make_labels, make_panels
from harness.results.report.columns import Column
from harness.results.report.sweeps import clamp, is_finite, make_sweep_panel, show
from harness.results.report.table import lay_out
from harness.results.report.text import clean
from harness.results.rows import Row
from harness.results.store import Problem, Stored
from harness.results.sweeps import Sweep, best_first
from harness.results.values import Measurement, Record

HERE = Path(__file__).parent
LIMITS = {
    "TALL": 40,  # rows: a longer table scrolls in itself, so that the charts are within reach
    "MAX_UNFINISHED": 300,  # of each kind
    "MAX_SETTINGS": 400,  # rows whose settings are all printed
    "MAX_PREDICTED": 100,  # rows
    "MAX_ENVIRONMENTS": 50,
    "MAX_COMMANDS": 5,
    "MAX_USES": 200,  # lines of a row's nodes, and of its ranks
}
MAX_TRACEBACK = 4_000  # characters, the last ones
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
"""With it the browser itself keeps the page from the network. Vega compiles its expressions, hence unsafe-eval."""

NETWORK = Column("network", "network", lambda r: r.name, right=False, key=lambda r: f"{r.variant} {r.depth:06}")
RUN_METRICS = [metric for metric in METRICS.values() if metric.kind != "size"]
RUN_COLUMNS = ("seed", *(m.heading for m in RUN_METRICS), "attempts", "finished", "folder", "environment")


def make_page(
    rows: Sequence[Row],
    *,
    bundle: str,
    made_at: datetime,
    title: str = "Residual networks, compared",
    columns: Sequence[str] = (),
    problems: Sequence[Problem] = (),
    sweeps: Sequence[Sweep] = (),
) -> str:
    """The whole page as one HTML text; `bundle` is `charts.load_bundle()`.

    Raises ValueError for a column that does not exist.
    """
    layout = lay_out(rows, columns)
    labels = make_labels(rows, None if columns else layout)
    panels, searches = make_panels(rows, labels), [(sweep, make_sweep_panel(sweep)) for sweep in sweeps]
    every = [*panels, *(panel for _, panel in searches)]
    environments: dict[str, _Group] = {}
    runs = [[_run(stored, environments) for stored in row.done] for row in rows]
    if not environments:  # a run that failed knows less of its environment
        for stored in (stored for row in rows for stored in row.failed):
            _add_environment(environments, stored.record)
    trials = {trial.run for sweep in sweeps for trial in sweep.trials}
    row_of = {s.folder.name: i for i, row in enumerate(rows) for s in row.done if s.folder.name in trials}
    scripts = [bundle.replace("</script", "<\\/script")] if any(panel.charts for panel in every) else []
    # variant and depth are one column: the first stays in place when the others scroll
    joined = [column.name for column in layout.columns[1:3]] == ["variant", "depth"]
    charts = [{chart.name: chart.spec for chart in panel.charts if chart.in_page} for panel in every]
    drawn = [{"rows": p.rows, "charts": c, "datasets": p.datasets} for p, c in zip(every, charts, strict=True)]
    data = {"panels": drawn, "columns": RUN_COLUMNS, "runs": runs}
    # "<" inside a script could end it; JSON strings may hold it in this form
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    css, script = (Markup((HERE / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    return _make_environment().get_template("page.html").render(
        title=title, made_at=made_at, policy=POLICY, rows=rows, layout=layout, labels=labels, panels=panels,
        columns=[NETWORK, *layout.columns[3:]] if joined else layout.columns[1:], sweeps=searches, problems=problems,
        swatches={label: colour for panel in panels for label, (colour, _) in panel.rows.items()}, row_of=row_of,
        probed=[(labels[i], pairs) for i, row in enumerate(rows) if (pairs := predicted_figures(row))],
        each=lambda name: [(row, run) for row in rows for run in getattr(row, name)],
        environments=list(environments.values()), data=Markup(text), css=css,
        scripts=[*map(Markup, scripts), script],
    )  # fmt: skip


def _make_environment() -> Environment:
    """Whatever is printed is escaped, and has no control characters."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined,
        extensions=["jinja2.ext.do"],
        finalize=lambda value: clean(value) if type(value) is str else value,
    )  # fmt: skip
    environment.globals |= {
        **LIMITS, "NETWORK": NETWORK, "NONE": NONE, "best_first": best_first, "clamp": clamp, "count": _count,
        "Counter": Counter, "cut": _cut, "MAX_TRACEBACK": MAX_TRACEBACK, "is_finite": is_finite, "kind": _kind, "memory": memory, "number": _number,
        "show": show, "sort_key": _sort_key,
    }  # fmt: skip
    return environment


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _number(value: float | Measurement | None, digits: int = 0) -> str:
    value = value.value if isinstance(value, Measurement) else value
    return NONE if value is None else f"{value:,.{digits}f}"


def _cut(traceback: str) -> Markup:
    return Markup("\n").join(escape(clean(line)) for line in traceback[-MAX_TRACEBACK:].splitlines())


def _sort_key(column: Column, row: Row) -> str | None:
    key = column.sort_key(row)
    if isinstance(key, float):
        return f"{key:.6g}" if math.isfinite(key) else None
    return None if key is None else str(key)


def _kind(column: Column, row: Row) -> str:
    kinds = ["r"] if column.right else []
    if column.name == "error" and row.error is None:
        kinds.append("bad" if row.failed else "warn")
    if column.name == "verdict" and row.against and row.against.word in ("better", "worse"):
        kinds.append(row.against.word)
    return " ".join(kinds)


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
    """Count a run with those of its environment, by its description; the environment's number."""
    fields = _describe_environment(record)
    group = groups.setdefault(repr(fields), _Group(len(groups) + 1, fields))
    group.runs += 1
    if isinstance(command := record.environment.get("command"), list):
        group.commands[shlex.join(map(str, command))] = None
    return group.number


def _describe_environment(record: Record) -> dict[str, object]:
    """What a run shares with others: all but its command and its attempts."""
    fields: dict[str, object] = {}
    if (result := record.result) is not None:
        machine = {name: value for name, value in result.machine.items() if value is not None}
        fields = {"device": result.device, "threads a worker": result.threads} | machine
    for name, value in record.environment.items():
        if name == "versions" and isinstance(value, Mapping):
            fields["versions"] = ", ".join(f"{package} {version}" for package, version in value.items())
        elif name == "dirty":
            if value:
                commit = fields.get("commit", record.environment.get("commit"))
                fields["commit"] = f"{commit} and uncommitted changes"
        elif name not in ("command", "attempts") and value is not None:
            fields.setdefault(name, value)
    return fields
