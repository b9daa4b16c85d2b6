"""The residual networks for CIFAR."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from harness.models.layers import IdentityConv, activation, conv3x3, he_init
from harness.models.variants import Network


class OptionA(nn.Module):
    """Shortcut A: every second pixel, zeros for the new channels (arXiv:1512.03385, section 4.2).

    (N, C, H, W) -> (N, width, ceil(H / 2), ceil(W / 2)), no parameters. The paper leaves open where the zeros
    stand; half of them on each side is what the published PyTorch checkpoints were trained with.
    """

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.before = (width - in_width) // 2
        self.after = width - in_width - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x)))))), 3x3 convolutions; the one that widens has stride 2."""

    def __init__(self, in_width: int, middle: int, width: int, shortcut: nn.Module, eps: float) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_width, middle, stride=1 if middle == in_width else 2)
        self.bn1 = nn.BatchNorm2d(middle, eps=eps)
        self.conv2 = conv3x3(middle, width, stride=1 if width == middle else 2)
        self.bn2 = nn.BatchNorm2d(width, eps=eps)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


class PreactBlock(nn.Module):
    """shortcut(x) + conv(relu(bn(conv(relu(bn(x)))))): full pre-activation (arXiv:1603.05027, figure 4(e)).

    The first block of a network takes x already activated.
    """

    def __init__(self, in_width: int, width: int, shortcut: nn.Module, eps: float, *, first: bool) -> None:
        super().__init__()
        self.activation1 = nn.Identity() if first else activation(in_width, eps)
        self.conv1 = conv3x3(in_width, width, stride=1 if width == in_width else 2)
        self.activation2 = activation(width, eps)
        self.conv2 = conv3x3(width, width)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv1(self.activation1(x))
        out = self.conv2(self.activation2(out))
        out += self.shortcut(x)
        return out


class CifarResNet(nn.Module):
    """6n+2 layers: 3x3 stem, three stages of n blocks of width 16, 32, 64, global average pooling, affine.

    A stage widens in the first convolution of its first block. With `block="late-stride"` the stage before it
    does so, in the second convolution of its last block (fattorib/ResNets-CIFAR10). That repository's checkpoints
    also hold layers that its forward pass never calls, two convolutions and three batch norms in each stage:
    they are no part of the network and do not exist here.
    """

    def __init__(self, network: Network, num_classes: int) -> None:
        super().__init__()
        blocks = (network.depth - 2) // 6
        eps = network.batch_norm_eps
        preact = network.block == "preact"
        late = network.block == "late-stride"
        projection = OptionA if network.shortcut == "A" else IdentityConv

        self.conv = conv3x3(3, 16)
        self.bn = nn.BatchNorm2d(16, eps=eps)
        self.stages = nn.Sequential()
        in_width = 16
        for stage_width, next_width in ((16, 32), (32, 64), (64, 64)):
            stage = nn.Sequential()
            for index in range(blocks):
                width = next_width if late and index == blocks - 1 else stage_width
                shortcut = nn.Identity() if width == in_width else projection(in_width, width)
                if preact:
                    first = len(self.stages) == 0 and index == 0
                    stage.append(PreactBlock(in_width, width, shortcut, eps, first=first))
                else:
                    stage.append(BasicBlock(in_width, stage_width, width, shortcut, eps))
                in_width = width
            self.stages.append(stage)
        self.last = activation(in_width, eps) if preact else nn.Identity()
        self.fc = nn.Linear(in_width, num_classes, bias=not network.head_batch_norm)
        self.head_bn = nn.BatchNorm1d(num_classes, eps=eps) if network.head_batch_norm else nn.Identity()
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)), inplace=True)
        x = self.last(self.stages(x))
        logits: Tensor = self.head_bn(self.fc(x.mean((2, 3))))
        return logits
