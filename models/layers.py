"""Layers that several networks are made of, and how their weights start."""

from __future__ import annotations

from typing import Literal

from torch import nn


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


def he_init(module: nn.Module) -> None:
    """He initialisation by fan-in of convolutions and affine layers, but not the identity (arXiv:1502.01852)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and not isinstance(layer, IdentityConv):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
