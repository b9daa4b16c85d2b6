"""The residual networks for CIFAR, and `build`, which makes the module of any `Network`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from harness.models.variants import Network, check_depth

SMALLEST_IMAGE = {"cifar": 4, "convnet": 4, "xresnet": 4, "imagenet": 16}
"""Side in pixels, by architecture: the product of all strides."""


def build(network: Network, num_classes: int, image_size: int = 32) -> nn.Module:
    """A freshly initialised module: images (N, 3, image_size, image_size) -> logits (N, num_classes).

    The weights come from torch's global generator. Every module takes images of other sizes too, at least as
    large as `SMALLEST_IMAGE` says.

    Raises:
        ValueError: depth, number of classes or image size is one that the architecture cannot have.
    """
    if num_classes < 2:
        raise ValueError(f"{num_classes} classes cannot be told apart: at least 2")
    smallest = SMALLEST_IMAGE[network.architecture]
    if image_size < smallest:
        raise ValueError(f"image size {image_size} is too small for this network: at least {smallest}")
    match network.architecture:
        case "cifar":
            return CifarResNet(network, num_classes)
        case "imagenet":
            from harness.models.imagenet import ImageNetResNet

            return ImageNetResNet(network, num_classes)
        case "convnet":
            from harness.models.convnet import ConvNet

            return ConvNet(network, num_classes)
        case "xresnet":
            from harness.models.xresnet import XResNet

            return XResNet(network, num_classes)


def count_parameters(module: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


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


class IdentityConv(nn.Conv2d):
    """1x1 convolution of stride 2, no bias and no batch norm, that starts as the identity (apark263/cfmz).

    At first channel i goes to channel i and the new channels are zero; training is free to change that.
    """

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__(in_width, width, kernel_size=1, stride=2, bias=False)

    def reset_parameters(self) -> None:
        nn.init.dirac_(self.weight)


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
        check_depth(network.depth, multiple=6)
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


def conv3x3(in_width: int, width: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """3x3 convolution that keeps the size but for its stride; no bias, a batch norm follows it."""
    return nn.Conv2d(in_width, width, 3, stride, padding=1, groups=groups, bias=False)


def activation(width: int, eps: float) -> nn.Sequential:
    """Batch norm and ReLU."""
    return nn.Sequential(nn.BatchNorm2d(width, eps=eps), nn.ReLU(inplace=True))


def he_init(module: nn.Module) -> None:
    """He initialisation by fan-in of convolutions and affine layers, but not the identity (arXiv:1502.01852)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and not isinstance(layer, IdentityConv):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
