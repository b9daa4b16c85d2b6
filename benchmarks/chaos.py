"""Kill runs and sweeps at random moments, give the same command again, compare with an undisturbed one.

    python benchmarks/chaos.py --kills 60 --out /tmp/chaos

Three ways to die: one training worker (SIGKILL; the command itself continues), the driver (SIGKILL to the command), the
whole process group. Equal means: every epoch's loss and error, all weights, and a sweep's trials, bit for bit. Prints a
Markdown table; exit code 1 where anything differs. --launcher local,ray,tune; --out is an empty or absent folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from rounds import ROOT, harness, make_table, median_and_range, parse_options, publish
from safetensors.numpy import load_file

KINDS = {"local": ("driver", "group"), "ray": ("worker", "driver", "group"), "tune": ("driver", "group")}
EPOCH = re.compile(r"epoch \d+/\d+")
DATA = "--dataset digits --gpus 0 --loader resident --limit-train"
SAME = (
    "number",
    "fields",
    "key",
    "state",
    "epochs",
    "curve",
    "value",
)  # of a trial, whatever happened to the driver


class Case(NamedTuple):
    """A command small enough to be killed many times, and its folder."""

    launcher: str
    out: Path
    epochs: int
    images: int

    @property
    def command(self) -> list[str]:
        if sweeps := [path.parent.name for path in self.out.glob("tune/*/sweep.json")]:
            return harness("tune", "--resume", sweeps[0], "--out", self.out)
        words = {
            "local": f"run --depths 8 --epochs {self.epochs} --workers 1 --launcher local",
            "ray": f"run --depths 8 --epochs {self.epochs} --workers 2 --launcher ray",
            "tune": f"tune --depth 8 --epochs 3 --samples {-(-self.epochs // 3)} --search lr=loguniform(0.003,0.3) --concurrent 1",
        }  # fmt: skip
        return harness(*f"{words[self.launcher]} {DATA} {self.images}".split(), "--out", self.out)


class Running:
    """A command in a process group of its own, and the lines that it printed, with the time of each."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        self.began = time.monotonic()
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            for line in self.process.stdout:
                self.lines.append((time.monotonic(), line.rstrip()))

    def epochs(self) -> list[float]:
        """The time at which each epoch was reported."""
        return [at for at, line in self.lines if EPOCH.search(line)]

    def started_at(self) -> float | None:
        """The time at which the run was reported to start."""
        return next((at for at, line in self.lines if "starting" in line or "trials of" in line), None)

    def wait(self) -> int:
        """The exit code, when all lines are read."""
        code = self.process.wait(timeout=600)
        self._reader.join(timeout=10)  # processes of Ray may hold the pipe a little longer
        return code


def descendants(pid: int, title: str = "RayTrainWorker") -> list[int]:
    """The processes below a process whose command line holds `title`: by default the training workers."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(path.name)] = (path / "cmdline").read_bytes().decode(errors="replace")

    def is_below(child: int) -> bool:
        return (parent := parents.get(child, 0)) == pid or (parent > 0 and is_below(parent))

    return [child for child, words in titles.items() if title in words and is_below(child)]


def strike(running: Running, kind: str, chance: random.Random) -> bool:
    """Kill. False where there is nothing of that kind to be killed now."""
    pid = running.process.pid
    try:
        if kind == "group":
            os.killpg(pid, signal.SIGKILL)
        else:
            victims = [pid] if kind == "driver" else descendants(pid)
            os.kill(chance.choice(victims), signal.SIGKILL)
    except (ProcessLookupError, IndexError):
        return False
    return True


class Outcome(NamedTuple):
    """What a finished command left."""

    content: Any  # losses, errors and weights of each run; trials
    attempts: int
    kept: int  # epochs that the last attempt did not have to train again


def read_outcome(out: Path) -> Outcome:
    """Read all that is stored in a folder."""
    content: list[Any] = []
    most, kept = 1, 0
    for path in sorted(out.glob("*/record.json")):
        rows = [json.loads(line) for line in path.with_name("epochs.jsonl").read_text().splitlines()]
        attempts = (json.loads(path.read_text())["result"] or {"attempts": 1})["attempts"]
        most, kept = max(most, attempts), kept + sum(row["attempt"] < attempts for row in rows)
        weights = path.with_name("weights.safetensors")
        content.append((path.parent.name, [(row["loss"], row["error"]) for row in rows],
                        hash_weights(weights) if weights.exists() else None))  # fmt: skip
    for path in out.glob("tune/*/trials.json"):
        content += [{field: trial[field] for field in SAME} for trial in json.loads(path.read_text())["trials"]]
    return Outcome(content, most, kept)


def hash_weights(path: Path) -> str:
    """SHA-256 of names, shapes and values; a file holds them in any order."""
    digest = hashlib.sha256()
    for name, values in sorted(load_file(path).items()):
        digest.update(f"{name} {values.dtype} {values.shape}".encode() + values.tobytes())
    return digest.hexdigest()


def measure_whole(case: Case) -> tuple[Outcome, float, float]:
    """An undisturbed command: its outcome, seconds from its start to the first epoch, and of a further one."""
    whole = Running(case.command)
    code, started_at, times = whole.wait(), whole.started_at(), whole.epochs()
    if code or started_at is None:
        raise SystemExit("\n".join(line for _, line in whole.lines))
    return read_outcome(case.out), times[0] - started_at, (times[-1] - times[0]) / (len(times) - 1)


def try_once(
    case: Case, kind: str, point: tuple[int, float], chance: random.Random
) -> tuple[Outcome, dict[str, Any]]:
    """Start, kill so many seconds after the n-th epoch (0: the start), give the command again until it succeeds: the outcome, a reading."""
    running = Running(case.command)
    while running.process.poll() is None and (
        len(running.epochs()) < point[0] if point[0] else running.started_at() is None
    ):
        time.sleep(0.005)
    time.sleep(point[1])
    while not (struck := strike(running, kind, chance)) and running.process.poll() is None:
        time.sleep(0.02)
    killed_at = time.monotonic()
    seconds = killed_at - running.began
    commands, code, times = 1, running.wait(), running.epochs()
    while code and commands < 4:
        running = Running(case.command)
        commands, code = commands + 1, running.wait()
        times += running.epochs()
    if code:
        text = "\n".join(line for _, line in running.lines[-30:])
        raise SystemExit(f"{case.command}\nended with {code} after {kind} was killed at {seconds:.1f} s:\n{text}")
    outcome = read_outcome(case.out)
    after = [at for at in times if at > killed_at]
    return outcome, {
        "launcher": case.launcher, "killed": kind if struck else f"{kind} (had ended)", "after_seconds": seconds,
        "epoch": len(times) - len(after), "commands": commands, "attempts": outcome.attempts, "kept": outcome.kept,
        "recovery_seconds": min(after) - killed_at if after else None,
        "interrupted": commands > 1 or outcome.attempts > 1,
    }  # fmt: skip


def describe(content: dict[str, Any]) -> str:
    """The table of stored readings: a line for each launcher and kind of kill."""
    readings, rows = content["readings"], []
    for launcher, kind in dict.fromkeys((r["launcher"], r["killed"]) for r in readings):
        own = [r for r in readings if (r["launcher"], r["killed"]) == (launcher, kind)]
        seconds = [r["recovery_seconds"] for r in own if r["recovery_seconds"] is not None]
        cells = [launcher, kind, len(own), sum(r["interrupted"] for r in own), sum(r["equal"] for r in own)]
        rows.append([*cells, median_and_range(seconds, 2) if seconds else "–"])
    header = ("launcher", "killed", "times", "interrupted", "equal bit for bit", "seconds to the next epoch")
    return make_table(header, rows)


def main() -> int:
    """Kill, compare, print."""
    options = parse_options(
        __doc__, kills=60, launcher=",".join(KINDS), epochs=12, images=512, seed=0, out=Path("runs/chaos")
    )
    chance, launchers = random.Random(options.seed), options.launcher.split(",")

    def case(launcher: str, name: object) -> Case:
        return Case(launcher, options.out / f"{launcher}-{name}", options.epochs, options.images)

    whole = {launcher: measure_whole(case(launcher, "whole")) for launcher in launchers}
    readings: list[dict[str, Any]] = []
    for number in range(options.kills):
        launcher = launchers[number % len(launchers)]
        kind = KINDS[launcher][number // len(launchers) % len(KINDS[launcher])]
        reference, first, each = whole[launcher]
        epoch = chance.randrange(options.epochs)  # every epoch alike; 0: while it starts
        this = case(launcher, number)
        outcome, reading = try_once(this, kind, (epoch, chance.uniform(0, each if epoch else first)), chance)
        shutil.rmtree(this.out)
        readings.append(reading | {"equal": outcome.content == reference.content})
        print(f"{number + 1}/{options.kills} {readings[-1]}", file=sys.stderr, flush=True)
    publish(describe, options.json, epochs=options.epochs, images=options.images, readings=readings)
    return 0 if all(reading["equal"] for reading in readings) else 1


if __name__ == "__main__":
    sys.exit(main())
