"""The learning rate of every step against torch's own schedulers; who gets weight decay."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from harness.models.build import build
from harness.models.variants import Recipe, find_variant
from harness.training.recipe import learning_rate, make_optimizer, total_epochs, total_steps

STEPS = 7


def rates(scheduler: str, epochs: int, **options: object) -> list[float]:
    """What a torch scheduler gives, one value a step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    made = getattr(torch.optim.lr_scheduler, scheduler)(optimizer, **options)
    seen = []
    for _ in range(epochs * STEPS):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    return seen


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Recipe(duration=6, milestones=(3, 4.5)), rates("MultiStepLR", 6, milestones=[21, 32], gamma=0.1)),
        (Recipe(duration=4, schedule="cosine"), rates("CosineAnnealingLR", 4, T_max=4 * STEPS)),
        (
            Recipe(duration=4, schedule="linear"),
            rates("LinearLR", 4, start_factor=1.0, end_factor=1e-12, total_iters=4 * STEPS),
        ),
        (Recipe(duration=12, unit="step", milestones=(5, 9)), rates("MultiStepLR", 2, milestones=[5, 9])[:12]),
    ],
)
def test_learning_rates_are_torchs(recipe: Recipe, expected: list[float]) -> None:
    ours = [learning_rate(recipe, step, STEPS) for step in range(total_steps(recipe, STEPS))]
    assert ours == pytest.approx(expected, rel=1e-6)


def test_warmup() -> None:
    flat = Recipe(duration=4, warmup=1, warmup_lr=0.01)
    assert [learning_rate(flat, step, STEPS) for step in (0, 6, 7)] == [0.01, 0.01, 0.1]
    line = replace(flat, warmup_shape="linear", warmup_lr=0.0)
    assert [learning_rate(line, step, 10) for step in (0, 5, 10)] == pytest.approx([0.0, 0.05, 0.1])


def test_keras_counts_the_first_step_as_one() -> None:
    """callbacks/cosinescheduler.py of iamVarunAnand/image_classification: it counts, then computes."""
    recipe = find_variant("keras-se-mxresnet-cosine")(20).recipe
    warm, rest = 5 * STEPS, 175 * STEPS
    theirs = [
        0.1 * n / warm if n <= warm else 0.05 * (1 + math.cos((n - warm) / rest * math.pi))
        for n in range(1, 180 * STEPS + 1)
    ]
    assert [learning_rate(recipe, step, STEPS) for step in range(180 * STEPS)] == pytest.approx(theirs, abs=1e-15)


def test_the_papers_64k_steps_are_164_epochs_the_last_cut_short() -> None:
    recipe = find_variant("he2015")(110).recipe
    assert (total_steps(recipe, 391), total_epochs(recipe, 391)) == (64_000, 164)
    drops = [learning_rate(recipe, step, 391) for step in (0, 399, 400, 31_999, 32_000, 48_000, 63_999)]
    assert drops == pytest.approx([0.01, 0.01, 0.1, 0.1, 0.01, 0.001, 0.001])


def test_msra_drops_at_epochs_90_and_135() -> None:
    recipe = find_variant("msra")(20).recipe
    assert total_epochs(recipe, 391) == 180
    at = [learning_rate(recipe, epoch * 391 + edge, 391) for epoch in (90, 135) for edge in (-1, 0)]
    assert at == pytest.approx([0.1, 0.01, 0.01, 0.001])


@pytest.mark.parametrize(("decay", "spared"), [("all", 0), ("kernels", 3)])
def test_who_gets_weight_decay(decay: str, spared: int) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    optimizer = make_optimizer(Recipe(duration=1, decay=decay), network)  # type: ignore[arg-type]
    free = [p for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]]
    assert len(free) == spared
    assert all(p.ndim == 1 for p in free)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 5


def test_the_ladder_spares_squeeze_and_excitation_as_its_source_does() -> None:
    variant = find_variant("se-mxresnet")(8)
    network = build(variant.network, 10)
    decayed, free = make_optimizer(variant.recipe, network).param_groups
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert (decayed["weight_decay"], free["weight_decay"]) == (2e-4, 0.0)
    squeezing = [n for p in free["params"] if "squeeze" in (n := names[id(p)]) or "excite" in n]
    assert len(squeezing) == 2 * 3  # two kernels a block
    assert not [p for p in free["params"] if p.ndim > 1 and names[id(p)] not in squeezing]
    assert all(p.ndim > 1 for p in decayed["params"])
    assert find_variant("mxresnet")(8).recipe.decay == find_variant("xresnext-16x2d")(29).recipe.decay == "kernels"
