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
    evaluation_timed: bool = False  # as a part of these seconds
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
        different = []
        for part, defaults in pins["defaults"].items():
            ours = defaults | (setting(spec, part, dict) or {})  # a field that is newer than the record
            theirs = defaults | pin[part] | (self.changes if part == "recipe" else {})
            names = sorted((ours.keys() | theirs.keys()) - {"batch_norm"})  # the same with one worker
            pairs = [(name, ours.get(name), theirs.get(name)) for name in names]
            different += [f"{name} {own}, theirs {other}" for name, own, other in pairs if own != other]
        return different


@cache
def load_published() -> tuple[Published, ...]:
    read = tomllib.loads((HERE / "published.toml").read_text(encoding="utf-8"))
    rests_on = read["rests_on"].items()
    about = [next(words for start, words in rests_on if e["source"].startswith(start)) for e in read["published"]]
    return tuple(Published(**e, rests_on=words) for e, words in zip(read["published"], about, strict=True))


@cache
def _load_pins() -> dict[str, Any]:
    """{"defaults": {"network": {...}, "recipe": {...}}, "msra-20": what differs from them}."""
    pins: dict[str, Any] = json.loads((HERE / PINS).read_text(encoding="utf-8"))
    return pins


@cache
def find_published(dataset: str | None, variant: str, depth: int) -> Published | None:
    """The published number that may stand beside runs of this variant on this data set, or on any: the first of its recipe."""
    of = (e for e in load_published() if (e.variant, e.depth, e.recipe) == (variant, depth, "same"))
    return next((e for e in of if dataset in (None, e.dataset)), None)
