"""`build`, which makes the module of any `Network`, and what that module costs."""

from __future__ import annotations

import torch
from torch import nn

from harness.models.variants import NETWORKS, Network, call, check_depth


def build(network: Network, num_classes: int, image_size: int = 32) -> nn.Module:
    """A freshly initialised module: images (N, 3, image_size, image_size) -> logits (N, num_classes).

    The weights come from torch's global generator. Every module of ours takes images of other sizes too, at least as
    large as its `Architecture` says. Raises ValueError where the architecture cannot have this depth, number of
    classes or image size.
    """
    check_depth(network)
    if num_classes < 2:
        raise ValueError(f"{num_classes} classes are too few: at least 2")
    architecture = NETWORKS[network.architecture]
    smallest = architecture.smallest_image
    if image_size < smallest:
        raise ValueError(f"image size {image_size} is too small for this network: at least {smallest}")
    given = {"network": network, "depth": network.depth, "num_classes": num_classes, "image_size": image_size}
    module: nn.Module = call(architecture.make, given, network.extra)
    return module


def count_parameters(module: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def count_flops(module: nn.Module, image_size: int) -> int:
    """FLOPs of one image's forward pass in evaluation, by torch's own counter: of convolutions and products of matrices, a
    multiplication and an addition counting as two (the multiply-adds of papers are half of it). On the meta device nothing
    is computed."""
    from torch.utils.flop_counter import FlopCounterMode

    training = [each for each in module.modules() if each.training]
    image = torch.zeros(1, 3, image_size, image_size, device=next(module.parameters()).device)
    try:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            module.eval()(image)
    finally:
        for each in training:
            each.training = True
    return int(counter.get_total_flops())
