"""Weights from a file into a network: our own, and checkpoints that other people published."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
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
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        content = next((content[name] for name in NESTINGS if isinstance(content.get(name), Mapping)), None)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds no tensors, neither by themselves nor under {', '.join(NESTINGS)}")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    while wrapper := next((w for w in WRAPPERS if all(name.startswith(w) for name in tensors)), None):
        tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
    return tensors


def load_metadata(path: Path) -> dict[str, str]:
    """What a run wrote beside its weights: key, variant and depth. Empty for files of other origin."""
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
    the n-th of the network, if all their shapes agree and none is, say, a mean where a variance should be. Left
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
        pairs = _align(wanted, given)
    theirs = set(pairs.values())
    problems = (
        _list("missing", [f"{name} {tuple(wanted[name].shape)}" for name in wanted if name not in pairs]),
        _list("left over", [f"{name} {tuple(given[name].shape)}" for name in given if name not in theirs]),
        _list("differing", [words for pair in pairs.items() if (words := _differ(wanted, given, *pair))]),
    )
    if any(problems):
        raise WeightsError(f"the weights are not this network's: {'; '.join(filter(None, problems))}")
    # counters stay as they are
    network.load_state_dict({name: given[other] for name, other in pairs.items()}, strict=False)
    return left_over


def _align(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, str]:
    """Names that belong together by order. Where tensors are missing or too many, those in equal sequences."""
    ours, theirs = list(wanted), list(given)
    if len(ours) == len(theirs):
        return dict(zip(ours, theirs, strict=True))
    named = all(map(_kind, given))
    sides = [[(t.shape, named and _kind(name)) for name, t in side.items()] for side in (wanted, given)]
    blocks = SequenceMatcher(None, sides[0], sides[1], autojunk=False).get_matching_blocks()
    return {ours[i + k]: theirs[j + k] for i, j, size in blocks for k in range(size)}


def _kind(name: str) -> str | None:
    last = name.rpartition(".")[2]
    return last if last in KINDS else None


def _differ(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], ours: str, theirs: str) -> str:
    """How two tensors differ; empty where the one can be loaded into the other."""
    shape, expected = tuple(given[theirs].shape), tuple(wanted[ours].shape)
    if shape != expected:
        place = "" if ours == theirs else f" in the place of {ours}"
        return f"{theirs} is {shape}, expected {expected}{place}"
    return "" if _kind(theirs) in (_kind(ours), None) else f"{theirs} stands in the place of {ours}"


def _list(what: str, items: Sequence[str]) -> str:
    if not items:
        return ""
    more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return f"{what}: {', '.join(items[:NAMED])}{more}"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: not a safetensors file: {str(error).splitlines()[0]}") from None


def _read_pickled(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about the pickle's age
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can make the unpickler raise nearly anything
        if isinstance(error, OSError) and error.strerror:
            raise WeightsError(f"{path}: cannot be read: {error.strerror}") from None
        found = re.search(r"GLOBAL ([\w.]*\w)(?![\w.])", str(error))
        if found or _is_other_pickle(path):
            what = f" ({found[1]})" if found else ""
            raise WeightsError(
                f"{path}: refused, and nothing in it was run: it holds pickled code or objects{what}; "
                "only tensors are read"
            ) from None
        raise WeightsError(f"{path}: not a checkpoint that torch can read: damaged, or another format") from None


def _is_other_pickle(path: Path) -> bool:
    """Whether it is a pickle of a later protocol than torch writes, so that one of torch's that is cut off is not."""
    with path.open("rb") as file:
        return file.read(2) in (b"\x80\x03", b"\x80\x04", b"\x80\x05")
