"""What of a record makes rows: one rule for every leaf of it, in rules.toml.

A leaf either splits rows, is noted where it is mixed within a row, is shown as a figure, or cannot mislead, for the
reason given. What runs have in common under the first two is in CSV and JSON, the page and `harness why`.
"""

from __future__ import annotations

import hashlib
import os
import tomllib
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


def _load_rules() -> tuple[Rule, ...]:
    text = Path(__file__).with_name("rules.toml").read_text(encoding="utf-8")
    return tuple(Rule(path, *rule) for path, rule in tomllib.loads(text).items())


RULES = _load_rules()


@cache
def find_rule(path: str) -> Rule | None:
    """The first rule for a leaf, "result.machine.host"."""
    return next((rule for rule in RULES if fnmatchcase(path, rule.path)), None)


def _torch(record: Record, result: RunResult) -> str | None:
    versions = record.environment.get("versions")
    known = result.machine.get("torch") or (versions.get("torch") if isinstance(versions, dict) else None)
    return known if isinstance(known, str) else None


SPLIT: dict[str, Callable[[Record, RunResult], str | None]] = {
    "label": lambda record, _: record.dataset,
    "original": lambda record, _: str(record.original),
    "evaluated_on": lambda _, result: result.evaluated_on,
    "hardware": lambda _, result: result.device,  # what the spec calls "cuda" or "cpu"
    "threads": lambda _, result: str(result.threads),
    "widths": lambda _, result: (
        "→".join(map(str, result.widths)) or None
    ),  # of runs that went on with fewer workers
    "engine": lambda _, result: result.engine,  # the one that was used, which a fallback makes differ
    "torch": _torch,  # whole: "2.15.0+cu130"
    "code": lambda record, _: code_of(record),
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


_RESULT = [
    name for name in RunResult.model_fields if (rule := find_rule(f"result.{name}")) and rule.treatment == "note"
]


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
