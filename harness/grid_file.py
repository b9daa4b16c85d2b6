"""A command's options in a TOML file: `harness run grid.toml`, `--save grid.toml`, `--print-config`.

Options by their names, in groups, [[runs]], of which each is trained with what stands above the first one, changed by its
own. What may stand there, and what it means, is what `harness.options` declares.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

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
NOT_SAVED = ("save", "print_config", "dry_run", "estimate", "profile")


@dataclass(frozen=True, slots=True)
class GridFile:
    """A file's text, for messages that name its lines."""

    path: Path
    text: str

    def line(self, path: Sequence[str | int]) -> int:
        """Where a value begins, as in ("runs", 1, "depths"): after the longest part of the file that lacks it."""
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
    def place(self, path: Sequence[str | int]) -> Iterator[None]:
        """The body's UserErrors name the file and the value's line."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.path}:{self.line(path)}: {error}") from None

    def read(self, values: Mapping[str, Any], where: tuple[str | int, ...], what: str = "option") -> dict[str, Any]:
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

    def check(self, command: Mapping[str, Any], keys: Mapping[str, Sequence[str | int]]) -> None:
        """Check a group as a whole. An error that is about some of these keys names its line."""
        try:
            check_grid(make_grid(command))
        except UserError as error:
            about = [path for name, path in keys.items() if name.rstrip("s").replace("_", "-") in str(error).replace("_", "-")]
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
    tables = values.pop("runs", [])
    with file.place(("runs",)):
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise UserError("runs: groups are allowed, as in [[runs]]")
    shared = merge(file.read(values, ()), given)
    groups = []
    for number, table in enumerate(tables):
        own = file.read(table, ("runs", number), "option of a group")
        group = {name: value for name, value in own.items() if name not in given}
        fields = {n: v for n, v in own.get("settings", {}).items() if n not in given.get("settings", {})}
        groups.append(group | ({"settings": fields} if fields else {}))
        keys = {NAMES[key.replace("-", "_")]: ("runs", number, key) for key in table}
        file.check(merge(shared, groups[-1]), {n: p for n, p in keys.items() if n in group})
    if not groups:
        keys = {NAMES[key.replace("-", "_")]: (key,) for key in values}
        file.check(shared, {n: p for n, p in keys.items() if n not in given})
    return {**shared, "runs": groups} if groups else shared


def _plain(name: str, value: Any) -> Any:
    """Settings as a table, so that they can be merged field by field; others as they are."""
    return KNOWN[name].parsed(value) if name == "settings" else value
