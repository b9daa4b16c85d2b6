"""Stored runs -> tables, pages, files and answers: `harness report`, `compare`, `why`, `export` and `variants`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from harness.options import ReportOptions
from harness.plan import open_out
from harness.progress import say
from harness.results.remote import StorageError, is_uri, push_run
from harness.results.store import HASHES, WEIGHTS, collector_paused, load_predictions, load_records, write_atomic
from harness.spec import UserError, check_word

if TYPE_CHECKING:
    from rich.console import Console

    from harness.commands.preset import PresetTable
    from harness.results.rows import Row
    from harness.results.store import Loaded, Problem, Stored
    from harness.results.sweeps import Sweep

PAGE = "report.html"
COMPARISON_FORMATS = ("table", "markdown", "json")


def find_results(words: Sequence[str], *, also: str = "") -> list[Path]:
    """Folders as they are; for a URI, the local folder into which its records were copied, and the files of runs whose
    names begin with `also`. Raises UserError."""
    return [open_out(word, write=False, also=also)[0] if is_uri(word) else Path(word) for word in words]


def load_runs(paths: Sequence[Path]) -> Loaded:
    """Read all runs under `paths`; names each folder that cannot be read on standard error.

    Raises UserError for a path that is not a folder.
    """
    loaded = load_records(check_folders(paths))
    _name_problems(loaded.problems)
    return loaded


def check_folders(paths: Sequence[Path]) -> Sequence[Path]:
    """The paths. Raises UserError for one that is not a folder."""
    if missing := [path for path in paths if not path.is_dir()]:
        hint = "`harness run` makes one (--out, default runs)"
        if missing[0].exists():
            raise UserError(f"{str(missing[0])!r} is a file; a folder of results or of a run is allowed")
        raise UserError(f"no folder of results at {str(missing[0])!r}; {hint}")
    return paths


def _name_problems(problems: Sequence[Problem]) -> None:
    for problem in problems:
        print(f"harness: passed over: {problem}", file=sys.stderr)


@contextmanager
def _mistakes(prefix: str = "", file: str = "") -> Iterator[None]:
    """What is wrong with the user's words, or keeps `file` (as it is named to the user) from being written, as a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from None
    except OSError as error:
        if not file:
            raise
        blocked = isinstance(error, FileExistsError | NotADirectoryError)
        why = "a part of its path is a file, not a folder" if blocked else error.strerror or error
        raise UserError(f"{file} cannot be written: {why}") from None


def make_rows(loaded: Loaded, across: Sequence[str] = ()) -> list[Row]:
    """The rows of a table, with their predictions. Raises UserError for a field to average over that no run has."""
    from harness.results.rows import summarise

    folders = [*(run.folder for run in loaded.records), *(run.folder for run in loaded.interrupted)]
    outs = dict.fromkeys(folder.parent for folder in folders)
    with _mistakes():
        return summarise(loaded.records, loaded.interrupted, across, load_predictions(outs))


@collector_paused()
def print_report(paths: Sequence[Path], console: Console, options: ReportOptions | None = None) -> bool:
    """Print the table of all runs under `paths`, or write it to a file; draw the charts into the folder `curves`.

    Returns whether there was a run. Raises UserError for an unknown format, column or field, a path that does not
    exist, and a file that cannot be written.
    """
    from harness.results.report.columns import sort_rows
    from harness.results.report.table import FORMATS, render
    from harness.results.sweeps import Sweeps, load_sweeps

    options = options or ReportOptions()
    format, output, curves = options.format, options.output, options.curves
    check_word(format, (*FORMATS, "html"), "--format")
    loaded, searches = load_runs(paths), Sweeps([], [])
    table = _choose_rows(make_rows(loaded, options.across), options.preset)
    columns = options.columns or (() if format in ("csv", "json") else table.columns)
    if format == "html" or curves is not None:
        searches = load_sweeps(paths)
        _name_problems(searches.problems)
    if not (table.rows or searches.sweeps or options.preset):
        raise UserError(f"no runs in {', '.join(repr(str(path)) for path in paths)}: `harness run` makes some")
    with _mistakes():
        rows = sort_rows(table.rows, options.sort) if options.sort is not None else table.rows
        if format == "html":
            text = make_html(rows, [*loaded.problems, *searches.problems], columns, searches.sweeps)
        elif format == "table":
            text = _render_table(rows, console, columns, colour=output is None)
        else:
            text = render(rows, format, columns=columns)  # type: ignore[arg-type]
    if table.below and format in ("table", "markdown"):
        text += "\n" + "\n".join(table.below)
    print_text(text, console, output or (Path(PAGE) if format == "html" else None))
    if format == "html" and output is None:
        print_text(f"page: {PAGE}", console)
    if curves is not None:
        from harness.results.report.charts import write_charts
        from harness.results.report.sweeps import draw_all

        panels, sweeps = draw_all(rows, searches.sweeps)
        with _mistakes(file=f"--curves {curves}"):
            for path in write_charts([*panels, *sweeps], curves):
                print(f"harness: drawn: {path}", file=sys.stderr)
    return bool(rows)


def _choose_rows(rows: list[Row], preset: str | None) -> PresetTable:
    """All rows; or a preset's own, with its columns and what is said of them."""
    from harness.commands.preset import PresetTable, make_preset_table

    return PresetTable(rows, (), [], True) if preset is None else make_preset_table(preset, rows)


def _render_table(
    rows: Sequence[Row], console: Console, columns: Sequence[str] = (), *, colour: bool = True
) -> str:
    from harness.results.report.table import render

    fit = colour and console.is_terminal
    return render(rows, columns=columns, width=console.width, fit=fit, colour=fit and not console.no_color)


def print_rows(loaded: Loaded, console: Console, preset: str | None = None) -> bool:
    """Print the table of runs that were loaded, or a preset's table of them; returns whether they meet its demand."""
    _name_problems(loaded.problems)
    table = _choose_rows(make_rows(loaded), preset)
    print_text("\n".join([_render_table(table.rows, console, table.columns), *table.below]), console)
    return table.met


@collector_paused()
def write_page(out: Path, loaded: Loaded | None = None) -> Path:
    """Write the page of all runs in a folder into it. Raises UserError where it cannot be written."""
    from harness.results.sweeps import load_sweeps

    loaded, searches = loaded or load_records([out]), load_sweeps([out])
    text = make_html(make_rows(loaded), [*loaded.problems, *searches.problems], sweeps=searches.sweeps)
    with _mistakes(file=str(out / PAGE)):
        write_atomic(out / PAGE, text)
    return out / PAGE


def say_page(out: Path, console: Console, loaded: Loaded | None = None) -> Path | None:
    """Write the page and say where; the runs are stored, whatever becomes of it."""
    try:
        page = write_page(out, loaded)
    except UserError as error:
        say(console, f"no page: {error}", style="dim")
        return None
    say(console, f"page: {page}", style="dim")
    return page


def export_runs(records: Sequence[Stored], to: str) -> int:
    """Export finished, failed and pruned runs; returns how many the other tool did not have.

    Raises UserError for a tool that is unknown or not installed, and for epochs that cannot be read.
    """
    from harness.results.export import TARGETS, export

    check_word(to, tuple(TARGETS), "--to")
    try:
        return export(records, TARGETS[to])
    except (ImportError, ValueError, OSError) as error:
        hint = f"; pip install 'resnet-harness[{to}]'" if isinstance(error, ImportError) else ""
        raise UserError(f"--to {to}: {error}{hint}") from None


def export_results(words: Sequence[str], to: str) -> int:
    """Export the runs at folders and URIs, to which the event files go that are made. Raises UserError."""
    own = to == "tensorboard"
    folders = find_results(words, also="events." * own)
    exported = export_runs(load_runs(folders).records, to)
    try:
        for uri, folder in zip(words, folders, strict=True):
            for run in {path.parent for path in folder.glob("*/events.*")} if own and is_uri(uri) else ():
                push_run(uri, run)
    except StorageError as error:
        raise UserError(f"--to {to}: {error}; they are kept in {folder}") from None
    return exported


def make_html(
    rows: Sequence[Row],
    problems: Sequence[Problem] = (),
    columns: Sequence[str] = (),
    sweeps: Sequence[Sweep] = (),
) -> str:
    """The page for a browser. Raises ValueError for a column that does not exist."""
    from harness.loaders.cache import cache_dir
    from harness.results.report.charts import load_bundle
    from harness.results.report.page import make_page

    bundle, now = load_bundle(cache_dir()), datetime.now(UTC)
    return make_page(rows, bundle=bundle, made_at=now, columns=columns, problems=problems, sweeps=sweeps)


def print_text(text: str, console: Console, output: Path | None = None) -> None:
    """Write text as it is, to the console or a file ("-": the console). Raises UserError where the file cannot be written."""
    text = text if text.endswith("\n") else text + "\n"
    if output is None or output == Path("-"):
        console.file.write(text)
        console.file.flush()
        return
    with _mistakes(file=f"--output {output}"):
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")


def print_why(row: str, path: Path, console: Console) -> None:
    """Print the records, epochs and formulas behind every row of that name (msra-20), or the row of that number."""
    from harness.results.explain import why

    if not (rows := make_rows(load_runs([path]))):
        raise UserError(f"no runs in {str(path)!r}")
    matches = [match for number, match in enumerate(rows, 1) if row in (match.name, str(number))]
    if row.isdecimal() and not matches:
        raise UserError(f"row {row}: {str(path)!r} has rows 1 to {len(rows)}")
    if not matches:
        check_word(row, sorted({row.name for row in rows}), "row")
    if len({match.dataset for match in matches}) > 1:
        numbers = ", ".join(f"{rows.index(match) + 1} on {match.dataset}" for match in matches)
        raise UserError(f"row {row!r} is on several data sets: give one by its number, {numbers}")
    print_text("\n".join(map(why, matches)), console)


def print_findings(words: Sequence[str]) -> int:
    """Print what contradicts itself in stored runs, a line each. Returns the exit code: 1 where anything does.

    The weights of runs at a URI stay there and are not checked.
    """
    from harness.results.verify import verify
    from harness.spec import RunSpec

    loaded = load_records(check_folders(find_results(words)))
    elsewhere = [WEIGHTS] if any(map(is_uri, words)) else []
    contradictions = verify(loaded.records, lambda spec: RunSpec.from_json(dict(spec)).key, elsewhere)
    findings = [*loaded.problems, *contradictions]
    for finding in findings:
        print(finding)
    old = sum(not (run.folder / HASHES).exists() for run in loaded.records)
    unhashed = f"; {old} of them have no hash stored: only their figures are checked" if old else ""
    print(f"{len(loaded.records)} runs verified, {len(findings)} findings{unhashed}")
    return 1 if findings else 0


def print_comparison(
    paths: Sequence[Path],
    console: Console,
    *,
    by: str | None = None,
    fail_on: str | None = None,
    strict: bool = False,
    format: str = "table",
    across: Sequence[str] = (),
) -> int:
    """Print two folders side by side, or the runs of one by a field. Returns the exit code: 1 where `fail_on` is met,
    or with `strict` where the runs cannot tell.

    Raises UserError for a condition, field or format that cannot be read, and where there is nothing to compare.
    """
    from harness.results.compare import check_conditions, compare, compare_by, nearest, parse_fail_on
    from harness.results.report.comparison import render_comparison

    check_word(format, COMPARISON_FORMATS, "--format")
    if strict and fail_on is None:
        raise UserError("--strict is for --fail-on, whose conditions it makes stricter")
    with _mistakes("--fail-on: "):
        conditions = parse_fail_on(fail_on) if fail_on is not None else []
    metrics = [condition.metric for condition in conditions]
    if by is None and len(paths) != 2:
        given = f"{len(paths)} folder{'s' * (len(paths) != 1)} given"
        raise UserError(f"compare takes two folders, or --by FIELD: {given}")
    sides = []
    for side in [list(paths)] if by is not None else [[path] for path in paths]:
        sides.append(make_rows(load_runs(side), across))
        if not any(row.done for row in sides[-1]):
            raise UserError(f"no finished run in {', '.join(repr(str(path)) for path in side)}")
    a, b = sides[0], sides[-1]
    with _mistakes("" if by is None else "--by: "):
        pairs = compare(a, b, metrics, across) if by is None else compare_by(a, by, metrics, across)
    if not any(pair.figures for pair in pairs) and not conditions:
        alike = "differ in nothing but --by" if by else "of A and B agree in all but the folder"
        near = f", the nearest differ in {', '.join(names)}" if (names := nearest(pairs)) else ""
        raise UserError(f"nothing to compare: no rows {alike}{near}; --across FIELD overlooks a difference")
    colour = console.is_terminal and not console.no_color
    print_text(render_comparison(pairs, format, width=console.width, colour=colour), console)
    gate = check_conditions(pairs, conditions)
    for line in [*gate.failed, *gate.unclear]:
        print(f"harness: --fail-on: {line}", file=sys.stderr)
    return 1 if gate.failed or (strict and gate.unclear) else 0


def print_variants(console: Console) -> None:
    """Print every variant at its default depth: parameters, multiply-adds, recipe, source."""
    import torch
    from rich.text import Text

    from harness.models.build import build, count_flops, count_parameters
    from harness.models.variants import NETWORKS, VARIANTS, default_depth
    from harness.plugins import blaming

    variants = [function(default_depth(function)) for function in VARIANTS.values()]
    width = max(len(variant.name) for variant in variants) + 2
    for variant in variants:
        architecture = variant.network.architecture
        shown = {"imagenet": (100, 112), "resnet": (1000, 224)}
        classes, side = shown.get(architecture, (10, max(32, NETWORKS[architecture].smallest_image)))
        with blaming("network", architecture), torch.device("meta"):
            network = build(variant.network, classes, side)
            parameters, macs = count_parameters(network), count_flops(network, side) / 2e6
        size = f"depth {variant.network.depth:<4} {parameters:>10,} parameters {macs:>7.1f} MMAC"
        console.print(Text.assemble((f"{variant.name:{width}}", "bold"), size), soft_wrap=True)
        console.print(Text(f"    {variant.summary} ({variant.source})", style="dim"), soft_wrap=True)
    console.print(
        "\nEach at its default depth, for one 32x32 image and 10 classes (miniplaces and mpmz: 112x112 and 100, "
        "imagenet: 224x224 and 1000). MMAC: million multiply-adds, forward.",
        style="dim",
    )
