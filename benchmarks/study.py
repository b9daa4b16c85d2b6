"""The study: eight questions (study.toml), answered by the public commands, in as many sessions as it takes.

    make study DATA=data/cifar10-q75                                     all parts, on one GPU
    make study DATA=data/cifar10-q75 MORE='--until 9m'                   as much as fits into nine minutes
    python benchmarks/study.py --data-dir DIR --parts table,cifar2 --dry-run     the commands
    python benchmarks/study.py --tiny                                    every step on the CPU, on a few digits

The same command goes on where the last one stopped: `harness run` does only what is missing. Runs are stored in OUT/<part>;
OUT/findings.md holds what `harness report` and `harness compare` say of each part, and OUT/report.html the page. Without
--data-dir a tiny study takes digits; --peer takes checkouts of other people's code (peers.py). To keep a study without its
weights:

    rsync -a --exclude '*.safetensors' --exclude '.*' runs/study/ results/records/NAME/
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from rounds import ROOT, harness, parse_options

from harness.deadline import parse_until
from harness.spec import UserError

PARTS: dict[str, dict[str, Any]] = tomllib.loads((ROOT / "benchmarks/study.toml").read_text(encoding="utf-8"))
MIN_SECONDS = 20.0  # no command is started with less time left
STOP_SECONDS = 60.0  # for a command to store its epoch, before it is killed
STOPPED = 130
TINY = {
    "run": "--precision fp32 --epochs 2 --limit-train 256 --limit-test 200",
    "tune": "--precision fp32 --limit-train 256",
    "eval": "--limit 100",
    "peers": "--epochs 2 --limit-train 128 --limit-test 100",
}
"""What a tiny study adds to every command of a kind."""


class Step(NamedTuple):
    """One command of a part on this machine."""

    kind: str  # run, eval, tune or peers
    words: list[str]
    output: Path | None  # takes what the command prints; where it exists, the step is done
    missing: str  # the option without which it cannot run, or ""

    def __str__(self) -> str:
        program = "python benchmarks/peers.py" if self.kind == "peers" else f"harness {self.kind}"
        return f"{program} {shlex.join(self.words)}" + (f"  # no {self.missing}" if self.missing else "")


def make_steps(name: str, options: argparse.Namespace) -> Iterator[Step]:
    """A part's commands for this machine, each when the one before has ended: weights and searches appear meanwhile."""
    each = PARTS[name].get("each", {})
    for values in itertools.product(*each.values()):
        for text in PARTS[name]["commands"]:
            for peer in options.peer or [None] if "{peer}" in text else [None]:
                places = {"--data-dir": options.data_dir, "--places-dir": options.places_dir, "--peer": peer}
                yield _make_step(name, text, dict(zip(each, values, strict=True)), places, options)


def _make_step(
    name: str, text: str, values: dict[str, Any], places: dict[str, Path | None], options: argparse.Namespace
) -> Step:
    fields = {option[2:].removesuffix("-dir"): (option, path) for option, path in places.items()}
    missing = next((o for field, (o, path) in fields.items() if f"{{{field}}}" in text and path is None), "")
    filled = text.format(**values, **{field: path for field, (_, path) in fields.items()})
    (kind, *own), added = map(shlex.split, filled.split("|"))
    folder, output = options.out / name, None
    data = ["--data-dir", str(options.data_dir)] if options.data_dir else ["--dataset", "digits"]
    shared = {"peers": data, "eval": []}.get(
        kind, [*data, *f"--precision {options.precision} --gpus {0 if options.tiny else 1} --workers 1".split(), "--out", str(folder)]
    )  # fmt: skip
    if kind == "run":
        shared = [*shared, "--launcher", options.launcher]
    elif kind == "tune" and (sweeps := sorted(folder.glob("tune/*/sweep.json"))):
        return Step(kind, ["--resume", sweeps[-1].parent.name, "--out", str(folder)], None, missing)
    elif kind == "eval":
        weights = min(folder.glob("*/weights.safetensors"), default=folder / "RUN" / "weights.safetensors")
        shared, output = ["--weights", str(weights)], folder / ("multi.txt" if "--scales" in own else "single.txt")
    elif kind == "peers":
        output = folder / f"{(places['--peer'] or Path('peer')).name}-{own[1]}.txt"
    return Step(kind, [*shared, *own, *(shlex.split(TINY[kind]) + added if options.tiny else [])], output, missing)


def run_step(step: Step, deadline: float | None) -> int:
    """Run a command to its end, or to the deadline: 130. Ctrl-C reaches it by itself, and is waited for."""
    words, seconds = step.words, None
    if deadline is not None:
        if (left := deadline - time.time()) < MIN_SECONDS:
            return STOPPED
        seconds = left + STOP_SECONDS if step.kind in ("run", "tune") else left
        words = [*words, "--until", f"{left:.0f}s"] if step.kind in ("run", "tune") else words
    peers = [sys.executable, str(ROOT / "benchmarks/peers.py"), *words]
    print(f"\n$ {step}", flush=True)
    child = subprocess.Popen(
        peers if step.kind == "peers" else harness(step.kind, *words), text=True,
        stdout=subprocess.PIPE if step.output else None,
    )  # fmt: skip
    try:
        text, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        return STOPPED
    except KeyboardInterrupt:
        child.wait()
        return STOPPED
    if step.output and child.returncode == 0:
        step.output.write_text(text, encoding="utf-8")
    return child.returncode


def run_parts(options: argparse.Namespace, deadline: float | None) -> int:
    """Run what is missing. The exit code: 130 when time ran out, 1 if a command failed."""
    failed = 0
    for name in options.parts:
        (options.out / name).mkdir(parents=True, exist_ok=True)
        for step in make_steps(name, options):
            if step.missing or (step.output and step.output.exists()):
                print(f"{name}: {f'no {step.missing}' if step.missing else 'done'}: {step.kind}", flush=True)
            elif (code := run_step(step, deadline)) == STOPPED:
                print("stopped: the same command goes on")
                return STOPPED
            else:
                failed = failed or int(code != 0)
    return failed


def printed(*words: object) -> str:
    """What a command of the harness prints, or its error."""
    done = subprocess.run(harness(*words), capture_output=True, text=True, check=False)
    return (done.stdout if done.returncode == 0 else done.stderr).strip()


def findings_of(name: str, options: argparse.Namespace) -> list[str]:
    """A part's question and answers, in Markdown."""
    part, folder, curves = PARTS[name], options.out / name, options.out / "curves" / name
    lines = [f"## {part['question']}"]
    if left := [f"    {step}" for step in make_steps(name, options) if step.missing]:
        lines += ["Not run:", "\n".join(left)]
    folders = [options.out / other for other in (*part.get("reads", ()), name)]
    if runs := [path for path in folders if any(path.glob("*/record.json"))]:
        lines.append(printed("report", *runs, "--format", "markdown", "--curves", curves))
        lines += [f"![{path.stem}](curves/{name}/{path.name})" for path in sorted(curves.glob("*.svg"))]
        if "compare" in part:
            lines.append(printed("compare", *runs, "--by", part["compare"], "--format", "markdown"))
    return lines + [path.read_text(encoding="utf-8").strip() for path in sorted(folder.glob("*.txt"))]


def write_findings(options: argparse.Namespace) -> None:
    """OUT/findings.md and OUT/report.html, from what is stored."""
    lines = ["# Findings", *(line for name in PARTS for line in findings_of(name, options))]
    (options.out / "findings.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    if runs := [options.out / name for name in PARTS if any((options.out / name).glob("*/record.json"))]:
        printed("report", *runs, "--format", "html", "--output", options.out / "report.html")
    print(f"\nfindings: {options.out / 'findings.md'}")


def main() -> int:
    options = parse_options(
        __doc__, data_dir=Path, places_dir=Path, peer=[], out=Path("runs/study"), parts=",".join(PARTS), until=str,
        tiny=False, precision="tf32", launcher="ray", dry_run=False, report=False,
    )  # fmt: skip
    options.parts = options.parts.split(",")
    mistakes = [f"no part {name!r}: {', '.join(PARTS)} are allowed" for name in options.parts if name not in PARTS]
    folders = (options.data_dir, options.places_dir, *options.peer)
    mistakes += [f"{path}: no such folder" for path in folders if path and not path.is_dir()]
    if not (options.data_dir or options.tiny or options.report):
        mistakes.append("--data-dir is missing: the folder of images")
    deadline = None
    try:
        if options.until is not None:  # a twentieth of the time is for the findings
            deadline = time.time() + 0.95 * (parse_until(options.until, datetime.now()).timestamp() - time.time())
    except UserError as error:
        mistakes.append(f"--until {options.until!r}: {error}")
    if mistakes:
        print(f"study: {mistakes[0]}", file=sys.stderr)
        return 2
    if options.dry_run:
        for name in options.parts:
            print(f"\n{name}: {PARTS[name]['question']}", *make_steps(name, options), sep="\n    ")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    code = 0 if options.report else run_parts(options, deadline)
    write_findings(options)
    return code


if __name__ == "__main__":
    sys.exit(main())
