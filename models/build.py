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


def count_flops(network: Network, num_classes: int, image_size: int = 32) -> int:
    """Multiply-adds of one image's forward pass, in convolutions and affine layers; nothing is computed.

    The figure papers call FLOPs: half of what counts a multiplication and an addition as two.
    """
    from torch.utils.flop_counter import FlopCounterMode  # takes a second or two

    with torch.device("meta"):
        module = build(network, num_classes, image_size).eval()
        image = torch.empty(1, 3, image_size, image_size)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        module(image)
    return int(counter.get_total_flops()) // 2
