"""The study: what the harness was built to find out, from training to findings, through its public command line.

    make study DATA=data/cifar10-q75                                     all parts, on one GPU
    make study DATA=data/cifar10-q75 MORE='--until 9m'                   as much as fits into nine minutes
    python benchmarks/study.py --data-dir DIR --parts 1,4 --dry-run      the plan, and what is done already
    python benchmarks/study.py --data-dir DIR --tiny                     every step on the CPU with few images
    python benchmarks/study.py --data-dir DIR --report                   tables and findings of what is stored

Any of these goes on where the last one stopped: a finished run is never trained again, a sweep is resumed by its name,
a command that failed is tried again. Runs lie in OUT/<part>; what is worth keeping (records without weights, tables,
curves, commands, findings) is gathered in OUT/record, or in --record, after each call.

Labels and comparisons are the harness's own: errors stand beside published ones only where the images are the
published ones.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

LEAST_SECONDS = 20.0  # a command is not begun with less than this to go
WRITING_SECONDS = 40.0  # of a budget, kept for tables and findings
STOP_SECONDS = 45.0  # for a command to store its epoch and end, before it is killed
EXIT_FAILED, EXIT_USER, EXIT_STOPPED = 1, 2, 130


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """Words of a command, with {places} for what the machine decides."""

    words: str
    tiny: str = ""  # what a tiny study sets otherwise, beside TINY
    output: str = ""  # a file of the part's folder that takes what the command prints


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One question, the commands that answer it, and those that show the answer."""

    number: int
    name: str
    question: str
    commands: tuple[Command, ...]
    reads: tuple[int, ...] = ()  # other parts whose runs stand in its table
    show: tuple[str, ...] = ("report {runs} --format markdown --output {tables}.md",)  # harness's own commands


TINY = {
    "run": "--epochs 2 --limit-train 256 --limit-test 200",
    "tune": "--epochs 3 --limit-train 256",
    "eval": "--limit 100",
    "peers": "--epochs 2 --limit-train 128 --limit-test 100",
}
"""What a tiny study sets in every command of that kind."""

CURVES = "report {runs} --format markdown --output {tables}.md --curves {curves}"
LADDER = (
    "xresnet,mxresnet,se-mxresnet,se-mxresnet-cosine,se-mxresnet-smooth,se-mxresnet-mixup,se-mxresnet-reflect,"
    "xresnext-16x2d,se-mxresnext-16x2d,se-mxresnext-16x2d-reflect"
)
LOADERS = ("synthetic", "resident", "dali", "dataloader")

PARTS = (
    Part(
        number=1,
        name="table",
        question="What do the networks of the 2016 table cost today, and what do they reach?",
        commands=(
            Command(words="run --variants msra --depths 20,32,56,110 {images}", tiny="--depths 8,14"),
            Command(words="run --variants msra --depths 20,32 --seeds 3 {images}", tiny="--depths 8"),
        ),
        show=(CURVES,),
    ),
    Part(
        number=2,
        name="depth",
        question="Does the error fall from 20 layers to 110?",
        commands=(
            Command(words="run --variants he2015 --depths 20,32,56,110 {images}", tiny="--depths 8,14"),
            Command(
                words="run --variants he2015 --depths 20,110 --seeds 3 {images}", tiny="--depths 8,14 --seeds 2"
            ),
            Command(words="run --variants msra --depths 110 --seeds 1,2 {images}", tiny="--depths 14"),
        ),
        reads=(1,),
        show=(CURVES,),
    ),
    Part(
        number=3,
        name="ladder",
        question="Which steps of the ladder from ResNet-20 to all tricks still help?",
        commands=tuple(
            Command(words=f"{words} {seeds} {{images}}", tiny=f"--val 50 {tiny}")
            for seeds in ("--seeds 1", "--seeds 3")
            for words, tiny in (
                ("run --variants he2015 --depths 20 --val 5000", "--depths 8"),
                (f"run --variants {LADDER}", "--variants xresnet,mxresnet --depths 8"),
            )
        ),
        show=(CURVES,),
    ),
    Part(
        number=4,
        name="cifar2",
        question="How well does the small network tell two classes after five epochs, and how fast?",
        commands=(Command(words="run --variants convnet --dataset cifar2 --seeds 5 {images}", tiny="--seeds 2"),),
    ),
    Part(
        number=5,
        name="places",
        question="What does ResNet-18 reach on Mini-Places2, at one scale and at several?",
        commands=(
            Command(
                words="run --variants miniplaces --depths 18 --precision bf16 {places}",
                tiny="--epochs 1 --limit-train 64 --limit-test 50 --batch-size 32 --precision fp32",
            ),
            Command(words="eval --variant miniplaces --depth 18 {weights}", output="single.txt"),
            Command(
                words="eval --variant miniplaces --depth 18 --scales 96,112,128,144 {weights}",
                tiny="--scales 96,112 --limit 50",
                output="multi.txt",
            ),
        ),
    ),
    Part(
        number=6,
        name="loaders",
        question="What does each loader cost against the bound, and do all reach the same error?",
        commands=tuple(  # interleaved: a machine that gets slower slows all
            Command(
                words=f"run --variants msra --depths 20 --epochs 15 --seeds {seed}, --loader {loader} {{images}}",
                tiny="--depths 8",
            )
            for seed in range(3)
            for loader in LOADERS
        ),
        show=(
            "report {runs} --format markdown --output {tables}.md",
            "compare {runs} --by loader --format markdown > {tables}-compared.md",
        ),
    ),
    Part(
        number=7,
        name="peers",
        question="Is it faster than other people's code on the same images and GPU, and as good after as many epochs?",
        commands=(
            *(
                Command(
                    words=f"peers {{peer}} --depth {depth} --epochs {epochs} --output {{folder}}/{{peer_name}}-{depth}.json",
                    tiny=f"--depth {small} --output {{folder}}/{{peer_name}}-{small}.json",
                )
                for depth, epochs, small in ((20, 10, 20), (110, 3, 32))
            ),
            # lr as theirs in their first epochs: not dropped yet
            Command(
                words="run --variants he2015 --depths 20 --seeds 3 --epochs 10 --set milestones=64000 "
                "--set normalize=imagenet --set pad_mode=black {images}",
                tiny="--seeds 2 --limit-train 128 --limit-test 100",
            ),
            Command(
                words="run --variants fattorib --depths 20 --seeds 3 --epochs 10 --set milestones=180 {images}",
                tiny="--seeds 2 --val 6 --limit-train 128 --limit-test 100",
            ),
            Command(
                words="run --variants he2015 --depths 20 --epochs 10 --precision bf16 --loader resident {images}",
                tiny="--precision fp32 --limit-train 128 --limit-test 100",
            ),
            Command(
                words="run --variants he2015,fattorib --depths 110 --epochs 3 {images}",
                tiny="--depths 32 --val 6 --limit-train 128 --limit-test 100",
            ),
        ),
    ),
    Part(
        number=8,
        name="sweep",
        question="Which learning rate and weight decay suit msra-20?",
        commands=(
            Command(
                words="tune --variant msra --depth 20 --search lr=loguniform(0.01,1) "
                "--search weight_decay=loguniform(1e-5,1e-3) --samples 32 --scheduler asha --epochs 30 {images}",
                tiny="--depth 8 --samples 5",
            ),
        ),
        show=("report {runs} --format csv --output {folder}/trials.csv --curves {curves}",),
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What the machine and the person decide."""

    out: Path
    images: Path | None = None
    places: Path | None = None
    peers: tuple[Path, ...] = ()
    tiny: bool = False
    precision: str = "tf32"  # convolutions as PyTorch does them when nothing is said
    launcher: str = "ray"

    def folder(self, part: Part) -> Path:
        """Where a part's runs lie."""
        return self.out / f"{part.number}-{part.name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A command that this machine can run, or why it cannot."""

    part: Part
    identity: str  # the same wherever the images lie
    words: tuple[str, ...]  # of `harness`, or of benchmarks/peers.py
    output: Path | None = None
    missing: str = ""
    finished: bool = False  # what comes of it is there, whatever the log says

    @property
    def line(self) -> str:
        """As it is typed."""
        return shlex.join(self.words) + (f" > {shlex.quote(str(self.output))}" if self.output else "")


# --- the plan ---


def merge(words: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Words with other values for some options; all options but --set and --search are given once."""
    merged = list(words)
    for option, value in zip(overrides[::2], overrides[1::2], strict=True):
        if option in merged and option not in ("--set", "--search"):
            merged[merged.index(option) + 1] = value
        else:
            merged += [option, value]
    return merged


def make_steps(part: Part, setting: Setting) -> list[Step]:
    """A part's commands for this machine: {peer} once for each peer, everything else once."""
    steps = []
    for command in part.commands:
        words = shlex.split(command.words)
        kind = words[0]
        if setting.tiny:
            tiny = shlex.split(f"{TINY.get(kind, '')} {command.tiny}")
            words = merge(words, tiny)
        if "{peer}" in words:
            peers: Sequence[Path | None] = setting.peers or (None,)
        else:
            peers = (None,)
        steps += [_make_step(part, setting, kind, words, command.output, peer) for peer in peers]
    return steps


def _make_step(part: Part, setting: Setting, kind: str, words: list[str], output: str, peer: Path | None) -> Step:
    device = ["--gpus", "0" if setting.tiny else "1", "--workers", "1"]
    precision = [] if setting.tiny or "--precision" in words else ["--precision", setting.precision]
    launcher = ["--launcher", setting.launcher] if kind == "run" and setting.launcher != "ray" else []
    places = {
        "{images}": [*_images(setting, words), *precision, *device, *launcher],
        "{places}": ["--dataset", "miniplaces", "--data-dir", str(setting.places or "PLACES"), *device, *launcher],
        "{weights}": ["--dataset", "miniplaces", "--data-dir", str(setting.places or "PLACES"), "--weights", _weights(part, setting)],
        "{peer}": ["--peer", str(peer or "PEER"), *_images(setting, words)],
    }  # fmt: skip
    missing = ""
    if ("{places}" in words or "{weights}" in words) and setting.places is None:
        missing = "no --places-dir: the development kit of Mini-Places2"
    elif "{peer}" in words and peer is None:
        missing = "no --peer: a checkout of other people's code"
    elif "cifar2" in words and setting.images is None:
        missing = "no --data-dir: cifar2 is a part of CIFAR-10"
    folder, name = str(setting.folder(part)), peer.name if peer else "peer"
    whole: list[str] = []
    for word in words:
        whole += places.get(word, [word.replace("{folder}", folder).replace("{peer_name}", name)])
    if kind in ("run", "tune"):
        whole += ["--out", folder]
    sweeps = sorted(setting.folder(part).glob("tune/*/sweep.json")) if kind == "tune" else []
    if sweeps:
        whole = ["tune", "--resume", sweeps[-1].parent.name, "--out", folder]
    identity = shlex.join(words).replace("{peer}", f"--peer {name}").replace("{peer_name}", name)
    program = ["python", "benchmarks/peers.py"] if kind == "peers" else ["harness", kind]
    return Step(
        part=part,
        identity=identity,
        words=(*program, *whole[1:]),
        output=setting.folder(part) / output if output else None,
        missing=missing,
        finished=any(path.with_name("trials.json").exists() for path in sweeps),
    )


def _images(setting: Setting, words: Sequence[str]) -> list[str]:
    if setting.images is None:
        return [] if "--dataset" in words else ["--dataset", "digits"]
    return ["--data-dir", str(setting.images)]


def _weights(part: Part, setting: Setting) -> str:
    """The weights of the part's own run, once it is done."""
    found = sorted(setting.folder(part).glob("*/weights.safetensors"))
    return str(found[0]) if found else f"{setting.folder(part)}/NAME/weights.safetensors"


# --- what was done ---


def load_log(out: Path) -> list[dict[str, Any]]:
    """Every command that was run, in order. A line cut off by a kill is left out."""
    path = out / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    entries = []
    for line in lines:
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def state_of(step: Step, log: Sequence[dict[str, Any]]) -> str:
    """done, to do, goes on (it was stopped), again (it failed), or what is missing for it."""
    codes = [entry["exit_code"] for entry in log if entry["step"] == f"{step.part.number} {step.identity}"]
    if 0 in codes or step.finished:
        return "done"
    if step.missing:
        return f"cannot be run: {step.missing}"
    if not codes:
        return "to do"
    return "goes on" if codes[-1] == EXIT_STOPPED else f"again, after exit code {codes[-1]}"


# --- running ---


def run_step(step: Step, deadline: float | None) -> int:
    """Run a command until its end or the deadline (of time.monotonic). Its exit code; 130 where it was stopped.

    The child leads a session of its own, so that a Ctrl-C reaches it once, from here.
    """
    program = [sys.executable, "-m", "harness.cli"] if step.words[0] == "harness" else [sys.executable]
    rest = step.words[1:]
    if step.words[0] == "python":
        rest = (str(ROOT / step.words[1]), *step.words[2:])
    step_output = None
    if step.output:
        step.output.parent.mkdir(parents=True, exist_ok=True)
        step_output = step.output.open("w", encoding="utf-8")
    try:
        child = subprocess.Popen([*program, *rest], stdout=step_output, start_new_session=True)
        try:
            return child.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _stop(child)
            return EXIT_STOPPED
        except KeyboardInterrupt:
            _stop(child)
            raise
    finally:
        if step_output:
            step_output.close()


def _stop(child: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does; what does not end by itself is killed."""
    for number, seconds in ((signal.SIGINT, STOP_SECONDS), (signal.SIGTERM, 5.0), (signal.SIGKILL, None)):
        if child.poll() is None:
            child.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(seconds)


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[None]:
    """SIGTERM and a closed terminal stop as Ctrl-C does."""

    def stop(number: int, frame: types.FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_parts(parts: Sequence[Part], setting: Setting, deadline: float | None) -> tuple[set[int], int]:
    """Run what is missing. Which parts were touched, and the exit code: 130 where time ran out or a signal came."""
    touched: set[int] = set()
    code = 0
    for part in parts:
        for number in range(len(make_steps(part, setting))):
            step = make_steps(part, setting)[number]  # anew: weights and sweeps appear as earlier steps end
            state = state_of(step, load_log(setting.out))
            if state == "done":
                continue
            if step.missing:
                print(f"part {part.number} ({part.name}): {state}", flush=True)
                continue
            if deadline is not None and deadline - time.monotonic() < LEAST_SECONDS:
                print("time is up: the same command goes on", flush=True)
                return touched, EXIT_STOPPED
            print(f"\npart {part.number} ({part.name}), step {number + 1} of {len(make_steps(part, setting))}\n"
                  f"$ {step.line}", flush=True)  # fmt: skip
            touched.add(part.number)
            started, began = datetime.now(UTC), time.monotonic()
            ended = EXIT_STOPPED
            try:
                ended = run_step(step, deadline)
            except KeyboardInterrupt:
                print("stopped: the same command goes on", flush=True)
                return touched, EXIT_STOPPED
            finally:
                _note(setting.out, step, started, time.monotonic() - began, ended)
            if step.output and ended == 0:
                print(step.output.read_text(encoding="utf-8"), end="", flush=True)
            if ended == EXIT_STOPPED:
                print("time is up: the same command goes on", flush=True)
                return touched, EXIT_STOPPED
            code = EXIT_FAILED if ended else code
            if ended == EXIT_USER:
                print(
                    f"part {part.number} ({part.name}) is left out: its next command would be wrong as well",
                    flush=True,
                )
                break
    return touched, code


def _note(out: Path, step: Step, started: datetime, seconds: float, exit_code: int) -> None:
    entry = {"step": f"{step.part.number} {step.identity}", "command": step.line, "started_at": started.isoformat(),
             "seconds": round(seconds, 1), "exit_code": exit_code}  # fmt: skip
    with (out / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


# --- what comes of it ---


def show(part: Part, setting: Setting) -> None:
    """Write a part's tables and curves, by the harness's own commands."""
    by_number = {part.number: part for part in PARTS}
    runs = [str(setting.folder(by_number[n])) for n in (*part.reads, part.number)]
    runs = [folder for folder in runs if any(Path(folder).glob("*/record.json"))]
    if not runs:
        return
    stem = setting.folder(part).name
    for line in part.show:
        line, _, target = line.partition(" > ")
        names = {"{tables}": str(setting.out / "tables" / stem), "{curves}": str(setting.out / "curves" / stem),
                 "{folder}": str(setting.folder(part))}  # fmt: skip
        words: list[str] = []
        for word in shlex.split(line):
            for name, value in names.items():
                word = word.replace(name, value)
            words += runs if word == "{runs}" else [word]
        command = [sys.executable, "-m", "harness.cli", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            print(f"part {part.number}: no {words[0]}: {done.stderr.strip() or done.stdout.strip()}", flush=True)
        elif target:
            path = Path(target.replace("{tables}", names["{tables}"]))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(done.stdout, encoding="utf-8")


def show_page(setting: Setting) -> None:
    """Write OUT/report.html, one page of all parts."""
    runs = [str(folder) for part in PARTS if any((folder := setting.folder(part)).glob("*/record.json"))]
    if runs:
        words = ["report", *runs, "--format", "html", "--output", str(setting.out / "report.html")]
        subprocess.run([sys.executable, "-m", "harness.cli", *words], check=False)


def collect(setting: Setting, record: Path) -> None:
    """Gather what is worth keeping: records and epochs without weights, sweeps, tables, curves, commands, findings."""
    from findings import SWEEP_CHARTS, write_findings

    record.mkdir(parents=True, exist_ok=True)
    for name in ("runs", "tables", "curves"):
        shutil.rmtree(record / name, ignore_errors=True)
    for part in PARTS:
        folder = setting.folder(part)
        kept = [*folder.glob("*/record.json"), *folder.glob("*/epochs.jsonl"), *folder.glob("*/attempts.jsonl"),
                *folder.glob("tune/*/*.json*"), *folder.glob("*.json"), *folder.glob("*.txt"), *folder.glob("*.csv")]  # fmt: skip
        for path in kept:
            _copy(path, record / "runs" / folder.name / path.relative_to(folder))
    for path in (setting.out / "tables").glob("*.md"):
        _copy(path, record / "tables" / path.name)
    for path in (setting.out / "curves").glob("*/*.svg"):
        if path.parent.name.endswith("-sweep") and not re.search(SWEEP_CHARTS, path.stem):
            continue  # of trials stopped at different epochs
        _copy(path, record / "curves" / path.parent.name / path.name)
    log = load_log(setting.out)
    lines = [f"# {entry['started_at'][:19]}Z, {entry['seconds']:,.0f} s, exit code {entry['exit_code']}\n{_portable(entry['command'])}\n"
             for entry in log]  # fmt: skip
    (record / "commands.txt").write_text("\n".join(lines), encoding="utf-8")
    todo = {
        part.number: [f"{_portable(step.line)}    ({state})" for step in make_steps(part, setting)
                      if (state := state_of(step, log)) != "done"]
        for part in PARTS
    }  # fmt: skip
    write_findings(record, log, todo)


def _portable(command: str) -> str:
    """A command with folders by their last names: where somebody keeps images is no fact of a study."""
    return re.sub(r"(?<=\s)/(?:[^/\s]+/)*(?=[^/\s])", "", command)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.name == "sweep.json":  # where the images lay is no fact of the sweep
        sweep = json.loads(source.read_bytes())
        if sweep["asked"]["data_dir"]:
            sweep["asked"]["data_dir"] = Path(sweep["asked"]["data_dir"]).name
        target.write_text(json.dumps(sweep, indent=1) + "\n", encoding="utf-8")
    else:
        shutil.copyfile(source, target)


# --- the command ---


def parse_seconds(text: str) -> float:
    """ "9m", "1h30m", "90s" or "90" -> seconds."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip())
    if found is None or not any(found.groups()):
        raise argparse.ArgumentTypeError(f"{text!r}: a time is allowed, as in 9m, 1h30m or 540")
    hours, minutes, seconds = (int(word or 0) for word in found.groups())
    return 3600.0 * hours + 60 * minutes + seconds


def parse_parts(text: str) -> tuple[Part, ...]:
    """ "1,4" -> those parts, in the order given."""
    by_word = {word: part for part in PARTS for word in (str(part.number), part.name)}
    for word in text.split(","):
        if word not in by_word:
            names = ", ".join(f"{part.number} {part.name}" for part in PARTS)
            raise argparse.ArgumentTypeError(f"no part {word!r}: there are {names}")
    return tuple(dict.fromkeys(by_word[word] for word in text.split(",")))


def describe(parts: Sequence[Part], setting: Setting) -> str:
    """The plan: every command, and what has become of it."""
    log = load_log(setting.out)
    lines = []
    for part in parts:
        lines.append(f"\n{part.number} {part.name}: {part.question}")
        lines += [f"  [{state_of(step, log)}] {step.line}" for step in make_steps(part, setting)]
    return "\n".join(lines).lstrip("\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="images as class folders, or CIFAR-10's own files")
    parser.add_argument("--places-dir", type=Path, help="Mini-Places2's development kit, for part 5")
    parser.add_argument(
        "--peer", type=Path, action="append", default=[], help="a checkout, for part 7; repeatable"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--record", type=Path, help="what is worth keeping; default OUT/record")
    parser.add_argument("--parts", type=parse_parts, default=PARTS, help="as in 1,4 or table,cifar2")
    parser.add_argument("--until", type=parse_seconds, help="end within this time, as in 9m")
    parser.add_argument(
        "--tiny", action="store_true", help="on the CPU with few images; without --data-dir on digits"
    )
    parser.add_argument("--precision", default="tf32", help="of all runs on the GPU that say nothing else")
    parser.add_argument("--launcher", default="ray", choices=("ray", "local"))
    parser.add_argument("--dry-run", action="store_true", help="print the plan and what is done already")
    parser.add_argument(
        "--report", action="store_true", help="train nothing; tables and findings of what is stored"
    )
    arguments = parser.parse_args(argv)
    began = time.monotonic()
    if arguments.data_dir is None and not arguments.tiny and not arguments.report:
        parser.error("--data-dir is missing: the folder of images (with --tiny, digits serve without)")
    for option, path in (("--data-dir", arguments.data_dir), ("--places-dir", arguments.places_dir)):
        if path is not None and not path.is_dir():
            parser.error(f"{option} {path}: no such folder")
    for path in arguments.peer:
        if not path.is_dir():
            parser.error(f"--peer {path}: no such folder")
    setting = Setting(
        out=arguments.out,
        images=arguments.data_dir,
        places=arguments.places_dir,
        peers=tuple(arguments.peer),
        tiny=arguments.tiny,
        precision=arguments.precision,
        launcher=arguments.launcher,
    )
    if arguments.dry_run:
        print(describe(arguments.parts, setting))
        return 0
    setting.out.mkdir(parents=True, exist_ok=True)
    touched, code = {part.number for part in arguments.parts}, 0
    if not arguments.report:
        deadline = None
        if arguments.until is not None:
            deadline = began + arguments.until - min(WRITING_SECONDS, arguments.until / 4)
        with stopping_on_signals():
            touched, code = run_parts(arguments.parts, setting, deadline)
    # a part that shows another's runs is written anew with it
    for part in PARTS:
        if part.number in touched or touched.intersection(part.reads):
            show(part, setting)
    show_page(setting)
    record = arguments.record or setting.out / "record"
    collect(setting, record)
    print(f"\nfindings: {record / 'findings.md'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
