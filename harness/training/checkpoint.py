"""Checkpoints of one run: each a file that is whole or absent, the newest two kept."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from harness.results.store import writing
from harness.spec import CheckpointError

KEPT = 2


def _stored(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob("epoch-??????.pt"), reverse=True)


def save_checkpoint(folder: Path, epoch: int, state: dict[str, Any]) -> None:
    """Write `state` as the checkpoint after `epoch` (from 1), then drop all but the newest two."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in _stored(folder):
        if path.is_dir():  # nothing can be written in its place, and it is not ours to delete
            path.rename(path.with_suffix(".damaged"))
    with writing(folder / f"epoch-{epoch:06d}.pt") as unfinished:
        torch.save(state, unfinished)
    for old in _stored(folder)[KEPT:]:
        old.unlink(missing_ok=True)


def load_checkpoint(
    folder: Path, key: str, warn: Callable[[str], None], check: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any] | None:
    """The newest checkpoint that is whole and of which `check` raises nothing, or None. Others are skipped, with a warning.

    Raises CheckpointError where it belongs to a run with another key. Nothing in the file is executed.
    """
    for path in _stored(folder):
        try:
            with zipfile.ZipFile(path) as file:  # torch.load does not compare the checksums
                if changed := file.testzip():
                    raise ValueError(f"the checksum of {changed} is wrong")
            state = dict(torch.load(path, map_location="cpu", weights_only=True))
            if (owner := state["key"]) == key:
                check(state)
        except Exception as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error).strip() or type(error).__name__
            warn(f"checkpoint {path} is damaged, taking the one before: {reason.splitlines()[0][:200]}")
            continue
        if owner != key:
            raise CheckpointError(f"checkpoint {path} belongs to run {owner}, not to {key}")
        return state
    return None


def outline(value: Any) -> Any:
    """Names, shapes and types of the tensors in nested dictionaries."""
    if isinstance(value, Mapping):
        return {name: outline(item) for name, item in value.items()}
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else None
