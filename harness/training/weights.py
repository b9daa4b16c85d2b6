"""Weights for a network: our own files, and those that other people published."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

NESTINGS = ("state_dict", "model_state_dict", "network", "model", "net")
WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
NEVER_CALLED = re.compile(r"_block\.(conv_block|bn)\.")
"""Layers in the checkpoints of fattorib/ResNets-CIFAR10 that its forward pass does not use."""
COUNTER = "num_batches_tracked"  # of batch norm: no part of the function, absent from older checkpoints
KINDS = ("weight", "bias", "running_mean", "running_var")
NAMED = 3  # tensors that a message names of each kind


class WeightsError(ValueError):
    """A file that holds no weights, or not those of the network: one line that names file or tensor."""


def load_weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint on the CPU, by name, in the file's order.

    `.safetensors`, or what torch.save wrote: a state dict, alone or under one of `NESTINGS`; what stands beside
    it is left out, and so are the prefixes `WRAPPERS`. Nothing in the file is executed: one that holds pickled
    objects of other types is refused. Raises WeightsError.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    content = _read(path)
    while isinstance(content, Mapping) and (
        inner := [content[n] for n in NESTINGS if isinstance(content.get(n), Mapping)]
    ):
        content = inner[0]  # whatever tensors stand beside it, such as best_acc1
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{path}: holds no tensors, neither by themselves nor under {', '.join(NESTINGS)}")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    while wrapper := next((w for w in WRAPPERS if all(name.startswith(w) for name in tensors)), None):
        tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
    return tensors


def load_metadata(path: Path) -> dict[str, str]:
    """What a run wrote beside its weights: key, variant, depth and spec. Empty for files of other origin."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}


def match_weights(network: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Load tensors into the network and return the names of those that were left over.

    By name where at least half of the network's names are there. Otherwise by order: the n-th tensor of the file is
    the n-th of the network, if all have one shape and none is, say, a mean where a variance should be. Left
    over may be only what is known to be never called (`NEVER_CALLED`).

    Raises WeightsError, with names, where tensors are missing, too many, or of the wrong shape.
    """
    wanted = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith(COUNTER)}
    given = {name: tensor for name, tensor in tensors.items() if not name.endswith(COUNTER)}
    left_over: list[str] = []
    if 2 * len(wanted.keys() & given.keys()) >= len(wanted):
        pairs = {name: name for name in wanted if name in given}
    else:
        left_over = [name for name in tensors if NEVER_CALLED.search(name)]
        given = {name: tensor for name, tensor in given.items() if name not in left_over}
        named = all(map(_kind, given))
        sides = [[(t.shape, named and _kind(name)) for name, t in side.items()] for side in (wanted, given)]
        blocks = SequenceMatcher(None, sides[0], sides[1], autojunk=False).get_matching_blocks()
        ours, theirs = list(wanted), list(given)
        pairs = {ours[i + k]: theirs[j + k] for i, j, size in blocks for k in range(size)}
    here, there = ({name: tuple(t.shape) for name, t in side.items()} for side in (wanted, given))
    problems = {
        "missing": [f"{name} {here[name]}" for name in wanted if name not in pairs],
        "left over": [f"{name} {there[name]}" for name in given if name not in pairs.values()],
        "differing": [
            f"{other} is {there[other]}, expected {here[name]}"
            for name, other in pairs.items()
            if here[name] != there[other]
        ],
    }
    if any(problems.values()):
        more = {what: f" and {len(found) - NAMED} more" for what, found in problems.items() if len(found) > NAMED}
        lists = (f"{w}: {', '.join(found[:NAMED])}{more.get(w, '')}" for w, found in problems.items() if found)
        raise WeightsError(f"the weights are not this network's: {'; '.join(lists)}")
    # counters stay as they are
    network.load_state_dict({name: given[other] for name, other in pairs.items()}, strict=False)
    return left_over


def _kind(name: str) -> str | None:
    last = name.rpartition(".")[2]
    return last if last in KINDS else None


def _read(path: Path) -> Any:
    """What is in the file. A broken one can make a reader raise nearly anything."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about the pickle's age
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            reason = f"cannot be read: {error.strerror}"
        elif path.suffix == ".safetensors":
            reason = f"not a safetensors file: {str(error).splitlines()[0]}"
        elif found := re.search(r"GLOBAL ([\w.]*\w)(?![\w.])", str(error)):
            what = f"it holds pickled code or objects ({found[1]})"
            reason = f"refused, and nothing in it was run: {what}; only tensors are read"
        else:
            reason = "not a checkpoint that torch can read: damaged, or another format"
        raise WeightsError(f"{path}: {reason}") from None
