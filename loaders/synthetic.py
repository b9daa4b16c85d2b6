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

    def __init__(self, split: Split, plan: SamplingPlan, config: LoaderConfig) -> None:
        ends = plan.draw(0).ends
        self._sizes = [end - begin for begin, end in zip((0, *ends), ends, strict=False)]
        first = plan.draw(0).index[: self._sizes[0]]
        few = Split(split.images[first], split.labels[first])
        once = replace(plan, images=len(few), batch_size=len(few), rank=0, world_size=1)
        loader = ResidentLoader(few, once, config)
        self._images, self._labels = next(loader.epoch(0))

    @property
    def steps(self) -> int:
        return len(self._sizes)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        del epoch
        for size in self._sizes[first_step:]:
            yield self._images[:size], self._labels[:size]

    def close(self) -> None:
        self._images = self._labels = torch.empty(0)
