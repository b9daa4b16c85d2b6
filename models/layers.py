"""Layers that several networks are made of, and how their weights start."""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

TRUNCATED_STD = 0.87962566103423978  # of a standard normal cut at 2


def conv3x3(in_width: int, width: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """3x3 convolution that keeps the size but for its stride; no bias, a batch norm follows it."""
    return nn.Conv2d(in_width, width, 3, stride, padding=1, groups=groups, bias=False)


def conv1x1(in_width: int, width: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution; no bias, a batch norm follows it."""
    return nn.Conv2d(in_width, width, 1, stride, bias=False)


def activation(width: int, eps: float, kind: Literal["relu", "mish"] = "relu") -> nn.Sequential:
    """Batch norm, and ReLU or Mish (arXiv:1908.08681)."""
    return nn.Sequential(nn.BatchNorm2d(width, eps=eps), nn.Mish() if kind == "mish" else nn.ReLU(inplace=True))


class IdentityConv(nn.Conv2d):
    """1x1 convolution of stride 2, no bias and no batch norm, that starts as the identity (apark263/cfmz).

    At first channel i goes to channel i and the new channels are zero; training is free to change that.
    """

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__(in_width, width, kernel_size=1, stride=2, bias=False)

    def reset_parameters(self) -> None:
        nn.init.dirac_(self.weight)


class EndPadded(nn.Conv2d):
    """3x3 convolution that pads as TensorFlow's "same" does: at stride 2 an even side after its last pixel alone."""

    def __init__(self, in_width: int, width: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(in_width, width, 3, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        totals = (max(2 - (side - 1) % self.stride[0], 0) for side in (x.shape[3], x.shape[2]))
        return super().forward(F.pad(x, [part for n in totals for part in (n // 2, n - n // 2)]))


def he_init(module: nn.Module, *, truncated: bool = False) -> None:
    """He initialisation by fan-in of convolutions and affine layers, but not the identity (arXiv:1502.01852).

    truncated: nothing beyond two deviations of the normal, which is widened so that the variance stays (Keras).
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and not isinstance(layer, IdentityConv):
            if truncated:
                std = math.sqrt(2 / layer.weight[0].numel()) / TRUNCATED_STD
                nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            else:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
