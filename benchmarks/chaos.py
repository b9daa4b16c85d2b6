"""Strike runs and sweeps at random moments, give the same command again, compare with an undisturbed one.

    python benchmarks/chaos.py --faults 60 --out /tmp/chaos                       processes killed, in this machine
    sudo python benchmarks/chaos.py --where all --faults 200 --strikes 3 --out /tmp/chaos
                                                       and nodes, links, disks and clocks, of clusters; each command struck thrice

Equal means: every epoch's loss and error, all weights, and a sweep's trials, bit for bit. What each fault came to is added to
OUT/faults.jsonl at once: the same command goes on after the last. Prints a Markdown table; exit code 1 where anything differs.
"""

from __future__ import annotations

import hashlib
import json
import math
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
STALL = 10  # seconds, the least that is allowed: a rank that hangs is named before Ray gives up its node
CLOCK_SECONDS = 30  # of a step: Ray goes by the wall clock, and waits for as long as it is set back
DISK_MIB = 2200  # of the disk that is filled, in memory; `harness run` wants 2 GiB free at its start
EPOCH = re.compile(r"((?:trial \d+/\d+: )?epoch \d+/\d+)  (?:loss|error)")
LOOK_SECONDS = 3  # between two looks for nodes that have ended
MOST_COMMANDS, MOST_SECONDS = 8, 1200  # in which a command that is given again must have succeeded
DATA = "--dataset digits --gpus 0 --loader resident --limit-train"
SAME = ("number", "fields", "key", "state", "epochs", "curve", "value")  # of a trial, whoever was struck


class Case(NamedTuple):
    """A command small enough to be struck many times, where it runs, and its folder."""

    where: str
    out: Path
    epochs: int
    images: int
    log: Path  # of all lines that its commands print
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
        return Running(self)


class Running:
    """A command in a process group of its own, and the lines that it printed, with the time of each."""

    def __init__(self, case: Case) -> None:
        environment = case.nodes.environment if case.nodes else None
        self.process = subprocess.Popen(
            case.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        self.began, self.case = time.monotonic(), case
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout, self.case.log.open("a", encoding="utf-8") as log:
            for line in self.process.stdout:
                self.lines.append((time.monotonic(), line.rstrip()))
                at = f"{self.case.out.name} {time.monotonic() - self.began:.1f}"
                print(at, line, end="", file=log, flush=True)

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
                return lambda: go_on(victim)
            os.kill(victim, signal.SIGKILL)
            return nodes.repair if nodes and kind == "raylet" else lambda: None
        elif nodes:
            return strike_nodes(nodes, case.out, kind, chance)
    except (ProcessLookupError, IndexError):
        return None
    return lambda: None


def go_on(pid: int) -> None:
    """Let a stopped process go on, which may have been given up."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


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
        nodes.set_clock(chance.choice(nodes.names), chance.choice((-CLOCK_SECONDS, CLOCK_SECONDS)))
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


def read_outcome(out: Path) -> list[Any]:
    """What a finished command left in its folder: losses, errors and weights of each run; trials."""
    content: list[Any] = []
    for path in sorted(out.glob("*/record.json")):
        rows = [json.loads(line) for line in path.with_name("epochs.jsonl").read_text().splitlines()]
        weights = path.with_name("weights.safetensors")
        content.append((path.parent.name, [(row["loss"], row["error"]) for row in rows],
                        hash_weights(weights) if weights.exists() else None))  # fmt: skip
    for path in out.glob("tune/*/trials.json"):
        content += [{field: trial[field] for field in SAME} for trial in json.loads(path.read_text())["trials"]]
    return content


def hash_weights(path: Path) -> str:
    """SHA-256 of names, shapes and values; a file holds them in any order."""
    digest = hashlib.sha256()
    for name, values in sorted(load_file(path).items()):
        digest.update(f"{name} {values.dtype} {values.shape}".encode() + values.tobytes())
    return digest.hexdigest()


def measure_whole(case: Case) -> tuple[list[Any], float, float]:
    """An undisturbed command: its outcome, seconds from its start to the first epoch, and of a further one."""
    whole = case.run()
    code, started_at, times = whole.wait(), whole.started_at(), whole.epochs()
    if code or started_at is None:
        raise SystemExit("\n".join(line for _, line in whole.lines))
    return read_outcome(case.out), times[0] - started_at, (times[-1] - times[0]) / (len(times) - 1)


class Struck:
    """One command, given again whenever it ends before its time; all that it printed."""

    def __init__(self, case: Case) -> None:
        self.case, self.commands = case, [case.run()]
        self.until = time.monotonic() + MOST_SECONDS
        self.look_at = 0.0

    @property
    def lines(self) -> list[tuple[float, str]]:
        """Of every time that the command was given."""
        return [line for running in self.commands for line in running.lines]

    def progress(self) -> int:
        """How many epochs were reported, those once that were trained again."""
        return len({found[1] for _, line in self.lines if (found := EPOCH.search(line))})

    def has_succeeded(self) -> bool:
        """Whether all is done. A command that ended otherwise is given again, not without end."""
        if time.monotonic() > self.until:
            raise SystemExit(f"{self.case.command}\nhas not ended within {MOST_SECONDS} s")
        if self.case.nodes and time.monotonic() > self.look_at:
            self.case.nodes.restart()
            self.look_at = time.monotonic() + LOOK_SECONDS
        if (code := self.commands[-1].process.poll()) is None:
            return False
        if self.commands[-1].wait() and len(self.commands) == MOST_COMMANDS:
            text = "\n".join(line for _, line in self.commands[-1].lines[-30:])
            raise SystemExit(f"{self.case.command}\nended with {code}:\n{text}")
        if code:
            if self.case.nodes:
                self.case.nodes.repair()
            self.commands.append(self.case.run())
        return code == 0


class Strike(NamedTuple):
    """A fault, `seconds` after so many epochs were reported (0: after the start)."""

    kind: str
    epoch: int
    seconds: float


def try_once(
    case: Case, strikes: Sequence[Strike], chance: random.Random
) -> tuple[list[Any], list[dict[str, Any]]]:
    """Give the command, strike it, give it again until it succeeds: the outcome, a reading of each strike."""
    struck, struck_at, ended = Struck(case), list[float](), list[bool]()
    for kind, epoch, seconds in strikes:
        while not (over := struck.has_succeeded()):
            if struck.progress() >= epoch if epoch else struck.commands[-1].started_at() is not None:
                break
            time.sleep(0.005)
        time.sleep(seconds)
        end = None
        while not over and not (end := strike(case, struck.commands[-1], kind, chance)):
            over = struck.commands[-1].process.poll() is not None
            time.sleep(0.02)
        with case.log.open("a", encoding="utf-8") as log:
            print(f"{case.out.name} {kind}", file=log)
        struck_at.append(time.monotonic())
        ended.append(end is None)
        if end and kind in (*STOPPED, *OF_NODES):
            with suppress(subprocess.TimeoutExpired):
                struck.commands[-1].process.wait(timeout=chance.uniform(*SECONDS.get(kind, (3, 8))))
            end()
    while not struck.has_succeeded():
        time.sleep(0.1)
    readings = []
    for i, (strike_, at, later) in enumerate(zip(strikes, struck_at, [*struck_at[1:], math.inf], strict=True)):
        between = [(when, line) for when, line in struck.lines if at < when <= later]
        begun = [running.began for running in struck.commands if at < running.began <= later]
        again = begun + [when for when, line in between if "trying again" in line]
        after = [when for when, line in between if EPOCH.search(line) and when > max(again, default=at)]
        readings.append({
            "where": case.where, "fault": f"{strike_.kind}{' (had ended)' * ended[i]}", "strike": i + 1,
            "after_seconds": at - struck.commands[0].began, "epoch": strike_.epoch, "commands": len(begun),
            "interrupted": bool(again), "named": any("no step for" in line for _, line in between),
            "recovery_seconds": after[0] - at if after else None,
        })  # fmt: skip
    return read_outcome(case.out), readings


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
    """Strike one place's command at random, each of the numbers the first of some strikes; add a line to the log for each."""
    with ExitStack() as stack:
        nodes, folder, epochs = None, options.out, options.epochs * options.strikes
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
            return Case(where, out, epochs, options.images, options.out / "lines.txt", nodes)

        reference, first, each = measure_whole(make("whole"))
        kinds, part = KINDS[where], epochs / options.strikes
        for first_number in numbers:
            chance, case = random.Random(f"{options.seed} {first_number}"), make(first_number)
            own = range(first_number, min(first_number + options.strikes, options.faults))
            turn = first_number // options.strikes // len(options.where.split(";")) * options.strikes
            strikes = []
            for i in range(len(own)):
                epoch = round(i * part) + chance.randrange(round(part))  # every epoch alike; 0: while it starts
                seconds = chance.uniform(0, each if epoch else first)
                strikes.append(Strike(kinds[(turn + i) % len(kinds)], epoch, seconds))
            outcome, readings = try_once(case, strikes, chance)
            shutil.rmtree(case.out)
            equal = outcome == reference
            with log.open("a", encoding="utf-8") as file:
                for number, reading in zip(own, readings, strict=True):
                    reading |= {"equal": equal, "number": number}
                    print(json.dumps(reading), file=file)
                    print(f"{number + 1}/{options.faults} {reading}", file=sys.stderr, flush=True)
            if nodes:
                nodes.repair()


def main() -> int:
    """Strike, compare, print."""
    options = parse_options(
        __doc__,
        faults=60,
        strikes=1,
        where="local;ray;tune",
        epochs=12,
        images=512,
        seed=0,
        out=Path("runs/chaos"),
    )
    if options.where == "all":
        options.where = ";".join(KINDS)
    places, log = options.where.split(";"), options.out / "faults.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    log.touch()
    done = {json.loads(line)["number"] for line in log.read_text(encoding="utf-8").splitlines()}
    for place, where in enumerate(places):
        step = options.strikes * len(places)
        if left := [n for n in range(place * options.strikes, options.faults, step) if n not in done]:
            strike_all(where, left, options, log)
    readings = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    publish(
        describe,
        options.json,
        epochs=options.epochs,
        strikes=options.strikes,
        images=options.images,
        readings=readings,
    )
    return 0 if all(reading["equal"] for reading in readings) else 1


if __name__ == "__main__":
    sys.exit(main())
