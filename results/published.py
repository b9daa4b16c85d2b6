"""Published numbers, read from published.toml beside this file."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from harness.results.statistics import Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """One number of a paper or a repository. Errors in percent; None: not published."""

    dataset: str
    variant: str
    depth: int
    error: float | None = None
    std: float | None = None
    n: int = 1
    top5_error: float | None = None
    rule: Literal["last", "best", "unstated"]
    recipe: Literal["same", "other"]
    memory_mib: float | None = None
    epoch_seconds: float | None = None
    hardware: str | None = None
    year: int | None = None  # of the costs
    progress: tuple[float, ...] = ()  # errors by epoch
    source: str
    note: str | None = None

    @property
    def number(self) -> float:
        """The error, top-1 where it is published."""
        return self.error if self.error is not None else self.top5_error or 0.0

    @property
    def sample(self) -> Sample | None:
        return None if self.error is None else Sample(self.n, self.error, self.std)


@cache
def load_published() -> tuple[Published, ...]:
    text = (Path(__file__).parent / "published.toml").read_text(encoding="utf-8")
    return tuple(
        Published(**entry | {"progress": tuple(entry.get("progress", ()))})
        for entry in tomllib.loads(text)["published"]
    )


def find_published(dataset: str, variant: str, depth: int) -> Published | None:
    """The published number that may stand beside runs of this variant on this data set: the first of its recipe."""
    return _same_recipe().get((dataset, variant, depth))


@cache
def _same_recipe() -> dict[tuple[str, str, int], Published]:
    same = [entry for entry in reversed(load_published()) if entry.recipe == "same"]
    return {(entry.dataset, entry.variant, entry.depth): entry for entry in same}
