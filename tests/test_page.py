"""The page, the charts and every format: golden files, names that try to break out, and a real browser."""

from __future__ import annotations

import base64
import gzip
import json
import math
import os
import re
import sys
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import test_table
from chromium import Browser, find_chromium
from records import NOW, make_epoch, make_memory, make_record

from harness.results.report.charts import (
    MAX_LEGEND,
    MAX_RUNS,
    PALETTE,
    SHAPES,
    Panel,
    load_bundle,
    make_labels,
    make_panels,
    make_styles,
    write_charts,
)
from harness.results.report.page import make_page
from harness.results.report.table import Format, render
from harness.results.rows import Row, summarise
from harness.results.store import Problem, Stored, finish, load_records, start, write_epochs
from harness.results.values import EpochMetrics, Failure, Measurement, Record

GOLDEN = Path(__file__).parent / "golden"
ERRORS = {20: 8.4, 32: 7.5, 56: 6.6, 110: 6.2}


def make_spec(
    depth: int, seed: int, loader: str, dataset: str = "cifar10", variant: str = "msra"
) -> dict[str, Any]:
    """Fixed by hand: golden files do not follow the variants."""
    return {
        "variant": variant, "network": {"depth": depth, "shortcut": "B"},
        "recipe": {"duration": 12, "unit": "epoch", "batch_size": 128, "lr": 0.1}, "overrides": [], "dataset": dataset,
        "fingerprint": "f" * 64, "limit_train": None, "loader": loader, "precision": "fp32", "engine": "eager",
        "device": "cuda", "workers": 1, "seed": seed,
    }  # fmt: skip


def make_curve(depth: int, seed: int, epochs: int = 12) -> tuple[EpochMetrics, ...]:
    return tuple(
        make_epoch(
            k, loss=1 / k, error=round(ERRORS[depth] + 40 * math.exp(-k) + 0.1 * seed, 2), train_seconds=2.0,
            data_stall_seconds=0.1, eval_seconds=0.2, images_per_second=25_000.0, timed=k > 1,
        )
        for k in range(1, epochs + 1)
    )  # fmt: skip


def make_run(
    depth: int, seed: int, loader: str = "dali", failure: Failure | None = None, dataset: str = "cifar10", variant: str = "msra"
) -> Record:  # fmt: skip
    epochs = make_curve(depth, seed)
    seconds = 2 + depth / 20 + (loader == "dataloader")
    memory = make_memory(
        torch_allocated_mib=200.0 + 8 * depth, torch_reserved_mib=300.0 + 8 * depth, rss_mib=2000.0,
        nvml_process_mib=Measurement(value=None, reason="NVML shows no processes here"),
    )  # fmt: skip
    result = {
        "epochs": epochs, "final_error": epochs[-1].error, "best_error": epochs[-1].error - 0.1, "best_epoch": 11,
        "epoch_seconds": seconds, "images_per_second": 50_000 / seconds, "memory": memory,
    }  # fmt: skip
    record = make_record(seed, 8.0, failure=failure, result=result)
    name = f"{dataset}_{variant}-{depth}_s{seed}_{loader}".replace("/", "-")[:80]
    return record.model_copy(
        update={
            "key": name, "name": name, "depth": depth, "spec": make_spec(depth, seed, loader, dataset, variant),
            "dataset": dataset, "variant": variant, "finished_at": NOW + timedelta(minutes=seed),
        }
    )  # fmt: skip


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """Two depths, two loaders, three seeds; one run failed, one was interrupted."""
    out = tmp_path / "runs"
    for loader in ("dali", "dataloader"):
        for depth in (20, 56):
            for seed in range(3):
                if (loader, depth, seed) == ("dataloader", 56, 2):
                    trace = 'Traceback:\n  File "train.py"\nDivergedError: <b>loss</b>'
                    failed = make_run(
                        depth, seed, loader, Failure(kind="NaN", message="loss is not finite", traceback=trace)
                    )
                    write_epochs(start(out, failed.name, failed.spec), make_curve(depth, seed, 5))
                    finish(out, failed)
                elif (loader, depth, seed) == ("dataloader", 20, 2):
                    run = make_run(depth, seed, loader)
                    write_epochs(start(out, run.name, run.spec), make_curve(depth, seed, 7))
                else:
                    finish(out, make_run(depth, seed, loader))
    loaded = load_records([out])
    assert not loaded.problems
    return summarise(loaded.records, loaded.interrupted)


def page(rows: list[Row], bundle: str = "/* vega */", **options: Any) -> str:
    return make_page(rows, bundle=bundle, made_at=NOW, **options)


@pytest.mark.parametrize("format", ["table", "markdown", "csv", "json", "latex", "html"])
def test_every_format_is_as_it_was_approved(format: Format, rows: list[Row]) -> None:
    """UPDATE_GOLDEN=1 writes the files anew: then read the difference before it is committed."""
    text = page(rows) if format == "html" else render(rows, format)  # type: ignore[comparison-overlap]
    for own in ("css", "js"):  # those are looked at in the browser
        if format == "html":  # type: ignore[comparison-overlap]
            text = text.replace(
                (GOLDEN.parents[1] / f"results/report/page.{own}").read_text(), f"/* page.{own} */"
            )
    if format == "html":  # type: ignore[comparison-overlap]
        shown = json.dumps(page_data(text), ensure_ascii=False)  # another zlib packs it otherwise
        text = re.sub(r'id="data">[^<]*<', lambda _: f'id="data">{shown}<', text)
        text = re.sub(r'id="vega">[^<]*<', 'id="vega"><', text)
    path = GOLDEN / f"report.{format}"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


class Tags(HTMLParser):
    """What a browser would see in a text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        for name, value in attributes:
            self.attributes.add(name)
            if name in ("href", "src"):
                self.links.append(value or "")
            if name == "id":
                self.ids.add(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


NASTY = '"><script>alert(1)</script><img src=x onerror=alert(2)></script><!-- &amp; \x1b[31m ‮ \n'


def test_no_name_breaks_out(tmp_path: Path) -> None:
    run = make_run(20, 0, dataset=NASTY, variant=NASTY)
    nasty = run.model_copy(
        update={"name": "x", "environment": {"commit": NASTY, "command": ["harness", NASTY], NASTY: NASTY}}
    )
    nasty = nasty.model_copy(update={"spec": nasty.spec | {"loader": NASTY, "recipe": {"lr": NASTY}}})
    finish(tmp_path, nasty)
    failure = Failure(kind="exception", message=NASTY, traceback=NASTY)
    finish(
        tmp_path,
        nasty.model_copy(update={"name": "y", "key": "y", "status": "failed", "result": None, "failure": failure}),
    )
    loaded = load_records([tmp_path])
    text = page(summarise(loaded.records, loaded.interrupted), problems=[Problem(Path(NASTY), NASTY)])
    tags = Tags()
    tags.feed(text)
    assert "img" not in tags.tags
    assert tags.tags.count("script") == 3
    assert "onerror" not in tags.attributes
    assert not [link for link in tags.links if not link.startswith("#")]
    assert "\x1b" not in text
    assert "‮" not in text
    for folder in write_charts(make_panels(summarise(loaded.records)), tmp_path / "charts"):
        assert folder.parent == tmp_path / "charts"


def test_the_page_is_well_formed_and_its_notes_have_targets(rows: list[Row]) -> None:
    tags = Tags()
    tags.feed(page(rows))
    assert not tags.open
    assert {link.removeprefix("#") for link in tags.links} <= tags.ids


def test_what_did_not_finish_says_why(rows: list[Row]) -> None:
    text = page(rows, problems=[Problem(Path("runs/broken"), "record.json is broken: EOF")])
    for words in (
        "<strong>NaN</strong> msra-56 seed 2",
        "&lt;b&gt;loss",
        "msra-20 seed 2 after epoch 7 of 12",
        "broken: EOF",
    ):
        assert words in text
    assert "no runs" in page([])


def page_data(text: str) -> Any:
    found = re.search(r'<script type="text/plain" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(gzip.decompress(base64.b64decode(found.group(1))))


def test_the_curves_are_the_stored_epochs(rows: list[Row]) -> None:
    (panel,) = page_data(page(rows))["panels"]
    curves = panel["datasets"]["curves"]
    by_name = {c["row"]: c for c in curves if not c.get("unfinished")}
    assert set(by_name) == {"msra-20 · dali", "msra-20 · dataloader", "msra-56 · dali", "msra-56 · dataloader"}
    curve = by_name["msra-56 · dali"]
    stored = [make_curve(56, seed) for seed in range(3)]
    assert curve["epoch"] == list(range(1, 13))
    assert len(curve["mean"]) == 12
    for k in range(12):
        errors = [run[k].error for run in stored]
        assert curve["mean"][k] == pytest.approx(sum(errors) / 3, abs=0.0051)
        assert curve["low"][k] == pytest.approx(min(errors), abs=0.0051)
        assert curve["high"][k] == pytest.approx(max(errors), abs=0.0051)
    partial = {c["row"]: len(c["mean"]) for c in curves if c.get("unfinished")}
    assert partial == {"msra-56 · dataloader": 5, "msra-20 · dataloader": 7}


def test_what_is_learnt_stands_beside_what_is_not(tmp_path: Path) -> None:
    """Training and held-out error and loss, and the test curve where other images are held out; nothing of old records."""
    for seed in range(2):
        run = make_run(20, seed)
        assert run.result is not None
        epochs = tuple(
            row.model_copy(
                update={"train_error": row.error - 3, "eval_loss": row.loss + 0.5, "test_error": row.error + 1}
            )
            for row in run.result.epochs
        )
        result = run.result.model_copy(update={"epochs": epochs, "evaluated_on": "val"})
        finish(tmp_path / "runs", run.model_copy(update={"result": result}))
    finish(tmp_path / "runs", make_run(32, 0))
    panels = make_panels(summarise(load_records([tmp_path / "runs"]).records))
    (panel,) = (panel for panel in panels if "learning" in panel.datasets)
    training, held_out, test = panel.datasets["learning"]
    assert [curve["of"] for curve in (training, held_out, test)] == ["training", "held out", "test"]
    stored = [make_curve(20, seed)[4] for seed in range(2)]
    error, loss = (sum(getattr(row, name) for row in stored) / 2 for name in ("error", "loss"))
    for curve, figure, expected in (
        (training, "error", error - 3), (training, "loss", loss), (held_out, "error", error),
        (held_out, "loss", loss + 0.5), (test, "error", error + 1),
    ):  # fmt: skip
        assert curve[figure][4] == pytest.approx(expected, rel=1e-3)
    assert test["loss"][4] is None
    assert [chart.name for chart in panel.charts][2:4] == ["learning-error", "learning-loss"]
    svg = next(
        path for path in write_charts([panel], tmp_path / "charts") if path.name.endswith("learning-error.svg")
    )
    for words in ("training", "held out", "error, %"):
        assert words in svg.read_text()


def test_the_frontier_holds_what_no_other_row_beats(rows: list[Row]) -> None:
    (panel,) = make_panels(rows)
    for chart in ("seconds", "memory"):
        points = [(p["cost"], p["error"], p["best"]) for p in panel.datasets[chart]]
        assert len(points) == 4
        for cost, error, best in points:
            beaten = any((c <= cost and e < error) or (c < cost and e <= error) for c, e, _ in points)
            assert best != beaten or [(c, e) for c, e, _ in points].count((cost, error)) > 1


def test_many_runs_thin_the_curves_and_say_so(tmp_path: Path) -> None:
    for number in range(MAX_RUNS // 2 + 10):  # two runs a row
        for seed in range(2):
            record = make_run(20, seed, f"loader{number}")
            assert record.result is not None
            error = 8 + number / 100
            curve = tuple(epoch.model_copy(update={"error": error}) for epoch in make_curve(20, 0, 4))
            result = record.result.model_copy(update={"final_error": error, "epochs": curve})
            finish(tmp_path, record.model_copy(update={"result": result}))
    rows = summarise(load_records([tmp_path]).records)
    text = page(rows)
    (panel,) = page_data(text)["panels"]
    assert len(panel["datasets"]["curves"]) == MAX_RUNS // 2
    assert {c["row"] for c in panel["datasets"]["curves"]} == {
        f"msra-20 · loader{n}" for n in range(MAX_RUNS // 2)
    }
    assert f"Curves of {MAX_RUNS // 2} rows, those with the smallest error; 10 more are in the table" in text


def test_commands_of_one_environment_stand_on_lines_of_their_own(tmp_path: Path) -> None:
    for seed in range(2):
        run = make_run(20, seed)
        environment = run.environment | {"command": ["harness", "run", "--seeds", f"{seed} <b>"]}
        finish(tmp_path, run.model_copy(update={"environment": environment}))
    text = page(summarise(load_records([tmp_path]).records))
    assert "harness run --seeds &#39;0 &lt;b&gt;&#39;<br>harness run --seeds &#39;1 &lt;b&gt;&#39;" in text
    assert "�" not in text


def test_more_rows_than_a_legend_holds_have_none(tmp_path: Path) -> None:
    for number in range(MAX_LEGEND + 1):
        finish(tmp_path / "runs", make_run(20, 0, f"loader{number}"))
    (panel,) = make_panels(summarise(load_records([tmp_path / "runs"]).records))
    spec = panel.charts[0].spec
    assert spec["encoding"]["color"]["legend"] is None
    assert len({(style.colour, tuple(style.dash)) for style in panel.rows.values()}) > len(PALETTE)
    svg = write_charts([panel], tmp_path / "charts")[0].read_text()
    assert set(PALETTE) <= set(re.findall(r'stroke="(#[0-9a-f]{6})"', svg))
    assert 'stroke-dasharray="7,3"' in svg
    assert "role-legend" not in svg


def test_labels_differ(rows: list[Row]) -> None:
    labels = make_labels([*rows, *rows])
    assert len(set(labels)) == 8


@pytest.mark.parametrize(
    ("networks", "conditions"), [(1, 40), (2, 4), (10, 4), (14, 2), (40, 1), (2, 20)]
)  # more look alike: 10 colours, 4 shapes
def test_rows_look_different(networks: int, conditions: int) -> None:
    labels = [f"msra-{n}" + f" · {c}" * (conditions > 1) for n in range(networks) for c in range(conditions)]
    styles = make_styles(labels)
    assert list(styles) == labels
    assert len({(style.colour, style.shape) for style in styles.values()}) == len(labels)
    assert len({(style.colour, tuple(style.dash)) for style in styles.values()}) == len(labels)
    # and beside rows that have a colour, also where several have one
    own = {f"trial {k}": colour for k, colour in enumerate([PALETTE[0], PALETTE[1]] * len(SHAPES))}
    styles = make_styles([*labels[:20], *own], own)
    assert len({(style.colour, style.shape) for style in styles.values()}) == len(styles)
    assert {label: styles[label].colour for label in own} == own


def find_all(spec: Any, name: str) -> list[Any]:
    """Every value of that name anywhere in a spec."""
    if isinstance(spec, list):
        return [found for part in spec for found in find_all(part, name)]
    own = [spec[name]] if isinstance(spec, dict) and name in spec else []
    return own + [v for part in (spec.values() if isinstance(spec, dict) else ()) for v in find_all(part, name)]


def test_dashes_are_of_rows_alone(tmp_path: Path) -> None:
    """Neither of runs that did not finish, which end in a mark, nor of training images, which are thin."""
    for loader in ("dali", "resident"):
        run = make_run(20, 0, loader)
        assert run.result is not None
        epochs = tuple(e.model_copy(update={"train_error": e.error, "eval_loss": 1.0}) for e in run.result.epochs)
        finish(tmp_path, run.model_copy(update={"result": run.result.model_copy(update={"epochs": epochs})}))
    run = make_run(20, 1)
    write_epochs(start(tmp_path, run.name, run.spec), make_curve(20, 1, 5))
    loaded = load_records([tmp_path])
    (panel,) = make_panels(summarise(loaded.records, loaded.interrupted))
    charts = {chart.name: chart for chart in panel.charts}
    for name in ("curves", "learning-error", "learning-loss"):
        dashes = [value for value in find_all(charts[name].spec, "strokeDash") if value != [6, 4]]  # the published
        assert dashes
        assert all(value["field"] == "row" for value in dashes)
    assert charts["learning-loss"].spec["encoding"]["strokeWidth"]["field"] == "of"
    assert "; thin, with a mark at its end: a run that did not finish;" in charts["curves"].caption
    of = "on test images after each epoch; thin: on training images, during it"
    assert charts["learning-loss"].caption == f"Mean loss of the seeds {of}"


def draw(panels: list[Panel], folder: Path, name: str) -> str:
    return next(path.read_text() for path in write_charts(panels, folder) if path.name.endswith(f"{name}.svg"))


def test_a_run_that_ended_after_one_epoch_is_a_point(tmp_path: Path) -> None:
    for depth in (20, 56):
        run = make_run(depth, 0, failure=Failure(kind="OOM", message="x"))
        write_epochs(start(tmp_path / "runs", run.name, run.spec), make_curve(depth, 0, 1))
        finish(tmp_path / "runs", run)
    svg = draw(make_panels(summarise(load_records([tmp_path / "runs"]).records)), tmp_path / "charts", "curves")
    marks = re.findall(r'<path transform="translate\(0,[^>]* fill="(#[0-9a-f]{6})"', svg)  # at the left end
    assert marks == [PALETTE[0], PALETTE[1]]


def test_a_point_of_disturbed_epochs_is_hollow_and_every_point_has_its_name(tmp_path: Path) -> None:
    for loader in ("dali", "dataloader"):
        run = make_run(20, 0, loader)
        assert run.result is not None
        why = {"timed": False, "untimed": "interference"} if loader == "dataloader" else {}
        epochs = tuple(epoch.model_copy(update=why) for epoch in run.result.epochs)
        result = run.result.model_copy(update={"epochs": epochs})
        finish(tmp_path / "runs", run.model_copy(update={"result": result}))
    panels = make_panels(summarise(load_records([tmp_path / "runs"]).records))
    points = {point["row"]: point for point in panels[0].datasets["seconds"]}
    assert [point.get("disturbed", False) for point in points.values()] == [False, True]
    assert "disturbed" not in str(panels[0].datasets["memory"])
    captions = {chart.name: chart.caption for chart in panels[0].charts}
    assert captions["seconds"].endswith("; hollow: of a run without an undisturbed epoch")
    assert "hollow" not in captions["memory"]
    svg = draw(panels, tmp_path / "charts", "seconds")
    for words in (">dali<", ">dataloader<"):
        assert words in svg
    marks = [mark for mark in re.findall(r'<path transform="translate[^>]*>', svg) if "M4.183" in mark]
    assert [' fill="#' in mark for mark in marks] == [True, False]


def test_one_point_has_an_axis_to_be_read_by(tmp_path: Path) -> None:
    finish(tmp_path / "runs", make_run(20, 0))
    svg = draw(make_panels(summarise(load_records([tmp_path / "runs"]).records)), tmp_path / "charts", "seconds")
    assert re.findall(r">(\d+)</text>", svg) == ["0", "2", "4", "6", "8"]


def test_charts_are_drawn_without_a_browser(rows: list[Row], tmp_path: Path) -> None:
    written = write_charts(make_panels(rows), tmp_path / "charts")
    names = ("curves", "zoom", "seconds", "memory")
    assert [path.name for path in written] == [f"cifar10-{name}.{e}" for name in names for e in ("svg", "png")]
    svg = (tmp_path / "charts/cifar10-curves.svg").read_text()
    for words in ("msra-20 · dali", "test error, %", "epoch"):
        assert words in svg
    assert (
        len(set(re.findall(r'stroke="(#[0-9a-f]{6})"', svg)) & {"#3b7dd8", "#e8743b"}) == 2
    )  # one colour a network
    assert (tmp_path / "charts/cifar10-zoom.png").read_bytes().startswith(b"\x89PNG")
    (panel,) = make_panels(rows)
    assert sum(len(curve["mean"]) for curve in panel.datasets["curves"]) == 4 * 12 + 5 + 7


def test_axes_have_no_powers_of_ten(tmp_path: Path) -> None:
    runs = [
        Stored(make_record(0, e, depths=(d,), seconds=s), tmp_path)
        for d, e, s in ((20, 90.0, 40.0), (32, 25.0, 80.0))
    ]
    (path, *_) = (
        p for p in write_charts(make_panels(summarise(runs)), tmp_path / "charts") if "seconds.svg" in p.name
    )
    words = re.findall(r">([^<>]+)</text>", path.read_text())
    assert "80" in words
    assert not [word for word in words if re.search(r"\de[+\d]", word)]


def test_the_bundle_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = load_bundle(tmp_path / "cache")
    assert "vegaEmbed" in bundle
    assert "</script" not in bundle
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_text("kept")
    assert load_bundle(tmp_path / "cache") == "kept"
    (tmp_path / "file").write_text("")
    monkeypatch.setitem(sys.modules, "vl_convert", type("", (), {"javascript_bundle": lambda *_, **__: "made"}))
    assert load_bundle(tmp_path / "file") == "made"  # cannot be kept there


@pytest.fixture(scope="module")
def bundle() -> str:
    return load_bundle(Path(os.environ["HARNESS_CACHE"]))


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed")
def test_in_a_real_browser(rows: list[Row], bundle: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page(rows, bundle))
    with Browser() as browser:
        browser.open(path)
        # curves: a line for each row in both charts, a band where there are seeds, two dotted runs; points for all rows
        marks = "[...document.querySelectorAll('[data-chart={}] .mark-{} path')].filter((p) => p.getBBox().width > 50).length"
        assert browser.ask(marks.format("curves", "line")) == 6
        assert browser.ask(marks.format("zoom", "line")) >= 4
        assert browser.ask(marks.format("curves", "area")) == 4
        assert browser.ask("document.querySelectorAll('[data-chart=seconds] .mark-symbol path').length") == 4
        assert browser.ask("document.querySelectorAll('[data-chart=memory] .mark-symbol path').length") == 4

        # sorting, both ways, by number and not by text; what has no value stays last
        first = "[...document.querySelectorAll('.sortable tbody tr')].map((r) => r.cells[{}].textContent)"
        headers = browser.ask("[...document.querySelectorAll('.sortable thead button')].map((b) => b.textContent)")
        seconds = headers.index("s/epoch")
        click = f"document.querySelectorAll('.sortable thead button')[{seconds}].click()"
        for expected in (["3.00", "4.00", "4.80", "5.80"], ["5.80", "4.80", "4.00", "3.00"]):
            browser.ask(click)
            assert [text.split()[0] for text in browser.ask(first.format(seconds))] == expected
        header = f"document.querySelectorAll('.sortable thead th')[{seconds}].getAttribute('aria-sort')"
        assert browser.ask(header) == "descending"

        # a row's runs appear when it is opened
        browser.ask("document.querySelector('details.row').open = true")
        browser.wait_for("document.querySelectorAll('details.row .runs tbody tr').length === 3")

        # a chip hides its row in all charts, and brings it back
        chip = "document.querySelector('.chips button')"
        browser.ask(f"{chip}.click()")
        browser.wait_for(f"{marks.format('curves', 'line')} === 5")
        assert browser.ask(f"{chip}.getAttribute('aria-pressed')") == "false"
        browser.ask(f"{chip}.click()")
        browser.wait_for(f"{marks.format('curves', 'line')} === 6")

        # pointing into the curves tells each row's error at that epoch
        browser.ask("document.querySelector('[data-chart=curves]').scrollIntoView({block: 'center'})")
        box = browser.ask("(({left, top, width, height}) => [left + width / 2, top + height / 2])"
                          "(document.querySelector('[data-chart=curves] svg').getBoundingClientRect())")  # fmt: skip
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
        browser.wait_for("document.querySelector('.chips b').textContent.endsWith('8.50')"
                         " || Number(document.querySelector('.chips b').textContent) > 8")  # fmt: skip
        assert browser.complaints == []
        assert [url for url in browser.requests if not url.startswith(("file:", "data:", "blob:"))] == []


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed")
def test_on_a_phone_and_in_the_dark(rows: list[Row], bundle: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page(rows, bundle))
    with Browser() as browser:
        light = "getComputedStyle(document.body).backgroundColor"
        browser.open(path, width=390, height=844)
        assert browser.ask("document.documentElement.scrollWidth") <= 390  # the table scrolls in itself
        assert (
            browser.ask("document.querySelector('[data-chart=curves] svg').getBoundingClientRect().width") <= 390
        )
        before = browser.ask(light)
        axis = "document.querySelector('[data-chart=curves] .role-axis-label text').getAttribute('fill')"
        ink = browser.ask(axis)
        browser.open(path, width=390, height=844, dark=True)
        assert browser.ask(light) != before
        assert browser.ask(axis) != ink
        assert browser.complaints == []


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed")
def test_an_odd_number_of_charts_leaves_no_gap(bundle: str, tmp_path: Path) -> None:
    for depth in (20, 56):
        run = make_run(depth, 0)
        assert run.result is not None
        result = run.result.model_copy(update={"epochs": make_curve(depth, 0, 3)})  # too few for the zoomed chart
        finish(tmp_path / "runs", run.model_copy(update={"result": result}))
    path = tmp_path / "report.html"
    path.write_text(page(summarise(load_records([tmp_path / "runs"]).records), bundle))
    with Browser() as browser:
        browser.open(path)
        first, *others = browser.ask("[...document.querySelectorAll('figure')].map((f) => f.offsetWidth)")
        assert len(others) == 2
        assert first > 2 * others[0] == 2 * others[1]
        assert browser.complaints == []


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed")
def test_a_nasty_name_does_nothing_in_a_browser(bundle: str, tmp_path: Path) -> None:
    nasty = (
        '"><script>document.title="broken out"</script><img src=x onerror="document.title=\'broken out\'"> · \\'
    )
    out = tmp_path / "runs"
    for number in (20, 56):
        run = make_run(number, 0, dataset=nasty, variant=nasty)
        finish(out, run.model_copy(update={"name": f"x{number}", "key": f"x{number}"}))
    path = tmp_path / "report.html"
    path.write_text(page(summarise(load_records([out]).records), bundle))
    with Browser() as browser:
        browser.open(path)
        assert browser.ask("document.title") == "Residual networks, compared"
        browser.ask("for (const d of document.querySelectorAll('details')) d.open = true")
        browser.wait_for("document.querySelectorAll('details.row .runs tbody tr').length === 2")
        assert browser.ask("document.querySelectorAll('img').length") == 0
        assert "<script>" in browser.ask("document.querySelector('.sortable tbody th').textContent")
        browser.open(path, width=390, height=844)  # a long name leaves room for the columns that scroll beside it
        assert browser.ask("document.querySelector('.sortable tbody th').offsetWidth") < 200
        assert browser.complaints == []


def test_no_two_sections_of_charts_have_one_title() -> None:
    """Of images held out and of the test set, and of two data sets of one name."""
    changes: list[dict[str, Any]] = [
        {}, {"result": {"evaluated_on": "val", "test_error": 8.0, "test_images": 10_000}}, {"fingerprint": "0" * 64},
    ]  # fmt: skip
    rows = summarise([test_table.make_run(0, **change) for change in changes])
    titles = [panel.title for panel in make_panels(rows)]
    assert titles == ["cifar10 000000000000…", "cifar10 ffffffffffff…", "cifar10 ffffffffffff…, images held out"]
    assert all(f"<h2>{title}</h2>" in page(rows) for title in titles)
    assert [panel.title for panel in make_panels(rows[:1])] == titles[:1]
