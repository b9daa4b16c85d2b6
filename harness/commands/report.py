"""RunResult -> Record; records -> the page a person reads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.cluster.launch import Failed
from harness.results.store import collector_paused, run_name
from harness.results.values import Failure, Pruned, Record, RunResult
from harness.spec import RunPaths, RunSpec, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from harness.results.rows import Row
    from harness.results.store import Loaded, Problem
    from harness.results.sweeps import Sweep, Sweeps

PACKAGES = ("resnet-harness", "torch", "torchvision", "ray", "numpy", "nvidia-ml-py",
            "nvidia-dali-cuda120", "nvidia-dali-cuda130")  # fmt: skip


def name_of(spec: RunSpec, label: str) -> str:
    """The run's folder name."""
    return run_name(label, spec.variant, spec.network.depth, spec.seed, spec.key)


@cache
def describe_code() -> dict[str, Any]:
    """Commit, whether the tree differs from it, versions, and the command line."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    # an installed copy may lie inside somebody else's checkout: only the project's own counts
    own = git("rev-parse", "--show-toplevel") == str(root)
    status = git("status", "--porcelain") if own else None
    return {
        "commit": git("rev-parse", "HEAD") if own else None,
        "dirty": None if status is None else bool(status),
        "versions": versions,
        "command": ["harness", *sys.argv[1:]],
    }


def classify(failed: Failed) -> Failure:
    """A failure in the four words of the table."""
    if failed.died:
        kind = "killed"
    elif "OutOfMemory" in failed.exception or failed.exception == "MemoryError":
        kind = "OOM"
    elif failed.exception == "DivergedError":
        kind = "NaN"
    else:
        kind = "exception"
    message = failed.message if kind != "exception" else f"{failed.exception}: {failed.message}"
    return Failure(kind=kind, message=message, traceback=failed.traceback)  # type: ignore[arg-type]


def make_record(
    spec: RunSpec,
    outcome: RunResult | Failed | Pruned,
    *,
    places: RunPaths,
    original: bool,
    started_at: datetime,
    concurrent: int,
    launcher: str,
) -> Record:
    """Everything that is kept of one run."""
    status: Literal["done", "failed", "pruned"] = "done"
    if not isinstance(outcome, RunResult):
        status = "failed" if isinstance(outcome, Failed) else "pruned"
    return Record(
        key=spec.key,
        name=name_of(spec, places.label),
        status=status,
        variant=spec.variant,
        depth=spec.network.depth,
        seed=spec.seed,
        dataset=places.label,
        original=original,
        spec=spec.to_json(),
        result=outcome if isinstance(outcome, RunResult) else None,
        failure=classify(outcome) if isinstance(outcome, Failed) else None,
        pruned=outcome if isinstance(outcome, Pruned) else None,
        environment={**describe_code(), "launcher": launcher, "concurrent_runs": concurrent},
        started_at=started_at,
        finished_at=datetime.now(UTC),
    )


def find_results(words: Sequence[str]) -> list[Path]:
    """Folders as they are; of a URI, the local folder into which its records were brought. Raises UserError."""
    from harness.plan import cache_of
    from harness.results.remote import StorageError, is_uri, pull_results

    paths = []
    for word in words:
        if not is_uri(word):
            paths.append(Path(word))
            continue
        paths.append(cache_of(word))
        try:
            pull_results(word, paths[-1])
        except StorageError as error:
            raise UserError(str(error)) from None
    return paths


def load_runs(paths: Sequence[Path]) -> Loaded:
    """Read all runs under `paths`; what cannot be read goes to standard error, a line each.

    Raises UserError for a path that is no folder.
    """
    from harness.results.store import load_records

    for path in paths:
        if not path.is_dir():
            raise UserError(
                f"no folder of results at {str(path)!r}; `harness run` makes one (--out, default runs)"
            )
    loaded = load_records(paths)
    for problem in loaded.problems:
        print(f"harness: passed over: {problem}", file=sys.stderr)
    return loaded


def load_searches(paths: Sequence[Path]) -> Sweeps:
    """Read all sweeps under `paths`; what cannot be read goes to standard error, a line each."""
    from harness.results.sweeps import load_sweeps

    found = load_sweeps(paths)
    for problem in found.problems:
        print(f"harness: passed over: {problem}", file=sys.stderr)
    return found


def make_rows(loaded: Loaded, across: Sequence[str] = ()) -> list[Row]:
    """The rows of a table, with their predictions. Raises UserError for a field to average over that no run has."""
    from harness.results.rows import summarise
    from harness.results.store import load_predictions

    folders = [*(run.folder for run in loaded.records), *(run.folder for run in loaded.interrupted)]
    outs = dict.fromkeys(folder.parent for folder in folders)
    try:
        return summarise(loaded.records, loaded.interrupted, across, load_predictions(outs))
    except ValueError as error:
        raise UserError(str(error)) from None


@collector_paused()
def print_report(
    paths: Sequence[Path],
    console: Console,
    *,
    format: str = "table",
    across: Sequence[str] = (),
    sort: str | None = None,
    columns: Sequence[str] = (),
    output: Path | None = None,
    curves: Path | None = None,
) -> bool:
    """Print the table of all runs under `paths`, or write it to a file; draw the charts into the folder `curves`.

    Returns whether there was a run. Raises UserError for an unknown format, column or field, a path that does not
    exist, and a file that cannot be written.
    """
    from harness.plan import check_word
    from harness.results.report.columns import sort_rows
    from harness.results.report.table import FORMATS, render
    from harness.results.sweeps import Sweeps

    check_word(format, (*FORMATS, "html"), "--format")
    loaded = load_runs(paths)
    rows = make_rows(loaded, across)
    found = load_searches(paths) if format == "html" or curves is not None else Sweeps([], [])
    try:
        if sort is not None:
            rows = sort_rows(rows, sort)
        if format == "html":
            text = make_html(rows, [*loaded.problems, *found.problems], columns, found.sweeps)
        elif format == "table":  # written as it is: the table is laid out for this width already
            colour = output is None and console.is_terminal and not console.no_color
            text = render(rows, "table", width=console.width, colour=colour, columns=columns)
        else:
            text = render(rows, format, columns=columns)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(str(error)) from None
    print_text(text, console, output)
    if curves is not None:
        from harness.results.report.charts import make_panels, write_charts
        from harness.results.report.sweeps import make_sweep_panel

        try:
            for path in write_charts([*make_panels(rows), *map(make_sweep_panel, found.sweeps)], curves):
                print(f"harness: drawn: {path}", file=sys.stderr)
        except OSError as error:
            raise UserError(f"--curves {curves} cannot be written to: {error.strerror or error}") from None
    return bool(rows)


PAGE = "report.html"


@collector_paused()
def write_page(out: Path) -> Path:
    """Write the page of all runs in a folder into it. Raises UserError where it cannot be written."""
    from harness.results.store import load_records
    from harness.results.sweeps import load_sweeps

    loaded, found = load_records([out]), load_sweeps([out])
    text = make_html(make_rows(loaded), [*loaded.problems, *found.problems], sweeps=found.sweeps)
    path = out / PAGE
    temporary = path.with_name(f".{PAGE}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    return path


def export_runs(paths: Sequence[Path], to: str) -> int:
    """Give the finished, failed and pruned runs under `paths` to another tool; returns how many it did not have.

    Raises UserError for a tool that is unknown or not installed, and for epochs that cannot be read.
    """
    from harness.plan import check_word
    from harness.results.export import TARGETS, export

    check_word(to, tuple(TARGETS), "--to")
    try:
        return export(load_runs(paths).records, TARGETS[to])
    except ImportError as error:
        raise UserError(f"--to {to}: {error}; pip install 'resnet-harness[{to}]'") from None
    except (ValueError, OSError) as error:
        raise UserError(f"--to {to}: {error}") from None


def make_html(
    rows: Sequence[Row],
    problems: Sequence[Problem] = (),
    columns: Sequence[str] = (),
    sweeps: Sequence[Sweep] = (),
) -> str:
    """The page for a browser. Raises ValueError for a column that does not exist."""
    from harness.results.report.charts import load_bundle
    from harness.results.report.page import make_page

    cache = Path(os.environ.get("HARNESS_CACHE") or Path.home() / ".cache" / "resnet-harness")
    return make_page(
        rows,
        bundle=load_bundle(cache),
        made_at=datetime.now(UTC),
        columns=columns,
        problems=problems,
        sweeps=sweeps,
    )


def print_text(text: str, console: Console, output: Path | None = None) -> None:
    """Write text as it is, to the console or a file. Raises UserError where the file cannot be written."""
    text = text if text.endswith("\n") else text + "\n"
    if output is None:
        console.file.write(text)
        console.file.flush()
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror or error}") from None


def print_variants(console: Console) -> None:
    """Print every variant at its default depth: parameters, multiply-adds, recipe, source."""
    import torch
    from rich.text import Text

    from harness.models.flops import count_flops
    from harness.models.resnet import build, count_parameters
    from harness.models.variants import VARIANTS, default_depth

    for function in VARIANTS:
        variant = function(default_depth(function))
        classes, side = (100, 112) if variant.network.architecture == "imagenet" else (10, 32)
        with torch.device("meta"):
            parameters = count_parameters(build(variant.network, classes, side))
        macs = count_flops(variant.network, classes, side) / 1e6
        line = Text()
        line.append(f"{variant.name:27}", style="bold")
        line.append(f"depth {variant.network.depth:<4} {parameters:>9,} parameters {macs:>7.1f} MMAC")
        console.print(line, soft_wrap=True)
        console.print(Text(f"    {variant.summary} ({variant.source})", style="dim"), soft_wrap=True)
    console.print(
        "\nEach at its default depth, for one 32x32 image and 10 classes (miniplaces: 112x112 and 100). "
        "MMAC: million multiply-adds, forward.",
        style="dim",
    )
