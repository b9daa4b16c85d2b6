"""What a search costs beside its training, and whether one continues after its driver was killed.

    python benchmarks/tune.py overhead [--workers 2]     seconds a trial beside training, after the first
    python benchmarks/tune.py kill [--kills 3]           SIGKILL the driver, resume, compare with an undisturbed sweep

Both run `harness tune` on digits with a network of depth 8, on the CPU. Exit code 1 where a claim does not hold: at
most 2 s of overhead a trial for one worker; the same trials, curves and ends after kills as without.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rounds import write_readings

BASE = "tune --dataset digits --depth 8 --limit-train 256 --gpus 0 --loader resident --search lr=loguniform(0.003,0.3)"
LIMIT_SECONDS = 2.0
SAME = (
    "number",
    "fields",
    "key",
    "state",
    "epochs",
    "curve",
    "value",
)  # of a trial, whatever happened to the driver


def start(words: str, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "harness.cli", *words.split(), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def load_trials(out: Path) -> list[dict[str, Any]]:
    (path,) = out.glob("tune/*/trials.json")
    trials: list[dict[str, Any]] = json.loads(path.read_text())["trials"]
    return trials


def measure_overhead(folder: Path, workers: int, json_path: Path | None) -> bool:
    """Wall time from the end of the first trial to the end of the last, less training and evaluation."""
    process = start(f"{BASE} --epochs 3 --samples 9 --scheduler none --concurrent 1 --workers {workers}", folder)
    assert process.stdout is not None
    ends = [time.monotonic() for line in process.stdout if re.match(r"trial \d+/\d+: finished", line)]
    assert process.wait() == 0
    trials = load_trials(folder)[1:]
    training, wall = sum(trial["seconds"] for trial in trials), ends[-1] - ends[0]
    each = (wall - training) / len(trials)
    print(f"{len(trials)} trials after the first, {workers} workers: {wall:.1f} s, of which training {training:.1f} s; "
          f"{each:.2f} s a trial beside it")  # fmt: skip
    content = {"workers": workers, "trials": len(trials), "wall_seconds": wall, "training_seconds": training}
    write_readings(json_path, **content)
    return each <= LIMIT_SECONDS or workers > 1


def kill_and_compare(folder: Path, kills: int, algorithm: str) -> bool:
    """Kill the driver after some epochs, again and again; compare with a sweep that was left alone."""
    words = f"{BASE} --epochs 4 --samples 8 --concurrent 1 --search-algorithm {algorithm}"
    whole, cut, done, code = folder / "whole", folder / "cut", 0, 1
    process = start(words, whole)
    process.communicate()
    assert process.returncode == 0
    while code:
        begun = [path.name for path in cut.glob("tune/*/")]
        process = start(f"tune --resume {begun[0]}" if begun else words, cut)
        assert process.stdout is not None
        left = random.randint(2, 5) if done < kills else sys.maxsize
        for line in process.stdout:
            left -= " epoch " in line
            if left == 0:
                time.sleep(random.random())
                process.kill()
                done += 1
                break
        process.stdout.close()
        code = process.wait()
    one, other = ([{k: t[k] for k in SAME} for t in load_trials(out)] for out in (whole, cut))
    verdict = "the same as undisturbed" if one == other else f"NOT the same:\n{one}\n{other}"
    print(f"{done} kills, {len(other)} trials ({', '.join(t['state'] for t in other)}): {verdict}")
    return one == other


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "kill"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--algorithm", default="random")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "overhead":
            return 0 if measure_overhead(Path(folder), options.workers, options.json) else 1
        return 0 if kill_and_compare(Path(folder), options.kills, options.algorithm) else 1


if __name__ == "__main__":
    sys.exit(main())
