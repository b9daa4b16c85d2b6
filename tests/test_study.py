"""The study: its plan, how it goes on, its findings; and other people's code as it is run."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
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
        if step.words[0] != "harness":
            continue
        command = app.commands[step.words[1]]  # type: ignore[attr-defined]
        params = command.make_context(step.words[1], list(step.words[2:])).params
        given = cli.chosen(params)
        assert ("gpus" if "gpus" in params else "dataset") in given
        if step.words[1] != "run":
            continue
        sweep = plan.make_grid(given)
        plan.check_grid(sweep)
        specs = plan.expand(sweep, width, fingerprint="f", train_images=50_000)
        if tiny:
            assert all(spec.limit_train and spec.precision == "fp32" for spec in specs)
        assert len({spec.key for spec in specs}) == len(specs)


def test_steps_have_names_of_their_own_whatever_the_folders() -> None:
    steps = steps_of(options_of())
    elsewhere = steps_of(options_of(out=Path("other"), data_dir=Path("there")))
    assert len({step.identity for step in steps}) == len(steps)
    assert [step.identity for step in steps] == [step.identity for step in elsewhere]


def test_what_is_missing_is_named_and_everything_else_is_run() -> None:
    bare = options_of(data_dir=None, places_dir=None, peer=[], tiny=True)
    missing = {step.part for step in steps_of(bare) if step.missing}
    assert missing == {"cifar2", "places", "peers"}
    assert all("digits" in step.words for step in steps_of(bare) if not step.missing)


def test_the_last_of_an_option_wins_and_settings_add_up() -> None:
    words = ["--depths", "20", "--set", "lr=1", "--depths", "8", "--set", "pad=0", "--val", "5"]
    assert study.last_wins(words) == ["--set", "lr=1", "--depths", "8", "--set", "pad=0", "--val", "5"]


@pytest.mark.parametrize("option", ["--until=soon", "--until=", "--parts=table,9", "--data-dir=nowhere"])
def test_a_mistake_is_one_line_and_exit_code_2(option: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        study.main(["--tiny", f"--out={tmp_path}", option])
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


# --- how it goes on ---


def test_the_log_decides_what_is_run_again(tmp_path: Path) -> None:
    step, other = study.make_steps("table", options_of())

    def log(*codes: int) -> list[dict[str, Any]]:
        with (tmp_path / "log.jsonl").open("a") as file:
            for code in codes:
                file.write(json.dumps({"step": step.identity, "exit_code": code}) + "\n")
        return study.load_log(tmp_path)

    assert study.state_of(step, log()) == "to do"
    assert study.state_of(step, log(130)) == "stopped"
    assert study.state_of(step, log(1)) == "failed with exit code 1"
    assert study.state_of(step, log(0)) == "done"
    assert study.state_of(other, log()) == "to do"
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": "1 ru')  # killed while it wrote
    assert study.state_of(step, study.load_log(tmp_path)) == "done"


def test_a_search_goes_on_by_its_name(tmp_path: Path) -> None:
    options = options_of(out=tmp_path)
    (fresh,) = study.make_steps("search", options)
    assert "--samples" in fresh.words
    (tmp_path / "search" / "tune" / "msra-20_x").mkdir(parents=True)
    (again,) = study.make_steps("search", options)
    assert again.words == ("harness", "tune", "--resume", "msra-20_x", "--out", str(tmp_path / "search"))
    assert again.identity == fresh.identity


def test_at_the_deadline_a_command_is_stopped_as_by_ctrl_c(tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        textwrap.dedent("""
        import pathlib, time
        try:
            pathlib.Path(__file__).with_name("begun").touch()
            time.sleep(60)
        except KeyboardInterrupt:
            pathlib.Path(__file__).with_name("stored").touch()
    """)
    )
    began = time.monotonic()
    assert study.run_step(study.Step("table", "slow", ("python", str(script))), 2.0) == 130
    assert (tmp_path / "begun").exists()
    assert (tmp_path / "stored").exists()
    assert time.monotonic() - began < 20


def test_a_part_for_real_and_again(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    small = "run --variants msra --depths 8 --seeds 2 | --limit-train 64 --epochs 1"
    other = study.Part(question="Is it skipped?", commands=("eval {places}",))
    monkeypatch.setattr(
        study, "PARTS", {"table": study.Part(question="Does it run?", commands=(small,)), "other": other}
    )
    out = tmp_path / "out"
    words = ["--tiny", "--launcher", "local", "--out", str(out)]
    assert study.main([*words, "--until", "10s"]) == 130  # too little time to begin
    assert study.load_log(out) == []
    assert study.main(words) == 0
    assert [entry["exit_code"] for entry in study.load_log(out)] == [0]
    assert len(list(out.glob("table/*/record.json"))) == 2
    text = (out / "findings.md").read_text()
    assert "## Does it run?\n\ndigits" in text
    assert "| msra" in text
    assert "no --places-dir" in text
    assert "(curves/table/" in text
    assert (out / "report.html").exists()
    capfd.readouterr()
    monkeypatch.setattr(study, "write_findings", lambda _: None)
    assert study.main(words) == 0
    assert len(study.load_log(out)) == 1
    assert study.main([*words, "--dry-run"]) == 0
    assert "[done] harness run" in capfd.readouterr().out


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
    peers.write_cifar10(tmp_path / "data", split, split, tuple("abcdefghij"))
    peer = peers.load_peer(tmp_path)
    assert (peer.name, peer.commit) == ("akamaster", None)
    epochs = peer.epochs(20, tmp_path / "data", "cpu", 4)
    assert [next(epochs).error for _ in range(3)] == [50.0] * 3  # 100 - (40 + its ten images)
    with pytest.raises(peers.PeerError, match=r"ended in epoch 4(.|\n)*theirs broke"):
        next(epochs)


def test_an_unknown_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(peers.PeerError, match=r"is no known checkout: it has none of trainer\.py"):
        peers.load_peer(tmp_path)
