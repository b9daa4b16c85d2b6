"""Checkpoints of one run: each a file that is whole or absent. Kept are the newest two of an epoch's end, and the one
within an epoch that is newer than both, if there is one.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from harness.cluster.workers import gather
from harness.results.remote import CHECKPOINTS
from harness.results.store import writing
from harness.results.values import EpochMetrics, Value
from harness.spec import CheckpointError
from harness.training.setup import Prepared

KEPT = 2
_NEWEST = "~"  # after every name


class EpochPart(Value):
    """The first steps of an epoch, before one of which all ranks stopped."""

    steps: int
    sums: list[list[float]]  # of each rank: loss, errors, images
    train_seconds: float
    data_stall_seconds: float
    attempt: int = 1
    energy_joules: float | None = None
    interference: tuple[str, ...] = ()


def _stored(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted((folder / CHECKPOINTS).glob("epoch-??????*.pt"), reverse=True)


def _state(run: Prepared) -> dict[str, Any]:
    """Batch norm's running averages are rank 0's, which the others get at each epoch's end anyway."""
    return {name: getattr(run, name).state_dict() for name in ("network", "optimizer", "scaler")}


def save(run: Prepared, folder: Path, history: Sequence[EpochMetrics], part: EpochPart | None = None) -> None:
    """Write a checkpoint after some epochs and a part of the next, then drop older ones, and newer ones: those were damaged, or
    of another number of workers. It holds the epochs too, so that they and the weights are always of the same moment."""
    (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    for path in _stored(folder):
        if path.is_dir():  # nothing can be written in its place, and it is not ours to delete
            path.rename(path.with_suffix(".damaged"))
    state = {"key": run.spec.key, "history": [row.model_dump() for row in history], **_state(run)}
    within = ""
    if part:
        state["part"] = part.model_dump()
        within = f"_step-{part.steps:06d}"  # in the order of names it comes after the epoch's end
    newest = folder / CHECKPOINTS / f"epoch-{len(history):06d}{within}.pt"
    with writing(newest) as unfinished:
        try:
            with unfinished.open("wb") as file:
                torch.save(state, file)
        except RuntimeError as error:  # a full disk: torch's words are of its file's positions
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    whole = [path for path in _stored(folder) if "_step-" not in path.name and path.name <= newest.name]
    for other in _stored(folder):
        if other not in (newest, *whole[:KEPT]):
            other.unlink(missing_ok=True)


def resume(run: Prepared, folder: Path) -> tuple[list[EpochMetrics], EpochPart | None]:
    """Load the newest checkpoint that every rank can read into the run: the epochs that it has done, none where there is no
    checkpoint, and what it has done of the next one. An epoch is not gone on with by another number of workers, but
    begun again. One that is damaged is skipped with a warning. A collective: nodes may see a folder differently.

    Raises CheckpointError where it belongs to a run with another key. Nothing in the file is executed.
    """
    name, names = "", [_NEWEST]
    while any(other != name for other in names):
        name, state = _read(run, folder, min(names))
        names = gather(name)
        if name > min(names):
            run.loader_config.warn(f"not every rank can read checkpoint {folder / name}, taking the one before")
    if name:
        run.network.load_state_dict(state["network"])
        # but not the lr, which every epoch sets: it is a tensor on a device or is not
        groups = zip(run.optimizer.state_dict()["param_groups"], state["optimizer"]["param_groups"], strict=True)
        restored = [own | kept | {"lr": own["lr"]} for own, kept in groups]
        run.optimizer.load_state_dict({**state["optimizer"], "param_groups": restored})
        run.scaler.load_state_dict(state["scaler"])
    return state["history"], state["part"]


def _read(run: Prepared, folder: Path, newest: str) -> tuple[str, dict[str, Any]]:
    """Name and content of the newest checkpoint that is whole, and no newer than the one of that name; "" for none."""
    for path in _stored(folder):
        if path.name > newest:
            continue
        try:
            state = _load(run, path)
        except CheckpointError:
            raise
        except Exception as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error).strip() or type(error).__name__
            run.loader_config.warn(
                f"checkpoint {path} is damaged, taking the one before: {reason.splitlines()[0][:200]}"
            )
            continue
        if state["part"] is None or len(state["part"].sums) == run.loader_config.world_size:
            return path.name, state
    return "", {"history": [], "part": None}


def _load(run: Prepared, path: Path) -> dict[str, Any]:
    """Its content. Raises whatever a damaged file makes a reader raise, ValueError where its tensors are not those of a run
    like this one, and CheckpointError."""
    with zipfile.ZipFile(path) as file:  # torch.load does not compare the checksums
        if changed := file.testzip():
            raise ValueError(f"the checksum of {changed} is wrong")
    state, here = dict(torch.load(path, map_location="cpu", weights_only=True)), _state(run)
    if state["key"] != run.spec.key:
        raise CheckpointError(f"checkpoint {path} belongs to run {state['key']}, not to {run.spec.key}")
    if not run.optimizer.state:  # it is made by the first step
        del here["optimizer"]
    if any(_outline(state.get(name)) != _outline(own) for name, own in here.items()):
        raise ValueError("its tensors are not those of this run")
    history = [EpochMetrics.model_validate(row) for row in state["history"]]
    part = state.get("part")
    return state | {"history": history, "part": EpochPart.model_validate(part) if part or not history else None}


def _outline(value: Any) -> Any:
    """Names, shapes and types of the tensors in nested dictionaries."""
    if isinstance(value, Mapping):
        return {name: _outline(item) for name, item in value.items()}
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else None
