"""`harness verify`: every planted edit is found, with the stored hashes and, where figures contradict, without them."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from command import harness
from test_golden import SAMPLE

from harness.results.store import EPOCHS, HASHES, RECORD, WEIGHTS, finish, load_epochs, load_records, partial_dir
from harness.results.values import summarise_epochs
from harness.results.verify import verify
from harness.spec import RunSpec

Json = dict[str, Any]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three stored runs, stored again with hashes and weights."""
    out = tmp_path / "runs"
    for stored in load_records(sorted(SAMPLE.glob("digits_msra-8_*"))[:3]).records:
        result = stored.record.result
        assert result is not None
        result = result.model_copy(update={"epochs": tuple(load_epochs(stored.folder)), "evaluated_images": 360})
        partial_dir(out, stored.record.name).mkdir(parents=True)
        (partial_dir(out, stored.record.name) / WEIGHTS).write_bytes(stored.record.name.encode())
        finish(out, stored.record.model_copy(update={"result": result}))
    return out


def edit(*path: str, to: Any) -> Callable[[Json], None]:
    """Put a value into a record, or what a function makes of it."""

    def change(record: Json) -> None:
        inner = record
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = to(inner[path[-1]]) if callable(to) else to

    return change


def times(factor: float) -> Callable[[float], float]:
    return lambda value: value * factor


RECORDS: dict[str, tuple[Callable[[Json], None], str]] = {
    "key": (edit("key", to="0" * 16), "key 0000000000000000: its specification has"),
    "recipe": (edit("spec", "recipe", "lr", to=0.05), "its specification has"),
    "network": (edit("spec", "network", "depth", to=14), "depth 8: its specification has 14"),
    "seed": (edit("seed", to=7), "seed 7: its specification has"),
    "variant": (edit("variant", to="he2015"), "variant he2015: its specification has msra"),
    "field": (lambda r: r["spec"].update(colour=1), "no such field"),
    "name": (edit("name", to="digits_msra-8_s9_00000000"), "name digits_msra-8_s9_00000000: its values give"),
    "final error": (edit("result", "final_error", to=0.0), "final_error is 0.0, its epochs give"),
    "final below best": (edit("result", "final_error", to=1.0), "above final_error 1"),
    "best error": (edit("result", "best_error", to=0.0), "best_error is 0.0, its epochs give"),
    "best epoch": (edit("result", "best_epoch", to=1), "best_epoch is 1, its epochs give"),
    "no whole image": (edit("result", "final_error", to=lambda e: e + 0.1), "is no whole number of 360 images"),
    "above 100 %": (edit("result", "final_error", to=120.0), "final_error is 120"),
    "top-5 above top-1": (edit("result", "final_top5_error", to=50.0), "final_top5_error is 50, above final_error"),
    "test error": (edit("result", "test_error", to=-1.0), "test_error is -1"),
    "s/epoch": (edit("result", "epoch_seconds", to=times(0.9)), "epoch_seconds is"),
    "training seconds": (edit("result", "train_seconds", to=times(0.5)), "train_seconds is"),
    "images a second": (edit("result", "images_per_second", to=times(2)), "images_per_second is"),
    "evaluation": (edit("result", "eval_seconds", to=times(9)), "eval_seconds is"),
    "stall": (edit("result", "data_stall_percent", to=140.0), "data_stall_percent is 140"),
    "parameters": (edit("result", "parameters", to=0), "parameters is 0"),
    "memory": (edit("result", "memory", "rss_mib", "value", to=-5.0), "rss_mib is -5"),
    "allocator": (lambda r: r["result"]["memory"].update(torch_allocated_mib={"value": 9.0, "reason": None},
                                                         torch_reserved_mib={"value": 8.0, "reason": None}),
                  "torch_allocated_mib is 9, above torch_reserved_mib 8"),
    "batch": (edit("result", "batch_size", to=64), "batch_size 64"),
    "workers": (edit("result", "workers", to=2), "workers 2: its specification has 1"),
    "dates": (edit("finished_at", to="2020-01-01T00:00:00Z"), "before it began"),
    "too short": (lambda r: r.update(finished_at=r["started_at"]), "from its start to its end"),
    "duration": (edit("spec", "recipe", "duration", to=30), "10 epochs of the 30 that its recipe trains"),
    "broken": (lambda r: r.pop("status"), "record.json is broken: status"),
}  # fmt: skip

EPOCH_EDITS: dict[str, tuple[Callable[[list[Json]], Any], str]] = {
    "an epoch's error": (lambda e: e[-1].update(error=0.0), "final_error is"),
    "an epoch's seconds": (lambda e: e[3].update(train_seconds=0.1), "images in 0.1 s are not"),
    "an epoch's loss": (lambda e: e[3].update(loss=-1.0), "loss is -1"),
    "an epoch's waiting": (
        lambda e: e[3].update(data_stall_seconds=99.0),
        "data_stall_seconds is 99, above train_seconds",
    ),
    "an epoch's images": (lambda e: e[3].update(images=10**6), "1000000 images in 12 steps of 128"),
    "an epoch's rate": (lambda e: e[3].update(images_per_second=9e9), "are not 9e+09 a second"),
    "an untimed epoch": (lambda e: e[3].update(timed=False) or e[4].update(timed=False), "epoch_seconds is"),
    "the last epoch cut": (lambda e: e.pop(), "9 epochs of the 10"),
    "an epoch in the middle cut": (lambda e: e.pop(4), "9 of them"),
    "an epoch doubled": (lambda e: e.append({**e[-1], "epoch": 11}), "11 epochs of the 10"),
    "all epochs cut": (lambda e: e.clear(), "no epochs: epochs.jsonl is missing or empty"),
}
FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no epochs": (lambda f: (f / EPOCHS).unlink(), "no epochs: epochs.jsonl is missing"),
    "a broken line": (lambda f: (f / EPOCHS).write_text("{}\n{}\n"), "epochs.jsonl cannot be read"),
    "another folder": (lambda f: f.rename(f.with_name("mine")), "is called mine"),
    "no record": (lambda f: (f / RECORD).unlink(), "it has no record.json"),
}
HASHED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights changed": (lambda f: (f / WEIGHTS).write_bytes(b"other"), "weights.safetensors is not as it was stored"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "weights.safetensors is missing"),
    "hashes broken": (lambda f: (f / HASHES).write_text("["), "hashes.json cannot be read"),
    "device": (lambda f: change_record(f, edit("result", "device", to="H100")), "record.json is not as it was stored"),
    "version": (lambda f: change_record(f, edit("environment", "commit", to="0")), "record.json is not as it was stored"),
    "learning rates": (lambda f: change_epochs(f, lambda e: e[0].update(lr=0.2)), "epochs.jsonl is not as it was stored"),
}  # fmt: skip


def change_record(folder: Path, change: Callable[[Json], Any]) -> None:
    record = json.loads((folder / RECORD).read_text())
    change(record)
    (folder / RECORD).write_text(json.dumps(record))


def change_epochs(folder: Path, change: Callable[[list[Json]], Any]) -> None:
    epochs = [json.loads(line) for line in (folder / EPOCHS).read_text().splitlines()]
    change(epochs)
    (folder / EPOCHS).write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))


def check(runs: Path, capsys: Any) -> tuple[int, str]:
    code, out, err = harness(f"verify {runs}", capsys)
    assert err == ""
    return code, out


def find(runs: Path) -> str:
    loaded = load_records([runs])
    found = verify(loaded.records, lambda spec: RunSpec.from_json(dict(spec)).key)
    return "\n".join(map(str, [*loaded.problems, *found]))


def test_untouched_runs(runs: Path, capsys: Any) -> None:
    assert check(runs, capsys) == (0, "3 runs verified, 0 findings\n")
    one = min(runs.iterdir())
    assert check(one, capsys) == (0, "1 run verified, 0 findings\n")
    for path in runs.glob(f"*/{HASHES}"):
        path.unlink()
    code, out = check(runs, capsys)
    assert code == 0
    assert "3 of them have no hash stored" in out


CASES = (
    [(name, words, lambda f, c=change: change_record(f, c)) for name, (change, words) in RECORDS.items()]
    + [(name, words, lambda f, c=change: change_epochs(f, c)) for name, (change, words) in EPOCH_EDITS.items()]
    + [(name, words, change) for name, (change, words) in FILES.items()]
)


def test_every_planted_edit_is_found(runs: Path, tmp_path: Path) -> None:
    """Without hashes by what contradicts itself; with them, whatever it is."""
    assert len(CASES) + len(HASHED) >= 50
    missed = []
    for hashed in (False, True):
        for name, words, change in CASES + ([(n, w, c) for n, (c, w) in HASHED.items()] if hashed else []):
            copy = shutil.copytree(runs, tmp_path / re.sub(r"\W", "-", f"{hashed} {name}"))
            folder = sorted(copy.iterdir())[1]
            if not hashed:
                (folder / HASHES).unlink()
            change(folder)
            if words not in (found := find(copy)):
                missed.append((name, hashed, found))
    assert not missed, missed


def test_a_run_copied_as_another_seed_is_found(runs: Path, capsys: Any) -> None:
    """Even where its key, name and seed were changed with it, and no file is left as it was hashed."""
    folder = sorted(runs.iterdir())[0]
    record = json.loads((folder / RECORD).read_text())
    record["seed"] = record["spec"]["seed"] = 7
    record["key"] = RunSpec.from_json(record["spec"]).key
    record["name"] = re.sub(r"_s\d+_.*", f"_s7_{record['key'][:8]}", record["name"])
    copy = shutil.copytree(folder, runs / record["name"])
    (copy / HASHES).unlink()
    (copy / RECORD).write_text(json.dumps(record))
    code, out = check(runs, capsys)
    assert code == 1
    assert f"{copy}: its losses and errors are those of {folder}, epoch for epoch" in out
    change_epochs(copy, lambda epochs: [epoch.update(loss=epoch["loss"] + 0.001) for epoch in epochs])
    assert f"its seconds are those of {folder}, epoch for epoch" in check(runs, capsys)[1]


def test_copies_are_verified_too(runs: Path, tmp_path: Path, capsys: Any) -> None:
    copy = shutil.copytree(runs, tmp_path / "copy")
    change_record(sorted(copy.iterdir())[0], edit("result", "final_error", to=0.0))
    code, out, _ = harness(f"verify {runs} {copy}", capsys)
    assert (code, "final_error is 0.0" in out, "6 runs verified" in out) == (1, True, True), out


@pytest.mark.parametrize("command", ["verify", "export"])
def test_where_no_run_is_nothing_is_right(command: str, tmp_path: Path, capsys: Any) -> None:
    code, out, err = harness(f"{command} {tmp_path}", capsys)
    assert (code, out, err) == (2, "", f"harness: error: no runs in {str(tmp_path)!r}: `harness run` makes some\n")


def test_an_unreadable_file_is_a_finding(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "harness.results.store.hash_file", Mock(side_effect=PermissionError(13, "Permission denied"))
    )
    assert f"{WEIGHTS} cannot be read: Permission denied" in find(runs)


def test_the_weights_of_runs_at_a_uri_stay_there(
    runs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    assert harness(f"verify file://{runs}", capsys)[1] == "3 runs verified, 0 findings\n"


def test_a_folder_that_does_not_exist(tmp_path: Path, capsys: Any) -> None:
    code, out, err = harness(f"verify {tmp_path / 'nowhere'}", capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_figures_that_follow_from_epochs() -> None:
    """Two timed epochs of three, and a run whose epochs were all disturbed: the figures by hand."""
    rows = load_epochs(next(SAMPLE.glob("digits_*")))[:3]
    values = zip(rows, (9.0, 1.0, 3.0), (8.0, 6.0, 7.0), (0.3, 0.1, 0.5), strict=True)
    first, *rest = [
        row.model_copy(update={"train_seconds": s, "error": e, "eval_seconds": v, "images": 60, "timed": True})
        for row, s, e, v in values
    ]
    first = first.model_copy(update={"timed": False, "untimed": "warm-up"})
    known = {"final_error": 7.0, "best_error": 6.0, "best_epoch": 2, "train_seconds": 13.0, "eval_seconds": 0.3}
    timed = summarise_epochs([first, *rest])
    assert timed == {**known, "final_top5_error": None, "epoch_seconds": 2.0, "images_per_second": 30.0}
    disturbed = {"timed": False, "untimed": "interference: swapping"}
    assert summarise_epochs([first, *(row.model_copy(update=disturbed) for row in rest)]) == timed
    none = summarise_epochs([first])
    assert (none["epoch_seconds"], none["images_per_second"]) == (None, None)
