"""The shape of the code: which module may import which, without circles."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("harness", "models", "loaders", "cluster", "results")
LEAF = "harness.words"


@cache
def modules() -> dict[str, Path]:
    """Every module of the import name `harness` and its file. The links inside harness/ are not followed."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if package == "harness" else ("harness", *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of ours that a module names in any import, also inside a function or under TYPE_CHECKING."""
    known, named = modules(), set()
    for node in ast.walk(ast.parse(known[module].read_text())):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                named.add(whole if whole in known else str(node.module))
    return frozenset(named & known.keys())


@cache
def reachable(module: str) -> frozenset[str]:
    """The modules that a module imports, directly or through others."""
    seen: set[str] = set()
    waiting = list(imports(module))
    while waiting:
        if (name := waiting.pop()) not in seen:
            seen.add(name)
            waiting += imports(name)
    return frozenset(seen)


def test_no_circle_of_imports() -> None:
    circles = {
        module: sorted(name for name in reachable(module) if module in reachable(name))
        for module in modules()
        if module in reachable(module)
    }
    assert not circles, "\n".join(f"{module}: {', '.join(others)}" for module, others in circles.items())


@pytest.mark.parametrize("package", PACKAGES[1:])
def test_a_package_imports_only_itself(package: str) -> None:
    own = f"harness.{package}"
    for module in modules():
        if module == own or module.startswith(f"{own}."):
            others = {name for name in imports(module) if not f"{name}.".startswith(f"{own}.")}
            assert others <= {LEAF}, module


def test_what_all_packages_import_imports_none_of_them() -> None:
    assert not imports(LEAF)


def test_training_imports_no_command_and_commands_not_the_command_line() -> None:
    for module in modules():
        if module.startswith("harness.training"):
            assert not {name for name in imports(module) if name.startswith("harness.commands")}, module
        assert module == "harness.__main__" or "harness.cli" not in imports(module), module


# --- sizes ---

MOST_LINES = 18_770
MOST_FILE_LINES = 450
MOST_FUNCTION_LINES = 80
MOST_PARAMETERS = 8
LONGER = {"harness.training.train.train": 100}  # the training loop, to be read in one piece


def functions(module: str) -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of a module, also inside classes and functions, by its dotted name."""

    def walk(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                found.append((f"{name}.{child.name}", child))
            walk(child, f"{name}.{child.name}" if isinstance(child, NAMED) else name)

    found: list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]] = []
    walk(ast.parse(modules()[module].read_text()), module)
    return found


NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def lines_of(path: Path) -> int:
    """As `wc -l` counts."""
    return path.read_bytes().count(b"\n")


def ranked(counts: dict[str, int]) -> str:
    """One line each, the largest first."""
    return "\n".join(f"{count:5} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def test_the_packages_are_small_enough() -> None:
    assert sum(lines_of(path) for path in modules().values()) <= MOST_LINES


def test_no_file_is_too_long() -> None:
    long = {module: lines for module, path in modules().items() if (lines := lines_of(path)) > MOST_FILE_LINES}
    assert not long, ranked(long)


def test_no_function_is_too_long() -> None:
    long = {
        name: lines
        for module in modules()
        for name, function in functions(module)
        if (lines := (function.end_lineno or 0) - function.lineno + 1) > LONGER.get(name, MOST_FUNCTION_LINES)
    }
    assert not long, ranked(long)


def test_no_function_has_many_parameters() -> None:
    many = {}
    for module in modules():
        for name, function in functions(module):
            arguments = function.args
            parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            count = len([one for one in parameters if one.arg not in ("self", "cls")])
            if count > MOST_PARAMETERS:
                many[name] = count
    assert not many, ranked(many)
