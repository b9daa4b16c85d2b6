"""Augmentations of a plug-in's: changes to whole batches on the device, whose random numbers any number of ranks shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.models.variants import Recipe, call

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
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

    def _share(self, drawn: NDArray[Any]) -> Tensor:
        from harness.loaders.resident import upload

        return upload(np.ascontiguousarray(drawn[self.rank :: self.world_size]), self.device)


def augment(
    recipe: Recipe, images: Tensor, place: tuple[int, int], seeds: tuple[int, ...], global_images: int
) -> Tensor:
    """This rank's images of a step after the recipe's augmentations; `place` is rank and world size, `seeds` seed, epoch
    and step. Raises ValueError for an augmentation that changes shape or type."""
    import torch

    for number, name in enumerate(recipe.augmentations):
        random = np.random.default_rng([*seeds, number])
        draws = Draws(images.device, global_images, *place, random)
        changed = call(AUGMENTATIONS[name], {"images": images, "draws": draws}, recipe.extra)
        if not isinstance(changed, torch.Tensor) or (changed.shape, changed.dtype) != (images.shape, images.dtype):
            what = (
                f"{tuple(changed.shape)} {changed.dtype}"
                if isinstance(changed, torch.Tensor)
                else f"{type(changed)}"
            )
            raise ValueError(f"augmentation {name!r} gives {what} for {tuple(images.shape)} {images.dtype}")
        images = changed.detach().contiguous(memory_format=torch.channels_last)
    return images
