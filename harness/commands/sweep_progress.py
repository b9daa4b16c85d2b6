"""What a person sees while a search goes on: counts, the best so far, time left; plain lines where there is no terminal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from harness.commands.sweep import Trial
from harness.progress import clock
from harness.results.sweeps import METRICS
from harness.search_space import format_value


def describe(trial: Trial) -> str:
    """lr=0.05 weight_decay=0.0001."""
    return " ".join(f"{name}={format_value(value)}" for name, value in trial.fields.items())


def best_first(trials: Sequence[Trial]) -> list[Trial]:
    """Whole runs by their value; then pruned and running ones, the longest first; failed ones last."""

    def rank(trial: Trial) -> tuple[float, ...]:
        place = {"finished": 0, "running": 1, "pruned": 1}.get(trial.state, 2)
        last = trial.last if trial.last is not None else float("inf")
        return (place, last) if place == 0 else (place, -trial.epochs, last)

    return sorted(trials, key=rank)


class Board:
    """Shows the trials as they go on. `trials` is looked at anew each time it is drawn."""

    def __init__(
        self, trials: list[Trial], console: Console, *, total: int, epochs: int, concurrent_runs: int, metric: str
    ) -> None:
        self.trials, self.console, self.total, self.epochs = trials, console, total, epochs
        self.concurrent_runs, self.metric = concurrent_runs, metric
        self._live = Live(get_renderable=self._sample_epoch, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Board:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line, above the table if there is one."""
        self.console.print(Text(text), soft_wrap=True)

    def line(self, trial: Trial, text: str) -> None:
        """What happened to a trial; on a terminal the table shows it."""
        if not self.console.is_terminal:
            self.say(f"trial {trial.number}/{self.total}: {text}")

    def left(self) -> float | None:
        """Seconds, from the epochs that trials so far have taken; None before the first epoch."""
        seconds = [trial.seconds / trial.epochs for trial in self.trials if trial.epochs and trial.seconds]
        if not seconds:
            return None
        ended = [trial.epochs for trial in self.trials if trial.state != "running"]
        expected = statistics.fmean(ended) if ended else self.epochs
        epochs = (self.total - len(self.trials)) * expected
        epochs += sum(max(0, self.epochs - t.epochs) for t in self.trials if t.state == "running")
        return epochs * statistics.median(seconds) / self.concurrent_runs

    def summary(self) -> str:
        """3 running, 4 pruned, 9 finished, 1 failed of 32; best ...; left 1:20."""
        counts = dict.fromkeys(("running", "pruned", "finished", "failed"), 0)
        for trial in self.trials:
            counts[trial.state] += 1
        words = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        whole = [trial for trial in best_first(self.trials) if trial.state == "finished"]
        best = f"; best {self.metric} {whole[0].value:.4g} by {describe(whole[0])}" if whole else ""
        return f"{words or 'none begun'} of {self.total}{best}; left {clock(self.left())}"

    def _sample_epoch(self) -> Group:
        names = list(dict.fromkeys(name for trial in self.trials for name in trial.fields))
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for name in ("trial", "epoch", METRICS.get(self.metric, self.metric), *names):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True, overflow="ellipsis")
        best = next((trial for trial in best_first(self.trials) if trial.state == "finished"), None)
        shown = sorted(self.trials, key=lambda t: (t.state != "running", t is not best, -t.number))
        for trial in sorted(shown[: max(4, self.console.height - 5)], key=lambda t: t.number):
            style = {"finished": "green", "failed": "red", "pruned": "dim"}.get(trial.state, "")
            last = "" if trial.last is None else f"{trial.last:.4g}"
            state: str = "finished, the best so far" if trial is best else trial.state
            if trial.state == "running" and trial.epochs == self.epochs:
                state = "last evaluation"
            fields = (format_value(trial.fields[name]) if name in trial.fields else "" for name in names)
            table.add_row(
                str(trial.number), f"{trial.epochs}/{self.epochs}", last, *fields, f"{state} {trial.reason}".rstrip(),
                style="bold green" if trial is best else style,
            )  # fmt: skip
        hint = Text("Ctrl-C stops; the same sweep goes on with --resume", style="dim")
        return Group(table, Text(self.summary(), style="dim"), hint)
