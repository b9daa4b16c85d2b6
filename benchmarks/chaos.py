"""Kill runs at random moments, give the same command again, compare with an undisturbed run.

    python benchmarks/chaos.py --kills 60 --out /tmp/chaos

Three ways to die: one training worker (SIGKILL; the command itself continues), the driver (SIGKILL to the command), the
whole process group. Equal means: every epoch's loss and error, and all weights, bit for bit. Prints a Markdown table;
exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rounds import ROOT, make_table, median_and_range, write_readings

KINDS = {"local": ("driver", "group"), "ray": ("worker", "driver", "group")}
WORKERS = {"local": 1, "ray": 2}
EPOCH = re.compile(r"epoch (\d+)/(\d+)")


class Case(NamedTuple):
    """A command small enough to be killed many times, and its folder."""

    launcher: str
    out: Path
    epochs: int
    images: int

    @property
    def command(self) -> list[str]:
        words = f"""run --dataset digits --depths 8 --limit-train {self.images} --epochs {self.epochs} --gpus 0
                    --loader resident --workers {WORKERS[self.launcher]} --launcher {self.launcher}"""
        return [sys.executable, "-m", "harness.cli", *words.split(), "--out", str(self.out)]


@dataclass(slots=True)
class Running:
    """A command in a process group of its own, and the lines that it printed, with the time of each."""

    process: subprocess.Popen[str]
    began: float = field(default_factory=time.monotonic)
    lines: list[tuple[float, str]] = field(default_factory=list)
    reader: threading.Thread | None = None

    def read(self) -> None:
        """Collect lines until the command ends."""
        assert self.process.stdout is not None
        with self.process.stdout:
            for line in self.process.stdout:
                self.lines.append((time.monotonic(), line.rstrip()))

    def epochs(self) -> list[tuple[float, int]]:
        """The time at which each epoch was reported."""
        return [(at, int(match[1])) for at, line in self.lines if (match := EPOCH.search(line))]

    def reached(self, epoch: int) -> bool:
        """Whether that epoch was reported; 0: whether the run was reported to start."""
        return any(n >= epoch for _, n in self.epochs()) if epoch else any("starting" in s for _, s in self.lines)

    def wait(self) -> int:
        """The exit code, when all lines are read."""
        code = self.process.wait(timeout=600)
        assert self.reader is not None
        self.reader.join(timeout=10)  # processes of Ray may hold the pipe a little longer
        return code


def start(case: Case) -> Running:
    """Start a command."""
    process = subprocess.Popen(
        case.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    running = Running(process)
    running.reader = threading.Thread(target=running.read, daemon=True)
    running.reader.start()
    return running


def descendants(pid: int, title: bytes = b"RayTrainWorker") -> list[int]:
    """The processes below a process whose command line holds `title`: by default the training workers."""
    parents: dict[int, list[int]] = {}
    titles: dict[int, bytes] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            after = (path / "stat").read_text().rpartition(")")[2].split()
            titles[int(path.name)] = (path / "cmdline").read_bytes()
        except OSError:
            continue
        parents.setdefault(int(after[1]), []).append(int(path.name))
    below, queue = [], [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        below += children
        queue += children
    return [child for child in below if title in titles[child]]


def strike(running: Running, kind: str, chance: random.Random) -> bool:
    """Kill. False where there is nothing of that kind to be killed now."""
    pid = running.process.pid
    try:
        if kind == "group":
            os.killpg(pid, signal.SIGKILL)
        elif kind == "driver":
            os.kill(pid, signal.SIGKILL)
        elif workers := descendants(pid):
            os.kill(chance.choice(workers), signal.SIGKILL)
        else:
            return False
    except ProcessLookupError:
        return False
    return True


class Outcome(NamedTuple):
    """What a finished run left."""

    curve: tuple[tuple[float, float], ...]  # loss and error
    weights: str  # SHA-256 of names, shapes and bytes
    attempts: int
    kept: int  # epochs that the last attempt did not have to train again

    def equals(self, other: Outcome) -> bool:
        return (self.curve, self.weights) == (other.curve, other.weights)


def read_outcome(out: Path) -> Outcome:
    """Read the only run stored in a folder."""
    (folder,) = [path.parent for path in out.glob("*/record.json") if not path.parent.name.endswith(".partial")]
    rows = [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]
    attempts = json.loads((folder / "record.json").read_text())["result"]["attempts"]
    content = (folder / "weights.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)  # written in any order
    weights = hashlib.sha256(json.dumps(header, sort_keys=True).encode() + content[start:]).hexdigest()
    curve = tuple((row["loss"], row["error"]) for row in rows)
    return Outcome(curve, weights, attempts, sum(row["attempt"] < attempts for row in rows))


def measure_whole(case: Case) -> tuple[Outcome, float, float]:
    """An undisturbed run: its outcome, seconds from its start to the first epoch, and of a further one."""
    whole = start(case)
    if whole.wait():
        raise SystemExit("\n".join(line for _, line in whole.lines))
    starting = next(at for at, line in whole.lines if "starting" in line)
    times = [at for at, _ in whole.epochs()]
    return read_outcome(case.out), times[0] - starting, (times[-1] - times[0]) / (len(times) - 1)


def try_once(
    case: Case, kind: str, point: tuple[int, float], chance: random.Random
) -> tuple[Outcome, dict[str, Any]]:
    """Start, kill so many seconds after an epoch, give the command again until it succeeds: the outcome, a reading."""
    running = start(case)
    while running.process.poll() is None and not running.reached(point[0]):
        time.sleep(0.005)
    time.sleep(point[1])
    while not (struck := strike(running, kind, chance)) and running.process.poll() is None:
        time.sleep(0.02)
    killed_at = time.monotonic()
    seconds = killed_at - running.began
    commands, code = 1, running.wait()
    before = [number for at, number in running.epochs() if at <= killed_at]
    after = [at for at, _ in running.epochs() if at > killed_at]
    while code and commands < 4:
        running = start(case)
        commands, code = commands + 1, running.wait()
        after += [at for at, _ in running.epochs()]
    if code:
        text = "\n".join(line for _, line in running.lines[-30:])
        raise SystemExit(f"{case.command}\nended with {code} after {kind} was killed at {seconds:.1f} s:\n{text}")
    outcome = read_outcome(case.out)
    return outcome, {
        "launcher": case.launcher, "killed": kind if struck else f"{kind} (had ended)", "after_seconds": seconds,
        "epoch": max(before, default=0), "commands": commands, "attempts": outcome.attempts, "kept": outcome.kept,
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--launcher", choices=("both", *KINDS), default="both")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="an empty or absent folder")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    launchers = tuple(KINDS) if options.launcher == "both" else (options.launcher,)

    def case(launcher: str, name: object) -> Case:
        return Case(launcher, options.out / f"{launcher}-{name}", options.epochs, options.images)

    whole = {launcher: measure_whole(case(launcher, "whole")) for launcher in launchers}
    readings: list[dict[str, Any]] = []
    for number in range(options.kills):
        launcher = launchers[number % len(launchers)]
        kind = KINDS[launcher][number // len(launchers) % len(KINDS[launcher])]
        reference, first, each = whole[launcher]
        epoch = chance.randrange(options.epochs)  # every epoch alike; 0: while it starts
        point = (epoch, chance.uniform(0, each if epoch else first))
        this = case(launcher, number)
        outcome, reading = try_once(this, kind, point, chance)
        shutil.rmtree(this.out)
        readings.append(reading | {"equal": outcome.equals(reference)})
        print(f"{number + 1}/{options.kills} {readings[-1]}", file=sys.stderr, flush=True)
        write_readings(options.json, epochs=options.epochs, images=options.images, readings=readings)
    print(describe({"readings": readings}))
    return 0 if all(reading["equal"] for reading in readings) else 1


if __name__ == "__main__":
    sys.exit(main())
