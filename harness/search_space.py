"""Fields of a recipe or network by name: set by `--set lr=0.05`, searched by `--search "lr=loguniform(0.01,1)"`."""

from __future__ import annotations

import difflib
import itertools
import math
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from harness.models.variants import Network, Recipe, Variant
from harness.spec import UserError

if TYPE_CHECKING:
    import numpy as np

Function = Literal["loguniform", "uniform", "randint", "choice", "grid"]
FUNCTIONS: tuple[Function, ...] = get_args(Function)
FIGURES = 4  # significant ones of a drawn number, so that a command can be typed again

_HINTS: dict[str, Any] = {**get_type_hints(Recipe), **get_type_hints(Network)}
_OPTIONS = {"duration": "--epochs", "unit": "--epochs", "val": "--val"}
FIELDS = tuple(name for name in _HINTS if name not in _OPTIONS)
"""What can be set or searched, in the order of the recipe's fields and then the network's."""


@dataclass(frozen=True, slots=True)
class Dimension:
    """One field's share of a search space. `values` is (low, high), both included, or all that can be chosen."""

    field: str
    function: Function
    values: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.field}={self.function}({','.join(map(format_value, self.values))})"

    @property
    def finite(self) -> tuple[Any, ...] | None:
        """Every value there is; None where there is no end of them."""
        if self.function == "randint":
            kind = type(self.values[0])
            return tuple(kind(n) for n in range(int(self.values[0]), int(self.values[1]) + 1))
        return self.values if self.function in ("choice", "grid") else None

    def draw(self, random: np.random.Generator) -> Any:
        """One value at random."""
        if (finite := self.finite) is not None:
            return finite[int(random.integers(len(finite)))]
        low, high = self.values
        if self.function == "loguniform":
            return self.round(math.exp(random.uniform(math.log(low), math.log(high))))
        return self.round(random.uniform(low, high))

    def round(self, value: float) -> float:
        """To `FIGURES` figures, within the bounds."""
        low, high = self.values
        return float(min(max(float(f"{value:.{FIGURES}g}"), low), high))


def parse_search(texts: Iterable[str]) -> tuple[Dimension, ...]:
    """ "lr=loguniform(0.01,1)" and others -> dimensions. Raises UserError for whatever cannot be meant."""
    dimensions = tuple(map(_parse_dimension, texts))
    names = [dimension.field for dimension in dimensions]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--search names {twice[0]} twice")
    return dimensions


def parse_settings(texts: Iterable[str]) -> dict[str, Any]:
    """ "lr=0.05" and others -> {"lr": 0.05}. Raises UserError for whatever cannot be meant."""
    settings: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        name = _field(name, "--set", text)
        if name == "depth":
            raise UserError(f"--set {text!r}: depths are for --depths")
        if name in settings:
            raise UserError(f"--set names {name} twice")
        settings[name] = _value(name, value, f"--set {text!r}")
    return settings


def apply(variant: Variant, settings: Mapping[str, Any]) -> tuple[Variant, tuple[str, ...]]:
    """The variant with fields of its recipe and network set, and what that changed: ("lr=0.05",).

    Values count in the recipe's own unit, so another number of epochs stretches them with the rest of the schedule.
    """
    changed: dict[str, Any] = {}
    for part in (variant.recipe, variant.network):
        own = {f.name for f in fields(part)}
        changed |= {name: settings[name] for name in FIELDS if name in own and name in settings
                    and settings[name] != getattr(part, name)}  # fmt: skip
    recipe_fields = {f.name for f in fields(Recipe)}
    variant = replace(
        variant,
        recipe=replace(variant.recipe, **{k: v for k, v in changed.items() if k in recipe_fields}),
        network=replace(variant.network, **{k: v for k, v in changed.items() if k not in recipe_fields}),
    )
    return variant, tuple(f"{name}={format_value(value)}" for name, value in changed.items())


def format_value(value: Any) -> str:
    """As it is typed: 0.05, true, A, 90,135."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(format_value, value))
    if isinstance(value, float):
        return f"{value:.17g}" if float(f"{value:g}") != value else f"{value:g}"
    return "none" if value is None else str(value)


def count_points(dimensions: Sequence[Dimension]) -> int | None:
    """How many different points the space has; None: no end of them."""
    counts = [None if d.finite is None else len(set(d.finite)) for d in dimensions]
    return None if None in counts else math.prod(count for count in counts if count is not None)


def grid_points(dimensions: Sequence[Dimension]) -> list[dict[str, Any]]:
    """Every combination of the `grid` dimensions; one empty one where there are none."""
    grids = [dimension for dimension in dimensions if dimension.function == "grid"]
    combinations = itertools.product(*(dimension.values for dimension in grids))
    return [dict(zip((d.field for d in grids), values, strict=True)) for values in combinations]


def _parse_dimension(text: str) -> Dimension:
    match = re.fullmatch(r"\s*([\w-]+)\s*=\s*(\w+)\s*\((.*)\)\s*", text)
    if match is None:
        name, _, rest = text.partition("=")
        _field(name, "--search", text)
        _function(rest.partition("(")[0].strip(), text)
        raise UserError(f"--search {text!r}: FIELD=FUNCTION(a,b) is allowed, as in lr=loguniform(0.01,1)")
    name = _field(match[1], "--search", text)
    function = _function(match[2], text)
    what = f"--search {text!r}"
    words = [word.strip() for word in match[3].split(",")]
    if get_origin(_HINTS[name]) is tuple:
        raise UserError(
            f"{what}: {name} is a list of numbers and cannot be searched; --set of `harness run` sets it"
        )
    if function in ("choice", "grid"):
        values = tuple(dict.fromkeys(_value(name, word, what) for word in words))
        return Dimension(name, function, values)
    if _HINTS[name] not in (float, int):
        raise UserError(f"{what}: {name} is no number; choice(...) and grid(...) are allowed")
    if function != "randint" and _HINTS[name] is int:
        raise UserError(f"{what}: {name} is a whole number; randint, choice and grid are allowed")
    if len(words) != 2:
        raise UserError(f"{what}: {function} takes two numbers, the lowest and the highest")
    low, high = (_value(name, word, what) for word in words)
    if not low < high:
        raise UserError(f"{what}: the lowest number must be below the highest")
    if function == "loguniform" and low <= 0:
        raise UserError(f"{what}: loguniform needs numbers above 0")
    if function == "randint" and not (float(low).is_integer() and float(high).is_integer()):
        raise UserError(f"{what}: randint takes whole numbers")
    return Dimension(name, function, (low, high))


def _function(word: str, text: str) -> Function:
    for function in FUNCTIONS:
        if word == function:
            return function
    raise UserError(f"--search {text!r}: function {word!r} is unknown{_near(word, FUNCTIONS)}")


def _field(word: str, option: str, text: str) -> str:
    name = word.strip().replace("-", "_")
    if name in _OPTIONS:
        raise UserError(f"{option} {text!r}: {name} has an option of its own, {_OPTIONS[name]}")
    if name not in FIELDS:
        raise UserError(f"{option} {text!r}: field {name!r} is unknown{_near(name, FIELDS)}")
    return name


def _near(word: str, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, allowed, n=1)
    return f"; did you mean {near[0]}?" if near else f" (allowed: {', '.join(allowed)})"


def _value(name: str, word: str, what: str) -> Any:
    """A word as the field's own type."""
    hint, word = _HINTS[name], word.strip()
    if get_origin(hint) in (Union, types.UnionType):
        if word.lower() == "none":
            return None
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    if get_origin(hint) is Literal:
        if word not in get_args(hint):
            raise UserError(f"{what}: {name} {word!r} is unknown{_near(word, get_args(hint))}")
        return word
    if get_origin(hint) is tuple:
        return tuple(_number(float, name, part, what) for part in word.split(","))
    if hint is bool:
        if word.lower() not in ("true", "false"):
            raise UserError(f"{what}: {name} is true or false, not {word!r}")
        return word.lower() == "true"
    return _number(hint, name, word, what)


def _number(kind: type, name: str, word: str, what: str) -> Any:
    try:
        value = kind(word)
    except ValueError:
        raise UserError(f"{what}: {name} is a {'whole ' * (kind is int)}number, not {word.strip()!r}") from None
    if not math.isfinite(value) or value < 0:
        raise UserError(f"{what}: {name} {word.strip()} is not a number from 0 up")
    return value
