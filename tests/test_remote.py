"""Results at a URI: sent as they are made, brought back where the local folder is lost. file:// stands for s3://."""

from __future__ import annotations

import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command import harness
from processes import Command

from harness.preflight import answer
from harness.results import remote as storage
from harness.results.remote import Remote, StorageError
from harness.results.store import load_epochs, load_records
from harness.spec import RunPaths

ROOT = Path(__file__).resolve().parent.parent


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_is_a_uri() -> None:
    assert [storage.is_uri(word) for word in ("s3://b/runs", "gs://b", "file:///x", "runs", "/a:b//c", "C:/runs")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
    assert storage.join_uri("s3://b/runs/?region=x", ".ray") == "s3://b/runs/.ray?region=x"
    one, other = (storage.cache_folder(uri, Path("/c")) for uri in ("s3://a/runs", "s3://b/runs"))
    assert one != other
    assert one.name.startswith("runs-")


@pytest.mark.parametrize("uri", ["nonsense://bucket/runs", "file:///proc/no/such", "s3://"])
def test_a_uri_that_cannot_be_is_one_line(uri: str, tmp_path: Path, capsys: Any) -> None:
    code, _, err = harness(f"run --out {uri} --dataset digits --gpus 0", capsys)
    assert code == 2
    assert err.startswith(f"harness: error: --out {uri}")
    assert len(err.splitlines()) == 1


def test_a_run_is_sent_whole_and_brought_back(tmp_path: Path) -> None:
    there, uri = tmp_path / "bucket", (tmp_path / "bucket").as_uri()
    here = write(
        tmp_path / "here" / "run.partial", spec_json="{}", checkpoints__epoch1_pt="1", checkpoints__epoch2_pt="2"
    )
    (here / "checkpoints" / "epoch3.tmp").write_text("half")
    storage.push_run(uri, here, checkpoints=True)
    sent = there / "run.partial"
    assert names(sent) == {"spec.json", "checkpoints/epoch1.pt", "checkpoints/epoch2.pt"}

    (here / "checkpoints" / "epoch1.pt").unlink()
    write(here, checkpoints__epoch3_pt="3")
    written = (sent / "spec.json").stat().st_ctime_ns
    storage.push_run(uri, here, checkpoints=True)
    assert names(sent) == {"spec.json", "checkpoints/epoch2.pt", "checkpoints/epoch3.pt"}
    assert (sent / "spec.json").stat().st_ctime_ns == written, "what has arrived is not sent again"

    write(here, checkpoints__epoch1_pt="old", checkpoints__epoch4_pt="new", checkpoints__epoch3_pt="changed")
    storage.pull_run(uri, here, only=storage.CHECKPOINTS)
    assert names(here / "checkpoints") >= {"epoch2.pt", "epoch3.pt"}
    assert not names(here / "checkpoints") & {"epoch1.pt", "epoch4.pt"}, "other nodes do not know them either"
    assert (here / "checkpoints" / "epoch3.pt").read_text() == "3"

    other = tmp_path / "other node" / "run.partial"
    Remote(uri, pytest.fail).copy(partial(storage.pull_run, only=storage.CHECKPOINTS), other)
    assert names(other) == {"checkpoints/epoch2.pt", "checkpoints/epoch3.pt"}


def test_checkpoints_of_an_outage_until_the_end_are_kept_and_sent(tmp_path: Path) -> None:
    """The store was away from epoch 3 on: by the next command rank 0 sends what it has, and older ones count no more."""
    there, uri = tmp_path / "bucket", (tmp_path / "bucket").as_uri()
    for sent in ("2", ""):
        write(there / "run.partial", **{f"checkpoints__epoch{sent}_pt": sent} if sent else {"spec_json": "{}"})
        here = write(tmp_path / f"here{sent}" / "run.partial", checkpoints__epoch5_pt="5", checkpoints__epoch6_pt="6",
                     checkpoints__epoch1_pt="1")  # fmt: skip
        (here / "checkpoints" / "epoch7.tmp").write_text("half")
        storage.pull_run(uri, here)
        newer = {"epoch5.pt", "epoch6.pt"} | ({"epoch2.pt"} if sent else {"epoch1.pt"})
        assert names(here / "checkpoints") == names(there / "run.partial" / "checkpoints") == newer
        shutil.rmtree(there)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://AKIA:wJalr%2Fx@bucket/runs", "s3://bucket/runs"),
        ("Cannot open 's3://AKIA:key@bucket'", "Cannot open 's3://bucket'"),
        ("s3://b/r?region=eu&secret_key=abc&access_key=d", "s3://b/r?region=eu&secret_key=...&access_key=..."),
        ("--out=gs://b/r@2", "--out=gs://b/r@2"),
        ("user@host", "user@host"),
    ],
)
def test_keys_in_a_uri_are_never_shown(text: str, shown: str) -> None:
    assert storage.redact(text) == shown


def test_keys_are_neither_printed_nor_stored(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run to a URI with keys in it, where a folder stands for the bucket."""
    opened: list[str] = []

    @contextmanager
    def open_folder(uri: str) -> Iterator[Any]:
        opened.append(uri)
        yield storage._local(tmp_path / "bucket")

    monkeypatch.setattr(storage, "_open", open_folder)
    uri = "s3://AKIAKEY:SECRETKEY@bucket/runs"
    code, out, err = harness(
        f"run --dataset digits --depths 8 --limit-train 64 --epochs 1 --gpus 0 --loader resident --launcher local --out {uri}",
        capsys,
    )
    assert (code, set(opened)) == (0, {uri, f"{uri}/.leases"})
    (record,) = (tmp_path / "bucket").glob("*/record.json")
    page = (tmp_path / "bucket" / "report.html").read_text()
    card = record.with_name("README.md").read_text()
    for text in (out, err, record.read_text(), card, page):
        assert not {"AKIAKEY", "SECRETKEY"} & set(re.findall(r"[A-Z]+KEY", text))
    assert "s3://bucket/runs" in record.read_text()

    def refuse(uri: str) -> Any:
        raise StorageError(f"{uri}: access denied")

    monkeypatch.setattr("harness.plan.check_uri", refuse)
    code, _, err = harness(f"run --dataset digits --gpus 0 --out {uri}", capsys)
    assert (code, err) == (2, "harness: error: --out s3://bucket/runs: access denied\n")


def test_a_finished_run_replaces_its_partial_one_and_keeps_the_one_before(tmp_path: Path) -> None:
    there, uri = tmp_path / "bucket", (tmp_path / "bucket").as_uri()
    write(there / "run.partial", spec_json="{}")
    here = write(tmp_path / "run", record_json="1", weights_safetensors="w")
    storage.push_finished(uri, here)
    assert names(there) == {"run/record.json", "run/weights.safetensors"}
    storage.push_finished(uri, here)
    assert names(there) == {"run/record.json", "run/weights.safetensors"}, "the same run twice is one"
    write(here, record_json="2")
    storage.push_finished(uri, here)
    old = {name for name in names(there) if name.startswith(".superseded/run_")}
    assert len(old) == 2
    assert names(there) - old == {"run/record.json", "run/weights.safetensors"}
    assert {(there / name).read_text() for name in old} == {"1", "w"}


def test_tables_need_records_alone_and_what_did_not_arrive_is_sent(tmp_path: Path) -> None:
    there, uri, here = tmp_path / "bucket", (tmp_path / "bucket").as_uri(), tmp_path / "stage"
    write(there / "a", record_json="a", epochs_jsonl="", weights_safetensors="large")
    write(there / "b.partial", spec_json="{}", checkpoints__epoch1_pt="1")
    write(there / "half", weights_safetensors="its record is still on its way")
    write(here / "a.partial", spec_json="{}")
    write(here / "c", record_json="c", weights_safetensors="w")
    write(here / "gone", record_json="removed there")
    storage.pull_results(uri, here)
    assert names(here) == {
        "a/record.json", "a/epochs.jsonl", "b.partial/spec.json", "c/record.json", "c/weights.safetensors",
    }  # fmt: skip
    assert names(there / "c") == {"record.json", "weights.safetensors"}


def test_a_run_that_ends_while_tables_are_made_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each moment of the pull, its command sends it and removes its partial folder."""
    copy, moments = storage._Folder.copy, 0
    while True:
        there, uri, here = (base := tmp_path / f"{moments}") / "bucket", (base / "bucket").as_uri(), base / "stage"
        write(there / "a.partial", spec_json="{}", epochs_jsonl="1")
        write(there / "b", record_json="b", epochs_jsonl="")
        ended = write(base / "a", record_json="a", epochs_jsonl="12", weights_safetensors="w")
        left = [moments]

        def copy_and_end(*args: Any, uri: str = uri, ended: Path = ended, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == -1:
                storage.push_finished(uri, ended)
            copy(*args)

        monkeypatch.setattr(storage._Folder, "copy", copy_and_end)
        storage.pull_results(uri, here)
        monkeypatch.setattr(storage._Folder, "copy", copy)
        seen = {name for name in names(here) if not name.startswith("a.partial/")} - {
            "b/record.json",
            "b/epochs.jsonl",
        }
        assert seen in (set(), {"a/record.json", "a/epochs.jsonl"})
        storage.pull_results(uri, here)
        assert left[0] >= 0 or not (here / "a.partial").exists()
        if left[0] >= 0:
            break
        moments += 1
    assert moments == 4


def test_a_run_that_is_trained_again_keeps_its_checkpoints_here(tmp_path: Path) -> None:
    """By --force: the result of before is at the URI, and so is what has been trained since."""
    there, here = tmp_path / "bucket", tmp_path / "stage"
    write(there / "a", record_json="a")
    write(there / "a.partial", spec_json="{}")
    write(here / "a.partial", spec_json="{}", checkpoints__epoch2_pt="2")
    storage.pull_results(there.as_uri(), here)
    assert names(here) == {"a/record.json", "a.partial/spec.json", "a.partial/checkpoints/epoch2.pt"}


def test_a_store_that_is_away_for_a_while_costs_no_run(tmp_path: Path) -> None:
    blocked = tmp_path / "bucket"
    blocked.write_text("not a folder")
    here = write(tmp_path / "run.partial", spec_json="{}")
    said: list[str] = []
    remote = Remote(blocked.as_uri(), said.append)
    assert not remote.push(storage.push_run, here)
    assert said[0].startswith("not stored: file:///")
    with pytest.raises(StorageError):
        remote.copy(storage.push_run, here)
    assert Remote("", pytest.fail).push(pytest.fail, here)


def test_every_node_is_asked_whether_it_reaches_the_uri(tmp_path: Path) -> None:
    uri = (tmp_path / "bucket").as_uri()
    paths = RunPaths(out=tmp_path / "stage", remote=uri)
    question: dict[str, Any] = {"paths": paths, "dataset": "digits", "sentinel": ".marker", "clock": time.time}
    storage.check_uri(uri)
    assert answer(**question)["out"] == "another folder, or none"
    storage.leave_sentinel(uri, ".marker")
    assert answer(**question)["out"] in storage.find_sentinels(uri, ".marker-")
    storage.remove_sentinels(uri, ".marker")
    assert storage.find_sentinels(uri, ".") == []


RUN = "run --dataset digits --depths 8 --limit-train 128 --epochs 5 --gpus 0 --loader resident --launcher local --out"


@pytest.mark.parametrize("at_uri", [True, False])
def test_what_another_command_finishes_meanwhile_is_not_trained_again(
    at_uri: bool, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While this one waits for its lease: in the folder, or at the URI, where another machine has sent it."""
    other, out = tmp_path / "other", tmp_path / "out"
    assert harness(f"{RUN} {other}", capsys)[0] == 0

    def wait(*_: Any) -> None:
        shutil.copytree(other, out, dirs_exist_ok=True)

    monkeypatch.setattr("harness.commands.run.lease", wait)
    code, said, err = harness(f"{RUN} {out.as_uri() if at_uri else out}", capsys)
    assert (code, err) == (0, "")
    assert "epoch 1/" not in said
    assert "done already" in said
    assert len(load_records([out]).records) == 1
    assert not list(out.glob("*.partial"))


def test_killed_and_its_local_folder_lost_a_run_goes_on_from_the_uri(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, cache = tmp_path / "bucket", tmp_path / "cache"
    monkeypatch.setenv("HARNESS_CACHE", str(cache))
    killed = Command(f"{RUN} {there.as_uri()}")
    killed.send_signal_at("epoch 3/", signal.SIGKILL)
    assert killed.wait(60)[0] == -signal.SIGKILL
    (partial,) = there.glob("*.partial")
    assert len(list((partial / "checkpoints").glob("*.pt"))) == 2
    shutil.rmtree(cache / "remote")

    code, out, err = harness(f"{RUN} {there.as_uri()}", capsys)
    assert code == 0, err
    assert "goes on after epoch" in out
    assert f"stored in {there.as_uri()}" in out.replace("\n", "")
    (stored,) = load_records([there]).records
    assert stored.record.result is not None
    assert stored.record.result.attempts == 2
    assert names(stored.folder) >= {"record.json", "epochs.jsonl", "weights.safetensors", "attempts.jsonl"}
    assert not list(there.glob("*.partial"))
    assert (there / "report.html").is_file()
    code, _, err = harness(f"{RUN} {tmp_path / 'plain'}", capsys)
    assert code == 0, err
    (plain,) = load_records([tmp_path / "plain"]).records
    assert [row.loss for row in load_epochs(stored.folder)] == [row.loss for row in load_epochs(plain.folder)]

    shutil.rmtree(cache / "remote")
    began = time.monotonic()
    code, out, _ = harness(f"report {there.as_uri()} --format csv", capsys)
    assert (code, len(out.splitlines())) == (0, 2)
    assert time.monotonic() - began < 60
    code, out, _ = harness(f"why he2015-8 {there.as_uri()}", capsys)
    assert "5 epochs" in out or "timed" in out
