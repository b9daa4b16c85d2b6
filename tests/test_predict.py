"""The prediction of cluster/SCALING.md: its model, and that the page shows what the script prints."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def predict() -> Any:
    spec = spec_from_file_location("predict", ROOT / "benchmarks" / "predict.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["predict"] = module
    spec.loader.exec_module(module)
    return module


def test_an_all_reduce_costs_its_rounds_and_its_bytes(predict: Any) -> None:
    network = predict.Network(
        launch_seconds=1.0, hop_seconds=10.0, node_bytes_per_second=100.0, bytes_per_second=50.0
    )
    assert network.seconds(1, 800) == 0
    assert network.seconds(2, 800) == pytest.approx(1 + 800 / 100)
    assert network.seconds(8, 800) == pytest.approx(1 + 2 * 7 / 8 * 8)
    assert network.seconds(16, 800) == pytest.approx(1 + 14 + 2 * 10 + 2 * 1 / 2 * 100 / 50)
    assert network.seconds(64, 800) == pytest.approx(1 + 14 + 6 * 10 + 2 * 7 / 8 * 100 / 50)


def test_a_step_is_bound_by_its_kernels_or_by_its_images(predict: Any) -> None:
    free = predict.Network(launch_seconds=0.0, hop_seconds=0.0, node_bytes_per_second=1e30, bytes_per_second=1e30)
    step = predict.Step(name="", fixed_seconds={20: 0.032}, image_seconds={20: 0.001})
    assert predict.epoch_seconds(step, free, 20, 1, 128) == pytest.approx(391 * 0.128)
    assert predict.epoch_seconds(step, free, 20, 2, 128) == pytest.approx(391 * 0.064)
    assert predict.epoch_seconds(step, free, 20, 64, 128) == pytest.approx(391 * 0.032)
    assert predict.last_useful(step, free, 20, 128) == 4
    assert predict.epoch_seconds(step, free, 20, 512, 128) is None, "fewer images than GPUs"
    assert predict.epoch_seconds(step, free, 20, 512, 512 * 128) is None, "more images than there are"


def test_the_page_shows_what_the_script_prints(
    predict: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["predict.py"])
    assert predict.main() == 0
    page = (ROOT / "cluster" / "SCALING.md").read_text()
    assert capsys.readouterr().out.strip() in page
    command = next(line for line in page.splitlines() if "predict.py --fixed-ms" in line)
    monkeypatch.setattr(sys, "argv", command.split()[2:])
    assert predict.main() == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| 20 |"))
    assert line in page
    assert "Predicted, not measured" in page
