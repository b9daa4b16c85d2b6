"""The values of one run: what is asked for (`RunSpec`) and where its files are (`RunPaths`).

What a run measures (`EpochMetrics`, `RunResult`) is defined in `harness.results.values`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from harness.models.variants import Network, Recipe

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Engine = Literal["eager", "compile", "graph"]


class UserError(Exception):
    """A mistake of the person at the keyboard: printed as one line, exit code 2, no traceback."""


class DivergedError(RuntimeError):
    """The loss is not finite; `steps` is where the epoch ended that showed it."""

    def __init__(self, epoch: int, steps: int) -> None:
        super().__init__(f"loss is not finite in epoch {epoch} (by step {steps})")


class CheckpointError(RuntimeError):
    """A checkpoint that belongs to another run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpec:
    """One run, whole: equal specs give equal results, wherever and whenever they are run."""

    variant: str
    network: Network
    recipe: Recipe  # with the overrides applied
    overrides: tuple[str, ...] = ()  # what differs from the variant's own recipe: ("epochs=2",)
    dataset: str
    fingerprint: str  # of the images and labels, sha256
    limit_train: int | None = None
    limit_test: int | None = None
    loader: str
    precision: Precision = "fp32"
    engine: Engine = "eager"
    device: Literal["cuda", "cpu"]
    workers: int = 1
    seed: int = 0

    @property
    def key(self) -> str:
        """Hash of the contents, 16 hexadecimal digits.

        Fields that stand at their default are left out, so that a field added later leaves old keys as they are.
        """
        text = json.dumps(_contents(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        """For people: "msra-20 seed 0"."""
        return f"{self.variant}-{self.network.depth} seed {self.seed}"

    def to_json(self) -> dict[str, Any]:
        """Every field, defaults too, as JSON values."""
        whole: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return whole


def _contents(value: Any) -> Any:
    if is_dataclass(value):
        kept = {}
        for field in fields(value):
            item = getattr(value, field.name)
            if field.default is MISSING or item != field.default:
                kept[field.name] = _contents(item)
        return kept
    return value


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPaths:
    """Where a run finds its data and keeps its files. Not part of its identity. All paths absolute."""

    out: Path
    data_dir: Path | None = None
    cache_dir: Path | None = None
    label: str = ""  # of the data set, for folder names and tables
    checkpoint_every: int = 1  # epochs
    remote: str = ""  # the URI that `out` stands for, if it does
