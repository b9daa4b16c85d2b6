"""Recipe -> optimizer, and the learning rate of every step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from harness.models.variants import Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn


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
    end = total_steps(recipe, steps_per_epoch)
    match recipe.schedule:
        case "multistep":
            drops = sum(step >= round(milestone * unit) for milestone in recipe.milestones)
            return recipe.lr * recipe.gamma**drops
        case "linear":
            return recipe.lr * (1 - (step - warmup) / (end - warmup))
        case "cosine":
            return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (end - warmup)))


def make_optimizer(recipe: Recipe, network: nn.Module, *, lr_on_device: bool = False) -> torch.optim.Optimizer:
    """SGD over the network's parameters, with weight decay on those that `recipe.decay` names.

    `lr_on_device` keeps the lr in a tensor beside the weights, where a captured step reads it at every replay.
    """
    import torch

    from harness.models.xresnet import SqueezeExcite

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
    optimizer = torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=torch.tensor(lr, device=parameters[0].device) if lr_on_device else lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        fused=True,
    )
    if recipe.momentum:
        for parameter in parameters:  # as the first step would make it; so that step is like all others
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the lr of all groups."""
    import torch

    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
