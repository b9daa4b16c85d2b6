"""Fields of a recipe or network by name: set by `--set lr=0.05`, searched by `--search "lr=loguniform(0.01,1)"`.

So are the fields that networks, optimizers, schedules and augmentations of plug-ins have of their own.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import isfinite, prod
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter

from harness.models import variants
from harness.models.variants import Network, Recipe, Variant, check_depth, check_reads, read_extra, write_extra
from harness.plugins import NAMED, TABLES, makers, names_in, names_of, own_hints, own_values
from harness.results.sweeps import Dimension, Function, format_value
from harness.spec import RunSpec, UserError, check_word, mistakes, refuse

FUNCTIONS: tuple[Function, ...] = get_args(Function)

Planned = TypeVar("Planned", RunSpec, Variant)
_HINTS: dict[str, Any] = {**get_type_hints(Recipe), **get_type_hints(Network)}
_OPTIONS = {"duration": "--epochs", "unit": "--epochs", "epochs": "--epochs", "val": "--val"}
FIELDS = tuple(name for name in _HINTS if name not in (*_OPTIONS, "extra"))
"""What can be set or searched, in the order of the recipe's fields and then the network's; beside fields of plug-ins."""
SEARCHED = {"variant": "--variants", "loader": "--loader", "depth": "--depths"}
"""What can be searched and, as it has an option of its own, not be set."""
READ_BY_SOME = ("momentum", "nesterov", "milestones", "gamma")  # other fields: by all
_HINTS |= {"variant": str, "loader": str}


def finite_values(d: Dimension) -> tuple[Any, ...] | None:
    """Every value of a dimension; None where they are endless."""
    if d.function == "randint":
        kind = type(d.values[0])
        return tuple(kind(n) for n in range(int(d.values[0]), int(d.values[1]) + 1))
    return None if d.continuous else d.values


def count_points(dimensions: Sequence[Dimension]) -> int | None:
    """How many different points the space has; None: endless."""
    counts = [None if (finite := finite_values(d)) is None else len(set(finite)) for d in dimensions]
    return None if None in counts else prod(count for count in counts if count is not None)


def grid_points(dimensions: Sequence[Dimension]) -> list[dict[str, Any]]:
    """Every combination of the `grid` dimensions; one empty one where there are none."""
    grids = [dimension for dimension in dimensions if dimension.function == "grid"]
    combinations = itertools.product(*(dimension.values for dimension in grids))
    return [dict(zip((d.field for d in grids), values, strict=True)) for values in combinations]


def corners(dimensions: Sequence[Dimension], *, listed: bool = False) -> list[dict[str, Any]]:
    """A few points of the space that between them have every listed value and, unless only these are asked for, every
    bound: an error in one of them is reported before anything starts."""
    lists = {d.field: finite_values(d) or d.values[: 1 if listed else 2] for d in dimensions}
    points = range(max(map(len, lists.values())))
    return [{name: values[min(i, len(values) - 1)] for name, values in lists.items()} for i in points]


def parse_search(texts: Iterable[str]) -> tuple[Dimension, ...]:
    """ "lr=loguniform(0.01,1)" and others -> dimensions. Raises UserError for anything else."""
    return tuple(_parse_fields("--search", texts, _dimension).values())


def parse_settings(texts: Iterable[str]) -> dict[str, Any]:
    """ "lr=0.05" and others -> {"lr": 0.05}. Raises UserError for anything else."""
    return _parse_fields("--set", texts, _value)


def _parse_fields(option: str, texts: Iterable[str], parse: Callable[[str, str], Any]) -> dict[str, Any]:
    found, elsewhere = dict[str, Any](), _OPTIONS if option == "--search" else _OPTIONS | SEARCHED
    for text in texts:
        word, sign, value = text.partition("=")
        name = word.strip().replace("-", "_")
        with mistakes(UserError, f"{option} {text!r}: "):
            refuse({f"{name} has an option of its own, {elsewhere.get(name)}": name in elsewhere})
            check_word(name, tuple(dict.fromkeys([*FIELDS, *own_hints(), *SEARCHED])), "field")
            bare = option == "--set" and not sign
            refuse({f"{name} is named twice": name in found, "expected FIELD=VALUE, as in lr=0.05": bare})
            found[name] = parse(name, value)
    return found


def apply(of: Planned, settings: Mapping[str, Any]) -> tuple[Planned, tuple[str, ...]]:
    """A run or variant with fields of its recipe and network set, and what that changed: ("lr=0.05",).

    Values count in the recipe's own unit, so another number of epochs stretches them with the rest of the schedule.
    """
    changed: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    for part in ("recipe", "network"):
        own = getattr(of, part)
        new = {n: settings[n] for n in FIELDS if n in settings and settings[n] != getattr(own, n, settings[n])}
        made = replace(own, **new)
        before, asked = read_extra(made.extra), {n: settings[n] for n in own_values(made) if n in settings}
        parts[part] = replace(made, extra=write_extra(before | asked, makers(names_in(made))))
        after = read_extra(parts[part].extra)  # a default may be that of one of two makers alone
        more = {n: value for n, value in asked.items() if before.get(n) != after.get(n)}
        changed |= new | more
    for name, value in changed.items():
        with mistakes(ValueError, f"--set {name}={format_value(value)}: "):
            check_reads(parts["network"], name)
            if name in ("architecture", "block"):
                check_depth(parts["network"])
    return replace(of, **parts), tuple(f"{name}={format_value(value)}" for name, value in changed.items())


def check_settings(settings: Iterable[str], specs: Iterable[RunSpec], option: str = "--set") -> None:
    """Raise UserError for a setting that none of the runs reads: of another optimizer or schedule, or of a plug-in."""
    used = {pair for spec in specs for pair in names_of(spec)}
    every = [(kind, each) for kind in NAMED.values() for each in TABLES[kind]]
    for name in settings:
        of = [pair for pair in every if name in variants.parameters_of(*makers([pair]))]
        if of and not used.intersection(of) and (name not in FIELDS or name in READ_BY_SOME):
            kind, owners = of[0][0], " and ".join(each for _, each in of)
            here = " and ".join(each for k, each in sorted(used) if k == kind) or "none"
            raise UserError(f"{option} {name}: a field of {kind} {owners}; the {kind} here is {here}")


def _dimension(name: str, text: str) -> Dimension:
    call = re.fullmatch(r"\s*(\w+)\s*\((.*)\)", text)
    if not call:
        raise UserError("expected FIELD=FUNCTION(a,b), as in --search 'lr=loguniform(0.01,1)'")
    kind: Any = call[1]
    check_word(kind, FUNCTIONS, "function")
    hint, listed = (own_hints() | _HINTS)[name], kind in ("choice", "grid")
    refuse({
        f"{name} is a list and cannot be searched; --set sets it for all trials": get_origin(hint) is tuple,
        f"{name} is not a number: use choice(...) or grid(...)": not listed and hint not in (float, int),
        f"{name} is a whole number: use randint, choice or grid":
            hint is int and kind in ("uniform", "loguniform"),
    })  # fmt: skip
    values = tuple(dict.fromkeys(_value(name, word) for word in call[2].split(",")))
    if not listed:
        refuse({
            f"{kind} takes two numbers, the lower one first": len(values) != 2 or values[0] > values[-1],
            "loguniform needs numbers above 0": kind == "loguniform" and values[0] <= 0,
            "randint takes whole numbers": kind == "randint" and any(value % 1 for value in values),
        })  # fmt: skip
    return Dimension(field=name, function=kind, values=values)


def _value(name: str, word: str) -> Any:
    """A word as the field's own type."""
    hint, word = (own_hints() | _HINTS)[name], word.strip()
    several, known = get_origin(hint) is tuple, dict[str, Any]()
    words = [one.strip() for one in word.split(",")] if several else [word]
    if several and word.lower() in ("", "none"):
        return ()
    if not several and type(None) in get_args(hint) and word.lower() == "none":
        return None
    if name in NAMED:
        known = {each: each for each in TABLES[NAMED[name]]}
    elif get_origin(hint) is Literal:
        known = {str(each): each for each in get_args(hint)}
    elif hint is bool:
        known, words = {"true": True, "false": False}, [word.lower()]
    elif hint is str:
        return word
    if known or name in NAMED:  # of a kind there may be none
        for one in words:
            check_word(one, known, name)
        values = tuple(known[one] for one in words)
        return values if several else values[0]
    try:
        value = TypeAdapter(hint).validate_python(words if several else word)
        if not all(isfinite(n) and (n >= 0 or name not in FIELDS) for n in (value if several else (value,))):
            raise ValueError
    except ValueError:
        kind = f"{'non-negative ' * (name in FIELDS)}{'' if 'float' in str(hint) else 'whole '}number"
        kind = f"list of {kind}s, separated by commas" if several else kind
        raise UserError(f"{name} is a {kind}, not {word!r}") from None
    return value
