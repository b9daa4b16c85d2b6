"""Today's outward behaviour, in golden files: keys, plans, reports, searches, help texts and mistakes.

UPDATE_GOLDEN=1 python -m pytest tests/test_golden.py writes the files anew: then read the difference before it is
committed. What depends on the machine or the day is made equal, nothing else. Names inside the packages stand in the
first part alone, so that a move or a new name of theirs is followed there and leaves the golden files as they are.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from chromium import Browser, find_chromium
from command import harness

GOLDEN = Path(__file__).parent / "golden"
RECORDS = GOLDEN.parents[1] / "results" / "records"
SAMPLE = RECORDS / "sample_digits_cpu_2026-11-22" / "runs"
SWEEP = RECORDS / "sweep_cifar10-q75_cpu_2026-11-22" / "runs"
COMMANDS = ("run", "tune", "report", "compare", "verify", "why", "export", "repro", "variants", "eval", "check")


# --- the names inside the packages ---


def make_run(case: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A case in the command line's words -> the key of its run, and the run as its record has it."""
    from harness import plan
    from harness.search_space import parse_settings

    case = {"dataset": "cifar10", "device": "cuda", "workers": 1, "seed": 0, "fingerprint": "f" * 64} | case
    own = ("variant", "depth", "seed", "device", "workers", "fingerprint", "set", "key")
    sweep = plan.Grid(
        variants=(case["variant"],),
        depths=(case["depth"],) if "depth" in case else (),
        seeds=(case["seed"],),
        settings=parse_settings(case.get("set", ())),
        **{name: value for name, value in case.items() if name not in own},
    )
    gpus = case["workers"] if case["device"] == "cuda" else 0
    width = plan.Allocation(
        device=case["device"], gpus=gpus, workers=case["workers"], concurrent_runs=1, threads=1
    )
    (spec,) = plan.expand(sweep, width, fingerprint=case["fingerprint"], train_images=50_000)
    return spec.key, spec.to_json()


def search_without_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `harness tune` start nothing: trials learn as a formula says, and take their turns epoch by epoch."""
    from records import make_epoch, make_result

    import harness.cluster.search
    import harness.resources
    from harness.cluster.job import Started
    from harness.results.values import EpochMetrics, RunResult

    def error(spec: Any, epoch: int) -> float:
        recipe = spec.recipe
        distance = abs(math.log10(recipe.lr / 0.05)) + (spec.network.shortcut == "A") / 4 + recipe.momentum / 10
        return round(5 + 10 * distance + 40 / epoch, 3)

    def search(_: Any, study: Any, job: Any) -> None:
        running: list[tuple[str, Any, list[EpochMetrics]]] = []
        while True:
            while len(running) < job.concurrent_runs and (proposed := study.propose()) is not None:
                running.append((*proposed, []))
                study.reported(proposed[0], Started(attempt=1))
            if not running:
                return
            for trial in list(running):
                name, spec, epochs = trial
                k = len(epochs) + 1
                epochs.append(
                    make_epoch(
                        k, steps=1, images=128, loss=1 / k, error=error(spec, k), lr=spec.recipe.lr, train_seconds=2.0,
                        data_stall_seconds=0.0, eval_seconds=0.5, images_per_second=64.0, timed=k > 1,
                    )
                )  # fmt: skip
                stop = study.reported(name, epochs[-1])
                if stop or k == spec.recipe.duration:
                    running.remove(trial)
                    study.ended(name, None if stop else result(epochs))

    def result(epochs: list[EpochMetrics]) -> RunResult:
        last = epochs[-1].error
        return make_result(
            last, 2.0, parameters=1, evaluated_on="val", epochs=tuple(epochs), best_error=last, best_epoch=len(epochs),
            test_error=last + 1, images_per_second=64.0, setup_seconds=1.0, train_seconds=2.0 * len(epochs), threads=1,
            device="a CPU",
        )  # fmt: skip

    monkeypatch.setattr(harness.cluster.search, "search", search)
    monkeypatch.setattr(harness.resources, "join_cluster", lambda *_, **__: None)


def load_frame(*paths: str, epochs: bool = False) -> Any:
    """Stored runs in a notebook."""
    import harness

    return harness.load(*paths, epochs=epochs)


# --- the same on every machine and every day ---


@pytest.fixture(autouse=True)
def _same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two CPU cores, no GPU, 140 columns without colours, in a folder of its own."""
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """The stored sample, as ./runs: the tests' own copy."""
    return shutil.copytree(SAMPLE, tmp_path / "runs")


def normalise(text: str) -> str:
    """Without paths of this machine, today's date and what pytest was started by; stored runs keep their dates."""
    text = text.replace(str(Path.cwd()), "<tmp>").replace(str(GOLDEN.parents[1]), "<repository>")
    text = re.sub(r"made \d{4}-\d\d-\d\d \d\d:\d\d UTC", "made <date> UTC", text)
    return re.sub(r"Usage: python -m \S*harness\b", "Usage: harness", text)


def transcribe(lines: list[str], capsys: Any) -> str:
    """What a terminal would show, and the exit codes."""
    shown = []
    for line in lines:
        code, out, err = harness(line, capsys)
        complaints = "".join(f"! {text}\n" for text in err.splitlines())
        shown.append(f"$ harness {line}\n{out}{complaints}[exit code {code}]\n")
    return normalise("\n".join(shown))


def check(name: str, text: str) -> None:
    """Compare with a golden file, or write it where UPDATE_GOLDEN is set."""
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
        return
    before = path.read_bytes().decode()
    if text != before:
        difference = difflib.unified_diff(
            before.splitlines(), text.splitlines(), f"golden/{name}", "now", lineterm="", n=2
        )
        pytest.fail(f"{name} is not as it was:\n" + "\n".join(difference), pytrace=False)


def check_made_with(package: str, name: str, text: str) -> None:
    """`check` for what another package has a part in: a skip where there is another version of it."""
    first = f"(with {package} {'.'.join(version(package).split('.')[:2])})\n"
    if not os.environ.get("UPDATE_GOLDEN"):
        with (GOLDEN / name).open(encoding="utf-8") as file:
            if (stored := file.readline()) != first:
                pytest.skip(f"{name} was written {stored.strip()}, here it would be {first.strip()}")
    check(name, first + text)


# --- keys ---


def test_keys() -> None:
    """Runs that were stored under these keys must be found again."""
    cases = json.loads((GOLDEN / "keys.json").read_text())
    assert len(cases) >= 40
    lines = [json.dumps(case | {"key": make_run(case)[0]}) for case in cases]
    check("keys.json", "[\n" + ",\n".join(lines) + "\n]\n")


def test_runs_as_records_have_them() -> None:
    """Every field: a key leaves out those at their default, so another default would leave the key as it is."""
    cases = json.loads((GOLDEN / "keys.json").read_text())
    own = [case for case in cases if set(case) <= {"variant", "depth", "key"}]
    mixed = [
        {"variant": "he2015", "depth": 110, "epochs": 10},
        {"variant": "msra", "device": "cpu", "workers": 2, "set": ["lr=0.05", "crop=28"], "limit_train": 512, "val": 64},
        {"variant": "se-mxresnext-16x2d-reflect", "precision": "bf16", "engine": "compile", "seed": 3},
    ]  # fmt: skip
    lines = [json.dumps(make_run(case)[1]) for case in own + mixed]
    check("specs.json", "[\n" + ",\n".join(lines) + "\n]\n")


# --- plans ---

STORED = "--spec runs/digits_msra-8_s0_e0eab236/record.json --spec runs/digits_msra-14_s0_64526d58/record.json"
PLANS = [
    f"{STORED} --seeds 4 --gpus 0 --out runs",
    f"{STORED} --seeds 4 --gpus 0 --out runs --force",
    "--variants msra --depths 8,14 --seeds 2 --epochs 10 --gpus 0 --loader resident --out runs --workers 2",
    "--variants he2015,msra,xresnext-16x2d --val 100 --epochs 9 --gpus 0",
    "--variants msra,fattorib --depths 20,56 --seeds 0,7 --loader synthetic --gpus 0 --val 100",
    "--variants msra --depths 20 --seeds 7, --set lr=0.05 --set shortcut=identity-conv --set batch-size=64 --gpus 0",
    "--depths 20 --limit-train 500 --limit-test 100 --batch-size 50 --epochs 3 --precision bf16 --engine compile --gpus 0",
    "--depths 20 --seeds 2 --epochs 9 --until-ci 0.5 --gpus 0",
]


def test_plans(runs: Path, capsys: Any) -> None:
    """The sample's own runs are done, one goes on."""
    shutil.copytree(runs / "digits_msra-14_s2_e6319222", runs / "digits_msra-8_s3_ccab4912.partial")
    check("plans.txt", transcribe([f"run --dataset digits --dry-run {words}" for words in PLANS], capsys))


def test_plans_for_gpus(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import pynvml

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for name, value in {"nvmlInit": None, "nvmlDeviceGetCount": 4, "nvmlShutdown": None}.items():
        monkeypatch.setattr(pynvml, name, lambda value=value: value)
    lines = [
        "--depths 20,32 --variants msra --seeds 2",
        "--depths 20 --variants msra --runs-per-gpu 2 --seeds 3 --precision bf16",
        "--depths 20 --variants msra --gpus 2 --workers 2 --elastic 1 --engine eager --precision fp16",
        "--depths 20 --gpus 4 --workers 3",
        "--depths 20 --gpus 5",
        "--depths 20 --gpus 4 --workers 4 --elastic 5",
        "--depths 20 --gpus 4 --workers 4 --set batch_size=66",
    ]
    check("plans_gpus.txt", transcribe([f"run --dataset digits --dry-run {words}" for words in lines], capsys))


# --- stored runs ---


@pytest.mark.parametrize("format", ["table", "markdown", "csv", "json", "latex"])
def test_reports(format: str, runs: Path, capsys: Any) -> None:
    code, out, err = harness(f"report runs --format {format}", capsys)
    assert (code, err) == (0, "")
    check(f"sample.{format}", normalise(out))


def test_reports_of_other_rows_and_columns(runs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "report runs --sort -error",
        "report runs --columns variant,depth,loader,error,epoch_seconds --format markdown",
        "report runs --across loader",
        "report runs/digits_msra-8_s0_dd58573b --format csv",
        "report runs --output table.txt",
        "export runs",
        "export runs",
    ]
    text = transcribe(lines, capsys)
    monkeypatch.setenv("COLUMNS", "70")
    text += "\n" + transcribe(["report runs", "compare runs --by loader"], capsys)
    check("reports.txt", text)


@pytest.mark.parametrize(("name", "stored"), [("sample", SAMPLE), ("sweep", SWEEP)])
def test_charts(name: str, stored: Path, tmp_path: Path, capsys: Any) -> None:
    """Their files and titles: where labels stand is the fonts' business."""
    shutil.copytree(stored, tmp_path / "runs")
    text = transcribe(["report runs --curves charts --output table.txt"], capsys)
    for path in sorted(Path("charts").glob("*.svg")):
        groups = re.findall(r"role-(?:axis-)?title.*?</g>", path.read_text(), re.DOTALL)
        titles = [title for group in groups for title in re.findall(r"<text[^>]*>([^<]+)</text>", group)]
        text += f"\n{path}\n" + "".join(f"  {title}\n" for title in titles)
    check(f"charts_{name}.txt", text)


def test_comparisons(runs: Path, capsys: Any) -> None:
    lines = [
        f"compare runs --by {by} --format {format}"
        for by in ("loader", "network.depth")
        for format in ("table", "markdown", "json")
    ]
    lines += [
        "compare runs runs",
        "compare runs --by loader --across network.depth --fail-on 'error>+0.3,epoch_seconds>5%'",
        "compare runs --by network.depth --fail-on 'epoch_seconds>5%' --format markdown",
    ]
    check("compare.txt", transcribe(lines, capsys))


def test_why_and_repro(runs: Path, capsys: Any) -> None:
    lines = ["why msra-14 runs", "why 1 runs", "repro 60ec4a49 runs", "repro runs/digits_msra-8_s0_dd58573b"]
    check("why.txt", transcribe(lines, capsys))


def test_frames(runs: Path) -> None:
    """Their columns; dtypes in words that hold for every version of pandas."""
    text = ""
    for epochs in (False, True):
        frame = load_frame("runs", epochs=epochs)
        text += f"epochs={epochs}: {len(frame)} lines\n"
        for name, dtype in frame.dtypes.items():
            kind = (
                "object" if str(dtype) in ("object", "str", "string") else re.sub(r"\[[mun]?s, ", "[", str(dtype))
            )
            text += f"  {name}  {kind}\n"
    check("frames.txt", text)


def test_variants(capsys: Any) -> None:
    check("variants.txt", transcribe(["variants"], capsys))


# --- searches ---

SEARCHES = {
    "random": "--search 'lr=loguniform(0.001,1)' --search 'momentum=uniform(0.5,0.99)' "
    "--search 'shortcut=choice(A,identity-conv)' --samples 9 --concurrent 2",
    "grid": "--search 'lr=grid(0.01,0.1,1)' --search 'shortcut=grid(A,identity-conv)' --search 'nesterov=choice(true,false)' "
    "--samples 2 --scheduler median --concurrent 1 --seed 3",
    "depths": "--search 'depth=choice(8,14,20)' --search 'batch_size=randint(16,64)' --samples 4 --scheduler none "
    "--metric loss --val 0",
    "tpe": "--search 'lr=loguniform(0.001,1)' --search 'shortcut=choice(A,identity-conv)' --samples 12 "
    "--search-algorithm tpe --scheduler hyperband --concurrent 1",
}


@pytest.mark.parametrize("name", SEARCHES)
def test_searches(name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """What is proposed, who is stopped, what is printed and kept; trials learn by a formula."""
    search_without_training(monkeypatch)
    text = transcribe(
        [f"tune --dataset digits --limit-train 128 --epochs 9 --gpus 0 --loader resident {SEARCHES[name]}"], capsys
    )
    for kept in ("trials.json", "winner.json"):
        for path in Path("runs").glob(f"tune/*/{kept}"):
            stored = json.dumps(json.loads(path.read_text())) + "\n"
            text += f"\n{kept}:\n{normalise(stored)}"
    text = re.sub(r"_\d{8}-\d{6}\b", "_<time>", text)  # in the name of the sweep
    check_made_with("optuna", f"tune_{name}.txt", text)


def test_a_stored_search(tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(SWEEP, tmp_path / "runs")
    check(
        "sweep.txt",
        transcribe(["report runs", "report runs --format markdown --sort error", "why 2 runs"], capsys),
    )


# --- pages ---

READ = """(() => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  return new Promise((done) => setTimeout(() => {
    const charts = [...document.querySelectorAll(".chart")].map((chart) => chart.dataset.chart + ": " +
      [...chart.querySelectorAll("svg .role-axis-title text, svg .role-title text")].map((t) => t.textContent).join(", "));
    for (const svg of document.querySelectorAll("svg")) svg.remove();  // where labels stand is the fonts' business
    done(document.title + "\\n\\n" + document.body.innerText + "\\n\\ncharts:\\n" + charts.join("\\n") + "\\n");
  }, 200));
})()"""


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed")
@pytest.mark.parametrize(("name", "stored"), [("sample", SAMPLE), ("sweep", SWEEP)])
def test_pages(name: str, stored: Path, tmp_path: Path, capsys: Any) -> None:
    """Their visible text, as a browser has it with everything unfolded."""
    shutil.copytree(stored, tmp_path / "runs")
    code, out, err = harness("report runs --format html --output page.html", capsys)
    assert (code, out, err) == (0, "", "")
    with Browser() as browser:
        browser.open(tmp_path / "page.html")
        text = browser.ask(READ)
        assert browser.complaints == []
    check(f"page_{name}.txt", normalise(text))


# --- words ---


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Typer lays them out: another version of it may do so otherwise."""
    monkeypatch.setenv("COLUMNS", "100")
    lines = ["--help", *(f"{command} --help" for command in COMMANDS), ""]
    check_made_with("typer", "help.txt", transcribe(lines, capsys))


MISTAKES = """\
run --variants he2051
run --variants msra --depths 21
run --variants xresnext-16x2d --depths 21
run --variants xresnet --gpus 0
run --variants miniplaces --depths 20
run --depths 20,,32
run --seeds none
run --seeds 0
run --loader dalli
run --precision fp8
run --precision fp16 --gpus 0
run --engine graph --gpus 0
run --engine graff
run --gpus 3
run --gpus 0 --workers 3
run --gpus 0 --workers 2 --batch-size 65
run --gpus 0 --batch-size 0
run --batch-size 64 --set batch_size=32
run --set lrr=0.1
run --set lr=fast
run --set depth=20
run --set epochs=3
run --set val=3
run --set lr=1 --set lr=2
run --set shortcut=B
run --set nesterov=maybe
run --limit-train 5000 --gpus 0
run --val 1437 --gpus 0
run --epochs many
run --dephts 20
run --gpus two
run --until-ci 0,5
run --epochs
run msra
run --until tomorrow --gpus 0
run --until 9 --gpus 0
run --until-ci -1
run --max-seeds 3
run --elastic 3 --workers 2 --gpus 0
run --elastic 0 --workers 2 --gpus 0
run --runs-per-gpu 2 --workers 2
run --runs-per-gpu 2 --gpus 0
run --spec nowhere.json
run --spec file
run --spec runs/digits_msra-8_s0_dd58573b/record.json --variants msra
run --spec runs/digits_msra-8_s0_dd58573b/record.json --engine graph
run --launcher slurm
run --launcher local --workers 2
run --placement near
run --address nonsense
run --format xml
run --dry-run --estimate
run --checkpoint-every 0
run --out file/runs --gpus 0
run --data-dir nowhere --dataset cifar10
run --dataset cifar
run --dataset empty --gpus 0
run --lr 0.1
run --dataset folder:nowhere --gpus 0
tune
tune --search lr
tune --search 'lrr=uniform(0,1)'
tune --search 'lr=normal(0,1)'
tune --search 'lr=uniform(1,0)'
tune --search 'lr=uniform(0,1)' --search 'lr=grid(1,2)'
tune --search 'milestones=choice(1,2)'
tune --search 'lr=grid(1,2)' --search-algorithm tpe
tune --search 'lr=uniform(0,1)' --scheduler asah
tune --search 'lr=uniform(0,1)' --metric accuracy
tune --search 'lr=uniform(0,1)' --metric top5_error --gpus 0
tune --search 'lr=uniform(0,1)' --runs-per-gpu 2 --gpus 0
tune --search 'lr=uniform(0,1)' --resume nothing
tune --search 'depth=choice(8,21)'
report missing
report empty
report file
report runs --curves file
report runs --format html --output empty
report runs --format xml
report runs --sort eror
report runs --columns variant,nothing
report runs --across nothing
report runs --output file/table.txt
compare runs
compare runs missing
compare runs --by lr
compare runs --by nothing
compare runs --by seed
compare runs --by loader --format csv
compare runs --by loader --fail-on error
compare runs --by loader --fail-on 'eror>1'
compare
why msra-20 runs
why 9 runs
why msra-8 missing
why msra-8 empty
why
rpeort runs
compare empty empty
repro 00000000 runs
repro digits_msra-8_s0_dd58573 runs
export runs --to excel
export missing
eval --weights missing.safetensors --variant msra --dataset digits
eval --weights missing.safetensors --variant mrsa --dataset digits
eval --variant msra
eval --weights file --variant msra --scales 96,x
eval --weights file --variant msra --mean 1,2
eval --weights file --variant msra --dataset digits
check --nothing
nothing
"""


def test_mistakes(runs: Path, capsys: Any) -> None:
    """One line each, and exit code 2."""
    Path("file").write_text("")
    Path("empty").mkdir()
    lines = []
    for line in MISTAKES.splitlines():
        digits = line.startswith(("run", "tune")) and "--dataset" not in line
        lines.append(f"{line} --dataset digits" if digits else line)
    check("mistakes.txt", transcribe(lines, capsys))
