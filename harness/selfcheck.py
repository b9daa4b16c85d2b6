"""The software proves itself on the devices that it runs on: how they are checked, what is known of them, and what runs
do where a check fails. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from harness.checklist import BY_NAME, CHECKS, REFUSE, WARN, Check, Result
from harness.cluster.job import Failed
from harness.cluster.nodes import Unanswered, ask_every_node
from harness.loaders.cache import cache_dir
from harness.loaders.datasets import Dataset
from harness.loaders.sampling import make_augment
from harness.progress import say
from harness.record import DALI_WHEELS, installed_version
from harness.resources import Session
from harness.results.identity import hash_code
from harness.results.store import write_atomic
from harness.spec import RunSpec
from harness.training.nvml import driver_version, open_visible

SECONDS = 90.0  # at most, before a first run
PROGRAM = (sys.executable, "-m", "harness.training.checks")


class RefusedError(Exception):
    """Nothing right is left on this machine: one line."""


# --- what is checked ---


@dataclass(frozen=True, slots=True)
class Device:
    """A device, or several ranks of them."""

    name: str
    combination: Mapping[str, str]  # what its results hold for
    measure: Callable[[Sequence[str], float], Iterable[Result]]  # of these checks, within so many seconds
    ranks: bool = False

    @property
    def key(self) -> str:
        """Of its results in the cache."""
        return hashlib.sha256(json.dumps(dict(self.combination), sort_keys=True).encode()).hexdigest()[:16]

    def known(self, cache: Path) -> dict[str, Result]:
        """What earlier checks came to, by name."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            rows = json.loads((cache / "checks" / f"{self.key}.json").read_bytes())["results"]
            return {row["name"]: Result(**row) for row in rows if row["name"] in BY_NAME}
        return {}

    def check(self, names: Sequence[str], seconds: float, cache: Path) -> Iterator[Result]:
        """Measure, and add to what is known of GPUs; a cache that cannot be written costs another check at the next
        run."""
        for r in self.measure(names, seconds):
            if r.state != "left out" and self.combination["device"] != "cpu":
                results = [asdict(each) for each in (self.known(cache) | {r.name: r}).values()]
                stored = {"combination": dict(self.combination), "at": f"{datetime.now(UTC)}", "results": results}
                with suppress(OSError):
                    (cache / "checks").mkdir(parents=True, exist_ok=True)
                    write_atomic(cache / "checks" / f"{self.key}.json", json.dumps(stored, indent=1) + "\n")
            yield r


def identify(model: str | None = None) -> dict[str, str]:
    """The combination of a device, its driver, torch, DALI and this code; of this node's first GPU, or its CPU, where
    no model is given."""
    driver = ""
    with suppress(Exception):  # no NVML
        driver = driver_version()
        model = model or open_visible(None)[0].read("model") or ""
    versions = {package: installed_version(package) or "" for package in ("torch", *DALI_WHEELS)}
    return {"device": model or "cpu", "driver": driver, "code": hash_code(), **versions}


def find_devices(session: Session) -> list[Device]:
    """The devices of this machine, or one of each kind of a cluster's nodes. A cluster must have been joined."""
    allocation = session.allocation
    on_gpu, threads = allocation.device == "cuda", allocation.threads
    if session.resources.address is None:
        models = {"cpu": "cpu"}
        if on_gpu:
            models = dict.fromkeys((f"cuda:{index}" for index in range(allocation.gpus)), "")
            with suppress(Exception):  # a GPU that was lost, say: its check says what is wrong
                gpus = open_visible(os.environ.get("CUDA_VISIBLE_DEVICES"))
                models |= zip(models, (gpu.read("model") or "" for gpu in gpus), strict=False)
        return [Device(n, identify(model), partial(measure, n, threads)) for n, model in models.items()]
    device, gpus_needed, threads = ("cuda:0", 1, threads) if on_gpu else ("cpu", 0, 1)

    def on_node(node: str, names: Sequence[str], seconds: float) -> list[Result]:
        ask = lambda: list(measure(device, threads, names, seconds))  # noqa: E731
        (answer,) = ask_every_node(ask, timeout_seconds=seconds + 30, only=node, gpus=gpus_needed).values()
        return [Result(n, "left out", answer.reason) for n in names] if isinstance(answer, Unanswered) else answer

    kinds = dict[str, Device]()
    for node, has in ask_every_node(identify).items():
        if not isinstance(has, Unanswered) and (has["device"] != "cpu") == on_gpu:
            found = Device(f"{has['device']} on {node}", has, partial(on_node, node))
            kinds.setdefault(found.key, found)
    return list(kinds.values())


def make_ranks(session: Session, devices: Sequence[Device]) -> Device:
    """As many ranks as a run has, launched as its are. They leave out what is not begun in time."""

    def measure_ranks(names: Sequence[str], seconds: float) -> list[Result]:
        from harness.training.checks import run_rank_checks

        run = partial(run_rank_checks, seconds=seconds)
        outcome = session.launch_once(run, tuple(names), seconds, stall_seconds=seconds)
        if isinstance(outcome, Failed):
            state = "left out" if outcome.message.startswith("no room") else "failed"
            return [Result(name, state, outcome.message) for name in names]
        return list(outcome)

    models = " + ".join(sorted({device.combination["device"] for device in devices}))
    workers = str(session.allocation.workers)
    return Device(f"{workers} ranks", {**identify(models), "workers": workers}, measure_ranks, ranks=True)


def measure(device: str, threads: int, names: Sequence[str], seconds: float) -> Iterator[Result]:
    """Check a device of this machine in a process of its own, for at most so long. A check that ends the process has
    failed; those that are not done in time are left out."""
    waiting, until = list(names), time.monotonic() + seconds
    # cuBLAS reads it once, before the first kernel: the check of resuming needs it
    env = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    while waiting and (left := until - time.monotonic()) > 0:
        with tempfile.TemporaryFile("w+", errors="replace") as errors, subprocess.Popen(
            [*PROGRAM, device, str(threads), *waiting], stdout=subprocess.PIPE, stderr=errors, text=True, env=env,
            start_new_session=True,
        ) as process:  # fmt: skip
            timer = threading.Timer(left, _kill, [process])
            timer.start()
            try:
                for line in process.stdout or ():
                    if line.startswith('["check"'):  # libraries print, too
                        result = Result(*json.loads(line)[1:])
                        waiting.remove(result.name)
                        yield result
            finally:
                timer.cancel()
                _kill(process)
            code = process.wait()
            if waiting and time.monotonic() < until:
                errors.seek(0)
                last = (errors.read().strip().splitlines() or ["no message"])[-1][:200]
                yield Result(waiting.pop(0), "failed", f"its process ended with {code}: {last}")
    for name in waiting:
        yield Result(name, "left out", f"not done within {seconds:.0f} s")


def _kill(process: subprocess.Popen[str]) -> None:
    """End it, with the processes that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


# --- before a run ---


@dataclass(frozen=True, slots=True)
class Checked:
    """What runs take from the checks of their devices."""

    results: Mapping[str, Result] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)  # of their records
    warnings: tuple[str, ...] = ()
    dataset: Dataset | None = None

    def otherwise(self, check: Check, spec: RunSpec) -> str:
        """What a run does where a check fails. Images that are cut one by one are not for loader resident."""
        train = self.dataset and self.dataset.train
        if check.otherwise == "resident" and train and make_augment(spec.recipe, flip=True).by_image(train):
            return "dataloader" if spec.loader == "dali" else REFUSE
        return check.otherwise

    def adapt(self, spec: RunSpec) -> RunSpec:
        """The run with a loader and an engine that work. Raises RefusedError where nothing right is left."""
        for check in rests_on([spec]):
            result = self.results.get(check.name)
            if result is None or result.state != "failed" or check.otherwise == WARN:
                continue
            if check.of is None or (other := self.otherwise(check, spec)) == REFUSE:
                why = f"check {check.name} failed on this device: {result.detail}"
                raise RefusedError(f"{spec.title} is not trained: {why} (--no-check trains it regardless)")
            instead: dict[str, Any] = {check.of[0]: other}
            return self.adapt(replace(spec, **instead))
        return spec


def rests_on(runs: Sequence[RunSpec]) -> list[Check]:
    """The checks that these runs rest on."""
    return [check for check in CHECKS if any(map(check.concerns, runs))]


def check_first(
    specs: Sequence[RunSpec],
    session: Session,
    console: Console,
    dataset: Dataset | None = None,
    *,
    skip: bool = False,
) -> Checked:
    """Check what these runs rest on where it is not known yet, for at most SECONDS; nothing for runs on the CPU. Says what
    fails, and what runs do about it. Raises RefusedError where nothing right is left."""
    if session.allocation.device == "cpu" or not specs:
        return Checked()
    results, runs = dict[str, Result](), list(specs)
    cache, until = session.paths.cache_dir or cache_dir(), time.monotonic() + SECONDS
    devices = [] if skip else find_devices(session)
    if not skip and session.allocation.workers > 1:
        devices.append(make_ranks(session, devices))
    while missing := [check for check in rests_on(runs) if check.name not in results and not skip]:
        for device in {device.key: device for device in devices}.values():  # one of each kind
            names = [check.name for check in missing if check.ranks == device.ranks]
            known = device.known(cache)
            # what failed may have failed for want of memory that another process held
            if new := [name for name in names if name not in known or known[name].state == "failed"]:
                say(console, f"first use of {device.name} ({device.combination['device']}) with this driver, torch, DALI and "
                    f"code: checking it for at most {SECONDS:.0f} s (--no-check skips)", style="dim")  # fmt: skip
                for r in device.check(new, max(0.0, until - time.monotonic()), cache):
                    if r.state != "left out" or r.name not in known:
                        known[r.name] = r
            # of several devices, one that failed counts
            results |= {n: known[n] for n in names if n not in results or known[n].state == "failed"}
        for check in missing:
            results.setdefault(check.name, Result(check.name, "left out", "no such device was there"))
        runs = [Checked(results, dataset=dataset).adapt(run) for run in runs]
    states = [results[check.name].state for check in rests_on(runs) if check.name in results]
    failed, left_out = ([r for r in results.values() if r.state == state] for state in ("failed", "left out"))
    kept = {
        "status": "failed" if "failed" in states else "skipped" if skip or "left out" in states else "passed",
        "at": datetime.now(UTC).isoformat(timespec="seconds"), "version": hash_code(), "failed": [r.name for r in failed],
    }  # fmt: skip
    warnings = []
    for r in failed:
        check, said = BY_NAME[r.name], f"check {r.name} failed ({r.detail})"
        if check.of:
            said += f": {check.of[0]} {Checked(dataset=dataset).otherwise(check, specs[0])} in its place"
        warnings.append(said)
    if left_out:
        warnings.append(f"checks left out: {', '.join(r.name for r in left_out)} ({left_out[0].detail})")
    for warning in warnings:
        say(console, warning)
    return Checked(results, {"check": kept}, tuple(warnings), dataset)
