"""How to train a stored run again: what `harness repro` does."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from harness.commands.report import find_results, load_runs, print_text
from harness.results.remote import is_uri, redact, split_uri
from harness.results.report.text import fill_template
from harness.results.store import PARTIAL, RECORD, Stored
from harness.spec import RunSpec, UserError, suggest

if TYPE_CHECKING:
    from rich.console import Console


def print_repro(run: str, path: str, console: Console) -> None:
    """Print the command, commit and versions that trained a run: a folder, or a name or key under `path`."""
    path, run = split_uri(run) if is_uri(run) else (path, run)
    folder = Path(run)
    if folder.is_dir() and ((folder / RECORD).exists() or folder.name.endswith(PARTIAL)):
        matches = load_runs([folder]).records
        if not matches:
            raise UserError(
                f"{run}: no record to repeat; the command that started an interrupted run continues it"
            )
    else:
        records = load_runs(find_results([path])).records
        key = run if len(run) >= 4 else "no key"
        matches = [s for s in records if s.record.name == run or s.record.key.startswith(key)]
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
    command = ["harness", "run", "--spec", str(stored.folder / RECORD), "--out", "repro"]
    # a plug-in's source is kept, unless it is an installed package's
    for identity in stored.record.spec.get("plugins", ()):
        name = str(identity).partition(":")[0]
        if (kept := stored.folder / "plugins" / name / f"{name}.py").is_file():
            command += ["--plugin", str(kept)]
    original = environment.get("command") or ()
    if "--data-dir" in original[:-1]:
        command += ["--data-dir", str(original[original.index("--data-dir") + 1])]
    return [*command, "--launcher", "local"] if environment.get("launcher") == "local" else command
