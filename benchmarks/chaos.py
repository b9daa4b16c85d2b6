"""Strike runs and sweeps at random moments, give the same command again, compare with an undisturbed one.

    python benchmarks/chaos.py --faults 60 --out /tmp/chaos                       processes killed, in this machine
    sudo python benchmarks/chaos.py --where all --faults 200 --out /tmp/chaos     and nodes, links, disks and clocks, of clusters

Equal means: every epoch's loss and error, all weights, and a sweep's trials, bit for bit. What each fault came to is added to
OUT/faults.jsonl at once: the same command goes on after the last. Prints a Markdown table; exit code 1 where anything differs.
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
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

from nodes import Nodes
from rounds import ROOT, harness, make_table, median_and_range, parse_options, publish
from safetensors.numpy import load_file

PROCESSES = {
    "worker": "RayTrainWorker", "controller": "TrainController", "raylet": "raylet/raylet", "gcs": "gcs_server",
}  # fmt: skip
"""A word of their command lines."""
STOPPED = {f"stopped {name}": PROCESSES[name] for name in ("worker", "raylet")}  # SIGSTOP for a while
OF_NODES = ("gcs", "raylet", "node", "drain", "stopped raylet", "link cut", "silent link", "slow link", "disk full",
            "clock step")  # fmt: skip
OF_RUNS = ("worker", "controller", "driver", "stopped worker")
KINDS = {
    "local": ("driver", "group"), "ray": ("group", *OF_RUNS), "tune": ("driver", "group"),
    "2 nodes": (*OF_RUNS, *OF_NODES), "3 nodes": (*OF_RUNS, *OF_NODES), "3 nodes, tune": ("driver", *OF_NODES),
}  # fmt: skip
LONG = ("link cut", "silent link", "stopped worker", "stopped raylet")
SECONDS = {"drain": (8, 12), **dict.fromkeys(LONG, (2, 20))}
"""How long a fault lasts where that is not 3 to 8 seconds."""
STALL = 8  # seconds: a rank that hangs is named before Ray gives up its node
DISK_MIB = 2200  # of the disk that is filled, in memory; `harness run` wants 2 GiB free at its start
EPOCH = re.compile(r"epoch \d+/\d+  (loss|error)")
DATA = "--dataset digits --gpus 0 --loader resident --limit-train"
SAME = ("number", "fields", "key", "state", "epochs", "curve", "value")  # of a trial, whoever was struck


class Case(NamedTuple):
    """A command small enough to be struck many times, where it runs, and its folder."""

    where: str
    out: Path
    epochs: int
    images: int
    nodes: Nodes | None = None

    @property
    def command(self) -> list[str]:
        sweep = [path.parent.name for path in self.out.glob("tune/*/sweep.json")]
        trials = f"--epochs 3 --samples {-(-self.epochs // 3)} --search lr=loguniform(0.003,0.3) --concurrent 1"
        kind = "local" if self.where == "local" else "ray"
        words = f"run --depths 8 --epochs {self.epochs} --launcher {kind} {DATA} {self.images}"
        if "tune" in self.where:
            words = f"tune --resume {sweep[0]}" if sweep else f"tune --depth 8 {trials} {DATA} {self.images}"
        if not sweep:
            words += f" --workers {1 if self.where in ('local', 'tune') else 2}"
        if self.nodes and "tune" not in self.where:
            words += f" --placement spread --stall-seconds {STALL}"
        if self.nodes is None:
            return harness(*words.split(), "--out", self.out)
        return self.nodes.inside("a", harness(*words.split(), "--address", self.nodes.head, "--out", self.out))

    def run(self) -> Running:
        """Give the command."""
        return Running(self.command, self.nodes.environment if self.nodes else None)


class Running:
    """A command in a process group of its own, and the lines that it printed, with the time of each."""

    def __init__(self, command: Sequence[str], environment: dict[str, str] | None) -> None:
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
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


def strike(case: Case, running: Running, kind: str, chance: random.Random) -> Callable[[], object] | None:
    """Let something happen. Returns what ends it; None where there is nothing of that kind to be struck now."""
    pid, nodes = running.process.pid, case.nodes
    try:
        if kind == "group":
            os.killpg(pid, signal.SIGKILL)
        elif kind == "driver":
            os.kill(pid, signal.SIGKILL)
        elif title := PROCESSES.get(kind) or STOPPED.get(kind):
            victim = chance.choice(nodes.pids(title) if nodes else descendants(pid, title))
            if kind in STOPPED:
                os.kill(victim, signal.SIGSTOP)
                return lambda: go_on(victim, nodes)
            os.kill(victim, signal.SIGKILL)
            return nodes.repair if nodes and kind == "raylet" else lambda: None
        elif nodes:
            return strike_nodes(nodes, case.out, kind, chance)
    except (ProcessLookupError, IndexError):
        return None
    return lambda: None


def go_on(pid: int, nodes: Nodes | None) -> None:
    """Let a stopped process go on, which may have been given up."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    if nodes:
        time.sleep(2)  # a raylet that was given up ends when it learns of it
        nodes.repair()


def strike_nodes(nodes: Nodes, out: Path, kind: str, chance: random.Random) -> Callable[[], object]:
    """Strike a node, its link, its clock, or the disk that results go to."""
    name = chance.choice(nodes.names[1:])  # not the head, with which the driver would be lost
    if kind == "disk full":
        hole = out.parent / "hole"
        with suppress(OSError), hole.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**16))
        return lambda: hole.unlink(missing_ok=True)
    if kind == "clock step":
        nodes.set_clock(chance.choice(nodes.names), chance.choice((-3600, 3600)))
    elif kind == "drain":
        nodes.drain(name, 8)

        def take_away() -> None:
            nodes.kill(name)
            nodes.repair()

        return take_away
    elif kind == "slow link":
        nodes.slow(name, on=True)
    else:
        {"node": nodes.kill, "link cut": nodes.cut, "silent link": nodes.silence}[kind](name)
    return nodes.repair


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
    whole = case.run()
    code, started_at, times = whole.wait(), whole.started_at(), whole.epochs()
    if code or started_at is None:
        raise SystemExit("\n".join(line for _, line in whole.lines))
    return read_outcome(case.out), times[0] - started_at, (times[-1] - times[0]) / (len(times) - 1)


def try_once(
    case: Case, kind: str, point: tuple[int, float], chance: random.Random
) -> tuple[Outcome, dict[str, Any]]:
    """Start, strike so many seconds after the n-th epoch (0: the start), give the command again until it succeeds: the outcome, a reading."""
    running = case.run()
    while running.process.poll() is None and (
        len(running.epochs()) < point[0] if point[0] else running.started_at() is None
    ):
        time.sleep(0.005)
    time.sleep(point[1])
    while not (end := strike(case, running, kind, chance)) and running.process.poll() is None:
        time.sleep(0.02)
    struck_at = time.monotonic()
    seconds, lasts = struck_at - running.began, chance.uniform(*SECONDS.get(kind, (3, 8)))
    if end and kind in (*STOPPED, *OF_NODES):
        with suppress(subprocess.TimeoutExpired):
            running.process.wait(timeout=lasts)
        end()
    commands, code, times, lines = 1, running.wait(), running.epochs(), running.lines
    while code and commands < 4:
        if case.nodes:
            case.nodes.repair()
        running = case.run()
        commands, code = commands + 1, running.wait()
        times, lines = times + running.epochs(), lines + running.lines
    if code:
        text = "\n".join(line for _, line in running.lines[-30:])
        raise SystemExit(f"{case.command}\nended with {code} after {kind} at {seconds:.1f} s:\n{text}")
    outcome = read_outcome(case.out)
    again = [at for at, line in lines if "trying again" in line and at > struck_at]
    going_on_at = running.began if commands > 1 else max(again, default=struck_at)
    after = [at for at in times if at > going_on_at]
    return outcome, {
        "where": case.where, "fault": kind if end else f"{kind} (had ended)", "after_seconds": seconds,
        "epoch": sum(at <= struck_at for at in times), "commands": commands, "attempts": outcome.attempts, "kept": outcome.kept,
        "recovery_seconds": min(after) - struck_at if after else None,
        "interrupted": commands > 1 or outcome.attempts > 1, "named": any("no step for" in line for _, line in lines),
    }  # fmt: skip


def describe(content: dict[str, Any]) -> str:
    """The table of stored readings: a line for each place and kind of fault."""
    readings, rows = content["readings"], []
    for where, kind in dict.fromkeys((r["where"], r["fault"]) for r in readings):
        own = [r for r in readings if (r["where"], r["fault"]) == (where, kind)]
        seconds = [r["recovery_seconds"] for r in own if r["recovery_seconds"] is not None]
        cells = [where, kind, len(own), *(sum(r[name] for r in own) for name in ("interrupted", "named", "equal"))]
        rows.append([*cells, median_and_range(seconds, 2) if seconds else "–"])
    header = ("where", "fault", "times", "interrupted", "hang named", "equal bit for bit", "seconds to next epoch")
    return make_table(header, rows)


def strike_all(where: str, numbers: Sequence[int], options: Any, log: Path) -> None:
    """Strike one place's command at random, once for each of the numbers; add a line to the log for each."""
    with ExitStack() as stack:
        nodes, folder = None, options.out
        if "nodes" in where:
            folder = options.out / "disk"  # before the nodes, whose processes do not see what is mounted later
            folder.mkdir(exist_ok=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", folder], check=True)
            stack.callback(subprocess.run, ["umount", "--lazy", folder], check=False)
            nodes = Nodes(int(where[0]), options.out / "logs")
            stack.callback(nodes.close)
            nodes.check_closed()

        def make(name: object) -> Case:
            out = folder / f"{where}-{name}".replace(", ", "-").replace(" ", "-")
            shutil.rmtree(out, ignore_errors=True)  # of a script that was stopped
            return Case(where, out, options.epochs, options.images, nodes)

        reference, first, each = measure_whole(make("whole"))
        for number in numbers:
            chance, kinds = random.Random(f"{options.seed} {number}"), KINDS[where]
            epoch = chance.randrange(options.epochs)  # every epoch alike; 0: while it starts
            case, kind = make(number), kinds[number // len(options.where.split(";")) % len(kinds)]
            outcome, reading = try_once(case, kind, (epoch, chance.uniform(0, each if epoch else first)), chance)
            shutil.rmtree(case.out)
            reading |= {"equal": outcome.content == reference.content, "number": number}
            with log.open("a", encoding="utf-8") as file:
                print(json.dumps(reading), file=file)
            print(f"{number + 1}/{options.faults} {reading}", file=sys.stderr, flush=True)
            if nodes:
                nodes.repair()


def main() -> int:
    """Strike, compare, print."""
    options = parse_options(
        __doc__, faults=60, where="local;ray;tune", epochs=12, images=512, seed=0, out=Path("runs/chaos")
    )
    if options.where == "all":
        options.where = ";".join(KINDS)
    places, log = options.where.split(";"), options.out / "faults.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    log.touch()
    done = {json.loads(line)["number"] for line in log.read_text(encoding="utf-8").splitlines()}
    for place, where in enumerate(places):
        if left := [n for n in range(place, options.faults, len(places)) if n not in done]:
            strike_all(where, left, options, log)
    readings = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    publish(describe, options.json, epochs=options.epochs, images=options.images, readings=readings)
    return 0 if all(reading["equal"] for reading in readings) else 1


if __name__ == "__main__":
    sys.exit(main())
