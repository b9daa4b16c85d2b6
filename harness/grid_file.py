"""A command's options in a TOML file: `harness run grid.toml`, `--save grid.toml`, `--print-config`.

Options by their names, in groups, [[runs]], of which each is trained with what stands above the first one, changed by its
own. What may stand there, and what it means, is what `harness.options` declares.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, get_origin

from harness.options import Grid, RunOptions, fill, load_named, options_of
from harness.plan import check_grid, find_data_dir, make_grid, merge
from harness.results.store import write_atomic
from harness.spec import UserError, at_home, check_word, mistakes

KNOWN = options_of(Grid, RunOptions)
NAMES = {name: name for name in KNOWN} | {
    word.lstrip("-").replace("-", "_"): name for name, option in KNOWN.items() for word in option.names
}
"""What an option may be called, as `set` and `settings` -> its name."""
WHOLE = {*options_of(RunOptions), "dataset"}  # of all runs of a command, not of a group's
TABLES = {name for name, option in KNOWN.items() if get_origin(option.kind) is Mapping}
NOT_SAVED = ("save", "print_config", "dry_run", "estimate", "profile")


def read_command(given: Mapping[str, Any], path: Path | None = None) -> dict[str, Any]:
    """The options of a command by name, `runs` being those of its groups: those given, and a grid file's where nothing is
    given. Raises UserError, with the line where the file is wrong."""
    given = {name: _plain(name, value) for name, value in given.items()}
    if path is None:
        return given
    no_toml = " is to be TOML (--spec is for a run's record)" * (path.suffix == ".json")
    with mistakes((OSError, ValueError), f"grid file {path}{no_toml}: "):  # ValueError: not UTF-8, or not TOML
        text = at_home(path).read_text(encoding="utf-8")
        values = tomllib.loads(text)
    try:
        return _read_file(values, given)
    except UserError as error:
        line = _find_line(text, given, str(error))
        raise UserError(f"{path}:{line}: {error}") if line else error from None


def _read_file(values: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a file's values and those that are given, all of them checked."""
    tables = values.pop("runs", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError("runs: groups are allowed, as in [[runs]]")
    load_named(values)
    command = merge(_read(values, given), given)
    fill(RunOptions, command)
    groups = [_read(table, given, "[[runs]]: ") for table in tables]
    for group in groups or [{}]:
        check_grid(make_grid(merge(command, group)))
    return {**command, "runs": groups} if groups else command


def _read(table: Mapping[str, Any], given: Mapping[str, Any], group: str = "") -> dict[str, Any]:
    """Options of a table by name, with what is given on the command line in their place."""
    read = dict[str, Any]()
    allowed = [word for word, name in NAMES.items() if name not in WHOLE] if group else [*NAMES, "runs"]
    for key, value in table.items():
        name = NAMES.get(word := key.replace("-", "_"), "")
        if group and name in WHOLE:
            raise UserError(f"{key} holds for all runs: it stands above the first [[runs]]")
        check_word(word, allowed, f"{group}option")
        if name in read:
            raise UserError(f"{key} is given twice")
        read[name] = _plain(name, value)
    return merge(read, {name: value for name, value in given.items() if name in read})


def _find_line(text: str, given: Mapping[str, Any], message: str) -> int | None:
    """Where the first statement begins with which a file that ends there has this mistake; None: it has it when empty."""
    lines, begin = text.split("\n"), 0
    for end in range(len(lines) + 1):
        try:
            values = tomllib.loads("\n".join(lines[:end]))
            if isinstance(groups := values.get("runs"), list):
                values["runs"] = groups[-1:]  # the others are those of a shorter file, which had no such mistake
            _read_file(values, given)
        except tomllib.TOMLDecodeError:  # amid a statement
            continue
        except UserError as error:
            if str(error) == message:
                break
        begin = end + 1
    return begin or None


def save_grid(command: Mapping[str, Any], path: Path) -> None:
    """Write a command's options, without those that only look. Raises UserError."""
    kept = {name: command[name] for name in (*KNOWN, "runs") if name in command and name not in NOT_SAVED}
    with mistakes(OSError, f"--save {path}: "):
        write_atomic(path, _format(kept))


def format_config(command: Mapping[str, Any]) -> str:
    """All options that hold, as a grid file of the same runs: those that are left to recipe, preset or machine are comments."""
    grid = make_grid({name: value for name, value in command.items() if name != "runs"})
    options, left = fill(RunOptions, command), options_of(Grid) if grid.specs or grid.networks else {}
    shown = dict[str, Any]()
    for name in KNOWN:
        value = command.get(name, getattr(options if hasattr(options, name) else grid, name))
        if name == "data_dir":
            value = find_data_dir(options.data_dir, grid.dataset)
        unset = value in (None, (), [], {}) or (name in left and name not in command)
        if name not in NOT_SAVED:
            shown[f"# {name}" if unset else name] = value
    return _format(shown | {"runs": command.get("runs", ())})


def _format(options: Mapping[str, Any]) -> str:
    shared = {name: value for name, value in options.items() if name != "runs"}
    lines = [name if value is None else f"{name} = {_toml(value)}" for name, value in shared.items()]
    for group in options.get("runs", ()):
        lines += ["", "[[runs]]", *(f"{name} = {_toml(value)}" for name, value in group.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{name} = {_toml(inner)}' for name, inner in value.items())} }}"
    if isinstance(value, datetime):
        return value.isoformat()
    return json.dumps("none" if value is None else value, ensure_ascii=False, default=str)


def _plain(name: str, value: Any) -> Any:
    """Tables as such, not in words, so that they can be merged field by field; others as they are."""
    return KNOWN[name].read(name, value) if name in TABLES else value
