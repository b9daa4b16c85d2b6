"""Precisions one after the other in one process: no reader of torch's flags raises, and nothing is left of the last.

torch has two ways to say TF32, and whoever mixes them makes every reader raise, its own compiler among them.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest

from harness.spec import Precision

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
ROUND: tuple[Precision, ...] = ("fp32", "tf32", "bf16", "fp16", "tf32", "fp32")


def read_flags() -> dict[str, str]:
    """Every flag that says how numbers are multiplied, by its name; what its reader raised, where it does."""
    import torch

    readers = {"torch.get_float32_matmul_precision": torch.get_float32_matmul_precision}
    for path in (
        "cudnn",
        "cudnn.conv",
        "cudnn.rnn",
        "cuda.matmul",
        "mkldnn",
        "mkldnn.matmul",
        "mkldnn.conv",
        "mkldnn.rnn",
    ):
        place: Any = torch.backends
        for name in path.split("."):
            place = getattr(place, name, None)
        for flag in (
            "benchmark", "allow_tf32", "fp32_precision", "allow_bf16_reduced_precision_reduction",
            "allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation", "deterministic", "enabled",
        ):  # fmt: skip
            readers[f"torch.backends.{path}.{flag}"] = lambda place=place, flag=flag: getattr(place, flag)
    readers["torch.are_deterministic_algorithms_enabled"] = torch.are_deterministic_algorithms_enabled
    readers["torch.is_deterministic_algorithms_warn_only_enabled"] = (
        torch.is_deterministic_algorithms_warn_only_enabled
    )
    readers["torch._inductor.config.deterministic"] = lambda: torch._inductor.config.deterministic
    readers["CUBLAS_WORKSPACE_CONFIG"] = lambda: os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    values = {}
    for name, reader in readers.items():
        try:
            values[name] = str(reader())
        except AttributeError:  # not in this torch, or not there
            continue
        except Exception as error:
            values[name] = f"raises {error}"
    return values


def after(*precisions: Precision) -> dict[str, str]:
    """The flags of a process that has set these precisions, in this order. It is forked, so that this one sets none."""
    from harness.training.step import set_precision

    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            for precision in precisions:
                set_precision(precision)
            os.write(writing, json.dumps(read_flags()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        flags: dict[str, str] = json.loads(file.read())
    os.waitpid(child, 0)
    return flags


readers: set[str] = set()


def seems_available() -> bool:
    """torch.cuda.is_available, for whoever goes on to read a flag: nobody else could do anything with a GPU."""
    caller = sys._getframe(1).f_code
    try:
        reads = re.search("tf32|fp32_precision|matmul_precision", inspect.getsource(caller)) is not None
    except (OSError, TypeError):
        return False
    if reads:
        readers.add(caller.co_name)
    return reads


def compile_all() -> None:
    """A small network in each precision, by the compiler that asks for TF32 where there is a GPU that has it."""
    import torch
    from torch import nn

    from harness.training.step import make_autocast, set_precision

    precisions: tuple[Precision, ...] = (
        "tf32",
        "fp32",
        "bf16",
    )  # a compilation of fp16 differs in nothing that is read
    for precision in precisions:
        set_precision(precision)
        torch._dynamo.reset()
        network = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        compiled = torch.compile(network, dynamic=False, fullgraph=True)
        x = torch.ones(2, 4)
        with (
            mock.patch("torch.cuda.is_available", seems_available),
            mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
            mock.patch("torch.cuda.get_rng_state", return_value=torch.get_rng_state()),
            mock.patch("torch.cuda.set_rng_state"),
            torch.no_grad(),
            make_autocast(torch.device("cpu"), precision),
        ):
            found, wanted = compiled(x), network(x)
        assert torch.allclose(found.float(), wanted.float(), rtol=2e-2, atol=1e-2)
    assert readers, "nothing in the compiler reads a flag where there is a GPU"


def run(*words: str) -> Any:
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, *words],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def flags() -> dict[str, dict[str, str]]:
    """By the precisions that were set, joined by spaces."""
    found: dict[str, dict[str, str]] = run("flags")
    return found


@pytest.mark.parametrize("first", PRECISIONS)
@pytest.mark.parametrize("last", PRECISIONS)
def test_nothing_is_left_of_the_precision_before(flags: dict[str, dict[str, str]], first: str, last: str) -> None:
    assert flags[f"{first} {last}"] == flags[last]
    assert flags[f"{' '.join(ROUND)} {last}"] == flags[last]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_flag_can_be_read_and_says_what_was_asked(flags: dict[str, dict[str, str]], precision: str) -> None:
    assert len(flags[precision]) > 8
    assert {name: value for name, value in flags[precision].items() if value.startswith("raises")} == {}
    tf32 = str(precision == "tf32")
    assert flags[precision]["torch.backends.cuda.matmul.allow_tf32"] == tf32
    assert flags[precision]["torch.backends.cudnn.allow_tf32"] == tf32
    assert flags[precision]["torch.get_float32_matmul_precision"] == ("high" if precision == "tf32" else "highest")


DETERMINISTIC = {
    "torch.are_deterministic_algorithms_enabled": "True", "torch.backends.cudnn.deterministic": "True",
    "torch.backends.cudnn.benchmark": "False", "torch._inductor.config.deterministic": "True",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}  # fmt: skip


def test_a_deterministic_run_leaves_nothing_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it ends well or not, and whatever was set before; on a CPU it changes nothing."""
    import torch
    from test_train import spec

    from harness.training.step import deterministic_algorithms

    for own, benchmark in ((None, True), (":16:8", False)):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
        if own is not None:
            monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", own)
        before = read_flags()
        assert {name: before[name] for name in DETERMINISTIC} != DETERMINISTIC
        for changes in ({"device": "cpu", "deterministic": True}, {"device": "cuda"}):
            with deterministic_algorithms(spec(**changes)):
                assert read_flags() == before
        with deterministic_algorithms(spec(device="cuda", deterministic=True)):
            assert read_flags() == before | DETERMINISTIC
        assert read_flags() == before
        with pytest.raises(KeyError), deterministic_algorithms(spec(device="cuda", deterministic=True)):
            raise KeyError
        assert read_flags() == before


def test_a_deterministic_run_is_set_up_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first line of a run on, cuDNN's choice of kernels by their speed included."""
    import torch
    from test_train import spec

    import harness.training.train
    from harness.cluster.job import Worker
    from harness.spec import RunPaths

    seen: list[dict[str, str]] = []

    def stop(self: Any, *_: Any) -> None:
        seen.append(read_flags())
        raise KeyboardInterrupt

    asked = spec(device="cuda", deterministic=True)  # in name alone: the worker's device is the CPU
    monkeypatch.setattr(harness.training.train, "MemoryMeter", stop)
    with pytest.raises(KeyboardInterrupt):
        harness.training.train.train(asked, Worker(threads=1), print, paths=RunPaths(out=tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    harness.training.setup.prepare(asked, Worker(threads=1), RunPaths(out=tmp_path, label="digits")).close()
    seen.append(read_flags())
    assert {name: seen[0][name] for name in DETERMINISTIC} == DETERMINISTIC
    assert seen[1]["torch.backends.cudnn.benchmark"] == "False"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: a CPU's kernels cannot be compiled")
def test_the_compiler_reads_the_flags_in_every_precision() -> None:
    assert run("compile") == "compiled"


def test_each_way_of_the_speed_benchmark_has_its_own_flags_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import rounds
    import speed
    import torch

    seen: dict[str, set[bool]] = {"tf32": set(), "fp32": set()}

    def epochs(precision: str) -> Any:
        while True:
            seen[precision].add(torch.backends.cuda.matmul.allow_tf32)
            yield 1.0

    ways = [speed.Way(name, 20, "eager", name, "resident", epochs(name)) for name in seen]
    turn = partial(speed.Way.take_turn, epochs=2, gpu=speed.open_device(torch.device("cpu")))
    try:
        rounds.take_turns({way.title: partial(turn, way) for way in ways}, 3)
    finally:
        speed.set_precision("fp32")
    assert seen == {"tf32": {True}, "fp32": {False}}
    assert [len(way.seconds) for way in ways] == [3, 3]


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        compile_all()
        print(json.dumps("compiled"))
    else:
        import harness.training.step  # noqa: F401  # once, not in each of the forked processes

        orders = [(last,) for last in PRECISIONS]
        orders += [(first, last) for first in PRECISIONS for last in PRECISIONS]
        orders += [(*ROUND, last) for last in PRECISIONS]
        print(json.dumps({" ".join(order): after(*order) for order in orders}))
