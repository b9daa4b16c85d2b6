"""The study: eight questions, answered by the public commands, in as many sittings as it takes.

    make study DATA=data/cifar10-q75                                     all parts, on one GPU
    make study DATA=data/cifar10-q75 MORE='--until 9m'                   as much as fits into nine minutes
    python benchmarks/study.py --data-dir DIR --parts table,cifar2 --dry-run     the plan, and what is done
    python benchmarks/study.py --tiny                                    every step on the CPU, on a few digits

The same command goes on where the last one stopped. Runs are stored in OUT/<part>; OUT/findings.md holds what `harness
report` and `harness compare` say of each part, and OUT/report.html the page. To keep a study without its weights:

    rsync -a --exclude '*.safetensors' --exclude '.*' runs/study/ results/records/NAME/
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from harness.deadline import parse_until
from harness.spec import UserError

ROOT = Path(__file__).resolve().parent.parent
MIN_SECONDS = 20.0  # no command is started with less time left
STOP_SECONDS = 45.0  # for a command to store its epoch, before it is killed
EXIT_FAILED, EXIT_USER, EXIT_STOPPED = 1, 2, 130

LADDER = (
    "xresnet,mxresnet,se-mxresnet,se-mxresnet-cosine,se-mxresnet-smooth,se-mxresnet-mixup,se-mxresnet-reflect,"
    "xresnext-16x2d,se-mxresnext-16x2d,se-mxresnext-16x2d-reflect"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A question and the commands that answer it. What stands after | is added in a tiny study, and wins."""

    question: str
    commands: tuple[str, ...]
    reads: tuple[str, ...] = ()  # other parts whose runs belong into its table
    compare: str = ""  # a field that `harness compare --by` takes


PARTS = {
    "table": Part(
        question="What do the networks of the 2016 table cost today, and what do they reach?",
        commands=(
            "run --variants msra --depths 20,32,56,110 | --depths 8,14",
            "run --variants msra --depths 20,32 --seeds 3 | --depths 8",
        ),
    ),
    "depth": Part(
        question="Does the error fall from 20 layers to 110?",
        commands=(
            "run --variants he2015 --depths 20,32,56,110 | --depths 8,14",
            "run --variants he2015 --depths 20,110 --seeds 3 | --depths 8,14 --seeds 2",
            "run --variants msra --depths 110 --seeds 1,2 | --depths 14",
        ),
        reads=("table",),
        compare="network.depth",
    ),
    "ladder": Part(
        question="Which steps from ResNet-20 to the full set of tricks still help?",
        commands=tuple(
            f"run {words} --seeds {seeds} | --val 50 {tiny}"
            for seeds in (1, 3)
            for words, tiny in (
                ("--variants he2015 --depths 20 --val 5000", "--depths 8"),
                (f"--variants {LADDER}", "--variants xresnet,mxresnet --depths 8"),
            )
        ),
    ),
    "cifar2": Part(
        question="How well does the small network separate two classes after five epochs, and how fast?",
        commands=("run --variants convnet --dataset cifar2 --seeds 5 | --seeds 2",),
    ),
    "places": Part(
        question="What does ResNet-18 reach on Mini-Places2, at one scale and at several?",
        commands=(
            "run --variants miniplaces --depths 18 --precision bf16 {places} | "
            "--epochs 1 --limit-train 64 --limit-test 50 --batch-size 32 --precision fp32",
            "eval --variant miniplaces --depth 18 {places}",
            "eval --variant miniplaces --depth 18 --scales 96,112,128,144 {places} | --scales 96,112 --limit 50",
        ),
    ),
    "loaders": Part(
        question="What does each loader cost against a constant batch, and do all reach the same error?",
        commands=tuple(  # interleaved: a machine that slows down slows all of them
            f"run --variants msra --depths 20 --epochs 15 --seeds {seed}, --loader {loader} | --depths 8"
            for seed in range(3)
            for loader in ("synthetic", "resident", "dali", "dataloader")
        ),
        compare="loader",
    ),
    "peers": Part(
        question="How fast is other people's code on the same images and GPU, and how good after as many epochs?",
        commands=(
            "peers --depth 20 --epochs 10 {peer}",
            "peers --depth 110 --epochs 3 {peer} | --depth 32",
            # the learning rate of their first epochs: not dropped yet
            "run --variants he2015 --depths 20 --seeds 3 --epochs 10 --set milestones=64000 --set normalize=imagenet "
            "--set pad_mode=black | --seeds 2 --limit-train 128 --limit-test 100",
            "run --variants fattorib --depths 20 --seeds 3 --epochs 10 --set milestones=180 | "
            "--seeds 2 --val 6 --limit-train 128 --limit-test 100",
            "run --variants he2015 --depths 20 --epochs 10 --precision bf16 --loader resident | "
            "--precision fp32 --limit-train 128 --limit-test 100",
            "run --variants he2015,fattorib --depths 110 --epochs 3 | --depths 32 --val 6 --limit-train 128",
        ),
    ),
    "search": Part(
        question="Which learning rate and weight decay suit msra-20?",
        commands=(
            "tune --variant msra --depth 20 --search lr=loguniform(0.01,1) --search weight_decay=loguniform(1e-5,1e-3) "
            "--samples 32 --scheduler asha --epochs 30 | --depth 8 --samples 5 --epochs 3",
        ),
    ),
}
TINY = {
    "run": "--precision fp32 --epochs 2 --limit-train 256 --limit-test 200",
    "tune": "--precision fp32 --limit-train 256",
    "eval": "--limit 100",
    "peers": "--epochs 2 --limit-train 128 --limit-test 100",
}
"""What a tiny study adds to every command of a kind."""


@dataclass(frozen=True, slots=True)
class Step:
    """One command of a part on this machine, or why it cannot run here."""

    part: str
    identity: str  # the same wherever the images are
    words: tuple[str, ...]
    output: Path | None = None  # takes what the command prints
    missing: str = ""


def make_steps(name: str, options: argparse.Namespace) -> list[Step]:
    """A part's commands for this machine, those with {peer} once for each peer."""
    steps = []
    for text in PARTS[name].commands:
        peers = (options.peer or [None]) if "{peer}" in text else [None]
        steps += [_make_step(name, text, options, peer) for peer in peers]
    return steps


def _make_step(name: str, text: str, options: argparse.Namespace, peer: Path | None) -> Step:
    words, _, tiny = text.partition("|")
    kind, *own = shlex.split(words)
    own = [word for word in own if not word.startswith("{")]
    added = shlex.split(f"{TINY[kind]} {tiny}") if options.tiny else []
    folder = options.out / name
    shared = ["--data-dir", str(options.data_dir)] if options.data_dir else ["--dataset", "digits"]
    missing, output = "", None
    if "{places}" in text:
        shared = ["--dataset", "miniplaces", "--data-dir", str(options.places_dir)]
        missing = "" if options.places_dir else "no --places-dir, the development kit of Mini-Places2"
    elif "cifar2" in own and not options.data_dir:
        missing = "no --data-dir: cifar2 is a part of CIFAR-10"
    elif "{peer}" in text:
        missing = "" if peer else "no --peer, a checkout of other people's code"
    if kind in ("run", "tune"):
        shared += ["--precision", options.precision, "--gpus", "0" if options.tiny else "1", "--workers", "1"]
        shared += ["--out", str(folder)]
    if kind == "run":
        shared += ["--launcher", options.launcher]
    if kind == "tune" and (searches := sorted(folder.glob("tune/*/"))):
        shared, own, added = ["--resume", searches[-1].name, "--out", str(folder)], [], []
    if kind == "eval":
        weights = sorted(folder.glob("*/weights.safetensors"))
        shared += ["--weights", str(weights[0] if weights else folder / "RUN" / "weights.safetensors")]
        output = folder / ("multi.txt" if "--scales" in own else "single.txt")
    if kind == "peers":
        depth = [*own, *added][[*own, *added].index("--depth") + 1]
        shared += ["--peer", str(peer), "--output", str(folder / f"{peer.name if peer else 'PEER'}-{depth}.json")]
    program = ["python", "benchmarks/peers.py"] if kind == "peers" else ["harness", kind]
    identity = f"{name}: {text}{f' {peer.name}' if peer else ''}{' tiny' if options.tiny else ''}"
    return Step(name, identity, (*program, *last_wins([*shared, *own, *added])), output, missing)


def last_wins(words: Sequence[str]) -> list[str]:
    """Options and values, each option once; --set and --search are repeatable."""
    pairs = list(zip(words[::2], words[1::2], strict=True))
    last = {option: number for number, (option, _) in enumerate(pairs)}
    kept = [pair for n, pair in enumerate(pairs) if pair[0] in ("--set", "--search") or last[pair[0]] == n]
    return [word for pair in kept for word in pair]


# --- running ---


def load_log(out: Path) -> list[dict[str, Any]]:
    """Every command that was run, in order. A line cut off by a kill is left out."""
    path = out / "log.jsonl"
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def state_of(step: Step, log: Sequence[dict[str, Any]]) -> str:
    """done, to do, stopped, failed, or what is missing."""
    codes = [entry["exit_code"] for entry in log if entry["step"] == step.identity]
    if 0 in codes:
        return "done"
    if step.missing:
        return step.missing
    if not codes:
        return "to do"
    return "stopped" if codes[-1] == EXIT_STOPPED else f"failed with exit code {codes[-1]}"


def run_step(step: Step, seconds: float | None) -> int:
    """Run a command to its end, or for so many seconds: 130. It leads a session, so that Ctrl-C reaches it once."""
    program = [sys.executable, str(ROOT / step.words[1]), *step.words[2:]]
    if step.words[0] == "harness":
        program = [sys.executable, "-m", "harness.cli", *step.words[1:]]
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(step.output.open("w", encoding="utf-8")) if step.output else None
        child = subprocess.Popen(program, stdout=output, start_new_session=True)
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            return EXIT_STOPPED
        finally:
            for number, patience in ((signal.SIGINT, STOP_SECONDS), (signal.SIGTERM, 5.0), (signal.SIGKILL, None)):
                if child.poll() is None:
                    child.send_signal(number)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(patience)


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM stops as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_parts(options: argparse.Namespace, deadline: float | None) -> int:
    """Run what is missing. The exit code: 130 when time ran out, 1 if a command failed."""
    code = 0
    for name in options.parts:
        (options.out / name).mkdir(parents=True, exist_ok=True)
        for number in range(len(make_steps(name, options))):
            step = make_steps(name, options)[number]  # anew: weights and searches appear as earlier steps end
            state = state_of(step, load_log(options.out))
            if state == "done" or step.missing:
                print(f"{name}: {state}", flush=True)
                continue
            seconds = None if deadline is None else deadline - time.monotonic()
            if seconds is not None and seconds < MIN_SECONDS:
                return EXIT_STOPPED
            print(f"\n$ {shlex.join(step.words)}", flush=True)
            began, ended = time.monotonic(), EXIT_STOPPED
            try:
                ended = run_step(step, seconds)
            except KeyboardInterrupt:
                return EXIT_STOPPED
            finally:
                entry = {"step": step.identity, "command": shlex.join(step.words), "exit_code": ended,
                         "seconds": round(time.monotonic() - began, 1)}  # fmt: skip
                with (options.out / "log.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
            if ended == EXIT_STOPPED:
                return EXIT_STOPPED
            code = EXIT_FAILED if ended else code
            if ended == EXIT_USER:  # the part's other commands would be refused as well
                break
    return code


# --- findings ---


def harness(*words: object) -> str:
    """What a command prints, or its error."""
    command = [sys.executable, "-m", "harness.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (
        done.stdout if done.returncode == 0 else f"{shlex.join(['harness', *map(str, words)])}: {done.stderr}"
    ).strip()


def findings_of(name: str, options: argparse.Namespace) -> list[str]:
    """A part's question and answers, in Markdown."""
    part, folder, log = PARTS[name], options.out / name, load_log(options.out)
    lines = [f"## {part.question}"]
    if left := [f"    {shlex.join(s.words)}  # {state}" for s in make_steps(name, options)
                if (state := state_of(s, log)) != "done"]:  # fmt: skip
        lines += ["Not run yet:", "\n".join(left)]
    runs = [
        path
        for path in (*(options.out / other for other in part.reads), folder)
        if any(path.glob("*/record.json"))
    ]
    if runs:
        lines += [harness("report", *runs, "--format", "markdown", "--curves", options.out / "curves" / name)]
        lines += [
            f"![{path.stem}](curves/{name}/{path.name})"
            for path in sorted((options.out / "curves" / name).glob("*.svg"))
        ]
    if runs and part.compare:
        lines += [harness("compare", *runs, "--by", part.compare, "--format", "markdown")]
    lines += [path.read_text(encoding="utf-8").strip() for path in sorted(folder.glob("*.txt"))]
    peers = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    if peers:
        rows = [f"| {p['peer']}-{p['depth']} | {(p['commit_of_peer'] or '–')[:7]} | {len(p['epochs'])} | {p['epoch_seconds']:.3g} | "
                f"{p['epochs'][-1]['error']:.2f} |" for p in peers]  # fmt: skip
        lines += [
            "\n".join(["| peer | commit | epochs | s/epoch | test error % |", "|---|---|---:|---:|---:|", *rows])
        ]
    return lines


def write_findings(options: argparse.Namespace) -> None:
    """OUT/findings.md and OUT/report.html, from what is stored."""
    lines = ["# Findings"]
    for name in PARTS:
        lines += findings_of(name, options)
    (options.out / "findings.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    if runs := [options.out / name for name in PARTS if any((options.out / name).glob("*/record.json"))]:
        harness("report", *runs, "--format", "html", "--output", options.out / "report.html")
    print(f"\nfindings: {options.out / 'findings.md'}")


def parse_parts(text: str) -> list[str]:
    """Names of parts, in the order given."""
    names = text.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"no part {unknown[0]!r}: {', '.join(PARTS)} are allowed")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10's images; a tiny study without it takes digits")
    parser.add_argument("--places-dir", type=Path, help="Mini-Places2's development kit")
    parser.add_argument("--peer", type=Path, action="append", default=[], help="other people's code; repeatable")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--parts", type=parse_parts, default=list(PARTS), help="as in table,cifar2")
    parser.add_argument("--until", help="stop after 9m or 2h30m, or at 18:00")
    parser.add_argument("--tiny", action="store_true", help="few images, on the CPU")
    parser.add_argument("--precision", default="tf32", help="of all runs whose question does not say another")
    parser.add_argument("--launcher", default="ray", choices=("ray", "local"))
    parser.add_argument("--dry-run", action="store_true", help="print the plan and what is done")
    parser.add_argument(
        "--report", action="store_true", help="write the findings of what is stored; train nothing"
    )
    options = parser.parse_args(argv)
    if not (options.data_dir or options.tiny or options.report):
        parser.error("--data-dir is missing: the folder of images")
    for path in filter(None, (options.data_dir, options.places_dir, *options.peer)):
        if not path.is_dir():
            parser.error(f"{path}: no such folder")
    if options.dry_run:
        log = load_log(options.out)
        for name in options.parts:
            print(f"\n{name}: {PARTS[name].question}")
            for step in make_steps(name, options):
                print(f"  [{state_of(step, log)}] {shlex.join(step.words)}")
        return 0
    deadline = None
    if options.until is not None:
        try:
            seconds = parse_until(options.until, datetime.now()).timestamp() - time.time()
        except UserError as error:
            parser.error(str(error))
        deadline = time.monotonic() + seconds * 0.95  # the rest is for the findings
    options.out.mkdir(parents=True, exist_ok=True)
    code = 0
    if not options.report:
        with sigterm_as_interrupt():
            code = run_parts(options, deadline)
        if code == EXIT_STOPPED:
            print("stopped: the same command goes on")
    write_findings(options)
    return code


if __name__ == "__main__":
    sys.exit(main())
