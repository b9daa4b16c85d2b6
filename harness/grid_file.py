"""A command's options in a TOML file: `harness run grid.toml`, `--save grid.toml`, `--print-config`.

Options by their names, in groups, [[runs]], of which each is trained with what stands above the first one, changed by its
own. What may stand there, and what it means, is what `harness.options` declares.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, get_origin

from harness.options import Grid, RunOptions, fill, options_of
from harness.plan import check_grid, find_data_dir, make_grid, merge
from harness.results.store import write_atomic
from harness.spec import UserError, check_word

KNOWN = options_of(Grid, RunOptions)
NAMES = {name: name for name in KNOWN} | {
    word.lstrip("-").replace("-", "_"): name for name, option in KNOWN.items() for word in option.names
}
"""What an option may be called, as `set` and `settings` -> its name."""
WHOLE = {*options_of(RunOptions), "dataset"}  # of all runs of a command, not of a group's
TABLES = {name for name, option in KNOWN.items() if get_origin(option.kind) is Mapping}
NOT_SAVED = ("save", "print_config", "dry_run", "estimate", "profile")
Place = tuple[str | int, ...]  # of a value in a file, as ("runs", 1, "depths")


@dataclass(frozen=True, slots=True)
class GridFile:
    """A file's text, for messages that name its lines."""

    path: Path
    text: str

    def line(self, path: Place) -> int:
        """Where a value begins: after the longest part of the file that parses and lacks it."""
        lines, lacking = self.text.splitlines(), 0
        for count in range(1, len(lines) + 1):
            with suppress(tomllib.TOMLDecodeError):
                value: Any = tomllib.loads("\n".join(lines[:count]))
                try:
                    for key in path:
                        value = value[key]
                    return lacking + 1
                except LookupError:
                    lacking = count
        return lacking

    @contextmanager
    def place(self, path: Place) -> Iterator[None]:
        """The body's UserErrors name the file and the value's line."""
        try:
            yield
        except UserError as error:
            placed = str(error).startswith(f"{self.path}:")
            raise error if placed else UserError(f"{self.path}:{self.line(path)}: {error}") from None

    def read(self, values: Mapping[str, Any], where: Place, what: str = "option") -> dict[str, Any]:
        """Options of the file by name, each checked by itself."""
        read = dict[str, Any]()
        for key, value in values.items():
            with self.place((*where, key)):
                check_word(word := key.replace("-", "_"), NAMES, what)
                name, option = NAMES[word], KNOWN[NAMES[word]]
                if where and name in WHOLE:
                    raise UserError(f"{key} holds for all runs: it stands above the first [[runs]]")
                if name in read:
                    raise UserError(f"{key} is given twice")
                for inner in value if isinstance(value, dict) else ():
                    with self.place((*where, key, inner)):
                        option.parsed(option.read(name, {inner: value[inner]}))
                read[name] = _plain(name, option.read(name, value))
                option.check(option.parsed(read[name]))
        return read

    def check(self, command: Mapping[str, Any], keys: Mapping[str, Place]) -> None:
        """Check a group as a whole. An error that is about some of these keys names its line."""
        try:
            check_grid(make_grid(command))
        except UserError as error:
            words = str(error).replace("_", "-")
            about = [path for name, path in keys.items() if name.rstrip("s").replace("_", "-") in words]
            if not about:
                raise
            with self.place(about[0]):
                raise


def read_command(given: Mapping[str, Any], path: Path | None = None) -> dict[str, Any]:
    """The options of a command by name, `runs` being those of its groups: those given, and a grid file's where nothing is
    given. Raises UserError, with the line where the file is wrong."""
    given = {name: _plain(name, value) for name, value in given.items()}
    if path is None:
        return given
    try:
        file = GridFile(path, path.expanduser().read_text(encoding="utf-8"))
        values = tomllib.loads(file.text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"grid file {path}: {getattr(error, 'strerror', None) or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"grid file {path} is not TOML: {error}") from None
    if "plugin" in values:  # before any word is read: it may be one of a plug-in's
        from harness.plugins import load_plugins

        with file.place(("plugin",)):
            load_plugins(KNOWN["plugin"].read("plugin", values["plugin"]))
    tables = values.pop("runs", [])
    with file.place(("runs",)):
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise UserError("runs: groups are allowed, as in [[runs]]")
    above, groups = file.read(values, ()), list[dict[str, Any]]()
    shared, places = merge(above, given), _places(values, ())
    for number, table in enumerate(tables):
        where = ("runs", number)
        groups.append(_uncovered(file.read(table, where, "option of a group"), given))
        file.check(merge(shared, groups[-1]), _uncovered(_places(table, where) | places, given))
    if not groups:
        file.check(shared, _uncovered(places, given))
    return {**shared, "runs": groups} if groups else shared


def save_grid(command: Mapping[str, Any], path: Path) -> None:
    """Write a command's options, without those that only look. Raises UserError."""
    kept = {name: command[name] for name in (*KNOWN, "runs") if name in command and name not in NOT_SAVED}
    try:
        write_atomic(path.expanduser(), _format(kept))
    except OSError as error:
        raise UserError(f"--save {path}: {error.strerror or error}") from None


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
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, datetime):
        return value.isoformat()
    plain = value if isinstance(value, bool | int | float) else "none" if value is None else str(value)
    return json.dumps(plain, ensure_ascii=False)


def _places(table: Mapping[str, Any], where: Place) -> dict[str, Place]:
    """Where the options of a table stand, by name."""
    return {NAMES[key.replace("-", "_")]: (*where, key) for key in table}


def _uncovered(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those values for which nothing is given; of tables, field by field."""
    left = {name: value for name, value in values.items() if name not in given}
    for name in TABLES & values.keys() & given.keys():
        table = values[name] if isinstance(values[name], Mapping) else {}
        if own := {key: value for key, value in table.items() if key not in given[name]}:
            left[name] = own
    return left


def _plain(name: str, value: Any) -> Any:
    """Tables as such, not in words, so that they can be merged field by field; others as they are."""
    return KNOWN[name].parsed(value) if name in TABLES else value
