"""Published numbers, read from published.toml beside this file, and the networks and recipes behind them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from harness.results.values import setting

HERE = Path(__file__).parent
PINS = "pins.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """One number of a paper or a repository. Errors in percent; None: not published."""

    dataset: str
    variant: str
    depth: int
    error: float | None = None
    rounded: float = 0.01  # the last place of the number as printed
    statistic: Literal["mean", "median"] = "mean"  # of the n runs
    std: float | None = None
    n: int = 1
    top5_error: float | None = None
    images: int = 10_000  # of the test set
    rule: Literal["last", "best", "unstated"]
    recipe: Literal["same", "other"]
    changes: Mapping[str, Any] = field(default_factory=dict)  # fields of the recipe in which theirs is another
    precision: str = "fp32"
    memory_mib: float | None = None
    epoch_seconds: float | None = None
    hardware: str | None = None
    year: int | None = None  # of the costs
    progress: Sequence[float] = ()  # errors by epoch
    source: str
    rests_on: str = ""  # what is known of its network, split and rule, and from where
    note: str | None = None

    @property
    def number(self) -> float:
        """The error, top-1 where it is published."""
        return self.error if self.error is not None else self.top5_error or 0.0

    def differences(self, spec: Mapping[str, Any]) -> list[str]:
        """The fields in which a run's network and recipe are not those behind this number: "lr 0.05, theirs 0.1"."""
        pins = _load_pins()
        if (pin := pins.get(f"{self.variant}-{self.depth}")) is None:
            return ["no copy of their network and recipe is kept here"]
        different: list[str] = []
        for part, changed in {"network": {}, "recipe": self.changes}.items():
            defaults = pins["defaults"][part]
            ours = defaults | (setting(spec, part, dict) or {})  # a field that is newer than the record
            theirs = defaults | pin[part] | changed
            names = sorted((ours.keys() | theirs.keys()) - {"batch_norm"})  # the same with one worker
            different += [
                f"{n} {ours.get(n)}, theirs {theirs.get(n)}" for n in names if ours.get(n) != theirs.get(n)
            ]
        return different


@cache
def load_published() -> tuple[Published, ...]:
    read = tomllib.loads((HERE / "published.toml").read_text(encoding="utf-8"))
    entries = []
    for entry in read["published"]:
        about = [words for source, words in read["rests_on"].items() if entry["source"].startswith(source)]
        entries.append(Published(**entry, rests_on=about[0]))
    return tuple(entries)


@cache
def _load_pins() -> dict[str, Any]:
    """{"defaults": {"network": {...}, "recipe": {...}}, "msra-20": what differs from them}."""
    pins: dict[str, Any] = json.loads((HERE / PINS).read_text(encoding="utf-8"))
    return pins


@cache
def find_published(dataset: str, variant: str, depth: int) -> Published | None:
    """The published number that may stand beside runs of this variant on this data set: the first of its recipe."""
    for entry in load_published():
        if (entry.dataset, entry.variant, entry.depth, entry.recipe) == (dataset, variant, depth, "same"):
            return entry
    return None
