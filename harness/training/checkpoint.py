"""Checkpoints of one run: each a file that is whole or absent. Kept are the newest two of an epoch's end, and the one
within an epoch that is newer than both, if there is one.
"""

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
    return sorted(folder.glob("epoch-??????*.pt"), reverse=True)


def save_checkpoint(folder: Path, epoch: int, state: dict[str, Any], step: int = 0) -> None:
    """Write `state` as the checkpoint after `epoch` (from 1) and so many steps of the next, then drop older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in _stored(folder):
        if path.is_dir():  # nothing can be written in its place, and it is not ours to delete
            path.rename(path.with_suffix(".damaged"))
    within = f"_step-{step:06d}" if step else ""  # in the order of names it comes after the epoch's end
    with writing(folder / f"epoch-{epoch:06d}{within}.pt") as unfinished:
        torch.save(state, unfinished)
    newest, *older = _stored(folder)
    whole = [path for path in (newest, *older) if "_step-" not in path.name][:KEPT]
    for old in older:
        if old not in whole:
            old.unlink(missing_ok=True)


def load_checkpoint(
    folder: Path, key: str, warn: Callable[[str], None], check: Callable[[dict[str, Any]], bool] = lambda _: True
) -> dict[str, Any] | None:
    """The newest checkpoint that is whole and passes `check`, or None. Where that raises, it is skipped with a warning.

    Raises CheckpointError where it belongs to a run with another key. Nothing in the file is executed.
    """
    for path in _stored(folder):
        try:
            with zipfile.ZipFile(path) as file:  # torch.load does not compare the checksums
                if changed := file.testzip():
                    raise ValueError(f"the checksum of {changed} is wrong")
            state = dict(torch.load(path, map_location="cpu", weights_only=True))
            if (owner := state["key"]) == key and not check(state):
                continue
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
