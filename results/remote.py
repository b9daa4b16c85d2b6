"""Results at a URI (s3://, gs://, whatever pyarrow opens), worked on in a local cache folder.

The cache may be lost at any moment: what counts is what is stored at the URI. A file is copied whole or not at all,
`record.json` as the last one of a finished run, and a partial run is removed only after the finished one is stored.
pyarrow is imported when it is used: reading local results needs none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from harness.results.store import (
    EPOCHS,
    ESTIMATES,
    HASHES,
    PARTIAL,
    RECORD,
    SPEC,
    SUPERSEDED,
    SWEEPS,
    WEIGHTS,
    timestamp,
)

CHECKPOINTS = "checkpoints"
SMALL = (RECORD, EPOCHS, SPEC, HASHES, "attempts.jsonl")  # all that tables are made of
OBJECT_STORES = ("s3", "gcs", "abfs")  # without folders, and a file exists only when it is whole
AWAY_SECONDS, PAUSE_SECONDS = 60.0, 1.0  # a store that does not answer is asked again so long; the first pause
AWAY = re.compile(r"NETWORK|UNAVAILABLE|SLOW_DOWN|INTERNAL_FAILURE|curlCode|connect to|[Tt]ime(d |-)?out")
LEASES, LEASE_SECONDS, BEAT_SECONDS = ".leases", 60.0, 10.0  # until a sign of life is too old, between two of them


class StorageError(RuntimeError):
    """A URI that cannot be used; the message is one line."""


def is_uri(text: str) -> bool:
    """Whether this is a URI, "s3://bucket/runs", and not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) is not None


def redact(text: str) -> str:
    """A text without the keys and passwords of the URIs in it, to be shown or stored."""
    text = re.sub(r"(?<=://)[^/@\s'\"]*@", "", text)
    return re.sub(
        r"([?&][\w-]*(?:key|secret|token|password|credential)[\w-]*=)[^&\s'\"]*", r"\1...", text, flags=re.I
    )


def join_uri(uri: str, name: str) -> str:
    """A folder below; options after "?" stay at the end."""
    folder, mark, options = uri.partition("?")
    return f"{folder.rstrip('/')}/{name}{mark}{options}"


def split_uri(uri: str) -> tuple[str, str]:
    """The folder that something is in, and its name: the inverse of `join_uri`."""
    path, mark, options = uri.partition("?")
    folder, _, name = path.rstrip("/").rpartition("/")
    return f"{folder}{mark}{options}", name


def cache_folder(uri: str, cache: Path) -> Path:
    name = re.sub(r"[^A-Za-z0-9.]+", "-", redact(uri).partition("?")[0].rstrip("/").rpartition("/")[2]).strip("-.")
    return cache / "remote" / f"{name[:40] or 'results'}-{hashlib.sha256(redact(uri).encode()).hexdigest()[:12]}"


# --- files ---


@dataclass(frozen=True, slots=True)
class _Folder:
    """A folder of results; files are named by their paths in it, the same at the URI and in the cache."""

    files: Any  # pyarrow.fs.SubTreeFileSystem
    is_cache: bool = False

    @property
    def is_object_store(self) -> bool:
        return self.files.base_fs.type_name in OBJECT_STORES

    def list(self, name: str = "", *, recursive: bool = True) -> dict[str, Any]:
        """{"run/spec.json": pyarrow.fs.FileInfo} of every file below `name`; may be empty."""
        from pyarrow.fs import FileSelector

        infos = self.files.get_file_info(FileSelector(name, allow_not_found=True, recursive=recursive))
        return {info.path: info for info in infos if info.is_file}

    def make_parent(self, name: str) -> None:
        """Make the folder that a file will be in."""
        if not self.is_object_store:
            self.files.base_fs.create_dir(str(PurePosixPath(self.files.base_path, name).parent), recursive=True)

    def copy(self, name: str, target: _Folder, new_name: str = "") -> None:
        """Copy one file, whole or not at all. The cached copy gets the other's time, by which `copy_new` knows it."""
        from pyarrow.fs import copy_files

        path = PurePosixPath(new_name or name)
        unfinished = path if target.is_object_store else path.with_name(f".{path.name}.{os.getpid()}")
        target.make_parent(str(path))
        copy_files(name, str(unfinished), source_filesystem=self.files, destination_filesystem=target.files)
        if unfinished != path:
            target.files.move(str(unfinished), str(path))
        before, after = self.files.get_file_info([name])[0], target.files.get_file_info([str(path)])[0]
        if before.size != after.size:
            sizes = f"{after.size} bytes, not {before.size}"
            raise FileNotFoundError(f"{name} has {sizes}: it changed while it was copied")
        for folder, info, other in ((self, before, after), (target, after, before)):
            if folder.is_cache and other.mtime_ns is not None:
                os.utime(Path(folder.files.base_path, info.path), ns=(other.mtime_ns, other.mtime_ns))

    def copy_new(self, stored: Mapping[str, Any], target: _Folder, there: Mapping[str, Any]) -> None:
        """Copy the files that `target` has not, or has otherwise, by what `list` says; no two clocks are compared."""
        for name, info in stored.items():
            other = there.get(name)
            if other is None or (info.size, info.mtime_ns) != (other.size, other.mtime_ns):
                self.copy(name, target)

    def remove(self, name: str) -> None:
        """Remove a folder and all in it, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self.files.delete_dir(name)


@contextmanager
def _open(uri: str) -> Iterator[_Folder]:
    """The folder at a URI; whatever its file system raises, as one line that names the URI."""
    from pyarrow.fs import FileSystem, SubTreeFileSystem

    try:
        files, root = FileSystem.from_uri(uri)
        yield _Folder(SubTreeFileSystem(root, files))
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's errors are of these kinds
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StorageError(redact(f"{uri.partition('?')[0]}: {first}")) from None


def _local(folder: Path) -> _Folder:
    from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

    return _Folder(SubTreeFileSystem(str(folder.absolute()), LocalFileSystem()), is_cache=True)


# --- sentinels ---


def check_uri(uri: str) -> None:
    """Raise StorageError unless files can be written to the URI and removed."""
    name = f".write-{os.getpid()}-{os.urandom(4).hex()}"
    leave_sentinel(uri, name)
    remove_sentinels(uri, name)


def leave_sentinel(uri: str, name: str, content: bytes = b"") -> None:
    """Write a small file. Raises StorageError."""
    with _open(uri) as folder:
        folder.make_parent(name)
        with folder.files.open_output_stream(name) as stream:
            stream.write(content)


def find_sentinels(uri: str, prefix: str) -> list[str]:
    """Names of the files at the top that begin so. Raises StorageError."""
    with _open(uri) as folder:
        return [name for name in folder.list(recursive=False) if name.startswith(prefix)]


def remove_sentinels(uri: str, prefix: str) -> None:
    """Remove these files. Raises StorageError."""
    with _open(uri) as folder:
        for name in find_sentinels(uri, prefix):
            folder.files.delete_file(name)


# --- leases ---


@contextmanager
def lease(uri: str, names: Collection[str], say: Callable[[str], None]) -> Iterator[None]:
    """One command alone trains some runs at a URI: its file in `.leases` names them, and is written anew as long as it
    lives. Of no effect without a URI.

    How old such a file is, the store's clock says, and no machine's. Of two commands that begin at the same moment both
    may be refused. Raises StorageError.
    """
    if not uri:
        yield
        return
    leases, file, over = join_uri(uri, LEASES), f"{uuid.uuid4().hex}.json", threading.Event()
    about = {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "names": sorted(names)}
    renew = partial(leave_sentinel, leases, file, json.dumps(about).encode())

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            with contextlib.suppress(StorageError):  # away: nobody else can begin now
                renew()

    thread = threading.Thread(target=beat, daemon=True)
    try:
        renew()
        others = first = _find_others(leases, file, set(names))
        for _, host, name in list(first.values())[:1]:
            say(f"{host} has trained {name}: waiting for a sign of life, {LEASE_SECONDS:.0f} s at most")
        while others:
            time.sleep(BEAT_SECONDS / 2)
            renew()
            others = _find_others(leases, file, set(names))
            for _, host, name in (found for other, found in others.items() if found != first.get(other)):
                where = redact(uri).partition("?")[0]
                raise StorageError(f"{where}: {name} is being trained by another harness command, on {host}")
        thread.start()
        yield
    finally:
        over.set()
        if thread.is_alive():
            thread.join(BEAT_SECONDS)  # or it would write once more
        with contextlib.suppress(StorageError):
            remove_sentinels(leases, file)


def _find_others(leases: str, own: str, names: set[str]) -> dict[str, tuple[Any, str, str]]:
    """{file: (when it was written, host, run)} of other leases for one of these runs; those that are too old are removed."""
    found = {}
    with _open(leases) as folder:
        files = folder.list(recursive=False)
        now = files.pop(own).mtime_ns
        for file, info in files.items():
            with contextlib.suppress(FileNotFoundError), folder.files.open_input_stream(file) as stream:
                try:
                    about = json.loads(stream.read())
                except ValueError:  # it is being written, or never was
                    about = {"machine": "", "names": ()}
                ended = about["machine"] == _machine() and not Path("/proc", str(about["pid"])).exists()
                if ended or now - info.mtime_ns > LEASE_SECONDS * 1e9:
                    folder.files.delete_file(file)
                elif common := names & set(about["names"]):
                    found[file] = info.mtime_ns, about["host"], min(common)
    return found


def _machine() -> str:
    """Where process numbers mean the same: this boot of this kernel, this namespace of processes."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return uuid.uuid4().hex


# --- runs ---


def pull_file(uri: str, cache: Path) -> Path:
    """A local copy of one file, and of the record beside it. Raises StorageError."""
    parent, name = split_uri(uri)
    folder = cache_folder(parent, cache)
    with _open(parent) as remote:
        local, stored = _local(folder), remote.list(recursive=False)
        if name not in stored:
            raise FileNotFoundError(f"no file {name!r}")
        remote.copy_new({file: stored[file] for file in (name, RECORD) if file in stored}, local, local.list())
    return folder / name


def pull_results(uri: str, folder: Path, *, also: str = "", tries: int = 5) -> None:
    """Copy into `folder` what tables are made of: records and epochs of every run at the URI, predictions, sweeps; files
    of runs whose names begin with `also`.

    A finished run that was not stored when its command ended is pushed now; the cache's partial run of one that has
    been finished since, by whatever machine, is removed. Where files change meanwhile, as at a run's end, it begins again.
    Raises StorageError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _open(uri) as remote:
        cache, stored = _local(folder), remote.list()
        runs = {name.partition("/")[0] for name in stored if "/" in name and not name.startswith(".")}
        whole = {run for run in runs if run.endswith(PARTIAL) or f"{run}/{RECORD}" in stored}
        cached = cache.list()
        # a journal only grows: where the cache's is longer, the sweep was not sent when its command ended
        longer = {n for n in cached.keys() & stored if n.endswith(".log") and cached[n].size > stored[n].size}
        ahead = {name.rpartition("/")[0] for name in longer}

        def is_wanted(name: str) -> bool:
            folder, _, file = name.rpartition("/")
            if folder in whole:
                return file in SMALL or bool(also and file.startswith(also))
            return name.partition("/")[0] in (ESTIMATES, SWEEPS) and folder not in ahead

        try:
            remote.copy_new({name: info for name, info in stored.items() if is_wanted(name)}, cache, cached)
        except FileNotFoundError:
            if tries == 1:
                raise
            pull_results(uri, folder, also=also, tries=tries - 1)
            return
        for run in whole:
            if f"{run}{PARTIAL}" not in runs:  # else it is being trained again
                shutil.rmtree(folder / f"{run}{PARTIAL}", ignore_errors=True)
        for local in sorted(path.parent for path in folder.glob(f"[!.]*/{RECORD}")):
            if local.name in whole or local.name.endswith(PARTIAL):
                continue
            if (local / WEIGHTS).exists():
                push_finished(uri, local)
            else:  # removed at the URI: without its weights the cached copy is no run
                shutil.rmtree(local)


def pull_run(uri: str, folder: Path, *, only: str = "") -> None:
    """Make the local folder of a run equal to the URI's, or what is below `only` in it. Raises StorageError.

    The URI's files replace those of the cache. Checkpoints newer than all that it has were written while the store was
    away: it gets them now, unless `only` is given. All others that it does not have are removed: all ranks must begin
    with the same.
    """
    checkpoints = f"{folder.name}/{CHECKPOINTS}"
    with _open(uri) as remote:
        cache, stored = _local(folder.parent), remote.list(f"{folder.name}/{only}" if only else folder.name)
        remote.copy_new(stored, cache, cache.list(folder.name))
        newest = max((name for name in stored if name.startswith(f"{checkpoints}/")), default="")
        for name, info in sorted(cache.list(checkpoints).items()):
            if name in stored or info.base_name.startswith("."):
                continue
            if name > newest and info.extension == "pt" and not only:
                cache.copy(name, remote)
            else:
                (folder.parent / name).unlink(missing_ok=True)


def push_run(uri: str, folder: Path, *, checkpoints: bool = False) -> None:
    """Copy what is new in a folder to the URI, its record after all else. Raises StorageError.

    `checkpoints`: also remove those at the URI that are no longer in the folder; only the run's own rank 0 may.
    """
    with _open(uri) as remote:
        cache, stored = _local(folder.parent), remote.list(folder.name)
        files = sorted(cache.list(folder.name).items(), key=lambda item: item[1].base_name == RECORD)
        own = {n: info for n, info in files if "/." not in n and info.extension != "tmp"}
        cache.copy_new(own, remote, stored)
        for name in stored.keys() - own if checkpoints else ():
            if name.startswith(f"{folder.name}/{CHECKPOINTS}/"):
                remote.files.delete_file(name)


def push_finished(uri: str, folder: Path) -> None:
    """Copy a finished run to the URI, then remove its partial folder there. Another finished run of that name is kept
    in `.superseded`. Raises StorageError."""
    run, record, old = folder.name, f"{folder.name}/{RECORD}", f"{SUPERSEDED}/{folder.name}_{timestamp()}"
    with _open(uri) as remote:
        stored = remote.list(run)
        if record in stored:
            with remote.files.open_input_stream(record) as stream:
                same = stream.read() == (folder / RECORD).read_bytes()
            for name in () if same else stored:
                remote.copy(name, remote, old + name.removeprefix(run))
            if not same:
                remote.remove(run)
        push_run(uri, folder)
        remote.remove(f"{run}{PARTIAL}")


def push_file(uri: str, path: Path) -> None:
    """Copy one file to the top of the URI. Raises StorageError."""
    with _open(uri) as remote:
        _local(path.parent).copy(path.name, remote)


@dataclass(frozen=True, slots=True)
class Remote:
    """Where results are kept, too; without a URI nowhere. `warn` is given a line for what goes wrong there."""

    uri: str
    warn: Callable[[str], None]
    lost: str = "not stored: {error}"  # the line for a copy that was given up

    def copy(self, how: Callable[[str, Path], object], path: Path, *, patient: bool = True) -> None:
        """Copy by `pull_run`, `push_run` or another function above; if `patient`, again and again for AWAY_SECONDS while
        nothing answers there. Raises StorageError."""
        until, pause = time.monotonic() + AWAY_SECONDS * patient, PAUSE_SECONDS
        while self.uri:
            try:
                how(self.uri, path)
                return
            except StorageError as error:
                if not AWAY.search(str(error)) or time.monotonic() + pause > until:
                    raise
                if pause == PAUSE_SECONDS:
                    self.warn(f"{error}; trying again for {AWAY_SECONDS:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, 8 * PAUSE_SECONDS)

    def push(self, how: Callable[[str, Path], object], path: Path, *, patient: bool = False) -> bool:
        """`copy`, but a failure is a warning. Returns whether it succeeded."""
        try:
            self.copy(how, path, patient=patient)
        except StorageError as error:
            self.warn(self.lost.format(error=error, path=path))
            return False
        return True
