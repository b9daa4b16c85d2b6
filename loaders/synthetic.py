"""One constant batch: what training costs when loading costs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from harness.loaders.datasets import Split
from harness.loaders.resident import ResidentLoader
from harness.loaders.sampling import LoaderConfig, SamplingPlan


class SyntheticLoader:
    """The first batch of the plan's epoch 0, again and again; a last batch of another size is cut from it."""

    call_steps, calls_ahead = 1, 0

    def __init__(self, split: Split, plan: SamplingPlan, config: LoaderConfig) -> None:
        self.steps = plan.steps
        self._sample = plan.draw(0)
        first = self._sample.part(0, 1).index
        few = Split(split.images[first], split.labels[first])
        once = replace(plan, images=len(few), batch_size=len(few), rank=0, world_size=1)
        self._images, self._labels = next(ResidentLoader(few, once, config).epoch(0))

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        del epoch
        for step in range(first_step, self.steps):
            size = len(self._sample.part(step, step + 1).index)
            yield self._images[:size], self._labels[:size]

    def close(self) -> None:
        self._images = self._labels = torch.empty(0)
