"""Where a step's time goes: the parts add up, and all of them are there."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command import harness
from test_train import spec

from harness.cluster.job import Worker
from harness.commands.probe import PARTS, StepClock, break_down
from harness.spec import RunPaths


def test_a_part_lasts_from_the_mark_before_it() -> None:
    clock = StepClock(torch.device("cpu"))
    for _ in range(3):
        for name, seconds in (("data", 0.0), ("forward", 0.02), ("backward", 0.0), ("optimizer", 0.0)):
            time.sleep(seconds)
            clock.mark(name)
    parts = clock.read()
    assert {name: len(took) for name, took in parts.items()} == {name: 2 for name in PARTS if name != "all-reduce"}
    assert min(parts["forward"]) >= 20
    assert max(parts["data"]) < min(parts["forward"])


def test_parts_of_a_real_step(tmp_path: Path) -> None:
    found = break_down(spec(), Worker(threads=1), print, paths=RunPaths(out=tmp_path, label="digits"))
    assert list(found.parts) == ["data", "forward", "backward", "optimizer"]
    assert found.parts["backward"] > found.parts["optimizer"]
    assert sum(found.parts.values()) == pytest.approx(found.eager_ms)
    assert found.engine_ms > 0
    assert list(tmp_path.iterdir()) == []


def test_the_table_and_its_mistakes(tmp_path: Path, capsys: Any) -> None:
    line = (
        f"run --dataset digits --depths 8 --limit-train 300 --gpus 0 --loader resident --profile --out {tmp_path}"
    )
    code, out, err = harness(line, capsys)
    assert (code, err) == (0, "")
    header = next(row for row in out.splitlines() if row.startswith("run"))
    assert header.split() == ["run", "width", "data", "forward", "backward", "optimizer", "sum", "eager"]
    assert "he2015-8" in out
    steps = re.search(r"means over the middle half of (\d+) steps", " ".join(out.split()))
    assert steps, out
    assert int(steps[1]) < 30, "an epoch has fewer"
    code, _, err = harness(f"{line} --estimate", capsys)
    assert (code, "--estimate and --profile cannot be combined" in err) == (2, True)
