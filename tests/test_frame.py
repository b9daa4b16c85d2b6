"""harness.load: stored runs in a notebook."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from records import make_epoch, make_record

import harness
from harness.results.store import finish
from harness.results.values import Failure
from harness.spec import UserError


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for depth in (20, 32):
        for seed in (0, 1):
            epochs = tuple(make_epoch(k, error=9.0 - k) for k in (1, 2, 3))
            error, result = 8.0 + seed - depth / 100, {"epochs": epochs}
            finish(tmp_path, make_record(seed, error, depths=(depth,), settings=("lr=0.05",), result=result))
    finish(tmp_path, make_record(2, 0.0, failure=Failure(kind="OOM", message="no room")))
    return tmp_path


def test_one_line_a_run(runs: Path) -> None:
    frame = harness.load(runs)
    assert len(frame) == 5
    done = frame[frame.status == "done"]
    means = done.groupby("depth")["final_error"].mean()
    assert means.to_dict() == pytest.approx({20: 8.3, 32: 8.18})
    assert set(done["recipe.lr"]) == {0.05}
    assert set(done["rss_mib"]) == {900.0}
    assert done["torch_allocated_mib"].isna().all()
    assert set(done["device"]) == {"NVIDIA H200"}
    (failed,) = frame[frame.status == "failed"].itertuples()
    assert failed.failure == "OOM: no room"
    assert failed.final_error != failed.final_error


def test_one_line_an_epoch(runs: Path) -> None:
    frame = harness.load(str(runs), epochs=True)
    assert len(frame) == 4 * 3
    last = frame.sort_values("epoch").groupby(["depth", "seed"]).error.last()
    assert set(last) == {6.0}
    assert {"name", "loader", "recipe.lr", "train_seconds"} <= set(frame.columns)


def test_it_complains_and_stays_light(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder of results"):
        harness.load(tmp_path / "nowhere")
    code = "import harness, sys; sys.exit('pandas' in sys.modules or 'torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=False).returncode == 0
    )
