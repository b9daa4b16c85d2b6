"""What a study found: records -> a page of questions, figures and verdicts. Every figure is read from the records.

Differences carry a 95 % interval: Welch's where both sides have several runs; where one side is a single run, the range
in which one further run of the other side is expected. Where both are single runs nothing is concluded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from harness.results.compare import compare_by
from harness.results.published import find_published
from harness.results.report.sweeps import SweepSummary, load_sweeps, show
from harness.results.report.text import Sheet, for_markdown
from harness.results.rows import NONE, Row, summarise
from harness.results.statistics import Interval, Sample, compare_with_published, sample, welch
from harness.results.store import load_epochs, load_records
from harness.results.values import RunResult

LADDER = (
    ("he2015", "xresnet", "mxresnet", "se-mxresnet", "se-mxresnet-cosine", "se-mxresnet-smooth", "se-mxresnet-mixup",
     "se-mxresnet-reflect"),
    ("xresnext-16x2d", "se-mxresnext-16x2d", "se-mxresnext-16x2d-reflect"),
)  # fmt: skip


SWEEP_CHARTS = r"-(parallel|slice-.*|importance)$"


@dataclass(frozen=True, slots=True)
class Answer:
    """The short form, and what it rests on, in Markdown."""

    verdict: str
    details: list[str]


@dataclass(frozen=True, slots=True)
class Shift:
    """b minus a, and its 95 % interval; None: one run on each side."""

    difference: float
    interval: Interval | None

    @property
    def sign(self) -> int:
        """-1 or 1 where the interval leaves 0 out; else 0."""
        if self.interval is None or self.interval.low <= 0 <= self.interval.high:
            return 0
        return 1 if self.difference > 0 else -1

    def __str__(self) -> str:
        if self.interval is None:
            return f"{_signed(self.difference)} (no interval)"
        return f"{_signed(self.difference)} [{_signed(self.interval.low)}, {_signed(self.interval.high)}]"


def shift(a: Sample, b: Sample) -> Shift:
    """From a to b."""
    difference = b.mean - a.mean
    if apart := welch(b, a):
        return Shift(difference, apart.interval)
    several, single = (a, b) if a.n > 1 else (b, a)
    verdict = compare_with_published(several, Sample(1, single.mean)) if several.n > 1 else None
    if verdict is None or not several.std:  # no spread at all is no measure of one
        return Shift(difference, None)
    half = (verdict.interval.high - verdict.interval.low) / 2
    return Shift(difference, Interval(difference - half, difference + half))


def write_findings(
    record: Path, log: Sequence[dict[str, Any]], todo: Mapping[int, Sequence[str]] = MappingProxyType({})
) -> None:
    """Write findings.md and README.md into a folder that holds runs/<part>. `todo`: what is still to be run of each part."""
    found = [(number, name, question, answer(record, log)) for number, name, question, answer in QUESTIONS]
    rows = load_rows(sorted((record / "runs").glob("*")))
    lines = ["# Findings", "", *_conditions(rows), ""]
    for number, _, question, answer in found:
        lines += [f"{number}. {question} **{answer.verdict if answer else 'Not run.'}**"]
    lines += ["", (__doc__ or "").split("\n\n")[1].replace("\n", " ")]
    for number, name, question, answer in found:
        lines += ["", f"## {number}. {question}", ""]
        if left := todo.get(number):
            lines += [
                "Not all of it was run; these commands are open:",
                "",
                *(f"    {line}" for line in left),
                "",
            ]
        if answer is None:
            lines.append("Not run.")
            continue
        lines += [answer.verdict, "", *answer.details]
        stem = f"{number}-{name}"
        tables = sorted((record / "tables").glob(f"{stem}*.md"))
        links = [f"[{path.stem}](tables/{path.name})" for path in tables]
        if links:
            lines += ["", "The harness's own tables: " + ", ".join(links)]
        for path in sorted((record / "curves" / stem).glob("*.svg")):
            if re.search(SWEEP_CHARTS if name == "sweep" else r"-(curves|zoom)$", path.stem):
                lines += ["", f"![{path.stem}](curves/{stem}/{path.name})"]
    (record / "findings.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (record / "README.md").write_text(_readme(rows, log), encoding="utf-8")


def load_rows(folders: Sequence[Path]) -> list[Row]:
    """The rows of all runs in some folders; a sweep's trials are left out."""
    loaded = load_records([folder for folder in folders if folder.is_dir() and not (folder / "tune").is_dir()])
    return summarise(loaded.records, loaded.interrupted)


# --- conditions ---


def _conditions(rows: Sequence[Row]) -> list[str]:
    results = [(s.record, s.record.result) for row in rows for s in row.done if s.record.result]
    if not results:
        return ["No run has ended yet."]

    def distinct(get: Callable[[Any, RunResult], object]) -> str:
        return (
            ", ".join(dict.fromkeys(str(value) for run in results if (value := get(*run)) is not None)) or "none"
        )

    lines = [
        f"Images: {distinct(lambda record, _: record.dataset)}. Hardware: {distinct(lambda _, result: result.device)}; "
        f"driver {distinct(lambda _, result: result.machine.get('driver'))}; "
        f"CUDA {distinct(lambda _, result: result.machine.get('cuda'))}; "
        f"torch {distinct(lambda _, result: result.machine.get('torch'))}; "
        f"Python {distinct(lambda _, result: result.machine.get('python'))}. "
        f"Commits: {distinct(lambda record, _: _commit(record.environment))}. "
        f"{len(results)} runs, {min(r.started_at for r, _ in results):%Y-%m-%d} to "
        f"{max(r.finished_at for r, _ in results):%Y-%m-%d}."
    ]
    if not all(record.original for record, _ in results):
        lines += ["", "The images are not a published data set's own: errors are compared with one another, and with other "
                  "people's code on the same images, never with published errors."]  # fmt: skip
    if any(row.limit_train is not None for row in rows):
        lines += [
            "",
            "**A trial of the study itself**, on few images and for few epochs: its figures mean nothing.",
        ]
    return lines


def _commit(environment: dict[str, Any]) -> str | None:
    commit = environment.get("commit")
    return None if commit is None else commit[:7] + (" with changes" if environment.get("dirty") else "")


def _readme(rows: Sequence[Row], log: Sequence[dict[str, Any]]) -> str:
    lines = [
        "# The study", "", *_conditions(rows), "",
        "- `findings.md`: each question with its figures and verdict",
        "- `tables/`: what `harness report` and `harness compare` print; `curves/`: what `harness report --curves` draws",
        "- `runs/`: the records and epochs of every run, without weights; peers' epochs; sweeps with all trials",
        "- `commands.txt`: every command, when it ran, how long and with what exit code", "",
        "Made by `python benchmarks/study.py`, which says how. The page for a browser is made from the records by", "",
        "    harness report runs/* --format html --output report.html", "",
        f"Commands took {sum(entry['seconds'] for entry in log) / 60:,.0f} minutes in all.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


# --- the answers ---


def answer_table(record: Path, log: Sequence[dict[str, Any]]) -> Answer | None:
    """Cost of msra's depths, beside the 2016 table's memory and seconds."""
    rows = [row for row in load_rows([record / "runs/1-table"]) if row.done]
    if not rows:
        return None
    cells, faster, memory, hardware = [], [], [], ""
    for row in rows:
        old = find_published("cifar10", row.variant, row.depth)
        if old and old.epoch_seconds and row.epoch_seconds:
            faster.append(old.epoch_seconds / row.epoch_seconds)
            hardware = old.hardware or ""
        if old and old.memory_mib and row.nvml_process_mib.value:
            memory.append(row.nvml_process_mib.value / old.memory_mib)
        cells.append([
            row.name, str(len(row.done)), _spread(row.error), _figure(row.epoch_seconds),
            *(_whole(reading.value) for reading in _memories(row)),
            _figure(old.epoch_seconds) if old else NONE, _whole(old.memory_mib) if old else NONE,
        ])  # fmt: skip
    headers = ["", "n", "error %", "s/epoch", *_memory_names(rows[0]), "2016: s/epoch", "2016: MiB"]
    verdict = "No depth of the 2016 table was run."
    if faster:
        verdict = f"Seconds per epoch are {_range(faster)} times fewer than in 2016 on a {hardware}"
        verdict += (
            f"; GPU memory is {_range(memory)} times what it was." if memory else "; GPU memory was not measured."
        )
    verdict += f" Errors: {', '.join(f'{_spread(row.error)} % at {row.depth} layers' for row in rows)}."
    note = ("The 2016 table (github.com/apark263/cfmz) does not say how its memory was read. Its errors are of the published "
            "images." + ("" if rows[0].original else " They are not shown beside these."))  # fmt: skip
    return Answer(verdict, [_table(headers, cells), "", note])


def answer_depth(record: Path, log: Sequence[dict[str, Any]]) -> Answer | None:
    """Error against depth."""
    rows = load_rows([record / "runs/1-table", record / "runs/2-depth"])
    verdicts, cells = [], []
    for variant in ("msra", "he2015"):
        known = [(row, row.error) for row in rows if row.variant == variant and row.error is not None]
        if len(known) < 2:
            continue
        (first, least), (last, most) = known[0], known[-1]
        moved = shift(least, most)
        words = {-1: "falls", 1: "rises", 0: "cannot be told to fall or rise"}
        verdicts.append(
            f"{variant}: from {first.depth} to {last.depth} layers the error {words[moved.sign]}, by {moved} points"
        )
        before: Sample | None = None
        for row, error in known:
            step = NONE if before is None else str(shift(before, error))
            cells.append([row.name, str(error.n), _spread(error), step])
            before = error
    if not verdicts:
        return None
    return Answer("; ".join(verdicts) + ".", [_table(["", "n", "error %", "against the depth before"], cells)])


def answer_ladder(record: Path, log: Sequence[dict[str, Any]]) -> Answer | None:
    """What each step changes."""
    by_name: dict[str, Row] = {row.variant: row for row in load_rows([record / "runs/3-ladder"]) if row.done}
    cells: list[list[str]] = []
    steps: dict[int, list[str]] = {-1: [], 1: [], 0: []}
    for chain in LADDER:
        before: Sample | None = None
        for name in chain:
            row = by_name.get(name)
            error = (row.test_error or row.error) if row else None
            if row is None or error is None:
                continue
            moved = None if before is None else shift(before, error)
            cells.append([row.name, f"{(row.parameters or 0) / 1e6:.2f}M", str(error.n), _spread(error), _figure(row.epoch_seconds),
                          NONE if moved is None else str(moved)])  # fmt: skip
            if moved is not None:
                steps[moved.sign].append(name)
            before = error
    if not cells:
        return None
    words = {-1: "that help", 1: "that harm", 0: "that cannot be told from no change"}
    verdict = "; ".join(f"{words[sign]}: {', '.join(names)}" for sign, names in steps.items() if names)
    headers = ["", "parameters", "n", "test error %", "s/epoch", "against the step before"]
    note = "Errors of the test set after the last epoch; images held out for validation are not trained on."
    return Answer(
        f"Steps {verdict}." if verdict else "Only one network of the ladder was run.",
        [_table(headers, cells), "", note],
    )


def answer_cifar2(record: Path, log: Sequence[dict[str, Any]]) -> Answer | None:
    """Accuracy after five epochs, and seconds."""
    rows = [row for row in load_rows([record / "runs/4-cifar2"]) if row.done]
    if not rows or (error := rows[0].error) is None:
        return None
    row = rows[0]
    seconds = sample([s.record.result.train_seconds for s in row.done if s.record.result])
    accuracy = Sample(error.n, 100 - error.mean, error.std)
    return Answer(
        f"{_spread(accuracy)} % accuracy over {error.n} runs of {_epochs(row.duration)}, in {_spread(seconds)} s of training.",
        [f"{_figure(row.epoch_seconds)} s/epoch (median without warm-up) on {row.device}; images: {row.dataset}."],
    )


def answer_places(record: Path, log: Sequence[dict[str, Any]]) -> Answer | None:
    """Errors at one scale and at several."""
    folder = record / "runs/5-places"
    rows = [row for row in load_rows([folder]) if row.done]
    if not rows:
        return None
    row, cells = rows[0], []
    for name, what in (("single", "one scale, one centre crop"), ("multi", "several scales, and mirrored")):
        path = folder / f"{name}.txt"
        found = (
            re.search(r"top-1 error ([\d.]+) %(?:, top-5 error ([\d.]+) %)?", path.read_text())
            if path.exists()
            else None
        )
        if found:
            cells.append([what, found[1], found[2] or NONE])
    details = [
        f"{row.name}, {_epochs(row.duration)}, {row.precision}, {_figure(row.epoch_seconds)} s/epoch on {row.device}."
    ]
    if cells:
        details = [_table(["", "top-1 error %", "top-5 error %"], cells), "", *details]
    top5 = f", top-5 error {row.top5_error.mean:.2f} %" if row.top5_error else ""
    verdict = (
        f"On {row.dataset}: top-1 error {row.error.mean:.2f} %{top5}" if row.error else "no error was measured"
    )
    if len(cells) == 2:
        verdict += f"; at several scales {cells[1][1]} and {cells[1][2]} % (n 1)"
    return Answer(verdict + ".", details)


def answer_loaders(record: Path, log: Sequence[dict[str, Any]]) -> Answer | None:
    """Seconds against the bound; errors against each other."""
    rows = [row for row in load_rows([record / "runs/6-loaders"]) if row.done]
    if len({row.loader for row in rows}) < 2:
        return None
    bound = next((row.epoch_seconds for row in rows if row.loader == "synthetic"), None)
    cells, costs = [], []
    for row in sorted(rows, key=lambda row: row.epoch_seconds or math.inf):
        ratio = row.epoch_seconds / bound if bound and row.epoch_seconds else None
        if ratio is not None and row.loader != "synthetic":
            costs.append(f"{row.loader} {ratio:.2f}")
        error = NONE if row.loader == "synthetic" else _spread(row.error)
        cells.append(
            [row.loader, str(len(row.done)), _figure(row.epoch_seconds), f"{ratio:.2f}" if ratio else NONE, error]
        )
    same = []
    seeds = {row.loader: [s.record.result.final_error for s in row.done if s.record.result] for row in rows}
    for pair in compare_by([row for row in rows if row.loader != "synthetic"], "loader") if len(cells) > 2 else []:
        if seeds[pair.a.loader] == seeds[pair.b.loader]:
            same.append(f"{pair.a.loader} and {pair.b.loader} the same in every run, seed by seed")
            continue
        figure = next(figure for figure in pair.figures if figure.metric == "error")
        words = {"equivalent": "equal within", "different": "different by more than", "~": "cannot be told within"}
        same.append(f"{pair.a.loader} and {pair.b.loader} {words[figure.verdict]} ±{figure.margin:g} points")
    verdict = (
        f"Seconds per epoch against the synthetic bound: {', '.join(costs)}." if costs else "No bound was run."
    )
    if same:
        verdict += f" Errors: {'; '.join(same)}."
    return Answer(verdict, [_table(["loader", "n", "s/epoch", "of the bound", "error %"], cells)])


def answer_peers(record: Path, log: Sequence[dict[str, Any]]) -> Answer | None:
    """Other people's code against ours: seconds, and errors after as many epochs."""
    folder = record / "runs/7-peers"
    peers = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    peers.sort(key=lambda peer: (peer["peer"], peer["depth"]))
    rows = [row for row in load_rows([folder]) if row.done]
    if not peers:
        return None
    cells, verdicts = [], []
    for peer in peers:
        ours = _counterpart(rows, peer)
        seconds, epochs = peer["epoch_seconds"], len(peer["epochs"])
        ratio = seconds / ours.epoch_seconds if ours and ours.epoch_seconds else None
        our_error = _error_after(ours, epochs) if ours and peer["compares_error"] and _same_lr(ours) else None
        against = NONE
        if our_error is not None:
            moved = shift(our_error, Sample(1, peer["epochs"][-1]["error"]))
            words = {-1: "theirs is lower", 1: "theirs is higher", 0: "no difference can be told"}
            against = f"{moved}: {words[moved.sign]}"
        name = f"{peer['peer']}-{peer['depth']}"
        cells.append([
            name, str(epochs), _figure(seconds), f"{ours.name}, {ours.precision}, {ours.loader}" if ours else NONE,
            _figure(ours.epoch_seconds) if ours else NONE, f"{ratio:.1f}" if ratio else NONE,
            f"{peer['epochs'][-1]['error']:.2f}", _spread(our_error), against,
        ])  # fmt: skip
        if ratio is not None:
            verdicts.append(
                f"{name}: {ratio:.1f} times ours"
                + ("" if epochs == peer["asked_epochs"] else f" (after {_epochs(epochs)})")
            )
    headers = [
        "theirs",
        "epochs",
        "s/epoch",
        "ours",
        "s/epoch",
        "theirs / ours",
        "their error %",
        "our error %",
        "theirs − ours",
    ]
    notes = ("Seconds: the median without the first epoch; theirs and ours one after the other, not interleaved. Errors are of the test "
             "set after the last epoch of theirs and as many of ours, the lr not yet dropped. zoo's recipe is its own, and "
             "its error is not compared; its network is ours.")  # fmt: skip
    verdict = "Seconds per epoch: " + "; ".join(verdicts) + "." if verdicts else "No run of ours to compare with."
    commits = ", ".join(dict.fromkeys(f"{peer['peer']} {(peer['commit'] or 'unknown')[:7]}" for peer in peers))
    return Answer(
        verdict, [_table(headers, cells), "", notes, f"Commits: {commits}; images: {peers[0]['dataset']}."]
    )


def answer_sweep(record: Path, log: Sequence[dict[str, Any]]) -> Answer | None:
    """The best trial, what mattered, and the table of all."""
    sweeps = load_sweeps([record / "runs/8-sweep"]).sweeps
    if not sweeps:
        begun = any(record.glob("runs/8-sweep/tune/*/sweep.json"))
        return Answer("The sweep has not come to its end.", []) if begun else None
    sweep = sweeps[-1]
    whole = [trial for trial in sweep.best_first() if trial.state == "finished" and trial.value is not None]
    states = [trial.state for trial in sweep.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    seconds = sum(entry["seconds"] for entry in log if entry["step"].startswith("8 "))
    took = f", in {seconds / 60:.1f} minutes" if seconds else ""
    verdict = f"{len(states)} trials ({counts}){took}; none came to its end."
    if whole:
        best = " ".join(f"{d.field}={show(whole[0].fields[d.field])}" for d in sweep.dimensions)
        verdict = (
            f"{best}: {whole[0].value:.4g} {sweep.heading}, the best of {len(states)} trials ({counts}){took}."
        )
    details = [
        f"{sweep.title} on {sweep.dataset}; judged by {sweep.judged}; {sweep.scheduler}, {sweep.search_algorithm}."
    ]
    if sweep.importance:
        fields = ", ".join(f"{f.field} {f.value:.2f} ({f.sign})" for f in sweep.importance.fields)
        details += ["", f"Importance ({sweep.importance.how}, {sweep.importance.trials} trials at epoch {sweep.importance.epoch}): "
                    f"{fields}."]  # fmt: skip
    return Answer(verdict, [*details, "", sweep_table(sweep)])


def sweep_table(sweep: SweepSummary) -> str:
    """All trials, best first, in Markdown."""
    names = [dimension.field for dimension in sweep.dimensions]
    cells = [
        [str(trial.number), trial.state, f"{trial.epochs}/{sweep.epochs}", NONE if trial.last is None else f"{trial.last:.4g}",
         *(show(trial.fields[name]) for name in names), f"{trial.seconds:.1f}"]
        for trial in sweep.best_first()
    ]  # fmt: skip
    headers = ["trial", "state", "epochs", sweep.heading, *names, "seconds"]
    return for_markdown(Sheet(headers, [True, False, *[True] * (len(names) + 3)], cells))


Answerer = Callable[[Path, Sequence[dict[str, Any]]], Answer | None]
QUESTIONS: tuple[tuple[int, str, str, Answerer], ...] = (
    (1, "table", "What do the networks of the 2016 table cost today, and what do they reach?", answer_table),
    (2, "depth", "Does the error fall from 20 layers to 110?", answer_depth),
    (3, "ladder", "Which steps of the ladder from ResNet-20 to all tricks still help?", answer_ladder),
    (4, "cifar2", "How well does the small network tell two classes after five epochs, and how fast?", answer_cifar2),
    (5, "places", "What does ResNet-18 reach on Mini-Places2, at one scale and at several?", answer_places),
    (6, "loaders", "What does each loader cost against the bound, and do all reach the same error?", answer_loaders),
    (7, "peers", "Is it faster than other people's code on the same images and GPU, and as good after as many epochs?", answer_peers),
    (8, "sweep", "Which learning rate and weight decay suit msra-20?", answer_sweep),
)  # fmt: skip


def _counterpart(rows: Sequence[Row], peer: dict[str, Any]) -> Row | None:
    """Our runs that a peer's stand beside: the same network and depth; for zoo those in half precision, if there are."""
    variant = "fattorib" if peer["peer"] == "fattorib" else "he2015"
    known = [row for row in rows if (row.variant, row.depth, row.limit_train, row.limit_test, row.fields["fingerprint"])
             == (variant, peer["depth"], peer["limit_train"], peer["limit_test"], peer["fingerprint"])]  # fmt: skip
    half = [row for row in known if row.loader == "resident"]
    if peer["peer"] == "zoo":
        return next(iter(half or known), None)
    return next((row for row in known if row not in half), None)


def _same_lr(row: Row) -> bool:
    """Whether our lr is still theirs at the end: not dropped, and without the warm-up of depth 110 and more."""
    milestones = row.fields["recipe.milestones"]
    dropped = milestones != NONE and any(float(word) < row.duration for word in milestones.split(","))
    return not dropped and row.fields["recipe.warmup"] == "0"


def _error_after(row: Row, epochs: int) -> Sample | None:
    """Our test errors after so many epochs, over the seeds."""
    errors = []
    for stored in row.done:
        known = load_epochs(stored.folder)
        result = stored.record.result
        if result is None or len(known) < epochs:
            return None
        if result.evaluated_on == "test":
            errors.append(known[epochs - 1].error)
        elif len(known) == epochs and result.test_error is not None:
            errors.append(result.test_error)
    return sample(errors) if errors else None


# --- words ---


def _table(headers: list[str], cells: list[list[str]]) -> str:
    return for_markdown(Sheet(headers, [False, *[True] * (len(headers) - 1)], cells))


def _spread(value: Sample | None) -> str:
    if value is None:
        return NONE
    return f"{value.mean:.2f}" if value.std is None else f"{value.mean:.2f} ± {value.std:.2f}"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _figure(value: float | None) -> str:
    return NONE if value is None else f"{value:.3g}"


def _whole(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def _epochs(number: float) -> str:
    return "1 epoch" if number == 1 else f"{number:g} epochs"


def _range(values: Sequence[float]) -> str:
    """1.5, or 1.5 to 3.2."""
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _memories(row: Row) -> tuple[Any, ...]:
    if row.nvml_process_mib.value is None and row.torch_allocated_mib.value is None:
        return (row.rss_mib,)
    return (row.torch_allocated_mib, row.torch_reserved_mib, row.nvml_process_mib)


def _memory_names(row: Row) -> list[str]:
    names = ["torch allocated MiB", "torch reserved MiB", "NVML MiB"]
    return names if len(_memories(row)) == 3 else ["host memory MiB"]
