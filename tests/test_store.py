"""The store: whole or not at all, nothing lost, everything broken named in one line."""

import json
import math
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from records import make_epoch, make_memory, make_result

from harness.results import store
from harness.results.values import Failure, Record, RunResult, Timing

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def make_stored_result(**changes: Any) -> RunResult:
    """Of three epochs, the first of them a warm-up."""
    values: dict[str, Any] = {
        "epochs": tuple(make_epoch(k, timed=k > 1) for k in (1, 2, 3)), "best_epoch": 2, "eval_seconds": 1.0,
        "setup_seconds": 3.0, "train_seconds": 30.0, "memory": make_memory(rss_mib=700.0), "threads": 2, "device": "AMD EPYC",
    }  # fmt: skip
    return make_result(8.3, 10.0, **(values | changes))


def make_record(seed: int = 0, **changes: Any) -> Record:
    key = f"{seed:08x}deadbeef"
    values: dict[str, Any] = {
        "key": key, "name": store.run_name("cifar10-q75", "msra", 20, seed, key), "status": "done",
        "variant": "msra", "depth": 20, "seed": seed, "dataset": "cifar10-q75", "original": False,
        "spec": {"variant": "msra", "seed": seed, "epochs": 3}, "result": make_stored_result(),
        "environment": {"commit": "abc"}, "started_at": NOW, "finished_at": NOW + timedelta(minutes=1),
    }  # fmt: skip
    return Record(**(values | changes))


def finished_keys(out: Path) -> set[str]:
    return {stored.record.key for stored in store.load_records([out]).records if stored.record.status == "done"}


def make_failed(seed: int = 0) -> Record:
    return make_record(seed, status="failed", result=None, failure=Failure(kind="OOM", message="out of memory"))


def test_run_name_is_readable_and_safe() -> None:
    assert store.run_name("cifar10-q75", "msra", 20, 0, "1a2b3c4d5e6f") == "cifar10-q75_msra-20_s0_1a2b3c4d"
    name = store.run_name("folder:/data/../my set|x", "a/b", 20, 7, "1a2b3c4d")
    assert name == "folder-data-..-my-set-x_a-b-20_s7_1a2b3c4d"
    assert Path(name).name == name
    assert not store.run_name("..", "v", 20, 0, "k").startswith(".")


def test_the_timed_epochs_are_counted_with_their_spread(tmp_path: Path) -> None:
    record = make_record()
    assert record.result is not None
    first = record.result.epochs[0]
    untimed = {1: "warm-up", 4: "interference: it swapped", 5: "interference: it swapped"}
    epochs = tuple(
        first.model_copy(update={"epoch": k, "train_seconds": 1.0 + k, "timed": k not in untimed, "untimed": untimed.get(k, "")})
        for k in range(1, 7)
    )  # fmt: skip
    store.finish(
        tmp_path, record.model_copy(update={"result": record.result.model_copy(update={"epochs": epochs})})
    )
    (stored,) = store.load_records([tmp_path]).records
    assert stored.record.result is not None
    causes = {"warm-up": 1, "interference: it swapped": 2}
    assert stored.record.result.timing == Timing(epochs=3, fastest=3.0, slowest=7.0, untimed=causes)


def test_a_finished_run_reads_back_equal(tmp_path: Path) -> None:
    record = make_record()
    folder = store.finish(tmp_path, record)
    assert folder == tmp_path / record.name
    assert not store.partial_dir(tmp_path, record.name).exists()
    loaded = store.load_records([tmp_path])
    assert (loaded.interrupted, loaded.problems) == ([], [])
    (stored,) = loaded.records
    assert stored.folder == folder
    assert stored.record.result is not None
    assert stored.record.result.data_stall_percent == pytest.approx(100 * 0.5 / 10)
    epochs = tuple(store.load_epochs(folder))
    timed = [epoch.train_seconds for epoch in epochs if epoch.timed]
    timing = Timing(
        epochs=len(timed), fastest=min(timed), slowest=max(timed), untimed={"": len(epochs) - len(timed)}
    )
    assert stored.record.result.timing == timing
    result = stored.record.result.model_copy(update={"epochs": epochs, "data_stall_percent": None, "timing": None})
    assert stored.record.model_copy(update={"result": result}) == record
    assert finished_keys(tmp_path) == {record.key}


def test_wait_share_leaves_untimed_epochs_out(tmp_path: Path) -> None:
    epochs = (
        make_epoch(1, data_stall_seconds=9.0, timed=False),
        make_epoch(2, data_stall_seconds=2.0, train_seconds=8.0),
    )
    folder = store.finish(tmp_path, make_record(result=make_stored_result(epochs=epochs)))
    record = store.load_records([folder]).records[0].record
    assert record.result is not None
    assert record.result.data_stall_percent == pytest.approx(25.0)
    disturbed = make_epoch(
        2, data_stall_seconds=2.0, train_seconds=4.0, timed=False, untimed="interference: it swapped"
    )
    folder = store.finish(tmp_path, make_record(result=make_stored_result(epochs=(epochs[0], disturbed))))
    again = store.load_records([folder]).records[0].record.result
    assert again is not None
    assert again.data_stall_percent == pytest.approx(50.0), "of the same epochs as the seconds"


def test_running_again_keeps_what_was_stored(tmp_path: Path) -> None:
    first, second = make_record(), make_record(finished_at=NOW + timedelta(days=1))
    store.finish(tmp_path, first)
    store.finish(tmp_path, second)
    assert [s.record.finished_at for s in store.load_records([tmp_path]).records] == [second.finished_at]
    (old,) = (tmp_path / store.SUPERSEDED).iterdir()
    assert store.load_records([old]).records[0].record.finished_at == first.finished_at


def test_epochs_survive_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    store.append_epoch(tmp_path, make_epoch(1))
    store.append_epoch(tmp_path, make_epoch(2))
    path = tmp_path / store.EPOCHS
    path.write_bytes(path.read_bytes()[:-20])
    assert [e.epoch for e in store.load_epochs(tmp_path)] == [1]
    store.append_epoch(tmp_path, make_epoch(2, attempt=2))
    store.append_epoch(tmp_path, make_epoch(3, attempt=2))
    assert [(e.epoch, e.attempt) for e in store.load_epochs(tmp_path)] == [(1, 1), (2, 2), (3, 2)]


def test_a_line_cut_off_in_the_first_epoch(tmp_path: Path) -> None:
    (tmp_path / store.EPOCHS).write_text('{"epoch": 1, "st')
    assert store.load_epochs(tmp_path) == []
    store.append_epoch(tmp_path, make_epoch(1))
    assert store.load_epochs(tmp_path) == [make_epoch(1)]


def test_an_epoch_run_again_counts_in_its_last_form(tmp_path: Path) -> None:
    for epoch, attempt in ((1, 1), (2, 1), (3, 1), (2, 2)):
        store.append_epoch(tmp_path, make_epoch(epoch, attempt=attempt))
    assert [(e.epoch, e.attempt) for e in store.load_epochs(tmp_path)] == [(1, 1), (2, 2), (3, 1)]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    store.write_epochs(tmp_path, [make_epoch(1), make_epoch(2)])
    path = tmp_path / store.EPOCHS
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{}", lines[1]]) + "\n")
    with pytest.raises(ValueError, match=r"epochs\.jsonl line 2: epoch: Field required \(and 9 more\)"):
        store.load_epochs(tmp_path)


def test_a_line_of_two_epochs_is_no_line(tmp_path: Path) -> None:
    line = make_epoch(1).model_dump_json()
    (tmp_path / store.EPOCHS).write_text(f"{line},{line}\n{line}\n")
    with pytest.raises(ValueError, match=r"epochs\.jsonl line 1: "):
        store.load_epochs(tmp_path)


def test_values_that_are_no_numbers_come_back(tmp_path: Path) -> None:
    store.append_epoch(tmp_path, make_epoch(1, loss=math.nan, error=math.inf))
    (epoch,) = store.load_epochs(tmp_path)
    assert math.isnan(epoch.loss)
    assert epoch.error == math.inf
    folder = store.finish(tmp_path, make_record(result=make_stored_result(final_error=math.nan)))
    (stored,) = store.load_records([folder]).records
    assert stored.record.result is not None
    assert math.isnan(stored.record.result.final_error)


def test_a_failed_run_says_why_and_may_be_tried_again(tmp_path: Path) -> None:
    failed = make_failed()
    folder = store.finish(tmp_path, failed)
    assert folder == store.partial_dir(tmp_path, failed.name)
    assert store.load_records([tmp_path]).records == [store.Stored(failed, folder)]
    assert finished_keys(tmp_path) == set()
    assert store.start(tmp_path, failed.name, {"epochs": 3}) == folder
    loaded = store.load_records([tmp_path])
    assert loaded.records == []
    assert [i.name for i in loaded.interrupted] == [failed.name]
    assert len(list(folder.glob("failed_*.json"))) == 1  # kept


def test_a_run_that_failed_before_it_began_is_stored(tmp_path: Path) -> None:
    """As a trial does that Tune could not start."""
    from test_until_ci import make_specs

    from harness.cluster.job import Failed
    from harness.record import Recorder
    from harness.spec import RunPaths

    (spec,) = make_specs((0,), depths=(20,))
    failed = Failed(exception="RuntimeError", message="no room", traceback="", died=False)
    assert not Recorder(RunPaths(out=tmp_path, label="digits"), True, {}, print).end(spec, failed)
    (stored,) = store.load_records([tmp_path]).records
    assert stored.record.failure is not None
    assert stored.record.failure.message == "RuntimeError: no room"


def test_an_attempt_whose_line_a_kill_cut_off_costs_no_later_one(tmp_path: Path) -> None:
    from test_until_ci import make_specs

    from harness.cluster.job import Failed, Started
    from harness.record import ATTEMPTS, Recorder
    from harness.spec import RunPaths

    (spec,), paths = make_specs((0,), depths=(20,)), RunPaths(out=tmp_path, label="digits")
    Recorder(paths, True, {}, print).begin(spec, Started(attempt=1))
    with (paths.partial(spec) / ATTEMPTS).open("a") as file:
        file.write('{"started_at": "20')
    again = Recorder(paths, True, {}, print)
    again.begin(spec, Started(attempt=1))
    again.end(spec, Failed(exception="RuntimeError", message="no room", traceback="", died=False))
    (stored,) = store.load_records([tmp_path]).records
    reasons = [attempt["reason"] for attempt in stored.record.environment["attempts"]]
    assert reasons == ["", "the command was given again"]


def test_an_interrupted_run_says_how_far_it_came(tmp_path: Path) -> None:
    folder = store.start(tmp_path, "a_b-20_s0_1", {"recipe": {"unit": "epoch", "duration": 180}})
    store.append_epoch(folder, make_epoch(1))
    store.append_epoch(folder, make_epoch(2))
    spec = {"recipe": {"unit": "step", "duration": 64_000}}
    store.start(tmp_path, "a_b-20_s0_1", spec)  # taken up again: epochs stay
    store.append_epoch(store.start(tmp_path, "a_b-20_s1_1", {"recipe": 7}), make_epoch(1))
    store.partial_dir(tmp_path, "bare").mkdir()
    one, two, bare = store.load_records([tmp_path]).interrupted
    assert (one.name, one.epochs, one.of, one.spec) == ("a_b-20_s0_1", 2, 164, spec)  # of 391 steps each
    assert (two.epochs, two.of) == (1, None)
    assert (bare.name, bare.epochs, bare.of, bare.spec) == ("bare", 0, None, {})


def edit(folder: Path, **changes: Any) -> None:
    path = folder / store.RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_every_broken_folder_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    good = store.finish(tmp_path, make_record(0))
    folders = [store.finish(tmp_path, make_record(seed)) for seed in range(1, 9)]
    path = folders[0] / store.RECORD
    path.write_text(path.read_text()[:200])  # half-written
    edit(folders[1], variannt="x")
    edit(folders[2], schema_version=2, something_new=1)
    edit(folders[3], schema_version=0)
    (folders[4] / store.RECORD).unlink()
    edit(folders[5], depth="twenty", seed=None)
    edit(folders[6], result=None)
    (folders[7] / store.RECORD).write_bytes(b"\x00\xff")
    (tmp_path / "a-file").write_text("")
    loaded = store.load_records([tmp_path, tmp_path / "nowhere", tmp_path / "a-file"])
    assert [s.folder for s in loaded.records] == [good]
    expected = [
        "no such folder",
        "not a folder",
        "EOF while parsing",
        "variannt: Extra inputs are not permitted",
        "schema_version: Input should be 1, not 2",
        "schema_version: Input should be 1, not 0",
        "no run: it has no record.json",
        "depth: Input should be a valid integer",
        "its status is done, its outcome missing",
        "record.json is broken",
    ]
    assert len(loaded.problems) == len(expected)
    for problem, words in zip(loaded.problems, expected, strict=True):
        assert words in problem.reason
        assert "\n" not in str(problem)


def test_a_folder_that_may_not_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "scandir", Mock(side_effect=PermissionError(13, "Permission denied")))
    assert list(map(str, store.load_records([tmp_path]).problems)) == [
        f"{tmp_path}: cannot be read: Permission denied"
    ]


def test_a_folder_of_results_inside_another_is_no_broken_run(tmp_path: Path) -> None:
    """As `make quickstart` makes runs/quickstart: passed over in silence, and named where there is nothing else."""
    inner = store.finish(tmp_path / "quickstart", make_record(1))
    store.start(tmp_path / "begun", "x_s0_1", {})
    (first, second) = store.load_records([tmp_path]).problems
    assert str(second) == f"{inner.parent}: it holds results of its own: give this folder"
    assert first.path == tmp_path / "begun"
    outer = store.finish(tmp_path, make_record(0))
    loaded = store.load_records([tmp_path])
    assert ([s.folder for s in loaded.records], loaded.problems) == ([outer], [])


def test_any_mixture_of_paths_gives_each_run_once(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    first = store.finish(here, make_record(0))
    store.finish(here, make_record(1))
    store.finish(there, make_record(0))  # the same run, copied to another store
    store.finish(there, make_failed(2))
    loaded = store.load_records([first, here, there, store.partial_dir(there, make_failed(2).name)])
    assert [(s.record.seed, s.folder.parent.name) for s in loaded.records] == [
        (0, "here"),
        (1, "here"),
        (2, "there"),
    ]
    assert loaded.problems == []
    assert finished_keys(tmp_path / "nowhere") == set()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    store.write_atomic(path, "old")
    store.write_atomic(path, b"new")

    def tear() -> None:
        with store.writing(path) as temporary:
            temporary.write_text("torn")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        tear()
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
