"""Published numbers: each names a variant and depth that exist here, and says where it comes from."""

import json
import os
from dataclasses import MISSING, asdict, fields, replace
from typing import Any, get_args, get_type_hints

import pytest

from harness.models.variants import Network, Recipe, find_variant
from harness.results.published import HERE, PINS, Published, find_published, load_published


@pytest.mark.parametrize(
    "entry", load_published(), ids=lambda e: f"{e.variant}-{e.depth}-{e.source.split('/')[-1]}"
)
def test_every_number_names_a_known_variant_and_a_legal_depth(entry: Published) -> None:
    assert find_variant(entry.variant)(entry.depth).network.depth == entry.depth  # raises where it is not
    assert entry.error is not None or entry.top5_error is not None
    for percent in (entry.error, entry.top5_error):
        assert percent is None or 0 < percent < 50
    assert entry.n >= 1
    assert 0.001 <= entry.rounded <= 0.5
    assert entry.statistic == "mean" or entry.n > 2
    assert entry.std is None or entry.n > 1
    hints = get_type_hints(Published)
    assert entry.rule in get_args(hints["rule"])
    assert entry.recipe in get_args(hints["recipe"])
    assert entry.statistic in get_args(hints["statistic"])
    assert not entry.changes or entry.recipe == "same"
    assert not entry.changes or replace(find_variant(entry.variant)(entry.depth).recipe, **entry.changes)
    assert entry.recipe == "same" or entry.note  # what is other about it
    assert (entry.memory_mib is None and entry.epoch_seconds is None) or entry.hardware
    assert entry.source


def test_no_number_is_written_twice() -> None:
    entries = [(e.dataset, e.variant, e.depth, e.source, e.rule, e.error, e.top5_error) for e in load_published()]
    assert len(entries) == len(set(entries))


def test_the_numbers_of_the_papers_tables() -> None:
    # arXiv:1512.03385, table 6, and the table of apark263/cfmz, typed in a second time
    paper = {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.61, 1202: 7.93}
    for depth, error in paper.items():
        entry = find_published("cifar10", "he2015", depth)
        assert entry is not None
        assert entry.error == error
    cfmz = {20: (521, 11, 8.29), 32: (636, 18, 7.26), 56: (860, 30, 6.31), 110: (1277, 60, 6.00)}
    for depth, row in cfmz.items():
        entry = find_published("cifar10", "msra", depth)
        assert entry is not None
        assert (entry.memory_mib, entry.epoch_seconds, entry.error) == row
    entry = find_published("cifar10", "he2015", 110)
    assert entry is not None
    assert (entry.n, entry.std) == (5, 0.16)


def test_only_the_same_recipe_stands_beside_our_runs() -> None:
    entry = find_published("cifar10", "he2015", 20)
    assert entry is not None
    assert entry.source.startswith("arXiv:1512.03385")
    assert find_published("cifar10-q75", "he2015", 20) is None
    assert find_published("cifar10", "he2015", 26) is None


def test_the_kept_networks_and_recipes_are_those_of_the_variants() -> None:
    """Where this fails a variant has changed: are its published numbers still of the "same" recipe? If so, write the
    copies anew with UPDATE_GOLDEN=1."""

    def defaults(kind: type) -> dict[str, Any]:
        return {f.name: f.default for f in fields(kind) if f.default is not MISSING}

    common = {"network": defaults(Network), "recipe": defaults(Recipe)}
    pins: dict[str, Any] = {"defaults": common}
    for entry in load_published():
        if entry.recipe == "same":
            variant = find_variant(entry.variant)(entry.depth)
            parts = {"network": asdict(variant.network), "recipe": asdict(variant.recipe)}
            own = {p: {n: v for n, v in all_.items() if common[p].get(n, ...) != v} for p, all_ in parts.items()}
            pins[variant_name(entry)] = own
    text = "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(pin)}" for name, pin in pins.items()) + "\n}\n"
    if os.environ.get("UPDATE_GOLDEN"):
        (HERE / PINS).write_text(text, encoding="utf-8")
    assert text == (HERE / PINS).read_text(encoding="utf-8")


def variant_name(entry: Published) -> str:
    return f"{entry.variant}-{entry.depth}"


def spec_of(entry: Published, **recipe: Any) -> dict[str, Any]:
    """As a record has it."""
    variant = find_variant(entry.variant)(entry.depth)
    values = {"network": asdict(variant.network), "recipe": asdict(variant.recipe) | dict(entry.changes) | recipe}
    spec: dict[str, Any] = json.loads(json.dumps(values))
    return spec


def test_a_spec_is_compared_with_the_published_one_field_by_field() -> None:
    for entry in (entry for entry in load_published() if entry.recipe == "same"):
        assert entry.differences(spec_of(entry)) == [], variant_name(entry)
    entry = find_published("cifar10", "msra", 20)
    assert entry is not None
    spec = spec_of(entry)
    for part, values in spec.items():
        for name, value in values.items():
            if name == "batch_norm":  # the same network with one worker; with several, `rows` looks at it
                continue
            changed = (not value) if isinstance(value, bool) else "other" if isinstance(value, str) else -1
            (words,) = entry.differences(spec | {part: values | {name: changed}})
            assert words == f"{name} {changed}, theirs {value}"
    older = spec | {"recipe": {n: v for n, v in spec["recipe"].items() if n != "mixup"}}
    assert entry.differences(older) == [], "stored before the field existed"
    he2015 = find_published("cifar10", "he2015", 20)
    assert he2015 is not None
    assert he2015.differences(spec_of(he2015, val=0)) == ["val 0, theirs 5000"]
    assert replace(entry, depth=8).differences(spec) == ["no copy of their network and recipe is kept here"]
