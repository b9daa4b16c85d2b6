"""Questions about stored runs: which side is better, where a figure comes from, how to run it again."""

from __future__ import annotations

import difflib
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.commands.report import load_runs, make_rows, print_text
from harness.plan import Allocation, Grid, check_word, expand
from harness.results.store import PARTIAL, Stored
from harness.results.values import Record
from harness.search_space import parse_settings
from harness.spec import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from harness.results.rows import Row

COMPARISON_FORMATS = ("table", "markdown", "json")


def print_comparison(
    paths: Sequence[Path],
    console: Console,
    *,
    by: str | None = None,
    fail_on: str | None = None,
    format: str = "table",
    across: Sequence[str] = (),
) -> int:
    """Print two folders side by side, or the runs of one by a field. Returns the exit code: 1 where `fail_on` is met.

    Raises UserError for a condition, field or format that cannot be read, and where there is nothing to compare.
    """
    from harness.results.compare import MARGINS, compare, compare_by, parse_fail_on, render_comparison, violations

    check_word(format, COMPARISON_FORMATS, "--format")
    try:
        conditions = parse_fail_on(fail_on) if fail_on is not None else ()
    except ValueError as error:
        raise UserError(f"--fail-on: {error}") from None
    metrics = [condition.metric for condition in conditions]
    if by is None and len(paths) != 2:
        raise UserError(
            f"compare takes two folders, or --by FIELD: {len(paths)} folder{'s' * (len(paths) != 1)} given"
        )
    if by is None:
        a, b = (make_rows(load_runs([path]), across) for path in paths)
        for path, rows in zip(paths, (a, b), strict=True):
            if not any(row.done for row in rows):
                raise UserError(f"no finished run in {str(path)!r}")
        pairs = compare(a, b, MARGINS, metrics)
    else:
        rows = make_rows(load_runs(paths), across)
        if not any(row.done for row in rows):
            raise UserError(f"no finished run in {', '.join(repr(str(path)) for path in paths)}")
        try:
            pairs = compare_by(rows, by, MARGINS, metrics)
        except ValueError as error:
            raise UserError(f"--by: {error}") from None
    if not pairs and not conditions:
        hint = (
            "rows that differ in nothing but --by"
            if by
            else "a row of A and one of B that agree in all but the folder"
        )
        raise UserError(f"nothing to compare: no {hint}; --across FIELD overlooks a difference")
    colour = console.is_terminal and not console.no_color
    print_text(render_comparison(pairs, format, width=console.width, colour=colour), console)
    failed = violations(pairs, conditions)
    for line in failed:
        print(f"harness: --fail-on: {line}", file=sys.stderr)
    return 1 if failed else 0


def print_why(row: str, path: Path, console: Console) -> None:
    """Print the records, epochs and formulas behind every row called `row` (msra-20), or the row of that number."""
    from harness.results.explain import why

    rows = make_rows(load_runs([path]))
    print_text("\n".join(why(found) for found in _find_rows(rows, row, path)), console)


def _find_rows(rows: Sequence[Row], wanted: str, path: Path) -> list[Row]:
    if wanted.isdecimal():
        if 1 <= int(wanted) <= len(rows):
            return [rows[int(wanted) - 1]]
        raise UserError(
            f"row {wanted}: {str(path)!r} has rows 1 to {len(rows)}" if rows else f"no runs in {str(path)!r}"
        )
    found = [row for row in rows if row.name == wanted]
    if not found:
        check_word(wanted, sorted({row.name for row in rows}), "row")
    return found


# --- repro ---


def print_repro(run: str, path: Path, console: Console) -> None:
    """Print the exact command, commit and versions that made a run: a folder, or a name or key under `path`."""
    stored = _find_run(run, path)
    print_text(make_repro(stored), console)


def _find_run(run: str, path: Path) -> Stored:
    folder = Path(run)
    if folder.is_dir() and ((folder / "record.json").exists() or folder.name.endswith(PARTIAL)):
        loaded = load_runs([folder])
        if loaded.records:
            return loaded.records[0]
        raise UserError(f"{run}: no record to repeat; an interrupted run goes on by the command that began it")
    records = load_runs([path]).records
    found = [s for s in records if s.record.name == run or (len(run) >= 4 and s.record.key.startswith(run))]
    if not found:
        near = difflib.get_close_matches(run, [stored.record.name for stored in records], n=1)
        hint = (
            f"did you mean {near[0]}?" if near else "give a run's folder, its name, or the first digits of its key"
        )
        raise UserError(f"no run {run!r} among the {len(records)} in {str(path)!r}: {hint}")
    return found[-1]


def make_repro(stored: Stored) -> str:
    """A shell script, as text, that trains one run again; comments say what it cannot promise."""
    record = stored.record
    versions = _mapping(record.environment.get("versions"))
    commit, dirty = record.environment.get("commit"), record.environment.get("dirty")
    lines = [f"# {record.name}, {record.status} {record.finished_at:%Y-%m-%d %H:%M} UTC", f"# {_made_on(record)}"]
    if isinstance(commit, str):
        lines.append(
            f"git checkout {commit}" + ("  # with uncommitted changes: they are not known" if dirty else "")
        )
    else:
        lines.append("# the commit is not known: it was not run from a checkout")
    own = "resnet-harness"
    if own in versions and not isinstance(commit, str):
        lines.append(f"# {own} {versions[own]}")
    if pins := [f"{name}=={version}" for name, version in versions.items() if name != own]:
        lines.append(f"pip install {' '.join(map(shlex.quote, pins))}")
    command, same = make_command(record)
    lines.append(shlex.join(command))
    if not same:
        lines.append(
            "# this version of the harness makes another spec of that command: compare them before you compare results"
        )
    given = record.environment.get("command")
    if isinstance(given, list):
        lines.append(f"# the command it was part of: {shlex.join(map(str, given))}")
    return "\n".join(" ".join(line.split("\n")) for line in lines) + "\n"


def make_command(record: Record) -> tuple[list[str], bool]:
    """The command that trains this run alone, and whether it gives a run of the same key here and now."""
    spec = record.spec
    recipe = _mapping(spec.get("recipe"))
    options = {"variants": record.variant, "depths": record.depth, "seeds": f"{record.seed},"}
    for name in ("dataset", "loader", "precision", "limit_train", "limit_test"):
        if spec.get(name) is not None:
            options[name] = spec[name]
    settings = []
    for override in map(str, spec.get("overrides") or ()):
        name, _, value = override.partition("=")
        if name in ("epochs", "batch_size", "val"):
            options[name] = value
        else:
            settings.append(override)
    workers = spec.get("workers", 1)
    options |= {"gpus": workers if spec.get("device") == "cuda" else 0, "workers": workers}
    given = record.environment.get("command")
    if isinstance(given, list) and "--data-dir" in given[:-1]:
        options["data_dir"] = given[given.index("--data-dir") + 1]
    command = ["harness", "run"]
    for name, option in options.items():
        command += [f"--{name.replace('_', '-')}", str(option)]
    for setting in settings:
        command += ["--set", setting]
    if spec.get("device") != "cuda" and record.environment.get("launcher") == "local":
        command += ["--launcher", "local"]
    command += ["--out", "repro"]
    return command, _key(record, options, settings, recipe) == record.key


def _key(
    record: Record, options: Mapping[str, Any], settings: Sequence[str], recipe: Mapping[str, Any]
) -> str | None:
    """The key of the run that these options make, on the images that the record names; None where they make none."""
    spec = record.spec

    def number(name: str) -> int | None:
        return int(options[name]) if name in options else None

    try:
        sweep = Grid(
            variants=(record.variant,), depths=(record.depth,), seeds=(record.seed,), dataset=spec["dataset"],
            loader=spec["loader"], precision=spec["precision"], epochs=number("epochs"),
            batch_size=number("batch_size"), val=number("val"), limit_train=number("limit_train"), limit_test=number("limit_test"),
            settings=parse_settings(settings),
        )  # fmt: skip
        workers = int(spec["workers"])
        width = Allocation(device=spec["device"], gpus=0, workers=workers, concurrent_runs=1, threads=1)
        (run,) = expand(sweep, width, fingerprint=spec["fingerprint"], train_images=10**9)
    except (UserError, ValueError, KeyError, TypeError):
        return None
    return replace(run, engine=spec.get("engine", run.engine)).key


def _made_on(record: Record) -> str:
    machine = record.result.machine if record.result else {}
    parts = [record.result.device if record.result else None, machine.get("gpu"), machine.get("driver") and f"driver {machine['driver']}",
             machine.get("platform"), machine.get("python") and f"Python {machine['python']}",
             f"CUDA {machine['cuda']}" if machine.get("gpu") and machine.get("cuda") else None]  # fmt: skip
    return ", ".join(dict.fromkeys(str(part) for part in parts if part)) or "the machine is not known"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
