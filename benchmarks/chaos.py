"""Kill runs at random moments, give the same command again, compare with a run that nothing happened to.

    python benchmarks/chaos.py --kills 24 --out /tmp/chaos

Three ways to die: one training worker (SIGKILL; the command itself goes on), the driver (SIGKILL to the command), the
whole process group (SIGKILL to all that the command's group holds). Equal means: every epoch's loss and error, and
the file of weights, bit for bit. Prints a Markdown table; exit code 1 where anything differs.
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

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"local": ("driver", "group"), "ray": ("worker", "driver", "group")}
WORKERS = {"local": 1, "ray": 2}
EPOCH = re.compile(r"epoch (\d+)/(\d+)")


def make_command(launcher: str, out: Path, *, epochs: int, images: int) -> list[str]:
    """A run small enough to be killed many times: depth 8 on digits."""
    words = f"""run --dataset digits --depths 8 --limit-train {images} --epochs {epochs} --gpus 0 --loader resident
                --workers {WORKERS[launcher]} --launcher {launcher}"""
    return [sys.executable, "-m", "harness.cli", *words.split(), "--out", str(out)]


@dataclass(slots=True)
class Running:
    """A command in a process group of its own, and the lines that it printed, with the time of each."""

    process: subprocess.Popen[str]
    began: float
    lines: list[tuple[float, str]] = field(default_factory=list)
    reader: threading.Thread | None = None

    def epochs(self) -> list[tuple[float, int]]:
        """When which epoch was said to be done."""
        return [(at, int(found[1])) for at, line in self.lines if (found := EPOCH.search(line))]

    def reached(self, epoch: int) -> bool:
        """Whether that many epochs were said to be done; 0: whether the run was said to start."""
        if epoch:
            return any(number >= epoch for _, number in self.epochs())
        return any("starting" in line for _, line in self.lines)

    def wait(self) -> int:
        """The exit code, when all lines are read."""
        code = self.process.wait(timeout=600)
        assert self.reader is not None
        self.reader.join(timeout=10)  # processes of Ray may hold the pipe a little longer
        return code


def run(command: list[str]) -> Running:
    """Start a command."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    running = Running(process, time.monotonic())

    def read() -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                running.lines.append((time.monotonic(), line.rstrip()))

    running.reader = threading.Thread(target=read, daemon=True)
    running.reader.start()
    return running


def descendants(pid: int) -> list[tuple[int, str]]:
    """Every process below `pid`, with its title."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            after = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(after[1]), []).append(int(path.parent.name))
    found, queue = [], [pid]
    while queue:
        for child in parents.get(queue.pop(), []):
            try:
                title = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            found.append((child, title))
            queue.append(child)
    return found


def strike(running: Running, kind: str, chance: random.Random) -> bool:
    """Kill. False where there is nothing of that kind to be killed now."""
    pid = running.process.pid
    try:
        if kind == "worker":
            workers = [child for child, title in descendants(pid) if "RayTrainWorker" in title]
            if not workers:
                return False
            os.kill(chance.choice(workers), signal.SIGKILL)
        elif kind == "driver":
            os.kill(pid, signal.SIGKILL)
        else:
            os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished run left."""

    losses: tuple[float, ...]
    errors: tuple[float, ...]
    weights: str  # SHA-256
    attempts: int
    kept: int  # epochs that the last attempt did not have to train again


def hash_weights(path: Path) -> str:
    """SHA-256 of the tensors' names, shapes and bytes. The notes in the header are written in any order."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode() + content[start:]).hexdigest()


def read_outcome(out: Path) -> Outcome:
    """Read the only run stored in a folder."""
    (folder,) = [path.parent for path in out.glob("*/record.json") if not path.parent.name.endswith(".partial")]
    rows = [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]
    attempts = json.loads((folder / "record.json").read_text())["result"]["attempts"]
    return Outcome(
        losses=tuple(row["loss"] for row in rows),
        errors=tuple(row["error"] for row in rows),
        weights=hash_weights(folder / "weights.safetensors"),
        attempts=attempts,
        kept=sum(row["attempt"] < attempts for row in rows),
    )


@dataclass(frozen=True, slots=True)
class Trial:
    """One run that was killed, and what became of it."""

    launcher: str
    kind: str
    at_seconds: float  # from the command's start
    epoch: int  # the last one said to be done before; 0 while starting
    commands: int  # how often the command was given
    outcome: Outcome
    equal: bool
    recovery_seconds: float | None  # from the kill to the next epoch said to be done; None where none came after


def try_once(
    launcher: str,
    kind: str,
    out: Path,
    reference: Outcome,
    point: tuple[int, float],
    chance: random.Random,
    **size: int,
) -> Trial:
    """Start, kill so many seconds after so many epochs, give the command again until it ends well, compare."""
    command = make_command(launcher, out, **size)
    running = run(command)
    epoch, seconds = point
    while running.process.poll() is None and not running.reached(epoch):
        time.sleep(0.005)
    time.sleep(seconds)
    while not (struck := strike(running, kind, chance)) and running.process.poll() is None:
        time.sleep(0.02)
    killed_at = time.monotonic()
    at_seconds = killed_at - running.began
    commands, codes = 1, [running.wait()]
    before = [number for at, number in running.epochs() if at <= killed_at]
    after = [at for at, _ in running.epochs() if at > killed_at]
    while codes[-1] and commands < 4:
        running = run(command)
        commands += 1
        codes.append(running.wait())
        after += [at for at, _ in running.epochs()]
    if codes[-1]:
        text = "\n".join(line for _, line in running.lines[-30:])
        raise SystemExit(
            f"{' '.join(command)}\nended with {codes} after {kind} was killed at {at_seconds:.1f} s:\n{text}"
        )
    outcome = read_outcome(out)
    equal = (outcome.losses, outcome.errors, outcome.weights) == (
        reference.losses,
        reference.errors,
        reference.weights,
    )
    return Trial(
        launcher=launcher, kind=kind if struck else f"{kind} (had ended)", at_seconds=at_seconds,
        epoch=max(before, default=0), commands=commands, outcome=outcome, equal=equal,
        recovery_seconds=min(after) - killed_at if after else None,
    )  # fmt: skip


def main() -> int:
    """Kill, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--launcher", choices=("both", *KINDS), default="both")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="an empty or absent folder")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    size = {"epochs": options.epochs, "images": options.images}
    launchers = tuple(KINDS) if options.launcher == "both" else (options.launcher,)
    references: dict[str, tuple[Outcome, float, float]] = {}  # seconds to the first epoch's end, of one more
    for launcher in launchers:
        whole = run(make_command(launcher, options.out / f"{launcher}-whole", **size))
        if whole.wait():
            raise SystemExit("\n".join(line for _, line in whole.lines))
        starting = next(at for at, line in whole.lines if "starting" in line)
        at = [at for at, _ in whole.epochs()]
        references[launcher] = (
            read_outcome(options.out / f"{launcher}-whole"),
            at[0] - starting,
            (at[-1] - at[0]) / (len(at) - 1),
        )
    print(
        "| launcher | killed | after s | epoch | commands | attempts | epochs kept | equal | s to the next epoch |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---|---:|", flush=True)
    trials = []
    for number in range(options.kills):
        launcher = launchers[number % len(launchers)]
        kinds = KINDS[launcher]
        kind = kinds[number // len(launchers) % len(kinds)]
        reference, first, each = references[launcher]
        out = options.out / f"{launcher}-{number}"
        epoch = chance.randrange(options.epochs)  # every epoch alike; 0: while it starts
        point = (epoch, chance.uniform(0, each if epoch else first))
        trial = try_once(launcher, kind, out, reference, point, chance, **size)
        shutil.rmtree(out)
        trials.append(trial)
        recovery = "" if trial.recovery_seconds is None else f"{trial.recovery_seconds:.1f}"
        print(
            f"| {trial.launcher} | {trial.kind} | {trial.at_seconds:.1f} | {trial.epoch}/{options.epochs} | "
            f"{trial.commands} | {trial.outcome.attempts} | {trial.outcome.kept} | {'yes' if trial.equal else 'NO'} | "
            f"{recovery} |",
            flush=True,
        )
    equal = sum(trial.equal for trial in trials)
    interrupted = sum(trial.commands > 1 or trial.outcome.attempts > 1 for trial in trials)
    print(f"\n{len(trials)} kills, {interrupted} runs interrupted, {equal} results equal bit for bit")
    return 0 if equal == len(trials) else 1


if __name__ == "__main__":
    sys.exit(main())
