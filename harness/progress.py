"""What is shown while a command works: a bar for data, a live table of runs, or plain lines without a terminal."""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from typing import IO, Any, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from harness.cluster.job import Entered, Failed, Started, Waiting
from harness.loaders.datasets import DataError, Dataset, load_dataset
from harness.plugins import blaming
from harness.results.metrics import run_figures
from harness.results.sweeps import State, Sweep, Trial, best_first, format_value
from harness.results.values import EpochMetrics, RunResult, finite
from harness.spec import RunPaths, RunSpec, mistakes

Row = TypeVar("Row")
Words = Collection[str]


def say(console: Console, text: str, style: str = "") -> None:
    """Print words as they are, with nothing in them taken for markup; folded between words, on a terminal alone."""
    console.print(Text(text, style=style), soft_wrap=not console.is_terminal)


def make_table(*columns: str, left: Words = (), whole: Words = (), **options: Any) -> Table:
    """An empty table without lines; numbers are aligned to the right, the columns `left` are words. Cells that are too
    long for the console continue below; those of columns `whole` are cut off, after all others are as narrow as can be."""
    plain: dict[str, Any] = {"box": None, "pad_edge": False, "padding": (0, 2, 0, 0)}
    table = Table(**plain | options)
    for name in columns:
        long: dict[str, Any] = {"no_wrap": name in whole, "overflow": "ellipsis" if name in whole else "fold"}
        table.add_column(name, justify="left" if name in left else "right", **long)
    return table


def print_columns(
    columns: Mapping[str, Sequence[str]], console: Console, *, title: str, left: Words, spare: Words = ()
) -> None:
    """Print a table of columns of cells. On a terminal `spare` ones go first, and are named, where all do not fit."""
    widths = {name: max(map(len, [name, *cells])) + 2 for name, cells in columns.items()}
    for name in spare if console.is_terminal else ():
        if sum(widths.values()) - 2 > console.width:
            widths.pop(name, None)
    width = None if console.is_terminal else sum(widths.values()) - 2
    table = make_table(*widths, left=left, whole=widths, width=width)
    for row in zip(*(columns[name] for name in widths), strict=True):
        table.add_row(*map(escape, row), style="" if row[0] else "dim")
    console.print(title, markup=False, highlight=False)
    console.print(table, crop=console.is_terminal)
    if dropped := [name for name in columns if name not in widths]:
        say(console, f"too narrow for {', '.join(dropped)}", style="dim")


def load_data(name: str, paths: RunPaths, console: Console, *, scan: bool = False) -> Dataset:
    """Load the data set, with a bar while it is downloaded and decoded, and `scan` every file. Raises UserError where that fails."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    with Bar(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        add_task = cache(bar.add_task)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(add_task(escape(what)), completed=done, total=total)

        with mistakes(DataError):
            with blaming("dataset", name):
                dataset = load_dataset(name, paths.data_dir, paths.cache_dir, progress)
            if scan:
                dataset.scan(progress)
            return dataset


@dataclass(slots=True, eq=False)
class _Line:
    spec: RunSpec
    epochs: int
    state: str = "waiting"
    note: str = ""
    last: EpochMetrics | None = None
    seconds: list[float] = field(default_factory=list)  # of whole epochs, evaluation too

    @property
    def done(self) -> int:
        return self.last.epoch if self.last else 0


COLUMNS = ("run", "epoch", " ", "loss", "error %", "s/epoch", "left", "")  # of runs; the blank ones: a bar, a note
FIGURES = ("epoch", "loss", "error %", "s/epoch")  # cut off last
RANKS = {"training": 0, "starting": 0, "failed": 1, "waiting": 2}  # of what is shown first
STYLES = {"done": "green", "finished": "green", "failed": "red", "waiting": "dim", "pruned": "dim"}


class LiveTable:
    """A table on a terminal, drawn anew as things change; elsewhere only lines."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.say = partial(say, console)

    def render(self) -> Group:
        """The table as it is now."""
        raise NotImplementedError

    def live(self) -> AbstractContextManager[Any]:
        """Show the table until the end."""
        if not self.console.is_terminal:
            return nullcontext()
        return Live(get_renderable=self.render, console=self.console, refresh_per_second=4, transient=True)

    def log(self, text: str) -> None:
        """A line where there is no table to show the same."""
        if not self.console.is_terminal:
            self.say(text)

    def fit(self, lines: Sequence[Row], rank: Callable[[Row], Any]) -> list[Row]:
        """The lines that fit on the screen, those of least rank, in their order."""
        kept = sorted(lines, key=rank)[: max(4, self.console.height - 5)]
        return [line for line in lines if any(line is other for other in kept)]


class Progress(LiveTable):
    """Shows the runs."""

    def __init__(
        self, specs: Sequence[RunSpec], epochs: Mapping[str, int], console: Console, *, concurrent_runs: int
    ) -> None:
        super().__init__(console)
        self.lines = {spec.key: _Line(spec, epochs[spec.key]) for spec in specs}
        self.pace: dict[str, float] = {}  # by name: seconds of the latest epoch of any such run
        self.concurrent_runs = concurrent_runs
        self.many_seeds = len({spec.seed for spec in specs}) > 1

    def event(self, spec: RunSpec, event: Any) -> None:
        """What `launch` reports of a run: an attempt began, an epoch ended; the epochs of an earlier command, after which it
        goes on; its result, or why there is none."""
        line, title = self.lines[spec.key], spec.title
        match event:
            case Started():
                width = f"{event.world_size} of {spec.workers} workers" if event.world_size else ""
                again = f"attempt {event.attempt}: {event.reason}" if event.reason else ""
                line.state, line.note = "starting", "; ".join(filter(None, [width, again]))
                if again:
                    with_width = f" with {width}" * bool(width)
                    self.say(f"{title}: {event.reason}; trying again ({event.attempt}){with_width}")
                else:
                    self.log(f"{title}: starting")
            case [*_, last]:
                line.last, line.seconds = last, [row.train_seconds + row.eval_seconds for row in event]
                self.say(f"{title}: goes on after epoch {line.done}/{line.epochs}")
            case Waiting():
                line.state, line.note = "waiting", f"for room: {event.reason}"
                self.log(f"{title}: waiting for room since {clock(event.seconds)}: {event.reason}")
            case Entered():
                line.state = "training"
            case EpochMetrics():
                line.state, line.last = "training", event
                line.seconds.append(event.train_seconds + event.eval_seconds)
                self.log(
                    f"{title}: epoch {event.epoch}/{line.epochs}  loss {event.loss:.3f}  error {event.error:.2f} %"
                    f"  {event.train_seconds:.2f} s/epoch  left {clock(self._left(line))}"
                )
            case Failed():
                line.state, line.note = "failed", event.message
                self.say(f"{title}: FAILED: {event.message}")
            case RunResult():
                line.state = "done"
                for warning in event.warnings:
                    self.say(f"{title}: {warning}")
                self.log(f"{title}: done, final error {event.final_error:.2f} %")
        if line.seconds:
            self.pace[line.spec.name] = line.seconds[-1]

    def _left(self, line: _Line) -> float | None:
        """Seconds, by the median epoch so far; of a run that has not begun, by others of its name."""
        if line.state in ("done", "failed"):
            return 0.0
        epoch = statistics.median(line.seconds) if line.seconds else self.pace.get(line.spec.name)
        return None if epoch is None else (line.epochs - line.done) * epoch

    def render(self) -> Group:
        """The runs that fit on the screen. Figures are whole; the other columns get what is left beside them."""
        lines, width = list(self.lines.values()), self.console.width
        shown = self.fit(lines, lambda line: RANKS.get(line.state, 3))
        names = COLUMNS if width >= 60 else ("run", *FIGURES)
        padding = (0, 2 if width >= 60 else 1, 0, 0)
        table = make_table(*names, left=("run", "epoch", " ", ""), whole=FIGURES, padding=padding)
        for line in shown:
            last, left = line.last, clock(self._left(line)) if line.state == "training" else line.state
            words = {"run": line.spec.title if self.many_seeds else line.spec.name, "left": left, "": line.note}
            words["epoch"] = f"{line.done}/{line.epochs}"
            if last:
                figures = f"{last.loss:.3f}", f"{last.error:.2f}", f"{last.train_seconds:.2f}"
                words |= zip(FIGURES[1:], figures, strict=True)
            cells: dict[str, Any] = {n: Text(w, no_wrap=True, overflow="ellipsis") for n, w in words.items()}
            cells[" "] = ProgressBar(total=line.epochs, completed=line.done, width=24 if width >= 100 else 10)
            table.add_row(*(cells.get(name, "") for name in names), style=STYLES.get(line.state, ""))
        ended = sum(line.state in ("done", "failed") for line in lines)
        lefts = list(map(self._left, lines))
        total = None if None in lefts else sum(filter(None, lefts)) / self.concurrent_runs
        footer = f"{ended} of {len(lines)} runs ended, left {clock(total)}"
        footer += f", {len(lines) - len(shown)} not shown" * (len(shown) < len(lines))
        return Group(table, Text(f"{footer}   Ctrl-C stops; the same command resumes", style="dim"))


class TrialTable(LiveTable):
    """The trials of a sweep as they train; `trials` is read each time it is drawn."""

    def __init__(self, sweep: Sweep, trials: list[Trial], console: Console, concurrent_runs: int) -> None:
        super().__init__(console)
        self.sweep, self.trials, self.concurrent_runs = sweep, trials, concurrent_runs

    def line(self, trial: Trial, text: str) -> None:
        """What happened to a trial; on a terminal the table shows it."""
        self.log(f"trial {trial.number}/{self.sweep.total}: {text}")

    def left(self) -> float | None:
        """Seconds, from the epochs that trials so far have taken; None before the first epoch."""
        seconds = [trial.seconds / trial.epochs for trial in self.trials if trial.epochs and trial.seconds]
        if not seconds:
            return None
        ended = [trial.epochs for trial in self.trials if trial.state != "running"]
        epochs = (self.sweep.total - len(self.trials)) * (statistics.fmean(ended) if ended else self.sweep.epochs)
        epochs += sum(max(0, self.sweep.epochs - t.epochs) for t in self.trials if t.state == "running")
        return epochs * statistics.median(seconds) / self.concurrent_runs

    def best(self) -> Trial | None:
        """The best of the trials that have finished."""
        return next((trial for trial in best_first(self.trials) if trial.state == "finished"), None)

    def summary(self) -> str:
        """3 running, 4 pruned, 9 finished, 1 failed of 32; best ...; left 1:20."""
        counts = Counter(trial.state for trial in self.trials)
        states: tuple[State, ...] = ("running", "pruned", "finished", "failed")
        words = ", ".join(f"{counts[state]} {state}" for state in states if counts[state])
        best = self.best()
        shown = f"; best {self.sweep.metric} {best.value:.4g} by {describe_trial(best)}" if best else ""
        return f"{words or 'none begun'} of {self.sweep.total}{shown}; left {clock(self.left())}"

    def render(self) -> Group:
        """The trials that fit on the screen: running ones, the best, the latest."""
        best, epochs = self.best(), self.sweep.epochs
        columns = ("trial", "epoch", self.sweep.heading, *(self.trials[0].fields if self.trials else ()), "")
        table = make_table(*columns, left=("",), whole=columns)
        for trial in self.fit(self.trials, lambda t: (t.state != "running", t is not best, -t.number)):
            state: str = "finished, the best so far" if trial is best else trial.state
            if trial.state == "running" and trial.epochs == epochs:
                state = "last evaluation"
            last = "" if trial.last is None else f"{trial.last:.4g}"
            cells = [f"{trial.epochs}/{epochs}", last, *map(format_value, trial.fields.values())]
            style = "bold green" if trial is best else STYLES.get(trial.state, "")
            table.add_row(str(trial.number), *cells, f"{state} {trial.reason}".rstrip(), style=style)
        hint = Text("Ctrl-C stops; the same sweep continues with --resume", style="dim")
        return Group(table, Text(self.summary(), style="dim"), hint)


def describe_trial(trial: Trial) -> str:
    """lr=0.05 weight_decay=0.0001."""
    return " ".join(f"{name}={format_value(value)}" for name, value in trial.fields.items())


class JsonLines:
    """A JSON object per event, for programs: "start", "resumed", "epoch", "done" or "failed" (docs/running.md).

    Figures go by the names of the store: errors in percent, epochs from 1; null where one is not finite.
    """

    live = staticmethod(nullcontext)

    def __init__(self, file: IO[str], epochs: Mapping[str, int]) -> None:
        self.file, self.epochs = file, epochs
        self.seconds: dict[str, float] = defaultdict(float)  # of training, by key

    def event(self, spec: RunSpec, event: Any) -> None:
        """Print what `Progress.event` shows; the epochs of an earlier command are not printed again."""
        match event:
            case Started():
                workers, again = event.world_size or spec.workers, {"reason": event.reason} if event.reason else {}
                planned = {"epochs": self.epochs[spec.key], "workers": workers, "attempt": event.attempt}
                self._print(spec, event="start", **planned, **again)
            case [*_, last]:
                self._print(spec, event="resumed", after_epoch=last.epoch)
            case EpochMetrics():
                self._print(spec, event="epoch", evaluated_on="val" if spec.recipe.val else "test", **dict(event))
            case Failed():
                self._print(spec, event="failed", message=event.message, attempts=event.attempts)
            case RunResult():
                self._print(spec, event="done", evaluated_on=event.evaluated_on, **run_figures(event))

    def _print(self, spec: RunSpec, **what: Any) -> None:
        row = {**what, "variant": spec.variant, "depth": spec.network.depth, "seed": spec.seed, "key": spec.key}
        print(json.dumps(finite(row)), file=self.file, flush=True)


class ConvnetLines(JsonLines):
    """A JSON object per epoch as the convnet seed logs it: epochs from 0, accuracies as shares of 1, and "time", training
    seconds since epoch 0 began. A failure is one, too."""

    def event(self, spec: RunSpec, event: Any) -> None:
        """Print an epoch or a failure; a result has been printed by its last epoch. Earlier epochs count in the time."""
        match event:
            case [*earlier]:
                self.seconds[spec.key] += sum(epoch.train_seconds for epoch in earlier)
            case EpochMetrics():
                self.seconds[spec.key] += event.train_seconds
                evaluated = "val" if spec.recipe.val else "test"
                errors = {"test": event.test_error, evaluated: event.error, "train": event.train_error}
                shares = {f"{of}_acc": round(1 - e / 100, 6) for of, e in errors.items() if e is not None}
                losses = {"loss": event.loss, f"{evaluated}_loss": event.eval_loss}
                self._print(spec, epoch=event.epoch - 1, **shares, time=self.seconds[spec.key], **losses)
            case Failed():
                self._print(spec, failed=event.message)


LINES = {"jsonl": JsonLines, "jsonl-convnet": ConvnetLines}
"""By the formats of `harness run` that are for programs."""


def width_of(spec: RunSpec) -> str:
    """ "2×64": workers × batch size of each"""
    return f"{spec.workers}×{spec.recipe.batch_size // spec.workers}"


UNITS = (("d", 86_400, 2), ("h", 3600, 1), ("min", 60, 1), ("s", 1, 1))  # each from so many on


def duration(seconds: float) -> str:
    """ "2.5 s", "25 s", "3 min 10 s", "3 h 10 min", "5 d 3 h"."""
    if seconds >= 59.5:
        for (unit, size, least), (below, step, _) in pairwise(UNITS):
            whole, rest = divmod(round(seconds / step), size // step)
            if whole >= least:
                return f"{whole} {unit}" + f" {rest} {below}" * bool(rest)
    return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"


def clock(seconds: float | None) -> str:
    """ "1:02:03", "2:03", or "?" where it is not known."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
