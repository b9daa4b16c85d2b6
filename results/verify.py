"""Whether stored runs contradict themselves: their records, epochs and files.

Every figure that follows from another is computed again. Files are compared with the hashes that were stored with them;
runs of early versions have none, which is said and no finding.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from harness.results.statistics import median
from harness.results.store import (
    EPOCHS,
    HASHES,
    PARTIAL,
    RECORD,
    Problem,
    Stored,
    hash_file,
    load_epochs,
    run_name,
)
from harness.results.values import EpochMetrics, Record, setting

KeyOf = Callable[[Mapping[str, Any]], str]
"""The key of a run from its specification. Raises ValueError where that is none."""


def verify(runs: Sequence[Stored], key_of: KeyOf, elsewhere: Collection[str] = ()) -> list[Problem]:
    """Everything that can be checked of some runs. Reads all their files, but for those that are kept elsewhere."""
    findings, curves, clocks = [], defaultdict(list), defaultdict(list)
    for run in runs:
        problems = [*contradictions(run.record), *_identity(run, key_of), *_files(run.folder, elsewhere)]
        try:
            epochs = load_epochs(run.folder)
        except (OSError, ValueError) as error:
            epochs, problems = [], [*problems, f"{EPOCHS} cannot be read: {error}"]
        if run.record.result is not None and not epochs:
            problems.append(f"no epochs: {EPOCHS} is missing or empty")
        problems += _epochs(run.record, epochs)
        if epochs:
            other = {name: value for name, value in run.record.spec.items() if name != "seed"}
            curve = tuple((epoch.loss, epoch.error) for epoch in epochs)
            curves[json.dumps(other, sort_keys=True), curve].append(run)
            clocks[tuple(epoch.train_seconds for epoch in epochs)].append(run)
        findings += [Problem(run.folder, problem) for problem in problems]
    for what, groups in (("losses and errors", curves.values()), ("seconds", clocks.values())):
        for twins in groups:
            for one, two in pairwise(twins):
                if one.record.key != two.record.key:
                    findings.append(Problem(two.folder, f"its {what} are those of {one.folder}, epoch for epoch"))
    return findings


def contradictions(record: Record) -> Iterator[str]:
    """What a record shows by itself, without another file: cheap enough for a report of 10,000 runs."""
    if record.finished_at < record.started_at:
        yield f"it ended at {record.finished_at}, before it began at {record.started_at}"
    if (result := record.result) is None:
        return
    top1, top5, best = result.final_error, result.final_top5_error, result.best_error
    yield from _outside({"final_error": top1, "best_error": best, "final_top5_error": top5,
                         "test_error": result.test_error, "test_top5_error": result.test_top5_error,
                         "data_stall_percent": result.data_stall_percent}, 0, 100)  # fmt: skip
    memory = result.memory
    allocated, reserved = memory.torch_allocated_mib.value, memory.torch_reserved_mib.value
    yield from _outside({name: getattr(result, name) for name in POSITIVE}, 1e-9, math.inf)
    yield from _outside({"allocated MiB": allocated, "reserved MiB": reserved, "RSS MiB": memory.rss_mib.value,
                         "NVML MiB": memory.nvml_process_mib.value, "energy J": result.energy_joules.value,
                         "setup_seconds": result.setup_seconds}, 0, math.inf)  # fmt: skip
    if best > top1:
        yield f"best_error {best:g} is above final_error {top1:g}"
    for name, five, one in (("final", top5, top1), ("test", result.test_top5_error, result.test_error)):
        if five is not None and one is not None and five > one:
            yield f"{name}_top5_error {five:g} is above {name}_error {one:g}"
    if allocated is not None and reserved is not None and allocated > reserved:
        yield f"{allocated:g} MiB allocated of {reserved:g} MiB reserved"
    if result.batch_size != result.workers * result.batch_size_per_gpu and not result.widths:
        yield f"batch_size {result.batch_size} is not {result.workers} workers x {result.batch_size_per_gpu}"
    for name, images in (("final_error", result.evaluated_images), ("best_error", result.evaluated_images),
                         ("test_error", result.test_images)):  # fmt: skip
        yield from _grid(name, getattr(result, name), images)


POSITIVE = ("parameters", "epoch_seconds", "images_per_second", "eval_seconds", "train_seconds", "best_epoch",
            "workers", "threads", "runs_per_gpu", "attempts")  # fmt: skip


def _outside(values: Mapping[str, float | None], low: float, high: float) -> Iterator[str]:
    for name, value in values.items():
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            yield f"{name} is {value:g}"


def _grid(name: str, error: float | None, images: int | None) -> Iterator[str]:
    """An error is a whole number of images."""
    if error is None or not images or not math.isfinite(error):
        return
    if abs(error * images / 100 - round(error * images / 100)) > 0.01:
        yield f"{name} {error:g} is no whole number of {images} images"


def _identity(run: Stored, key_of: KeyOf) -> Iterator[str]:
    record, spec = run.record, run.record.spec
    try:
        if (key := key_of(spec)) != record.key:
            yield f"key {record.key}: its specification has {key}"
    except ValueError as error:
        yield f"its specification cannot be read: {error}"
    for name, own, theirs in (
        ("variant", record.variant, spec.get("variant")),
        ("seed", record.seed, spec.get("seed")),
        ("depth", record.depth, setting(spec, "network.depth")),
        ("workers", record.result and record.result.workers, spec.get("workers")),
        ("batch_size", record.result and record.result.batch_size, setting(spec, "recipe.batch_size")),
    ):
        if own is not None and own != theirs:
            yield f"{name} {own}: its specification has {theirs}"
    if (result := record.result) and result.attempts == 1 and not record.environment.get("attempts", ())[1:]:
        seconds = (record.finished_at - record.started_at).total_seconds()
        if result.train_seconds > seconds + 1:
            yield f"train_seconds {result.train_seconds:.4g} of the {seconds:.4g} s from its start to its end"
    name = run_name(record.dataset, record.variant, record.depth, record.seed, record.key)
    if record.name != name:
        yield f"name {record.name}: its values give {name}"
    expected = record.name + PARTIAL * (record.result is None)
    if run.folder.name != expected:
        yield f"the folder of {record.name} is called {run.folder.name}"


def has_hashes(folder: Path) -> bool:
    return (folder / HASHES).exists()


def _files(folder: Path, elsewhere: Collection[str]) -> Iterator[str]:
    """Files that are missing or are not as they were stored."""
    try:
        hashes = json.loads((folder / HASHES).read_bytes())
        names = {RECORD: None, **hashes}
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError) as error:
        yield f"{HASHES} cannot be read: {error}"
        return
    for name, stored in names.items():
        if not (folder / name).is_file():
            yield from () if name in elsewhere else (f"{name} is missing",)
        elif hash_file(folder / name) != stored:
            yield f"{name} is not as it was stored (SHA-256)"


def _epochs(record: Record, epochs: Sequence[EpochMetrics]) -> Iterator[str]:
    """Each epoch by itself, and the figures of the record that follow from them all."""
    if not epochs:
        return
    if [epoch.epoch for epoch in epochs] != list(range(1, len(epochs) + 1)):
        yield f"epochs {epochs[0].epoch} to {epochs[-1].epoch}, {len(epochs)} of them"
    batch = setting(record.spec, "recipe.batch_size")
    for epoch in epochs:
        yield from (f"epoch {epoch.epoch}: {problem}" for problem in _epoch(epoch, batch))
    if (result := record.result) is None:
        return
    for epoch in epochs:
        yield from _grid(f"epoch {epoch.epoch}: error", epoch.error, result.evaluated_images)
    duration, unit = (setting(record.spec, f"recipe.{name}") for name in ("duration", "unit"))
    if isinstance(duration, int | float):
        count = math.ceil(duration if unit == "epoch" else duration / max(epochs[0].steps, 1))
        if len(epochs) != count:
            yield f"{len(epochs)} epochs of the {count} that its recipe trains"
    for name, value in _recomputed(epochs).items():
        own = getattr(result, name)
        if (own is None) != (value is None) or (own is not None and not math.isclose(own, value, rel_tol=1e-6)):
            yield f"{name} is {own}, its epochs give {value}"
    for name in ("images_per_second", "eval_seconds"):
        values = [getattr(epoch, name) for epoch in epochs]
        if (own := getattr(result, name)) is not None and not min(values) * 0.999 <= own <= max(values) * 1.001:
            yield f"{name} is {own:g}, its epochs have {min(values):g} to {max(values):g}"


def _epoch(epoch: EpochMetrics, batch: Any) -> Iterator[str]:
    yield from _outside({"error": epoch.error, "top5_error": epoch.top5_error}, 0, 100)
    yield from _outside({"loss": epoch.loss, "lr": epoch.lr, "data_stall_seconds": epoch.data_stall_seconds,
                         "eval_seconds": epoch.eval_seconds}, 0, math.inf)  # fmt: skip
    yield from _outside(
        {"steps": epoch.steps, "images": epoch.images, "train_seconds": epoch.train_seconds}, 1e-9, math.inf
    )
    if epoch.data_stall_seconds > epoch.train_seconds * 1.001:
        yield f"waited {epoch.data_stall_seconds:g} of {epoch.train_seconds:g} s"
    if not math.isclose(epoch.images, epoch.images_per_second * epoch.train_seconds, rel_tol=1e-4):
        yield f"{epoch.images} images in {epoch.train_seconds:g} s are not {epoch.images_per_second:g} a second"
    if isinstance(batch, int) and epoch.images > epoch.steps * batch:
        yield f"{epoch.images} images in {epoch.steps} steps of {batch}"


def _recomputed(epochs: Sequence[EpochMetrics]) -> dict[str, Any]:
    """The fields of a result that follow from its epochs: `summarise_history` of the training."""
    timed = [epoch for epoch in epochs if epoch.timed]
    best = min(epochs, key=lambda epoch: epoch.error)
    return {
        "final_error": epochs[-1].error, "best_error": best.error, "best_epoch": best.epoch,
        "final_top5_error": epochs[-1].top5_error, "train_seconds": sum(epoch.train_seconds for epoch in epochs),
        "epoch_seconds": median([epoch.train_seconds for epoch in timed]) if timed else None,
    }  # fmt: skip
