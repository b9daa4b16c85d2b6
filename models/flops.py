"""What a forward pass costs."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.models.resnet import build
from harness.models.variants import Network


def count_flops(network: Network, num_classes: int, image_size: int = 32) -> int:
    """Multiply-adds of one image's forward pass, in convolutions and affine layers; nothing is computed.

    The figure papers call FLOPs: half of what counts a multiplication and an addition as two.
    """
    with torch.device("meta"):
        module = build(network, num_classes, image_size).eval()
        image = torch.empty(1, 3, image_size, image_size)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        module(image)
    return int(counter.get_total_flops()) // 2
