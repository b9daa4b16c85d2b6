"""Rows -> one page for a browser: table, charts, runs, environments. It loads nothing from anywhere."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from harness.results import prediction as predicted
from harness.results.report import memory as categories
from harness.results.report.charts import Panel, make_labels, make_panels
from harness.results.report.sweeps import SweepSummary, SweepTrial, finite, make_sweep_charts, show
from harness.results.report.table import Column, Layout, lay_out, sort_value
from harness.results.report.text import clean
from harness.results.rows import NONE, Row
from harness.results.store import Interrupted, Problem, Stored
from harness.results.values import Record, RunResult

TALL = 40  # rows: a longer table scrolls in itself, so that the charts are not out of reach
MAX_FAILED = 300  # whose tracebacks are printed
MAX_TRACEBACK = 4_000  # characters, the last ones
MAX_SETTINGS = 400  # rows whose settings are all printed
MAX_PREDICTED = 100  # rows
MAX_ENVIRONMENTS = 50
MAX_COMMANDS = 5
HERE = Path(__file__).parent


def make_page(
    rows: Sequence[Row],
    *,
    bundle: str,
    made_at: datetime,
    title: str = "Residual networks, compared",
    columns: Sequence[str] = (),
    problems: Sequence[Problem] = (),
    sweeps: Sequence[SweepSummary] = (),
) -> str:
    """The whole page as one HTML text; `bundle` is `charts.load_bundle()`.

    Raises ValueError for a column that does not exist.
    """
    layout = lay_out(rows, columns)
    labels = make_labels(rows, None if columns else layout)
    panels = make_panels(rows, labels)
    environments = _Environments()
    runs = [[_run(stored, environments) for stored in row.done] for row in rows]
    if not environments.numbers:  # a run that failed knows less of where it was
        for stored in (stored for row in rows for stored in row.failed):
            environments.add(stored.record)
    data = {
        "panels": [_panel(panel) for panel in panels],
        "columns": list(RUN_COLUMNS),
        "runs": runs,
    }
    drawn = [make_sweep_charts(sweep) for sweep in sweeps]
    if sweeps:
        data["sweeps"] = [{chart: spec for chart, (_, spec) in charts.items()} for charts in drawn]
    searched = {trial.run for sweep in sweeps for trial in sweep.trials}
    places = {s.folder.name: i for i, row in enumerate(rows) for s in row.done if s.folder.name in searched}
    swatches = {i: panel.styles[i].colour for panel in panels for i in panel.styles}
    body = [
        f"<header><h1>{_text(title)}</h1><p class=lede>{_text(_lede(rows))}</p>"
        f"<p class=shared>{_text(layout.caption)}</p></header><main>",
        *_comparison(rows, layout, swatches),
        *(part for k, panel in enumerate(panels) for part in _charts(k, panel, len(rows))),
        *(
            part
            for k, (sweep, charts) in enumerate(zip(sweeps, drawn, strict=True))
            for part in _sweep(k, sweep, {chart: caption for chart, (caption, _) in charts.items()}, places)
        ),
        *_predicted(rows, labels),
        *_unfinished(rows, problems),
        *_runs(rows, set(places.values())),
        *environments.html(),
        f"</main><footer>made {made_at:%Y-%m-%d %H:%M} UTC by <code>harness report</code>; this page loads nothing from the "
        "network</footer>",
    ]
    # "<" inside a script could end it; JSON and JavaScript strings may hold it in this form
    stored_data = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace(
        "<", "\\u003c"
    )
    scripts = [bundle.replace("</script", "<\\/script"), (HERE / "page.js").read_text(encoding="utf-8")]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">',
            f'<meta http-equiv=Content-Security-Policy content="{POLICY}"><meta name=color-scheme content="light dark">',
            f"<title>{_text(title)}</title>",
            f"<style>{(HERE / 'page.css').read_text(encoding='utf-8')}</style></head><body>",
            *body,
            f"<script type=application/json id=data>{stored_data}</script>",
            *(f"<script>{script}</script>" for script in (scripts if panels or any(drawn) else scripts[1:])),
            "</body></html>",
            "",
        ]
    )


POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
"""The browser itself keeps the page from the network; Vega compiles its expressions, hence unsafe-eval."""


def _text(value: object) -> str:
    return escape(clean(str(value)))


def _lede(rows: Sequence[Row]) -> str:
    done = sum(len(row.done) for row in rows)
    missing = sum(len(row.failed) + len(row.pruned) + len(row.interrupted) for row in rows)
    parts = [_count(done, "run"), f"in {_count(len(rows), 'row')}"]
    if missing:
        parts.append(f"· {missing} not finished")
    return " ".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


# --- the table ---


def _comparison(rows: Sequence[Row], layout: Layout, swatches: Mapping[int, str]) -> Iterator[str]:
    yield "<section id=comparison><h2>Comparison</h2>"
    if not rows:
        yield "<p>no runs</p></section>"
        return
    columns = layout.columns[1:]
    if [column.name for column in columns[:2]] == [
        "variant",
        "depth",
    ]:  # the first column stays when the rest scrolls
        columns = [NETWORK, *columns[2:]]
    tall = " tall" if len(rows) > TALL else ""
    yield (
        f'<div class="scroll first-stays{tall}" tabindex=0 role=region aria-label="comparison table">'
        "<table class=sortable><thead><tr>"
    )
    for column in columns:
        side = " class=r" if column.right else ""
        tip = f' title="{_text(column.means)}"' if column.means else ""
        yield (
            f"<th scope=col{side}{tip}><button type=button>{_text(column.header)}</button>"
            f"{_marks(layout.header_marks.get(column.name, ()))}</th>"
        )
    yield "</tr></thead><tbody>"
    for i, row in enumerate(rows):
        cells = "".join(_cell(k, column, i, row, layout, swatches) for k, column in enumerate(columns))
        yield f"<tr>{cells}</tr>"
    yield "</tbody></table></div>"
    if layout.notes:
        notes = "".join(f"<li id=note-{k}>{_text(note)}</li>" for k, note in enumerate(layout.notes, 1))
        yield f"<ol class=notes>{notes}</ol>"
    yield "<details class=means><summary>What the columns mean</summary><dl>"
    for column in columns:
        if column.means:
            yield f"<dt>{_text(column.header)}</dt><dd>{_text(column.means)}</dd>"
    yield "</dl></details></section>"


NETWORK = Column("network", "network", lambda r: r.name, right=False)


def _cell(k: int, column: Column, i: int, row: Row, layout: Layout, swatches: Mapping[int, str]) -> str:
    words = layout.words[column.name][i] if column is not NETWORK else column.text(row)
    value = sort_value(column.name, row) if column is not NETWORK else f"{row.variant} {row.depth:06}"
    if isinstance(value, float) and not math.isfinite(value):
        value = None
    kinds = ["r"] if column.right else []
    if column.name == "error" and row.error is None:
        kinds.append("bad" if row.failed else "warn")
    inside = _text(words)
    if column.name == "verdict" and row.against and row.against.verdict:
        inside = f"<span class={row.against.verdict.verdict}>{inside}</span>"
    if k == 0:
        colour = swatches.get(i)
        swatch = f'<i class=swatch style="background:{colour}"></i>' if colour else ""
        inside = f"<span class=name>{swatch}{inside}</span>"
    attributes = f' class="{" ".join(kinds)}"' if kinds else ""
    if value is not None:
        attributes += f' data-v="{_text(repr(value) if isinstance(value, float) else value)}"'
    tag = "th scope=row" if k == 0 else "td"
    return f"<{tag}{attributes}>{inside}{_marks(layout.marks.get((i, column.name), ()))}</{tag[:2]}>"


def _marks(numbers: Sequence[int]) -> str:
    links = ",".join(f'<a href="#note-{number}">{number}</a>' for number in numbers)
    return f"<sup>{links}</sup>" if links else ""


# --- the charts ---


def _charts(k: int, panel: Panel, rows: int) -> Iterator[str]:
    yield f"<section class=panel data-panel={k}><h2>{_text(panel.title)}</h2>"
    if panel.left_out:
        shown = len({curve.row for curve in panel.curves})
        yield (
            f"<p class=hint>Curves of {_count(shown, 'row')}, those with the smallest error; {panel.left_out:,} more are in "
            "the table and the charts of cost.</p>"
        )
    yield '<div class=chips role=group aria-label="rows shown in the charts"></div><div class=figures>'
    for chart in panel.specs:
        size = f' style="height:{categories.height(len(panel.categories))}px"' if chart == "categories" else ""
        yield (
            f"<figure{' class=wide' if chart == 'categories' else ''}>{_legend(panel) if chart == 'categories' else ''}"
            f"<div class=chart data-chart={chart}{size} role=img "
            f'aria-label="{_text(panel.captions[chart])}"></div>'
            f"<figcaption>{_text(panel.captions[chart])}</figcaption></figure>"
        )
    yield "</div>"
    if panel.categories:
        yield from _categories(panel)
    else:
        yield f"<p class=hint>{categories.NOT_RECORDED}</p>"
    yield "<noscript><p>The charts need JavaScript.</p></noscript></section>"


def _legend(panel: Panel) -> str:
    """The categories and their colours; it wraps where Vega's own would be cut off."""
    parts = (
        f'<li><i style="background:{c}"></i>{_text(n)}</li>'
        for n, c in categories.colours(panel.categories).items()
    )
    return f"<ul class=legend>{''.join(parts)}</ul>"


def _categories(panel: Panel) -> Iterator[str]:
    """The same as a table, for whom colours say little."""
    names = list(categories.colours(panel.categories))
    heads = "".join(f"<th scope=col class=r>{_text(name)}</th>" for name in (*names, "in all"))
    yield (
        "<details class=means><summary>Memory by category in numbers, MiB</summary><div class=scroll><table><thead><tr>"
        f"<th scope=col>row</th>{heads}</tr></thead><tbody>"
    )
    for i, parts in panel.categories.items():
        values = [*(parts.get(name) for name in names), sum(parts.values())]
        cells = "".join(f"<td class=r>{NONE if value is None else categories.mib(value)}</td>" for value in values)
        yield f"<tr><th scope=row>{_text(panel.labels[i])}</th>{cells}</tr>"
    yield "</tbody></table></div></details>"


def _panel(panel: Panel) -> dict[str, Any]:
    """What the script needs of a panel; errors rounded to what the table shows."""
    return {
        "names": {str(i): name for i, name in panel.labels.items()},
        "styles": {str(i): [style.colour, list(style.dash)] for i, style in panel.styles.items()},
        "specs": panel.specs,
        "curves": [
            {
                "row": curve.row,
                "epochs": _epochs(curve.epochs),
                "mean": _round(curve.mean),
                **({} if curve.runs == 1 else {"low": _round(curve.low), "high": _round(curve.high)}),
                **({"unfinished": True} if curve.unfinished else {}),
            }
            for curve in panel.curves
        ],
        "points": {
            chart: [[p.row, float(f"{p.cost:.6g}"), round(p.error, 2), None if p.std is None else round(p.std, 2), p.best]
                    for p in points]
            for chart, points in panel.points.items()
        },
        "categories": {str(i): {name: round(value, 2) for name, value in parts.items()} for i, parts in panel.categories.items()},
    }  # fmt: skip


def _epochs(epochs: list[int]) -> int | list[int]:
    """Only their number where they are 1, 2, 3, ..."""
    return len(epochs) if epochs == list(range(1, len(epochs) + 1)) else epochs


def _round(values: Iterable[float]) -> list[float]:
    return [round(value, 2) for value in values]


# --- sweeps ---


def _sweep(k: int, sweep: SweepSummary, captions: Mapping[str, str], places: Mapping[str, int]) -> Iterator[str]:
    """One search: what was searched and how, its plots, what mattered, every trial."""
    trials = sweep.best_first()
    states = ", ".join(
        f"{n} {state}"
        for state in ("running", "finished", "pruned", "failed")
        if (n := sum(trial.state == state for trial in trials))
    )
    space = ", ".join(f"{d.field}={d.function}({','.join(map(show, d.values))})" for d in sweep.dimensions)
    yield (
        f"<section class=sweep data-sweep={k} id=sweep-{k}><h2>Sweep of {_text(sweep.title)} on {_text(sweep.dataset)}</h2>"
        f"<p class=hint>{len(trials)} of {_count(sweep.total, 'trial')} of {_count(sweep.epochs, 'epoch')}"
        f"{': ' + states if states else ''} · scheduler {_text(sweep.scheduler)} · proposals {_text(sweep.search_algorithm)}"
        f" · judged by {_text(sweep.judged)} · <code>{_text(space)}</code> · {_text(sweep.name)}</p>"
    )
    if captions:
        yield "<div class=figures>"
        for chart, caption in captions.items():
            wide = " class=wide" if chart == "parallel" else ""
            yield (
                f'<figure{wide}><div class=chart data-chart="{_text(chart)}" role=img aria-label="{_text(caption)}"></div>'
                f"<figcaption>{_text(caption)}</figcaption></figure>"
            )
        yield "</div><noscript><p>The charts need JavaScript.</p></noscript>"
    if weights := sweep.importance:
        yield (
            f"<h3>Importance</h3><p class=hint>{_text(weights.how)}, {_count(weights.trials, 'trial')} at epoch "
            f"{weights.epoch}</p><div class=scroll><table class=importance>"
        )
        for weight in weights.fields:
            share = finite(weight.value)
            width = 0.0 if share is None else 100 * min(max(share, 0.0), 1.0)
            yield (
                f"<tr><th scope=row>{_text(weight.field)}</th><td class=r>{_figure(share, 2)}</td>"
                f'<td class=bar><i style="width:{width:.0f}%"></i></td><td>{_text(weight.sign)}</td></tr>'
            )
        yield "</table></div>"
    yield "<h3>Trials</h3>"
    if not trials:
        yield "<p class=hint>none yet</p></section>"
        return
    tall = " tall" if len(trials) > TALL else ""
    yield (
        f'<div class="scroll first-stays{tall}" tabindex=0 role=region aria-label="trials of {_text(sweep.name)}">'
        "<table class=sortable><thead><tr>"
    )
    fields = [d.field for d in sweep.dimensions]
    for header in ("trial", *fields, sweep.heading, "epochs", "state", "seconds", "run"):
        side = " class=r" if header not in ("state", "run") else ""
        yield f"<th scope=col{side}><button type=button>{_text(header)}</button></th>"
    yield "</tr></thead><tbody>"
    for trial in trials:
        yield "<tr>" + "".join(_trial(sweep, trial, fields, places)) + "</tr>"
    yield "</tbody></table></div></section>"


STATES = {"failed": "bad", "pruned": "warn", "running": "warn"}


def _trial(
    sweep: SweepSummary, trial: SweepTrial, fields: Sequence[str], places: Mapping[str, int]
) -> Iterator[str]:
    """The cells of a trial."""

    def number(value: float | None, shown: str) -> str:
        known = finite(value)
        return f"<td class=r>{NONE}</td>" if known is None else f'<td class=r data-v="{known!r}">{shown}</td>'

    yield f"<th scope=row class=r data-v={trial.number}>{trial.number}</th>"
    for name in fields:
        value = trial.fields[name]
        by = repr(value) if isinstance(value, int | float) and not isinstance(value, bool) else show(value)
        yield f'<td class=r data-v="{_text(by)}">{_text(show(value))}</td>'
    yield number(trial.last, f"{trial.last:.4g}" if trial.last is not None else "")
    yield f"<td class=r data-v={trial.epochs}>{trial.epochs}/{sweep.epochs}</td>"
    kind = f" class={STATES[trial.state]}" if trial.state in STATES else ""
    reason = f", {trial.reason}" if trial.reason else ""
    yield f"<td class=reason data-v={trial.state}><span{kind}>{trial.state}</span>{_text(reason)}</td>"
    yield number(trial.seconds, f"{trial.seconds:,.1f}")
    run = _text(trial.run)
    yield f'<td data-v="{run}">' + (
        f'<a href="#row-{places[trial.run]}">{run}</a></td>' if trial.run in places else f"{run}</td>"
    )


# --- predictions ---


def _predicted(rows: Sequence[Row], labels: Sequence[str]) -> Iterator[str]:
    """What probes predicted, beside what was measured: a line for each row that was probed."""
    probed = [(i, pairs) for i, row in enumerate(rows) if (pairs := predicted.predicted_figures(row))]
    if not probed:
        return
    figures = list(dict.fromkeys(pair.figure for _, pairs in probed for pair in pairs))
    heads = "".join(f"<th scope=col class=r>{figure}</th>" for figure in figures)
    yield (
        "<section id=predicted><h2>Predicted → measured</h2><p class=hint>By <code>harness run --estimate</code>, a probe of "
        "some steps before the runs; below, measured minus predicted.</p>"
        '<div class="scroll" tabindex=0 role=region aria-label="predicted and measured"><table class=predicted><thead>'
        f"<tr><th scope=col>row</th>{heads}</tr></thead><tbody>"
    )
    reasons: dict[str, None] = {}
    for i, pairs in probed[:MAX_PREDICTED]:
        by_figure = {pair.figure: pair for pair in pairs}
        cells = "".join(_foretold(by_figure.get(figure)) for figure in figures)
        yield f"<tr><th scope=row><span class=name>{_text(labels[i])}</span></th>{cells}</tr>"
        reasons |= dict.fromkeys(f"{pair.figure} {pair.reason}" for pair in pairs if pair.reason)
    yield "</tbody></table></div>"
    if reasons:
        yield f"<ul class=notes>{''.join(f'<li>{_text(reason)}</li>' for reason in reasons)}</ul>"
    if len(probed) > MAX_PREDICTED:
        yield f"<p class=hint>and {len(probed) - MAX_PREDICTED:,} more rows: <code>harness why ROW</code></p>"
    yield "</section>"


def _foretold(pair: predicted.PredictedFigure | None) -> str:
    if pair is None or (pair.predicted.value is None and pair.actual.value is None):
        return f"<td class=r>{NONE}</td>"
    below = "" if pair.difference is None else f"<small>{predicted.show_difference(pair)}</small>"
    return f"<td class=r>{predicted.show(pair.predicted.value)} → {predicted.show(pair.actual.value)}{below}</td>"


# --- the runs ---

RUN_COLUMNS = (
    "seed", "error %", "best %", "in epoch", "top-5 %", "test %", "s/epoch", "eval s", "set-up s", "start s", "training s",
    "img/s", "wait %", "energy kJ", "alloc MiB", "resvd MiB", "NVML MiB", "RSS MiB", "attempts", "finished", "folder", "environment",
)  # fmt: skip


def _run(stored: Stored, environments: _Environments) -> list[str]:
    """The cells of a run, in the order of `RUN_COLUMNS`."""
    record, result = stored.record, stored.record.result
    assert result is not None  # a row's finished runs
    memory = result.memory
    return [
        str(record.seed), _figure(result.final_error, 2), _figure(result.best_error, 2), str(result.best_epoch),
        _figure(result.final_top5_error, 2), _figure(result.test_error, 2), _figure(result.epoch_seconds, 3),
        _figure(result.eval_seconds, 3), _figure(result.setup_seconds, 1), _figure(result.launch_seconds, 1),
        _figure(result.train_seconds, 1), _figure(result.images_per_second, 0), _figure(result.data_stall_percent, 1),
        _figure(None if result.energy_joules.value is None else result.energy_joules.value / 1000, 1),
        *(_figure(reading.value, 0) for reading in (memory.torch_allocated_mib, memory.torch_reserved_mib,
                                                     memory.nvml_process_mib, memory.rss_mib)),
        _attempts(record, result.attempts), f"{record.finished_at:%Y-%m-%d %H:%M}", clean(stored.folder.name),
        str(environments.add(record)),
    ]  # fmt: skip


def _attempts(record: Record, count: int) -> str:
    """How many there were, and why there was another."""
    told = record.environment.get("attempts")
    found = (
        [attempt.get("reason") for attempt in told if isinstance(attempt, dict)] if isinstance(told, list) else []
    )
    reasons = dict.fromkeys(clean(str(reason)) for reason in found if reason)
    return f"{count}: {'; '.join(reasons)}" if reasons else str(count)


def _figure(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def _runs(rows: Sequence[Row], targets: Collection[int]) -> Iterator[str]:
    """One line a row; the script writes its runs into it when it is opened. `targets`: rows that a sweep links to."""
    done = [(i, row) for i, row in enumerate(rows) if row.done]
    if not done:
        return
    yield "<section id=runs><h2>Runs</h2>"
    if len(done) > MAX_SETTINGS:
        yield "<p class=hint>All settings of a row: <code>harness why ROW</code>.</p>"
    for i, row in done:
        about = " · ".join([row.dataset, row.loader, row.precision, row.device, *row.differs])
        yield (
            f"<details class=row data-row={i}{f' id=row-{i}' if i in targets else ''}><summary><b>{_text(row.name)}</b> <span>{_text(about)}</span> "
            f"<em>{_count(len(row.done), 'run')}</em></summary><div class=scroll></div>"
        )
        if len(done) <= MAX_SETTINGS:
            yield from _uses(row)
            yield f"<details><summary>All settings</summary>{_plain(row.fields)}</details>"
        yield "</details>"
    yield "</section>"


MAX_USES = 200  # lines of a row's nodes, and of its ranks
NODE_COLUMNS = ("seed", "node", "CPU %", "host MiB", "GPU", "used %", "mean W", "peak W", "J", "peak MiB")
RANK_COLUMNS = ("seed", "rank", "node", "s/epoch", "wait s", "alloc MiB", "resvd MiB", "NVML MiB", "RSS MiB")


def _uses(row: Row) -> Iterator[str]:
    """What the nodes did while the row's runs went on, and what each rank used."""
    nodes: list[tuple[str, ...]] = []
    ranks: list[tuple[str, ...]] = []
    for stored in row.done:
        result = stored.record.result
        if result is None:
            continue
        seed = str(stored.record.seed)
        for node in result.nodes:
            host = (seed, node.host, _figure(node.cpu_percent.value, 0), _figure(node.memory_peak_mib.value, 0))
            if not node.gpus:
                nodes.append((*host, node.gpus_reason or NONE, NONE, NONE, NONE, NONE, NONE))
            for gpu in node.gpus:
                readings = (gpu.utilisation_percent, gpu.power_watts, gpu.power_peak_watts, gpu.energy_joules,
                            gpu.memory_peak_mib)  # fmt: skip
                nodes.append((*host, gpu.gpu, *(_figure(reading.value, 0) for reading in readings)))
        if len(result.ranks) > 1:
            ranks += [
                (
                    seed, str(rank.rank), rank.host, _figure(rank.train_seconds, 3), _figure(rank.data_stall_seconds, 3),
                    *(_figure(mib, 0) for mib in (rank.torch_allocated_mib, rank.torch_reserved_mib,
                                                  rank.nvml_process_mib, rank.rss_mib)),
                )
                for rank in result.ranks
            ]  # fmt: skip
    for title, columns, lines in (
        ("Nodes, sampled each second from the workers' start to their end", NODE_COLUMNS, nodes),
        ("Ranks: medians of the last attempt, and peaks", RANK_COLUMNS, ranks),
    ):
        if not lines:
            continue
        head = "".join(f"<th scope=col>{_text(column)}</th>" for column in columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{_text(word)}</td>" for word in line) + "</tr>" for line in lines[:MAX_USES]
        )
        more = f"<p class=hint>and {len(lines) - MAX_USES:,} more</p>" if len(lines) > MAX_USES else ""
        yield (
            f"<details><summary>{_text(title)}</summary><div class=scroll><table class=runs><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table></div>{more}</details>"
        )


def _plain(fields: Mapping[str, object]) -> str:
    lines = "".join(
        f"<tr><th scope=row>{_text(n)}</th><td>{_text(value)}</td></tr>" for n, value in fields.items()
    )
    return f"<div class=scroll><table class=plain>{lines}</table></div>"


def _unfinished(rows: Sequence[Row], problems: Sequence[Problem]) -> Iterator[str]:
    """Runs that failed or did not finish, and folders that could not be read, each with its reason."""
    failed = [(row, stored) for row in rows for stored in row.failed]
    pruned = [(row, stored, at) for row in rows for stored in row.pruned if (at := stored.record.pruned)]
    partial = [(row, interrupted) for row in rows for interrupted in row.interrupted]
    if not (failed or pruned or partial or problems):
        return
    yield "<section id=unfinished><h2>Not finished</h2>"
    for row, stored in failed[:MAX_FAILED]:
        if failure := stored.record.failure:
            yield (
                f"<article class=failed><p><strong>{_text(failure.kind)}</strong> {_text(row.name)} seed "
                f"{stored.record.seed}: {_text(' '.join(failure.message.split()))}</p>"
                f"<p class=hint>{_text(stored.folder.name)}</p>"
            )
            if failure.traceback:
                cut = len(failure.traceback) > MAX_TRACEBACK
                yield (
                    f"<details><summary>traceback{', its end' if cut else ''}</summary>"
                    f"<pre>{escape(failure.traceback[-MAX_TRACEBACK:])}</pre></details>"
                )
            yield "</article>"
    if len(failed) > MAX_FAILED:
        yield f"<p class=hint>and {len(failed) - MAX_FAILED:,} more that failed</p>"
    for row, stored, at in pruned[:MAX_FAILED]:
        yield (
            f"<article><p><strong>pruned</strong> {_text(row.name)} seed {stored.record.seed} by {_text(at.by)} of sweep "
            f"{_text(at.sweep)} after epoch {at.epoch} of {at.of}, at {at.error:.2f} %: {_text(stored.folder.name)}</p></article>"
        )
    if len(pruned) > MAX_FAILED:
        yield f"<p class=hint>and {len(pruned) - MAX_FAILED:,} more that were pruned</p>"
    for row, interrupted in partial[:MAX_FAILED]:
        yield f"<article><p><strong>interrupted</strong> {_text(_who(row, interrupted))}</p></article>"
    if len(partial) > MAX_FAILED:
        yield f"<p class=hint>and {len(partial) - MAX_FAILED:,} more that were interrupted</p>"
    for problem in problems[:MAX_FAILED]:
        yield f"<article><p><strong>not read</strong> {_text(problem.path.name)}: {_text(problem.reason)}</p></article>"
    if len(problems) > MAX_FAILED:
        yield f"<p class=hint>and {len(problems) - MAX_FAILED:,} more that were not read</p>"
    yield "</section>"


def _who(row: Row, interrupted: Interrupted) -> str:
    seed = interrupted.spec.get("seed")
    of = f" of {interrupted.of}" if interrupted.of else ""
    return f"{row.name}{'' if seed is None else f' seed {seed}'} after epoch {interrupted.epochs}{of}: {interrupted.name}"


# --- the environments ---


class _Environments:
    """Every surrounding that runs were made in, once each, numbered from 1."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.fields: list[dict[str, object]] = []
        self.commands: list[dict[str, None]] = []
        self.runs: list[int] = []

    def add(self, record: Record) -> int:
        """The number of a run's environment."""
        fields = _environment(record)
        identity = repr(fields)
        if identity not in self.numbers:
            self.numbers[identity] = len(self.numbers) + 1
            self.fields.append(fields)
            self.commands.append({})
            self.runs.append(0)
        number = self.numbers[identity]
        self.runs[number - 1] += 1
        command = record.environment.get("command")
        if isinstance(command, list):
            self.commands[number - 1][shlex.join(map(str, command))] = None
        return number

    def html(self) -> Iterator[str]:
        """A section of the page."""
        if not self.fields:
            return
        yield "<section id=environments><h2>Environments</h2>"
        for number, (fields, commands, runs) in enumerate(
            list(zip(self.fields, self.commands, self.runs, strict=True))[:MAX_ENVIRONMENTS], 1
        ):
            some = list(commands)[:MAX_COMMANDS]
            more = [f"and {len(commands) - len(some):,} more"] if len(commands) > len(some) else []
            shown = {**fields, **({"command": "\n".join([*some, *more])} if some else {})}
            opened = " open" if len(self.fields) == 1 else ""
            yield (
                f"<details{opened}><summary><b>{number}</b> <span>{_text(fields.get('device', fields.get('host', '')))}</span> "
                f"<em>{_count(runs, 'run')}</em></summary>{_plain(shown)}</details>"
            )
        if len(self.fields) > MAX_ENVIRONMENTS:
            yield f"<p class=hint>and {len(self.fields) - MAX_ENVIRONMENTS:,} more</p>"
        yield "</section>"


def _environment(record: Record) -> dict[str, object]:
    """What a run was made in: commit, versions, machine. The command is told apart."""
    result: RunResult | None = record.result
    fields: dict[str, object] = {}
    if result is not None:
        fields |= {"device": result.device, "threads a worker": result.threads}
        fields |= {name: value for name, value in result.machine.items() if value is not None}
    for name, value in record.environment.items():
        if name == "versions" and isinstance(value, dict):
            fields["versions"] = ", ".join(f"{package} {version}" for package, version in value.items())
        elif name == "dirty":
            if value:
                fields["commit"] = (
                    f"{fields.get('commit', record.environment.get('commit'))} and uncommitted changes"
                )
        elif name not in ("command", "attempts") and value is not None:  # these are a run's own
            fields.setdefault(name, value)
    return fields
