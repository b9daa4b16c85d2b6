"""`harness tune`: the words of a space, rules and proposals, resuming from anywhere, a sweep through Ray."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import harness
from optuna.pruners import ThresholdPruner
from test_store import make_record

from harness import search_space as space
from harness.cluster.job import Started, Worker, make_failed
from harness.commands import study
from harness.commands.study import Journal, Study
from harness.models.variants import find_variant
from harness.options import SCHEDULERS
from harness.progress import describe_trial
from harness.record import Recorder, lock_file
from harness.results.explain import why
from harness.results.remote import StorageError
from harness.results.report.table import render
from harness.results.rows import summarise
from harness.results.store import SWEEPS, finish, load_epochs, load_records, start
from harness.results.sweeps import Dimension, Sweep, Trial, best_first, load_sweeps
from harness.results.values import Pruned
from harness.search_space import finite_values, parse_search, parse_settings
from harness.spec import RunSpec, UserError

TINY = "--dataset digits --depth 8 --limit-train 128 --gpus 0 --loader resident"


# --- words ---


def test_a_search_space_is_read_with_the_types_of_its_fields() -> None:
    dimensions = parse_search(
        ["lr=loguniform(0.01, 1)", "momentum = uniform(0,0.99)", "batch-size=randint(32,64)", "nesterov=choice(true,false)",
         "shortcut=grid(A,identity-conv)", "crop=choice(none,28)", "warmup=randint(0,5)"]
    )  # fmt: skip
    assert [d.values for d in dimensions] == [
        (0.01, 1.0), (0.0, 0.99), (32, 64), (True, False), ("A", "identity-conv"), (None, 28), (0.0, 5.0),
    ]  # fmt: skip
    assert str(dimensions[0]) == "lr=loguniform(0.01,1)"
    assert parse_search([str(d) for d in dimensions]) == dimensions
    assert finite_values(dimensions[6]) == (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
    assert parse_settings(["milestones=90,135", "lr=5e-2"]) == {"milestones": (90.0, 135.0), "lr": 0.05}


MISTAKES = {
    "--search lrr=uniform(0,1)": "did you mean lr?",
    "--search lr=logunifrm(0.1,1)": "did you mean loguniform?",
    "--search lr=0.1": "expected FIELD=FUNCTION(a,b)",
    "--search lr=uniform": "expected FIELD=FUNCTION(a,b)",
    "--search lr=uniform(1)": "takes two numbers",
    "--search lr=uniform(1,0.1)": "the lower one first",
    "--search lr=loguniform(0,1)": "above 0",
    "--search lr=uniform(0,x)": "is a non-negative number, not 'x'",
    "--search lr=uniform(0,inf)": "is a non-negative number, not 'inf'",
    "--search batch_size=uniform(32,64)": "is a whole number: use randint",
    "--search batch_size=choice(32,6.4)": "non-negative whole number, not '6.4'",
    "--search shortcut=choice(A,projektion)": "did you mean projection?",
    "--search shortcut=uniform(0,1)": "is not a number: use choice",
    "--search nesterov=choice(yes,no)": "allowed: true, false",
    "--search milestones=choice(1,2)": "cannot be searched",
    "--search duration=uniform(1,9)": "an option of its own, --epochs",
    "--search lr=uniform(0,1) --search lr=grid(1,2)": "lr is named twice",
    "--search lr=uniform(0,1) --scheduler asah": "did you mean asha?",
    "--search lr=uniform(0,1) --metric eror": "did you mean error?",
    "--search lr=uniform(0,1) --search-algorithm tep": "did you mean tpe?",
    "--search lr=grid(1,2) --search-algorithm tpe": "choice(...) instead of grid",
    "--search lr=uniform(0,1) --samples 0": "at least 1",
    "--search lr=uniform(0,1) --runs-per-gpu 0": "at least 1",
    "--search lr=uniform(0,1) --runs-per-gpu 2": "needs a GPU",
    "--search lr=uniform(0,1) --runs-per-gpu 2 --workers 2": "have one worker",
    "--search lr=uniform(0,1) --runs-per-gpu 2 --metric epoch_seconds": "slow each other down",
    "--search lr=uniform(0,1) --metric top5_error": "10 classes",
    "--search depth=choice(8,21)": "depth 21 is not 6n+2",
    "--search depth=choice(8,14)": "leave --depth out",
    "--search batch_size=choice(32,33) --workers 2": "does not divide the global batch",
    "--search lr=uniform(0,1) --val 128": "would hold out 128 training images, but there are only 128",
    "--search lr=uniform(0,1) --variant mrsa": "did you mean msra?",
    "--search variant=choice(msra,mrsa)": "did you mean msra?",
    "--search variant=choice(msra,he2015) --variant msra": "leave --variant out",
    "--search variant=uniform(0,1)": "is not a number: use choice",
    "--search variant=choice(msra,convnet)": "the recipes of these variants have",
    "--search loader=choice(resident,dali)": "leave --loader out",
    "--search lr=uniform(0,1) --set lr=0.1": "leave --set lr=... out",
    "--search lr=uniform(0,1) --set variant=msra": "an option of its own, --variants",
    "--search momentum=uniform(0,1) --set optimizer=adamw": "--search momentum: a field of optimizer sgd; the optimizer here is adamw",
    "--search optimizer=choice(sgd,adamw) --set gamma=0.5 --set schedule=cosine": "--set gamma: a field of schedule multistep; the schedule here is cosine",
    "--search lr=uniform(0,1) --dry-run --estimate": "cannot be combined",
    "--search lr=uniform(0,1) --resume nothing": "there is no sweep",
    "": "--search is missing",
}  # fmt: skip


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(words: str, tmp_path: Path, capsys: Any) -> None:
    quoted = " ".join(f"'{word}'" for word in words.split())
    base = TINY.replace("--depth 8", "") if words == "--search depth=choice(8,21)" else TINY
    code, _, err = harness(f"tune {base} --out {tmp_path} {quoted}", capsys)
    assert code == 2
    assert MISTAKES[words] in err
    assert (err.count("\n"), err.startswith("harness: error: ")) == (1, True)
    assert not list(tmp_path.glob("tune/*"))


def test_settings_change_recipe_and_network_and_say_so() -> None:
    settings = parse_settings(["shortcut=identity-conv", "lr=0.05", "momentum=0.9"])
    variant, changed = space.apply(find_variant("he2015")(20), settings)
    assert (variant.recipe.lr, variant.network.shortcut) == (0.05, "identity-conv")
    assert changed == ("lr=0.05", "shortcut=identity-conv"), (
        "in the order of the fields; what is the variant's own is none"
    )
    same, none = space.apply(find_variant("msra")(20), parse_settings(["lr=0.1"]))
    assert (same, none) == (find_variant("msra")(20), ())
    for text, message in {
        "lrr=1": "did you mean lr",
        "depth=20": "--depths",
        "augmentations=cutout": r"augmentations 'cutout' is unknown \(allowed: none\)",
        "lr": "expected FIELD=VALUE, as in lr=0.05",
        "lr=": "is a non-negative number",
    }.items():
        with pytest.raises(UserError, match=message):
            parse_settings([text])


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (
            "he2015",
            "activation=mish",
            "--set activation=mish: architecture cifar has no such field (allowed: block, ",
        ),
        ("he2015", "shortcut=projection", "has no such shortcut (allowed: A, identity-conv)"),
        ("mxresnet", "cardinality=8", "has this field with block=bottleneck only, not basic"),
        ("mxresnet", "block=preact", "has no such block (allowed: basic, bottleneck)"),
    ],
)
def test_a_setting_that_the_architecture_does_not_read_is_refused(name: str, text: str, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        space.apply(find_variant(name)(20), parse_settings([text]))


def test_a_block_that_cannot_have_the_depth_is_refused() -> None:
    with pytest.raises(UserError, match=re.escape("--set block=basic: depth 29 is not 6n+2")):
        space.apply(find_variant("xresnet-bottleneck")(29), parse_settings(["block=basic"]))
    _, changed = space.apply(find_variant("xresnet-bottleneck")(20), parse_settings(["block=basic"]))
    assert changed == ("block=basic",)


# --- proposals and rules ---

LR = Dimension(field="lr", function="loguniform", values=(0.001, 1.0))
WAYS = Dimension(field="shortcut", function="choice", values=("A", "identity-conv"))
PAD = Dimension(field="pad", function="randint", values=(1, 3))


def open_study(
    path: Path, dimensions: Any, *, algorithm: str = "random", scheduler: str = "none", seed: int = 0
) -> Study:
    sweep = Sweep(
        name="s", variant="msra", dataset="digits", metric="error", selected_on="val", val=1, epochs=9, total=99,
        scheduler=scheduler, search_algorithm=algorithm, dimensions=list(dimensions), trials=[],
    )  # fmt: skip
    return Study(path, sweep, seed=seed)


def propose_all(path: Path, dimensions: Any, algorithm: str, count: int, seed: int = 0) -> list[Trial]:
    """Trials that end at once; the best learning rate is 0.03."""
    sweep = open_study(path / f"{len(list(path.iterdir()))}.log", dimensions, algorithm=algorithm, seed=seed)
    for _ in range(count):
        fields = sweep.propose()
        if fields is None:
            break
        trial = sweep.add(fields, "run", "key")
        value = abs(math.log(fields["lr"] / 0.03)) if "lr" in fields else 0.0
        sweep.report(trial, 1, value, 1.0)
        sweep.end(trial, "finished", value)
    return sweep.trials


def test_random_proposals_fill_the_space_once(tmp_path: Path) -> None:
    drawn = [t.fields["lr"] for t in propose_all(tmp_path, [LR], "random", 300)]
    assert len(set(drawn)) == 300
    assert all(float(f"{lr:.4g}") == lr for lr in drawn), "few figures, to be typed again"
    shares = np.histogram(np.log10(drawn), bins=[-3, -2, -1, 0])[0]
    assert shares.sum() == 300
    assert all(70 <= share <= 130 for share in shares), "even in the logarithm"
    assert drawn == [t.fields["lr"] for t in propose_all(tmp_path, [LR], "random", 300)]
    assert drawn != [t.fields["lr"] for t in propose_all(tmp_path, [LR], "random", 300, seed=1)]

    finite = [WAYS, PAD]
    assert study.count_trials(finite, 50) == 6
    assert len({str(t.fields) for t in propose_all(tmp_path, finite, "random", 50)}) == 6
    grid = [
        Dimension(field="lr", function="grid", values=(0.1, 0.2, 0.3)),
        Dimension(field="pad", function="grid", values=(2, 4)),
        WAYS,
    ]
    assert study.count_trials(grid, None) == 6
    assert study.count_trials(grid, 2) == 12
    points = [tuple(t.fields.values()) for t in propose_all(tmp_path, grid, "random", 12)]
    assert len(set(points)) == 12
    assert {p[:2] for p in points[:6]} == {(a, b) for a in (0.1, 0.2, 0.3) for b in (2, 4)}


@pytest.mark.parametrize("algorithm", ["tpe", "gp"])
def test_other_algorithms_propose_better_ones_and_the_same_again(algorithm: str, tmp_path: Path) -> None:
    trials = propose_all(tmp_path, [LR, WAYS], algorithm, 25)  # the first ten by chance
    again = propose_all(tmp_path, [LR, WAYS], algorithm, 13)
    assert [t.fields for t in trials[:13]] == [t.fields for t in again]
    late = np.mean([t.value for t in trials[15:]])
    assert late < np.mean([t.value for t in trials[:10]])
    assert len(propose_all(tmp_path, [WAYS], algorithm, 5)) == 2
    assert len(propose_all(tmp_path, [WAYS, PAD], algorithm, 9)) == 6


def test_a_dimension_keeps_its_types_and_values_through_the_journal(tmp_path: Path) -> None:
    dimensions = parse_search(
        ["lr=uniform(0.01,0.0101)", "warmup=randint(0,5)", "crop=choice(none,28)", "nesterov=choice(true,false)", "pad=grid(2,4)"]
    )  # fmt: skip
    path = tmp_path / "journal.log"
    sweep = open_study(path, dimensions)
    for _ in range(8):
        fields = sweep.propose()
        assert fields is not None
        assert list(fields) == [d.field for d in dimensions]
        sweep.add(fields, "run", "key")
    again = open_study(path, dimensions)
    assert again.trials == sweep.trials
    for trial in again.trials:
        kinds = {name: type(value) for name, value in trial.fields.items()}
        assert (kinds["lr"], kinds["warmup"], kinds["nesterov"], kinds["pad"]) == (float, float, bool, int)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_prune_the_worse_and_let_the_best_end(scheduler: str, tmp_path: Path) -> None:
    sweep = open_study(tmp_path / "journal.log", [LR], scheduler=scheduler)
    for number in range(30):
        trial = sweep.add({"lr": 0.01 + number / 1000}, "run", "key")
        level = (number * 7) % 30 + 1
        for epoch in range(1, 10):
            if sweep.report(trial, epoch, level + 1 / epoch, 1.0):
                sweep.end(trial, "pruned")
                break
        else:
            sweep.end(trial, "finished", float(level))
    finished = [t for t in sweep.trials if t.state == "finished"]
    pruned = [t for t in sweep.trials if t.state == "pruned"]
    assert min(t.value or 0 for t in finished) == 1.0, "the best of all"
    if scheduler == "none":
        assert not pruned
        return
    assert 10 < len(pruned) < 30
    assert {t.epochs for t in pruned} <= {1, 3} if scheduler in ("asha", "hyperband") else {1, 2}
    assert np.mean([t.last for t in pruned if t.last]) > np.mean([t.last for t in finished if t.last])


@pytest.mark.parametrize(("algorithm", "scheduler"), [("random", "asha"), ("tpe", "hyperband"), ("tpe", "median")])
def test_a_journal_cut_anywhere_continues_as_if_nothing_had_happened(
    algorithm: str, scheduler: str, tmp_path: Path
) -> None:
    def run(path: Path) -> list[Trial]:
        """Two trials at a time, an epoch of each in turn."""
        sweep = open_study(path, [LR, WAYS], algorithm=algorithm, scheduler=scheduler, seed=3)
        running = [t for t in sweep.trials if t.state == "running"]

        def end_if_over(trial: Trial) -> None:
            pruned = trial.number in sweep.to_prune
            if pruned or trial.epochs == 9:
                sweep.end(trial, "pruned" if pruned else "finished", None if pruned else trial.last)
                running.remove(trial)

        for trial in running.copy():
            for epoch in range(1, trial.epochs + 1):  # a run that is resumed reports its earlier epochs again
                assert sweep.report(trial, epoch, -1.0, 99.0) == (trial.number in sweep.to_prune)
            end_if_over(trial)
        while True:
            while len(running) < 2 and len(sweep.trials) < 12:
                fields = sweep.propose()
                assert fields is not None
                running.append(sweep.add(fields, "run", "key"))
            if not running:
                return sweep.trials
            trial = min(running, key=lambda t: (t.epochs, t.number))
            metric = abs(math.log(trial.fields["lr"] / 0.03)) + 1 / (trial.epochs + 1)
            sweep.report(trial, trial.epochs + 1, metric, 0.1)
            end_if_over(trial)

    whole = tmp_path / "whole.log"
    expected = run(whole)
    assert {t.state for t in expected} == {"pruned", "finished"}
    text = whole.read_bytes()
    ends = [i + 1 for i, c in enumerate(text) if c == 10]
    for cut in sorted(
        {0, *ends[:: 1 if algorithm == "random" else 9], ends[-1], *(end + 7 for end in ends[:-1:5])}
    ):
        path = tmp_path / "cut.log"
        path.write_bytes(text[:cut])
        assert run(path) == expected


def test_optuna_itself_reads_the_journal(tmp_path: Path) -> None:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    propose_all(tmp_path, [LR, WAYS], "random", 3)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / "0.log")))
    loaded = optuna.load_study(study_name="sweep", storage=storage)
    assert [t.state.name for t in loaded.trials] == ["COMPLETE"] * 3
    assert set(loaded.best_trial.params) == {"lr", "shortcut"}


def test_an_event_that_was_not_written_whole_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    journal = Journal(path)
    journal.append_logs([{"op_code": 0}])
    whole = path.read_bytes()
    with journal.event():
        journal.append_logs([{"op_code": 1}])
        journal.append_logs([{"op_code": 2}])
        assert path.read_bytes() == whole
    assert [log["op_code"] for log in Journal(path).read_logs(0)] == [0, 1, 2]
    path.write_bytes(path.read_bytes().rpartition(b'{"op_code": 2')[0] + b'{"op_co')
    assert [log["op_code"] for log in Journal(path).read_logs(0)] == [0]
    assert path.read_bytes() == whole


# --- what is kept ---


def test_a_stopped_run_is_shown_and_averaged_with_nothing(tmp_path: Path) -> None:
    pruned = Pruned(by="asha", sweep="s", epoch=3, of=30, error=45.0, evaluated_on="val")
    finish(tmp_path, make_record(0))
    folder = finish(tmp_path, make_record(1, status="pruned", result=None, pruned=pruned))
    assert folder.name.endswith(".partial")
    (tmp_path / SWEEPS / "some-sweep").mkdir(parents=True)
    loaded = load_records([tmp_path])
    assert (loaded.problems, loaded.interrupted) == ([], [])
    assert [s.record.key for s in loaded.records if s.record.status == "done"] == [make_record(0).key]
    (row,) = summarise(loaded.records)
    assert row.error is not None
    assert (row.figures["error"].n, row.error, len(row.done), len(row.pruned)) == (1, 8.3, 1, 1)
    text = render([row], "markdown")
    assert "1 of 2" in text
    assert "seed 1 was pruned at 3 of 30 epochs by a search" in text
    (alone,) = summarise([s for s in loaded.records if s.record.status == "pruned"])
    assert alone.error is None
    assert "pruned at 3 of 30" in render([alone], "table", width=200)
    assert "pruned by asha of sweep s after epoch 3 of 30, at 45 %" in why(alone)

    start(tmp_path, make_record(1).name, {})  # taken up again: the record of the stop is kept beside
    assert len(list(folder.glob("pruned_*.json"))) == 1
    broken = make_record(2).model_copy(update={"pruned": pruned})
    finish(tmp_path, broken)
    assert "its outcome done and pruned" in load_records([tmp_path]).problems[0].reason


# --- sweeps ---


class StopHereError(Exception):
    """Stands for a driver that is killed."""


def search_here(crash_at: tuple[str, int] | None, crash: Exception | None = None) -> Any:
    """`harness.cluster.search.search` in this process, one trial at a time; dies before a report is delivered."""

    def search(train: Any, trials: Any, job: Any) -> None:
        while proposal := trials.propose():
            name, spec = proposal
            trials.reported(name, Started(attempt=1))

            def report(event: Any, name: str = name) -> None:
                if (name, event.epoch) == crash_at:
                    raise crash or StopHereError
                if trials.reported(name, event):
                    raise SystemExit

            try:
                outcome = train(spec, Worker(threads=1), report)
            except SystemExit:
                outcome = None
            except OSError as error:
                outcome = make_failed(error, attempts=1)
            trials.ended(name, outcome)

    return search


SWEEP = (
    f"tune {TINY} --epochs 3 --search 'lr=loguniform(0.003,0.3)' --search 'shortcut=choice(A,identity-conv)' --samples 4"
    " --concurrent 1"
)


def trials_of(out: Path, *, newest: bool = False) -> Any:
    paths = sorted(out.glob("tune/*/trials.json"), key=lambda path: path.stat().st_mtime)
    assert newest or len(paths) == 1
    return json.loads(paths[-1].read_text())


def test_an_interrupted_sweep_goes_on_and_its_trials_are_runs(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.resources.join_cluster", lambda *_, **__: None)
    monkeypatch.setattr("harness.cluster.search.search", search_here(None))
    code, out, err = harness(f"{SWEEP} --out {tmp_path}/whole", capsys)
    assert (code, err) == (0, "")
    assert "judged by error % of 12 held-out training images" in out
    whole = trials_of(tmp_path / "whole")
    assert [t["number"] for t in whole["trials"]] == [1, 2, 3, 4]
    read = load_sweeps([tmp_path / "whole"])  # the page reads what was written
    assert not read.problems
    assert [t.number for t in read.sweeps[0].trials] == [1, 2, 3, 4]
    assert (whole["selected_on"], whole["val"], whole["metric"]) == ("val", 12, "error")
    states = [t["state"] for t in whole["trials"]]
    assert states[0] == "finished"

    monkeypatch.setattr("harness.cluster.search.search", search_here(("3", 1)))
    folder = tmp_path / "cut"  # elsewhere: the test of a cut journal
    with pytest.raises(StopHereError):
        harness(f"{SWEEP} --out {folder}", capsys)
    monkeypatch.setattr("harness.cluster.search.search", search_here(None))
    (sweep,) = [p.parent.name for p in folder.glob("tune/*/sweep.json")]
    code, out, err = harness(f"tune --resume {sweep} --out {folder} --samples 5", capsys)
    assert (code, "--samples: sweep" in err) == (2, True), "a resumed sweep keeps its own settings"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "epoch-000001.pt")
    monkeypatch.setattr("harness.cluster.search.search", search_here(("2", 2), full))
    code, out, err = harness(f"{SWEEP} --out {tmp_path}/full", capsys)
    (filled,) = [p.parent.name for p in tmp_path.glob("full/tune/*/sweep.json")]
    assert (code, err) == (1, "")
    line = f"No space left on device; continue with harness tune --resume {filled} --out {tmp_path}/full"
    assert line in out.replace("\n", " "), "the trial has not failed: it lacked room"
    monkeypatch.setattr("harness.cluster.search.search", search_here(None))
    for name, out_dir in ((sweep, folder), (filled, tmp_path / "full")):
        code, out, _ = harness(f"tune --resume {name} --out {out_dir}", capsys)
        assert code == 0
        for one, other in zip(whole["trials"], trials_of(out_dir)["trials"], strict=True):
            for what in ("number", "fields", "state", "epochs", "key", "curve", "value"):
                assert one[what] == other[what], what

    # trials are runs: in the report, finished ones never repeated, pruned ones no results
    loaded = load_records([tmp_path / "whole"])
    assert (loaded.problems, loaded.interrupted) == ([], [])
    by_key = {stored.record.key: stored for stored in loaded.records}
    for trial in whole["trials"]:
        stored = by_key[trial["key"]]
        assert stored.record.environment["sweep"] == whole["name"]
        assert len(load_epochs(stored.folder)) == trial["epochs"]
        if trial["state"] == "pruned":
            assert stored.record.status == "pruned"
            assert stored.record.result is None
            assert stored.record.pruned.of == 3
        else:
            assert stored.record.result.evaluated_on == "val"
    code, out, err = harness(f"report {tmp_path}/whole", capsys)
    assert (code, err) == (0, "")
    assert ("pruned at" in out) == ("pruned" in states)
    code, out, _ = harness(f"{SWEEP} --scheduler none --out {tmp_path}/whole", capsys)
    assert code == 0
    assert "trial 1/4: finished" in out
    assert "was done already" in out
    assert "trial 1/4: starting" not in out

    # the winner's command is one that runs: that very network, engine and loader, in full
    (command,) = [line.strip() for line in out.splitlines() if line.strip().startswith("harness run")]
    code, plan, _ = harness(f"{command.removeprefix('harness ')} --dry-run", capsys)
    assert code == 0
    assert "5 runs on digits, 0 already done" in plan
    best = min(trials_of(tmp_path / "whole", newest=True)["trials"], key=lambda t: t["value"])
    (path,) = (tmp_path / "whole").glob(f"tune/{trials_of(tmp_path / 'whole', newest=True)['name']}/winner.json")
    winner = RunSpec.from_json(json.loads(path.read_bytes()))
    assert (winner.recipe.lr, winner.network.shortcut) == (best["fields"]["lr"], best["fields"]["shortcut"])
    assert (winner.recipe.val, winner.recipe.duration, winner.limit_train) == (0, 64_000, None)
    assert "--epochs 3" in command, "64,000 steps are 5,000 epochs of these images"
    assert (winner.loader, winner.engine, winner.device) == ("resident", "eager", "cpu")


def test_what_cannot_be_stored_stops_a_sweep_and_what_another_command_trains_is_left_out(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk when a trial ends, a store that is away, and a trial in another command's hands: none has failed."""
    monkeypatch.setattr("harness.resources.join_cluster", lambda *_, **__: None)
    end = Recorder.keep

    def fail(error: Exception) -> Any:
        def keep(*given: Any, **known: Any) -> bool:
            if not left:
                raise error
            left.pop()
            return end(*given, **known)

        left = [1]
        return keep

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "record.json")
    for name, error, words in (("disk", full, "No space left"), ("store", StorageError("s3: away"), "s3: away")):
        out = tmp_path / name
        monkeypatch.setattr("harness.cluster.search.search", search_here(None))
        monkeypatch.setattr(Recorder, "keep", fail(error))
        code, said, err = harness(f"{SWEEP} --scheduler none --out {out}", capsys)
        assert (code, err, words in said) == (1, "", True)
        (sweep,) = (path.parent.name for path in out.glob("tune/*/sweep.json"))
        assert f"harness tune --resume {sweep} --out {out}" in said.replace("\n", " ")
        monkeypatch.setattr(Recorder, "keep", end)
        code, said, _ = harness(f"tune --resume {sweep} --out {out}", capsys)
        assert (code, [t["state"] for t in trials_of(out)["trials"]]) == (0, ["finished"] * 4), name

    out = tmp_path / "locked"
    monkeypatch.setattr("harness.cluster.search.search", search_here(("2", 1)))
    with pytest.raises(StopHereError):
        harness(f"{SWEEP} --scheduler none --out {out}", capsys)
    (sweep,) = (path.parent.name for path in out.glob("tune/*/sweep.json"))
    (held,) = out.glob("*.partial")
    monkeypatch.setattr("harness.cluster.search.search", search_here(None))
    with lock_file(out / ".locks" / f"{held.stem}.lock", "is being trained"):
        code, said, _ = harness(f"tune --resume {sweep} --out {out}", capsys)
    assert (code, "trial 2 is left out" in said) == (1, True)
    assert [t["state"] for t in trials_of(out)["trials"]] == ["finished", "running", "finished", "finished"]
    code, said, err = harness(f"tune --resume {sweep} --out {out} --gpus 1", capsys)
    assert (code, "it was begun on the CPU" in err or "CUDA" in err or "GPU" in err) == (2, True)
    assert harness(f"tune --resume {sweep} --out {out}", capsys)[0] == 0


def test_a_pruning_that_a_kill_cut_off_is_done_when_the_sweep_goes_on(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any, **__: Any) -> None:
        raise StopHereError

    monkeypatch.setattr("harness.resources.join_cluster", lambda *_, **__: None)
    monkeypatch.setattr("harness.cluster.search.search", search_here(None))
    monkeypatch.setattr(study, "make_pruner", lambda *_: ThresholdPruner(upper=-1, n_warmup_steps=2))
    with monkeypatch.context() as patch:
        patch.setattr("harness.record.Recorder.keep", die)
        with pytest.raises(StopHereError):
            harness(f"{SWEEP.replace('--samples 4', '--samples 1')} --out {tmp_path}", capsys)
    (folder,) = tmp_path.glob("tune/*")
    code, out, _ = harness(f"tune --resume {folder.name} --out {tmp_path}", capsys)
    assert (code, "no trial finished" in out) == (1, True)
    (trial,) = trials_of(tmp_path)["trials"]
    (stored,) = load_records([tmp_path]).records
    assert stored.record.pruned is not None
    assert (trial["state"], trial["epochs"], stored.record.pruned.epoch, len(trial["curve"])) == (
        "pruned",
        2,
        2,
        2,
    )


def test_a_field_that_some_trials_read_is_searched_and_set(tmp_path: Path, capsys: Any) -> None:
    line = f"tune {TINY} --epochs 1 --samples 4 --val 8 --search 'optimizer=choice(sgd,adamw)' --dry-run --out {tmp_path}"
    for momentum in ("--search 'momentum=uniform(0.5,0.9)'", "--set momentum=0.5"):
        code, out, err = harness(f"{line} {momentum}", capsys)
        assert (code, err, "cannot be trained" in out) == (0, "", False)
        assert "optimizer=adamw" in out
        assert "optimizer=sgd" in out


def test_values_that_cannot_be_had_together_are_a_failed_trial_and_the_sweep_goes_on(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.resources.join_cluster", lambda *_, **__: None)
    monkeypatch.setattr("harness.cluster.search.search", search_here(None))
    line = f"tune {TINY.replace('128', '64')} --epochs 1 --samples 4 --val 8 --batch-size 56 --concurrent 1"
    line += f" --search 'nesterov=choice(false,true)' --search 'momentum=choice(0,0.9)' --out {tmp_path}"
    says = "he2015-8 on digits: nesterov=true: a momentum above 0 is required"
    code, plan, err = harness(f"{line} --dry-run", capsys)
    assert (code, err, plan.count("trial ")) == (0, "", 4)
    assert f"nesterov=true momentum=0   cannot be trained: {says}" in plan
    code, out, err = harness(line, capsys)
    assert (code, err, says in out) == (0, "", True)
    trials = trials_of(tmp_path)["trials"]
    (failed,) = [trial for trial in trials if trial["state"] != "finished"]
    assert (len(trials), failed["state"], failed["reason"], failed["run"]) == (4, "failed", says, "")
    assert (len(load_records([tmp_path]).records), load_sweeps([tmp_path]).problems) == (3, [])


def test_variant_loader_and_batch_size_are_searched_with_settings_kept_by_the_sweep(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.resources.join_cluster", lambda *_, **__: None)
    monkeypatch.setattr("harness.cluster.search.search", search_here(("2", 1)))
    line = "--dataset digits --limit-train 64 --gpus 0 --depth 8 --epochs 1 --scheduler none --concurrent 1 --samples 3"
    line += " --val 8 --search 'variant=grid(msra,fattorib)' --search 'loader=choice(resident,dataloader)'"
    line += " --search 'batch_size=choice(16,32)' --set lr=0.02 --set milestones=0.5,0.75"
    out = tmp_path / "tune"  # not tune/tune
    code, plan, _ = harness(f"tune {line} --out {out} --dry-run", capsys)
    assert code == 0
    assert "msra+fattorib-8 on digits: 6 trials of 1 epoch, 1 at a time" in plan
    assert "loader=choice(resident,dataloader)" in plan
    assert not out.exists(), "a look writes nothing"
    with pytest.raises(StopHereError):
        harness(f"tune {line} --out {out}", capsys)
    (sweep,) = [path.parent for path in out.glob("*/sweep.json")]
    assert sweep.name.startswith("msra+fattorib-8_digits_")
    monkeypatch.setattr("harness.cluster.search.search", search_here(None))
    code, printed, err = harness(f"tune --resume {sweep.name} --out {out}", capsys)
    assert (code, err) == (0, "")
    assert f"page: {out}/report.html" in printed
    assert sweep.name in (out / "report.html").read_text()
    (read,) = load_sweeps([out]).sweeps
    planned = [row.partition(": ")[2] for row in plan.splitlines() if row.startswith("trial ")]
    assert [describe_trial(trial) for trial in read.trials] == planned
    loaded = load_records([out])
    assert (len(loaded.records), loaded.problems) == (6, [])
    by_key = {stored.record.key: stored.record for stored in loaded.records}
    for trial in read.trials:
        spec = by_key[trial.key].spec
        known = {"variant": spec["variant"], "loader": spec["loader"], "batch_size": spec["recipe"]["batch_size"]}
        assert known == trial.fields
        assert spec["recipe"]["lr"] == 0.02
        assert spec["recipe"]["milestones"] == pytest.approx([0.5 / 180, 0.75 / 180]), (
            "stretched, as the epochs are"
        )
    assert {trial.fields["variant"] for trial in read.trials} == {"msra", "fattorib"}


def test_an_estimate_of_a_sweep_probes_each_cost_once_and_counts_all_trials(tmp_path: Path, capsys: Any) -> None:
    line = (
        f"tune {TINY} --epochs 2 --search 'lr=loguniform(0.01,1)' --search 'batch_size=choice(16,32)' --samples 7"
    )
    code, out, _ = harness(f"{line} --concurrent 1 --out {tmp_path} --estimate", capsys)
    assert code == 0
    assert "in all 7 runs, 1 at a time" in out
    assert out.count(": probing\n") == 2  # a busy machine is noted, too
    assert not list(tmp_path.glob("tune/*"))


def test_a_time_that_ends_before_the_first_epoch_says_what_would_have_fitted(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(train: Any, trials: Any, job: Any) -> None:
        import time

        trials.propose()
        time.sleep(60)

    monkeypatch.setattr("harness.resources.join_cluster", lambda *_, **__: None)
    monkeypatch.setattr("harness.cluster.search.search", wait)
    line = f"tune {TINY} --epochs 2 --search 'lr=loguniform(0.01,1)' --concurrent 1 --out {tmp_path}"
    code, out, _ = harness(f"{line} --until 2s", capsys)
    assert (code, "not one epoch of 128 images was done" in out, "--estimate says how many" in out) == (
        130,
        True,
        True,
    )
    assert harness(f"{line} --estimate", capsys)[0] == 0
    code, out, _ = harness(f"{line} --until 2s", capsys)
    assert code == 130
    assert "by --estimate; in 2 s --limit-train " in " ".join(out.split())


@pytest.mark.ray
def test_a_sweep_through_ray_ends_by_itself_and_leaves_nothing(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    free: list[float] = []

    def leave() -> None:
        import time

        for _ in range(100):
            free[:] = [ray.available_resources().get("CPU", 0), ray.cluster_resources()["CPU"]]
            if free[0] == free[1]:
                break
            time.sleep(0.1)
        ray.shutdown()

    monkeypatch.setattr("harness.resources.disconnect", leave)
    code, out, err = harness(
        f"tune {TINY.replace('128', '400')} --epochs 4 --batch-size 32 --samples 8 --concurrent 2 --out {tmp_path}"
        " --search 'lr=choice(1e-5,1e-4,1e-3,0.02,0.05,0.1,0.2,1e30)'",
        capsys,
    )
    assert (code, err) == (0, ""), out
    found = trials_of(tmp_path)["trials"]
    assert len(found) == 8
    states = [trial["state"] for trial in found]
    assert states.count("failed") == 1
    (diverged,) = [trial for trial in found if trial["state"] == "failed"]
    assert diverged["fields"] == {"lr": 1e30}
    assert diverged["reason"].startswith("NaN: loss is not finite")
    assert "finished" in states
    assert "pruned" in states
    last = [t["last"] for t in found if t["last"] is not None]
    best = min(t["value"] for t in found if t["state"] == "finished")
    assert best < max(last)
    assert free[0] == free[1] > 0
    assert "as its recipe is made for a larger data set:\n  harness run" in out
    assert not list((tmp_path / "tune").glob("*/.ray*"))


def test_the_best_come_first() -> None:
    trials = [
        Trial(number=1, fields={}, state="failed"),
        Trial(number=2, fields={}, state="pruned", epochs=1, last=5.0),
        Trial(number=3, fields={}, state="finished", epochs=1, last=9.0, value=9.0),
        Trial(number=4, fields={}, state="pruned", epochs=2, last=6.0),
        Trial(number=5, fields={}, state="finished", epochs=1, last=3.0, value=3.0),
    ]
    assert [t.number for t in best_first(trials)] == [5, 3, 4, 2, 1]
