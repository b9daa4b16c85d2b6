"""Nodes that come, are taken away or hang: what a run does then, and that its numbers are those of a quiet cluster."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_recovery import ROOT, train_plainly

from harness.results.store import load_epochs, load_records
from harness.results.values import EpochMetrics

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(600)]
NOTICED_SECONDS = 60  # by a busy machine
FIGURES = ("epoch", "loss", "train_error", "error", "eval_loss")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[EpochMetrics]:
    out = tmp_path_factory.mktemp("undisturbed") / "runs"
    train_plainly(out, 2)
    (partial,) = out.glob("*.partial")
    return load_epochs(partial)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What leaving_nodes.py left and printed."""
    out = tmp_path_factory.mktemp("left")
    script = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "leaving_nodes.py"), str(out)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=560, check=True,
    )  # fmt: skip
    return out, json.loads(script.stdout.splitlines()[-1])


def contents(epochs: list[EpochMetrics]) -> list[list[Any]]:
    return [[getattr(row, name) for name in FIGURES] for row in epochs]


def find(left: tuple[Path, dict[str, Any]], name: str) -> tuple[Any, Any, str]:
    out, answer = left[0] / name, left[1][name]
    text = "\n".join(answer["lines"])
    assert answer["code"] == 0, text
    (stored,) = load_records([out]).records
    assert answer["noticed_seconds"] < NOTICED_SECONDS, text
    return stored, answer, text


def test_a_drained_node_is_left_at_a_step(
    left: tuple[Path, dict[str, Any]], undisturbed: list[EpochMetrics]
) -> None:
    """Twice: the second time while the run recovers from the first."""
    stored, answer, text = find(left, "drained")
    assert text.count("a worker had to leave: stopped before") >= 1, text
    epochs = load_epochs(stored.folder)
    assert contents(epochs) == contents(undisturbed)
    reasons = [attempt["reason"] for attempt in stored.record.environment["attempts"]]
    assert "died" not in reasons[1]
    assert not set(answer["hit"]) & set(answer["on"])
    assert {row.images for row in epochs} == {row.images for row in undisturbed}


def test_a_sweep_leaves_drained_and_lost_nodes_and_its_trials_are_the_same(
    left: tuple[Path, dict[str, Any]],
) -> None:
    text = "\n".join(left[1]["sweep"]["lines"])
    assert text.count("trial 1: a worker had to leave: stopped before") == 1, text
    assert "trial 2: a worker process died (killed, or its node was lost); trying again (2)" in text
    swept, quiet = (
        json.loads(next((left[0] / name).glob("tune/*/trials.json")).read_text())["trials"]
        for name in ("sweep", "quiet")
    )
    for one, other in zip(swept, quiet, strict=True):
        for what in ("number", "fields", "state", "epochs", "key", "curve", "value"):
            assert one[what] == other[what], what
        disturbed, undisturbed = (
            contents(load_epochs(left[0] / name / one["run"])) for name in ("sweep", "quiet")
        )
        assert disturbed == undisturbed
        assert disturbed[-1][0] == one["epochs"]


def test_a_rank_that_hangs_is_named_and_its_node_left(
    left: tuple[Path, dict[str, Any]], undisturbed: list[EpochMetrics]
) -> None:
    stored, answer, text = find(left, "stopped")
    found = re.search(
        r"no step for 10 s: rank (\d) \(\S+, cpu\) does not answer; the others wait in \w+; stacks in (\S+);", text
    )
    assert found, text
    assert contents(load_epochs(stored.folder)) == contents(undisturbed)
    (stacks,) = (stored.folder / "stacks").iterdir()
    assert stacks.name == f"attempt-1-rank-{1 - int(found[1])}.txt"
    assert "in train\n" in stacks.read_text()
    assert found[0] in f"{stored.record.environment['attempts'][1]['reason']};"
    assert not set(answer["hit"]) & set(answer["on"]), "tried again elsewhere, and the stopped process was ended"


def test_a_frozen_raylet_is_a_lost_node(
    left: tuple[Path, dict[str, Any]], undisturbed: list[EpochMetrics]
) -> None:
    stored, answer, _ = find(left, "frozen")
    assert contents(load_epochs(stored.folder)) == contents(undisturbed)
    assert not set(answer["hit"]) & set(answer["on"])


def test_a_run_begins_narrow_and_grows_when_an_epoch_ends(
    left: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    stored, answer, text = find(left, "grows")
    assert "starting" in text
    found = re.search(r"room for more workers: stopped before epoch (\d+); trying again \(2\)", text)
    assert found, text
    assert len(answer["on"]) == 2
    assert stored.record.result.widths == (1, 2)
    epochs, first = load_epochs(stored.folder), int(found[1])
    assert [row.workers for row in epochs] == [1] * (first - 1) + [None] * (len(epochs) - first + 1)
    plain = tmp_path / "plain"
    train_plainly(plain, 1, first - 1)
    train_plainly(plain, 2)
    (partial,) = plain.glob("*.partial")
    assert contents(epochs) == contents(load_epochs(partial))
