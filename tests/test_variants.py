"""The variants as data: names, depths, recipes, and no torch."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from itertools import pairwise

import pytest

from harness.models.variants import VARIANTS, Network, Recipe, Variant, default_depth, find_variant


def changed(old: Recipe | Network, new: Recipe | Network) -> dict[str, object]:
    """The fields in which new differs from old."""
    return {
        f.name: getattr(new, f.name)
        for f in dataclasses.fields(new)
        if getattr(old, f.name) != getattr(new, f.name)
    }


def test_names_are_unique_and_fit_a_command_line():
    names = tuple(VARIANTS)
    assert len(names) == len(set(names)) == len(VARIANTS)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in names)
    assert all(find_variant(name)(default_depth(find_variant(name))).name == name for name in names)


@pytest.mark.parametrize("function", VARIANTS.values(), ids=lambda f: f.__name__)
def test_a_variant_is_a_frozen_hashable_value(function):
    depth = default_depth(function)
    variant = function(depth)
    assert variant == function(depth)
    assert hash(variant) == hash(function(depth))
    assert variant.network.depth == depth
    assert variant.source
    assert variant.summary
    assert function.__doc__
    with pytest.raises(dataclasses.FrozenInstanceError):
        variant.name = "other"


@pytest.mark.parametrize("function", VARIANTS.values(), ids=lambda f: f.__name__)
@pytest.mark.parametrize("depth", [-4, 0, 2, 19, 21, 51])
def test_an_illegal_depth_is_refused_in_one_line(function, depth):
    with pytest.raises(ValueError, match=f"depth {depth} is n") as error:
        function(depth)
    assert "\n" not in str(error.value)


def test_a_refused_depth_comes_with_the_nearest_legal_ones():
    with pytest.raises(ValueError, match=r"depth 30 is not 6n\+2: try 26 or 32"):
        find_variant("he2015")(30)
    with pytest.raises(ValueError, match=r"depth 32 is not 9n\+2: try 29 or 38"):
        find_variant("xresnext-16x2d")(32)


def test_a_mistyped_name_gets_a_hint():
    with pytest.raises(ValueError, match="variant 'msar' is unknown; did you mean msra"):
        find_variant("msar")
    with pytest.raises(ValueError, match="allowed: he2015, msra"):
        find_variant("zzz")


def test_each_step_of_the_ladder_changes_one_thing():
    steps: list[Variant] = [
        find_variant("xresnet")(20),
        find_variant("mxresnet")(20),
        find_variant("se-mxresnet")(20),
        find_variant("se-mxresnet-cosine")(20),
        find_variant("se-mxresnet-smooth")(20),
        find_variant("se-mxresnet-mixup")(20),
        find_variant("se-mxresnet-reflect")(20),
    ]
    differences = [
        changed(old.network, new.network) | changed(old.recipe, new.recipe) for old, new in pairwise(steps)
    ]
    assert differences == [
        {"activation": "mish"},
        {"squeeze_ratio": 16, "decay": "kernels-but-squeeze"},  # as its source decays none of the new weights
        {"schedule": "cosine", "milestones": (), "warmup": 5, "warmup_lr": 0.0, "warmup_shape": "linear"},
        {"label_smoothing": 0.1},
        {"mixup": 0.4},
        {"pad_mode": "reflect"},
    ]
    assert find_variant("se-mxresnext-16x2d-reflect")(29).recipe == steps[-1].recipe


@pytest.mark.parametrize(("depth", "epochs"), [(20, 180), (32, 180), (44, 200), (56, 200), (110, 180)])
def test_fattorib_trains_two_of_its_depths_for_longer(depth, epochs):
    recipe = find_variant("fattorib")(depth).recipe
    assert recipe.duration == epochs
    assert recipe.val == 2_500


def test_the_paper_warms_up_at_depth_110_only():
    assert changed(find_variant("he2015")(56).recipe, find_variant("he2015")(110).recipe) == {
        "warmup": 400,
        "warmup_lr": 0.01,
    }


def test_importing_the_variants_imports_no_torch():
    code = "import sys, harness.models.variants; sys.exit(sorted({'torch', 'numpy'} & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
