"""`harness tune`: the words of a space, rules and proposals, resuming from anywhere, a sweep through Ray."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import harness
from test_store import make_record

import harness.cluster.search
from harness import search_space as space
from harness.cluster.launch import Started, Worker
from harness.commands import sweep as study
from harness.commands.sweep import Asha, Log, Median, Never, Trial
from harness.commands.sweep_progress import best_first
from harness.commands.tune import weigh
from harness.models.variants import he2015, msra
from harness.results.explain import why
from harness.results.report.sweeps import load_sweeps
from harness.results.report.table import render, summarise
from harness.results.store import SWEEPS, finish, finished_keys, load_epochs, load_records, prune, start
from harness.results.values import Pruned
from harness.search_space import Dimension, parse_search, parse_settings
from harness.spec import UserError

TINY = "--dataset digits --depth 8 --limit-train 128 --gpus 0 --loader resident"


# --- words ---


def test_a_search_space_is_read_with_the_types_of_its_fields() -> None:
    dimensions = parse_search(
        ["lr=loguniform(0.01, 1)", "momentum = uniform(0,0.99)", "batch-size=randint(32,64)", "nesterov=choice(true,false)",
         "shortcut=grid(A,projection)", "crop=choice(none,28)", "warmup=randint(0,5)"]
    )  # fmt: skip
    assert [d.values for d in dimensions] == [
        (0.01, 1.0), (0.0, 0.99), (32, 64), (True, False), ("A", "projection"), (None, 28), (0.0, 5.0),
    ]  # fmt: skip
    assert str(dimensions[0]) == "lr=loguniform(0.01,1)"
    assert parse_search([str(d) for d in dimensions]) == dimensions
    assert dimensions[6].finite == (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
    assert parse_settings(["milestones=90,135", "lr=5e-2"]) == {"milestones": (90.0, 135.0), "lr": 0.05}


MISTAKES = {
    "--search lrr=uniform(0,1)": "did you mean lr?",
    "--search lr=logunifrm(0.1,1)": "did you mean loguniform?",
    "--search lr=0.1": "function '0.1' is unknown",
    "--search lr=uniform": "FIELD=FUNCTION(a,b) is allowed",
    "--search lr=uniform(1)": "takes two numbers",
    "--search lr=uniform(1,0.1)": "must be below",
    "--search lr=loguniform(0,1)": "above 0",
    "--search lr=uniform(0,x)": "is a number, not 'x'",
    "--search lr=uniform(0,inf)": "not a number from 0 up",
    "--search batch_size=uniform(32,64)": "is a whole number; randint",
    "--search batch_size=choice(32,6.4)": "whole number, not '6.4'",
    "--search shortcut=choice(A,projektion)": "did you mean projection?",
    "--search shortcut=uniform(0,1)": "is no number; choice",
    "--search nesterov=choice(yes,no)": "true or false",
    "--search milestones=choice(1,2)": "cannot be searched",
    "--search duration=uniform(1,9)": "an option of its own, --epochs",
    "--search lr=uniform(0,1) --search lr=grid(1,2)": "names lr twice",
    "--search lr=uniform(0,1) --scheduler asah": "did you mean asha?",
    "--search lr=uniform(0,1) --metric eror": "did you mean error?",
    "--search lr=uniform(0,1) --search-algorithm optunah": "did you mean optuna?",
    "--search lr=grid(1,2) --search-algorithm optuna": "choice(...) instead of grid",
    "--search lr=uniform(0,1) --samples 0": "at least 1",
    "--search lr=uniform(0,1) --gpus-per-trial 2": "up to 1",
    "--search lr=uniform(0,1) --gpus-per-trial 0.5 --workers 2": "for one worker",
    "--search lr=uniform(0,1) --gpus-per-trial 0.5 --metric epoch_seconds": "slow each other down",
    "--search lr=uniform(0,1) --metric top5_error": "10 classes",
    "--search depth=choice(8,21)": "depth 21 is not 6n+2",
    "--search depth=choice(8,14)": "leave --depth out",
    "--search batch_size=choice(32,33) --workers 2": "does not divide the global batch",
    "--search lr=uniform(0,1) --val 128": "none are left",
    "--search lr=uniform(0,1) --variant mrsa": "did you mean 'msra'",
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
    settings = parse_settings(["shortcut=projection", "lr=0.05", "momentum=0.9"])
    variant, changed = space.apply(he2015(20), settings)
    assert (variant.recipe.lr, variant.network.shortcut) == (0.05, "projection")
    assert changed == ("lr=0.05", "shortcut=projection"), (
        "in the order of the fields; what is the variant's own is none"
    )
    same, none = space.apply(msra(20), parse_settings(["lr=0.1"]))
    assert (same, none) == (msra(20), ())
    for text, message in {"lrr=1": "did you mean lr", "depth=20": "--depths", "lr": "is a number"}.items():
        with pytest.raises(UserError, match=message):
            parse_settings([text])


# --- proposals and rules ---

LR = Dimension("lr", "loguniform", (0.001, 1.0))
WAYS = Dimension("shortcut", "choice", ("A", "projection"))


def propose_all(dimensions: Any, algorithm: Any, count: int, seed: int = 0) -> list[Trial]:
    trials: list[Trial] = []
    for number in range(count):
        fields = study.propose(dimensions, algorithm, seed, trials)
        if fields is None:
            break
        value = abs(math.log(fields["lr"] / 0.03)) if "lr" in fields else 0.0
        trials.append(Trial(number + 1, fields, state="finished", curve={1: value}, value=value))
    return trials


def test_random_proposals_fill_the_space_once() -> None:
    drawn = [t.fields["lr"] for t in propose_all([LR], "random", 300)]
    assert len(set(drawn)) == 300
    assert all(float(f"{lr:.4g}") == lr for lr in drawn), "few figures, to be typed again"
    shares = np.histogram(np.log10(drawn), bins=[-3, -2, -1, 0])[0]
    assert shares.sum() == 300
    assert all(70 <= share <= 130 for share in shares), "even in the logarithm"
    assert drawn == [t.fields["lr"] for t in propose_all([LR], "random", 300)]
    assert drawn != [t.fields["lr"] for t in propose_all([LR], "random", 300, seed=1)]

    finite = [WAYS, Dimension("batch_size", "randint", (1, 3))]
    assert study.count_trials(finite, 50) == 6
    assert len({str(t.fields) for t in propose_all(finite, "random", 50)}) == 6
    grid = [Dimension("lr", "grid", (0.1, 0.2, 0.3)), Dimension("pad", "grid", (2, 4)), WAYS]
    assert study.count_trials(grid, None) == 6
    assert study.count_trials(grid, 2) == 12
    points = [tuple(t.fields.values()) for t in propose_all(grid, "random", 12)]
    assert len(set(points)) == 12
    assert {p[:2] for p in points[:6]} == {(a, b) for a in (0.1, 0.2, 0.3) for b in (2, 4)}


def test_optuna_proposes_better_ones_and_the_same_again() -> None:
    pytest.importorskip("optuna")
    trials = propose_all([LR, WAYS], "optuna", 25)
    assert [t.fields for t in trials] == [t.fields for t in propose_all([LR, WAYS], "optuna", 25)]
    late = np.mean([t.value for t in trials[15:]])
    assert late < np.mean([t.value for t in trials[:10]])
    assert len(propose_all([WAYS], "optuna", 5)) == 2


def test_asha_decides_as_ray_tunes() -> None:
    from ray.tune.schedulers import ASHAScheduler

    class Stub:
        def __init__(self, number: int) -> None:
            self.trial_id = str(number)

    random = np.random.default_rng(0)
    for grace, epochs in ((1, 9), (2, 30), (1, 8)):
        theirs = ASHAScheduler(
            time_attr="t",
            metric="m",
            mode="min",
            grace_period=grace,
            max_t=epochs,
            reduction_factor=study.REDUCTION,
        )
        ours = Asha(grace=grace, epochs=epochs)
        running = {n: Stub(n) for n in range(40)}
        for stub in running.values():
            theirs.on_trial_add(None, stub)
        at = dict.fromkeys(running, 0)
        pruned = 0
        while running:
            n = int(random.choice(list(running)))
            at[n] += 1
            value = float(random.random())
            stop = ours.stops(n, at[n], value)
            if at[n] < epochs:  # who is at the end is not pruned; Ray says STOP there to all
                assert (theirs.on_trial_result(None, running[n], {"t": at[n], "m": value}) == "STOP") == stop
            pruned += stop
            if stop or at[n] == epochs:
                del running[n]
        assert pruned > 10


def test_the_median_rule_stops_the_worse_half() -> None:
    rule = Median(grace=2)
    for trial, level in enumerate((1.0, 2.0, 3.0)):
        assert not any(rule.stops(trial, epoch, level) for epoch in (1, 2, 3)), "too few to compare with"
    assert not rule.stops(9, 1, 9.0), "in its days of grace"
    assert rule.stops(9, 2, 9.0)
    assert not rule.stops(10, 2, 1.5)
    assert not Never().stops(0, 1, math.inf)


def test_a_log_cut_anywhere_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    def run(path: Path) -> list[Trial]:
        log = Log(path, study.make_rule("asha", 9), 9)
        waiting = [t for t in log.trials if t.state == "running"]
        while waiting or len(log.trials) < 12:
            if waiting:
                trial = waiting.pop(0)
            else:
                fields = study.propose([LR], "random", 3, log.trials)
                assert fields is not None
                trial = log.proposed(fields, "run", "key")
            stop = trial.number in log.to_stop
            for epoch in range(1, 10):  # a run that is taken up reports its earlier epochs again
                if stop:
                    break
                stop = log.reported(trial, epoch, trial.fields["lr"] / epoch, 0.1)
            log.ended(trial, "pruned" if stop else "finished", None if stop else trial.fields["lr"] / 9)
        return log.trials

    whole = tmp_path / "whole.jsonl"
    expected = run(whole)
    assert {t.state for t in expected} == {"pruned", "finished"}
    text = whole.read_bytes()
    ends = [i + 1 for i, c in enumerate(text) if c == 10]
    for cut in [0, *ends, *(end + 7 for end in ends[:-1])]:
        path = tmp_path / "cut.jsonl"
        path.write_bytes(text[:cut])
        assert run(path) == expected
        assert path.read_bytes() == text


def test_importance_names_the_field_that_matters() -> None:
    random = np.random.default_rng(1)
    trials = []
    for n in range(20):
        fields = {"lr": float(random.random()), "momentum": float(random.random()), "shortcut": "AB"[n % 2]}
        error = 100 - 90 * fields["lr"] + (3 if n % 2 else 0)
        curve = {1: error} if n % 3 else {1: error, 2: error - 1}
        trials.append(
            Trial(n + 1, fields, state="finished" if len(curve) > 1 else "pruned", curve=curve, value=None)
        )
    trials.append(Trial(21, fields, state="failed"))
    found = weigh(
        parse_search(["lr=uniform(0,1)", "momentum=uniform(0,1)", "shortcut=choice(A,projection)"]),
        trials,
        optuna=False,
    )
    assert found is not None
    assert (found.epoch, found.trials, found.fields[0][0]) == (1, 20, "lr")
    assert found.fields[0][1] > 0.95
    assert found.fields[0][2] == "more is better"
    assert all(share < 0.6 for _, share, _ in found.fields[1:])
    assert weigh((), trials[:3], optuna=False) is None


# --- what is kept ---


def test_a_stopped_run_is_shown_and_averaged_with_nothing(tmp_path: Path) -> None:
    pruned = Pruned(by="asha", sweep="s", epoch=3, of=30, error=45.0, evaluated_on="val")
    finish(tmp_path, make_record(0))
    folder = prune(tmp_path, make_record(1, status="pruned", result=None, pruned=pruned))
    assert folder.name.endswith(".partial")
    (tmp_path / SWEEPS / "some-sweep").mkdir(parents=True)
    loaded = load_records([tmp_path])
    assert (loaded.problems, loaded.interrupted) == ([], [])
    assert finished_keys(tmp_path) == {make_record(0).key}
    (row,) = summarise(loaded.records)
    assert row.error is not None
    assert (row.error.n, row.error.mean, len(row.done), len(row.pruned)) == (1, 8.3, 1, 1)
    text = render([row], "markdown")
    assert "1 of 2" in text
    assert "seed 1 was pruned at 3 of 30 epochs by a search" in text
    (alone,) = summarise([s for s in loaded.records if s.record.status == "pruned"])
    assert alone.error is None
    assert "pruned at 3 of 30" in render([alone], "table", width=200)
    assert "pruned by asha of sweep s after epoch 3 of 30, at 45 %" in why(alone)

    start(tmp_path, make_record(1).name, {})  # taken up again: the record of the stop is kept beside
    assert len(list(folder.glob("stopped_*.json"))) == 1
    with pytest.raises(ValueError, match="needs to say where"):
        prune(tmp_path, make_record(1))
    broken = make_record(2, pruned=pruned)
    finish(tmp_path, broken)
    assert "contradicts itself" in load_records([tmp_path]).problems[0].reason


# --- sweeps ---


class StopHereError(Exception):
    """Stands for a driver that is killed."""


def search_here(crash_at: tuple[str, int] | None) -> Any:
    """`harness.cluster.search.search` in this process, one trial at a time; dies before a report is delivered."""

    def search(train: Any, trials: Any, **options: Any) -> None:
        while proposal := trials.propose():
            name, spec = proposal
            trials.reported(name, Started(attempt=1))

            def report(event: Any, name: str = name) -> None:
                if (name, event.epoch) == crash_at:
                    raise StopHereError
                if trials.reported(name, event):
                    raise SystemExit

            try:
                outcome = train(spec, Worker(threads=1), report)
            except SystemExit:
                outcome = None
            trials.ended(name, outcome)

    return search


SWEEP = (
    f"tune {TINY} --epochs 3 --search 'lr=loguniform(0.003,0.3)' --search 'shortcut=choice(A,projection)' --samples 4"
    " --concurrent 1"
)


def trials_of(out: Path) -> Any:
    (path,) = out.glob("tune/*/trials.json")
    return json.loads(path.read_text())


def test_an_interrupted_sweep_goes_on_and_its_trials_are_runs(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.commands.tune.join_cluster", lambda *_, **__: None)
    monkeypatch.setattr(harness.cluster.search, "search", search_here(None))
    code, out, err = harness(f"{SWEEP} --out {tmp_path}/whole", capsys)
    assert (code, err) == (0, "")
    assert "judged by error % of 12 held-out training images, a tenth of 128" in out
    whole = trials_of(tmp_path / "whole")
    assert [t["number"] for t in whole["trials"]] == [1, 2, 3, 4]
    read = load_sweeps([tmp_path / "whole"])  # the page reads what was written
    assert not read.problems
    assert [t.number for t in read.sweeps[0].trials] == [1, 2, 3, 4]
    assert (whole["selected_on"], whole["val"], whole["metric"]) == ("val", 12, "error")
    states = [t["state"] for t in whole["trials"]]
    assert states[0] == "finished"

    for crash_at in (("1", 3), ("3", 1)):
        monkeypatch.setattr(harness.cluster.search, "search", search_here(crash_at))
        folder = tmp_path / f"cut{crash_at[0]}"
        with pytest.raises(StopHereError):
            harness(f"{SWEEP} --out {folder}", capsys)
        monkeypatch.setattr(harness.cluster.search, "search", search_here(None))
        (sweep,) = [p.parent.name for p in folder.glob("tune/*/sweep.json")]
        code, out, err = harness(f"tune --resume {sweep} --out {folder} --samples 5", capsys)
        assert (code, "--samples: sweep" in err) == (2, True), "a resumed sweep keeps its own settings"
        code, out, _ = harness(f"tune --resume {sweep} --out {folder}", capsys)
        assert code == 0
        again = trials_of(folder)
        for one, other in zip(whole["trials"], again["trials"], strict=True):
            for name in ("number", "fields", "state", "epochs", "key", "curve", "value"):
                assert one[name] == other[name], name

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

    # the winner's command is one that runs
    (command,) = [line.strip() for line in out.splitlines() if line.strip().startswith("harness run")]
    code, plan, _ = harness(f"{command.removeprefix('harness ')} --dry-run", capsys)
    assert code == 0
    assert "5 runs on digits, 0 of them done already" in plan
    assert "val" not in command


@pytest.mark.ray
def test_a_sweep_through_ray_ends_by_itself_and_leaves_nothing(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    import harness.commands.run

    free: list[float] = []

    def leave() -> None:
        import time

        for _ in range(100):
            free[:] = [ray.available_resources().get("CPU", 0), ray.cluster_resources()["CPU"]]
            if free[0] == free[1]:
                break
            time.sleep(0.1)
        ray.shutdown()

    monkeypatch.setattr(harness.execute, "disconnect", leave)
    code, out, err = harness_(
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
    assert "train the winner in full:\n  harness run" in out
    assert not list((tmp_path / "tune").glob("*/.ray*"))


harness_ = harness


def test_the_best_come_first() -> None:
    trials = [
        Trial(1, {}, state="failed"),
        Trial(2, {}, state="pruned", curve={1: 5.0}),
        Trial(3, {}, state="finished", curve={1: 9.0}, value=9.0),
        Trial(4, {}, state="pruned", curve={1: 7.0, 2: 6.0}),
        Trial(5, {}, state="finished", curve={1: 3.0}, value=3.0),
    ]
    assert [t.number for t in best_first(trials)] == [5, 3, 4, 2, 1]
