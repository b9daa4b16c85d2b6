"""Stored runs -> tables, pages, files and answers: `harness report`, `compare`, `why`, `repro`, `export` and
`variants`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from textwrap import TextWrapper
from typing import Any, NamedTuple

from rich.console import Console

from harness.loaders.cache import cache_dir
from harness.models.variants import NETWORKS, VARIANTS, default_depth, find_preset
from harness.options import CompareOptions, ReportOptions
from harness.plan import open_out
from harness.plugins import blaming, kept_files
from harness.progress import say
from harness.results import store
from harness.results.compare import check_conditions, compare, compare_by, nearest, parse_fail_on
from harness.results.explain import read_epochs, why
from harness.results.export import TARGETS, export
from harness.results.metrics import figures
from harness.results.published import find_published
from harness.results.remote import StorageError, is_uri, push_run, redact, split_uri
from harness.results.report.columns import sort_rows
from harness.results.report.table import render, render_comparison
from harness.results.report.text import clean, fill_template
from harness.results.rows import Row, incomparable, summarise
from harness.results.store import Loaded, Problem, Stored, collector_paused
from harness.results.sweeps import Sweeps, load_sweeps
from harness.results.verify import verify
from harness.spec import RunSpec, UserError, at_home, check_word, mistakes, refuse
from harness.words import suggest

PAGE = "report.html"
ENDINGS = {".csv": "csv", ".json": "json", ".md": "markdown", ".tex": "latex", ".html": "html", ".txt": "table"}
NO_RUNS, NONE_READ = "no runs in {}: `harness run` makes some", "no run in {} can be read"


def find_results(words: Sequence[str], *, also: str = "") -> list[Path]:
    """Folders as they are; for a URI, the local folder into which its records were copied, and the files of runs whose
    names begin with `also`. Raises UserError."""
    return [open_out(word, write=False, also=also)[0] for word in words]


def load_runs(paths: Sequence[Path], *, named: bool = True, some: bool = False, copies: bool = False) -> Loaded:
    """Read all runs under `paths`; names each folder that cannot be read on standard error, unless it is not to.

    Raises UserError for a folder that does not exist, and where there should be some runs and is none.
    """
    for path in (path for path in paths if not path.is_dir()):
        raise UserError(f"no folder of results at {str(path)!r}; `harness run` makes one (--out, default runs)")
    loaded = store.load_records(paths, copies=copies)
    refuse({NO_RUNS.format(", ".join(repr(str(path)) for path in paths)): some and not any(loaded)})
    if named:
        _name_problems(loaded.problems)
    return loaded


def _name_problems(problems: Sequence[Problem]) -> None:
    for problem in problems:
        print(f"harness: skipped: {clean(str(problem))}", file=sys.stderr)


@contextmanager
def write_mistakes(file: str) -> Iterator[None]:
    """What keeps a file, as it is named to the user, from being written, as a UserError."""
    with mistakes((OSError, ValueError), f"{file} cannot be written: "):
        try:
            yield
        except (FileExistsError, NotADirectoryError):
            raise ValueError("a part of its path is a file, not a folder") from None


def make_rows(loaded: Loaded, across: Sequence[str] = ()) -> list[Row]:
    """The rows of a table, with their predictions. Raises UserError for a field to average over that no run has."""
    runs: list[Stored | store.Interrupted] = [*loaded.records, *loaded.interrupted]
    outs = dict.fromkeys(run.folder.parent for run in runs)
    with mistakes(ValueError):
        return summarise(loaded.records, loaded.interrupted, across, store.load_predictions(outs))


# --- tables ---


class Table(NamedTuple):
    rows: list[Row]
    columns: tuple[str, ...] = ()  # none: all that say something
    below: Sequence[str] = ()  # lines
    met: bool = True  # whether every finished row is known to be as accurate as the preset's source demands


def choose_rows(rows: list[Row], name: str | None) -> Table:
    """All rows; or a preset's: those of its variants, in its order; other depths follow its own.

    Raises UserError for an unknown preset.
    """
    if name is None:
        return Table(rows)
    with mistakes(ValueError, "--preset: "):
        preset = find_preset(name)
    places = {network: place for place, network in enumerate(preset.select())}
    names = [variant for variant, _ in places]
    mine = [row for row in rows if row.variant in names]
    mine.sort(key=lambda r: (places.get((r.variant, r.depth), len(places)), names.index(r.variant)))
    own = [row for row in mine if row.fields.get("dataset") == preset.dataset]
    ran, least = {(row.variant, row.depth) for row in own or mine}, preset.least_accuracy
    missing = {network: find_published(preset.dataset, *network) for network in places if network not in ran}
    judged = []
    for row in (row for row in mine if row.done and least is not None):
        error, why_not = row.figures[row.test_metric].value, [text for text, _ in incomparable(row)]
        why_not += ["not all runs have an error of the test set"] if error is None else []
        why_not += [] if any(row is each for each in own) else [f"its images are not those of {preset.dataset}"]
        published = None if why_not else find_published(preset.dataset, row.variant, row.depth)
        runs = [[getattr(epoch, row.test_metric) for epoch in read_epochs(run)[0]] for run in row.done]
        curve = [100 - fmean(errors) for errors in zip(*runs, strict=False) if None not in errors]
        judged.append((row, published, curve, 100 - (error or 0.0), "; ".join(why_not)))
    met = all(accuracy > (least or 0.0) and not why_not for *_, accuracy, why_not in judged)
    below = fill_template("preset.txt.j2", missing=missing, judged=judged, least=least, figures=figures)
    return Table(mine, tuple(preset.columns), below.splitlines(), met)


@collector_paused()
def print_report(
    paths: Sequence[Path], console: Console, options: ReportOptions, mine: Loaded | None = None
) -> Table:
    """Print the table of all runs under `paths`, or of those that were loaded, or write it to a file; draw the charts into
    the folder `curves`.

    Raises UserError for an unknown format, column or field, a path that does not exist, and a file that cannot be
    written; without `mine`, where there is no run.
    """
    output, curves = options.output, options.curves
    if (ending := output.suffix.lower() if output else "") and not options.format:
        check_word(ending, ENDINGS, f"--output {output} without --format: ending")
    format: Any = options.format or ENDINGS.get(ending, "table")
    loaded = mine or load_runs(paths, named=False)
    searches = load_sweeps(paths) if format == "html" or curves is not None else Sweeps([], [])
    _name_problems([*loaded.problems, *searches.problems])
    table = choose_rows(make_rows(loaded, options.across), options.preset)
    rows, columns = table.rows, options.columns or (() if format in ("csv", "json") else table.columns)
    if not (rows or searches.sweeps or options.preset or mine):
        none = NONE_READ if loaded.problems else NO_RUNS
        raise UserError(none.format(", ".join(repr(str(path)) for path in paths)))
    with mistakes(ValueError):
        rows = sort_rows(rows, options.sort) if options.sort is not None else rows
        if format == "html":
            text = make_html(rows, loaded, searches, columns)
        else:
            fit = output is None and console.is_terminal
            colour = fit and not console.no_color
            text = render(rows, format, columns=columns, width=console.width, fit=fit, colour=colour)
    if format in ("table", "markdown"):
        text += "".join(f"\n{line}" for line in table.below)
    print_text(text, console, output or (Path(PAGE) if format == "html" else None))
    if format == "html" and output is None:
        print_text(f"page: {PAGE}", console)
    if curves is not None:
        from harness.results.report.charts import write_charts
        from harness.results.report.sweeps import draw_all

        panels, sweeps = draw_all(rows, searches.sweeps)
        with write_mistakes(f"--curves {curves}"):
            for path in write_charts([*panels, *sweeps], curves):
                print(f"harness: drawn: {path}", file=sys.stderr)
    return table


# --- the page, exports, files ---


@collector_paused()
def say_page(out: Path, console: Console, loaded: Loaded | None = None) -> Path | None:
    """Write the page of all runs in a folder into it, and say where; the runs are stored, whatever becomes of it."""
    loaded, searches, page = loaded or store.load_records([out]), load_sweeps([out]), out / PAGE
    try:
        text = make_html(make_rows(loaded), loaded, searches)
        with write_mistakes(str(page)):
            store.write_atomic(page, text)
    except UserError as error:
        say(console, f"no page: {error}", style="dim")
        return None
    say(console, f"page: {page}", style="dim")
    return page


def export_runs(records: Sequence[Stored], to: str) -> int:
    """Export finished, failed and pruned runs; returns how many the other tool did not have.

    Raises UserError for a tool that is unknown or not installed, and for epochs that cannot be read.
    """
    check_word(to, tuple(TARGETS), "--to")
    try:
        return export(records, TARGETS[to])
    except Exception as error:
        own = type(error).__module__.partition(".")[0] == to  # the tool's: no server, no login
        if not own and not isinstance(error, ImportError | ValueError | OSError):
            raise
        hint = f"; pip install 'resnet-harness[{to}]'" if isinstance(error, ImportError) else ""
        raise UserError(f"--to {to}: {error}{hint}") from None


def export_results(words: Sequence[str], to: str) -> int:
    """Export the runs at folders and URIs, to which the event files go that are made. Raises UserError."""
    own = to == "tensorboard"
    folders = find_results(words, also="events." * own)
    exported = export_runs(load_runs(folders, some=True).records, to)
    try:
        for uri, folder in zip(words, folders, strict=True):
            for run in {path.parent for path in folder.glob("*/events.*")} if own and is_uri(uri) else ():
                push_run(uri, run)
    except StorageError as error:
        raise UserError(f"--to {to}: {error}; they are kept in {folder}") from None
    return exported


def make_html(rows: Sequence[Row], loaded: Loaded, searches: Sweeps, columns: Sequence[str] = ()) -> str:
    """The page for a browser. Raises ValueError for a column that does not exist."""
    from harness.results.report.charts import load_bundle
    from harness.results.report.page import make_page

    bundle, now = load_bundle(cache_dir()), datetime.now(UTC)
    problems, sweeps = [*loaded.problems, *searches.problems], searches.sweeps
    return make_page(rows, bundle=bundle, made_at=now, columns=columns, problems=problems, sweeps=sweeps)


def print_text(text: str, console: Console, output: Path | None = None) -> None:
    """Write text as it is, to the console or a file ("-": the console). Raises UserError where the file cannot be written."""
    text = text if text.endswith("\n") else text + "\n"
    if output is None or output == Path("-"):
        console.file.write(text)
        console.file.flush()
        return
    with write_mistakes(f"--output {output}"):
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")


def print_prose(text: str, console: Console) -> None:
    """Print text, folded at words where a terminal is too narrow for its lines; a long path stays whole."""
    kept: Any = {"break_long_words": False, "break_on_hyphens": False}
    fold, lines = TextWrapper(console.width, subsequent_indent="    ", **kept), text.splitlines()
    if console.is_terminal:
        lines = [part for line in lines for part in fold.wrap(line) or [""]]
    print_text("\n".join(lines), console)


def print_why(row: str, path: Path, console: Console) -> None:
    """Print the records, epochs and formulas behind every row of that name (msra-20), or the row of that number."""
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
    print_prose("\n".join(map(why, matches)), console)


def print_findings(words: Sequence[str]) -> int:
    """Print what contradicts itself in stored runs, a line each. Returns the exit code: 1 where anything does.

    The weights of runs at a URI stay there and are not checked.
    """
    loaded = load_runs(find_results(words), named=False, some=True, copies=True)
    elsewhere = [store.WEIGHTS] if any(map(is_uri, words)) else []
    contradictions = verify(loaded.records, lambda spec: RunSpec.from_json(dict(spec)).key, elsewhere)
    findings = [*loaded.problems, *contradictions]
    for finding in findings:
        print(clean(str(finding)))
    old = sum(not (run.folder / store.HASHES).exists() for run in loaded.records)
    unhashed = f"; {old} of them have no hash stored: only their figures are checked" if old else ""
    n, found = len(loaded.records), len(findings)
    print(f"{n:,} run{'s' * (n != 1)} verified, {found:,} finding{'s' * (found != 1)}{unhashed}")
    return 1 if findings else 0


def print_comparison(paths: Sequence[Path], console: Console, options: CompareOptions) -> int:
    """Print two folders side by side, or the runs of one by a field. Returns the exit code: 1 where --fail-on is met, or
    with --strict where the runs cannot tell.

    Raises UserError for a condition, field or format that cannot be read, and where there is nothing to compare.
    """
    by, across = options.by, options.across
    if options.strict and options.fail_on is None:
        raise UserError("--strict has no effect without --fail-on")
    if by is None and len(paths) != 2:
        given = f"{len(paths)} folder{'s' * (len(paths) != 1)} given"
        raise UserError(f"compare takes two folders, or --by FIELD: {given}")
    with mistakes(ValueError, "--fail-on: "):
        conditions = parse_fail_on(options.fail_on) if options.fail_on is not None else []
    metrics = [condition.metric for condition in conditions]
    sides = []
    for side in [[path] for path in paths] if by is None else [paths]:
        sides.append(make_rows(load_runs(side), across))
        if not any(row.done for row in sides[-1]):
            raise UserError(f"no finished run in {', '.join(repr(str(path)) for path in side)}")
    a, b = sides[0], sides[-1]
    with mistakes(ValueError, "" if by is None else "--by: "):
        pairs = compare(a, b, metrics, across) if by is None else compare_by(a, by, metrics, across)
    if not any(pair.figures for pair in pairs) and not conditions:
        alike = "differ only in the field of --by" if by else "of A and B agree in everything but the folder"
        near = f", the nearest differ in {', '.join(names)}" if (names := nearest(pairs)) else ""
        raise UserError(f"nothing to compare: no rows {alike}{near}; --across FIELD overlooks a difference")
    fit, colour = console.is_terminal, console.is_terminal and not console.no_color
    print_text(render_comparison(pairs, options.format, width=console.width, fit=fit, colour=colour), console)
    gate = check_conditions(pairs, conditions)
    for line in [*gate.failed, *gate.unclear]:
        print(clean(f"harness: --fail-on: {line}"), file=sys.stderr)
    return 1 if gate.failed or (options.strict and gate.unclear) else 0


def print_repro(run: str, path: str, console: Console) -> None:
    """Print the command, commit and versions that trained a run: a folder, or a name or key under `path`."""
    path, run = split_uri(run) if is_uri(run) else (path, run)
    folder = at_home(run)
    if folder.is_dir() and ((folder / store.RECORD).exists() or folder.name.endswith(store.PARTIAL)):
        matches = load_runs([folder]).records
        known = "there is no record to reproduce; an interrupted run is continued by the command that started it"
        refuse({known: not matches}, f"{run}: ")
    else:
        records = load_runs(find_results([path])).records
        matches = [s for s in records if s.record.name == run or (len(run) >= 4 and s.record.key.startswith(run))]
        if not matches:
            hint = suggest(run, [stored.record.name for stored in records])
            hint = hint or ": give a run's folder, its name, or the first digits of its key"
            raise UserError(f"no run {run!r} among the {len(records)} in {redact(path)!r}{hint}")
    print_text(make_repro(matches[-1]), console)


def make_repro(stored: Stored) -> str:
    """A shell script that trains one run again; comments say what it cannot promise."""
    record, fault = stored.record, ""
    try:
        if RunSpec.from_json(record.spec).key != record.key:
            fault = "gives it another key: its meaning may have changed"
    except ValueError as error:
        fault = f"cannot train it: {error}"
    words = {"record": record, "environment": record.environment, "command": make_command(stored), "fault": fault}
    return fill_template("repro.sh.j2", join=shlex.join, **words)


def make_command(stored: Stored) -> list[str]:
    """The command that trains this run alone, from its record: the same network, recipe, engine, device and seed."""
    environment = stored.record.environment
    command = ["harness", "run", "--spec", str(stored.folder / store.RECORD), "--out", "repro"]
    for kept in kept_files(stored.folder):
        command += ["--plugin", str(kept)]
    original = iter(map(str, environment.get("command") or ()))
    for name, given, folder in (word.partition("=") for word in original):
        if name == "--data-dir":
            command += [name, folder if given else next(original, ".")]
    return [*command, "--launcher", "local"] if environment.get("launcher") == "local" else command


def print_variants(console: Console) -> None:
    """Print every variant at its default depth: parameters, multiply-adds, recipe, source."""
    import torch

    from harness.models.build import build, count_flops, count_parameters

    shown, variants = {"imagenet": (100, 112), "resnet": (1000, 224)}, []
    for function in VARIANTS.values():
        variant = function(default_depth(function))
        architecture = variant.network.architecture
        classes, side = shown.get(architecture, (10, max(32, NETWORKS[architecture].smallest_image)))
        with blaming("network", architecture), torch.device("meta"):
            network = build(variant.network, classes, side)
            variants.append((variant, count_parameters(network), count_flops(network, side) / 2e6))
    print_prose(fill_template("variants.txt.j2", variants=variants), console)
