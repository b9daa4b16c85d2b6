"""Residual networks of four stages for larger images: of Mini-Places2 (apark263/mpmz), and of ImageNet."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from harness.models.layers import IdentityConv, conv1x1, conv3x3, he_init
from harness.models.variants import IMAGENET_BLOCKS, Network


class ImageNetResNet(nn.Module):
    """3x3 stem of stride 2, stages of width 32, 64, 128, 256, average pooling, affine without bias.

    An image of 112 pixels leaves maps of 7, as in arXiv:1512.03385, table 1, whose blocks a stage these are at
    depths 18, 34 and 50; at 50 a block is a bottleneck and its output four times as wide.

    `window`, of evaluation alone: pool over whole windows of that side, as neon's layer of 7x7 and stride 7 does, which
    of a map of 8, 10 or 15 leaves out the last rows and columns. None: over all of the map.
    """

    window: int | None = None

    def __init__(self, network: Network, num_classes: int) -> None:
        super().__init__()
        eps = network.batch_norm_eps
        self.conv = conv3x3(3, 32, stride=2)
        self.bn = nn.BatchNorm2d(32, eps=eps)
        self.stages, in_width = make_stages(network, 32, 32)
        self.fc = nn.Linear(in_width, num_classes, bias=False)
        self.head_bn = nn.BatchNorm1d(num_classes, eps=eps) if network.head_batch_norm else nn.Identity()
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)), inplace=True)
        x = self.stages(x)
        if self.window:
            height, width = (side - side % self.window or side for side in x.shape[2:])
            x = x[:, :, :height, :width]
        logits: Tensor = self.head_bn(self.fc(x.mean((2, 3))))
        return logits


class ResNet(nn.Module):
    """The network of arXiv:1512.03385, table 1, with projections where the shape changes (its option B).

    7x7 stem of stride 2, pooling, stages of width 64 to 512, average pooling, affine. As in torchvision, a bottleneck's
    3x3 convolution has the stride ("v1.5"), not its first 1x1 convolution as in the paper; convolutions start by
    He's rule with fan-out. Needs images of 32 pixels at least; table 1 is for 224.
    """

    def __init__(self, network: Network, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(64, eps=network.batch_norm_eps)
        self.stages, in_width = make_stages(network, 64, 64)
        self.fc = nn.Linear(in_width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.conv(x)), inplace=True), 3, stride=2, padding=1)
        logits: Tensor = self.fc(self.stages(x).mean((2, 3)))
        return logits


def make_stages(network: Network, in_width: int, first: int) -> tuple[nn.Sequential, int]:
    """Four stages, the first of width `first`, and the width of their output."""
    stages = nn.Sequential()
    bottleneck = network.block == "bottleneck"
    for index, blocks in enumerate(IMAGENET_BLOCKS[network.depth]):
        stage = nn.Sequential()
        middle = first << index
        width = 4 * middle if bottleneck else middle
        for position in range(blocks):
            stride = 2 if index > 0 and position == 0 else 1
            stage.append(ResidualBlock(network, in_width, middle, width, stride))
            in_width = width
        stages.append(stage)
    return stages, in_width


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 as a bottleneck; a 1x1 projection where the shape changes."""

    def __init__(self, network: Network, in_width: int, middle: int, width: int, stride: int) -> None:
        super().__init__()
        eps = network.batch_norm_eps
        if network.block == "bottleneck":
            convs = [conv1x1(in_width, middle), conv3x3(middle, middle, stride), conv1x1(middle, width)]
        else:
            convs = [conv3x3(in_width, middle, stride), conv3x3(middle, width)]
        self.residual = nn.Sequential()
        for conv in convs:
            self.residual.extend([conv, nn.BatchNorm2d(conv.out_channels, eps=eps), nn.ReLU(inplace=True)])
        del self.residual[-1]  # the last ReLU follows the sum
        self.shortcut: nn.Module = nn.Identity()
        if network.shortcut == "identity-conv" and stride != 1:
            self.shortcut = IdentityConv(in_width, width)
        elif stride != 1 or in_width != width:
            self.shortcut = nn.Sequential(conv1x1(in_width, width, stride), nn.BatchNorm2d(width, eps=eps))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.residual(x)
        out += self.shortcut(x)
        return F.relu(out, inplace=True)
