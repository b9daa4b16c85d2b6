"""What is installed: one import name, with every file that it reads, beside a user's own packages of any name."""

from __future__ import annotations

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
