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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.checklist import BY_NAME, CHECKS, REFUSE, WARN, Result
from harness.cluster.job import Failed, Report, Worker
from harness.loaders.cache import cache_dir
from harness.progress import say
from harness.record import DALI_WHEELS, installed_version
from harness.resources import Resources, Session
from harness.results.identity import hash_code
from harness.results.store import write_atomic
from harness.spec import RunPaths, RunSpec

if TYPE_CHECKING:
    from rich.console import Console

    from harness.cluster.job import Allocation

SECONDS = 90.0  # at most, before a first run
PROGRAM = (sys.executable, "-m", "harness.training.checks")


class RefusedError(Exception):
    """Nothing right is left on this machine: one line."""


# --- what is checked ---


@dataclass(frozen=True, slots=True)
class Device:
    """A device, or several ranks of them, and what its results hold for."""

    name: str
    combination: Mapping[str, str]
    measure: Callable[[Sequence[str], float], Iterable[Result]]  # of these checks, within so many seconds
    ranks: bool = False


def identify(model: str) -> dict[str, str]:
    """The combination of a device, its driver, torch, DALI and this code."""
    from harness.training.nvml import driver_version

    driver = ""
    with suppress(Exception):  # no NVML
        driver = driver_version()
    dali = ", ".join(f"{wheel} {version}" for wheel in DALI_WHEELS if (version := installed_version(wheel)))
    torch = installed_version("torch") or ""
    return {"device": model, "driver": driver, "torch": torch, "dali": dali, "code": hash_code()}


def identify_node() -> dict[str, str]:
    """Of the first GPU of the node that this is called on, of its CPU where there is none."""
    from harness.training.nvml import open_visible

    with suppress(Exception):
        return identify(open_visible(None)[0].model())
    return identify("cpu")


def find_devices(allocation: Allocation, address: str | None) -> list[Device]:
    """The devices of this machine, or one of each kind of a cluster's nodes. A cluster must have been joined."""
    if address is not None:
        return _find_nodes(allocation)
    from harness.training.nvml import open_visible

    models = {"cpu": "cpu"}
    if allocation.device == "cuda":
        gpus = open_visible(os.environ.get("CUDA_VISIBLE_DEVICES"))[: allocation.gpus]
        models = {f"cuda:{index}": gpu.model() for index, gpu in enumerate(gpus)}
    return [Device(n, identify(model), partial(measure, n, allocation.threads)) for n, model in models.items()]


def _find_nodes(allocation: Allocation) -> list[Device]:
    from harness.cluster.nodes import Unanswered, ask_every_node

    device, gpus, threads = ("cuda:0", 1, allocation.threads) if allocation.device == "cuda" else ("cpu", 0, 1)

    def on_node(node: str, names: Sequence[str], seconds: float) -> list[Result]:
        ask = lambda: list(measure(device, threads, names, seconds))  # noqa: E731
        (answer,) = ask_every_node(ask, timeout_seconds=seconds + 30, only=node, gpus=gpus).values()
        return [Result(n, "left out", answer.reason) for n in names] if isinstance(answer, Unanswered) else answer

    devices = dict[str, Device]()
    for node, found in ask_every_node(identify_node).items():
        if not isinstance(found, Unanswered) and (found["device"] != "cpu") == (gpus > 0):
            name = f"{found['device']} on {node}"
            devices.setdefault(name_of(found), Device(name, found, partial(on_node, node)))
    return list(devices.values())


def make_ranks(
    allocation: Allocation, resources: Resources, paths: RunPaths | None, devices: Sequence[Device]
) -> Device:
    """As many ranks as a run has, launched as its are."""
    workers, models = str(allocation.workers), sorted({device.combination["device"] for device in devices})
    combination = {**identify(" + ".join(models)), "workers": workers}
    return Device(
        f"{workers} ranks", combination, partial(measure_ranks, allocation, resources, paths), ranks=True
    )


# --- how ---


def measure(device: str, threads: int, names: Sequence[str], seconds: float) -> Iterator[Result]:
    """Check a device of this machine in a process of its own, for at most so long. A check that ends the process has
    failed; those that are not done in time are left out."""
    waiting, until = list(names), time.monotonic() + seconds
    while waiting and (left := until - time.monotonic()) > 0:
        with tempfile.TemporaryFile("w+", errors="replace") as errors:
            command = [*PROGRAM, device, str(threads), *waiting]
            # cuBLAS reads it once, before the first kernel: the check of resuming needs it
            env = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
            pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": errors, "start_new_session": True}
            with subprocess.Popen(command, text=True, env=env, **pipe) as process:
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
            if waiting and time.monotonic() < until:
                errors.seek(0)
                last = (errors.read().strip().splitlines() or ["no message"])[-1][:200]
                yield Result(waiting.pop(0), "failed", f"its process ended with {process.returncode}: {last}")
    for name in waiting:
        yield Result(name, "left out", f"not done within {seconds:.0f} s")


def _kill(process: subprocess.Popen[str]) -> None:
    """End it, with the processes that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def measure_ranks(
    allocation: Allocation, resources: Resources, paths: RunPaths | None, names: Sequence[str], seconds: float
) -> list[Result]:
    """Launch ranks as a run's; they leave out what is not begun in time."""
    allocation = replace(allocation, concurrent_runs=1, retries=0, placement_timeout_seconds=seconds)
    with ExitStack() as stack:
        out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="harness-check-")))
        session = Session(allocation, resources, paths or RunPaths(out=out), stack)
        check: Any = tuple(names)  # launchers take any specification
        ((_, outcome),) = session.launch(partial(_check_ranks, seconds=seconds), [check], progress=lambda *_: None)
    if isinstance(outcome, Failed):
        state = "left out" if outcome.message.startswith("no room") else "failed"
        return [Result(name, state, outcome.message) for name in names]
    return list(outcome)


def _check_ranks(names: Sequence[str], worker: Worker, report: Report, *, seconds: float) -> list[Result]:
    """In each rank: only there is torch imported."""
    from harness.training.checks import run_rank_checks

    return run_rank_checks(names, worker, seconds)


# --- what is known ---


def name_of(combination: Mapping[str, str]) -> str:
    """Its key in the cache."""
    return hashlib.sha256(json.dumps(dict(combination), sort_keys=True).encode()).hexdigest()[:16]


def load_results(combination: Mapping[str, str], cache: Path) -> dict[str, Result]:
    """What earlier checks of it came to, by name."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads((cache / "checks" / f"{name_of(combination)}.json").read_bytes())
        return {row["name"]: Result(**row) for row in stored["results"] if row["name"] in BY_NAME}
    return {}


def store_results(combination: Mapping[str, str], results: Iterable[Result], cache: Path) -> None:
    """Add to what is known of it; a cache that cannot be written costs another check at the next run."""
    known = load_results(combination, cache) | {r.name: r for r in results if r.state != "left out"}
    stored = {"combination": dict(combination), "at": datetime.now(UTC).isoformat(),
              "results": [asdict(result) for result in known.values()]}  # fmt: skip
    with suppress(OSError):
        (cache / "checks").mkdir(parents=True, exist_ok=True)
        write_atomic(cache / "checks" / f"{name_of(combination)}.json", json.dumps(stored, indent=1) + "\n")


# --- before a run ---


@dataclass(frozen=True, slots=True)
class Checked:
    """What runs take from the checks of their devices."""

    results: Mapping[str, Result] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)  # of their records
    warnings: tuple[str, ...] = ()

    def adapt(self, spec: RunSpec) -> RunSpec:
        """The run with a loader and an engine that work. Raises RefusedError where nothing right is left."""
        for check in CHECKS:
            result = self.results.get(check.name)
            if result is None or result.state != "failed" or check.otherwise == WARN or not check.concerns(spec):
                continue
            if check.of is None or check.otherwise == REFUSE:
                raise RefusedError(
                    f"{spec.title} is not trained: check {check.name} failed on this device: {result.detail} "
                    "(--no-check trains it regardless)"
                )
            instead: dict[str, Any] = {check.of[0]: check.otherwise}
            return self.adapt(replace(spec, **instead))
        return spec


def check_first(
    specs: Sequence[RunSpec], allocation: Allocation, resources: Resources, paths: RunPaths, console: Console, *,
    skip: bool = False,
) -> Checked:  # fmt: skip
    """Check what these runs rest on where it is not known yet, for at most SECONDS; nothing for runs on the CPU.

    Says what fails, and what runs do about it. Raises RefusedError where nothing right is left.
    """
    if allocation.device == "cpu" or not specs:
        return Checked()
    results, runs = dict[str, Result](), list(specs)
    if not skip:
        cache, until = paths.cache_dir or cache_dir(), time.monotonic() + SECONDS
        every = find_devices(allocation, resources.address)
        devices = list({name_of(device.combination): device for device in every}.values())
        if allocation.workers > 1:
            devices.append(make_ranks(allocation, resources, paths, devices))
    while missing := [c for c in CHECKS if c.name not in results and any(map(c.concerns, runs))] * (not skip):
        for device in devices:
            names = [check.name for check in missing if check.ranks == device.ranks]
            known = load_results(device.combination, cache)
            if new := [name for name in names if name not in known]:
                say(console, f"new here: {device.name} ({device.combination['device']}) with this driver, torch, DALI and "
                    f"code; checking it for at most {SECONDS:.0f} s (--no-check skips)", style="dim")  # fmt: skip
                made = list(device.measure(new, max(0.0, until - time.monotonic())))
                store_results(device.combination, made, cache)
                known |= {result.name: result for result in made}
            # of several devices, one that failed counts
            results |= {
                name: known[name] for name in names if name not in results or known[name].state == "failed"
            }
        for check in missing:
            results.setdefault(check.name, Result(check.name, "left out", "no such device was there"))
        runs = [Checked(results).adapt(run) for run in runs]
    warnings = list(_warn(results.values()))
    for warning in warnings:
        say(console, warning)
    states = [results[c.name].state for c in CHECKS if c.name in results and any(map(c.concerns, runs))]
    state = "failed" if "failed" in states else "skipped" if skip or "left out" in states else "passed"
    kept = {
        "status": state, "at": datetime.now(UTC).isoformat(timespec="seconds"), "version": hash_code(),
        "failed": [name for name, result in results.items() if result.state == "failed"],
    }  # fmt: skip
    return Checked(results, {"check": kept}, tuple(warnings))


def _warn(results: Collection[Result]) -> Iterator[str]:
    """A line for each that failed, with what is done about it, and one for those that were left out."""
    for result in results:
        check = BY_NAME[result.name]
        if result.state == "failed":
            instead = f": {check.of[0]} {check.otherwise} in its place" if check.of else ""
            yield f"check {result.name} failed ({result.detail}){instead}"
    if left_out := [result for result in results if result.state == "left out"]:
        yield f"checks left out: {', '.join(result.name for result in left_out)} ({left_out[0].detail})"
