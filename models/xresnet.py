"""XResNet and XResNeXt for CIFAR (iamVarunAnand/image_classification): pre-activation, average-pool shortcuts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.models.layers import EndPadded, activation, conv1x1, conv3x3, he_init
from harness.models.variants import Network, layers_per_block


class XResNet(nn.Module):
    """3x3 stem, three stages of n pre-activation blocks, both global poolings side by side, affine.

    Basic blocks of width 16, 32, 64 make 6n+2 layers, bottlenecks of width 64, 128, 256 make 9n+2.
    """

    def __init__(self, network: Network, num_classes: int) -> None:
        super().__init__()
        bottleneck = network.block == "bottleneck"
        blocks = (network.depth - 2) // layers_per_block(network)
        base = 64 if bottleneck else 16

        in_width = network.stem_width or base
        self.conv = conv3x3(3, in_width)
        self.stages = nn.Sequential()
        for index in range(3):
            width = base << index
            stage = nn.Sequential()
            for position in range(blocks):
                first = position == 0
                stage.append(XBlock(network, in_width, width, stride=2 if first and index > 0 else 1, first=first))
                in_width = width
            self.stages.append(stage)
        self.activation = activation(in_width, network.batch_norm_eps, network.activation)
        self.fc = nn.Linear(2 * in_width, num_classes)
        he_init(self, truncated=network.init == "truncated-he")

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.stages(self.conv(x)))
        # amax rather than a pooling layer: its backward pass is deterministic on CUDA
        logits: Tensor = self.fc(torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1))
        return logits


class XBlock(nn.Module):
    """Pre-activation block: two 3x3 convolutions, or a bottleneck whose 3x3 convolution is grouped.

    The first block of a stage takes its shortcut from the activated input: 2x2 average, 1x1 convolution, batch
    norm. A basic block of stride 1 keeps its width and has the plain shortcut even there, unless the shortcuts are bare.
    """

    def __init__(self, network: Network, in_width: int, width: int, stride: int, *, first: bool) -> None:
        super().__init__()
        conv = EndPadded if network.padding == "end" else conv3x3
        if network.block == "bottleneck":
            groups = network.cardinality
            middle = groups * network.group_width * width // 64
            convs = [conv1x1(in_width, middle), conv(middle, middle, stride, groups), conv1x1(middle, width)]
        else:
            convs = [conv(in_width, width, stride), conv3x3(width, width)]
        self.activation = activation(in_width, network.batch_norm_eps, network.activation)
        self.residual = nn.Sequential(convs[0])
        for layer in convs[1:]:
            self.residual.extend(
                [activation(layer.in_channels, network.batch_norm_eps, network.activation), layer]
            )
        if network.squeeze_ratio:
            self.residual.append(SqueezeExcite(width, width // network.squeeze_ratio))
        bare = network.shortcut == "bare-projection"
        projects = first and (bare or network.block == "bottleneck" or stride == 2)
        self.shortcut = AverageShortcut(in_width, width, stride, bare=bare) if projects else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(x)
        out: Tensor = self.residual(activated)
        out += x if self.shortcut is None else self.shortcut(activated)
        return out


class AverageShortcut(nn.Module):
    """Mean of 2x2 pixels at the given stride, cut off at the border, then 1x1 convolution and, unless bare, batch norm.

    Its batch norm has Keras's defaults where the others have values of their own: eps 1e-3, momentum 0.99, which
    torch counts as 0.01.
    """

    def __init__(self, in_width: int, width: int, stride: int, *, bare: bool = False) -> None:
        super().__init__()
        self.stride = stride
        self.conv = conv1x1(in_width, width)
        self.bn = nn.Identity() if bare else nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            # the mean of a pixel, the next, and those below: what padding by one adds before them is dropped
            x = F.avg_pool2d(x, 2, 1, padding=1, count_include_pad=False)[:, :, 1:, 1:]
        else:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        out: Tensor = self.bn(self.conv(x))
        return out


class SqueezeExcite(nn.Module):
    """Each channel times a weight computed from the means of all of them (arXiv:1709.01507), without biases."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(width, squeezed, bias=False)
        self.excite = nn.Linear(squeezed, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.excite(F.relu(self.squeeze(x.mean((2, 3))), inplace=True))
        return x * weight.sigmoid()[:, :, None, None]
