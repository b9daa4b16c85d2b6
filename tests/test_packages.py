"""Which package knows which library, and what must not be imported to parse, plan and report."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("harness", "models", "loaders", "cluster", "results")
HEAVY = ("torch", "ray", "nvidia", "sklearn", "torchvision", "scipy.stats", "pandas", "optuna", "altair")


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, by its dotted name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported(path: Path) -> set[str]:
    """Top-level names of the libraries that a file imports."""
    return {name.split(".")[0] for name in imported_modules(path)}


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("models", {"ray", "nvidia", "numpy"}),
        ("cluster", {"torch", "nvidia"}),
        ("results", {"torch", "ray", "nvidia"}),
    ],
)
def test_packages_know_only_their_libraries(package: str, forbidden: set[str]) -> None:
    for path in (ROOT / package).rglob("*.py"):
        found = imported(path) & forbidden
        if path.name == "workers.py":  # collectives of a run's ranks
            found -= {"torch"}
        assert not found, f"{path.relative_to(ROOT)} imports {found}"


def test_only_dali_py_knows_dali() -> None:
    users = [
        p.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for p in (ROOT / package).rglob("*.py")
        if "nvidia" in imported(p)
    ]
    assert users in ([], ["loaders/dali.py"])


def test_every_imported_library_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(w for extra in project["optional-dependencies"].values() for w in extra)]
    declared = {re.split(r"[\[<>=]", word)[0].lower() for word in wanted}
    providers = packages_distributions() | {"mlflow": ["mlflow-skinny"], "wandb": ["wandb"]}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for name in imported(path) - sys.stdlib_module_names - {"harness"}:
                assert {word.lower() for word in providers[name]} & declared, f"{path.relative_to(ROOT)}: {name}"


LIGHT = {
    "help": "import harness.cli as c, sys; sys.argv = ['harness', '--help']",
    "plan": """
from harness import plan, resources
grid = plan.Grid(variants=('he2015', 'msra'), depths=(20, 32))
plan.check_grid(grid)
allocation = resources.allocate(resources.Resources(), have_gpus=0, have_cpus=2, precision='fp32')
assert len(plan.expand(grid, allocation, fingerprint='f', train_images=50_000)) == 4
""",
    "run": """
import sys, tempfile
import harness.cluster.launch
from harness import cli, resources
def launch(train, specs, *_, **__):
    assert train.func.__module__ == 'harness.commands.run' and len(specs) == 1
    raise KeyboardInterrupt
    yield
harness.cluster.launch.launch, resources.join_cluster = launch, lambda *_, **__: None
with tempfile.TemporaryDirectory() as folder:
    line = 'run --dataset digits --depths 8 --epochs 3 --gpus 0 --loader resident --launcher ray --out ' + folder
    for words, code in ((line + ' --dry-run', 0), (line, 130)):
        sys.argv = ['harness', *words.split()]
        try:
            cli.main()
        except SystemExit as stop:
            assert stop.code == code, stop.code
""",
    "report": """
import pathlib
from rich.console import Console
from harness.commands.report import ReportOptions, print_report
runs = [pathlib.Path('results/records/sample_digits_cpu_2026-11-22/runs')]
print_report(runs, Console(file=open('/dev/null', 'w')), ReportOptions())
""",
}


@pytest.mark.parametrize("what", LIGHT)
def test_nothing_heavy_is_imported_to(what: str) -> None:
    # the driver of `run` reads the digits: scikit-learn, which takes the other two along
    heavy = [name for name in HEAVY if what != "run" or name not in ("sklearn", "scipy.stats", "pandas")]
    ending = f"\nimport sys\nprint([name for name in {heavy!r} if name in sys.modules])"
    main = "\ntry:\n    c.main()\nexcept SystemExit as e:\n    assert not e.code" if what == "help" else ""
    done = subprocess.run(
        [sys.executable, "-c", LIGHT[what] + main + ending], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
