"""The table: what may be averaged, what is told apart, what is said beside every number."""

import csv
import hashlib
import io
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import pytest
from records import make_memory, make_result

from harness.results.explain import why
from harness.results.metrics import Figure
from harness.results.published import find_published
from harness.results.report.notes import make_notes
from harness.results.report.page import make_page
from harness.results.report.table import Format, render
from harness.results.report.text import Sheet, for_terminal
from harness.results.rows import TIMED, Row, flatten_spec, summarise
from harness.results.store import Interrupted, Stored
from harness.results.values import Failure, Measurement, Record, RunResult
from harness.until_ci import Known

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def make_spec(depth: int = 20, seed: int = 0, *, lr: float = 0.1, **changes: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "variant": "msra", "network": {"depth": depth, "shortcut": "identity-conv", "head_batch_norm": True, "batch_norm_eps": 1e-3},
        "recipe": {"duration": 180, "unit": "epoch", "batch_size": 128, "lr": lr, "milestones": [90, 135],
                   "normalize": "channel-mean", "pad_mode": "mean"},
        "overrides": [], "dataset": "cifar10", "fingerprint": "f" * 64, "limit_train": None, "loader": "dali",
        "precision": "fp32", "engine": "eager", "device": "cuda", "workers": 1, "seed": seed,
    }  # fmt: skip
    return spec | changes


def make_measured(error: float = 8.4, **changes: Any) -> RunResult:
    memory = make_memory(
        torch_allocated_mib=417.0, torch_reserved_mib=512.0, nvml_process_mib=1890.0, rss_mib=2500.0
    )
    values = {"images_per_second": 11_111.0, "data_stall_percent": 1.25, "memory": memory}
    return make_result(error, 4.5, **(values | changes))


def make_run(
    seed: int = 0, error: float = 8.4, *, depth: int = 20, dataset: str = "cifar10", original: bool = True,
    failure: Failure | None = None, result: dict[str, Any] | None = None, torch: str = "2.15.0+cu130",
    finished: int = 0, **spec: Any,
) -> Stored:  # fmt: skip
    """A run as it is read from the store; `result` and `spec` change fields of theirs."""
    whole = make_spec(depth, seed, **spec)
    record = Record(
        key=hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:16], name=f"{dataset}_msra-{depth}_s{seed}", variant="msra", depth=depth, seed=seed,
        status="failed" if failure else "done", dataset=dataset, original=original,
        spec=whole, result=None if failure else make_measured(error, **(result or {})),
        failure=failure, environment={"versions": {"torch": torch}, "check": {"status": "passed"}},
        started_at=NOW - timedelta(days=1),
        finished_at=NOW + timedelta(seconds=finished),
    )  # fmt: skip
    return Stored(record, Path("runs") / record.name)


def text(rows: list[Row], **options: Any) -> str:
    return render(rows, "table", **options)


def test_seeds_are_averaged_and_nothing_else() -> None:
    (row,) = summarise([make_run(0, 8.0), make_run(1, 8.3), make_run(2, 8.6)])
    assert row.error is not None
    assert row.figures["error"] == Figure(pytest.approx(8.3), pytest.approx(0.3), 3)
    assert row.best_minus_last == pytest.approx(-0.2)
    page = text([row])
    assert "8.30 ± 0.30" in page
    assert "−0.20" in page


CHANGES: list[dict[str, Any]] = [
    {"loader": "resident"},
    {"precision": "bf16"},
    {"engine": "compile"},
    {"workers": 8},
    {"limit_train": 5000},
    {"lr": 0.05},
    {"fingerprint": "0" * 64},
    {"overrides": ["epochs=2"]},
    {"torch": "2.11.0"},
    {"result": {"device": "NVIDIA A100"}},
    {"result": {"threads": 4}},
    {"network": {"depth": 20, "shortcut": "A"}},
    {"deterministic": True},
    {"brand_new_field": 1},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_whatever_differs_gets_a_row_of_its_own_that_a_reader_can_tell(change: dict[str, Any]) -> None:
    rows = summarise([make_run(0), make_run(1), make_run(2, **change), make_run(3, **change)])
    assert sorted(len(row.done) for row in rows) == [2, 2]
    for format in ("table", "markdown"):
        body = [line for line in render(rows, format).splitlines() if "msra" in line]
        assert len(set(body)) == len(body)


def test_a_hidden_difference_between_rows_that_look_different_is_named_too() -> None:
    rows = summarise([make_run(0), make_run(0, loader="resident", torch="2.11.1")])
    assert [row.differs for row in rows] == [{"torch": "2.15.0+cu130"}, {"torch": "2.11.1"}]
    rows = summarise([make_run(0), make_run(0, depth=56)])  # the depth has its own column
    assert [row.differs for row in rows] == [{}, {}]
    rows = summarise([make_run(0), make_run(0, loader="resident", deterministic=True)])
    assert [row.differs for row in rows] == [{"deterministic": "True"}, {}]


def test_values_are_cut_where_they_still_differ_and_whole_in_files() -> None:
    nightlies = [f"2.15.0.dev2026010{day}+cu128" for day in (1, 2)]
    rows = summarise([make_run(seed, torch=torch) for torch in nightlies for seed in range(2)])
    assert [row.differs for row in rows] == [{"torch": f"2.15.0.dev2026010{day}…"} for day in (1, 2)]
    assert "torch" not in text(rows).split("\n")[0], "what differs is not said once for all"
    plain = json.loads(render(rows, "json"))["rows"]
    assert [row["differs"] for row in plain] == [f"torch={torch}" for torch in nightlies]
    prints = [make_run(0, fingerprint="f" * 64), make_run(0, fingerprint="0" * 64)]
    assert [row.differs for row in summarise(prints)] == [{"fingerprint": f"{x * 12}…"} for x in "0f"]
    close = [make_run(0, lr=lr) for lr in (0.12345678901, 0.12345678902)]  # as one number rounded
    assert [row.differs["recipe.lr"] for row in summarise(close)] == ["0.12345678901", "0.12345678902"]


def test_a_seed_run_twice_counts_once_with_its_last_run() -> None:
    first, second = make_run(0, 9.0, finished=1), make_run(0, 8.0, finished=2)
    (row,) = summarise([second, first])
    assert row.error is not None
    assert (row.figures["error"].n, row.error) == (1, 8.0)
    assert "counts with its last run" in text([row])


def test_across_averages_what_was_asked_for_and_says_so() -> None:
    runs = [make_run(0, 8.0), make_run(1, 8.2), make_run(0, 8.4, workers=8)]
    (row,) = summarise(runs, across=["workers"])
    assert row.error is not None
    assert row.figures["error"].n == 3
    page = text([row])
    assert "averaged over workers: 1, 8, as requested" in page
    assert "1/8 of 128" in page
    with pytest.raises(ValueError, match="field 'wrokers' is unknown; did you mean workers"):
        summarise(runs, across=["wrokers"])


@pytest.mark.parametrize(
    ("field", "change", "words", "columns"),
    [
        ("loader", {"loader": "resident"}, "dali/resident", ["loader"]),
        ("limit_train", {"limit_train": 5000}, "training images: all/5,000", ["limit_train"]),
        ("workers", {"workers": 2}, "1/2 of 128", ["workers", "batch_norm_images"]),
        ("recipe.batch_size", {"batch_size": 64}, "1 of 128/64", ["batch_size", "batch_norm_images"]),
        ("recipe.duration", {"duration": 5}, "180/5 epochs", ["duration"]),
        ("recipe.unit", {"unit": "step"}, "180 epoch/steps", ["duration_unit"]),
        ("network.depth", {"depth": 56}, "20/56", ["depth"]),
        ("overrides", {"overrides": ["epochs=5", "lr=0.05"]}, "–/epochs=5,lr=0.05", ["overrides"]),
        ("fingerprint", {"fingerprint": "0" * 64}, "averaged over fingerprint", ["fingerprint"]),
        ("hardware", {"result": {"device": "NVIDIA A100"}}, "NVIDIA H200/NVIDIA A100", ["device"]),
        ("torch", {"torch": "2.11.1"}, "averaged over torch: 2.15.0+cu130, 2.11.1", ["torch"]),
    ],
)
def test_a_row_is_not_named_by_one_of_the_values_it_averages_over(
    field: str, change: dict[str, Any], words: str, columns: list[str]
) -> None:
    recipe = make_spec()["recipe"]
    if change.keys() <= recipe.keys():
        change = {"recipe": recipe | change}
    (row,) = summarise([make_run(0), make_run(1, **change)], across=[field])
    assert words in text([row], width=400)
    (plain,), (own,) = (
        json.loads(render(rows, "json"))["rows"] for rows in ([row], summarise([make_run(1, **change)]))
    )
    assert [name for name in own if plain[name] is None and own[name] is not None and name in columns] == columns
    assert plain["averaged_over"].startswith(f"{field}=")
    (alone,) = summarise([make_run(0, **change), make_run(1, **change)], across=[field])
    assert all(json.loads(render([alone], "json"))["rows"][0][name] for name in columns if name != "torch")


def test_across_a_field_that_has_one_value_changes_nothing() -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("precision", {}), ("loader", {"loader": "synthetic"}), ("overrides", {"overrides": ["lr=0.05"]}),
        ("engine", {}), ("workers", {"workers": 2}), ("limit_train", {"limit_train": 5000}),
    ]  # fmt: skip
    for field, change in cases:
        runs = [make_run(seed, **change) for seed in range(3)]
        assert text(summarise(runs, across=[field])) == text(summarise(runs)), field
    narrow = summarise([make_run(0, workers=2, result={"widths": (2, 1)})], across=["widths"])
    assert "world size 2→1" in text(narrow)


def test_medians_peaks_and_missing_readings() -> None:
    none = Measurement(value=None, reason="NVML: not permitted")
    runs = []
    for seed, seconds in enumerate((4.0, 9.0, 5.0)):
        memory = make_measured().memory.model_copy(
            update={"torch_allocated_mib": Measurement(value=400.0 + seed), "nvml_process_mib": none}
        )
        runs.append(make_run(seed, result={"epoch_seconds": seconds, "memory": memory}))
    (row,) = summarise(runs)
    assert row.figures["epoch_seconds"].value == 5.0
    assert row.figures["torch_allocated_mib"].value == 402.0
    assert (row.figures["nvml_process_mib"].value, row.figures["nvml_process_mib"].reason) == (None, none.reason)
    page = text([row])
    assert "NVML not measured: NVML: not permitted" in page
    assert "  NVML" not in page.split("¹")[0]  # no empty column
    assert "torch.cuda.max_memory_allocated" in page


def test_memory_on_the_cpu_goes_by_its_own_name() -> None:
    memory = make_memory(rss_mib=812.4)
    page = text(summarise([make_run(result={"memory": memory, "device": "AMD EPYC"}, device="cpu")]))
    assert re.search(r"RSS\n.*\n.* 812\n", page)
    assert "not measured" not in page, "nobody misses a GPU where none was asked for"
    assert "peak resident" in page
    assert "RSS" not in text(summarise([make_run()]))


def test_failed_and_pending_runs_say_why() -> None:
    oom = Failure(kind="OOM", message="CUDA out of memory.\nTried to allocate 20.00 MiB")
    spec = make_spec(56, 4)
    rows = summarise(
        [make_run(0, depth=56), make_run(1, depth=56, failure=oom), make_run(0, depth=110, failure=oom)],
        [
            Interrupted("cifar10_msra-56_s4_x", Path("x"), 57, 180, spec),
            Interrupted("cifar10_msra-32_s0_x", Path("y"), 0, 180, make_spec(32, 0)),
            Interrupted("strange", Path("z"), 3, None, {}),
            Interrupted("whole", Path("w"), 180, 180, {}),
        ],
    )
    assert [(row.name, len(row.done), len(row.failed), len(row.interrupted)) for row in rows] == [
        ("msra-32", 0, 0, 1), ("msra-56", 1, 1, 1), ("msra-110", 0, 1, 0), ("strange", 0, 0, 1), ("whole", 0, 0, 1),
    ]  # fmt: skip
    page = text(rows)
    for line in (
        "no epoch yet", "1 of 3", "0 of 1", "OOM", "epoch 3",
        "2 runs failed, OOM: CUDA out of memory. Tried to allocate 20.00 MiB: msra-56 seed 1, msra-110 seed 0",
        "msra-56 seed 4 is not done: epoch 57 of 180", "strange is not done: epoch 3",
        "whole is not done: epoch 180 of 180, no result",
    ):  # fmt: skip
        assert line in page
    devices = [row["device"] for row in json.loads(render(rows, "json"))["rows"]]
    assert devices == [None, "NVIDIA H200", None, None, None]
    for format in get_args(Format):
        assert render(rows, format)


def test_a_failure_that_was_made_good_is_no_longer_shown() -> None:
    (row,) = summarise([make_run(0), make_run(0, failure=Failure(kind="killed", message="node died"))])
    assert "killed" not in text([row])


def test_a_seed_counts_once_whatever_became_of_its_runs() -> None:
    """Done and run again, and failed or stopped in two folders."""
    oom = Failure(kind="OOM", message="x")

    def partial(seed: int, folder: str) -> Interrupted:
        return Interrupted(f"cifar10_msra-20_s{seed}", Path(folder), 3, 180, make_spec(seed=seed))

    (row,) = summarise([make_run(seed) for seed in range(3)], [partial(0, "a")])
    assert (len(row.done), row.interrupted) == (3, ())
    page = text([row])
    assert "3 of" not in page
    assert "not done" not in page
    failed = [
        make_run(0, failure=oom.model_copy(update={"message": m}), finished=at)
        for m, at in (("last", 9), ("first", 1))
    ]
    (row,) = summarise([make_run(1), *failed], [partial(2, "a"), partial(2, "b")])
    assert [run.record.failure and run.record.failure.message for run in row.failed] == ["last"]
    page = text([row])
    assert "1 of 3" in page
    assert "msra-20 seed 0 failed, OOM: last" in page
    apart = [make_run(0, failure=oom, loader=loader) for loader in ("dali", "resident")]
    stopped = partial(1, "a")._replace(spec=make_spec(seed=1, loader="resident"))
    (row,) = summarise([make_run(1), *apart], [stopped], across=["loader"])
    assert (len(row.failed), len(row.interrupted)) == (2, 1), "two loaders are two samples"


def test_published_numbers_stand_only_beside_what_they_were_measured_on() -> None:
    published = find_published("cifar10", "msra", 20)
    assert published is not None
    assert published.error == 8.29
    runs = [make_run(0, 8.3), make_run(1, 8.5), make_run(2, 8.4)]
    (row,) = summarise(runs)
    assert row.against is not None
    assert row.against.difference == pytest.approx(8.4 - 8.29)
    assert row.against.word == "cannot tell", "three seeds leave more than half a point open"
    page = text([row])
    assert "8.29 (+0.11 ± 0.51)" in page
    assert "apark263/cfmz" in page
    different: list[dict[str, Any]] = [
        {"original": False}, {"limit_train": 5000}, {"limit_test": 100}, {"overrides": ["lr=0.05"]}, {"dataset": "digits"},
        {"depth": 44}, {"result": {"evaluated_on": "val"}}, {"loader": "synthetic"},
        {"workers": 2, "result": {"widths": (2, 1)}},
    ]  # fmt: skip
    for change in different:
        (row,) = summarise([make_run(0, **change)])
        assert row.against is None, change
        assert "8.29" not in text([row])


def test_the_test_set_stands_beside_images_held_out() -> None:
    runs = [make_run(s, 9.0 + s, result={"evaluated_on": "val", "test_error": 8.3 + 0.2 * s}) for s in range(2)]
    (row,) = summarise(runs)
    assert row.against is not None
    assert row.against.difference == pytest.approx(8.4 - 8.29)
    page = text([row])
    assert "9.50 ± 0.71" in page
    assert "8.40 ± 0.14" in page
    assert "test %" not in text(summarise([make_run()]))


def test_marks_for_data_that_is_not_comparable() -> None:
    page = text(summarise([make_run(dataset="cifar10-q75", original=False, limit_train=5000)]))
    assert "cifar10-q75¹" in page
    assert "not compared with published errors" in page
    assert "training images: 5,000²" in page
    page = text(summarise([make_run(result={"evaluated_on": "val"})]))
    assert "of held-out training images, not of the test set" in page


PART = {"limit_train": 5000}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (PART, "20 all 8.40 ± 0.00"), (PART, "20 5,000² 8.40 ± 0.00"), ({"overrides": ["lr=0.05"]}, "20 lr=0.05 8.40 ± 0.00"),
        ({"torch": "2.11.0"}, "20 torch=2.11.0 8.40 ± 0.00"), ({"variant": "he2015"}, "20 he2015 8.40 ± 0.00"),
    ],
)  # fmt: skip
def test_chosen_columns_do_not_hide_what_tells_rows_apart(change: dict[str, Any], words: str) -> None:
    rows = summarise([make_run(seed, **more) for more in ({}, change) for seed in range(2)])
    page = " ".join(text(rows, columns=("depth", "error")).replace("¹", "").split())
    assert words in page
    assert ("trained on a part of the training set: not compared" in page) == (change == PART)
    assert render(rows, "csv", columns=("depth",)).startswith("depth\n"), "a program gets what it asked for"
    alike = text(summarise([make_run(seed, **change) for seed in range(2)]), columns=("error", "n"))
    assert re.search(r"\n\n *error %. +n\n", alike)


def test_chosen_columns_do_not_hide_why_rows_are_not_comparable() -> None:
    rows = summarise([make_run(0, limit_test=100), make_run(0, limit_test=100, depth=56)])
    page = text(rows, columns=("depth", "test_error", "n"))
    assert "of 100 of the test images: not compared with published errors" in page
    assert "depth¹" in page, "the mark is of the whole row"
    page = text(summarise([make_run(0), make_run(1, workers=2)], across=["workers"]), columns=("depth", "error"))
    assert "averaged over workers: 1, 2, as requested: not compared with published errors" in page


def test_what_all_rows_share_is_said_once_and_the_table_fits() -> None:
    rows = summarise([make_run(s, depth=d) for s in range(3) for d in (20, 32, 56, 110)])
    page = text(rows)
    assert page.splitlines()[0] == "cifar10 · 180 epochs · dali · fp32 · eager · 1×128 · NVIDIA H200"
    many = summarise([make_run(depth=d, loader=x, precision=p, result={"device": g}, workers=w, dataset=n)
                      for d in (20, 110) for x in ("dali", "dataloader") for p in ("fp32", "bf16")
                      for g in ("NVIDIA H200", "NVIDIA A100-SXM4-80GB") for w in (1, 8)
                      for n in ("cifar10", "a-data-set-with-a-rather-long-name")])  # fmt: skip
    for width in (80, 100, 140):
        page = text(rows, width=width, fit=True)
        assert max(map(len, page.splitlines())) <= width
        assert page.count("msra") == 4, "one line a row"
        for words in ("8.40 ± 0.00", "4.50", "1,890", "worse p"):
            assert words in page, "error, seconds and memory are never left out"
        assert ("GeForce" in page) == (width == 140), "a note of columns that are left out is none"
    assert "too narrow for params, best − last, published s, img/s, data wait %, alloc, published MiB" in " ".join(
        text(rows, width=100, fit=True).split()
    )
    assert "too narrow" not in text(rows)
    page = text(many)
    assert len(many) == 64
    assert page.count("msra") == 64
    assert "\x1b" not in page
    assert "\x1b[" in text(many, colour=True)


def test_names_cannot_break_the_page() -> None:
    evil = "[red]a|b*c_d\x1b[31m\n<b>`"
    rows = summarise([make_run(dataset=evil), make_run(dataset="ok")])
    assert "\x1b" not in text(rows)
    page = render(rows, "markdown")
    line = next(line for line in page.splitlines() if "red" in line)
    assert line.replace("\\|", "").count("|") == next(x for x in page.splitlines() if "| ok" in x).count("|")
    assert r"\<b\>\`" in line
    assert "\x1b" not in page
    assert len(list(csv.DictReader(io.StringIO(render(rows, "csv"))))) == 2


def test_csv_and_json_carry_raw_numbers_with_units() -> None:
    error = 8.123456789
    rows = summarise([make_run(0, error), make_run(1, error, depth=56, result={"final_error": float("nan")})])
    first, second = csv.DictReader(io.StringIO(render(rows, "csv")))
    assert float(first["error_percent_mean"]) == error
    assert float(first["epoch_seconds"]) == 4.5
    assert float(first["torch_allocated_mib"]) == 417.0
    assert second["error_percent_mean"] == ""
    page = json.loads(render(rows, "json"))
    assert page["rows"][0]["error_percent_mean"] == error
    assert page["rows"][1]["error_percent_mean"] is None
    assert "NaN" not in render(rows, "json")
    assert "published" in {entry["column"] for entry in page["definitions"]}
    assert list(first) == ["schema_version", *page["rows"][0]]
    assert (first["schema_version"], first["seeds"], page["rows"][0]["seeds"]) == ("1", "[0]", [0])


def test_no_runs() -> None:
    assert summarise([]) == []
    assert render([], "table") == "no runs\n"
    assert render([], "csv") == ""
    assert json.loads(render([], "json"))["rows"] == []


def test_the_whole_page() -> None:
    runs = [make_run(0, 8.3), make_run(1, 8.5), make_run(0, 6.5, depth=56), make_run(1, 6.3, depth=56)]
    runs += [make_run(s, 8.4, precision="bf16") for s in range(3)]
    page = text(summarise(runs))
    assert page.split("\n\n")[:2] == [
        "cifar10 · 180 epochs · dali · eager · 1×128 · NVIDIA H200",
        "variant  depth  precision  params  n     error %¹  best %  best − last    published²  verdict      s/epoch  published s³   img/s  data wait %  alloc  resvd   NVML  published MiB³\n"
        "───────  ─────  ─────────  ──────  ─  ───────────  ──────  ───────────  ────────────  ───────────  ───────  ────────────  ──────  ───────────  ─────  ─────  ─────  ──────────────\n"
        "msra        20  bf16        0.27M  3  8.40 ± 0.00    8.20        −0.20  8.29 (+0.11)  not judged⁴     4.50  11 s (2.44×)  11,111          1.2    417    512  1,890         521 MiB\n"
        "msra        20  fp32        0.27M  2  8.40 ± 0.14    8.20        −0.20  8.29 (+0.11)  not judged⁵     4.50  11 s (2.44×)  11,111          1.2    417    512  1,890         521 MiB\n"
        "msra        56  fp32        0.27M  2  6.40 ± 0.14    6.20        −0.20  6.31 (+0.09)  not judged⁵     4.50  30 s (6.67×)  11,111          1.2    417    512  1,890         860 MiB",
    ]
    assert render(summarise(runs), "markdown").splitlines()[4] == (
        "| msra      |      20 | bf16        |    0.27M |   3 | 8.40 ± 0.00 |     8.20 |         −0.20 | 8.29 (+0.11) | not judged⁴ |      4.50 |   11 s (2.44×) |  11,111 |           1.2 |     417 |     512 |  1,890 |          521 MiB |"
    )


def test_the_length_of_a_run_is_said_once() -> None:
    """In the column of its epochs, or above the table; the column of what was changed has the rest."""
    short = dict(make_run().record.spec["recipe"]) | {"duration": 15}
    rows = summarise(
        [make_run(recipe=short, overrides=words) for words in (["epochs=15"], ["lr=0.05", "epochs=15"])]
    )
    page = text(rows)
    assert page.count("15 epochs") == 1
    assert "epochs=15" not in page
    assert "lr=0.05" in page
    assert [row["overrides"] for row in json.loads(render(rows, "json"))["rows"]] == [
        "epochs=15",
        "lr=0.05 epochs=15",
    ]
    (both,) = summarise([stored for row in rows for stored in row.done], across=["overrides"])
    assert "averaged over overrides: epochs=15, lr=0.05,epochs=15" in text([both])


def test_a_spec_that_was_edited_by_hand_breaks_nothing() -> None:
    bad: list[dict[str, Any]] = [
        {"recipe": "none"}, {"recipe": {"duration": "long", "batch_size": "big"}}, {"workers": "two"},
        {"overrides": "epochs=2"}, {"limit_train": "some"}, {"network": []}, {"loader": None},
    ]  # fmt: skip
    oom = Failure(kind="OOM", message="")
    for change in bad:
        partial = Interrupted("x", Path("x"), 1, None, make_spec(seed=2, **change))
        (row,) = summarise([make_run(0, **change), make_run(1, failure=oom, **change)], [partial])
        assert "8.40" in text([row])
        for rows in (summarise([make_run(1, failure=oom, **change)]), summarise([], [partial])):
            for format in get_args(Format):
                assert render(rows, format)


def test_a_narrow_table_is_folded_between_words() -> None:
    cells = [["weight_decay=0.001, lr=0.05", "limit_test=500, n=1", "9.00"]]
    sheet = Sheet(["changed", "differs", "error"], [False, False, True], cells)
    page = for_terminal(sheet, 46)
    assert {"weight_decay=0.001,", "limit_test=500,"} <= set(page.split())
    assert max(map(len, page.splitlines())) <= 46
    assert max(map(len, for_terminal(sheet, 34).splitlines())) <= 34, "and within them where that is not enough"


def test_runs_that_shared_the_machine_are_marked() -> None:
    run = make_run(0)
    record = run.record.model_copy(update={"environment": {"concurrent_runs": 4}})
    assert "timed with 4 runs training at the same time" in text(summarise([Stored(record, run.folder)]))
    assert "timed with" not in text(summarise([run]))


def test_energy_and_disturbed_epochs() -> None:
    runs = [
        make_run(seed=seed, result={"energy_joules": Measurement(value=joules), "interference": interference})
        for seed, joules, interference in ((0, 52_000.0, ()), (1, 54_000.0, ("the GPU was throttled",)))
    ]
    page = text(summarise(runs))
    assert re.search(r"\bkJ\b", page)
    assert re.search(r"\b53\b", page)
    assert "the GPU was throttled in some epochs: they are left out" in " ".join(page.split())
    (row,) = json.loads(render(summarise(runs), "json"))["rows"]
    assert row["energy_joules"] == 53_000.0


def test_what_a_measured_figure_holds_is_said() -> None:
    """A reason beside a value is a note, and `harness why` has that of each run."""

    def spend(*reasons: str | None) -> list[Row]:
        joules = [Measurement(value=9e5, reason=reason) for reason in reasons]
        return summarise([make_run(seed, result={"energy_joules": one}) for seed, one in enumerate(joules)])

    shared, counted = "with the energy of other processes in 170 epochs", "3 disturbed epochs count"
    assert make_notes(spend(shared, shared))[f"kJ: {shared}"] == {"energy_joules": {0}}
    assert f"kJ in 1 of 2 runs: {shared}" in make_notes(spend(None, shared))
    rows = spend(shared, counted)
    assert f"kJ: {shared} (of one run; for the others see harness why)" in make_notes(rows)
    assert f"seed 0: 900 ({shared}), seed 1: 900 ({counted})\n" in why(rows[0])
    rss = Measurement(value=812.4, reason="of the whole process: its peak cannot be reset here")
    memory = make_measured().memory.model_copy(update={"rss_mib": rss})
    on_cpu, on_gpu = ([make_run(result={"memory": memory}, device=device)] for device in ("cpu", "cuda"))
    assert f"RSS: {rss.reason}" in make_notes(summarise(on_cpu))
    assert f"RSS: {rss.reason}" not in make_notes(summarise(on_gpu)), "where the table has no such column"


def test_seconds_of_disturbed_epochs_say_so() -> None:
    timing = {"epochs": 0, "fastest": None, "slowest": None, "untimed": {"interference: it swapped": 179}}
    peak = {"forward_flops": 41_000_000, "peak_flops": 1e15, "interference": ("it swapped",)}
    disturbed = [make_run(seed, result={"timing": timing, **peak}) for seed in (0, 1)]
    notes = make_notes(summarise(disturbed))
    (said,) = (text for text in notes if "it swapped" in text)
    assert said == "no epoch was undisturbed (it swapped): the seconds are of disturbed ones"
    assert notes[said].keys() == {*TIMED, "published_epoch_seconds"}
    (plain,) = json.loads(render(summarise(disturbed), "json"))["rows"]
    assert (plain["epoch_seconds"], plain["timed_epochs"]) == (4.5, 0)
    assert re.search(r" 4\.50[²³⁴⁵⁶] ", text(summarise([*disturbed, make_run(depth=32)]))), "without a count"


def test_disturbed_seconds_count_where_no_run_of_the_row_has_others() -> None:
    """Neither in the row's figures and spread nor in those that comparisons take."""
    timing = {"epochs": 0, "fastest": None, "slowest": None, "untimed": {"interference: it swapped": 179}}
    peak = {"forward_flops": 41_000_000, "peak_flops": 1e15, "interference": ("it swapped",)}
    slow = {
        "timing": timing,
        **peak,
        "epoch_seconds": 12.2,
        "images_per_second": 4_100.0,
        "data_stall_percent": 50.0,
    }
    disturbed = [make_run(seed, result=slow) for seed in (0, 1)]
    clean = make_run(2, result={**peak, "timing": {"epochs": 27, "fastest": 4.25, "slowest": 4.75}})
    (row,) = summarise([*disturbed, clean])
    assert row.values("epoch_seconds") == [4.5]
    assert [row.figures[n].value for n in ("images_per_second", "data_stall_percent")] == [11_111.0, 1.25]
    assert row.figures["mfu"].value == pytest.approx(100 * 3 * 41e6 * 11_111 / 1e15)
    assert "4.50 (27, 4.25–4.75)" in text([row])
    notes = make_notes([row])
    (said,) = (text for text in notes if "it swapped" in text and "left out" not in text)
    assert said == (
        "s/epoch, img/s, MFU %, data wait % not measured in 2 of 3 runs: no epoch was timed (it swapped)"
    )
    assert "it swapped in some epochs: they are left out" in notes
    assert "seed 0: null (no epoch was timed), seed 1: null (no epoch was timed), seed 2: 4.50\n" in why(row)
    assert "s/epoch" in (page := text([row]))
    assert "12.2" not in page


def test_notes_are_numbered_as_a_reader_meets_them_and_those_without_a_mark_are_not() -> None:
    untimed = {"epoch_seconds": None, "images_per_second": None} | untimed_by("3 runs share the GPU")
    plain = [
        make_run(0, 8.4, result=untimed),
        make_run(1, 8.6, result=untimed | {"best_error": 9.0}),
        make_run(depth=32),
    ]
    for some, columns in ((plain, ()), (plain[:2], ()), (plain, ("error", "n", "epoch_seconds"))):
        page, _, below = text(summarise(some), width=300, columns=columns).partition("\n\n¹ ")
        marks = re.findall("[⁰¹²³⁴⁵⁶⁷⁸⁹]+", page)
        met = list(dict.fromkeys(marks))
        numbers = ["¹", *re.findall("^([⁰¹²³⁴⁵⁶⁷⁸⁹]+) ", below, re.MULTILINE)]
        assert met == numbers == list("¹²³⁴⁵⁶"[: len(numbers)]), page
        assert len(numbers) >= 2
    missing = "s/epoch, img/s, MFU % not measured: no epoch was timed (3 runs share the GPU)"
    rows = summarise(plain[:2])
    assert f"\n{missing}\n" in text(rows, width=300), "no column shows them: no number"
    assert "s/epoch" not in text(rows, width=300).partition("\n\n¹ ")[0]
    html = make_page(rows, bundle="", made_at=NOW)
    assert f'<li class="bare">{missing}</li></ol>' in html


def test_a_run_whose_width_changed_is_averaged_with_no_other() -> None:
    steady = [make_run(seed, workers=2, result={"workers": 2}) for seed in (0, 1)]
    changed = make_run(2, workers=2, result={"workers": 2, "widths": (2, 1), "epoch_seconds": 9.0})
    plain, elastic = summarise([*steady, changed])
    assert (plain.figures["epoch_seconds"].value, len(plain.done)) == (4.5, 2)
    assert (elastic.figures["epoch_seconds"].value, len(elastic.done)) == (9.0, 1)
    page = text([plain, elastic])
    assert "widths=2→1" in page
    assert "world size 2→1: the cluster had no room for 2 workers" in page
    (alone,) = summarise([changed])
    assert "world size 2→1" in text([alone]), "said of a row that stands alone, too"
    (together,) = summarise([*steady, changed], across=["widths"])
    assert len(together.done) == 3


def test_rows_say_which_seeds_were_added_and_what_contradicts_itself() -> None:
    runs = [make_run(seed, 8.0 + seed / 10) for seed in range(7)]
    added = [Stored(run.record.model_copy(update={"added_until": 0.25}), run.folder) for run in runs[5:]]
    (row,) = summarise([*added, *runs[:5]])
    assert row.planned == 5
    assert row.values("error")[:5] == [8.0, 8.1, 8.2, 8.3, 8.4]
    assert "seeds after the first 5 were added towards ±0.25 points" in make_notes([row])


@pytest.mark.parametrize(
    ("held_out", "known"),
    [({}, f"; the error is known to ±{Known((6.0, 7.0, 8.0, 9.0, 10.0, 11.0), 10_000).half:.2f} points (95 %)"),
     ({"evaluated_on": "val", "test_error": 8.0, "test_images": 10_000}, "")],
)  # fmt: skip
def test_a_goal_that_was_missed_is_not_called_reached(held_out: dict[str, Any], known: str) -> None:
    """The test set's error is the one that is watched."""
    runs = [make_run(seed, 6.0 + seed, result=held_out) for seed in range(6)]
    added = Stored(runs[5].record.model_copy(update={"added_until": 0.25}), runs[5].folder)
    notes = make_notes(summarise([*runs[:5], added]))
    assert f"seeds after the first 5 were added towards ±0.25 points{known}" in notes


def test_a_record_that_contradicts_itself_is_marked() -> None:
    page = text(summarise([make_run(0), make_run(1, result={"best_error": 9.0})]), width=200)
    assert "msra-20 seed 1: best_error is 9, above final_error 8.4; see harness verify" in page
    assert "verify" not in text(summarise([make_run(0)]))


def test_a_figure_has_its_own_n_and_says_of_how_many() -> None:
    untimed = {"epoch_seconds": None, "images_per_second": None} | untimed_by("interference: the machine swapped")
    rows = summarise([make_run(0), *(make_run(s, result=untimed) for s in range(1, 5))])
    page = " ".join(text(rows, width=300).split())
    assert "not measured in 4 of 5 runs: no epoch was timed (the machine swapped)" in page
    (plain,) = json.loads(render(rows, "json"))["rows"]
    assert (plain["n"], plain["epoch_seconds_n"], plain["images_per_second_n"], plain["error_n"]) == (5, 1, 1, 5)
    assert plain["images_per_second"] == 11_111.0, "of the run that was timed"


def test_a_run_that_failed_is_of_the_row_of_its_code() -> None:
    """The same spec by another version of the code: its failures are neither lost nor the first one's."""

    def run(seed: int, code: str, **changes: Any) -> Stored:
        stored = make_run(seed, **changes)
        about = {**stored.record.environment, "code": code}
        return stored._replace(record=stored.record.model_copy(update={"environment": about}))

    diverged = Failure(kind="NaN", message="loss is not finite")
    runs = [run(seed, "a") for seed in range(5)]
    runs += [run(seed, "b", failure=diverged if seed in (1, 3) else None) for seed in range(5)]
    rows = {row.fields["code"]: row for row in summarise(runs)}
    assert [stored.record.seed for stored in rows["b"].failed] == [1, 3]
    assert not rows["a"].failed
    (alone,) = summarise([*runs[:5], run(5, "c", failure=diverged)])
    assert [stored.record.seed for stored in alone.failed] == [5], "of a code that no row has"


def test_what_is_averaged_over_depths_is_called_so_and_has_no_published_cost() -> None:
    (row,) = rows = summarise([make_run(0), make_run(1, depth=56)], across=("network.depth",))
    assert row.name == "msra-20/56"
    assert "521 MiB" in text(summarise([make_run(0)]))
    assert "521 MiB" not in text(rows)
    held_out = summarise([make_run(0, overrides=["val=25000"])])
    assert "521 MiB" not in text(held_out), "fewer images an epoch"


def test_a_note_on_some_rows_does_not_stand_above_all() -> None:
    def run(seed: int, depth: int, status: str) -> Stored:
        stored = make_run(seed, depth=depth)
        about = {**stored.record.environment, "check": {"status": status}}
        return stored._replace(record=stored.record.model_copy(update={"environment": about}))

    rows = summarise([run(0, 20, "passed"), run(0, 32, "passed"), run(1, 32, "skipped"), run(0, 56, "failed")])
    caption, _, page = text(rows, width=300).partition("\n")
    assert "NVIDIA H200" in caption
    assert "NVIDIA H200¹" not in caption
    assert "device never checked: `harness check` in 1 of 2 runs" in page
    assert "device failed its check\n" in page


def untimed_by(*reasons: str) -> dict[str, Any]:
    """The timing of a run without a timed epoch."""
    return {"timing": {"epochs": 0, "fastest": None, "slowest": None, "untimed": dict.fromkeys(reasons, 2)}}


@pytest.mark.parametrize(
    ("reasons", "said"),
    [(("3 runs share the GPU",), "3 runs share the GPU"),
     (("interference: the GPU was throttled",), "the GPU was throttled"),
     (("warm-up", "partial epoch"), "warm-up, partial epoch"),
     (("warm-up", "warm-up; interference: it swapped", "interference: it swapped, it slept"), "warm-up, it swapped, it slept"),
     ((), ""), (("",), "")],
)  # fmt: skip
def test_the_reason_of_a_missing_figure_is_the_true_one(reasons: tuple[str, ...], said: str) -> None:
    """Each cause once."""
    run = make_run(0, result={"epoch_seconds": None, **untimed_by(*reasons)})
    notes = [note for note in make_notes(summarise([run])) if "not measured" in note]
    assert notes == [f"s/epoch not measured: no epoch was timed{f' ({said})' * bool(said)}"]


def test_seconds_carry_their_epochs_and_their_spread() -> None:
    def timing(epochs: int, fastest: float, slowest: float) -> dict[str, Any]:
        return {"timing": {"epochs": epochs, "fastest": fastest, "slowest": slowest}}

    slow = {"epoch_seconds": 8.7, "images_per_second": 50_000 / 8.7}
    fast = {"epoch_seconds": 1.1, "images_per_second": 50_000 / 1.1}
    (row,) = rows = summarise([make_run(0, result=slow), make_run(1, result=fast)])
    assert "4.90 (1.10–8.70)" in text(rows)
    seconds, images = row.figures["epoch_seconds"].value, row.figures["images_per_second"].value
    assert seconds is not None
    assert images is not None
    assert seconds * images == pytest.approx(50_000)
    rows = summarise(
        [make_run(0, result=slow | timing(9, 8.5, 9.9)), make_run(1, result=fast | timing(8, 1.0, 1.2))]
    )
    assert "4.90 (17, 1.00–9.90)" in text(rows)
    (plain,) = json.loads(render(rows, "json"))["rows"]
    assert [plain[name] for name in ("timed_epochs", "fastest_epoch_seconds", "slowest_epoch_seconds")] == [
        17,
        1.0,
        9.9,
    ]


def test_a_run_of_one_epoch_holds_its_warm_up() -> None:
    words = "from runs of one epoch: the seconds include the warm-up"
    assert words in text(summarise([make_run(0, result={"warmup_epochs": 0})]))
    assert words not in text(summarise([make_run(0)]))


def test_what_the_number_of_images_leaves_open_is_said() -> None:
    page = " ".join(text(summarise([make_run(0, 8.0)])).split())
    assert (
        "10,000 test images of cifar10, these networks' error on all such images is 7.48 to 8.55 % at 8.00 % (Wilson, 95 %); no"
        in page
    )
    rows = summarise([make_run(0, 16 / 3.6, result={"evaluated_images": 360})])
    assert (
        "360 test images of cifar10, these networks' error on all such images is 2.75 to 7.10 % at 4.44 % (Wilson, 95 %); no"
        in " ".join(text(rows).split())
    )
    rows = summarise([make_run(0, 8.0), make_run(0, 9.0, depth=56), make_run(0, 8.5, depth=110)])
    said = "is 7.37 to 8.67 % at 8.00 %, 8.34 to 9.71 % at 9.00 % (Wilson, 95 % for all 3 rows at once)"
    assert said in " ".join(text(rows).split())


def test_many_runs_that_contradict_themselves_are_one_note() -> None:
    rows = summarise(
        [make_run(seed, depth=depth, result={"best_error": 9.0}) for depth in (20, 56) for seed in range(3)]
    )
    (said,) = (note for note in make_notes(rows) if "verify" in note)
    assert said == (
        "6 runs contradict themselves: see harness verify; msra-20 seed 0: best_error is 9, above final_error 8.4"
    )
    assert make_notes(rows)[said] == {"n": {0, 1}}


def test_rows_of_one_name_whose_runs_contradict_themselves_alike_are_all_marked() -> None:
    def noted(seeds: int) -> dict[str, set[int]]:
        runs = [
            make_run(s, result={"best_error": 9.0}, loader=of) for of in ("dali", "resident") for s in range(seeds)
        ]
        return {note: cells["n"] for note, cells in make_notes(summarise(runs)).items() if "verify" in note}

    alike = "msra-20 seed 0: best_error is 9, above final_error 8.4"
    assert noted(1) == {f"{alike}; see harness verify": {0, 1}}
    assert noted(3) == {f"6 runs contradict themselves: see harness verify; {alike}": {0, 1}}


def test_the_seeds_of_a_row_are_told_apart_by_one_look_at_their_specs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report of 10,000 runs takes seconds."""
    flattened = list[object]()
    monkeypatch.setattr(
        "harness.results.rows.flatten_spec", lambda spec: flattened.append(spec) or flatten_spec(spec)
    )
    rows = summarise([make_run(seed, depth=depth) for seed in range(50) for depth in (20, 56)])
    assert [len(row.done) for row in rows] == [50, 50]
    assert len(flattened) == 2
