"""Rows -> one page for a browser: table, charts, runs, environments. It loads nothing from the network.

Values are prepared here; `page.html` lays them out and escapes them.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from harness.results import prediction
from harness.results.metrics import METRICS, NONE
from harness.results.report import memory
from harness.results.report.charts import Panel, make_labels, make_panels
from harness.results.report.sweeps import clamp, is_finite, make_sweep_panel, show
from harness.results.report.table import Column, Layout, lay_out, sort_value
from harness.results.report.text import clean
from harness.results.rows import Row
from harness.results.store import Interrupted, Problem, Stored
from harness.results.sweeps import Sweep, best_first
from harness.results.values import Measurement, Record

TALL = 40  # rows: a longer table scrolls in itself, so that the charts are within reach
MAX_UNFINISHED = 300  # of each kind
MAX_TRACEBACK = 4_000  # characters, the last ones
MAX_SETTINGS = 400  # rows whose settings are all printed
MAX_PREDICTED = 100  # rows
MAX_ENVIRONMENTS = 50
MAX_COMMANDS = 5
MAX_USES = 200  # lines of a row's nodes, and of its ranks
HERE = Path(__file__).parent
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
"""With it the browser itself keeps the page from the network. Vega compiles its expressions, hence unsafe-eval."""

RUN_METRICS = [metric for metric in METRICS.values() if metric.kind != "size"]
RUN_COLUMNS = (
    "seed",
    *(metric.heading for metric in RUN_METRICS),
    "attempts",
    "finished",
    "folder",
    "environment",
)
NODE_COLUMNS = ("seed", "node", "CPU %", "host MiB", "GPU", "used %", "mean W", "peak W", "J", "peak MiB")
RANK_COLUMNS = ("seed", "rank", "node", "s/epoch", "wait s", "alloc MiB", "resvd MiB", "NVML MiB", "RSS MiB")
STATES = {"failed": "bad", "pruned": "warn", "running": "warn"}


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
    panels = make_panels(rows, labels)
    sweep_panels = [make_sweep_panel(sweep) for sweep in sweeps]
    environments = _Environments()
    runs = [[_run(stored, environments) for stored in row.done] for row in rows]
    if not environments.groups:  # a run that failed knows less of its environment
        for stored in (stored for row in rows for stored in row.failed):
            environments.add(stored.record)
    trials = {trial.run for sweep in sweeps for trial in sweep.trials}
    row_of = {s.folder.name: i for i, row in enumerate(rows) for s in row.done if s.folder.name in trials}
    data = {"panels": [_data(p) for p in (*panels, *sweep_panels)], "columns": RUN_COLUMNS, "runs": runs}
    drawn = any(panel.charts for panel in (*panels, *sweep_panels))
    scripts = [bundle.replace("</script", "<\\/script")] if drawn else []
    return _environment().get_template("page.html").render(
        title=title, made_at=made_at, policy=POLICY, rows=rows, layout=layout, labels=labels, lede=_lede(rows),
        columns=_columns(layout), cells=_cells(rows, layout, panels, labels), panels=panels, row_of=row_of,
        sweeps=list(zip(sweeps, sweep_panels, strict=True)), probed=_probed(rows, labels), linked=set(row_of.values()),
        unfinished=_unfinished(rows, problems), environments=environments.groups,
        css=_read("page.css"), scripts=[*map(Markup, scripts), _read("page.js")],
        # "<" inside a script could end it; JSON strings may hold it in this form
        data=Markup(json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")),
    )  # fmt: skip


def _environment() -> Environment:
    """Everything printed is escaped, and has no control characters."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined,
        finalize=lambda value: clean(value) if type(value) is str else value,
    )  # fmt: skip
    limits = {name: value for name, value in globals().items() if name.startswith("MAX_") or name == "TALL"}
    environment.globals |= limits | {
        "NODE_COLUMNS": NODE_COLUMNS, "RANK_COLUMNS": RANK_COLUMNS, "STATES": STATES, "NONE": NONE, "memory": memory,
        "best_first": best_first, "clamp": clamp, "count": _count, "format_value": show, "is_finite": is_finite,
        "node_lines": _node_lines, "number": _number, "prediction": prediction, "rank_lines": _rank_lines,
    }  # fmt: skip
    return environment


def _read(name: str) -> Markup:
    return Markup((HERE / name).read_text(encoding="utf-8"))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _number(value: float | Measurement | None, digits: int) -> str:
    value = value.value if isinstance(value, Measurement) else value
    return NONE if value is None else f"{value:,.{digits}f}"


def _lede(rows: Sequence[Row]) -> str:
    done = sum(len(row.done) for row in rows)
    missing = sum(len(row.failed) + len(row.pruned) + len(row.interrupted) for row in rows)
    return f"{_count(done, 'run')} in {_count(len(rows), 'row')}" + (
        f" · {missing} not finished" if missing else ""
    )


def _data(panel: Panel) -> dict[str, Any]:
    charts = {chart.name: chart.spec for chart in panel.charts if chart.in_page}
    return {"rows": panel.rows, "charts": charts, "datasets": panel.datasets}


# --- the table ---

NETWORK = Column("network", "network", lambda row: row.name, right=False)


class Cell(NamedTuple):
    """One cell of the comparison; `sort` is what its column is sorted by."""

    text: str
    kind: str  # of its style
    sort: str | None
    marks: Sequence[int]
    swatch: str | None = None


def _columns(layout: Layout) -> list[Column]:
    """Variant and depth are one column: the first stays in place when the others scroll."""
    columns = layout.columns[1:]
    joined = [column.name for column in columns[:2]] == ["variant", "depth"]
    return [NETWORK, *columns[2:]] if joined else columns


def _cells(
    rows: Sequence[Row], layout: Layout, panels: Sequence[Panel], labels: Sequence[str]
) -> Iterator[list[Cell]]:
    swatches = {label: colour for panel in panels for label, (colour, _) in panel.rows.items()}
    for i, row in enumerate(rows):
        yield [_cell(column, i, row, layout, swatches.get(labels[i])) for column in _columns(layout)]


def _cell(column: Column, i: int, row: Row, layout: Layout, swatch: str | None) -> Cell:
    if column is NETWORK:
        return Cell(row.name, "", f"{row.variant} {row.depth:06}", (), swatch)
    value = sort_value(column.name, row)
    if isinstance(value, float):
        value = repr(value) if math.isfinite(value) else None
    kinds = ["r"] if column.right else []
    if column.name == "error" and row.error is None:
        kinds.append("bad" if row.failed else "warn")
    if column.name == "verdict" and row.against and row.against.verdict:
        kinds.append(row.against.verdict.verdict)
    marks = layout.marks.get((i, column.name), ())
    return Cell(
        layout.words[column.name][i], " ".join(kinds), None if value is None else str(value), marks, swatch
    )


# --- predictions ---


def _probed(rows: Sequence[Row], labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Label -> what a probe predicted beside what was measured, by figure."""
    return {
        labels[i]: {pair.figure: pair for pair in pairs}
        for i, row in enumerate(rows)
        if (pairs := prediction.predicted_figures(row))
    }


# --- the runs ---


def _run(stored: Stored, environments: _Environments) -> list[str]:
    """The cells of a run, in the order of `RUN_COLUMNS`."""
    record, result = stored.record, stored.record.result
    assert result is not None  # a row's finished runs
    figures = (metric.text(metric.value(result)) for metric in RUN_METRICS)
    number = environments.add(record)
    attempts = record.environment.get("attempts")
    whys = [a.get("reason") for a in attempts if isinstance(a, dict)] if isinstance(attempts, list) else []
    reasons = "; ".join(dict.fromkeys(clean(str(why)) for why in whys if why))
    return [
        str(record.seed), *figures, f"{result.attempts}: {reasons}" if reasons else str(result.attempts),
        f"{record.finished_at:%Y-%m-%d %H:%M}", clean(stored.folder.name), str(number),
    ]  # fmt: skip


def _node_lines(row: Row) -> list[list[str]]:
    """What the nodes did while the row's runs went on, in the order of `NODE_COLUMNS`."""
    lines = []
    for record, node in ((s.record, node) for s in row.done if s.record.result for node in s.record.result.nodes):
        host = [str(record.seed), node.host, _number(node.cpu_percent, 0), _number(node.memory_peak_mib, 0)]
        if not node.gpus:
            lines.append([*host, node.gpus_reason or NONE, *[NONE] * 5])
        for gpu in node.gpus:
            readings = (
                gpu.utilisation_percent,
                gpu.power_watts,
                gpu.power_peak_watts,
                gpu.energy_joules,
                gpu.memory_peak_mib,
            )
            lines.append([*host, gpu.gpu, *(_number(reading, 0) for reading in readings)])
    return lines


def _rank_lines(row: Row) -> list[list[str]]:
    """What each rank of the row's runs used, in the order of `RANK_COLUMNS`."""
    return [
        [
            str(stored.record.seed), str(rank.rank), rank.host, _number(rank.train_seconds, 3), _number(rank.data_stall_seconds, 3),
            *(_number(mib, 0) for mib in (rank.torch_allocated_mib, rank.torch_reserved_mib, rank.nvml_process_mib, rank.rss_mib)),
        ]
        for stored in row.done
        if stored.record.result and len(stored.record.result.ranks) > 1
        for rank in stored.record.result.ranks
    ]  # fmt: skip


class Unfinished(NamedTuple):
    """A run that did not finish, or a folder that could not be read."""

    kind: str
    text: str
    folder: str = ""
    traceback: Markup = Markup()
    cut: bool = False


def _unfinished(rows: Sequence[Row], problems: Sequence[Problem]) -> dict[str, list[Unfinished]]:
    """By the words for those that are left out."""
    groups: dict[str, list[Unfinished]] = defaultdict(list)
    for row in rows:
        for stored in row.failed:
            if failure := stored.record.failure:
                text = f"{row.name} seed {stored.record.seed}: {' '.join(failure.message.split())}"
                end = failure.traceback[-MAX_TRACEBACK:]
                lines = Markup("\n").join(escape(clean(line)) for line in end.splitlines())
                cut = len(end) < len(failure.traceback)
                groups["that failed"].append(Unfinished(failure.kind, text, stored.folder.name, lines, cut))
        for stored in row.pruned:
            if at := stored.record.pruned:
                text = (
                    f"{row.name} seed {stored.record.seed} by {at.by} of sweep {at.sweep} after epoch {at.epoch} of {at.of}, "
                    f"at {at.error:.2f} %: {stored.folder.name}"
                )
                groups["that were pruned"].append(Unfinished("pruned", text))
        for run in row.interrupted:
            groups["that were interrupted"].append(Unfinished("interrupted", _interrupted(row, run)))
    for problem in problems:
        groups["that were not read"].append(Unfinished("not read", f"{problem.path.name}: {problem.reason}"))
    order = ("that failed", "that were pruned", "that were interrupted", "that were not read")
    return {words: groups[words] for words in order if words in groups}


def _interrupted(row: Row, run: Interrupted) -> str:
    seed = run.spec.get("seed")
    of = f" of {run.of}" if run.of else ""
    return f"{row.name}{'' if seed is None else f' seed {seed}'} after epoch {run.epochs}{of}: {run.name}"


# --- the environments ---


@dataclass(slots=True)
class EnvironmentGroup:
    """An environment in which runs were made: commit, versions, machine."""

    number: int
    fields: dict[str, object]
    commands: dict[str, None] = field(default_factory=dict)
    runs: int = 0


class _Environments:
    """Every environment once, numbered from 1."""

    def __init__(self) -> None:
        self.groups: list[EnvironmentGroup] = []
        self.by_fields: dict[str, EnvironmentGroup] = {}

    def add(self, record: Record) -> int:
        """The number of a run's environment."""
        fields = _describe_environment(record)
        identity = repr(fields)
        group = self.by_fields.get(identity)
        if group is None:
            group = self.by_fields[identity] = EnvironmentGroup(len(self.groups) + 1, fields)
            self.groups.append(group)
        group.runs += 1
        if isinstance(command := record.environment.get("command"), list):
            group.commands[shlex.join(map(str, command))] = None
        return group.number


def _describe_environment(record: Record) -> dict[str, object]:
    """What a run shares with others: all but its command and its attempts."""
    fields: dict[str, object] = {}
    if (result := record.result) is not None:
        fields |= {"device": result.device, "threads a worker": result.threads}
        fields |= {name: value for name, value in result.machine.items() if value is not None}
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
