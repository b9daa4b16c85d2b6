"""Results at a URI (s3://, gs://, whatever pyarrow opens): worked on in a local folder, kept in step with it there.

The local folder is a stage that may be lost at any moment; what counts is what has arrived. A file is sent whole or
not at all, `record.json` as the last one of a finished run, and a partial run goes only after the finished one has
arrived. pyarrow is imported when it is used: reading local results needs none.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from harness.results.store import EPOCHS, ESTIMATES, PARTIAL, RECORD, SPEC, SUPERSEDED

CHECKPOINTS = "checkpoints"
SMALL = (RECORD, EPOCHS, SPEC, "attempts.jsonl")  # all that tables are made of
OBJECT_STORES = ("s3", "gcs", "abfs")  # without folders, and a file is there only when it is whole
CHUNK_BYTES = 8 * 2**20


class StorageError(RuntimeError):
    """A URI that cannot be used; the message is one line."""


def is_uri(text: str) -> bool:
    """Whether this names a place that is not a path: "s3://bucket/runs"."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) is not None


def join_uri(uri: str, name: str) -> str:
    """A folder below; options after "?" stay at the end."""
    place, mark, options = uri.partition("?")
    return f"{place.rstrip('/')}/{name}{mark}{options}"


def stage(uri: str, cache: Path) -> Path:
    """The local folder that stands for a URI, one for each."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", uri.partition("?")[0].rstrip("/").rpartition("/")[2]).strip("-.")
    return cache / "staging" / f"{name[:40] or 'results'}-{hashlib.sha256(uri.encode()).hexdigest()[:12]}"


@dataclass(frozen=True, slots=True)
class Place:
    """A folder at a URI, opened."""

    files: Any  # pyarrow.fs.FileSystem
    root: str

    def path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def listing(self, name: str = "") -> dict[str, Any]:
        """{"checkpoints/epoch-000001.pt": pyarrow.fs.FileInfo} of every file below `name`; empty where there is none."""
        from pyarrow.fs import FileSelector, FileType

        base = self.path(name)
        infos = self.files.get_file_info(FileSelector(base, allow_not_found=True, recursive=True))
        return {info.path.removeprefix(f"{base}/"): info for info in infos if info.type == FileType.File}

    def send(self, source: Path, name: str) -> None:
        """Write one file, whole or not at all."""
        target = self.path(name)
        if self.files.type_name in OBJECT_STORES:
            self._write(source, target)
            self._take_time(target, source)
            return
        parent = PurePosixPath(target).parent
        self.files.create_dir(str(parent), recursive=True)
        unfinished = str(parent / f".{PurePosixPath(target).name}.{os.getpid()}")
        self._write(source, unfinished)
        self.files.move(unfinished, target)
        self._take_time(target, source)

    def _take_time(self, target: str, local: Path) -> None:
        if (mtime_ns := self.files.get_file_info(target).mtime_ns) is not None:
            os.utime(local, ns=(mtime_ns, mtime_ns))

    def _write(self, source: Path, target: str) -> None:
        with source.open("rb") as file, self.files.open_output_stream(target) as stream:
            shutil.copyfileobj(file, stream, CHUNK_BYTES)

    def bring(self, name: str, target: Path, info: Any) -> None:
        """Copy one file here, whole or not at all, with the time at which it was written there."""
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}")
        with self.files.open_input_stream(self.path(name)) as stream, unfinished.open("wb") as file:
            shutil.copyfileobj(stream, file, CHUNK_BYTES)
        if info.mtime_ns is not None:
            os.utime(unfinished, ns=(info.mtime_ns, info.mtime_ns))
        unfinished.replace(target)

    def remove(self, name: str) -> None:
        """Remove a folder and all in it, if it is there."""
        for path in self.listing(name):
            with contextlib.suppress(FileNotFoundError):
                self.files.delete_file(self.path(f"{name}/{path}"))
        with contextlib.suppress(OSError):  # object stores have none
            self.files.delete_dir(self.path(name))


def _open(uri: str) -> Place:
    try:
        from pyarrow.fs import FileSystem
    except ImportError:
        raise StorageError(f"{uri} needs pyarrow: pip install pyarrow") from None
    with _told(uri):
        files, root = FileSystem.from_uri(uri)
    return Place(files, root.rstrip("/"))


@contextmanager
def _told(uri: str) -> Iterator[None]:
    """Whatever a file system raises, as one line that names the URI."""
    try:
        yield
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's errors are of these kinds
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StorageError(f"{uri.partition('?')[0]}: {first}") from None


def _same(info: Any, local: Path) -> bool:
    """Whether a file there and one here are the same: each copy takes over the other side's time, so that no two
    clocks are compared."""
    try:
        here = local.stat()
    except FileNotFoundError:
        return False
    return bool(info.size == here.st_size and info.mtime_ns == here.st_mtime_ns)


def check_uri(uri: str) -> None:
    """Raise StorageError unless files can be written there and removed."""
    place, name = _open(uri), f".write-{os.getpid()}-{os.urandom(4).hex()}"
    with _told(uri):
        if place.files.type_name not in OBJECT_STORES:
            place.files.create_dir(place.root, recursive=True)
        with place.files.open_output_stream(place.path(name)) as stream:
            stream.write(b"")
        place.files.delete_file(place.path(name))


def leave_sentinel(uri: str, name: str) -> None:
    """Write an empty file. Raises StorageError."""
    place = _open(uri)
    with _told(uri), place.files.open_output_stream(place.path(name)) as stream:
        stream.write(b"")


def find_sentinels(uri: str, prefix: str) -> list[str]:
    """Names of the files at the top that begin so. Raises StorageError."""
    from pyarrow.fs import FileSelector

    place = _open(uri)
    with _told(uri):
        infos = place.files.get_file_info(FileSelector(place.root, allow_not_found=True))
    return [info.base_name for info in infos if info.base_name.startswith(prefix)]


def remove_sentinels(uri: str, prefix: str) -> None:
    """Remove these files. Raises StorageError."""
    place = _open(uri)
    with _told(uri):
        for name in find_sentinels(uri, prefix):
            place.files.delete_file(place.path(name))


def pull_results(uri: str, folder: Path) -> None:
    """Make `folder` hold what tables are made of: records and epochs of every run there, predictions.

    A finished run that had not arrived when its command ended is sent now; a partial one that was finished since, by
    whatever machine, goes. Raises StorageError.
    """
    place = _open(uri)
    folder.mkdir(parents=True, exist_ok=True)
    with _told(uri):
        there = place.listing()
        runs = {parts[0] for name in there if len(parts := name.split("/")) > 1 and not parts[0].startswith(".")}
        whole = {run for run in runs if run.endswith(PARTIAL) or f"{run}/{RECORD}" in there}
        for name, info in there.items():
            run, _, file = name.partition("/")
            wanted = (run in whole and file in SMALL) or (run == ESTIMATES and file)
            if wanted and not _same(info, folder / name):
                place.bring(name, folder / name, info)
        for run in whole:
            if not run.endswith(PARTIAL):
                shutil.rmtree(folder / f"{run}{PARTIAL}", ignore_errors=True)
        for local in sorted(folder.glob(f"*/{RECORD}")):
            name = local.parent.name
            if not name.endswith(PARTIAL) and not name.startswith(".") and name not in whole:
                if (local.parent / "weights.safetensors").exists():
                    push_finished(uri, local.parent)
                else:  # removed there: what was brought of it is no run
                    shutil.rmtree(local.parent)


def pull_run(uri: str, folder: Path, *, only: str = "") -> None:
    """Make the local folder of a run what the URI's is, or what is below `only` in it. Raises StorageError.

    What is there counts, whatever is here. Checkpoints that never arrived are removed here: on other nodes they are not known either, and all ranks must
    begin with the same.
    """
    place, run = _open(uri), folder.name
    with _told(uri):
        there = place.listing(f"{run}/{only}" if only else run)
        there = {f"{only}/{name}" if only else name: info for name, info in there.items()}
        for name, info in there.items():
            if not _same(info, folder / name):
                place.bring(f"{run}/{name}", folder / name, info)
        for local in (folder / CHECKPOINTS).glob("*"):
            if f"{CHECKPOINTS}/{local.name}" not in there and not local.name.startswith("."):
                local.unlink(missing_ok=True)


def push_run(uri: str, folder: Path, *, last: str = RECORD, checkpoints: bool = False) -> None:
    """Send what is new in a folder, the file `last` after all others. Raises StorageError.

    `checkpoints`: those that are no longer here are removed there too; only the run's own rank 0 may say so.
    """
    place, run = _open(uri), folder.name
    with _told(uri):
        there = place.listing(run)
        local = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        local.sort(key=lambda path: path.name == last)
        names = {path.relative_to(folder).as_posix(): path for path in local if path.suffix != ".tmp"}
        for name, path in names.items():
            info = there.get(name)
            if info is None or not _same(info, path):
                place.send(path, f"{run}/{name}")
        for name in there if checkpoints else ():
            if name.startswith(f"{CHECKPOINTS}/") and name not in names:
                place.files.delete_file(place.path(f"{run}/{name}"))


def push_finished(uri: str, folder: Path) -> None:
    """Send a finished run, then remove its partial folder there. Another finished run of that name is kept in
    `.superseded`. Raises StorageError."""
    place, run = _open(uri), folder.name
    with _told(uri):
        there = place.listing(run)
        if RECORD in there:
            with place.files.open_input_stream(place.path(f"{run}/{RECORD}")) as stream:
                same = stream.read() == (folder / RECORD).read_bytes()
            if not same:
                old = f"{SUPERSEDED}/{run}_{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
                for name in there:
                    target = PurePosixPath(place.path(f"{old}/{name}"))
                    if place.files.type_name not in OBJECT_STORES:
                        place.files.create_dir(str(target.parent), recursive=True)
                    place.files.copy_file(place.path(f"{run}/{name}"), str(target))
                place.remove(run)
    push_run(uri, folder)
    with _told(uri):
        place.remove(f"{run}{PARTIAL}")


def push_file(uri: str, path: Path) -> None:
    """Send one file to the top. Raises StorageError."""
    place = _open(uri)
    with _told(uri):
        place.send(path, path.name)


@dataclass(frozen=True, slots=True)
class RemoteRun:
    """One partial run's folder and its likeness at a URI; without a URI it copies nothing."""

    uri: str
    folder: Path
    warn: Callable[[str], None]

    def bring(self, rank: int) -> None:
        """Before anything is read; on every rank, since each may be on a node of its own. Raises StorageError."""
        if self.uri:
            pull_run(self.uri, self.folder, only="" if rank == 0 else CHECKPOINTS)

    def send(self, *, must: bool = False) -> None:
        """After something was written, by rank 0. What does not arrive is said, and sent with what comes next; `must`
        raises StorageError instead."""
        if not self.uri:
            return
        try:
            push_run(self.uri, self.folder, checkpoints=True)
        except StorageError as error:
            if must:
                raise
            self.warn(f"not sent: {error}")
