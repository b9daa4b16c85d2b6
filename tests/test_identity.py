"""What of a record makes rows: every leaf of it splits them, is noted, is shown, or is listed with a reason."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from harness.record import _identify_code
from harness.results.explain import why
from harness.results.identity import RULES, find_rule, hash_code
from harness.results.report.files import file_fields
from harness.results.report.notes import make_notes
from harness.results.report.table import render
from harness.results.rows import Row, summarise
from harness.results.store import Stored
from harness.results.values import Failure, Pruned, Record, RunResult

NOW = datetime(2026, 1, 2, tzinfo=UTC)
VERSIONS = dict.fromkeys(("resnet-harness", "torch", "ray", "numpy", "nvidia-dali-cuda130"), "1.2.3")
MACHINE = {
    "host": "a", "platform": "Linux", "python": "3.11.7", "cpus": 2, "torch": "2.15.0+cu132", "cuda": "13.2",
    "cudnn": 91200, "gpu": "NVIDIA H200", "driver": "580.1",
}  # fmt: skip
ENVIRONMENT = {
    "commit": "0123456789", "dirty": False, "code": "89abcdef", "versions": VERSIONS, "command": ["harness", "run"],
    "launcher": "ray", "concurrent_runs": 1, "attempts": [{"started_at": "2026-01-02", "reason": ""}],
    "check": {"status": "passed", "at": "2026-01-01", "failed": [], "version": "0.1.0"},
    "preflight": {
        "rates": {"n1": {"GEMM GFLOP/s": 50.5}, "n2": {"GEMM GFLOP/s": 30.5}},
        "clocks": {"n1": {"ahead_seconds": 0.5}, "n2": {"ahead_seconds": 0.25}},
        "outliers": ["n2 is slow"], "excluded": ["n2"], "nccl": {"n1": {"network": "IB"}, "n2": {"network": "Socket"}},
        "all_reduce": {"within nodes": {"latency_us": 5.5}},
    },
}  # fmt: skip
SPEC = {
    "variant": "msra", "network": {"depth": 20, "shortcut": "A"}, "overrides": [], "dataset": "cifar10",
    "recipe": {"duration": 180.0, "unit": "epoch", "batch_size": 128, "lr": 0.1, "milestones": [90, 135], "val": 0},
    "fingerprint": "f" * 64, "limit_train": None, "loader": "dali", "precision": "fp32", "engine": "eager",
    "device": "cuda", "workers": 1,
}  # fmt: skip


def fill(kind: Any) -> Any:
    """A value of a type, with every field of its own filled in: fields that are added later are filled in too."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind(**{name: fill(field.annotation) for name, field in kind.model_fields.items()})
    if get_origin(kind) is Literal:
        return get_args(kind)[0]
    if isinstance(kind, UnionType):
        return fill(get_args(kind)[0])
    if get_origin(kind) is tuple:
        return (fill(get_args(kind)[0]), fill(get_args(kind)[0]))
    if get_origin(kind) is dict:
        return {"weights": fill(get_args(kind)[1])} if get_args(kind)[1] is not Any else dict(MACHINE)
    return {bool: True, int: 3, float: 5.5, str: "word"}[kind]


RESULT = fill(RunResult).model_copy(update={"engine": "eager", "warnings": ("a warning",), "peak_flops": 1e3})


def make_record(seed: int, **changes: Any) -> dict[str, Any]:
    values = {
        "key": "0123", "name": f"run-{seed}", "status": "done", "variant": "msra", "depth": 20, "seed": seed,
        "dataset": "cifar10", "original": True, "spec": SPEC | {"seed": seed}, "result": RESULT,
        "environment": ENVIRONMENT, "started_at": NOW, "finished_at": NOW + timedelta(seconds=1),
    } | changes  # fmt: skip
    outcomes = {"schema_version", "result", "failure", "pruned"}
    others = Record.model_fields.keys() - values.keys() - outcomes
    values |= {name: fill(Record.model_fields[name].annotation) for name in others if seed and not changes}
    whole: dict[str, Any] = json.loads(Record(**values).model_dump_json(exclude={"result": {"epochs"}}))
    return whole


FAILED = {"status": "failed", "result": None, "failure": fill(Failure)}
PRUNED = {"status": "pruned", "result": None, "pruned": fill(Pruned)}


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield from leaves(inner, (*path, name))
    if not isinstance(value, dict | list):
        yield path


def get(value: Any, at: tuple[str | int, ...]) -> Any:
    return functools.reduce(lambda value, part: value[part], at, value)


def cases() -> Iterator[tuple[str, tuple[str | int, ...], dict[str, Any]]]:
    seen = set()
    for changes in ({}, FAILED, PRUNED):
        for at in leaves(make_record(1, **changes)):
            path = ".".join(part for part in at if isinstance(part, str))
            if path not in seen and get(make_record(1, **changes), at) is not None:
                seen.add(path)
                yield path, at, changes


CASES = {path: (at, changes) for path, at, changes in cases()}


def change(value: Any) -> Any:
    if value in ("test", "eager", "OOM"):
        return {"test": "val", "eager": "graph", "OOM": "NaN"}[value]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 20
    return f"{value}-2" if isinstance(value, str) else 7


def load(*records: dict[str, Any]) -> list[Row]:
    return summarise([Stored(Record.model_validate(record), Path(str(record["name"]))) for record in records])


def show(rows: list[Row]) -> str:
    return render(rows, "json") + "".join(map(why, rows))


@pytest.mark.parametrize("path", CASES)
def test_every_leaf_of_a_record_has_its_rule_and_keeps_to_it(path: str) -> None:
    rule = find_rule(path)
    assert rule is not None, f"{path}: a rule in results/rules.toml says what becomes of it"
    at, changes = CASES[path]
    if rule.treatment == "ignored":
        assert len(rule.words) > 8, "a reason"
        return
    if path == "status":
        return  # the tests of tables
    first, second = make_record(0), make_record(1, **changes)
    apart = {"spec.engine": ["result", "engine"], "environment.versions.torch": ["result", "machine", "torch"]}
    for record in (first, second):
        if path.endswith(".reason"):  # which is said where there is no value
            get(record, at[:-1])["value"] = None
        if path in apart:  # which would have the last word
            del get(record, tuple(apart[path][:-1]))[apart[path][-1]]
    changed = copy.deepcopy([first, second])
    for record in changed if rule.treatment == "figure" and not changes else changed[1:]:
        get(record, at[:-1])[at[-1]] = change(get(record, at))
    before, after = load(first, second), load(*changed)
    assert len(before) == 1
    if rule.treatment == "split":
        assert len(after) == 2
        assert len({(row.fields.get(rule.words or path.removeprefix("spec."))) for row in after}) == 2
        return
    assert len(after) == 1
    assert show(after) != show(before), "neither the figures nor the footnotes nor `why` say so"
    if rule.treatment == "note":
        told, known = (set(make_notes(rows)) for rows in (after, before))
        assert told - known, "no footnote"
        name = (rule.words or path.rpartition(".")[2]).lower().replace(" ", "_")
        if name not in file_fields():  # of its own column the notes of the file speak
            assert "; " in str(json.loads(render(after, "json"))["rows"][0][name])
        assert name in render(after, "csv").splitlines()[0]


def test_a_leaf_that_only_one_run_has_is_noted_too() -> None:
    without = make_record(1)
    del without["result"]["machine"]["cudnn"]
    (row,) = load(make_record(0), without)
    assert any("cudnn (91200, –)" in note for note in make_notes([row]))


def test_nodes_that_differ_within_a_run_are_no_difference_of_runs() -> None:
    (row,) = load(make_record(0))
    assert row.conditions["network"] == {"IB, Socket": 1}
    assert not [note for note in make_notes([row]) if "differ" in note]


def test_no_rule_is_idle() -> None:
    used = {id(find_rule(path)) for path in CASES}
    idle = [rule.path for rule in RULES if id(rule) not in used]
    # of fields that no record here has: a launcher's own, and the epochs, which are stored beside the record
    assert set(idle) <= {"environment.*", "result.epochs*"}


def test_the_code_decides_and_not_the_commit() -> None:
    same = make_record(1, environment=ENVIRONMENT | {"commit": "fedcba9876"})
    (row,) = load(make_record(0), same)
    assert any("commit (0123456789, fedcba9876)" in note for note in make_notes([row]))
    assert len(load(make_record(0), make_record(1, environment=ENVIRONMENT | {"code": "ffff"}))) == 2


def test_uncommitted_changes_are_marked() -> None:
    for dirty in (1, 2):
        rows = load(*(make_record(s, environment=ENVIRONMENT | {"dirty": s < dirty}) for s in range(2)))
        assert f"{dirty} of 2 runs had uncommitted changes" in render(rows, "table", width=300)


def test_only_code_that_runs_can_be_uncommitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results inside a checkout, documents and tests are none of it; a new module is."""
    monkeypatch.setattr("harness.record.__file__", str(tmp_path / "harness" / "record.py"))
    for name in ("harness/record.py", "loaders/own.py", "docs/x.md"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x\n")
    mine = ["-c", "user.name=x", "-c", "user.email=x"]
    for words in (["init", "-q"], ["add", "."], [*mine, "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)

    def dirty() -> bool | None:
        return _identify_code.__wrapped__()["dirty"]

    for name in ("newout/run/record.json", "tests/test_x.py", "docs/x.md", "results/records/x/record.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("new")
        assert dirty() is False, name
    for name in ("loaders/own.py", "loaders/new.py"):
        before = (tmp_path / name).read_text() if (tmp_path / name).exists() else None
        (tmp_path / name).write_text("new")
        assert dirty() is True, name
        (tmp_path / name).unlink() if before is None else (tmp_path / name).write_text(before)
        assert dirty() is False


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (None, "never checked"),
        ({"status": "skipped"}, "never checked"),
        ({"status": "failed"}, "failed its check"),
    ],
)
def test_a_device_that_was_not_checked_is_marked(check: Any, words: str) -> None:
    rows = load(make_record(0, environment=ENVIRONMENT | {"check": check}))
    assert words in render(rows, "table", width=300)
    cpu = load(
        make_record(0, environment=ENVIRONMENT | {"check": check}, spec=SPEC | {"device": "cpu", "seed": 0})
    )
    assert words not in render(cpu, "table", width=300)
    assert "check" not in render(load(make_record(0)), "table", width=300)


def test_the_hash_is_of_the_code_and_of_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import harness.results.identity

    root = Path(harness.results.identity.__file__).resolve().parents[1]
    assert hash_code() == hash_code.__wrapped__()
    for package in ("harness", "models", "loaders", "cluster", "results"):
        shutil.copytree(
            root / package, tmp_path / package, symlinks=True, ignore=shutil.ignore_patterns("records")
        )

    def now() -> str:
        return hash_code.__wrapped__()

    monkeypatch.setattr(harness.results.identity, "__file__", str(tmp_path / "results" / "identity.py"))
    assert now() == hash_code(), "wherever it lies"
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "harness" / "notes.txt").write_text("x")
    (tmp_path / "results" / "rows.py").write_text("x")
    assert now() == hash_code()
    for name in ("models/networks.py", "harness/training/step.py", "loaders/sampling.py", "cluster/launch.py"):
        path = tmp_path / name
        before, text = now(), path.read_text()
        path.write_text(text + "\n")
        assert now() != before
        path.write_text(text)
    for package in ("models", "loaders", "cluster", "results"):  # as a wheel has them
        (tmp_path / "harness" / package).unlink()
        (tmp_path / package).rename(tmp_path / "harness" / package)
    installed = tmp_path / "site" / "harness"
    (tmp_path / "site").mkdir()
    (tmp_path / "harness").rename(installed)
    monkeypatch.setattr(harness.results.identity, "__file__", str(installed / "results" / "identity.py"))
    assert now() == hash_code()
