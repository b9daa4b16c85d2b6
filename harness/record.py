"""RunResult, Failed or Pruned -> Record, and what the driver writes into a run's folder."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from harness.cluster.job import Failed, Started
from harness.models.variants import find_variant
from harness.plugins import needed_by, write_source
from harness.results import remote, store
from harness.results.identity import hash_code
from harness.results.remote import Remote, StorageError, pull_run, push_finished, push_run, redact
from harness.results.store import Stored
from harness.results.values import EpochMetrics, Failure, NodeUse, Pruned, Record, RunResult
from harness.spec import FULL, RunPaths, RunSpec, UserError, mistakes

ATTEMPTS = "attempts.jsonl"
CODE = ("harness", "models", "loaders", "cluster", "results", ":!results/records", "benchmarks/*.py")  # that runs
DALI_WHEELS = ("nvidia-dali-cuda120", "nvidia-dali-cuda130", "nvidia-dali-cuda110")
PACKAGES = ("resnet-harness", "torch", "torchvision", "ray", "numpy", "nvidia-ml-py", *DALI_WHEELS)
STATUSES: dict[type, Literal["done", "failed", "pruned"]] = {RunResult: "done", Failed: "failed", Pruned: "pruned"}


def installed_version(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return None


def describe_code() -> dict[str, Any]:
    """Commit, whether the packages differ from it, a hash of the code itself, versions, and the command line."""
    return {**_identify_code(), "command": ["harness", *map(redact, sys.argv[1:])]}


@cache
def _identify_code() -> dict[str, Any]:
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(root), *words]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            if (root / ".git").exists():  # an installed copy may lie inside another project's checkout
                done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
                return done.stdout.strip()
        return None

    status = git("status", "--porcelain", "--", *CODE)
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "code": hash_code(),
        "versions": {package: known for package in PACKAGES if (known := installed_version(package))},
    }


def name_other_code(record: Record) -> str | None:
    """The code that trained a run, where it is not this one: "commit 0123456"."""
    there = record.environment
    if there.get("code") == _identify_code()["code"]:
        return None
    if (commit := there.get("commit")) is not None:
        return f"commit {str(commit)[:7]}{' with uncommitted changes' if there.get('dirty') else ''}"
    versions = there.get("versions")
    return f"version {versions.get('resnet-harness')}" if isinstance(versions, dict) else "an unknown version"


def check_storage(failed: Failed) -> None:
    """Raise OSError where a run failed because a disk is full, StorageError where the store was away: it can go on later."""
    for number in FULL:
        if os.strerror(number) in failed.message:
            raise OSError(number, os.strerror(number))
    if failed.exception == StorageError.__name__:
        raise StorageError(failed.message)


def classify(failed: Failed) -> Failure:
    """A failure as one of the table's four kinds."""
    name, message = failed.exception, failed.message
    kinds: dict[str, Literal["NaN", "OOM"]] = {"DivergedError": "NaN", "MemoryError": "OOM"}
    if kind := "killed" if failed.died else "OOM" if "OutOfMemory" in name else kinds.get(name):
        return Failure(kind=kind, message=message, traceback=failed.traceback)
    return Failure(kind="exception", message=f"{name}: {message}", traceback=failed.traceback)


def lock_file(path: Path, busy: str) -> FileLock:
    """Lock a file against other commands. Raises UserError, with `busy` where one of them has locked it."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(busy) from None
    except OSError as error:
        raise UserError(f"{path} cannot be locked: {error.strerror}") from None
    return lock


def lock_run(spec: RunSpec, paths: RunPaths) -> FileLock:
    """Lock a run against other commands. Raises UserError where one of them is training it."""
    (locks := paths.out / ".locks").mkdir(exist_ok=True)
    busy = f"{spec.title} is being trained by another harness command in --out {paths.out}"
    return lock_file(locks / f"{paths.name(spec)}.lock", busy)


def lease(stack: contextlib.ExitStack, uri: str, names: Collection[str], say: Callable[[str], None]) -> None:
    """Until the stack closes, keep other machines from training runs, or a sweep, at a URI; of no effect without one. Raises
    UserError where one trains them."""
    with mistakes(StorageError, "--out "):
        stack.enter_context(remote.lease(uri, names, say))


@dataclass(slots=True)
class Recorder:
    """Keeps the folders of a command's runs, in `paths.out` and, where there is one, at the URI of the results."""

    paths: RunPaths
    original: bool  # the images are the published ones
    environment: dict[str, Any]  # of every record: the launcher, and what else is known beforehand
    warn: Callable[[str], None]
    warnings: tuple[str, ...] = ()  # of every result, known beforehand
    known: dict[Path, Stored] = field(default_factory=dict)  # finished runs that were read, by folder
    started: dict[str, datetime] = field(default_factory=dict)
    nodes: dict[str, list[NodeUse]] = field(default_factory=dict)
    added: dict[str, float] = field(default_factory=dict)  # by --until-ci: `Record.added_until`, by key
    classes: int | None = None  # of the data set
    remote: Remote = field(init=False)
    since: float = field(init=False)  # what was finished before is trained again by --force

    def __post_init__(self) -> None:
        lost = "not sent: {error}; it is kept in {path}, and the same command sends it"
        self.remote = Remote(self.paths.remote, self.warn, lost)
        with mistakes(ValueError, "HARNESS_FORCE_SINCE, in seconds since 1970: "):
            self.since = float(os.environ.get("HARNESS_FORCE_SINCE") or time.time())  # by cluster/slurm.sh

    def find_finished(self, specs: Iterable[RunSpec], *, force: bool = False) -> dict[str, RunResult]:
        """Read which of these runs are stored as finished; all results known by now, by key, with `force` only those since
        this command began, or the job that it is of."""
        keys = {self.paths.out / self.paths.name(spec): spec.key for spec in specs}
        folders = [folder for folder in keys if folder not in self.known and folder.is_dir()]
        for stored in store.load_records(folders).records:
            if stored.record.key == keys[stored.folder] and stored.record.result is not None:
                self.known[stored.folder] = stored
        since = self.since if force else 0.0
        known = [record for record, _ in self.known.values() if record.finished_at.timestamp() >= since]
        return {record.key: record.result for record in known if record.result is not None}

    def begin(self, spec: RunSpec, event: Started) -> list[EpochMetrics]:
        """Note that an attempt began; the epochs that are left of an earlier command."""
        folder, earlier = self.paths.partial(spec), []
        attempts, now = folder / ATTEMPTS, datetime.now(UTC)
        self.nodes[spec.key] = []
        if spec.key in self.started and event.attempt == 1:  # the same, with fewer workers
            return []
        try:
            if spec.key not in self.started:
                self.started[spec.key] = now
                try:
                    self.remote.copy(pull_run, folder)
                except StorageError as error:  # the run says so too, and others may go on
                    self.warn(f"{spec.title}: {error}")
                store.start(self.paths.out, self.paths.name(spec), spec.to_json())
                for source in needed_by(spec.plugins, self.paths.plugins):
                    write_source(source, folder / "plugins" / source.name)
                earlier = store.load_epochs(folder)
            reason = event.reason or "the command was given again" * attempts.exists()
            line: dict[str, Any] = {"started_at": now.isoformat(), "reason": reason}
            line |= {"workers": event.world_size} if event.world_size is not None else {}
            store.append_line(attempts, json.dumps(line))
        except OSError as error:  # the run says the same when it writes, and others may go on
            self.warn(f"{spec.title}: {error}")
        self.remote.push(push_run, folder)
        return earlier

    def end(self, spec: RunSpec, outcome: RunResult | Failed | Pruned, **environment: Any) -> bool:
        """`keep`, but an error is a warning, and False."""
        try:
            return self.keep(spec, outcome, **environment)
        except (OSError, StorageError) as error:
            self.warn(f"{spec.title} is not stored: {error}; the same command goes on from its last checkpoint")
            return False

    def keep(self, spec: RunSpec, outcome: RunResult | Failed | Pruned, **environment: Any) -> bool:
        """Store what a run came to. Returns whether it is a result and is stored at the URI too, if there is one. Raises
        OSError and StorageError."""
        folder, attempts, now = self.paths.partial(spec), list[dict[str, Any]](), datetime.now(UTC)
        noted = folder / ATTEMPTS
        for line in noted.read_text(encoding="utf-8").splitlines() if noted.exists() else ():
            with contextlib.suppress(ValueError):  # cut off by a kill
                attempts.append(json.loads(line))
        if isinstance(outcome, RunResult):
            nodes = tuple(sorted(self.nodes.get(spec.key, ()), key=lambda node: node.host))
            warnings = (*self.warnings, *outcome.warnings)
            known = {"nodes": nodes, "attempts": max(1, len(attempts)), "warnings": warnings}
            outcome = outcome.model_copy(update=known)
        record = Record(
            key=spec.key, name=self.paths.name(spec), status=STATUSES[type(outcome)],
            variant=spec.variant, depth=spec.network.depth, seed=spec.seed, spec=spec.to_json(),
            dataset=self.paths.label, original=self.original,
            result=outcome if isinstance(outcome, RunResult) else None,
            failure=classify(outcome) if isinstance(outcome, Failed) else None,
            pruned=outcome if isinstance(outcome, Pruned) else None,
            environment={**describe_code(), **self.environment, **environment, "attempts": attempts},
            added_until=self.added.get(spec.key),
            started_at=self.started.get(spec.key, now), finished_at=now,
        )  # fmt: skip
        if isinstance(outcome, RunResult):
            self.remote.copy(pull_run, folder)  # what rank 0 wrote on its node
            folder.mkdir(parents=True, exist_ok=True)
            about = ""
            # here: it would be a sixth of the start-up of commands that only plan
            from harness.results.report.page import CARD, make_card

            with contextlib.suppress(ValueError):  # a variant that is not known here
                variant = find_variant(spec.variant)(spec.network.depth)
                # the summary is of the recipe as it is declared
                about = f"{variant.source}." if spec.overrides else f"{variant.summary} ({variant.source})."
            store.write_atomic(folder / CARD, make_card(record, about=about, classes=self.classes))
            folder = store.finish(self.paths.out, record)
            self.known.pop(folder, None)  # of an earlier run, by --force
            return self.remote.push(push_finished, folder, patient=True)
        self.remote.push(push_run, store.finish(self.paths.out, record))
        return False
