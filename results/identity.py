"""What of a record makes rows: one rule for every leaf of it.

A leaf either splits rows, is noted where it is mixed within a row, is shown as a figure, or cannot mislead, for the
reason given. What runs have in common under the first two is in CSV and JSON, the page and `harness why`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Literal

from harness.results.values import Record, RunResult


@dataclass(frozen=True, slots=True)
class Rule:
    path: str  # of leaves of a record; "*" stands for any rest
    treatment: Literal["split", "note", "figure", "ignored"]
    words: str = ""  # split, note: its name in tables; figure: where it stands; ignored: why it cannot mislead


RULES = tuple(
    Rule(*rule)
    for rule in (
        ("seed", "figure", "n and the list of seeds: a row is made of runs that differ in it alone"),
        ("spec.seed", "ignored", "repeats the seed"),
        ("spec.*", "split"),
        ("dataset", "split", "label"),
        ("original", "split", "original"),
        ("result.evaluated_on", "split", "evaluated_on"),
        ("result.device", "split", "hardware"),
        ("result.threads", "split", "threads"),
        ("result.widths*", "split", "widths"),
        ("result.engine", "split", "engine"),
        ("result.machine.torch", "split", "torch"),
        ("environment.versions.torch", "split", "torch"),  # where the machine does not say
        ("environment.code", "split", "code"),
        ("environment.commit", "note", "commit"),  # splits where the hash of the code is not known
        ("environment.dirty", "note", "uncommitted changes"),  # as the commit
        ("environment.check.status", "note", "check"),
        ("environment.check.*", "ignored", "what the check came to is noted; these say when and how"),
        ("environment.concurrent_runs", "note", "concurrent runs"),
        ("environment.command*", "ignored", "whatever of it changes a figure is in the spec"),
        ("environment.attempts*", "ignored", "a resumed run ends as an unbroken one does; the page lists them"),
        ("environment.versions.*", "note"),
        ("environment.*", "note"),
        ("result.machine.*", "note"),
        ("result.parameters", "note", "parameters"),
        ("result.runs_per_gpu", "note", "runs per GPU"),
        ("result.warmup_epochs", "note", "warm-up epochs"),
        ("result.workers", "ignored", "repeats spec.workers, which splits"),
        ("result.batch_size*", "ignored", "follows from the spec, which splits"),
        ("result.evaluated_images", "note", "images evaluated"),
        ("result.test_images", "note", "test images"),
        ("result.interference*", "figure", "a footnote of the seconds"),
        ("result.warnings*", "figure", "a footnote"),
        ("result.timing.untimed*", "ignored", "a footnote where no epoch was timed; `why` lists the epochs"),
        ("result.timing.*", "figure", "beside s/epoch"),
        ("result.attempts", "ignored", "a resumed run ends as an unbroken one does; the page lists them"),
        ("result.memory.warmup*.reason", "ignored", "`why` has these peaks where they were measured"),
        ("result.memory.growth*.reason", "ignored", "`why` has this slope where it was measured"),
        ("result.memory.*.reason", "figure", "a footnote where the figure is missing"),
        ("result.memory.*", "figure", "a column, or `why`"),
        ("result.ranks*", "figure", "`why` and the page; no column is made of them"),
        ("result.nodes*", "figure", "`why` and the page; no column is made of them"),
        ("result.epochs*", "figure", "the charts and `why`"),
        ("result.*", "figure", "a column, CSV and JSON, or `why`"),
        ("status", "figure", "n: done of all"),
        ("failure.traceback", "ignored", "kind and message are in a footnote; the page has it"),
        ("failure.*", "figure", "a footnote"),
        ("pruned.epoch", "figure", "in place of the error"),
        ("pruned.of", "figure", "in place of the error"),
        ("pruned.*", "ignored", "a pruned run is averaged with nothing"),
        ("variant", "ignored", "repeats spec.variant, which splits"),
        ("depth", "ignored", "repeats spec.network.depth, which splits"),
        ("key", "ignored", "a hash of the spec; `harness verify` computes it again"),
        ("name", "ignored", "the folder's: data set, variant, depth, seed and key"),
        ("schema_version", "ignored", "records of another version are not read"),
        ("started_at", "ignored", "an instant"),
        ("finished_at", "ignored", "an instant; of a seed that was run again the last run counts, and a footnote says so"),
    )
)  # fmt: skip


@cache
def find_rule(path: str) -> Rule | None:
    """The first rule for a leaf, "result.machine.host"."""
    return next((rule for rule in RULES if fnmatchcase(path, rule.path)), None)


def _code(record: Record, _: RunResult) -> str | None:
    return code_of(record)


def _torch(record: Record, result: RunResult) -> str | None:
    versions = record.environment.get("versions")
    known = result.machine.get("torch") or (versions.get("torch") if isinstance(versions, dict) else None)
    return known if isinstance(known, str) else None


def _engine(record: Record, result: RunResult) -> str | None:
    return result.engine if result.engine != record.spec.get("engine") else None


SPLIT: dict[str, Callable[[Record, RunResult], str | None]] = {
    "label": lambda record, _: record.dataset,
    "original": lambda record, _: str(record.original),
    "evaluated_on": lambda _, result: result.evaluated_on,
    "hardware": lambda _, result: result.device,  # what the spec calls "cuda" or "cpu"
    "threads": lambda _, result: str(result.threads),
    "widths": lambda _, result: (
        "→".join(map(str, result.widths)) or None
    ),  # of runs that went on with fewer workers
    "engine": _engine,  # a fallback
    "torch": _torch,  # whole: "2.15.0+cu130"
    "code": _code,
}
"""What splits rows beside the spec. None: the row lacks the field."""

Surroundings = tuple[tuple[str, str], ...]


def surroundings(record: Record, result: RunResult) -> Surroundings:
    """What splits rows without being part of the spec, by name."""
    named = [(name, read(record, result)) for name, read in SPLIT.items()]
    return tuple((name, value) for name, value in named if value is not None)


def code_of(record: Record) -> str | None:
    """The code that trained a run: the hash of the package, or of an early record the commit."""
    known = record.environment.get("code")
    if isinstance(known, str):
        return known
    commit, dirty = record.environment.get("commit"), record.environment.get("dirty")
    return None if commit is None else f"commit {str(commit)[:7]}{' with changes' if dirty else ''}"


def conditions(record: Record) -> Iterator[tuple[str, str]]:
    """Everything that is noted, by name, unless it is not known."""
    result, environment = record.result, record.environment
    places: list[tuple[str, Mapping[str, object]]] = [("environment.", environment)]
    nested = ((f"environment.{name}.", environment.get(name)) for name in ("versions", "check"))
    places += [(prefix, values) for prefix, values in nested if isinstance(values, dict)]
    if result is not None:
        places += [("result.machine.", result.machine), ("result.", {n: getattr(result, n) for n in _RESULT})]
    for prefix, values in places:
        for name, value in values.items():
            if value is not None and not isinstance(value, dict) and (noted := _note_name(prefix, name)):
                yield noted, str(value)


_RESULT = [r.path.removeprefix("result.") for r in RULES if r.treatment == "note" and r.path.count(".") == 1
           and r.path.startswith("result.") and "*" not in r.path]  # fmt: skip


@cache
def _note_name(prefix: str, name: str) -> str | None:
    rule = find_rule(prefix + name)
    return (rule.words or name) if rule and rule.treatment == "note" else None


@cache
def hash_code() -> str:
    """A hash of the package's own modules, which computes nothing of `results/`: 16 hexadecimal digits. A commit that
    changes documents, tests or reports leaves it as it is."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    if (root / "harness").is_dir():  # a checkout, where the packages lie beside harness/
        root = root / "harness"
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if name != "results")
        for name in sorted(files):
            if name.endswith(".py"):
                path = Path(folder, name)
                digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
