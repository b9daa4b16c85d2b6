"""The page for everybody: by keyboard, by ear, on a phone, on paper, and with thousands of runs."""

from __future__ import annotations

import base64
import itertools
import os
import re
from pathlib import Path

import pytest
from chromium import Browser, find_chromium
from records import NOW
from test_page import make_run, page, page_data
from test_page_sweeps import make_sweep, store

from harness.results.report.charts import load_bundle, make_panels
from harness.results.report.page import make_page
from harness.results.rows import Row, summarise
from harness.results.store import finish, load_records
from harness.results.sweeps import load_sweeps
from harness.results.values import Failure

CHECKS = (Path(__file__).parent / "accessible.js").read_text(encoding="utf-8")
AXE = os.environ.get("AXE_CORE", "")
needs_browser = pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def bundle() -> str:
    return load_bundle(Path(os.environ["HARNESS_CACHE"]))


def make_rows(out: Path) -> list[Row]:
    """Eight rows of three variants, two depths, two data sets and two loaders, and failures of three kinds."""
    for variant, depth, dataset, loader in (
        ("msra", 20, "cifar10", "dali"), ("msra", 56, "cifar10", "dali"), ("msra", 20, "cifar10", "dataloader"),
        ("he2015", 20, "cifar10", "dali"), ("he2015", 56, "cifar10", "dali"), ("he2015", 56, "cifar10", "dataloader"),
        ("fattorib", 20, "digits", "dali"), ("fattorib", 56, "digits", "dali"),
    ):  # fmt: skip
        for seed in range(2):
            finish(out, make_run(depth, seed, loader, dataset=dataset, variant=variant))
    room = Failure(kind="OOM", message="CUDA out of memory")
    for seed in range(5, 25):
        finish(out, make_run(20 if seed % 2 else 56, seed, "dali", room))
    finish(
        out, make_run(20, 30, "dali", Failure(kind="killed", message="the node was lost", traceback="Traceback"))
    )
    return summarise(load_records([out]).records)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, bundle: str) -> Path:
    """A page of rows, failures and a sweep."""
    folder = tmp_path_factory.mktemp("page")
    rows = make_rows(folder / "runs")
    store(folder / "runs", make_sweep())
    path = folder / "report.html"
    path.write_text(make_page(rows, bundle=bundle, made_at=NOW, sweeps=load_sweeps([folder / "runs"]).sweeps))
    return path


OPEN = "for (const details of document.querySelectorAll('details')) details.open = true"


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1400, False), (1400, True), (390, False), (390, True)])
def test_no_barrier(width: int, dark: bool, file: Path) -> None:
    with Browser() as browser:
        browser.open(file, width=width, height=900, dark=dark)
        browser.ask(OPEN)
        browser.wait_for("document.querySelectorAll('details.row .runs tbody tr').length >= 16")
        browser.ask("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 100)))")  # sizes are seen
        assert browser.ask(CHECKS) == []
        if AXE:
            browser.ask(Path(AXE).read_text(encoding="utf-8") + ";0")
            told = browser.ask(
                "axe.run().then((r) => r.violations.map((v) => [v.id, v.nodes.map((n) => n.html)]))"
            )
            assert told == []


@needs_browser
@pytest.mark.parametrize(
    ("plant", "rule"),
    [
        ("document.querySelector('.chart').removeAttribute('aria-label')", "no name: <div"),
        ("document.querySelector('.filters label').replaceWith(document.querySelector('select'))", "no label"),
        ("document.querySelector('h2').outerHTML = '<h3>x</h3>'", "h3 after h1"),
        ("document.querySelector('h1').style.color = '#bbb'", "contrast 1."),
        ("document.querySelector('.chart svg').removeAttribute('aria-hidden')", "no name: <g"),
        ("document.documentElement.removeAttribute('lang')", "html has no lang"),
        ("document.querySelector('thead button').textContent = ''", "an empty header"),
        ("document.querySelector('a').textContent = ''", "no name"),
        ("document.body.append('x', document.createElement('p')); document.querySelector('body > p').textContent = 'x'",
         "beside the landmarks"),
    ],
)  # fmt: skip
def test_a_barrier_would_be_found(plant: str, rule: str, file: Path) -> None:
    with Browser() as browser:
        browser.open(file)
        browser.ask(f"{plant}; 0")
        assert any(fault.startswith(rule) for fault in browser.ask(CHECKS))


SHOWN = "[...document.querySelectorAll('#comparison tbody tr:not(.group)')].map((r) => r.cells[0].textContent)"
CHOOSE = """(() => {{
  const label = [...document.querySelectorAll('.filters label')].find((l) => l.textContent.startsWith('{} '));
  const select = label.querySelector('select');
  select.value = '{}';
  select.dispatchEvent(new Event('change'));
}})()"""


@needs_browser
def test_rows_are_filtered_and_grouped(file: Path) -> None:
    with Browser() as browser:
        browser.open(file)
        everything = browser.ask(SHOWN)
        assert len(everything) == 8
        browser.ask(CHOOSE.format("variant", "msra"))
        assert browser.ask(SHOWN) == ["msra-20", "msra-20", "msra-56"]
        assert browser.ask("document.querySelector('.filters output').textContent") == "3 of 8 rows"
        told = "[...document.querySelectorAll('.notes li')].filter((e) => e.getClientRects().length).map((e) => e.value)"
        cited = (
            "[...document.querySelectorAll('header sup a, #comparison sup a')].map((a) => Number(a.textContent))"
        )
        assert browser.ask(told) == sorted(set(browser.ask(cited))), "notes of the rows that are shown"
        visible = "[...document.querySelectorAll('{}')].filter((e) => e.getClientRects().length).length"
        assert browser.ask(visible.format("details.row")) == 3
        assert browser.ask(visible.format(".chips button")) == 3
        points = "document.querySelectorAll('[data-panel=\"0\"] [data-chart=seconds] .mark-symbol path').length"
        browser.wait_for(f"{points} === 3")
        browser.ask(CHOOSE.format("loader", "dataloader"))
        assert browser.ask(SHOWN) == ["msra-20"]
        browser.ask(CHOOSE.format("loader", ""))
        browser.ask(CHOOSE.format("variant", ""))
        browser.ask(CHOOSE.format("group by", "depth"))
        groups = "[...document.querySelectorAll('#comparison tr.group')].map((r) => r.textContent)"
        assert browser.ask(groups) == ["20 · 4 rows", "56 · 4 rows"]
        assert [name[-2:] for name in browser.ask(SHOWN)] == ["20"] * 4 + ["56"] * 4
        errors = "[...document.querySelectorAll('#comparison thead button')].findIndex((b) => b.textContent === 'error %')"
        browser.ask(f"document.querySelectorAll('#comparison thead button')[{errors}].click()")
        assert browser.ask(groups) == ["20 · 4 rows", "56 · 4 rows"], "sorted within the groups"
        browser.ask(CHOOSE.format("group by", ""))
        assert sorted(browser.ask(SHOWN)) == sorted(everything)
        assert browser.complaints == []


@needs_browser
def test_columns_that_scroll_say_so(file: Path, bundle: str, tmp_path: Path) -> None:
    narrow = tmp_path / "narrow.html"
    rows = summarise(load_records([file.parent / "runs"]).records)
    narrow.write_text(page(rows, bundle, columns=("variant", "depth", "error")))
    hint = "getComputedStyle(document.querySelector('#comparison .scroll'), '::before').content"
    with Browser() as browser:
        browser.open(file, width=390, height=844)
        assert "scroll sideways" in browser.ask(hint)
        assert browser.ask("document.querySelector('#comparison .scroll').tabIndex") == 0
        browser.open(narrow, width=1400)
        assert browser.ask(hint) == "none"
        assert browser.ask("document.querySelector('#comparison .scroll').hasAttribute('tabindex')") is False


@needs_browser
def test_it_is_printed_on_a_few_pages(file: Path) -> None:
    with Browser() as browser:
        browser.open(file)
        pdf = base64.b64decode(browser.call("Page.printToPDF", preferCSSPageSize=True)["data"])
        assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 6


def test_equal_failures_are_one_line_with_a_count(tmp_path: Path) -> None:
    text = page(make_rows(tmp_path))
    assert text.count('<article class="failed">') == 2
    assert "<strong>OOM</strong> 20 runs: CUDA out of memory" in text
    assert "<strong>killed</strong> msra-20 seed 30: the node was lost" in text
    notes = [note for note in re.findall(r'<li id="note-\d+">(.*?)</li>', text) if "failed" in note]
    assert notes[1:] == ["msra-20 seed 30 failed, killed: the node was lost"]
    assert re.fullmatch(r"20 runs failed, OOM: CUDA out of memory: (msra-20 seed \d+, ){4}…", notes[0])


def test_numbers_are_rounded_for_people(tmp_path: Path) -> None:
    for k, lr in enumerate((0.0037037037037037034, 0.1)):
        run = make_run(20, 0, "dali")
        spec = run.spec | {"recipe": run.spec["recipe"] | {"lr": lr}, "overrides": [f"lr={lr}"]}
        finish(tmp_path, run.model_copy(update={"spec": spec, "name": f"x{k}", "key": f"x{k}"}))
    text = page(summarise(load_records([tmp_path]).records))
    assert "0.0037037" in text
    assert "0.00370370" not in text
    assert "0.00370370" not in str(page_data(text))


@pytest.mark.parametrize("last", [2, 3, 5, 12, 180])
@needs_browser
def test_epochs_are_whole_numbers(last: int, tmp_path: Path, bundle: str) -> None:
    run = make_run(20, 0, "dali")
    assert run.result is not None
    epochs = tuple(run.result.epochs[0].model_copy(update={"epoch": k}) for k in range(1, last + 1))
    finish(tmp_path, run.model_copy(update={"result": run.result.model_copy(update={"epochs": epochs})}))
    path = tmp_path / "report.html"
    path.write_text(page(summarise(load_records([tmp_path]).records), bundle))
    with Browser() as browser:
        browser.open(path, width=390, height=844)
        axis = "[...document.querySelectorAll('[data-chart=curves] .role-axis-label')][0]"
        texts = f"[...{axis}.querySelectorAll('text')].filter((t) => t.getAttribute('opacity') !== '0')"
        ticks = browser.ask(f"{texts}.map((t) => Number(t.textContent))")
        assert len(set(ticks)) == len(ticks) >= 2, ticks
        assert all(tick == int(tick) for tick in ticks)
        boxes = browser.ask(f"{texts}.map((t) => t.getBoundingClientRect()).map((b) => [b.left, b.right])")
        assert all(right < left for (_, right), (left, _) in itertools.pairwise(boxes)), "labels collide"


@needs_browser
def test_names_in_a_chart_do_not_collide(tmp_path: Path, bundle: str) -> None:
    """Twenty networks of nearly the same error and seconds, on a screen and on a phone."""
    for k in range(20):
        run = make_run(20, 0, "dali", variant=f"variant{k}")
        assert run.result is not None
        result = run.result.model_copy(update={"final_error": 8 - 0.02 * k, "epoch_seconds": 3 + 0.05 * k})
        finish(tmp_path, run.model_copy(update={"result": result}))
    rows = summarise(load_records([tmp_path]).records)
    (panel,) = make_panels(rows)
    assert 1 <= sum("name" in point for point in panel.datasets["seconds"]) < 20
    path = tmp_path / "report.html"
    path.write_text(page(rows, bundle))
    with Browser() as browser:
        for width in (1400, 390):
            browser.open(path, width=width)
            words = "[...document.querySelectorAll('[data-chart=seconds] .mark-text text')].map((t) => t.getBoundingClientRect())"
            boxes = browser.ask(f"{words}.map((b) => [b.left, b.top, b.right, b.bottom])")
            assert boxes
            for i, a in enumerate(boxes):
                for b in boxes[:i]:
                    assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3], (width, a, b)


def test_chips_show_each_rows_shape(tmp_path: Path) -> None:
    (first, *_) = page_data(page(make_rows(tmp_path)))["panels"]
    assert {style[2] for style in first["rows"].values()} == {"circle", "square"}


def test_a_page_of_thousands_stays_small(tmp_path: Path, bundle: str) -> None:
    """1 MB for one run, 4 MB for 2,000, each a row of its own, as far as 450 of them tell."""
    sizes = {}
    for count in (1, 450):
        for k in range(count):
            finish(tmp_path, make_run(20, 0, "dali", variant=f"variant{k}"))
        sizes[count] = len(page(summarise(load_records([tmp_path]).records), bundle).encode())
    assert sizes[1] < 1_000_000
    per_run = (sizes[450] - sizes[1]) / 449
    assert sizes[1] + 2_000 * per_run < 4_000_000, per_run
