"""Every measured figure of README.md, docs/ and results/records, written from the stored readings.

    python benchmarks/claims.py            write them
    python benchmarks/claims.py --check    exit code 1 and the pages where text and readings differ

A figure stands in a page as `<!-- = EXPRESSION -->text<!-- / -->`: the text is replaced by the expression's value. An
expression calls the functions below; PATH is a file of readings, or a folder of runs, below results/records.
"""

from __future__ import annotations

import importlib
import json
import re
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from rounds import ROOT, Ratio, harness, make_table, ratio

RECORDS = ROOT / "results" / "records"
MODULES = {"loaders": "loader_speed"}  # by a file's name, where it is another
FIGURE = re.compile(r"(<!-- = (.*?) -->)(.*?)(<!-- / -->)", re.DOTALL)


@cache
def load(path: str) -> dict[str, Any]:
    """A file of readings."""
    content: dict[str, Any] = json.loads((RECORDS / path).read_text(encoding="utf-8"))
    return content


def table(path: str) -> str:
    """The benchmark's own table."""
    return f"\n\n{importlib.import_module(MODULES.get(Path(path).stem, Path(path).stem)).describe(load(path))}\n\n"


def conditions(path: str) -> str:
    """Command, commit and versions behind a file of readings."""
    content = load(path)
    machine = content.get("machine", {})
    versions = {"torch": machine.get("torch"), **content["versions"]} | {"python": machine.get("python")}
    shown = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "ray") if versions.get(name))
    tree = " with changes that were not committed" if content["dirty"] else ""
    command = " ".join(Path(word).name if word.endswith(".py") else word for word in content["command"])
    return f"`python benchmarks/{command}`, commit {content['commit'][:7]}{tree}; {shown}"


def report(path: str, *words: str) -> str:
    """What `harness report` prints of a folder of runs, as Markdown."""
    return _printed("report", path, words)


def rows(path: str, *words: str) -> str:
    """The table of what `harness report` prints, and the notes that it refers to."""
    table = re.search(r"^\|.+?(?=\n\n- |\Z)", report(path, *words), re.DOTALL | re.MULTILINE)
    return f"\n\n{table[0].strip() if table else ''}\n\n"


def compare(path: str, *words: str) -> str:
    """What `harness compare` prints of a folder of runs, as Markdown."""
    return _printed("compare", path, words)


def _printed(name: str, path: str, words: tuple[str, ...]) -> str:
    command = harness(name, RECORDS / path, "--format", "markdown", *words)
    return (
        f"\n\n{subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()}\n\n"
    )


def trials(path: str) -> str:
    """The trials of a sweep's folder, the best first; errors of the images they were judged on."""
    sweep = load(f"{path}/trials.json")
    ended = {run.name.removesuffix(".partial"): run for run in (RECORDS / path).parents[1].iterdir()}
    rows = []
    for trial in sorted(sweep["trials"], key=lambda t: (-t["epochs"], t["last"])):
        record = json.loads((ended[trial["run"]] / "record.json").read_text(encoding="utf-8"))
        test = (record["result"] or {}).get("test_error")
        cells = (trial["number"], trial["state"], f"{trial['epochs']}/{sweep['epochs']}", f"{trial['last']:.1f}",
                 "–" if test is None else f"{test:.2f}")  # fmt: skip
        rows.append([*cells, *(f"{value:.4g}" for value in trial["fields"].values())])
    fields = [dimension["field"] for dimension in sweep["dimensions"]]
    header = ("trial", "state", "epochs", "held-out error %", "test error %", *fields)
    return f"\n\n{make_table(header, rows)}\n\n"


def epochs_trained(path: str) -> str:
    """Of all that a sweep without a scheduler would train: "56 of 144"."""
    sweep = load(f"{path}/trials.json")
    return f"{sum(t['epochs'] for t in sweep['trials'])} of {sweep['epochs'] * len(sweep['trials'])}"


def seconds(path: str, name: str, digits: int = 2) -> str:
    """The median of a command's readings."""
    return f"{statistics.median(load(path)['readings'][name]):.{digits}g}"


def speed_ratio(path: str, a: str, b: str, depth: int = 20) -> Ratio:
    """Seconds of way `a` over those of `b`; a way is "name engine precision loader"."""
    ways = {
        " ".join((way["name"], way["engine"], way["precision"], way["loader"])): way["seconds"]
        for way in load(path)["readings"]
        if way["depth"] == depth
    }
    return ratio(*([statistics.median(turn) for turn in ways[name]] for name in (a, b)))


def efficiency(path: str, name: str, depth: int = 20) -> str:
    """Of so many workers, "strong 2", against one: 86 %."""
    ways = load(path)["readings"][str(depth)]
    kind, workers = name.split()
    scale_by = int(workers) if kind == "strong" else 1
    alone, together = ([reading["engine_ms"] for reading in ways[way]] for way in ("strong 1", name))
    return f"{100 * ratio(alone, [scale_by * each for each in together]).value:.0f} %"


def total(path: str, field: str) -> int:
    """The number of readings for which a field holds."""
    return sum(bool(reading[field]) for reading in load(path)["readings"])


OF_FILES = (table, conditions, seconds, speed_ratio, efficiency, total)
OF_FOLDERS = (report, rows, compare, trials, epochs_trained)
FUNCTIONS = {function.__name__: function for function in (*OF_FILES, *OF_FOLDERS)}


def write(text: str) -> str:
    """A page with the value of every expression beside it."""

    def value(match: re.Match[str]) -> str:
        return match[1] + str(eval(match[2], {"__builtins__": {}}, FUNCTIONS)) + match[4]

    return FIGURE.sub(value, text)


def pages() -> list[Path]:
    """README.md, docs/ and the README of every record."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(RECORDS.glob("*/README.md"))]


def main() -> int:
    """Write or check."""
    wrong = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (right := write(text)) != text:
            wrong.append(page)
            if "--check" not in sys.argv:
                page.write_text(right, encoding="utf-8")
    for page in wrong:
        print(f"{page.relative_to(ROOT)}: text and readings differ")
    return int(bool(wrong) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
