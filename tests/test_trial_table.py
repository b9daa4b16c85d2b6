"""The live table of a sweep, as it is drawn."""

from __future__ import annotations

import io

from rich.console import Console

from harness.progress import TrialTable
from harness.results.sweeps import Dimension, State, Sweep, Trial


def draw(trials: list[Trial], height: int = 30) -> str:
    """What a terminal of this height shows."""
    console = Console(file=io.StringIO(), width=100, height=height, force_terminal=True, color_system=None)
    sweep = Sweep(
        name="s", variant="msra", dataset="digits", metric="error", selected_on="val", val=1, epochs=9, total=16,
        scheduler="asha", search_algorithm="random", trials=[],
        dimensions=[Dimension(field="lr", function="uniform", values=(0.1, 2.0))],
    )  # fmt: skip
    table = TrialTable(sweep, trials, console, concurrent_runs=2)
    with console.capture() as captured:
        console.print(table.render())
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def make_trial(number: int, state: State, *values: float) -> Trial:
    trial = Trial(number=number, fields={"lr": number / 10, "nesterov": True})
    for epoch, value in enumerate(values, 1):
        trial.add_epoch(epoch, value, 10.0)
    reason = "by asha after epoch 1" if state == "pruned" else ""
    trial.end(state, values[-1] if state == "finished" else None, reason)
    return trial


def test_the_table_shows_fields_in_columns_and_names_the_best() -> None:
    trials = [
        make_trial(1, "finished", *[50.0] * 9), make_trial(2, "finished", *[40.0] * 9), make_trial(3, "pruned", 80.0),
        make_trial(4, "running", *[60.0] * 9), make_trial(5, "running"),
    ]  # fmt: skip
    lines = draw(trials).splitlines()
    assert lines[0].split() == ["trial", "epoch", "error", "%", "lr", "nesterov"]
    assert lines[2].split() == ["2", "9/9", "40", "0.2", "true", "finished,", "the", "best", "so", "far"]
    assert lines[3].split() == ["3", "1/9", "80", "0.3", "true", "pruned", "by", "asha", "after", "epoch", "1"]
    assert lines[4].endswith("last evaluation")
    assert lines[5].split() == ["5", "0/9", "0.5", "true", "running"]
    assert "2 running, 1 pruned, 2 finished of 16; best error 40" in lines[6]


def test_a_low_terminal_shows_what_runs_and_the_best() -> None:
    trials = [make_trial(1, "finished", *[40.0] * 9)]
    trials += [make_trial(number, "pruned", 80.0) for number in range(2, 14)] + [make_trial(14, "running", 60.0)]
    lines = draw(trials, height=10).splitlines()
    assert len(lines) <= 10
    assert "the best so far" in lines[1]
    assert lines[-3].split()[0] == "14"
