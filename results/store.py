"""The store: one folder per run, and what is kept in it.

    <out>/<name>/            a finished run: record.json, epochs.jsonl, weights.safetensors, and hashes.json of them
    <out>/<name>.partial/    a run that is not finished: running, interrupted, failed or pruned by a search (the last
                             two have a record.json too)
    <out>/tune/<sweep>/      a search's settings and trials; each trial is a run like any other. <out>/<sweep>/ where <out>
                             is a folder "tune"
    <out>/.superseded/       finished runs that were run again
    <out>/.estimates/        predictions of probes, one file for all seeds of a run

`record.json` is written last, and only then does the folder get its final name. The epochs are in `epochs.jsonl`
alone, so that a table over thousands of runs reads one small file for each.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from harness.results.values import EpochMetrics, Prediction, Record, Timing, setting, timed_epochs

RECORD, EPOCHS, SPEC, WEIGHTS = "record.json", "epochs.jsonl", "spec.json", "weights.safetensors"
SWEEP = "sweep.json"  # of a search: its settings
HASHES = "hashes.json"  # file name -> SHA-256, for `harness verify`
PARTIAL, SUPERSEDED, SWEEPS, ESTIMATES = ".partial", ".superseded", "tune", ".estimates"


class Stored(NamedTuple):
    record: Record
    folder: Path


class Interrupted(NamedTuple):
    """A run without a record: running or stopped. `spec` is empty where the folder has none."""

    name: str
    folder: Path
    epochs: int  # done
    of: int | None
    spec: dict[str, Any]


class Problem(NamedTuple):
    """A folder that could not be read, and why, in one line."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Loaded(NamedTuple):
    """All runs under some paths, in the order of the paths and then of the names."""

    records: list[Stored]
    interrupted: list[Interrupted]
    problems: list[Problem]


def run_name(dataset: str, variant: str, depth: int, seed: int, key: str) -> str:
    """A folder name that a person can read: "cifar10-q75_msra-20_s0_1a2b3c4d". Safe in every file system."""

    def safe(word: str) -> str:
        return re.sub(r"[^A-Za-z0-9.+]+", "-", word).strip("-.")[:60] or "x"

    return f"{safe(dataset)}_{safe(variant)}{f'-{depth}' * bool(depth)}_s{seed}_{safe(key)[:8]}"


def sweeps_dir(out: Path) -> Path:
    """Where a folder of results keeps its searches."""
    return out if out.absolute().name == SWEEPS else out / SWEEPS


def partial_dir(out: Path, name: str) -> Path:
    return out / f"{name}{PARTIAL}"


def start(out: Path, name: str, spec: dict[str, Any]) -> Path:
    """Make the partial folder of a run, or reuse an existing one, and write its spec into it.

    Epochs and checkpoints of an interrupted run stay. The record of an earlier failure or pruning is kept beside them
    as `failed_<time>.json` or `pruned_<time>.json`: a running run has no record.
    """
    folder = partial_dir(out, name)
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / RECORD
    if record.exists():
        word = "pruned" if b'"status": "pruned"' in record.read_bytes() else "failed"
        record.rename(folder / f"{word}_{timestamp()}.json")
    (folder / HASHES).unlink(missing_ok=True)
    write_atomic(folder / SPEC, json.dumps(spec, indent=1, allow_nan=True) + "\n")
    return folder


def append_epoch(folder: Path, metrics: EpochMetrics) -> None:
    """Append one line to epochs.jsonl."""
    append_line(folder / EPOCHS, metrics.model_dump_json())


def append_line(path: Path, line: str) -> None:
    """Append a line to a file. One that a kill cut off is removed first."""
    whole = path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
    with path.open("ab") as file:
        file.truncate(whole)
        file.write(line.encode() + b"\n")


def write_epochs(folder: Path, epochs: Iterable[EpochMetrics]) -> None:
    """Replace epochs.jsonl, whole or not at all."""
    write_atomic(folder / EPOCHS, "".join(epoch.model_dump_json() + "\n" for epoch in epochs))


def load_epochs(folder: Path) -> list[EpochMetrics]:
    """Read epochs.jsonl, ordered by epoch; empty without such a file.

    Of an epoch that was run again after a resumption, the last line counts. A last line that a kill cut off is
    ignored; any other line that does not parse raises ValueError naming file and line.
    """
    path, epochs = folder / EPOCHS, dict[int, EpochMetrics]()
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            metrics = [EpochMetrics.model_validate_json(line)] if line else []
            epochs |= {one.epoch: one for one in metrics}
        except ValidationError as error:
            if number < len(lines):  # the last one has no newline after it: the write was cut off
                raise ValueError(f"{path} line {number}: {first_error(error)}") from None
    return [epochs[number] for number in sorted(epochs)]


def finish(out: Path, record: Record) -> Path:
    """Store what became of a run: record.json in its partial folder, which gets its final name where there is a result.

    A finished run of the same name is moved to `.superseded/<name>_<time>` first: nothing stored is ever lost.
    """
    folder, final, result = partial_dir(out, record.name), out / record.name, record.result
    folder.mkdir(parents=True, exist_ok=True)
    if result and result.epochs:
        timed = timed_epochs(result.epochs)
        seconds, waiting = (sum(getattr(e, n) for e in timed) for n in ("train_seconds", "data_stall_seconds"))
        known = {
            "timing": time_epochs(result.epochs),
            "data_stall_percent": 100 * waiting / seconds if seconds else None,
        }
        record = record.model_copy(update={"result": result.model_copy(update=known)})
        write_epochs(folder, result.epochs)
    text = (record.model_dump_json(indent=1, exclude={"result": {"epochs"}}) + "\n").encode()
    hashes = {name: hash_file(folder / name) for name in (EPOCHS, WEIGHTS) if (folder / name).exists()}
    hashes[RECORD] = hashlib.sha256(text).hexdigest()
    write_atomic(folder / HASHES, json.dumps(hashes, indent=1) + "\n")
    write_atomic(folder / RECORD, text)
    if result is None:
        return folder
    (folder / SPEC).unlink(missing_ok=True)
    if final.exists():
        old = out / SUPERSEDED / f"{record.name}_{timestamp()}"
        old.parent.mkdir(exist_ok=True)
        final.rename(old)
    folder.rename(final)
    _sync(out)
    return final


def time_epochs(epochs: Sequence[EpochMetrics]) -> Timing:
    """How many epochs were timed, how they spread, and why the others were not."""
    seconds = [epoch.train_seconds for epoch in epochs if epoch.timed]
    return Timing(
        epochs=len(seconds), fastest=min(seconds, default=None), slowest=max(seconds, default=None),
        untimed=dict(Counter(epoch.untimed for epoch in epochs if not epoch.timed)),
    )  # fmt: skip


def hash_file(path: Path) -> str:
    """SHA-256, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def collector_paused() -> Iterator[None]:
    """Create many values without Python's cyclic garbage collector, which would take longer than their creation."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@collector_paused()
def load_records(paths: Iterable[Path], known: Mapping[Path, Stored] = {}, *, copies: bool = False) -> Loaded:
    """Read every run under some paths, each a folder of runs or one run's folder; not again those that are `known`.

    Never raises for a folder's contents: one that is no run, or whose record is broken, half-written, wrongly edited or
    of another schema version, becomes a Problem. A copy of a run that was read before (same key, same instant) is
    skipped but for `copies`, and so is a folder of other results. Records come without their epochs: `load_epochs(folder)`.
    """
    loaded = Loaded([], [], [])
    seen: set[tuple[str, datetime]] = set()
    others: list[Path] = []  # folders of results inside one
    for folder in _folders(paths, loaded.problems):
        try:
            stored = known.get(folder) or Stored(
                Record.model_validate_json((folder / RECORD).read_bytes()), folder
            )
            if (identity := (stored.record.key, stored.record.finished_at)) not in seen or copies:
                seen.add(identity)
                loaded.records.append(stored)
        except FileNotFoundError:
            if folder.name.endswith(PARTIAL):
                loaded.interrupted.append(_interrupted(folder))
            elif any(inner.suffix == PARTIAL or (inner / RECORD).exists() for inner in folder.iterdir()):
                others.append(folder)
            elif not (folder / SWEEP).exists():
                loaded.problems.append(Problem(folder, f"no run: it has no {RECORD}"))
        except OSError as error:
            loaded.problems.append(Problem(folder, f"{RECORD} cannot be read: {error.strerror}"))
        except ValidationError as error:
            loaded.problems.append(Problem(folder, f"{RECORD} is broken: {first_error(error)}"))
    if not loaded.records and not loaded.interrupted:
        loaded.problems.extend(Problem(f, "it holds results of its own: give this folder") for f in others)
    return loaded


def keep_prediction(out: Path, key: str, prediction: Prediction) -> Path:
    """Store the prediction for the run of that key; an earlier one is replaced."""
    path = out / ESTIMATES / f"{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, prediction.model_dump_json(indent=1) + "\n")
    return path


def load_predictions(outs: Iterable[Path]) -> list[Prediction]:
    """Read the predictions stored in some folders of results, oldest first. Unreadable ones are skipped: a prediction
    can be repeated, and no figure depends on it."""
    predictions = []
    for out in outs:
        for path in sorted((out / ESTIMATES).glob("*.json")):
            with suppress(OSError, ValidationError):
                predictions.append(Prediction.model_validate_json(path.read_bytes()))
    return sorted(predictions, key=lambda prediction: prediction.made_at)


def _folders(paths: Iterable[Path], problems: list[Problem]) -> list[Path]:
    """The run folders under some paths, each once."""
    folders: dict[str, Path] = {}
    for path in paths:
        if not path.is_dir():
            problems.append(Problem(path, "not a folder" if path.exists() else "no such folder"))
            continue
        found = [str(path)]
        try:
            if not path.name.endswith(PARTIAL) and not (path / RECORD).exists():
                runs = (
                    e for e in os.scandir(path) if not e.name.startswith(".") and e.name != SWEEPS and e.is_dir()
                )
                found = sorted(entry.path for entry in runs)
        except OSError as error:
            problems.append(Problem(path, f"cannot be read: {error.strerror}"))
            continue
        for folder in found:
            # resolve() costs a system call per path component
            folders.setdefault(os.path.abspath(folder), Path(folder))  # noqa: PTH100
    return list(folders.values())


def _interrupted(folder: Path) -> Interrupted:
    spec, epochs = {}, list[EpochMetrics]()
    with suppress(OSError, ValueError):
        spec = json.loads((folder / SPEC).read_bytes())
    with suppress(OSError, ValueError):
        epochs = load_epochs(folder)
    of = setting(spec, "recipe.duration", int, float)
    if of is not None and setting(spec, "recipe.unit") != "epoch":  # in steps
        of = of / epochs[0].steps if epochs and epochs[0].steps else None
    name = folder.name.removesuffix(PARTIAL)
    return Interrupted(
        name, folder, len(epochs), None if of is None else math.ceil(of), spec if isinstance(spec, dict) else {}
    )


def first_error(error: ValidationError) -> str:
    """The first error of a validation, the value where it is a short one, and the number of the other errors."""
    first, *others = error.errors(include_url=False, include_context=False)
    place, given = ".".join(map(str, first["loc"])), first["input"]
    message = " ".join(first["msg"].removeprefix("Value error, ").split())
    message += f", not {given!r}" if isinstance(given, str | int | float) and len(repr(given)) < 40 else ""
    message += f" (and {len(others)} more)" if others else ""
    return f"{place}: {message}" if place else message


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    with writing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` for a writer to fill; it replaces `path` where the writer raises nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Make a file, or the renames inside a folder, last through a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def timestamp() -> str:
    """Now, for the name of a file."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
