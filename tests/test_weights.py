"""Weights: read whatever torch or safetensors wrote, run nothing, match by name or order, name what does not fit."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from harness.models.build import build
from harness.models.variants import find_variant
from harness.training.weights import WeightsError, load_metadata, load_weights, match_weights

Tensors = dict[str, Tensor]
HE2015 = find_variant("he2015")


def make(variant: Callable[[int], Any] = HE2015, depth: int = 8, *, seed: int = 0, classes: int = 10) -> nn.Module:
    """A network whose every tensor differs from any other seed's."""
    torch.manual_seed(seed)
    network = build(variant(depth).network, classes)
    for name, tensor in network.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return network


def weights(network: nn.Module) -> Tensors:
    return {
        name: t.clone() for name, t in network.state_dict().items() if not name.endswith("num_batches_tracked")
    }


def foreign(network: nn.Module) -> Tensors:
    """The same tensors under names of nobody's: only the last word stays."""
    return {
        f"part{n}.{name.rpartition('.')[2]}": tensor for n, (name, tensor) in enumerate(weights(network).items())
    }


def equal(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


NESTS: dict[str, Callable[[Tensors], Any]] = {
    "plain": lambda t: t,
    "parallel": lambda t: {f"module.{name}": tensor for name, tensor in t.items()},
    "parallel and compiled": lambda t: {f"module._orig_mod.{name}": tensor for name, tensor in t.items()},
    "state_dict": lambda t: {"epoch": 3, "best_prec1": 91.7, "state_dict": t},
    "beside a tensor": lambda t: {"best_acc1": torch.tensor(69.8), "state_dict": t},
    "model": lambda t: {"model": t, "optimizer": {"lr": 0.1}},
    "net in model": lambda t: {"model": {"net": {f"module.{name}": tensor for name, tensor in t.items()}}},
    "a run's checkpoint": lambda t: {"key": "k", "network": t, "optimizer": {"state": {}}, "history": []},
}


@pytest.mark.parametrize("nest", NESTS)
@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_of_torch(tmp_path: Path, nest: str, zipped: bool) -> None:
    path = tmp_path / "weights.th"
    torch.save(NESTS[nest](weights(make())), path, _use_new_zipfile_serialization=zipped)
    network = make(seed=1)
    assert match_weights(network, load_weights(path)) == []
    assert equal(network, make())
    assert load_metadata(path) == {}


def test_our_own_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(make().state_dict(), path, metadata={"variant": "he2015"})
    network = make(seed=1)
    assert match_weights(network, load_weights(path)) == []
    assert equal(network, make())
    assert load_metadata(path) == {"variant": "he2015"}


@pytest.mark.parametrize(
    ("variant", "depth"),
    [
        (HE2015, 20),
        (find_variant("msra"), 8),
        (find_variant("fattorib"), 14),
        (find_variant("se-mxresnet"), 8),
        (find_variant("convnet"), 8),
    ],
)
def test_other_names_are_matched_by_order(variant: Callable[[int], Any], depth: int) -> None:
    network = make(variant, depth, seed=1)
    assert match_weights(network, foreign(make(variant, depth))) == []
    assert equal(network, make(variant, depth))


def test_counters_of_batch_norm_are_optional_and_half_precision_is_widened() -> None:
    network = make(seed=1)
    match_weights(network, {name: tensor.half() for name, tensor in make().state_dict().items()})
    assert all(tensor.dtype == torch.float32 for tensor in weights(network).values())
    assert torch.equal(network.get_parameter("fc.weight"), make().get_parameter("fc.weight").half().float())


def test_layers_that_are_never_called_are_left_over_and_named() -> None:
    """As in fattorib/ResNets-CIFAR10: in each stage, of the very shapes of layers that are called."""
    given: Tensors = {}
    never: list[str] = []
    for number, (name, tensor) in enumerate(weights(make(find_variant("fattorib"))).items()):
        if name.endswith("conv1.weight"):
            stage = ("first", "second", "third")[int(name.split(".")[1])]
            extra = {f"{stage}_block.conv_block.0.weight": torch.zeros_like(tensor)}
            extra |= {
                f"{stage}_block.bn.{kind}": torch.zeros(tensor.shape[0]) for kind in ("weight", "running_mean")
            }
            extra |= {f"{stage}_block.bn.num_batches_tracked": torch.tensor(0)}
            given |= extra
            never += extra
        given[f"stage_block.part{number}.{name.rpartition('.')[2]}"] = tensor
    network = make(find_variant("fattorib"), seed=1)
    assert match_weights(network, given) == never
    assert equal(network, make(find_variant("fattorib")))


# ---- what does not fit -----------------------------------------------------------------------------------------

HEAD = "the weights are not this network's: "


def complaint(network: nn.Module, tensors: Tensors) -> str:
    before = weights(network)
    with pytest.raises(WeightsError) as caught:
        match_weights(network, tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(network).items()), "half loaded"
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(HEAD)


def test_missing_extra_and_differing_by_name() -> None:
    good = weights(make())
    without = {name: tensor for name, tensor in good.items() if name != "stages.1.0.bn1.running_var"}
    assert complaint(make(), without) == "missing: stages.1.0.bn1.running_var (32,)"
    assert complaint(make(), good | {"ema.decay": torch.zeros(2)}) == "left over: ema.decay (2,)"
    assert complaint(make(classes=2), good) == (
        "differing: fc.weight is (10, 64), expected (2, 64), fc.bias is (10,), expected (2,)"
    )
    deeper = complaint(make(depth=14), good)  # 3 blocks of 2 convolutions and 8 tensors of batch norm more
    assert deeper.startswith("missing: stages.0.1.conv1.weight (16, 16, 3, 3), ")
    assert deeper.endswith("and 27 more")


def test_missing_extra_and_differing_by_order() -> None:
    good = foreign(make())
    assert list(good)[10] == "part10.weight"
    without = {name: tensor for name, tensor in good.items() if name != "part10.weight"}
    assert complaint(make(), without) == "missing: stages.0.0.conv2.weight (16, 16, 3, 3)"
    extra = dict(list(good.items())[:15]) | {"odd.weight": torch.zeros(5, 5)} | good
    assert complaint(make(), extra) == "left over: odd.weight (5, 5)"
    assert complaint(make(), good | {"part15.weight": torch.zeros(8, 16, 3, 3)}) == (
        "missing: stages.1.0.conv1.weight (32, 16, 3, 3); left over: part15.weight (8, 16, 3, 3)"
    )
    names = list(good)
    assert [name.partition(".")[2] for name in names[3:5]] == ["running_mean", "running_var"]
    names[3], names[4] = names[4], names[3]  # equal shapes: only the last word tells
    swapped = complaint(make(), {name: good[name] for name in names})
    assert swapped in (
        "missing: bn.running_var (16,); left over: part4.running_var (16,)",
        "missing: bn.running_mean (16,); left over: part3.running_mean (16,)",
    )
    assert complaint(make(), {}).startswith("missing: conv.weight (16, 3, 3, 3), ")


# ---- files that are no weights -----------------------------------------------------------------------------------


class Touch:
    """Unpickled by anyone who is careless, this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("how", ["zip", "legacy", "bare pickle", "bare pickle 0", "renamed"])
def test_pickled_code_is_refused_and_not_run(tmp_path: Path, how: str) -> None:
    path, touched = tmp_path / "weights.pt", tmp_path / "touched"
    content = {"state_dict": weights(make()), "hook": Touch(touched)}
    if how.startswith("bare"):
        path.write_bytes(pickle.dumps(Touch(touched), protocol=0 if how.endswith("0") else None))
    else:
        path = tmp_path / "weights.safetensors" if how == "renamed" else path
        torch.save(content, path, _use_new_zipfile_serialization=how != "legacy")
    with pytest.raises(WeightsError) as caught:
        load_weights(path)
    assert "\n" not in str(caught.value)
    expected = "not a safetensors file" if how == "renamed" else "refused, and nothing in it was run"
    expected = "not a checkpoint that torch can read" if how == "bare pickle" else expected
    assert str(caught.value).startswith(f"{path}: {expected}")
    assert not touched.exists()
    if how == "legacy":  # the trap works
        torch.load(path, weights_only=False)
        assert touched.exists()


def test_objects_that_are_no_tensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    for content, name in (
        (make(), "harness.models.networks.CifarResNet"),
        ({"args": argparse.Namespace()}, "argparse.Namespace"),
    ):
        torch.save(content, path)
        with pytest.raises(WeightsError, match=rf"refused.*\({name}\); only tensors are read"):
            load_weights(path)


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello there\n", b"\x89PNG\r\n\x1a\n" + bytes(200), b"PK\x03\x04rest"])
def test_not_a_checkpoint(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"{name}: not a") as caught:
        load_weights(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 200


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_damaged_missing_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(WeightsError, match=f"{name}: no such file"):
        load_weights(path)
    tensors = weights(make())
    for zipped in (True, False):
        for kept in (0.001, 0.01, 0.5, 0.999):
            if name.endswith("tensors"):
                save_file(tensors, path)
            else:
                torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
            os.truncate(path, int(path.stat().st_size * kept))
            with pytest.raises(WeightsError, match=f"{name}: not a"):
                load_weights(path)
    with pytest.raises(WeightsError, match="not a file"):
        load_weights(tmp_path)


@pytest.mark.parametrize("content", [{}, {"epoch": 3, "loss": [1.0]}, [1, 2], {"model": {"net": {"lr": 0.1}}}])
def test_no_tensors(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with pytest.raises(WeightsError, match="holds no tensors"):
        load_weights(path)
    empty = tmp_path / "weights.safetensors"
    save_file({}, empty)
    with pytest.raises(WeightsError, match="holds no tensors"):
        load_weights(empty)
