"""README and docs: every command is one that we take, every link leads somewhere, every table is what is stored."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from command import harness

from harness import cli, plan, plugins
from harness.search_space import parse_search

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "examples/compare.yml",
)
SAMPLE = ROOT / "results" / "records" / "sample_digits_cpu_2026-11-22" / "runs"
README_LINES = 150


def commands(page: Path) -> list[list[str]]:
    """The words of every command in the indented lines of a page, without comments."""
    text = page.read_text().replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ") for line in text.splitlines() if line.startswith("    ")]
    lines = [line.removeprefix("- run: ").partition(" >> ")[0] for line in lines]
    programs = ("harness", "make", "python", "sudo")
    return [shlex.split(line, comments=True) for line in lines if line.split(" ")[0] in programs]


COMMANDS = [
    pytest.param(words, id=f"{page.stem}: {' '.join(words)}") for page in PAGES for words in commands(page)
]


@pytest.fixture(scope="module", autouse=True)
def _plugin_of_the_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The plug-in that docs/extending.md shows, which commands name as my.py."""
    text = (ROOT / "docs/extending.md").read_text()
    block = text[text.index("    # my.py\n") : text.index("\nIt works in every command")]
    path = tmp_path_factory.mktemp("docs") / "my.py"
    path.write_text(textwrap.dedent(block))
    plugins.load_file(path)
    yield
    plugins.unload("my")


def test_the_pages_have_commands() -> None:
    assert len(COMMANDS) > 40


@pytest.mark.parametrize("words", [case for case in COMMANDS if case.values[0][0] == "harness"])  # type: ignore[index]
def test_a_harness_command_is_taken(words: list[str]) -> None:
    command = typer.main.get_command(cli.app).commands[words[1]]  # type: ignore[attr-defined]
    params = command.make_context(words[1], words[2:], resilient_parsing=False).params
    given = {name: word for name, word in params.items() if word not in (None, [], ())}
    if words[1] == "run" and "specs" not in given:  # those files are not here
        plan.check_grid(plan.make_grid(given))
    if words[1] == "tune":
        assert parse_search(given["search"])


@pytest.mark.parametrize("words", [case for case in COMMANDS if case.values[0][0] in ("python", "sudo")])  # type: ignore[index]
def test_a_script_is_there_and_takes_the_options(words: list[str]) -> None:
    script = ROOT / words[1]
    assert script.exists()
    if words[0] == "python":
        options = [word for word in words[2:] if word.startswith("--")]
        known = script.read_text()
        for option in options:  # argparse's own, or a default of `parse_options`
            assert f'"{option}"' in known or f" {option[2:].replace('-', '_')}=" in known, option


@pytest.mark.parametrize("words", [case for case in COMMANDS if case.values[0][0] == "make"])  # type: ignore[index]
def test_a_make_target_is_there(words: list[str]) -> None:
    assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize(
    "words", [case for case in COMMANDS if case.values[0][1:4] == ["run", "--dataset", "digits"]]
)  # type: ignore[index]
def test_the_digits_commands_plan_their_runs(words: list[str], tmp_path: Path, capsys: Any) -> None:
    line = shlex.join([*words[1:], "--dry-run", "--out", str(tmp_path)])
    code, out, err = harness(line, capsys)
    assert (code, err) == (0, "")
    assert "to do" in out


@pytest.mark.parametrize("words", [["report"], ["compare", "--by", "loader"], ["why", "msra-8"]])
def test_the_commands_that_read_work_on_the_stored_sample(words: list[str], capsys: Any) -> None:
    if words[0] == "why":
        words = [words[0], "1"]
    code, out, _ = harness(shlex.join([*words, str(SAMPLE)]), capsys)
    assert code == 0
    assert "msra" in out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for target in re.findall(
        r"`((?:docs|tests|models|loaders|cluster|results|benchmarks|harness)/[\w./-]+)`", page.read_text()
    ):
        assert page.name == "CHANGELOG.md" or (ROOT / target).exists(), target


def test_the_readme_is_short_and_its_table_is_what_is_stored(capsys: Any) -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= README_LINES
    _, printed, _ = harness(f"report {SAMPLE} --format markdown", capsys)
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(table) >= 5
    assert "\n".join(table) in text
