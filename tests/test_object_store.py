"""Results in an object store: every command against a real S3 server, which is away, refuses, or serves two machines."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import harness
from pyarrow.fs import S3FileSystem

from harness import api
from harness.results import remote
from harness.results.remote import Remote, StorageError, lease
from harness.results.store import load_epochs, load_records

pytest.importorskip("moto.server", reason="the S3 server of the tests: pip install 'moto[s3]' flask flask-cors")

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 4
TRAINING = f"--dataset digits --limit-train 128 --epochs {EPOCHS} --gpus 0 --loader resident"
RUN = f"run {TRAINING} --depths 8 --launcher local"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:not stored", "ignore:s3")


class Server:
    """moto's, in this process: what it stores outlasts its being away."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._make: Callable[[int], Any] = lambda port: ThreadedMotoServer("127.0.0.1", port, verbose=False)
        self._server = self._make(0)
        self._server.start()
        _, self.port = self._server.get_host_and_port()

    def go(self) -> None:
        self._server.stop()

    def come_back(self) -> None:
        self._server = self._make(self.port)
        self._server.start()

    def uri(self, folder: str, keys: str = "key:secret") -> str:
        where = f"scheme=http&endpoint_override=127.0.0.1%3A{self.port}&region=us-east-1"
        return f"s3://{keys}@bucket/{folder}?{where}"

    def files(self) -> S3FileSystem:
        where = f"127.0.0.1:{self.port}"
        return S3FileSystem(access_key="key", secret_key="secret", endpoint_override=where, scheme="http",
                            region="us-east-1", allow_bucket_creation=True)  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    made.files().create_dir("bucket")
    yield made
    made.go()


@pytest.fixture
def new_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Go on with an empty cache, as on another machine."""
    machines: list[Path] = []

    def make() -> Path:
        machines.append(tmp_path / f"machine {len(machines)}")
        monkeypatch.setenv("HARNESS_CACHE", str(machines[-1]))
        return machines[-1]

    make()
    return make


def start(line: str, *, beat_seconds: float = 10.0) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    code = f"from harness.results import remote; remote.BEAT_SECONDS = {beat_seconds}; from harness.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *line.split()],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_at(process: subprocess.Popen[str], text: str) -> None:
    """SIGKILL once the text was printed."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "".join(seen)


def result_of(folder: Path) -> Any:
    (stored,) = load_records([folder]).records
    assert stored.record.result is not None
    return stored, [row.loss for row in load_epochs(stored.folder)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the same run, undisturbed, in a folder."""
    out = tmp_path_factory.mktemp("plain")
    api.run(dataset="digits", limit_train=128, epochs=EPOCHS, gpus=0, loader="resident", depths=8, launcher="local",
            out=str(out))  # fmt: skip
    return result_of(out)[1]


@pytest.mark.long
def test_killed_it_goes_on_on_another_machine_and_every_command_takes_the_uri(
    server: Server, new_machine: Callable[[], Path], capsys: Any, plain: list[float], tmp_path: Path
) -> None:
    uri = server.uri("killed")
    kill_at(start(f"{RUN} --out {uri}"), "epoch 2/")
    new_machine()
    code, out, err = harness(f"{RUN} --out '{uri}'", capsys)
    assert (code, "goes on after epoch" in out) == (0, True), (out, err)
    assert "secret" not in out + err
    (cached,) = (new_machine().parent / "machine 1" / "remote").iterdir()
    stored, losses = result_of(cached)
    assert losses == plain
    assert stored.record.result.attempts == 2
    name = stored.record.name

    code, out, err = harness(f"report '{uri}' --format csv", capsys)
    assert (code, len(out.splitlines())) == (0, 2), err
    for words in (
        f"repro '{server.uri(f'killed/{name}')}'",
        f"repro {name} '{uri}'",
        f"repro {stored.record.key} '{uri}'",
    ):
        new_machine()
        code, out, err = harness(words, capsys)
        assert (code, "harness run --spec" in out) == (0, True), err
        assert "secret" not in out
    code, out, err = harness(f"repro nothing '{uri}'", capsys)
    assert (code, "no run 'nothing' among the 1" in err, "secret" in err) == (2, True, False)

    new_machine()
    weights = server.uri(f"killed/{name}/weights.safetensors")
    code, out, err = harness(f"eval --weights '{weights}' --dataset digits", capsys)
    assert code == 0, err
    assert f"{stored.record.result.final_error:.2f} %" in out
    code, _, err = harness(f"eval --weights '{server.uri(f'killed/{name}/nothing')}' --dataset digits", capsys)
    assert (code, len(err.splitlines()), "no file 'nothing'" in err, "secret" in err) == (2, 1, True, False)

    for exported in (1, 0):
        new_machine()
        code, out, err = harness(f"export '{uri}'", capsys)
        assert (code, out.startswith(f"{exported} run")) == (0, True), (out, err)
    events = [
        info.path for info in server.files().get_file_info(selector("bucket/killed")) if "tfevents" in info.path
    ]
    assert len(events) == 1
    code, out, err = harness(f"check --quick --out '{uri}'", capsys)
    assert "takes files" in out
    assert "secret" not in out


def selector(path: str) -> Any:
    from pyarrow.fs import FileSelector

    return FileSelector(path, recursive=True)


@contextlib.contextmanager
def away(server: Server, when: Callable[[], bool], seconds: float) -> Iterator[None]:
    """The server goes once `when` holds, and comes back that much later, or at the end."""
    over = threading.Event()

    def interrupt() -> None:
        while not when():
            time.sleep(0.01)
        server.go()
        over.wait(seconds)
        server.come_back()

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("epochs", [1, EPOCHS], ids=["in the middle", "at the end"])
@pytest.mark.long
def test_a_store_that_is_away_for_a_while_costs_nothing(
    server: Server, new_machine: Callable[[], Path], capsys: Any, plain: list[float], epochs: int
) -> None:
    uri, here = server.uri(f"away{epochs}"), new_machine()

    def reached() -> bool:
        return any(
            path.read_bytes().count(b"\n") >= epochs for path in here.glob("remote/*/*.partial/epochs.jsonl")
        )

    with away(server, reached, 8.0):  # pyarrow itself tries for six
        code, out, err = harness(f"{RUN} --out '{uri}'", capsys)
    assert code == 0, (out, err)
    assert "not s" in out or "trying again for 60 s" in out
    assert "secret" not in out + err
    new_machine()
    code, _, err = harness(f"report '{uri}' --format csv", capsys)
    assert code == 0, err
    (cached,) = (new_machine().parent / "machine 2" / "remote").iterdir()
    assert result_of(cached)[1] == plain


@pytest.mark.long
def test_a_store_that_stays_away_at_the_end_loses_no_epoch(
    server: Server,
    new_machine: Callable[[], Path],
    capsys: Any,
    plain: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "AWAY_SECONDS", 0.5)
    monkeypatch.setattr(remote, "LEASE_SECONDS", 1.0)  # the command's own stays, and its process is this one
    uri, here = server.uri("stays-away"), new_machine()

    def reached() -> bool:
        return any(
            path.read_bytes().count(b"\n") >= EPOCHS - 1 for path in here.glob("remote/*/*.partial/epochs.jsonl")
        )

    with away(server, reached, 300.0):
        code, out, err = harness(f"{RUN} --out '{uri}'", capsys)
    assert code == 1
    assert "the same command sends it" in out
    assert "Traceback" not in out + err
    code, out, err = harness(f"{RUN} --out '{uri}'", capsys)
    assert code == 0, (out, err)
    assert f"epoch {EPOCHS}/{EPOCHS} " not in out, "nothing is trained again"
    (cached,) = here.glob("remote/*")
    assert result_of(cached)[1] == plain


def test_refused_a_command_says_so_in_one_line_and_tables_can_be_read(
    server: Server, new_machine: Callable[[], Path], capsys: Any
) -> None:
    """A user who may read and not write; one whose keys are wrong; a bucket that is not there."""
    code, _, err = harness(f"{RUN} --epochs 1 --out '{server.uri('shared')}'", capsys)
    assert code == 0, err
    readers = make_reader(server)
    with guarded(server):
        for words, keys in [
            (RUN, readers),
            (RUN, "nobody:knows"),
            (f"tune {TRAINING} --search lr=choice(0.1,0.2)", readers),
        ]:
            new_machine()
            code, out, err = harness(f"{words} --out '{server.uri('shared', keys)}'", capsys)
            assert (code, len(err.splitlines())) == (2, 1), (out, err)
            assert err.startswith("harness: error: --out s3://bucket/shared: ")
            assert not {word for word in keys.split(":") if word in out + err}
        code, out, err = harness(f"report '{server.uri('shared', readers)}' --format csv", capsys)
        assert (code, len(out.splitlines())) == (0, 2), err
    code, _, err = harness(f"{RUN} --out '{server.uri('x').replace('bucket', 'no-bucket')}'", capsys)
    assert (code, len(err.splitlines())) == (2, 1), err


def make_reader(server: Server) -> str:
    """The keys of a user who may list and get, and no more."""
    import boto3

    iam = boto3.client("iam", endpoint_url=f"http://127.0.0.1:{server.port}", region_name="us-east-1",
                       aws_access_key_id="key", aws_secret_access_key="secret")  # fmt: skip
    iam.create_user(UserName="reader")
    allowed = {"Effect": "Allow", "Action": ["s3:Get*", "s3:List*", "s3:Head*"], "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
    iam.put_user_policy(UserName="reader", PolicyName="read", PolicyDocument=policy)
    made = iam.create_access_key(UserName="reader")["AccessKey"]
    return f"{made['AccessKeyId']}:{made['SecretAccessKey'].replace('/', '%2F').replace('+', '%2B')}"


@contextlib.contextmanager
def guarded(server: Server) -> Iterator[None]:
    """The server asks who somebody is, and what they may do."""
    import urllib.request

    def from_now_on(requests: str) -> None:
        url = f"http://127.0.0.1:{server.port}/moto-api/reset-auth"
        urllib.request.urlopen(
            urllib.request.Request(url, requests.encode(), {"Content-Type": "text/plain"})
        ).close()

    from_now_on("0")
    try:
        yield
    finally:
        from_now_on("inf")


@pytest.mark.long
def test_one_machine_alone_trains_a_run_at_a_uri(
    server: Server, new_machine: Callable[[], Path], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = server.uri("two")
    line = RUN.replace(f"--epochs {EPOCHS}", "--epochs 300") + f" --out {uri}"
    first = start(line, beat_seconds=1.0)
    assert first.stdout is not None
    while "epoch 1/" not in first.stdout.readline():
        assert first.poll() is None
    drain = threading.Thread(target=first.stdout.read, daemon=True)
    drain.start()
    new_machine()
    monkeypatch.setattr(remote, "BEAT_SECONDS", 1.5)
    monkeypatch.setattr(remote, "_machine", lambda: "another")
    code, out, err = harness(line.replace(uri, f"'{uri}'"), capsys)
    assert (code, len(err.splitlines())) == (2, 1), (out, err)
    assert "is being trained by another harness command, on" in err
    assert "secret" not in out + err
    (file,) = [info.path for info in server.files().get_file_info(selector("bucket/two/.leases")) if info.is_file]
    with server.files().open_input_stream(file) as stream:
        names = json.loads(stream.read())["names"]
    monkeypatch.setattr(remote, "LEASE_SECONDS", 10.0)
    first.kill()
    first.wait()
    drain.join()
    first.stdout.close()
    said = list[str]()
    with lease(uri, names, said.append):
        pass
    assert len(said) == 1, "it waits for a sign of life of the one that was killed, and for no longer"
    assert not [info for info in server.files().get_file_info(selector("bucket/two/.leases")) if info.is_file]


def test_a_lease_counts_by_the_stores_clock_and_ends_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder, whose times are exact."""
    monkeypatch.setattr(remote, "BEAT_SECONDS", 0.1)
    uri, said = tmp_path.as_uri(), list[str]()

    def take(*names: str) -> None:
        with lease(uri, names, said.append):
            pass

    with lease(uri, ["a", "b"], said.append):
        take("c")
        with pytest.raises(StorageError, match=r"b is being trained by another harness command, on "):
            take("b", "c")
        take("c")
    take("a")
    assert len(said) == 1
    (tmp_path / ".leases" / "old.json").write_text(
        json.dumps({"host": "h", "machine": remote._machine(), "pid": 2**22 + 1, "names": ["a"]})
    )
    with lease(uri, ["a"], pytest.fail):  # a process of this machine that is gone
        pass
    young, old = (tmp_path / ".leases" / name for name in ("young.json", "old.json"))
    young.touch()  # by a command that writes it just now, or that was killed meanwhile
    old.touch()
    os.utime(old, (time.time() - 1000,) * 2)
    with lease(uri, ["a"], pytest.fail):
        assert not old.exists()
    young.unlink()
    assert not list((tmp_path / ".leases").iterdir())


@pytest.mark.long
def test_a_killed_search_goes_on_on_another_machine(
    server: Server, new_machine: Callable[[], Path], capsys: Any
) -> None:
    uri = server.uri("search")
    line = f"tune {TRAINING} --depth 8 --search lr=choice(0.05,0.1,0.2,0.4) --concurrent 1 --scheduler none --out"
    kill_at(start(f"{line} {uri}"), "trial 1/4: finished")
    new_machine()
    code, _, err = harness(f"tune --resume nothing --out '{uri}'", capsys)
    assert code == 2
    sweeps = {info.path.split("/")[3] for info in server.files().get_file_info(selector("bucket/search/tune"))}
    (name,) = sweeps
    assert f"(allowed: {name})" in err or "did you mean" in err
    code, out, err = harness(f"tune --resume {name} --out '{uri}'", capsys)
    assert code == 0, (out, err)
    assert "4 trials" in out
    assert f"stored in s3://bucket/search/tune/{name}" in out
    assert "secret" not in out + err
    machine = new_machine()
    code, out, err = harness(f"report '{uri}' --format csv", capsys)
    assert code == 0, err
    (cached,) = (machine / "remote").iterdir()
    trials = json.loads((cached / "tune" / name / "trials.json").read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["finished"] * 4
    assert len(load_records([cached]).records) == 4
    assert (cached / "tune" / name / "winner.json").is_file()


def test_a_journal_that_was_not_sent_is_not_replaced(tmp_path: Path) -> None:
    there, here = tmp_path / "bucket", tmp_path / "here"
    for folder, text in ((there, "1\n"), (here, "1\n2\n")):
        (folder / "tune" / "sweep").mkdir(parents=True)
        (folder / "tune" / "sweep" / "journal.log").write_text(text)
        (folder / "tune" / "sweep" / "trials.json").write_text(text)
    remote.pull_results(there.as_uri(), here)
    assert (here / "tune" / "sweep" / "trials.json").read_text() == "1\n2\n"
    shutil.copytree(there / "tune", there / "tune" / "x")
    (there / "tune" / "sweep" / "journal.log").write_text("1\n2\n3\n")
    remote.pull_results(there.as_uri(), here)
    assert (here / "tune" / "sweep" / "journal.log").read_text() == "1\n2\n3\n"


def test_what_may_pass_is_tried_again_and_what_does_not_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.01)
    said, tries = list[str](), list[str]()
    storage = Remote("s3://b", said.append, "given up: {error}")

    def act(uri: str, path: Path) -> None:
        tries.append(uri)
        if errors:
            raise StorageError(f"{uri}: AWS Error {errors.pop(0)} during PutObject")

    errors = ["NETWORK_CONNECTION"] * 2
    storage.copy(act, Path())
    assert said == ["s3://b: AWS Error NETWORK_CONNECTION during PutObject; trying again for 60 s"]
    assert len(tries) == 3
    errors = ["ACCESS_DENIED"]
    with pytest.raises(StorageError, match="ACCESS_DENIED"):
        storage.copy(act, Path())
    errors = ["NETWORK_CONNECTION"]
    assert not storage.push(act, Path())
    assert len(tries) == 5
    assert said[1:] == ["given up: s3://b: AWS Error NETWORK_CONNECTION during PutObject"]
    assert storage.push(act, Path())
