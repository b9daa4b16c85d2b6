"""What is installed: one import name, with every file that it reads, beside a user's own packages of any name."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from test_layout import PACKAGES, ROOT, modules

USERS = ("models", "loaders", "cluster", "results", "commands", "training")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built without a network from a copy: building leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for name in (*PACKAGES, "pyproject.toml", "README.md"):
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "records")
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, tree / name)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("resnet_harness-*.whl")
    return built


@pytest.fixture(scope="module")
def bare(wheel: Path) -> Path:
    """The Python of an environment that holds the wheel and nothing else."""
    folder = wheel.parent / "environment"
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    return folder / "bin" / "python"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder with packages of the same names as ours."""
    for name in USERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"OWNER = 'the user, {name}'\n")
    return tmp_path


def run(python: Path | str, program: str, folder: Path) -> None:
    done = subprocess.run([python, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


THEIRS = f"""
import importlib
for name in {USERS!r}:
    assert importlib.import_module(name).OWNER == "the user, " + name
"""


def test_the_wheel_has_one_top_level_name(wheel: Path) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"harness"}
    entry_points = zipfile.ZipFile(wheel).read("resnet_harness-0.1.0.dist-info/entry_points.txt").decode()
    assert "harness = harness.cli:main" in entry_points


def test_the_wheel_has_every_module_and_every_file_that_is_read(wheel: Path) -> None:
    read = [
        path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and not {"records", "__pycache__"} & set(path.parts) and path.suffix != ".md"
    ]
    expected = {path.relative_to(ROOT).as_posix() for path in read}
    expected = {name if name.startswith("harness/") else f"harness/{name}" for name in expected}
    assert {"harness/results/published.toml", "harness/cluster/slurm.sh"} <= expected
    assert len([name for name in expected if name.endswith(".py")]) == len(modules())
    installed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("harness/")}
    assert installed == expected


TRAINING = ("torch", "torchvision", "ray", "nvidia", "pynvml", "PIL", "sklearn", "safetensors", "optuna")


def test_who_only_reports_installs_nothing_to_train_with(wheel: Path) -> None:
    text = zipfile.ZipFile(wheel).read("resnet_harness-0.1.0.dist-info/METADATA").decode()
    needs = [
        line.removeprefix("Requires-Dist: ") for line in text.splitlines() if line.startswith("Requires-Dist: ")
    ]
    base = {re.split(r"[\[<>=]", line)[0] for line in needs if "extra ==" not in line}
    train = {re.split(r"[\[<>=]", line)[0] for line in needs if 'extra == "train"' in line}
    assert {"torch", "torchvision", "ray", "nvidia-dali-cuda120", "optuna", "nvidia-ml-py"} <= train
    assert {"numpy", "pandas", "pyarrow", "rich", "typer", "scipy"} <= base
    assert not base & train
    assert "Requires-Python: >=3.11" in text


WITHOUT = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {TRAINING!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.partition(".")[0])

sys.meta_path.insert(0, Absent())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in {TRAINING!r} else found(name, *more)
from harness import cli
sys.argv = ["harness", *sys.argv[1:]]
cli.main()
"""


def test_without_them_what_is_stored_is_read_and_training_says_in_a_line_what_it_needs(tmp_path: Path) -> None:
    stored = ROOT / "results" / "records" / "sample_digits_cpu_2026-11-22" / "runs"
    runs = shutil.copytree(stored, tmp_path / "runs")

    def harness(line: str) -> tuple[int, str, str]:
        words = [sys.executable, "-c", WITHOUT, *line.split()]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    for line in (
        "report", "report --format html", "report --format latex", f"compare {runs} --by loader", "why msra-8 runs",
        "verify", "export", "repro runs/digits_msra-8_s0_dd58573b", "--help", "run --help",
    ):  # fmt: skip
        code, out, err = harness(line)
        assert (code, bool(out)) == (0, True), (line, err)
    before = sorted(tmp_path.rglob("*"))
    for line, name in {
        "run --dataset digits --depths 8 --gpus 0": "torch", "tune --search lr=uniform(0,1)": "optuna",
        "eval --weights runs/none": "torch", "variants": "torch", "run --dry-run": "torch",
    }.items():  # fmt: skip
        code, _, err = harness(line)
        says = f"harness: error: {name} is not installed: training needs pip install 'resnet-harness[train]'\n"
        assert (code, err) == (2, says), line
    assert sorted(tmp_path.rglob("*")) == before, "nothing is stored"
    code, out, _ = harness("check --quick")
    assert (code, "missing  torch" in out) == (1, True)


def test_without_its_dependencies_the_wheel_leaves_the_users_names_alone(bare: Path, project: Path) -> None:
    ours = "import harness, harness.models, harness.loaders, harness.cluster, harness.results\n"
    elsewhere = f"assert not harness.models.__file__.startswith({str(ROOT)!r}), harness.models.__file__\n"
    run(bare, ours + elsewhere + THEIRS, project)
    absent = "for name in ('models', 'loaders', 'cluster', 'results'):\n assert not importlib.util.find_spec(name), name"
    run(bare, f"import harness, importlib.util\n{absent}", bare.parent)


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_beside_the_editable_install_the_users_names_are_theirs(project: Path, first: str) -> None:
    ours = """
import harness.cli, harness.commands.report, harness.results.report.table
from harness.models.variants import find_variant
from harness.loaders.datasets import load_dataset
"""
    run(sys.executable, ours + THEIRS if first == "ours" else THEIRS + ours, project)
    absent = "for name in ('models', 'loaders', 'cluster', 'results'):\n assert not importlib.util.find_spec(name), name"
    run(sys.executable, f"import harness, importlib.util\n{absent}", project / "models")
