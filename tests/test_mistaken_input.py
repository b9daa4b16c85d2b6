"""Mistaken input is one line that says what is wrong, the value given and what is allowed; exit code 2."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from command import harness
from PIL import Image
from safetensors.torch import load_file

from harness import plugins, resources
from harness.cluster.job import Allocation
from harness.options import Grid
from harness.plan import expand

ONE = Allocation(device="cpu", workers=1, concurrent_runs=1, threads=2)
SAMPLE = Path(__file__).parents[1] / "results/records/sample_digits_cpu_2026-11-22/runs"
HERE = "run --dataset digits --gpus 0 --dry-run"


def refusal(line: str, capsys: Any) -> str:
    """The one line."""
    code, _, err = harness(line, capsys)
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("harness: error: ")
    return err.removeprefix("harness: error: ").removesuffix("\n")


@pytest.fixture(autouse=True)
def _an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HARNESS_OUT", raising=False)


# --- a record of another machine, a file that is not there ---


def write_spec(**changes: Any) -> None:
    (spec,) = expand(Grid(dataset="digits"), ONE, fingerprint="", train_images=1437)
    Path("spec.json").write_text(
        json.dumps(replace(spec, **{"device": "cuda", "engine": "graph"} | changes).to_json())
    )


@pytest.mark.parametrize(
    ("have", "changes", "words", "says"),
    [
        (0, {}, "", "this machine has no GPU: --gpus 0 --engine eager trains them on the CPU"),
        (0, {"engine": "eager"}, "", "this machine has no GPU: --gpus 0 trains them on the CPU"),
        (0, {"precision": "tf32", "workers": 4}, "",
         "this machine has no GPU: --gpus 0 --workers 1 --engine eager --precision fp32 trains them on the CPU"),
        (2, {"workers": 4}, "", "this machine has 2 GPUs: --workers 2 trains them on those"),
        (0, {}, "--engine eager", "this machine has no GPU: --gpus 0 trains them on the CPU"),
    ],
)  # fmt: skip
def test_a_run_of_gpus_that_are_not_here(
    have: int, changes: dict[str, Any], words: str, says: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "count_gpus", lambda: have)
    monkeypatch.setattr(resources, "count_cpus", lambda: 2)
    write_spec(**changes)
    of = f"--spec: these runs need GPUs ({changes.get('workers', 1)} each); "
    assert refusal(f"run --spec spec.json --dry-run {words}", capsys) == of + says


def test_the_advice_for_a_run_of_gpus_works(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "count_gpus", lambda: 0)
    write_spec(precision="tf32", workers=4)
    advice = refusal("run --spec spec.json --dry-run", capsys).partition("GPU: ")[2].partition(" trains")[0]
    code, out, err = harness(f"run --spec spec.json --dry-run {advice}", capsys)
    assert (code, err) == (0, ""), err
    assert "he2015" in out


def test_an_engine_that_needs_a_gpu_and_was_not_typed(capsys: Any) -> None:
    write_spec()
    says = "engine graph needs a GPU; the CPU supports --engine eager and compile"
    assert refusal("run --spec spec.json --gpus 0 --dry-run", capsys) == says


def test_a_plugin_that_is_not_there_is_no_option_that_was_not_typed(capsys: Any) -> None:
    assert refusal("check nofile.py", capsys) == "plug-in nofile.py: no such file"
    assert refusal(f"{HERE} --plugin nofile.py", capsys) == f"plug-in {Path.cwd()}/nofile.py: no such file"
    Path("text.txt").write_text("")
    assert refusal("check text.txt", capsys) == "plug-in text.txt: a Python file is needed"


# --- images of different sizes ---


def test_all_that_a_recipe_lacks_for_images_of_different_sizes_is_said_at_once(capsys: Any) -> None:
    for split in ("train", "test"):
        for name in ("a", "b"):
            Path("photos", split, name).mkdir(parents=True)
            for n in range(4):
                Image.new("RGB", (50 + n, 40 + n)).save(Path("photos", split, name, f"{n}.png"))
    line = "run --dataset folder:photos --gpus 0 --dry-run --epochs 1 --batch-size 4"
    of = "he2015-20 on photos: images of 50x40 to 53x43 pixels, which are cut one by one, need "
    assert refusal(line, capsys) == of + "pad=0, crop=32, resize=36, normalize=imagenet"
    assert refusal(f"{line} --set pad=0 --set crop=32", capsys) == of + "resize=36, normalize=imagenet"
    words = refusal(line, capsys).partition("need ")[2].split(", ")
    code, out, err = harness(" ".join([line, *(f"--set {word}" for word in words)]), capsys)
    assert (code, err) == (0, ""), err
    assert "he2015" in out


# --- tables and folders of results ---


def test_an_unknown_ending_of_a_table_is_refused(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(SAMPLE, "runs")
    known = "(allowed: .csv, .json, .md, .tex, .html, .txt)"
    for name, says in {"x.pdf": "'.pdf' is unknown", "t.CVS": "'.cvs' is unknown; did you mean .csv?"}.items():
        of = f"--output {name} without --format: ending {says} {known}"
        assert refusal(f"report runs --output {name}", capsys) == of
        assert not Path(name).exists()
    for line in ("--output t.txt", "--output t", "--output -", "--output t.MD", "--output x.pdf --format csv"):
        assert harness(f"report runs {line}", capsys)[0] == 0, line
    assert Path("x.pdf").read_text().startswith("schema_version,variant,")


def test_runs_that_cannot_be_read_are_not_no_runs(capsys: Any) -> None:
    Path("runs/digits_msra-8_s0_00000000").mkdir(parents=True)
    Path("runs/digits_msra-8_s0_00000000/record.json").write_text("{")
    code, _, err = harness("report runs", capsys)
    skipped, error = err.splitlines()
    assert (code, skipped.startswith("harness: skipped: ")) == (2, True)
    assert error == "harness: error: no run in 'runs' can be read"


# --- plug-ins that fail their checks ---


def test_a_check_that_fails_is_code_1_and_a_file_that_is_no_plugin_code_2(capsys: Any) -> None:
    Path("bad.py").write_text(
        "from harness import plugin\n\n\n@plugin.optimizer\ndef still(groups, lr):\n    raise ValueError('never')\n"
    )
    code, out, err = harness("check bad.py", capsys)
    plugins.unload("bad")
    assert (code, out.splitlines()[-1], err) == (1, "1 of the checks failed", "")
    Path("empty.py").write_text("")
    assert "it registers nothing" in refusal("check empty.py", capsys)


# --- grid files ---


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[runs]]\nbogus = 3", "g.toml:2: [[runs]]: option 'bogus' is unknown"),
        ("[[runs]]\ngpu = 3", "g.toml:2: [[runs]]: option 'gpu' is unknown"),
        ("[[runs]]\ngpus = 3", "g.toml:2: gpus holds for all runs: it stands above the first [[runs]]"),
        ("[[runs]]\nseed = 3", "g.toml:2: [[runs]]: option 'seed' is unknown; did you mean seeds?"),
        ("bogus = 3", "g.toml:1: option 'bogus' is unknown; did you mean gpus?"),
        ('epochs = "two"', "g.toml:1: epochs 'two': expected a whole number"),
        ('until-ci = "x"', "g.toml:1: until_ci 'x': expected a number"),
        ('force = "maybe"', "g.toml:1: force 'maybe': expected true or false"),
        ("out = 3", "g.toml:1: out 3: expected text"),
        ("variants = [3]", "g.toml:1: variants [3]: expected text"),
    ],
)
def test_a_grid_file_suggests_what_may_stand_there(text: str, says: str, capsys: Any) -> None:
    Path("g.toml").write_text(text)
    said = refusal("run g.toml --dry-run", capsys)
    assert said.partition(" (allowed: ")[0] == says
    assert " gpus" not in said.partition(" (allowed: ")[2]


def test_a_record_is_no_grid_file(capsys: Any) -> None:
    write_spec()
    says = (
        "grid file spec.json is to be TOML (--spec is for a run's record): Invalid statement (at line 1, column 1)"
    )
    assert refusal("run spec.json", capsys) == says


# --- variants, depths, functions ---


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("run --variants resent", "variant 'resent' is unknown; did you mean xresnet? (see `harness variants`)"),
        ("run --variants msra,imagenet --depths 18", "msra: depth 18 is not 6n+2: try 14 or 20"),
        ("run --variants convnet --depths 14", "convnet: depth 14 is not allowed (allowed: 8)"),
        ("run --variants msra,imagenet --depths 20", "imagenet: depth 20 is not allowed (allowed: 18, 34, 50, 101, 152)"),
        ("run --depths 9..13", "--depths '9..13': no number from 9 to 13 is allowed: he2015: depth 13 is not 6n+2: try 8 or 14"),
        ("run --variants resent --depths 8..14",
         "--depths '8..14': no number from 8 to 14 is allowed: variant 'resent' is unknown; did you mean xresnet? "
         "(see `harness variants`)"),
        ("run --until-ci 0.3 --max-seeds 3", "--max-seeds 3: at least 5 is required"),
    ],
)  # fmt: skip
def test_words_that_are_not_allowed(line: str, says: str, capsys: Any) -> None:
    assert refusal(f"{line} --dataset digits --gpus 0 --dry-run", capsys) == says


# --- settings ---


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("run --set milestones=1,x",
         "--set 'milestones=1,x': milestones is a list of non-negative numbers, separated by commas, not '1,x'"),
        ("run --set lr", "--set 'lr': expected FIELD=VALUE, as in lr=0.05"),
        ("run --set lr=", "--set 'lr=': lr is a non-negative number, not ''"),
        ("run --set momentum=2", "momentum=2: 0 to 1 is allowed"),
        ("tune --search 'momentum=choice(0.9,1.5)'", "momentum=1.5: 0 to 1 is allowed"),
        ("run --set momentum=0.8 --set optimizer=adamw",
         "--set momentum: a field of optimizer sgd; the optimizer here is adamw"),
        ("tune --search 'momentum=uniform(0,1)' --set optimizer=adamw",
         "--search momentum: a field of optimizer sgd; the optimizer here is adamw"),
        ("tune --search 'lr=uniform(0.1,1)' --set gamma=0.5 --set schedule=cosine",
         "--set gamma: a field of schedule multistep; the schedule here is cosine"),
        ("run --set beta1=0.5", "--set beta1: a field of optimizer adamw; the optimizer here is sgd"),
    ],
)  # fmt: skip
def test_settings_that_are_not_allowed(line: str, says: str, capsys: Any) -> None:
    said = refusal(f"{line} --dataset digits --gpus 0 --loader resident --epochs 2 --dry-run", capsys)
    assert said.removeprefix("he2015-20 on digits: ") == says


def test_a_batch_above_the_training_set(capsys: Any) -> None:
    """A recipe's own batch may be: a small set, or a part of one, is then one batch."""
    line = f"{HERE} --epochs 2 --loader resident"
    says = "batch_size=100000: digits has 1437 training images"
    for words in ("--batch-size 100000", "--set batch_size=100000"):
        assert refusal(f"{line} {words}", capsys) == says
    for words in ("--batch-size 1437", "--limit-train 64", "--limit-train 64 --batch-size 256"):
        assert harness(f"{line} {words}", capsys)[0] == 0, words


# --- weights ---


def test_weights_are_evaluated_on_what_they_were_trained_on(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "run --dataset digits --gpus 0 --loader resident --depths 8 --epochs 1 --limit-train 64 --limit-test 32"
    assert harness(line, capsys)[0] == 0
    (weights,) = Path("runs").glob("*/weights.safetensors")
    code, out, err = harness(f"eval --weights {weights}", capsys)
    assert (code, err, out) == (0, "", harness(f"eval --weights {weights} --dataset digits", capsys)[1])
    assert out.startswith("he2015-8 on digits, test set, 360 images")
    torch.save(load_file(weights), "foreign.pt")
    monkeypatch.setenv("HARNESS_CACHE", str(Path.cwd()))

    def unreachable(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", unreachable)
    says = "cifar10 cannot be downloaded (<urlopen error no network>): --data-dir names a folder that has it; "
    says += "--dataset digits needs no network"
    assert refusal("eval --weights foreign.pt --variant he2015 --depth 8", capsys) == says
