"""Sweeps in the page: the trials of a small made-up trials.json as table, importance and plots."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
from chromium import Browser, find_chromium
from records import NOW, make_epoch, make_record
from rich.console import Console
from test_page import NASTY, Tags

from harness.commands.report import make_html, say_page
from harness.results.report.charts import load_bundle, write_charts
from harness.results.report.page import make_page
from harness.results.report.sweeps import RANGE, draw_all, make_sweep_panel
from harness.results.rows import summarise
from harness.results.store import SWEEPS, Loaded, finish, load_records, start, write_epochs
from harness.results.sweeps import Dimension, Sweep, Sweeps, Trial, format_value, load_sweeps
from harness.results.values import Pruned

VALUES = [9.0, 12.0, 41.0, 10.5, 60.0, 11.0]


def make_sweep(**changes: Any) -> dict[str, Any]:
    """Seven trials over three fields: four finished, two pruned, one failed before its first epoch."""
    trials: list[dict[str, Any]] = []
    for k, value in enumerate(VALUES):
        pruned = value > 20
        epochs = 3 if pruned else 9
        trials.append(
            {
                "number": k + 1, "run": f"cifar10_msra-20_s0_{k}", "key": f"k{k}", "state": "pruned" if pruned else "finished",
                "fields": {"lr": 0.01 * 10 ** (k * 0.4), "momentum": 0.5 + 0.08 * k, "shortcut": "AB"[k % 2]},
                "value": None if pruned else value, "last": value, "epochs": epochs, "seconds": 2.0 * epochs,
                "reason": "by asha after epoch 3" if pruned else "",
                "curve": [[e, value + epochs - e] for e in range(1, epochs + 1)],
            }
        )  # fmt: skip
    trials.append(
        {
            "number": 7, "run": "cifar10_msra-20_s0_6", "key": "k6", "state": "failed", "value": None, "last": None,
            "fields": {"lr": 0.5, "momentum": 0.9, "shortcut": "A"}, "epochs": 0, "seconds": 0.0,
            "reason": "NaN: loss is not finite", "curve": [],
        }
    )  # fmt: skip
    return {
        "schema_version": 1, "name": "msra-20_cifar10_20260102-030405", "variant": "msra", "depth": 20, "dataset": "cifar10",
        "metric": "error", "selected_on": "val", "val": 5000, "epochs": 9, "scheduler": "asha", "search_algorithm": "random",
        "total": 8,
        "dimensions": [
            {"field": "lr", "function": "loguniform", "values": [0.01, 1.0], "log": True},
            {"field": "momentum", "function": "uniform", "values": [0.5, 0.9], "log": False},
            {"field": "shortcut", "function": "choice", "values": ["A", "B"], "log": False},
        ],
        "trials": trials,
        "importance": {
            "how": "main effects", "epoch": 3, "trials": 6, "null": 0.4,
            "fields": [{"field": "lr", "value": 0.77, "sign": "less is better", "p": 0.005},
                       {"field": "shortcut", "value": 0.2, "sign": "A is best", "p": 0.25}],
        },
        "late_importance": None,
        **changes,
    }  # fmt: skip


def store(out: Path, sweep: dict[str, Any], name: str = "one") -> Path:
    folder = out / SWEEPS / name
    folder.mkdir(parents=True)
    (folder / "trials.json").write_text(json.dumps(sweep))
    return folder


def page(out: Path, bundle: str = "/* vega */") -> str:
    loaded, found = load_records([out]), load_sweeps([out])
    rows = summarise(loaded.records, loaded.interrupted)
    problems = [*loaded.problems, *found.problems]
    return make_page(rows, bundle=bundle, made_at=NOW, problems=problems, sweeps=found.sweeps)


def test_the_section_says_what_was_searched_and_lists_every_trial(tmp_path: Path) -> None:
    store(tmp_path, make_sweep())
    text = page(tmp_path)
    for words in (
        "Sweep of msra-20 on cifar10",
        "7 of 8 trials of 9 epochs: 4 finished, 2 pruned, 1 failed · scheduler asha · proposals random",
        "judged by error % of 5,000 held-out training images",
        "lr=loguniform(0.01,1), momentum=uniform(0.5,0.9), shortcut=choice(A,B)",
        "main effects, 6 trials at epoch 3; by chance up to 0.40",
        "less is better, p = 0.005",
        '<span class="warn">pruned</span>, by asha after epoch 3',
        '<span class="bad">failed</span>, NaN: loss is not finite',
        "cifar10_msra-20_s0_4",
    ):
        assert words in text
    numbers = re.findall(r'<th scope="row" class="r" data-v="(\d+)">', text)
    assert numbers == ["1", "4", "6", "2", "3", "5", "7"]  # whole ones by value, then the pruned, failed last
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    on_test = make_sweep(selected_on="test", val=0)
    assert "TEST SET" in Sweep.model_validate(on_test).judged_by
    assert "Sweep of msra on" in make_page(
        [], bundle="", made_at=NOW, sweeps=[Sweep.model_validate(make_sweep(depth=None, trials=[]))]
    )


def test_what_a_search_writes_is_what_a_report_reads(tmp_path: Path) -> None:
    sweep = Sweep.model_validate(make_sweep())
    assert json.loads(sweep.to_json()) == make_sweep()
    trial = Trial(number=8, run="r", key="k", fields={"lr": 0.1, "momentum": 0.5, "shortcut": "A"})
    trial.add_epoch(1, 20.0, 2.0004)
    trial.add_epoch(2, 15.0, 2.0004)
    assert (trial.epochs, trial.last, trial.value, trial.seconds) == (2, 15.0, None, 4.0)
    trial.end("finished", 14.5, "was done already")
    assert (trial.state, trial.value, trial.last, trial.reason) == ("finished", 14.5, 14.5, "was done already")
    lr = Dimension(field="lr", function="loguniform", values=(0.01, 1.0))
    assert lr.log
    assert str(lr) == "lr=loguniform(0.01,1)"
    assert format_value(0.0037037037037037034) == "0.0037037037037037034"
    assert format_value((True, None, 1 / 3), exact=False) == "true,none,0.333333"


def test_a_trial_links_to_the_row_of_its_run(tmp_path: Path) -> None:
    run = make_record(0, 8.3)
    folder = finish(tmp_path, run)
    sweep = make_sweep()
    sweep["trials"][0]["run"] = folder.name
    store(tmp_path, sweep)
    tags = Tags()
    tags.feed(page(tmp_path))
    links = [link for link in tags.links if link.startswith("#row-")]
    assert links == ["#row-0"]
    assert "row-0" in tags.ids


def test_a_trial_has_one_colour_in_every_chart(tmp_path: Path) -> None:
    sweep = make_sweep()
    names = []
    for k, (error, lr) in enumerate(((8.3, 0.1), (8.9, 0.2), (9.5, 0.3))):
        run = make_record(0, error, settings=(f"lr={lr}",))
        sweep["trials"][k] |= {"run": (name := finish(tmp_path, run).name), "value": error, "last": error}
        names.append(name)
    rows = summarise(load_records([tmp_path]).records)
    (panel,), (searched,) = draw_all(rows, [Sweep.model_validate(sweep)])
    styles = dict(zip([row.done[0].folder.name for row in rows], panel.rows.values(), strict=True))
    assert {name: style.colour for name, style in styles.items()} == {n: searched.colours[n] for n in names}
    assert len({style.colour for style in styles.values()}) == 3
    text = make_page(rows, bundle="", made_at=NOW, sweeps=[Sweep.model_validate(sweep)])
    for name in names:
        assert text.count(f'class="swatch" style="background:{searched.colours[name]}"') == 2, "row and trial"


def test_a_pruned_trial_does_not_look_like_a_finished_one(tmp_path: Path) -> None:
    sweep = make_sweep()
    for k, error in enumerate((8.3, 8.9, 60.0, 8.9, 61.0)):
        settings, epochs = (f"lr={(k + 1) / 10}",), (make_epoch(1, error=error),)
        run = make_record(0, error, settings=settings, result={"epochs": epochs})
        sweep["trials"][k] |= {"run": run.name, "last": error}
        if error > 50:
            pruned = Pruned(sweep="s", by="asha", epoch=3, of=9, error=error, evaluated_on="test")
            run = run.model_copy(update={"status": "pruned", "result": None, "pruned": pruned})
            write_epochs(start(tmp_path, run.name, run.spec), epochs)
        finish(tmp_path, run)
    loaded, found = load_records([tmp_path]), Sweep.model_validate(sweep)
    assert not loaded.problems
    rows = summarise(loaded.records)
    panels, _ = draw_all(rows, [found])
    styles = {label: style for panel in panels for label, style in panel.rows.items()}
    assert len(styles) == len({(style.colour, style.shape) for style in styles.values()}) == 5
    text = make_page(rows, bundle="", made_at=NOW, sweeps=[found])
    swatches = re.findall(r'class="swatch" style="background:(#[0-9a-f]{6})" data-shape="([a-z-]+)"', text)
    assert sorted(swatches) == sorted((style.colour, style.shape) for style in styles.values())
    coloured = re.findall(r'data-v="(\d+)"><i class="swatch"', text)
    assert sorted(coloured) == [str(t.number) for t in found.trials if t.state == "finished"]


def test_the_parallel_plot_has_every_value_at_its_place() -> None:
    sweep = Sweep.model_validate(make_sweep())
    panel = make_sweep_panel(sweep)
    names = ["parallel", "slice-lr", "slice-momentum", "slice-shortcut"]
    assert [chart.name for chart in panel.charts] == names
    caption, spec = panel.charts[0].caption, panel.charts[0].spec
    assert "faint: a trial that was pruned" in caption
    assert "1 of 7 trials are not drawn" in caption
    lines, ticks = panel.datasets["trials"], spec["layer"][2]["data"]["values"]
    assert len(lines) == 6
    for number, value in enumerate(VALUES, 1):
        (places,) = (line["place"] for line in lines if line["trial"] == number)
        lr = 0.01 * 10 ** ((number - 1) * 0.4)
        assert places[0] == pytest.approx((math.log(lr) - math.log(0.01)) / math.log(100), abs=1e-4)
        assert places[1] == pytest.approx((number - 1) * 0.2, abs=1e-4)
        assert places[2] == (number - 1) % 2
        assert places[3] == pytest.approx((value - 9) / 51, abs=1e-4)
    assert {(t["place"], t["text"]) for t in ticks if t["axis"] == 0} == {(0, "0.01"), (0.5, "0.1"), (1, "1")}
    assert [t["text"] for t in ticks if t["axis"] == 2] == ["A", "B"]
    assert {line["trial"] for line in lines if not line["whole"]} == {3, 5}
    # the colours are spread over the finished ones
    colours = {VALUES[line["trial"] - 1]: line["colour"] for line in lines}
    assert colours[9.0] == RANGE[0]
    assert colours[12.0] == colours[41.0] == colours[60.0] == RANGE[-1]
    assert len(set(colours.values())) == 4


def test_slices_are_on_the_scale_that_was_drawn_from() -> None:
    panel = make_sweep_panel(Sweep.model_validate(make_sweep()))
    by_field = {chart.name: chart.spec["encoding"]["x"] for chart in panel.charts if "slice" in chart.name}
    assert by_field["slice-lr"]["scale"] == {"type": "log", "domain": [0.01, 1.0], "nice": False}
    assert by_field["slice-momentum"]["scale"]["type"] == "linear"
    assert by_field["slice-shortcut"]["scale"]["domain"] == ["A", "B"]
    values, x = panel.datasets["trials"], by_field["slice-lr"]["field"]
    assert {(v[x], v["value"]) for v in values} == {(0.01 * 10 ** (k * 0.4), y) for k, y in enumerate(VALUES)}
    alone = make_sweep_panel(Sweep.model_validate(make_sweep(trials=make_sweep()["trials"][:1])))
    for searched, of_one in ((panel, False), (alone, True)):  # else the axis of one trial has one tick
        assert [c.spec["encoding"]["y"]["scale"]["zero"] for c in searched.charts[1:]] == [of_one] * 3
    nothing = make_sweep(trials=make_sweep()["trials"][-1:])
    assert make_sweep_panel(Sweep.model_validate(nothing)).charts == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "trials.json is broken: Invalid JSON"),
        ("[]", "trials.json is broken: Input should be"),
        (json.dumps(make_sweep(epochs="many")), "epochs: Input should be a valid integer"),
        (json.dumps(make_sweep(surprise=1)), "surprise: Extra inputs are not permitted"),
        (json.dumps(make_sweep(dimensions=[{"field": "lr", "function": "loguniform", "values": [0, 1], "log": True}])),
         "lr is 0, and loguniform gives no such value"),
        (json.dumps(make_sweep(dimensions=[{"field": "x", "function": "choice", "values": [1]}])), "trial 1 has no x"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named_and_the_others_are_shown(tmp_path: Path, text: str, reason: str) -> None:
    store(tmp_path, make_sweep())
    (store(tmp_path, {}, "broken-one") / "trials.json").write_text(text)
    found = load_sweeps([tmp_path, tmp_path])  # each once
    assert len(found.sweeps) == 1
    assert [p.path.name for p in found.problems] == ["broken-one"]
    assert reason in found.problems[0].reason
    assert "\n" not in found.problems[0].reason
    shown = page(tmp_path)
    assert "<strong>not read</strong> broken-one: trials.json is broken" in shown
    assert shown.count('<section class="sweep"') == 1


def test_values_that_are_no_numbers_are_passed_over(tmp_path: Path) -> None:
    sweep = make_sweep()
    sweep["trials"][2] |= {"last": math.nan, "curve": [[1, math.nan]]}
    sweep["trials"][3] |= {"last": math.inf, "value": math.inf}
    sweep["importance"]["fields"][0]["value"] = math.nan
    store(tmp_path, sweep)
    text = page(tmp_path)
    assert "3 of 7 trials are not drawn" in text
    assert 'data-v="nan"' not in text
    assert 'data-v="inf"' not in text


def make_nasty() -> dict[str, Any]:
    trials = make_sweep()["trials"]
    for trial in trials:
        trial["fields"] = {NASTY: NASTY, "a.b[0]'": 0.5}
        trial["run"] = trial["reason"] = NASTY
    dimensions = [{"field": NASTY, "function": "choice", "values": [NASTY, "x"]},
                  {"field": "a.b[0]'", "function": "uniform", "values": [0, 1]}]  # fmt: skip
    field = {"field": NASTY, "value": 2.0, "sign": NASTY, "p": 0.5}
    weights = {"how": NASTY, "epoch": 1, "trials": 4, "fields": [field], "null": 0.5}
    names = dict.fromkeys(("name", "variant", "dataset", "metric", "scheduler", "search_algorithm"), NASTY)
    return make_sweep(trials=trials, dimensions=dimensions, importance=weights, **names)


def test_no_name_breaks_out(tmp_path: Path) -> None:
    store(tmp_path, make_nasty())
    text = page(tmp_path)
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    assert "img" not in tags.tags
    assert tags.tags.count("script") == 3
    assert "onerror" not in tags.attributes
    assert "\x1b" not in text
    folder = tmp_path / "charts"
    written = write_charts([*map(make_sweep_panel, load_sweeps([tmp_path]).sweeps)], folder)
    assert len(written) == len(set(written)) == 6
    assert {path.parent for path in written} == {folder}


def test_the_plots_are_drawn_without_a_browser(tmp_path: Path) -> None:
    sweep = Sweep.model_validate(make_sweep())
    written = write_charts([make_sweep_panel(sweep)], tmp_path)
    charts = ("parallel", "slice-lr", "slice-momentum", "slice-shortcut")
    assert [path.name for path in written] == [f"{sweep.name}-{c}.{e}" for c in charts for e in ("svg", "png")]
    svg = written[0].read_text()
    for words in ("shortcut", "error %", "momentum", "0.01", "msra-20 on cifar10"):
        assert words in svg
    assert written[1].read_bytes().startswith(b"\x89PNG")


def test_a_folder_of_nothing_but_a_sweep_has_a_page(tmp_path: Path) -> None:
    store(tmp_path, make_sweep())
    written = say_page(tmp_path, Console(quiet=True))
    assert written is not None
    assert "Sweep of msra-20" in written.read_text()
    assert "Sweep of" not in make_html([], Loaded([], [], []), Sweeps([], []))


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed")
def test_in_a_real_browser(tmp_path: Path) -> None:
    folder = finish(tmp_path, make_record(0, 8.3))
    sweep = make_sweep()
    sweep["trials"][0]["run"] = folder.name
    store(tmp_path, sweep)
    store(tmp_path, make_nasty(), "two")
    path = tmp_path / "report.html"
    path.write_text(page(tmp_path, load_bundle(Path(os.environ["HARNESS_CACHE"]))))
    with Browser() as browser:
        browser.open(path)
        lines = "document.querySelectorAll('#sweep-0 [data-chart=parallel] .mark-line path')"
        assert browser.ask(f"{lines}.length") == 6
        faint = f"[...{lines}].filter((p) => Number(p.getAttribute('stroke-opacity')) < 0.5).length"
        assert browser.ask(faint) == 2
        dots = "document.querySelectorAll('#sweep-0 [data-chart=slice-{}] .mark-symbol path').length"
        for field in ("lr", "momentum", "shortcut"):
            assert browser.ask(dots.format(field)) == 6
        first = "[...document.querySelectorAll('#sweep-0 tbody tr')].filter((r) => r.cells.length > 4).map((r) => r.cells[{}].textContent)"
        browser.ask("document.querySelectorAll('#sweep-0 .sortable thead button')[4].click()")
        assert browser.ask(first.format(4)) == ["9", "10.5", "11", "12", "41", "60", "–"]
        browser.ask("document.querySelector('#sweep-0 a[href=\"#row-0\"]').click()")
        browser.wait_for("document.querySelector('#row-0').open")
        ink = "document.querySelector('[data-chart=parallel] .mark-text text').getAttribute('fill')"
        light = browser.ask(ink)
        browser.open(path, width=390, height=844, dark=True)
        assert browser.ask(ink) != light
        assert browser.ask("document.documentElement.scrollWidth") <= 390
        width = "document.querySelector('[data-chart=parallel] svg').getBoundingClientRect().width"
        assert browser.ask(width) <= 390
        assert browser.complaints == []
