"""The study: its plan, what it goes on with, its findings, and one small part for real."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from records import make_record

from harness import cli, plan
from harness.results.store import Stored, finish
from harness.search_space import parse_settings

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import findings
import peers
import study

WHOLE = study.Setting(out=Path("out"), images=Path("images"), places=Path("places"), peers=(Path("a"), Path("b")))


def steps_of(setting: study.Setting) -> list[study.Step]:
    return [step for part in study.PARTS for step in study.make_steps(part, setting)]


# --- the plan ---


@pytest.mark.parametrize("tiny", [False, True], ids=["whole", "tiny"])
def test_every_command_is_one_that_the_harness_takes(tiny: bool) -> None:
    app = typer.main.get_command(cli.app)
    assert isinstance(app, click.Group) or hasattr(app, "commands")
    width = plan.Allocation(
        device="cpu" if tiny else "cuda", gpus=0 if tiny else 1, workers=1, concurrent_runs=1, threads=2
    )
    for step in steps_of(replace(WHOLE, tiny=tiny)):
        assert not step.missing
        if step.words[0] != "harness":
            continue
        command = app.commands[step.words[1]]  # type: ignore[attr-defined]
        given = command.make_context(step.words[1], list(step.words[2:])).params
        assert given["gpus" if "gpus" in given else "dataset"] is not None
        if step.words[1] != "run":
            continue
        sweep = plan.Grid(
            variants=plan.parse_words(given["variants"], "--variants"),
            depths=plan.parse_depths(given["depths"]) if given["depths"] else (),
            seeds=plan.parse_seeds(given["seeds"]), dataset=given["dataset"], loader=given["loader"],
            precision=given["precision"], epochs=given["epochs"], val=given["val"], limit_train=given["limit_train"],
            settings=parse_settings(given["settings"] or ()),
        )  # fmt: skip
        plan.check_grid(sweep)
        specs = plan.expand(sweep, width, fingerprint="f", train_images=50_000)
        if tiny:
            assert all(spec.limit_train and spec.precision == "fp32" for spec in specs)
        # with another part's folder a run would be trained twice; within one the harness sees to it
        assert len({spec.key for spec in specs}) == len(specs)


def test_steps_have_names_of_their_own_whatever_the_folders() -> None:
    steps = steps_of(WHOLE)
    elsewhere = steps_of(replace(WHOLE, out=Path("other"), images=Path("there")))
    assert len({(step.part.number, step.identity) for step in steps}) == len(steps)
    assert [step.identity for step in steps] == [step.identity for step in elsewhere]


def test_what_is_missing_is_said_and_everything_else_is_run() -> None:
    bare = study.Setting(out=Path("out"), tiny=True)
    missing = {step.part.name for step in steps_of(bare) if step.missing}
    assert missing == {"cifar2", "places", "peers"}
    assert all("digits" in step.words for step in steps_of(bare) if not step.missing)


def test_merge_replaces_values_and_adds_settings() -> None:
    words = ["run", "--depths", "20", "--set", "lr=1"]
    assert study.merge(words, ["--depths", "8", "--set", "pad=0", "--val", "5"]) == [
        *["run", "--depths", "8", "--set", "lr=1"],
        *["--set", "pad=0", "--val", "5"],
    ]


@pytest.mark.parametrize(("text", "seconds"), [("9m", 540), ("1h30m", 5400), ("90s", 90), ("90", 90)])
def test_a_time_is_read(text: str, seconds: float) -> None:
    assert study.parse_seconds(text) == seconds


@pytest.mark.parametrize("option", ["--until=soon", "--until=", "--parts=1,9", "--data-dir=nowhere"])
def test_a_mistake_is_one_line_and_exit_code_2(option: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        study.main(["--tiny", option])
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


# --- what it goes on with ---


def test_the_log_decides_what_is_run_again(tmp_path: Path) -> None:
    step, other = study.make_steps(study.PARTS[0], WHOLE)

    def log(*codes: int) -> list[dict[str, Any]]:
        for code in codes:
            study._note(tmp_path, step, study.datetime.now(study.UTC), 1.0, code)
        return study.load_log(tmp_path)

    assert study.state_of(step, log()) == "to do"
    assert study.state_of(step, log(130)) == "goes on"
    assert study.state_of(step, log(1)) == "again, after exit code 1"
    assert study.state_of(step, log(0)) == "done"
    assert study.state_of(other, log()) == "to do"
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": "1 ru')  # killed while it wrote
    assert study.state_of(step, study.load_log(tmp_path)) == "done"


def test_a_sweep_goes_on_by_its_name(tmp_path: Path) -> None:
    part = study.PARTS[7]
    setting = study.Setting(out=tmp_path, images=Path("images"))
    (fresh,) = study.make_steps(part, setting)
    assert "--samples" in fresh.words
    sweep = setting.folder(part) / "tune" / "msra-20_x"
    sweep.mkdir(parents=True)
    (sweep / "sweep.json").write_text("{}")
    (again,) = study.make_steps(part, setting)
    assert again.words[:4] == ("harness", "tune", "--resume", "msra-20_x")
    assert again.identity == fresh.identity
    (sweep / "trials.json").write_text("{}")
    (done,) = study.make_steps(part, setting)
    assert study.state_of(again, []) == "to do"
    assert study.state_of(done, []) == "done"  # though the command was stopped after its end, say


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
    step = study.Step(part=study.PARTS[0], identity="slow", words=("python", str(script)))
    began = time.monotonic()
    assert study.run_step(step, began + 2) == 130
    assert (tmp_path / "begun").exists()
    assert (tmp_path / "stored").exists()
    assert time.monotonic() - began < 20


def test_a_part_for_real_and_again(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    small = study.Command(
        words="run --variants msra --depths 8 --seeds 2 {images}", tiny="--limit-train 64 --epochs 1"
    )
    part = study.Part(number=1, name="table", question="Does it run?", commands=(small,))
    monkeypatch.setattr(study, "PARTS", (part,))
    words = ["--tiny", "--launcher", "local", "--parts", "1", "--out", str(tmp_path / "out")]
    assert study.main([*words, "--until", "10"]) == 130  # too little time to begin
    assert study.load_log(tmp_path / "out") == []
    assert study.main(words) == 0
    record = tmp_path / "out/record"
    assert [entry["exit_code"] for entry in study.load_log(tmp_path / "out")] == [0]
    assert len(list(record.glob("runs/1-table/*/record.json"))) == 2
    assert not list(record.rglob("*.safetensors"))
    assert "msra" in (record / "tables/1-table.md").read_text()
    text = (record / "findings.md").read_text()
    assert "A trial of the study itself" in text
    assert text.count("Not run.") == 14  # seven of eight questions, each twice
    assert "Not all of it" not in text
    capfd.readouterr()
    assert study.main(words) == 0
    assert len(study.load_log(tmp_path / "out")) == 1
    assert study.main([*words, "--dry-run"]) == 0
    assert "[done] harness run" in capfd.readouterr().out


# --- findings ---


def keep(record: Path, part: str, *errors: float, **fields: Any) -> None:
    """Store runs of seeds 0, 1, ... with these errors."""
    folder = record / "runs" / part
    folder.mkdir(parents=True, exist_ok=True)
    for seed, error in enumerate(errors):
        run = make_record(seed, error, **fields)
        finish(folder, run.model_copy(update={"dataset": "cifar10-q75", "original": False}))


def test_findings_say_which_way_and_how_sure(tmp_path: Path) -> None:
    keep(tmp_path, "1-table", 8.3, 8.4, 8.5, depths=(20,), seconds=0.22)
    keep(tmp_path, "1-table", 6.1, depths=(110,), seconds=1.2)
    keep(tmp_path, "2-depth", 8.7, 8.8, variants=("he2015",), depths=(20,))
    keep(tmp_path, "2-depth", 8.6, 9.1, variants=("he2015",), depths=(110,))
    findings.write_findings(tmp_path, [])
    text = (tmp_path / "findings.md").read_text()
    assert "50 times fewer than in 2016 on a GeForce GTX TITAN X" in text
    assert "msra: from 20 to 110 layers the error falls, by −2.30 [−2.80, −1.80] points" in text
    assert "he2015: from 20 to 110 layers the error cannot be told to fall or rise, by +0.10" in text
    assert "never with published errors" in text
    assert "8.29" not in text  # the 2016 table's error
    assert "**Not run.**" in text


def test_single_runs_conclude_nothing() -> None:
    moved = findings.shift(findings.Sample(1, 8.0), findings.Sample(1, 6.0))
    assert moved.sign == 0
    assert "no interval" in str(moved)


def test_the_ladder_is_told_step_by_step(tmp_path: Path) -> None:
    for name, errors in (
        ("xresnet", (8.2, 8.3, 8.25)),
        ("mxresnet", (7.7, 7.8, 7.75)),
        ("se-mxresnet", (7.7, 7.9, 7.6)),
    ):
        keep(tmp_path, "3-ladder", *errors, variants=(name,), depths=(20,))
    found = findings.answer_ladder(tmp_path, [])
    assert found
    assert found.verdict == "Steps that help: mxresnet; that cannot be told from no change: se-mxresnet."


def test_loaders_are_set_against_the_bound(tmp_path: Path) -> None:
    for loader, seconds, error in (("synthetic", 1.0, 90.0), ("dali", 1.1, 8.0), ("resident", 1.02, 8.01)):
        keep(tmp_path, "6-loaders", error, error + 0.01, error - 0.01, loader=loader, seconds=seconds)
    found = findings.answer_loaders(tmp_path, [])
    assert found
    assert "resident 1.02, dali 1.10." in found.verdict
    assert "dali and resident equal within ±0.2 points" in found.verdict
    assert "90.00" not in found.details[0]
    keep(tmp_path, "6-loaders", 8.0, 8.01, 7.99, loader="dataloader", seconds=9.0)
    again = findings.answer_loaders(tmp_path, [])
    assert again
    assert "dali and dataloader the same in every run, seed by seed" in again.verdict


def test_a_peer_stands_beside_the_runs_of_its_network(tmp_path: Path) -> None:
    keep(tmp_path, "7-peers", 30.0, 31.0, 32.0, variants=("he2015",), seconds=0.5)
    peer = {"peer": "akamaster", "commit": "d5489e8995e8", "compares_error": True, "depth": 20, "dataset": "cifar10-q75",
            "fingerprint": "f" * 64, "limit_train": None, "limit_test": None,
            "epoch_seconds": 4.0, "asked_epochs": 10, "epochs": [{"error": 33.0}]}  # fmt: skip
    (tmp_path / "runs/7-peers/akamaster-20.json").write_text(json.dumps(peer))
    found = findings.answer_peers(tmp_path, [])
    assert found
    assert found.verdict == "Seconds per epoch: akamaster-20: 8.0 times ours (after 1 epoch)."
    (tmp_path / "runs/7-peers/akamaster-20.json").write_text(json.dumps(peer | {"limit_train": 128}))
    other = findings.answer_peers(tmp_path, [])
    assert other
    assert other.verdict == "No run of ours to compare with."


def test_errors_are_compared_with_peers_only_at_the_same_lr() -> None:
    def row(**fields: Any) -> findings.Row:
        (found,) = findings.summarise([Stored(make_record(0, 9.0, variants=("he2015",), **fields), Path())])
        return found

    assert findings._same_lr(row(depths=(20,), epochs=10, settings=("milestones=64000",)))
    assert not findings._same_lr(row(depths=(20,), epochs=10))
    assert not findings._same_lr(row(depths=(110,), epochs=10, settings=("milestones=64000",)))


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
    with pytest.raises(peers.PeerError, match=r"is no checkout that is known here: it has none of trainer\.py"):
        peers.load_peer(tmp_path)
