"""Augmentations of plug-ins: changes to whole batches on the device, whose random numbers any number of ranks shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.models.variants import Recipe, call

if TYPE_CHECKING:
    import torch
    from torch import Tensor

AUGMENTATIONS: dict[str, Callable[..., Tensor]] = {}
"""`augmentation(images, draws, ...)`: training images (n, 3, H, W), normalised, after crop and flip -> images."""


@dataclass(frozen=True, slots=True)
class Draws:
    """Random numbers of one augmentation in one step: a pure function of seed, epoch and step.

    They are drawn for the whole global batch, of which each rank takes its share: so any number of ranks trains on the
    same images, and a resumed run on those of one left alone.
    """

    device: torch.device
    images: int  # of the global batch
    rank: int
    world_size: int
    random: np.random.Generator = field(repr=False)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """float32 (n, *shape) from low to high, for this rank's n images."""
        return self._share(self.random.uniform(low, high, (self.images, *shape)).astype(np.float32))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 (n, *shape) from low to high, which is not included, for this rank's n images."""
        return self._share(self.random.integers(low, high, (self.images, *shape)))

    def _share(self, drawn: Any) -> Tensor:
        from harness.loaders.resident import upload  # which imports torch

        return upload(np.ascontiguousarray(drawn[self.rank :: self.world_size]), self.device)


def augment(
    recipe: Recipe, images: Tensor, place: tuple[int, int], seeds: tuple[int, ...], global_images: int
) -> Tensor:
    """This rank's images of a step after the recipe's augmentations; `place` is rank and world size, `seeds` seed, epoch
    and step. Raises ValueError for an augmentation that changes shape or type."""
    for number, name in enumerate(recipe.augmentations):
        draws = Draws(images.device, global_images, *place, np.random.default_rng([*seeds, number]))
        changed = call(AUGMENTATIONS[name], {"images": images, "draws": draws}, recipe.extra)
        given, wanted = ((*getattr(i, "shape", ()), getattr(i, "dtype", type(i))) for i in (changed, images))
        if given != wanted:
            raise ValueError(f"gives {given} for {wanted}: augmentation {name}")
        images = changed.detach()
    return images
