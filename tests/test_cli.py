"""The command as a person uses it: exit codes, tables, reruns, stops, mistakes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from command import harness
from processes import Command

from harness.cluster.connect import ClusterError
from harness.results.store import load_epochs, load_records

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "results" / "records" / "sample_digits_cpu_2026-11-22" / "runs"
QUICK = "--dataset digits --depths 8 --limit-train 128 --epochs 2 --gpus 0 --loader resident"


def only_record(out: Path) -> Any:
    (stored,) = load_records([out]).records
    return stored


def test_a_warning_is_one_line(tmp_path: Path) -> None:
    (cache := tmp_path / "cache").touch()
    line = f"run --dataset digits --depths 8 --epochs 1 --gpus 0 --dry-run --out {tmp_path}/runs"
    err = subprocess.run(
        [sys.executable, "-m", "harness.cli", *line.split()], env={**os.environ, "HARNESS_CACHE": str(cache)},
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stderr  # fmt: skip
    assert err.startswith(f"harness: warning: {cache}: the cache cannot be written (")
    assert err.count("\n") == 1


def test_run_report_rerun_force(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"run {QUICK} --launcher local --seeds 2 --out {tmp_path}/runs"
    code, out, err = harness(line, capsys)
    assert (code, err) == (0, "")
    assert "he2015-8 seed 1: epoch 2/2" in out
    records = load_records([tmp_path / "runs"]).records
    assert sorted(stored.record.seed for stored in records) == [0, 1]
    record = records[0].record
    assert record.environment["command"][0] == "harness"
    assert record.spec["limit_train"] == 128
    assert record.dataset == "digits"
    assert {path.name for path in records[0].folder.iterdir()} >= {
        "record.json",
        "epochs.jsonl",
        "weights.safetensors",
    }
    assert len(load_epochs(records[0].folder)) == 2

    code, again, _ = harness(line, capsys)
    assert code == 0
    assert "all 2 runs were done already" in again
    assert "epoch 1/2" not in again

    respec = f"run --spec {records[1].folder}/record.json --launcher local"
    code, again, _ = harness(f"{respec} --out {tmp_path}/runs", capsys)
    assert (code, "this run was done already" in again) == (0, True), "the same key"
    code, plan, _ = harness(f"{respec} --seeds 5,6 --epochs 3 --dry-run", capsys)
    rows = [row.split() for row in plan.splitlines() if row.startswith("he2015")]
    assert [row[2] for row in rows] == ["5", "6"]
    assert "epochs 3, batch" in plan

    for format in ("markdown", "csv", "json", "table"):
        code, text, _ = harness(f"report {tmp_path}/runs --format {format}", capsys)
        assert code == 0
        assert "he2015" in text
    assert json.loads(harness(f"report {tmp_path}/runs --format json", capsys)[1])

    code, out, _ = harness(line.replace("--seeds 2", "--seeds 1") + " --force", capsys)
    assert (code, "epoch 1/2" in out) == (0, True)
    assert len(list((tmp_path / "runs" / ".superseded").iterdir())) == 1

    # as cluster/slurm.sh does: of a requeued job, what it has trained itself by --force is done
    monkeypatch.setenv("HARNESS_FORCE_SINCE", f"{time.time() - 3600:.0f}")
    code, out, _ = harness(line + " --force", capsys)
    assert (code, "epoch 1/2" in out, "all 2 runs were done already" in out) == (0, False, True)
    monkeypatch.setenv("HARNESS_FORCE_SINCE", f"{time.time() + 1:.0f}")
    code, out, _ = harness(line.replace("--seeds 2", "--seeds 1") + " --force", capsys)
    assert (code, "epoch 1/2" in out) == (0, True)

    monkeypatch.setenv("HARNESS_FORCE_SINCE", "noon")
    code, _, err = harness(f"run {QUICK} --dry-run --out {tmp_path}", capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert "HARNESS_FORCE_SINCE, in seconds since 1970: could not convert string to float: 'noon'" in err
    monkeypatch.delenv("HARNESS_FORCE_SINCE")
    assert harness(line.replace("--seeds 2", "--seeds 5"), capsys)[0] == 0
    code, out, _ = harness(line + " --force --until-ci 60", capsys)  # which reads what is known beforehand
    assert (code, all(f"seed {n}: epoch 2/2" in out for n in range(5))) == (0, True)


def test_each_record_is_read_once_a_command(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    records = ROOT / "results" / "records" / "sample_digits_cpu_2026-11-22" / "runs"
    stored = shutil.copytree(records, tmp_path / "runs")
    read: Counter[str] = Counter()
    bytes_of = Path.read_bytes

    def count(path: Path) -> bytes:
        if path.name == "record.json":
            read[path.parent.name] += 1
        return bytes_of(path)

    spec = tmp_path / "spec.json"  # of the recipe that msra had
    spec.write_text(
        json.dumps(json.loads((stored / "digits_msra-8_s0_dd58573b" / "record.json").read_text())["spec"])
    )
    monkeypatch.setattr(Path, "read_bytes", count)
    code, out, _ = harness(f"run --spec {spec} --seeds 2 --gpus 0 --out {stored}", capsys)
    assert (code, "all 2 runs were done already" in out) == (0, True)
    assert read == dict.fromkeys((path.parent.name for path in stored.glob("*/record.json")), 1)
    assert "msra-8" in (stored / "report.html").read_text()


def test_a_full_disk_is_one_line_and_the_other_runs_go_on(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.results import store

    write, full = store.write_atomic, [True]

    def fill(path: Path, content: str | bytes) -> None:
        if path.name == "record.json" and full and full.pop():
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(store, "write_atomic", fill)
    line = f"run {QUICK} --launcher local --seeds 2 --out {tmp_path}/runs"
    code, out, err = harness(line, capsys)
    assert (code, err) == (1, "")
    said = [text for text in out.splitlines() if "No space left on device" in text]
    assert len(said) == 1
    assert said[0].startswith("he2015-8 seed 0 is not stored: ")
    assert "the same command goes on" in said[0]
    assert [stored.record.seed for stored in load_records([tmp_path / "runs"]).records] == [1]
    code, out, _ = harness(line, capsys)
    assert (code, "seed 0: epoch" in out) == (0, False), "nothing is trained again"

    full.append(True)
    monkeypatch.setattr("harness.plan.check_out", lambda out: fill(out / "record.json", ""))
    code, _, err = harness(line, capsys)
    assert (code, err.count("\n"), "record.json: No space left on device" in err) == (1, 1, True)


def test_a_folder_removed_while_a_run_trains_is_no_traceback(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is trained after that is stored, or a line says why not."""
    from harness.progress import Progress

    event = Progress.event

    def remove_in_epoch_2(self: Progress, spec: Any, what: Any) -> None:
        event(self, spec, what)
        if getattr(what, "epoch", None) == 2:
            shutil.rmtree(tmp_path / "runs", ignore_errors=True)

    monkeypatch.setattr(Progress, "event", remove_in_epoch_2)
    line = f"run {QUICK.replace('--epochs 2', '--epochs 4').replace('128', '64')} --launcher local --out {tmp_path}/runs"
    _, out, err = harness(line, capsys)
    stored = load_records([tmp_path / "runs"]).records if (tmp_path / "runs").exists() else []
    assert "Traceback" not in out + err
    assert [one.record.status for one in stored] == ["done"] or "not stored" in out, out + err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_a_sign_shows_a_question_mark(encoding: str, tmp_path: Path) -> None:
    stored = ROOT / "results" / "records" / "sample_digits_cpu_2026-11-22" / "runs"
    done = subprocess.run(
        [sys.executable, "-m", "harness.cli", "report", str(stored)],
        cwd=ROOT, capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"?" in done.stdout


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("list", 2, "Did you mean 'variants'?"), ("benchmark", 2, "'run'?"), ("help", 2, "'--help'?"),
        ("reprot", 2, "'report'"), ("--version", 0, "resnet-harness 0"), ("-h", 0, "Usage: harness"),
        ("why -h", 0, "Usage: harness why"), ("", 2, "Usage: harness"),
        ("eval --weights /etc/hostname", 2, "not a checkpoint that torch can read"),
        ("eval --weights nosuch.pt", 2, "nosuch.pt: no such file"),
        ("tune --dataset digits", 2, "--search 'lr=loguniform(0.01,1)'"),
    ],
)  # fmt: skip
def test_words_that_people_try(line: str, code: int, says: str, capsys: Any) -> None:
    done, out, err = harness(line, capsys)
    assert done == code
    assert says in (out + err)


def test_the_package_is_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "harness", "--version"], cwd=ROOT, capture_output=True, check=True
    )
    assert done.stdout.startswith(b"resnet-harness ")


def test_weights_name_their_variant_and_a_row_its_data_set(tmp_path: Path, capsys: Any) -> None:
    """`eval` takes variant and depth from the weights; `why` asks which where a name is on two data sets."""
    line = f"run {QUICK} --out {tmp_path}/runs".replace("--epochs 2", "--epochs 1")
    assert harness(line, capsys)[0] == 0
    stored = only_record(tmp_path / "runs")
    assert stored.record.environment["launcher"] == "local", "of one run with one worker"
    code, out, err = harness(f"eval --weights {stored.folder}/weights.safetensors --dataset digits", capsys)
    assert (code, err, "he2015-8" in out) == (0, "", True)

    other = shutil.copytree(stored.folder, tmp_path / "runs" / "other")
    record = json.loads((other / "record.json").read_text())
    record |= {"dataset": "miniplaces", "key": "0" * 16, "spec": record["spec"] | {"dataset": "miniplaces"}}
    (other / "record.json").write_text(json.dumps(record))
    code, _, err = harness(f"why he2015-8 {tmp_path}/runs", capsys)
    assert (code, "on several data sets" in err, "1 on" in err, "2 on" in err) == (2, True, True, True)
    assert harness(f"why 2 {tmp_path}/runs", capsys)[0] == 0


def test_variables_give_the_folders_that_the_command_line_does_not(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Path(__file__).parent.parent / "results" / "records" / "sample_digits_cpu_2026-11-22" / "runs"
    monkeypatch.setenv("HARNESS_OUT", str(results))
    for line in ("report", "why msra-8", "verify"):
        assert harness(line, capsys)[0] == 0, line
    monkeypatch.setenv("HARNESS_DATA_DIR", str(tmp_path / "nowhere"))
    line = f"run --gpus 0 --depths 8 --variants msra --epochs 1 --dry-run --out {tmp_path / 'own'}"
    code, _, err = harness(line, capsys)
    assert (code, "nowhere" in err) == (2, True)
    code, _, err = harness(f"{line} --data-dir {tmp_path / 'chosen'}", capsys)
    assert (code, "chosen" in err) == (2, True)
    assert harness(f"{line} --dataset digits", capsys)[0] == 0, "these need no folder"


def test_a_shell_completes_commands_and_options() -> None:
    words = {"_HARNESS_COMPLETE": "complete_bash", "COMP_WORDS": "harness run --check", "COMP_CWORD": "2"}
    command = [str(Path(sys.executable).parent / "harness")]
    done = subprocess.run(command, env=os.environ | words, capture_output=True, text=True, check=False)
    assert "--checkpoint-every" in done.stdout


def test_a_message_holds_no_control_characters(capsys: Any) -> None:
    code, _, err = harness("report '/no\x1b[2Jsuch'", capsys)
    assert (code, "\x1b" in err) == (2, False)


def test_dry_run_starts_and_writes_nothing(tmp_path: Path, capsys: Any) -> None:
    code, out, _ = harness(f"run {QUICK} --variants he2015,msra --dry-run --out {tmp_path}/runs", capsys)
    assert code == 0
    assert "2 runs on digits, 0 already done" in out
    assert "msra" in out
    assert not (tmp_path / "runs").exists()


def test_a_run_that_fails_is_a_row_and_the_others_go_on(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.training import train as training

    whole = training.train

    def broken(spec: Any, worker: Any, report: Any, *, paths: Any) -> Any:
        if spec.seed == 0:
            raise MemoryError("no room for the activations")
        return whole(spec, worker, report, paths=paths)

    monkeypatch.setattr(training, "train", broken)
    line = f"run {QUICK} --launcher local --out {tmp_path}/runs --seeds"
    code, out, _ = harness(f"{line} 2", capsys)
    assert code == 1
    assert "he2015-8 seed 0: FAILED: no room for the activations" in out
    assert "OOM" in out
    assert "seed 1: done" in out
    code, out, _ = harness(f"{line} 0,2 --fail-fast", capsys)
    assert code == 1
    assert "seed 2: starting" not in out
    monkeypatch.undo()
    code, out, _ = harness(f"{line} 2", capsys)
    assert code == 0, "a failed run is tried again"
    assert "OOM" not in out


def test_killed_and_run_again_it_resumes(tmp_path: Path, capsys: Any) -> None:
    line = f"run {QUICK} --launcher local --epochs 4".replace("--epochs 2 ", "")
    killed = Command(f"{line} --out {tmp_path}/killed")
    killed.send_signal_at("epoch 2/4", signal.SIGKILL)
    assert killed.wait(30)[0] == -signal.SIGKILL
    (partial,) = load_records([tmp_path / "killed"]).interrupted
    assert (partial.epochs, partial.of) in ((2, 4), (3, 4))
    code, out, _ = harness(f"report {tmp_path}/killed", capsys)
    assert code == 0
    assert f"{partial.epochs} of 4" in out

    assert harness(f"{line} --out {tmp_path}/killed", capsys)[0] == 0
    assert harness(f"{line} --out {tmp_path}/whole", capsys)[0] == 0
    resumed, whole = only_record(tmp_path / "killed"), only_record(tmp_path / "whole")
    assert resumed.record.key == whole.record.key
    assert resumed.record.result.attempts == 2
    assert [e.loss for e in load_epochs(resumed.folder)] == pytest.approx(
        [e.loss for e in load_epochs(whole.folder)], rel=1e-4
    )  # other numbers of threads may have been chosen: exact equality is tested in test_train.py


@pytest.mark.ray
def test_sigterm_to_all_processes_stops_cleanly(tmp_path: Path) -> None:
    """Schedulers and `timeout` send it to Ray's own processes, too."""
    line = f"run {QUICK} --launcher ray --epochs 4000 --out {tmp_path}/runs".replace("--epochs 2 ", "")
    stopped = Command(line)
    stopped.send_signal_at("epoch 1/4000", signal.SIGTERM, to_all=True)
    code, rest = stopped.wait(30)
    assert code == 130, rest
    assert "stopped; the same command goes on" in rest
    assert "Traceback" not in rest
    assert list((tmp_path / "runs").glob("*.partial/checkpoints/epoch-*.pt"))


@pytest.mark.ray
def test_two_workers_through_ray_and_dali(tmp_path: Path, capsys: Any) -> None:
    line = f"run {QUICK} --workers 2 --out {tmp_path}/runs".replace("--loader resident", "--loader dali")
    code, out, err = harness(line, capsys)
    assert code == 0, out + err
    stored = only_record(tmp_path / "runs")
    result = stored.record.result
    assert (result.workers, result.batch_size, result.batch_size_per_gpu) == (2, 128, 64)
    assert [row.images for row in load_epochs(stored.folder)] == [128, 128]
    assert result.launch_seconds is not None
    assert stored.record.environment["launcher"] == "ray"
    assert not (tmp_path / "runs" / ".ray").exists()
    code, again, _ = harness(line, capsys)
    assert (code, "done already" in again) == (0, True)


def test_sigterm_after_training_is_answered_too(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "harness.commands.report.print_report", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
    )
    assert harness(f"report {tmp_path}", capsys)[0] == 130


@pytest.mark.parametrize("line", ["tune --search 'lr=uniform(0,1)' --dataset digits", "check"])
def test_a_lost_cluster_is_one_line_and_exit_code_1(
    line: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_: Any, **__: Any) -> None:
        raise ClusterError("Ray was lost")

    monkeypatch.setattr("harness.commands.tune.make_allocation", lose)
    monkeypatch.setattr("harness.commands.check.examine", lose)
    code, _, err = harness(f"{line} --gpus 0 --out {tmp_path}", capsys)
    assert (code, err) == (1, "harness: error: Ray was lost\n")


MISTAKES = {
    "--depths 21": "depth 21 is not 6n+2: try 20 or 26",
    "--variants he2051": "did you mean he2015?",
    "--loader dalli": "did you mean dali",
    "--dataset cifar": "did you mean cifar",
    "--precision fp8": "allowed: fp32, tf32, bf16, fp16",
    "--precision fp16 --gpus 0": "needs a GPU",
    "--gpus 3": "--gpus 3: this machine has",
    "--gpus 0 --workers 999": "each worker needs one",
    "--seeds none": "'none' is neither a whole number",
    "--data-dir /nowhere/at/all": "/nowhere/at/all",
    "--dataset digits --limit-train 5000": "digits has 1437 training images",
    "--launcher slurm": "allowed: auto, ray, local",
    "--launcher local --workers 2": "runs one worker, not 2",
    "--address 127.0.0.1:1": "no Ray cluster answers at '127.0.0.1:1'",
    "--address nonsense": "is not HOST:PORT or auto",
    "--dephts 20": "--depths",
    "--epochs many": "--epochs 'many': expected a whole number",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    began = time.monotonic()
    code, out, err = harness(f"run --out {tmp_path}/runs --dataset digits {words}", capsys)
    assert code == 2, out
    assert MISTAKES[words] in err
    assert err.startswith("harness: error: ")
    assert err.count("\n") == 1
    assert time.monotonic() - began < 30


def test_mistakes_with_folders(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = harness(f"run --dataset digits --gpus 0 --out {tmp_path}/file/runs", capsys)
    assert (code, "cannot be written to" in err) == (2, True)
    code, _, err = harness(f"report {tmp_path}/missing", capsys)
    assert (code, "no folder of results" in err) == (2, True)
    code, _, err = harness("report --format xml", capsys)
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    "line",
    [
        "report {}", "report {} --output there.csv", "report runs --output {}", "verify {}", "why msra-8 {}", "repro {}", "repro x {}",
        "run --dataset digits --gpus 0 --dry-run --out {}", "run --dataset digits --gpus 0 --dry-run --data-dir {}",
        "run --spec {}", "run --plugin {}", "run {}", "variants --plugin {}", "check {}", "eval --weights {}",
    ],
)  # fmt: skip
def test_the_home_of_an_unknown_user_is_one_line_and_exit_code_2(line: str, capsys: Any) -> None:
    code, out, err = harness(line.format("'~no-such-user/x'"), capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("harness: error: ")
    assert "~no-such-user/x: Could not determine home directory" in err


def test_a_broken_record_is_named_and_the_rest_reported(tmp_path: Path, capsys: Any) -> None:
    assert harness(f"run {QUICK} --launcher local --out {tmp_path}", capsys)[0] == 0
    broken = tmp_path / "digits_he2015-8_s9_\x1b[31m"
    broken.mkdir()
    (broken / "record.json").write_text('{"schema_version": 1, "key"')
    code, out, err = harness(f"report {tmp_path}", capsys)
    assert code == 0
    assert "he2015" in out
    assert "skipped" in err
    assert "\x1b" not in err
    assert str(broken).replace("\x1b", "�") in err


def test_help_is_quick() -> None:
    best = 9.0
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, "-m", "harness.cli", "--help"], cwd=ROOT, check=True, capture_output=True)
        best = min(best, sum(os.times()[2:4]) - sum(before[2:4]))  # of a core, whatever else the machine does
    assert best < 1.0  # 0.2 s; benchmarks/report.py measures it


def test_a_format_that_is_given_wins_over_the_ending_of_the_file(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "x.csv"
    for words, first in (("", "schema_version,"), ("--format table ", "digits · "), ("--format json ", "{")):
        assert harness(f"report {SAMPLE} {words}--output {file}", capsys)[0] == 0
        assert file.read_text().startswith(first)


def test_a_path_in_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A shell leaves a quoted ~ as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "kept").symlink_to(SAMPLE)
    run = next(SAMPLE.glob("*_s0_*")).name
    assert "--spec" in harness(f"repro '~/kept/{run}'", capsys)[1]
    plan = "run --dataset digits --gpus 0 --dry-run --out '~/new'"
    code, out, _ = harness(f"{plan} --spec '~/kept/{run}/record.json'", capsys)
    assert code == 0
    assert "msra" in out
