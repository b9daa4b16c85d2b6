"""Before a first run: devices are checked once, runs take what works, and a machine that trains wrongly is refused."""

from __future__ import annotations

import io
import json
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command import harness
from rich.console import Console

from harness import plan, selfcheck
from harness.checklist import BY_NAME, CHECKS, Result
from harness.cluster.job import Allocation
from harness.commands import run, tune
from harness.loaders.files import Files
from harness.resources import Resources, Session
from harness.selfcheck import Checked, Device, RefusedError, check_first, measure
from harness.spec import RunPaths, RunSpec

pytest_plugins = ["nvml_stub"]
T4 = {"device": "Tesla T4", "driver": "550.54.15", "torch": "2.14.1", "dali": "2.4.0", "code": "c0de"}


@dataclass
class Machine:
    """Stands in for devices: what fails, how long a check takes, and what was checked."""

    fails: set[str] = field(default_factory=set)
    combination: dict[str, str] = field(default_factory=lambda: dict(T4))
    seconds: float = 5.0  # of a check
    now: float = 1000.0
    checked: list[str] = field(default_factory=list)

    def device(self, name: str = "cuda:0", *, ranks: bool = False, **changes: str) -> Device:
        def measure(names: Sequence[str], seconds: float) -> list[Result]:
            results = []
            for name in names:
                if seconds < self.seconds:
                    results.append(Result(name, "left out", "not done in time"))
                    continue
                seconds, self.now = seconds - self.seconds, self.now + self.seconds
                self.checked.append(name)
                results.append(Result(name, "failed" if name in self.fails else "passed", f"{name} figures"))
            return results

        return Device(name, self.combination | changes, measure, ranks)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """One GPU, and two ranks, of a clock of its own."""
    made = Machine()
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(selfcheck, "find_devices", lambda *_: [made.device()])
    monkeypatch.setattr(selfcheck, "make_ranks", lambda *_: made.device("2 ranks", ranks=True, workers="2"))
    monkeypatch.setattr(selfcheck, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def make_specs(workers: int = 1, **changes: Any) -> list[RunSpec]:
    allocation = Allocation(device="cuda", gpus=workers, workers=workers, concurrent_runs=1, threads=4)
    grid = plan.Grid(variants=("he2015",), **changes)
    return plan.expand(grid, allocation, fingerprint="f" * 64, train_images=50_000)


def make_session(allocation: Allocation, address: str | None = None) -> Session:
    return Session(allocation, Resources(address=address), RunPaths(out=Path()), ExitStack())


def first(specs: list[RunSpec], **options: Any) -> tuple[Checked, list[str]]:
    """What comes of it, and the lines that are printed."""
    device, workers = specs[0].device, specs[0].workers
    console = Console(file=io.StringIO(), width=200)
    allocation = Allocation(device=device, gpus=workers, workers=workers, concurrent_runs=1, threads=4)
    checked = check_first(specs, make_session(allocation), console, **options)
    return checked, console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_what_a_run_rests_on_is_checked_once(machine: Machine) -> None:
    specs = make_specs()
    checked, lines = first(specs)
    own = ["eager", "loader dali", "engine graph", "resume", "memory", "clock"]
    assert machine.checked == own
    assert [checked.adapt(spec) for spec in specs] == specs
    assert (checked.environment["check"]["status"], checked.environment["check"]["failed"]) == ("passed", [])
    assert ["Tesla T4" in line and "90 s (--no-check skips)" in line for line in lines] == [True]
    assert first(specs)[1] == [], "known"
    assert machine.checked == own
    first(make_specs(engine="compile", precision="bf16"))
    assert machine.checked[len(own) :] == ["engine compile", "precision bf16"], (
        "what is known is not checked again"
    )


@pytest.mark.parametrize("part", T4)
def test_whatever_changes_is_checked_again(part: str, machine: Machine) -> None:
    first(make_specs())
    machine.combination[part] += "1"
    before = len(machine.checked)
    first(make_specs())
    assert len(machine.checked) == 2 * before


def test_a_loader_or_an_engine_that_fails_is_replaced(machine: Machine) -> None:
    machine.fails = {"loader dali", "engine graph"}
    specs = make_specs()
    for again in (False, True):
        checked, lines = first(specs)
        assert [(spec.loader, spec.engine) for spec in map(checked.adapt, specs)] == [("resident", "eager")]
        assert lines[-2:] == list(checked.warnings)
        assert checked.warnings == (
            "check loader dali failed (loader dali figures): loader resident in its place",
            "check engine graph failed (engine graph figures): engine eager in its place",
        )
        assert checked.environment["check"]["status"] == "passed", "what is left is right"
        assert checked.environment["check"]["failed"] == ["loader dali", "engine graph"]
        assert machine.checked.count("loader resident") == 1, f"what takes its place is checked; known: {again}"


def test_what_failed_is_checked_again_and_counts_until_it_passes(machine: Machine) -> None:
    machine.fails = {"eager"}
    with pytest.raises(RefusedError, match="check eager failed"):
        first(make_specs())
    machine.fails, machine.seconds = set(), 200.0
    with pytest.raises(RefusedError, match="check eager failed"):  # no time: what is known counts
        first(make_specs())
    machine.seconds = 5.0
    assert first(make_specs())[0].warnings == ()


def test_images_in_files_fall_back_to_a_loader_that_can_cut_them(machine: Machine) -> None:
    images = SimpleNamespace(train=SimpleNamespace(images=Files(b"", *np.zeros((3, 1))), sizes=[(40, 30)]))  # type: ignore[arg-type]
    specs = make_specs(settings={"resize": 256, "crop": 224})
    machine.fails = {"loader dali"}
    checked, lines = first(specs, dataset=images)
    assert [spec.loader for spec in map(checked.adapt, specs)] == ["dataloader"]
    assert "check loader dali failed (loader dali figures): loader dataloader in its place" in lines
    machine.fails, machine.combination = {"loader dali", "loader dataloader"}, T4 | {"driver": "580"}
    with pytest.raises(RefusedError, match="check loader dataloader failed"):
        first(specs, dataset=images)


@pytest.mark.parametrize(
    ("fails", "changes"),
    [
        ({"eager"}, {}),
        ({"loader dali", "loader resident"}, {}),
        ({"precision bf16"}, {"precision": "bf16"}),
        ({"sum of gradients"}, {"workers": 2}),
        ({"ranks graph", "ranks eager"}, {"workers": 2}),
    ],
)
def test_where_nothing_right_is_left_a_run_is_refused(
    fails: set[str], changes: dict[str, Any], machine: Machine
) -> None:
    machine.fails = fails
    with pytest.raises(
        RefusedError, match=r"is not trained: check .* failed on this device.*--no-check"
    ) as caught:
        first(make_specs(**changes))
    assert "\n" not in str(caught.value)


def test_what_others_do_not_rest_on_does_not_stop_them(machine: Machine) -> None:
    machine.fails = {"precision bf16", "sum of gradients", "engine compile"}
    checked, _ = first(make_specs())
    assert checked.environment["check"]["failed"] == []
    machine.fails = {"clock"}
    machine.combination["driver"] = "580"
    checked, lines = first(make_specs())
    assert checked.adapt(make_specs()[0]) == make_specs()[0], "figures are wrong, not the training"
    assert checked.environment["check"]["status"] == "failed"
    assert lines[-1] == "check clock failed (clock figures)"


def test_several_ranks(machine: Machine) -> None:
    machine.fails = {"ranks graph"}
    checked, _ = first(make_specs(workers=2))
    assert checked.adapt(make_specs(workers=2)[0]).engine == "eager"
    assert machine.checked[-1] == "ranks eager"
    assert "sum of gradients" in machine.checked


def test_ninety_seconds_are_the_most(machine: Machine) -> None:
    machine.seconds = 25.0
    checked, lines = first(make_specs(workers=2))
    assert machine.now - 1000 <= 90
    assert machine.checked == ["eager", "loader dali", "engine graph"]
    assert lines[-1].startswith("checks left out: resume, memory, clock, sum of gradients")
    assert checked.environment["check"]["status"] == "skipped"
    machine.now = 0.0
    first(make_specs(workers=2))
    assert machine.checked[3:] == ["resume", "memory", "clock"], "the next run goes on with them"


def test_of_two_kinds_of_devices_both_count(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def devices(*_: Any) -> list[Device]:
        return [machine.device(), machine.device("cuda:1"), machine.device("cuda:2", device="NVIDIA L4")]

    monkeypatch.setattr(selfcheck, "find_devices", devices)
    first(make_specs())
    assert machine.checked.count("eager") == 2, "one of each kind"


def test_neither_the_cpu_nor_those_who_do_not_want_it(machine: Machine) -> None:
    checked, lines = first(make_specs(), skip=True)
    assert (checked.environment["check"]["status"], lines) == ("skipped", [])
    assert first([replace(make_specs()[0], device="cpu")]) == (Checked(), [])
    assert machine.checked == []


def test_a_cache_that_is_broken_or_cannot_be_written(machine: Machine, tmp_path: Path) -> None:
    first(make_specs())
    (file,) = (tmp_path / "cache" / "checks").iterdir()
    assert json.loads(file.read_text())["combination"] == T4
    file.write_text("{")
    first(make_specs())
    assert machine.checked.count("eager") == 2
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("not a folder")
    assert first(make_specs())[0].environment["check"]["status"] == "passed"


# --- a process for each device ---


def stub(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the program that checks: `say(name)` says that it has passed."""
    head = "import json, os, subprocess, sys, time\nsay = lambda n: print(json.dumps(['check', n, 'passed', '']), flush=True)\n"
    monkeypatch.setattr(selfcheck, "PROGRAM", (sys.executable, "-c", head + code))


def test_a_check_that_ends_its_process_fails_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "for n in sys.argv[3:]:\n if n == 'memory':\n  sys.exit('CUDA error: an illegal address')\n print('noise', os.environ['CUBLAS_WORKSPACE_CONFIG']); say(n)"
    stub(code, monkeypatch)
    results = list(measure("cpu", 1, ["eager", "memory", "clock"], 60))
    assert [(r.name, r.state) for r in results] == [("eager", "passed"), ("memory", "failed"), ("clock", "passed")]
    assert "its process ended with 1: CUDA error" in results[1].detail


def test_a_check_that_hangs_is_ended_with_all_that_it_has_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    child = f"subprocess.Popen(['sleep', '60'], stdout=sys.stdout); open({str(tmp_path / 'up')!r}, 'w').write('')"
    stub(f"say('eager'); {child}; time.sleep(60)", monkeypatch)
    started_at = time.monotonic()
    results = list(measure("cpu", 1, ["eager", "memory", "clock"], 1.5))
    assert time.monotonic() - started_at < 10, "nobody waits for the child either"
    assert (tmp_path / "up").exists()
    assert [r.state for r in results] == ["passed", "left out", "left out"]
    assert results[1].detail == "not done within 2 s"


# --- devices ---


def test_gpus_of_this_machine(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.set(GPUS=3, DRIVER="550.54.15")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    devices = selfcheck.find_devices(
        make_session(Allocation(device="cuda", gpus=2, workers=2, concurrent_runs=1, threads=4))
    )
    assert [device.name for device in devices] == ["cuda:0", "cuda:1"]
    assert devices[0].combination["driver"] == "550.54.15"
    assert [device.combination["device"] for device in devices] == ["Stub GPU 2", "Stub GPU 0"]
    assert selfcheck.identify()["device"] == "Stub GPU 0"
    nvml.set(DRIVER="580.1")
    assert selfcheck.identify("Stub GPU 2") != devices[0].combination


def test_one_node_of_each_kind_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = {"a": T4, "b": T4, "c": T4 | {"device": "NVIDIA L4"}, "head": T4 | {"device": "cpu"}}
    asked: list[Any] = []

    def ask(
        question: Any, *, only: str | None = None, gpus: int = 0, timeout_seconds: float = 0
    ) -> dict[str, Any]:
        if only is None:
            return dict(nodes)
        asked.append((only, gpus))
        return {only: question()}

    monkeypatch.setattr(selfcheck, "ask_every_node", ask)
    monkeypatch.setattr(selfcheck, "measure", lambda *words: [Result(words[2][0], "passed", str(words))])
    devices = selfcheck.find_devices(
        make_session(Allocation(device="cuda", gpus=3, workers=1, concurrent_runs=3, threads=4), "auto")
    )
    assert [device.name for device in devices] == ["Tesla T4 on a", "NVIDIA L4 on c"]
    assert devices[1].measure(["eager"], 30.0) == [Result("eager", "passed", "('cuda:0', 4, ['eager'], 30.0)")]
    assert asked == [("c", 1)]


# --- the commands ---


@pytest.fixture
def on_gpu(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Runs on the CPU are taken for runs on a GPU, which are checked."""

    def checked(specs: Any, session: Session, *rest: Any, **options: Any) -> Checked:
        on_gpu = replace(session, allocation=replace(session.allocation, device="cuda"))
        return check_first(specs, on_gpu, *rest, **options)

    monkeypatch.setattr(run, "check_first", checked)
    monkeypatch.setattr(tune, "check_first", checked)
    return machine


RUN = "run --dataset digits --depths 8 --epochs 1 --limit-train 64 --limit-test 20 --gpus 0 --launcher local"


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(out.glob("*/record.json"))]


def test_a_run_takes_what_works_and_its_record_says_so(on_gpu: Machine, tmp_path: Path, capsys: Any) -> None:
    on_gpu.fails = {"loader dali", "engine compile"}
    out = tmp_path / "runs"
    line = f"{RUN} --loader dali --engine compile --out {shlex.quote(str(out))}"
    code, printed, _ = harness(line, capsys)
    (record,) = records(out)
    assert (code, record["spec"]["loader"], record["spec"]["engine"]) == (0, "resident", "eager")
    assert "check loader dali failed (loader dali figures): loader resident in its place" in " ".join(
        printed.split()
    )
    assert record["result"]["warnings"][0].startswith("check loader dali failed")
    assert record["environment"]["check"]["failed"] == ["loader dali", "engine compile"]
    assert harness(line, capsys)[0] == 0
    assert len(records(out)) == 1, "the run is done already"
    code, _, _ = harness(f"{RUN} --loader resident --no-check --seeds 1, --out {shlex.quote(str(out))}", capsys)
    assert [record["environment"]["check"]["status"] for record in records(out)] == ["passed", "skipped"]


def test_commands_that_are_refused(on_gpu: Machine, tmp_path: Path, capsys: Any) -> None:
    on_gpu.fails = {"eager"}
    out = shlex.quote(str(tmp_path / "runs"))
    code, printed, err = harness(f"{RUN} --loader resident --out {out}", capsys)
    assert (code, err, records(tmp_path / "runs")) == (1, "", [])
    assert "he2015-8 seed 0 is not trained: check eager failed" in " ".join(printed.split())
    search = "tune --search lr=uniform(0.1,0.2) --samples 1 --dataset digits --depth 8 --epochs 1 --limit-train 64 --gpus 0"
    code, printed, _ = harness(f"{search} --out {out}", capsys)
    assert (code, "is not trained: check eager failed" in " ".join(printed.split())) == (1, True)
    assert not list((tmp_path / "runs").glob("tune/*")), "no sweep was begun"


def test_every_check_is_declared_whole() -> None:
    assert len(BY_NAME) == len(CHECKS)
    fields = set(RunSpec.__dataclass_fields__)
    assert {check.of[0] for check in CHECKS if check.of} <= fields
    for check in CHECKS:
        if check.otherwise not in ("refuse", "warn", "show"):
            assert check.of
            assert any(c.of in ((check.of[0], check.otherwise), None) for c in CHECKS), (
                "what takes its place is checked"
            )
