"""The variants as data: names, depths, recipes, and no torch."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from itertools import pairwise

import pytest

from harness.models import variants
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
        variants.he2015(30)
    with pytest.raises(ValueError, match=r"depth 32 is not 9n\+2: try 29 or 38"):
        variants.xresnext_16x2d(32)


def test_a_mistyped_name_gets_a_hint():
    with pytest.raises(ValueError, match="unknown variant 'msar': did you mean 'msra'"):
        find_variant("msar")
    with pytest.raises(ValueError, match="allowed are he2015, msra"):
        find_variant("zzz")


def test_each_step_of_the_ladder_changes_one_thing():
    steps: list[Variant] = [
        variants.xresnet(20),
        variants.mxresnet(20),
        variants.se_mxresnet(20),
        variants.se_mxresnet_cosine(20),
        variants.se_mxresnet_smooth(20),
        variants.se_mxresnet_mixup(20),
        variants.se_mxresnet_reflect(20),
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
    assert variants.se_mxresnext_16x2d_reflect(29).recipe == steps[-1].recipe


@pytest.mark.parametrize(("depth", "epochs"), [(20, 180), (32, 180), (44, 200), (56, 200), (110, 180)])
def test_fattorib_trains_two_of_its_depths_for_longer(depth, epochs):
    recipe = variants.fattorib(depth).recipe
    assert recipe.duration == epochs
    assert recipe.val == 2_500


def test_the_paper_warms_up_at_depth_110_only():
    assert changed(variants.he2015(56).recipe, variants.he2015(110).recipe) == {"warmup": 400, "warmup_lr": 0.01}


def test_importing_the_variants_imports_no_torch():
    code = "import sys, harness.models.variants; sys.exit(sorted({'torch', 'numpy'} & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
