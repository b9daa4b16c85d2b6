"""Two sides against each other: which rows are compared, what is said of them, what CI fails on; and `why`."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from test_store import make_epoch
from test_table import make_run

from harness.results.compare import (
    Condition,
    Pair,
    compare,
    compare_by,
    parse_fail_on,
    render_comparison,
    violations,
)
from harness.results.explain import why
from harness.results.rows import Row, summarise
from harness.results.store import Stored, finish, load_records, write_epochs
from harness.results.values import Failure


def make_rows(errors: list[float], seconds: list[float], **changes: Any) -> list[Row]:
    result = changes.pop("result", {})
    runs = [
        make_run(seed, error, result={"epoch_seconds": time, **result}, **changes)
        for seed, (error, time) in enumerate(zip(errors, seconds, strict=True))
    ]
    return summarise(runs)


BASE = [8.30, 8.35, 8.40, 8.45, 8.50], [4.50, 4.51, 4.52, 4.53, 4.54]


def test_the_same_within_the_margins() -> None:
    (pair,) = compare(make_rows(*BASE), make_rows([8.31, 8.36, 8.41, 8.46, 8.51], BASE[1], loader="dataloader"))
    error, time = pair.figures
    assert pair.differs == {"loader": ("dali", "dataloader")}
    assert error.difference == pytest.approx(0.01)
    assert (error.verdict, time.verdict) == ("equivalent", "equivalent")
    assert time.difference == pytest.approx(0)


def test_times_are_compared_as_ratios() -> None:
    slower = [5.0, 5.1, 5.2, 5.0, 5.1]
    (pair,) = compare(make_rows(*BASE), make_rows(BASE[0], slower))
    time = pair.figures[1]
    assert time.difference is not None
    assert time.interval is not None
    logs = [math.log(v) for v in slower], [math.log(v) for v in BASE[1]]
    ratio = stats.gmean(slower) / stats.gmean(BASE[1])
    theirs = stats.ttest_ind(*logs, equal_var=False).confidence_interval(0.90)
    assert time.difference == pytest.approx(100 * (ratio - 1))
    assert time.interval.low == pytest.approx(100 * (math.exp(theirs.low) - 1))
    assert time.interval.high == pytest.approx(100 * (math.exp(theirs.high) - 1))
    assert time.verdict == "different"
    (back,) = compare(make_rows(BASE[0], slower), make_rows(*BASE))
    assert back.figures[1].verdict == "different"


def test_nothing_can_be_said_of_single_runs_and_missing_figures() -> None:
    (pair,) = compare(make_rows([8.3], [4.5]), make_rows([8.3], [4.5], result={"epoch_seconds": None}))
    error, time = pair.figures
    assert (error.difference, error.interval, error.verdict) == (0.0, None, "~")
    assert (time.difference, time.interval, time.verdict) == (None, None, "~")
    assert "~" in render_comparison([pair])


def names(pairs: list[Pair]) -> list[tuple[str, str, str, str]]:
    return [(p.a.name, p.b.name, p.a.fields["loader"], p.b.fields["loader"]) for p in pairs]


def test_rows_are_paired_by_all_that_varies_on_both_sides() -> None:
    one = summarise([make_run(depth=d, loader=x) for d in (20, 56) for x in ("dali", "resident")])
    two = summarise([make_run(depth=d, loader=x, torch="2.11") for d in (20, 56) for x in ("dali", "resident")])
    assert names(compare(one, two)) == [
        ("msra-20", "msra-20", "dali", "dali"), ("msra-20", "msra-20", "resident", "resident"),
        ("msra-56", "msra-56", "dali", "dali"), ("msra-56", "msra-56", "resident", "resident"),
    ]  # fmt: skip
    single = summarise([make_run(depth=20, loader="dataloader")])
    assert names(compare(one, single)) == [
        ("msra-20", "msra-20", "dali", "dataloader"), ("msra-20", "msra-20", "resident", "dataloader"),
    ]  # fmt: skip
    other = summarise([make_run(depth=56)])
    assert names(compare(single, other)) == [
        ("msra-20", "msra-56", "dataloader", "dali")
    ]  # asked for: nothing else


def test_compare_by_a_field_inside_one_folder() -> None:
    rows = summarise([make_run(depth=d, workers=w) for d in (20, 56) for w in (1, 2, 8)] + [make_run(depth=32)])
    pairs = compare_by(rows, "workers")
    assert [(p.a.name, p.differs) for p in pairs] == [
        ("msra-20", {"workers": ("1", "2")}), ("msra-56", {"workers": ("1", "2")}),
        ("msra-20", {"workers": ("1", "8")}), ("msra-56", {"workers": ("1", "8")}),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no field 'worker' in these runs: did you mean 'workers'"):
        compare_by(rows, "worker")
    with pytest.raises(ValueError, match="all runs have loader dali"):
        compare_by(rows, "loader")


def test_runs_without_a_result_are_left_out() -> None:
    failed = summarise([make_run(failure=Failure(kind="OOM", message=""))])
    assert compare(failed, make_rows(*BASE)) == []
    assert render_comparison([]).startswith("nothing to compare")


def test_conditions_are_read() -> None:
    assert parse_fail_on("error>+0.3, epoch_seconds>5%,images_per_second<-2.5%") == (
        Condition("error", True, 0.3, False),
        Condition("epoch_seconds", True, 5.0, True),
        Condition("images_per_second", False, -2.5, True),
    )
    assert ",".join(map(str, parse_fail_on("error>0.3,rss_mib>10%"))) == "error>+0.3,rss_mib>+10%"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot read ''"),
        ("error", "cannot read 'error'"),
        ("error>", "cannot read"),
        ("error>1,", "cannot read ''"),
        ("error>=1", "cannot read"),
        ("error>1e9999", "cannot read"),
        ("error>nan", "cannot read"),
        ("eror>1", "unknown metric 'eror': did you mean 'error'"),
        ("__import__('os')>1", "cannot read"),
    ],
)
def test_conditions_that_do_not_parse(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        parse_fail_on(text)
    assert words in str(caught.value)


def test_conditions_fail_on_what_is_worse() -> None:
    pairs = compare(make_rows([8.0, 8.2], [4.0, 4.0]), make_rows([8.5, 8.7], [4.1, 4.1]))
    assert violations(pairs, parse_fail_on("error>+0.6,epoch_seconds>5%")) == []
    assert violations(pairs, parse_fail_on("error>0.3,epoch_seconds>2%,images_per_second<-1%")) == [
        "msra-20: error>+0.3 fails, error 8.1 -> 8.6 (+0.5)",
        "msra-20: epoch_seconds>+2% fails, epoch_seconds 4 -> 4.1 (+2.5 %)",
    ]
    assert violations(pairs, parse_fail_on("top5_error>1")) == [
        "msra-20: top5_error>+1 cannot be checked, top5_error was not measured on both sides"
    ]
    assert violations([], parse_fail_on("error>0.3")) == ["no two rows could be compared"]


def test_the_page_of_a_comparison() -> None:
    pairs = compare(make_rows(*BASE), make_rows([8.8, 8.9, 9.0, 8.9, 8.9], BASE[1], loader="dataloader"))
    page = render_comparison(pairs)
    assert page.splitlines()[:5] == [
        "B against A: loader dali → dataloader",
        "",
        "what             metric      n            A            B   B − A       interval  margin  verdict",
        "───────────────  ───────  ────  ───────────  ───────────  ──────  ─────────────  ──────  ──────────",
        "msra-20 cifar10  error %  5, 5  8.40 ± 0.08  8.90 ± 0.07   +0.50  +0.41 … +0.59    ±0.2  different",
    ]
    assert max(map(len, page.splitlines())) <= 100
    assert "\x1b[" in render_comparison(pairs, colour=True)
    assert "| msra-20 cifar10 |" in render_comparison(pairs, "markdown")
    values = json.loads(render_comparison(pairs, "json"))
    assert values["pairs"][0]["figures"][0]["difference"] == pytest.approx(0.5)


def test_why_names_records_epochs_and_formula(tmp_path: Path) -> None:
    untimed: list[dict[str, Any]] = [
        {"untimed": "warm-up"},
        {},
        {},
        {},
        {"untimed": "interference: it swapped"},
        {},
    ]
    for seed in range(2):
        run = make_run(seed, 8.3 + 0.2 * seed)
        assert run.record.result is not None
        epochs = tuple(
            make_epoch(
                k,
                error=9.0 if k < 6 else 8.3 + 0.2 * seed,
                train_seconds=4.4 + 0.05 * k,
                timed=k in (2, 3, 4),
                **more,
            )
            for k, more in enumerate(untimed, 1)
        )
        result = run.record.result.model_copy(update={"epochs": epochs, "epoch_seconds": 4.55})
        finish(tmp_path, run.record.model_copy(update={"result": result}))
    runs = load_records([tmp_path]).records
    (row,) = summarise(runs)
    text = why(row)
    for words in (
        "error 8.40 ± 0.14 % = mean ± std (n − 1) of the last epoch's error over 2 run(s), on the test set",
        f"seed 0  8.3000  {runs[0].folder}",
        "in epoch 170", "published 8.29 %", "consistent: p = ",
        "3 epochs timed, 4.5 to 4.6; left out: 1 (warm-up), 5 (interference: it swapped), 6\n",
        "NVML 1,890", "network.depth = 20",
    ):  # fmt: skip
        assert words in text
    assert "but epochs.jsonl" not in text
    write_epochs(runs[0].folder, [make_epoch(1, error=7.0, train_seconds=1.0)])
    assert "but epochs.jsonl ends with 7 in epoch 1" in why(row)
    assert "but epochs.jsonl gives 1" in why(row)
    (runs[1].folder / "epochs.jsonl").write_text("{}\n")
    assert "epochs.jsonl line 1" in why(row)


def test_why_of_what_failed() -> None:
    run = make_run(0, failure=Failure(kind="OOM", message="CUDA out of memory"))
    text = why(*summarise([Stored(run.record, Path("runs/x.partial"))]))
    assert "seed 0 failed: OOM, CUDA out of memory" in text
