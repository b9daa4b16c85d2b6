"""A small residual network with max pooling, from a programming exercise (KaushikRoy94/Work)."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from harness.models.layers import conv1x1, conv3x3
from harness.models.variants import Network


class ConvNet(nn.Module):
    """3x3 stem of width 16, three stages of width 32, 64, 128, global max pooling, affine, times 0.125.

    Depth 8: stem, two 3x3 convolutions a stage, affine. Batch norm has no parameters and no memory: it takes
    the batch's statistics in evaluation too, so that a logit depends on the other images of its batch.
    """

    def __init__(self, network: Network, num_classes: int) -> None:
        super().__init__()
        eps = network.batch_norm_eps
        self.conv = conv3x3(3, 16)
        self.bn = batch_statistics(16, eps)
        self.stages = nn.Sequential(Stage(16, 32, eps), Stage(32, 64, eps), Stage(64, 128, eps))
        self.fc = nn.Linear(128, num_classes, bias=False)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                bound = math.sqrt(1 / layer.weight[0].numel())
                nn.init.uniform_(layer.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)), inplace=True)
        for index, stage in enumerate(self.stages):
            x = stage(x if index == 0 else F.max_pool2d(x, 2))
        logits: Tensor = 0.125 * self.fc(x.amax((2, 3)))
        return logits


class Stage(nn.Module):
    """relu(bn(conv3x3(x))) + conv1x1(x), which widens, and then x + relu(bn(conv3x3(x)))."""

    def __init__(self, in_width: int, width: int, eps: float) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_width, width)
        self.bn1 = batch_statistics(width, eps)
        self.shortcut = conv1x1(in_width, width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = batch_statistics(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        # not `+=`: ReLU keeps its output for the backward pass
        x = F.relu(self.bn1(self.conv1(x)), inplace=True) + self.shortcut(x)
        return x + F.relu(self.bn2(self.conv2(x)), inplace=True)


def batch_statistics(width: int, eps: float) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=eps, affine=False, track_running_stats=False)
