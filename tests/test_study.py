"""The study: its plan, how it goes on, its findings; and other people's code as it is run."""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from harness import cli, plan

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import peers
import study


def options_of(**changes: Any) -> argparse.Namespace:
    whole = {"data_dir": Path("images"), "places_dir": Path("places"), "peer": [Path("a"), Path("b")], "out": Path("out"),
             "tiny": False, "precision": "tf32", "launcher": "ray"}  # fmt: skip
    return argparse.Namespace(**whole | changes)


def steps_of(options: argparse.Namespace) -> list[study.Step]:
    return [step for name in study.PARTS for step in study.make_steps(name, options)]


def run_study(*words: object, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["study.py", *map(str, words)])
    return study.main()


# --- the plan ---


@pytest.mark.parametrize("tiny", [False, True], ids=["whole", "tiny"])
def test_every_command_is_one_that_the_harness_takes(tiny: bool) -> None:
    app = typer.main.get_command(cli.app)
    assert isinstance(app, click.Group) or hasattr(app, "commands")
    width = plan.Allocation(
        device="cpu" if tiny else "cuda", gpus=0 if tiny else 1, workers=1, concurrent_runs=1, threads=2
    )
    for step in steps_of(options_of(tiny=tiny)):
        assert not step.missing
        if step.kind == "peers":
            continue
        command = app.commands[step.kind]  # type: ignore[attr-defined]
        params = command.make_context(step.kind, list(step.words)).params
        given = {name: word for name, word in params.items() if word not in (None, [], ())}
        assert ("gpus" if "gpus" in params else "dataset") in given
        if step.kind != "run":
            continue
        sweep = plan.make_grid(given)
        plan.check_grid(sweep)
        specs = plan.expand(sweep, width, fingerprint="f", train_images=50_000)
        if tiny:
            assert all(spec.limit_train and spec.precision == "fp32" for spec in specs)
        assert len({spec.key for spec in specs}) == len(specs)


def test_what_is_missing_is_named_and_everything_else_is_run() -> None:
    bare = options_of(data_dir=None, places_dir=None, peer=[], tiny=True)
    assert {step.missing for step in steps_of(bare)} == {"", "--data-dir", "--places-dir", "--peer"}
    assert all("digits" in step.words for step in steps_of(bare) if not step.missing)


@pytest.mark.parametrize("option", ["--until=soon", "--until=", "--parts=table,9", "--data-dir=nowhere"])
def test_a_mistake_is_one_line_and_exit_code_2(option: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    assert run_study("--tiny", f"--out={tmp_path}", option, monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err.count("\n") == 1


# --- how it continues ---


def test_a_search_continues_by_its_name(tmp_path: Path) -> None:
    options = options_of(out=tmp_path)
    (fresh,) = study.make_steps("search", options)
    assert "--samples" in fresh.words
    (tmp_path / "search" / "tune" / "msra-20_x").mkdir(parents=True)
    (tmp_path / "search" / "tune" / "msra-20_x" / "sweep.json").touch()
    (again,) = study.make_steps("search", options)
    assert again.words == ["--resume", "msra-20_x", "--out", str(tmp_path / "search")]


def test_a_part_for_real_and_again(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    small = "run --variants msra --depths 8 --seeds {seeds} | --limit-train 64 --epochs 1"
    parts = {
        "table": {"question": "Does it run?", "commands": [small], "each": {"seeds": [2]}},
        "other": {"question": "Is it skipped?", "commands": ["eval --data-dir {places} |"]},
    }
    monkeypatch.setattr(study, "PARTS", parts)
    out = tmp_path / "out"
    words = ["--tiny", "--launcher", "local", "--out", out]
    assert run_study(*words, "--until", "10s", monkeypatch=monkeypatch) == 130  # too little time to begin
    assert not list(out.glob("table/*"))
    assert run_study(*words, monkeypatch=monkeypatch) == 0
    assert len(list(out.glob("table/*/record.json"))) == 2
    text = (out / "findings.md").read_text()
    assert "## Does it run?\n\ndigits" in text
    assert "| msra" in text
    assert "# no --places-dir" in text
    assert "(curves/table/" in text
    assert (out / "report.html").exists()
    capfd.readouterr()
    assert run_study(*words, "--dry-run", monkeypatch=monkeypatch) == 0
    assert "harness run --dataset digits" in capfd.readouterr().out


# --- peers ---

FAKE = """
    import torch, torchvision
    import torchvision.transforms as transforms

    def main():
        images = torchvision.datasets.CIFAR10("anywhere", train=True, transform=transforms.ToTensor(), download=True)
        loader = torch.utils.data.DataLoader(images, batch_size=4, shuffle=True)
        tests = torch.utils.data.DataLoader(images, batch_size=4)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10)).cuda()
        for epoch in range(200):
            for x, y in loader:
                model(x.cuda())
            print("epoch", epoch)
            validate(tests, model, None)
            if epoch == 2:
                raise ValueError("theirs broke")

    def validate(loader, model, criterion):
        return 40.0 + sum(len(x) for x, _ in loader)
"""


def test_a_peer_trains_an_epoch_when_it_is_asked_for(tmp_path: Path) -> None:
    import numpy as np

    from harness.loaders.datasets import Split

    (tmp_path / "trainer.py").write_text(textwrap.dedent(FAKE))
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 255, (10, 32, 32, 3), dtype=np.uint8), np.arange(10))
    (tmp_path / "data").mkdir()
    peers.write_images(tmp_path / "data", split, split, tuple("abcdefghij"))
    peer = peers.load_peer(tmp_path)
    assert peer == ("akamaster", tmp_path, "")
    epochs = peer.epochs(20, tmp_path / "data", "cpu", 4)
    assert [next(epochs)["error"] for _ in range(3)] == [50.0] * 3  # 100 - (40 + its ten images)
    with pytest.raises(peers.PeerError, match=r"ended in epoch 4(.|\n)*theirs broke"):
        next(epochs)


def test_an_unknown_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(peers.PeerError, match=r"is no known checkout: it has none of trainer\.py"):
        peers.load_peer(tmp_path)
