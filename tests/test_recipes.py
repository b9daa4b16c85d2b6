"""Every variant, at two depths, trains two steps by its own recipe and is evaluated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from harness.cluster.job import Worker
from harness.loaders.datasets import Dataset, Split
from harness.models.variants import VARIANTS, VariantFunction, default_depth
from harness.spec import RunSpec
from harness.training.evaluation import evaluate
from harness.training.setup import assemble, training
from harness.training.train import run_steps

SECOND_DEPTH = {"miniplaces": 50, "mpmz": 18, "convnet": 8, "imagenet": 50}


def cases() -> list[Any]:
    found = []
    for function in VARIANTS.values():
        first = default_depth(function)
        name = function(first).name
        second = SECOND_DEPTH.get(name, first + (12 if first == 20 else 9))
        found += [pytest.param(function, depth, id=f"{name}-{depth}") for depth in dict.fromkeys((first, second))]
    return found


@pytest.mark.parametrize(("function", "depth"), cases())
def test_two_steps_and_an_evaluation(function: VariantFunction, depth: int) -> None:
    torch.set_num_threads(1)
    variant = function(depth)
    side = 128 if variant.recipe.crop else 32
    random = np.random.default_rng(0)
    split = Split(random.integers(0, 256, (8, side, side, 3), dtype=np.uint8), np.arange(8) % 4)
    recipe = replace(variant.recipe, batch_size=4, val=0)
    spec = RunSpec(
        variant=variant.name, network=variant.network, recipe=recipe, dataset="none", fingerprint="",
        loader="dataloader" if recipe.resize else "resident", device="cpu",
    )  # fmt: skip
    data = Dataset("none", "none", False, "", tuple("abcd"), split, split, flip=True)
    made = assemble(spec, data, Worker(threads=1))
    network = made.network
    before = [p.detach().clone() for p in network.parameters()]
    with training(made) as trainer:
        metrics = run_steps(trainer, epoch=7, steps=2)
    assert metrics.images == 8
    assert np.isfinite(metrics.loss)
    changed = [not torch.equal(p, q) for p, q in zip(before, network.parameters(), strict=True)]
    assert sum(changed) >= 0.9 * len(changed), "nearly every parameter takes part"
    found = evaluate(network, made.eval_loader, images=8)
    assert found.error % 12.5 == 0
