"""What of a record makes rows: one rule for every leaf of it, in rules.toml.

A leaf either splits rows, is noted where it is mixed within a row, is shown as a figure, or cannot mislead, for the
reason given. What runs have in common under the first two is in CSV and JSON, the page and `harness why`.
"""

from __future__ import annotations

import hashlib
import tomllib
from fnmatch import fnmatchcase
from functools import cache
from glob import glob
from pathlib import Path
from typing import Literal, NamedTuple

from harness.results.values import Record, RunResult, flatten, setting


class Rule(NamedTuple):
    path: str  # of leaves of a record; "*" stands for any rest
    treatment: Literal["split", "note", "figure", "ignored"]
    words: str = ""  # split, note: its name in tables; figure: where it stands; ignored: why it cannot mislead


_TEXT = Path(__file__).with_name("rules.toml").read_text(encoding="utf-8")
RULES = tuple(Rule(path, *rule) for path, rule in tomllib.loads(_TEXT).items())
SPLIT = {rule.path.rstrip("*"): rule.words for rule in RULES if rule.treatment == "split" and rule.words}
"""What splits rows beside the spec: path -> name. Of two paths of one name the first counts that is known."""


@cache
def find_rule(path: str) -> Rule | None:
    """The first rule for a leaf, "result.machine.host"."""
    return next((rule for rule in RULES if fnmatchcase(path, rule.path)), None)


def surroundings(record: Record) -> tuple[tuple[str, str], ...]:
    """What splits rows without being part of the spec, by name; empty without a result."""
    named: dict[str, str] = {}
    for path, name in SPLIT.items() if record.result else ():
        value = setting(record, path)
        if value not in (None, ()):
            named.setdefault(name, "→".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return tuple(named.items())


def conditions(record: Record) -> dict[str, str]:
    """Everything that is noted, by name, unless it is not known; values of several nodes side by side."""
    leaves = [*flatten(record.environment, "environment.")]
    if (result := record.result) is not None:
        leaves += flatten(result.machine, "result.machine.")
        leaves += [(f"result.{name}", getattr(result, name)) for name in RunResult.model_fields]
    named: dict[str, str] = {}
    for path, value in leaves:
        if value is not None and (rule := find_rule(path)) and rule.treatment == "note":
            name, text = rule.words or path.rpartition(".")[2], str(value)
            if (before := named.setdefault(name, text)) != text and text not in before.split(", "):
                named[name] = f"{before}, {text}"
    return named


@cache
def hash_code() -> str:
    """A hash of the package's own modules, which computes nothing of `results/`: 16 hexadecimal digits. A commit that
    changes documents, tests or reports leaves it as it is."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    if (root / "harness").is_dir():  # a checkout, where the packages lie beside harness/
        root = root / "harness"
    for name in sorted(glob("**/*.py", root_dir=root, recursive=True)):  # noqa: PTH207, Path's follows no links
        if "results" not in name.split("/"):
            digest.update(f"{name}\0".encode() + (root / name).read_bytes() + b"\0")
    return digest.hexdigest()[:16]
