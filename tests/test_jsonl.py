"""`harness run --format jsonl`: every event of a run in the store's words; jsonl-convnet: that seed's own keys."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

from command import harness
from records import make_epoch
from test_estimate import make_specs
from test_table import make_measured

from harness.cluster.job import Failed, Started
from harness.progress import ConvnetLines, JsonLines
from harness.results.store import load_epochs, load_records
from harness.results.values import EpochMetrics

RUN = (
    "run --dataset digits --variants msra --depths 8 --epochs 2 --limit-train 64 --limit-test 32 --batch-size 32 "
)
RUN += "--loader resident --gpus 0 --launcher local"


def read(text: str) -> list[dict[str, Any]]:
    """Each line, by a parser that takes no NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def lines_of(kind: type[JsonLines]) -> list[dict[str, Any]]:
    """A run that goes on after epoch 4, is tried again, diverges; and another that ends well."""
    file = io.StringIO()
    first, second = make_specs(device="cpu", workers=2, seeds=(0, 1), depths=(20,))
    lines = kind(file, {first.key: 9, second.key: 9})
    lines.event(first, Started(attempt=1))
    lines.event(first, [make_epoch(k, train_seconds=2.0) for k in range(1, 5)])
    lines.event(first, make_epoch(5, train_seconds=2.0, error=12.5, loss=math.nan))
    lines.event(first, Started(attempt=2, reason="a worker died", world_size=1))
    lines.event(first, Failed(exception="E", message="loss is not finite", traceback="", died=False, attempts=2))
    lines.event(second, Started(attempt=1))
    lines.event(second, [])
    lines.event(second, make_measured(8.5))
    return read(file.getvalue())


def test_every_event_of_a_run() -> None:
    start, resumed, epoch, again, failed, second, done = lines_of(JsonLines)
    assert (start["event"], start["epochs"], start["workers"], start["attempt"]) == ("start", 9, 2, 1)
    assert "reason" not in start
    assert (resumed["event"], resumed["after_epoch"]) == ("resumed", 4)
    assert (epoch["event"], epoch["epoch"], epoch["error"], epoch["train_seconds"]) == ("epoch", 5, 12.5, 2.0)
    assert epoch["loss"] is None
    assert set(EpochMetrics.model_fields) <= set(epoch)
    assert (again["event"], again["reason"], again["workers"]) == ("start", "a worker died", 1)
    assert (failed["event"], failed["message"], failed["attempts"]) == ("failed", "loss is not finite", 2)
    assert (second["event"], second["seed"]) == ("start", 1)
    assert (done["event"], done["final_error"], done["epoch_seconds"]) == ("done", 8.5, 4.5)
    assert len({(line["variant"], line["depth"]) for line in (start, epoch, failed, done)}) == 1
    assert start["key"] == failed["key"] != done["key"]


def test_the_convnets_own_keys() -> None:
    epoch, failed = lines_of(ConvnetLines)
    assert (epoch["epoch"], epoch["test_acc"], epoch["time"]) == (4, 0.875, 10.0)
    assert failed["failed"] == "loss is not finite"


def test_a_command_prints_what_it_stores(tmp_path: Path, capsys: Any) -> None:
    code, out, _ = harness(f"{RUN} --out {tmp_path} --format jsonl", capsys)
    start, *epochs, done = read(out)
    (stored,) = load_records([tmp_path]).records
    assert code == 0
    assert (start["event"], start["epochs"], done["event"]) == ("start", 2, "done")
    assert [line["epoch"] for line in epochs] == [1, 2]
    for line, kept in zip(epochs, load_epochs(stored.folder), strict=True):
        assert kept.model_dump(mode="json").items() <= line.items()
    assert stored.record.result is not None
    assert done["final_error"] == stored.record.result.final_error == epochs[-1]["error"]
    assert {line["key"] for line in (start, *epochs, done)} == {stored.record.key}


def test_what_a_preset_demands_holds_in_every_format(tmp_path: Path, capsys: Any) -> None:
    """Of other images it is not judged, which counts as not met."""
    line = "run --preset convnet --dataset digits --epochs 1 --limit-train 64 --limit-test 32 --batch-size 32 --val 0 "
    line += f"--loader resident --gpus 0 --launcher local --out {tmp_path} --format"
    code, out, _ = harness(f"{line} jsonl-convnet", capsys)
    assert (code, len(read(out))) == (1, 1)
    assert (tmp_path / "report.html").is_file()
    assert harness(f"{line} table", capsys)[0] == 1
