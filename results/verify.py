"""Whether stored runs contradict themselves: their records, epochs and files.

Every figure that follows from another is computed again. Files are compared with the hashes that were stored with them;
runs of early versions have none, which is said and no finding.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from harness.results import store
from harness.results.store import EPOCHS, HASHES, RECORD, Problem, Stored
from harness.results.values import EpochMetrics, Measurement, Record, setting, summarise_epochs

KeyOf = Callable[[Mapping[str, Any]], str]
"""The key of a run from its specification. Raises ValueError where that is none."""
LIMITS = tomllib.loads(Path(__file__).with_name("verify.toml").read_text(encoding="utf-8"))


def verify(runs: Sequence[Stored], key_of: KeyOf, elsewhere: Collection[str] = ()) -> list[Problem]:
    """Everything that can be checked of some runs. Reads all their files, but for those that are kept elsewhere."""
    findings: list[Problem] = []
    alike: dict[tuple[object, ...], list[Stored]] = defaultdict(list)  # runs with the same values in all epochs
    for run in runs:
        problems = [*contradictions(run.record), *_identity(run, key_of), *_files(run.folder, elsewhere)]
        try:
            epochs = store.load_epochs(run.folder)
            problems += check_epochs(run.record, epochs)
        except (OSError, ValueError) as error:
            epochs, problems = [], [*problems, f"{EPOCHS} cannot be read: {error}"]
        if epochs:
            spec = json.dumps(run.record.spec | {"seed": None}, sort_keys=True)
            alike["losses and errors", spec, *((epoch.loss, epoch.error) for epoch in epochs)].append(run)
            alike["seconds", *(epoch.train_seconds for epoch in epochs)].append(run)
        findings += [Problem(run.folder, problem) for problem in problems]
    for (what, *_), twins in alike.items():
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
    yield from _impossible(vars(result) | vars(result.memory))
    if result.batch_size != result.workers * result.batch_size_per_gpu and not result.widths:
        yield f"batch_size {result.batch_size} is not {result.workers} workers x {result.batch_size_per_gpu}"


def _impossible(values: Mapping[str, Any]) -> Iterator[str]:
    """Figures that cannot be, or not beside one another."""
    # pydantic's isinstance takes 20 times as long
    figures = {name: value.value if type(value) is Measurement else value for name, value in values.items()}
    known = {name: figure for name, figure in figures.items() if type(figure) is float or type(figure) is int}
    for name, number in known.items():
        if not 0 < number < math.inf and name not in LIMITS["any_sign"] and (number or name in LIMITS["positive"]):
            yield f"{name} is {number:g}"
    for name, most in LIMITS["at_most"].items():
        limit = known.get(most, math.inf) if isinstance(most, str) else most
        if name in known and known[name] > limit * 1.001:
            other = f"{most} {limit:g}" if isinstance(most, str) else f"{limit:g}"
            yield f"{name} is {known[name]:g}, above {other}"
    for name, images in LIMITS["of_images"].items():
        wrong = known.get(name, math.nan) * known.get(images, math.nan) / 100
        if math.isfinite(wrong) and abs(wrong - round(wrong)) > 0.01:
            yield f"{name} {known[name]:g} is no whole number of {known[images]} images"


def _identity(run: Stored, key_of: KeyOf) -> Iterator[str]:
    record, spec, result = run.record, run.record.spec, run.record.result
    try:
        if (key := key_of(spec)) != record.key:
            yield f"key {record.key}: its specification has {key}"
    except ValueError as error:
        yield f"its specification cannot be read: {error}"
    for path, own in (
        ("variant", record.variant), ("seed", record.seed), ("network.depth", record.depth),
        ("workers", result and result.workers), ("recipe.batch_size", result and result.batch_size),
    ):  # fmt: skip
        if own is not None and own != (theirs := setting(spec, path, int, str)):
            yield f"{path.rpartition('.')[2]} {own}: its specification has {theirs}"
    if result and result.attempts == 1 and not record.environment.get("attempts", ())[1:]:
        seconds = (record.finished_at - record.started_at).total_seconds()
        if result.train_seconds > seconds + 1:
            yield f"train_seconds {result.train_seconds:.4g} of the {seconds:.4g} s from its start to its end"
    name = store.run_name(record.dataset, record.variant, record.depth, record.seed, record.key)
    if record.name != name:
        yield f"name {record.name}: its values give {name}"
    if run.folder.name != record.name + store.PARTIAL * (result is None):
        yield f"the folder of {record.name} is called {run.folder.name}"


def _files(folder: Path, elsewhere: Collection[str]) -> Iterator[str]:
    """Files that are missing or are not as they were stored."""
    try:
        hashes = {RECORD: None, **json.loads((folder / HASHES).read_bytes())}
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError) as error:
        yield f"{HASHES} cannot be read: {error}"
        return
    for name, stored in hashes.items():
        try:
            if not (folder / name).is_file():
                yield from () if name in elsewhere else (f"{name} is missing",)
            elif store.hash_file(folder / name) != stored:
                yield f"{name} is not as it was stored (SHA-256)"
        except OSError as error:
            yield f"{name} cannot be read: {error.strerror}"


def check_epochs(record: Record, epochs: Sequence[EpochMetrics]) -> Iterator[str]:
    """Each of a run's epochs by itself, and the figures of the record that follow from them all."""
    result, batch = record.result, setting(record.spec, "recipe.batch_size", int)
    if not epochs:
        yield from [f"no epochs: {EPOCHS} is missing or empty"] if result else []
        return
    if [epoch.epoch for epoch in epochs] != list(range(1, len(epochs) + 1)):
        yield f"epochs {epochs[0].epoch} to {epochs[-1].epoch}, {len(epochs)} of them"
    of = {"evaluated_images": setting(result, "evaluated_images", int)}
    for epoch in epochs:
        problems = [*_impossible(vars(epoch) | of)]
        if not math.isclose(epoch.images, epoch.images_per_second * epoch.train_seconds, rel_tol=1e-4):
            given = f"{epoch.images} images in {epoch.train_seconds:g} s"
            problems.append(f"{given} are not {epoch.images_per_second:g} a second")
        if batch is not None and epoch.images > epoch.steps * batch:
            problems.append(f"{epoch.images} images in {epoch.steps} steps of {batch}")
        yield from (f"epoch {epoch.epoch}: {problem}" for problem in problems)
    if result is None:
        return
    if duration := setting(record.spec, "recipe.duration", int, float):
        steps = 1 if setting(record.spec, "recipe.unit", str) == "epoch" else max(epochs[0].steps, 1)
        if len(epochs) != (count := math.ceil(duration / steps)):
            yield f"{len(epochs)} epochs of the {count} that its recipe trains"
    for figure, value in summarise_epochs(epochs).items():
        own = getattr(result, figure)
        if own != value and (own is None or value is None or not math.isclose(own, value, rel_tol=1e-6)):
            yield f"{figure} is {own}, its epochs give {value}"
