"""Checkpoints of one run: each a file that is whole or absent, the newest two kept."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from harness.results.store import writing
from harness.spec import CheckpointError

KEPT = 2
_NAME = re.compile(r"epoch-(\d{6})\.pt")


def _stored(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted((p for p in folder.glob("epoch-*.pt") if _NAME.fullmatch(p.name)), reverse=True)


def save_checkpoint(folder: Path, epoch: int, state: dict[str, Any]) -> None:
    """Write `state` as the checkpoint after `epoch` (from 1), then drop all but the newest two."""
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder / f"epoch-{epoch:06d}.pt") as unfinished:
        torch.save(state, unfinished)
    for old in _stored(folder)[KEPT:]:
        old.unlink(missing_ok=True)


def load_checkpoint(folder: Path, key: str, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None. A damaged one is skipped, with a warning.

    Raises CheckpointError where it belongs to a run with another key. Nothing in the file is executed.
    """
    for path in _stored(folder):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            owner = state["key"]
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warn(f"checkpoint {path} is damaged, taking the one before: {reason[:200]}")
            continue
        if owner != key:
            raise CheckpointError(f"checkpoint {path} belongs to run {owner}, not to {key}")
        return dict(state)
    return None
