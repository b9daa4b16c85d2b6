"""What a recipe names: the learning rate of every step, the optimizer, augmentations. Imports torch only where it is used.

Plug-ins add to `SCHEDULES`, `OPTIMIZERS` and `AUGMENTATIONS`: functions whose parameters are filled by name
(`models.variants.call`) with what is said below, with fields of the recipe, and with fields of their own, those that have a
default.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.models.variants import Recipe, call

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Groups = list[dict[str, Any]]
    Lr = float | Tensor


@dataclass(frozen=True, slots=True)
class Moment:
    """Where in its run a step is, for a schedule; all are counted in steps."""

    step: int  # from 0
    warmup: int  # steps before the schedule begins
    end: int  # of the run
    steps_per_unit: int  # of the recipe's unit: 1, or those of an epoch

    @property
    def share(self) -> float:
        """Of the schedule, how much is over: from 0 to 1."""
        return (self.step - self.warmup) / (self.end - self.warmup)


SCHEDULES: dict[str, Callable[..., float]] = {
    "multistep": lambda moment, milestones, gamma: (
        gamma ** sum(moment.step >= round(milestone * moment.steps_per_unit) for milestone in milestones)
    ),
    "linear": lambda moment: 1 - moment.share,
    "cosine": lambda moment: (  # half of one (arXiv:1608.03983, without restarts)
        0.5 * (1 + math.cos(math.pi * (moment.step - moment.warmup) / (moment.end - moment.warmup)))
    ),
}
"""`schedule(moment, ...)`: the factor of the lr after warm-up, which falls to 0 at the end or, by `gamma`, at each milestone."""


def total_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    return round(recipe.duration * (steps_per_epoch if recipe.unit == "epoch" else 1))


def total_epochs(recipe: Recipe, steps_per_epoch: int) -> int:
    """Epochs of the whole run; the last one may be cut short (64,000 steps are 163.7 epochs of 391)."""
    return math.ceil(total_steps(recipe, steps_per_epoch) / steps_per_epoch)


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The lr of one optimizer step, counted from 0 over the whole run, whatever the recipe counts it as."""
    step += recipe.first_step
    unit = steps_per_epoch if recipe.unit == "epoch" else 1
    warmup = round(recipe.warmup * unit)
    if step < warmup:
        if recipe.warmup_shape == "constant":
            return recipe.warmup_lr
        return recipe.warmup_lr + (recipe.lr - recipe.warmup_lr) * step / warmup
    moment = Moment(step, warmup, total_steps(recipe, steps_per_epoch), unit)
    factor: float = call(SCHEDULES[recipe.schedule], {"moment": moment} | fields_of(recipe), recipe.extra)
    return recipe.lr * factor


fields_of = cache(asdict)
"""A recipe's, by name."""


def sgd(groups: Groups, lr: Lr, momentum: float, nesterov: bool) -> torch.optim.Optimizer:
    """Stochastic gradient descent, its momentum made as the first step would make it: so that step is like all others."""
    import torch

    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)
    if momentum:
        for parameter in _parameters(groups):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def adamw(
    groups: Groups, lr: Lr, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8
) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (arXiv:1711.05101), its moments made as the first step would make them."""
    import torch

    captured = isinstance(lr, torch.Tensor)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps, fused=True, capturable=captured)
    for p in _parameters(groups):
        moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    return optimizer


def _parameters(groups: Groups) -> list[nn.Parameter]:
    return [parameter for group in groups for parameter in group["params"]]


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": sgd, "adamw": adamw}
"""`optimizer(groups, lr, ...)`: groups of parameters, each with its weight decay; lr is a tensor where steps are captured."""
CAPTURABLE = {"sgd", "adamw"}
"""Optimizers whose steps can be captured: no state is made or read by Python, and the lr is read from its tensor."""


def make_optimizer(recipe: Recipe, network: nn.Module, *, lr_on_device: bool = False) -> torch.optim.Optimizer:
    """The recipe's optimizer over the network's parameters, with weight decay on those that `recipe.decay` names.

    `lr_on_device` keeps the lr in a tensor beside the weights, where a captured step reads it at every replay.
    """
    import torch

    from harness.models.networks import SqueezeExcite

    parameters = [p for p in network.parameters() if p.requires_grad]
    # kernels are what has two axes or more: batch norm's scale and every bias have one
    spared = {p for p in parameters if p.ndim <= 1} if recipe.decay != "all" else set()
    if recipe.decay == "kernels-but-squeeze":
        spared |= {p for m in network.modules() if isinstance(m, SqueezeExcite) for p in m.parameters()}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p not in spared], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p in spared], "weight_decay": 0.0},
    ]
    lr = learning_rate(recipe, 0, 1)
    given = fields_of(recipe) | {
        "groups": [group for group in groups if group["params"]],
        "lr": torch.tensor(lr, device=parameters[0].device) if lr_on_device else lr,
    }
    optimizer: torch.optim.Optimizer = call(OPTIMIZERS[recipe.optimizer], given, recipe.extra)
    if lr_on_device:
        read = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        read += [group["lr"] for group in optimizer.param_groups]
        if any(getattr(value, "device", None) != parameters[0].device for value in read):
            raise ValueError(f"keeps lr or state on the host, which no graph reads: optimizer {recipe.optimizer}")
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the lr of all groups."""
    for group in optimizer.param_groups:
        if hasattr(group["lr"], "fill_"):  # a tensor
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


# --- augmentations ---

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
