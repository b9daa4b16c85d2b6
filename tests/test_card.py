"""Model cards: what stands beside the weights of a run, and that what it says to do works."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command import harness

from harness.loaders.datasets import load_dataset
from harness.loaders.sampling import make_normalize
from harness.results.metrics import METRICS
from harness.results.report.page import CARD, make_card
from harness.results.store import load_records
from harness.spec import RunSpec

ROOT = Path(__file__).resolve().parents[1]
STORED = load_records([path.parent for path in sorted((ROOT / "results/records").rglob("record.json"))]).records


def test_every_stored_run_has_a_card_with_its_figures() -> None:
    done = [stored.record for stored in STORED if stored.record.result]
    assert len(done) > 30
    for record in done:
        card = make_card(record, about="A sentence.", classes=10)
        assert card.startswith(
            f'---\nlibrary_name: resnet-harness\npipeline_tag: image-classification\ndatasets: ["{record.dataset}"]\n---\n'
        )
        rows = [line.split(" | ")[1] for line in card.splitlines() if line.startswith("| ") and "---" not in line][
            1:
        ]
        known = [m for m in METRICS.values() if m.value(record.result) is not None]
        assert rows == [m.text(m.value(record.result)) for m in known]
        assert ("cannot be compared" in card) == (not record.original)
        assert f"lr = {record.spec['recipe']['lr']}" in card
    with pytest.raises(ValueError, match="no result"):
        make_card(done[0].model_copy(update={"result": None}))


def test_a_card_says_that_no_epoch_was_undisturbed() -> None:
    done = [stored.record for stored in STORED if stored.record.result]
    disturbed = [record for record in done if record.result and record.result.all_disturbed]
    assert 0 < len(disturbed) < len(done)
    for record in done:
        said = "No epoch was undisturbed (other processes used the CPU" in make_card(record)
        assert said == (record in disturbed)


def test_the_front_matter_is_yaml_whatever_the_data_set_is_called() -> None:
    (record, _) = next(stored for stored in STORED if stored.record.result)
    for name in ("[a]: {b} # c", "- 'x'", "été\n---\nevil: yes", "no"):
        card = make_card(record.model_copy(update={"dataset": name, "depth": 0}))
        front = yaml.safe_load(card.split("---\n")[1])
        assert front["datasets"] == [name]
        assert f"\n# {record.variant} on " in card


def test_the_card_of_a_run_loads_its_weights_and_trains_it_again(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    line = "--dataset digits --variants msra --depths 8 --epochs 2 --batch-size 64 --gpus 0 --loader resident"
    assert harness(f"run {line} --limit-train 256 --out {tmp_path}", capsys)[0] == 0
    ((record, folder),) = [(stored.record, stored.folder) for stored in load_records([tmp_path]).records]
    card = (folder / CARD).read_text()
    assert "180 epochs" not in card
    assert "Changed here: epochs=2" in card
    assert ("MFU over" in card) == (
        record.result.mfu.value is not None
    )  # none beside a peak that was measured on a busy CPU
    monkeypatch.chdir(folder)
    commands = [row.strip() for row in card.splitlines() if row.startswith("    harness ")]
    assert [words.split()[1] for words in commands] == ["eval", "run"]
    code, out, _ = harness(commands[0].removeprefix("harness "), capsys)
    assert code == 0
    assert f"{record.result.final_error:.2f}" in out
    program = "\n".join(
        row.removeprefix("    ") for row in card.partition("In Python")[2].partition("## ")[0].splitlines()[2:]
    )
    names: dict[str, Any] = {}
    exec(program, names)
    images = load_dataset("digits")
    spec = RunSpec.from_json(json.loads((folder / "record.json").read_text())["spec"])
    normalize = make_normalize(
        spec.recipe.normalize, type(images.train)(images.train.images[:256], images.train.labels[:256])
    )
    pixels = (
        torch.from_numpy((images.test.images / 255 - normalize.mean) / normalize.std).float().permute(0, 3, 1, 2)
    )
    assert names["network"](pixels).shape == (len(images.test), 10)
    code, *_ = harness(commands[1].removeprefix("harness "), capsys)
    assert code == 0
    (again,) = load_records([Path("repro")]).records
    assert again.record.key == record.key
    assert again.record.result.final_error == record.result.final_error
    assert harness(f"verify {tmp_path}", capsys)[0] == 0
    assert not os.path.exists(tmp_path / CARD)  # noqa: PTH110
