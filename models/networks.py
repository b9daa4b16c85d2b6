"""The residual networks, and the layers that they are made of."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.models.variants import IMAGENET_BLOCKS, Network

# --- layers ---


conv1x1 = partial(nn.Conv2d, kernel_size=1, bias=False)  # a batch norm follows it
conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)  # keeps the size but for its stride


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

    def forward(self, x: Tensor) -> Tensor:
        totals = (max(2 - (side - 1) % self.stride[0], 0) for side in (x.shape[3], x.shape[2]))
        return super().forward(F.pad(x, [part for n in totals for part in (n // 2, n - n // 2)]))


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


def he_init(module: nn.Module, *, truncated: bool = False) -> None:
    """He initialisation by fan-in of convolutions and affine layers, but not the identity (arXiv:1502.01852).

    truncated: nothing beyond two deviations of the normal, which is widened so that the variance stays (Keras).
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and not isinstance(layer, IdentityConv):
            if truncated:  # 0.8796...: the deviation of a standard normal cut at 2
                std = math.sqrt(2 / layer.weight[0].numel()) / 0.87962566103423978
                nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            else:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


# --- blocks ---


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

    Made as `BasicBlock` is.
    """

    def __init__(self, in_width: int, middle: int, width: int, shortcut: nn.Module, eps: float) -> None:
        super().__init__()
        self.activation1 = activation(in_width, eps)
        self.conv1 = conv3x3(in_width, middle, stride=1 if middle == in_width else 2)
        self.activation2 = activation(middle, eps)
        self.conv2 = conv3x3(middle, width)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv1(self.activation1(x))
        out = self.conv2(self.activation2(out))
        out += self.shortcut(x)
        return out


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 as a bottleneck; a 1x1 projection where the shape changes."""

    def __init__(self, network: Network, in_width: int, middle: int, width: int, stride: int) -> None:
        super().__init__()
        eps = network.batch_norm_eps
        if network.block == "bottleneck":
            convs = [conv1x1(in_width, middle), conv3x3(middle, middle, stride=stride), conv1x1(middle, width)]
        else:
            convs = [conv3x3(in_width, middle, stride=stride), conv3x3(middle, width)]
        self.residual = nn.Sequential()
        for conv in convs:
            self.residual.extend([conv, *activation(conv.out_channels, eps)])
        del self.residual[-1]  # the last ReLU follows the sum
        self.shortcut: nn.Module = nn.Identity()
        if network.shortcut == "identity-conv" and stride != 1:
            self.shortcut = IdentityConv(in_width, width)
        elif stride != 1 or in_width != width:
            self.shortcut = nn.Sequential(conv1x1(in_width, width, stride=stride), nn.BatchNorm2d(width, eps=eps))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.residual(x)
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


class XBlock(nn.Module):
    """Pre-activation block: two 3x3 convolutions, or a bottleneck whose 3x3 convolution is grouped.

    The first block of a stage takes its shortcut from the activated input: 2x2 average, 1x1 convolution, batch
    norm. A basic block that keeps its width has the plain shortcut even there, unless the shortcuts are bare.
    """

    def __init__(self, network: Network, in_width: int, width: int, stride: int, *, first: bool) -> None:
        super().__init__()
        conv = partial(EndPadded, kernel_size=3, bias=False) if network.padding == "end" else conv3x3
        if network.block == "bottleneck":
            groups = network.cardinality
            middle = groups * network.group_width * width // 64
            grouped = partial(conv, stride=stride, groups=groups)
            convs = [conv1x1(in_width, middle), grouped(middle, middle), conv1x1(middle, width)]
        else:
            convs = [conv(in_width, width, stride=stride), conv3x3(width, width)]
        eps, kind = network.batch_norm_eps, network.activation
        self.activation = activation(in_width, eps, kind)
        self.residual = nn.Sequential(convs[0])
        for layer in convs[1:]:
            self.residual.extend([activation(layer.in_channels, eps, kind), layer])
        if network.squeeze_ratio:
            self.residual.append(SqueezeExcite(width, width // network.squeeze_ratio))
        bare = network.shortcut == "bare-projection"
        projects = first and (bare or network.block == "bottleneck" or in_width != width)
        self.shortcut = AverageShortcut(in_width, width, stride, bare=bare) if projects else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(x)
        out: Tensor = self.residual(activated)
        out += x if self.shortcut is None else self.shortcut(activated)
        return out


batch_statistics = partial(nn.BatchNorm2d, affine=False, track_running_stats=False)


class ConvNetStage(nn.Module):
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


# --- networks ---


class Pooling(nn.Module):
    """What most networks are: a stem, stages of blocks, average pooling, and an affine layer.

    `window`, of evaluation alone: pool over whole windows of that side, as neon's layer of 7x7 and stride 7 does, which
    of a map of 8, 10 or 15 leaves out the last rows and columns. None: over all of the map.
    """

    window: int | None = None
    pool: nn.Module  # after the stem
    last: nn.Module  # after the stages

    def __init__(self, stem: nn.Conv2d, network: Network) -> None:
        super().__init__()
        self.conv, self.bn = stem, nn.BatchNorm2d(stem.out_channels, eps=network.batch_norm_eps)
        self.stages, self.pool, self.last = nn.Sequential(), nn.Identity(), nn.Identity()

    def add_head(self, network: Network, in_width: int, num_classes: int, *, bias: bool) -> None:
        """The affine layer, and batch norm on its output where the network has that."""
        eps = network.batch_norm_eps
        self.fc = nn.Linear(in_width, num_classes, bias=bias)
        self.head_bn = nn.BatchNorm1d(num_classes, eps=eps) if network.head_batch_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn(self.conv(x)), inplace=True))
        x = self.last(self.stages(x))
        if self.window:
            height, width = (side - side % self.window or side for side in x.shape[2:])
            x = x[:, :, :height, :width]
        logits: Tensor = self.head_bn(self.fc(x.mean((2, 3))))
        return logits


class CifarResNet(Pooling):
    """6n+2 layers: 3x3 stem, three stages of n blocks of width 16, 32, 64, global average pooling, affine.

    A stage widens in the first convolution of its first block. With `block="late-stride"` the stage before it
    does so, in the second convolution of its last block (fattorib/ResNets-CIFAR10). That repository's checkpoints
    also hold layers that its forward pass never calls, two convolutions and three batch norms in each stage:
    they are no part of the network and do not exist here.
    """

    def __init__(self, network: Network, num_classes: int) -> None:
        super().__init__(conv3x3(3, 16), network)
        blocks, eps = (network.depth - 2) // 6, network.batch_norm_eps
        late, projection = network.block == "late-stride", OptionA if network.shortcut == "A" else IdentityConv
        block, in_width = PreactBlock if network.block == "preact" else BasicBlock, 16
        for stage_width, next_width in ((16, 32), (32, 64), (64, 64)):
            stage = nn.Sequential()
            for index in range(blocks):
                width = next_width if late and index == blocks - 1 else stage_width
                shortcut = nn.Identity() if width == in_width else projection(in_width, width)
                stage.append(block(in_width, stage_width, width, shortcut, eps))
                in_width = width
            self.stages.append(stage)
        if block is PreactBlock:
            self.get_submodule("stages.0.0").activation1 = nn.Identity()  # what the stem gives is activated
            self.last = activation(in_width, eps)
        self.add_head(network, in_width, num_classes, bias=not network.head_batch_norm)
        he_init(self)


class FourStages(Pooling):
    """Stages of the stem's width and its next powers of two, times four where a block is a bottleneck, by depth."""

    def __init__(self, stem: nn.Conv2d, network: Network, num_classes: int, *, bias: bool) -> None:
        super().__init__(stem, network)
        in_width, widening = stem.out_channels, 4 if network.block == "bottleneck" else 1
        for index, blocks in enumerate(IMAGENET_BLOCKS[network.depth]):
            stage, middle = nn.Sequential(), stem.out_channels << index
            for position in range(blocks):
                stride = 2 if index > 0 and position == 0 else 1
                stage.append(ResidualBlock(network, in_width, middle, middle * widening, stride))
                in_width = middle * widening
            self.stages.append(stage)
        self.add_head(network, in_width, num_classes, bias=bias)


class ImageNetResNet(FourStages):
    """3x3 stem of stride 2, stages of width 32, 64, 128, 256, average pooling, affine without bias (apark263/mpmz).

    An image of 112 pixels leaves maps of 7, as in arXiv:1512.03385, table 1, whose blocks a stage these are at
    depths 18, 34 and 50; at 50 a block is a bottleneck and its output four times as wide.
    """

    def __init__(self, network: Network, num_classes: int) -> None:
        super().__init__(conv3x3(3, 32, stride=2), network, num_classes, bias=False)
        he_init(self)


class ResNet(FourStages):
    """The network of arXiv:1512.03385, table 1, with projections where the shape changes (its option B).

    7x7 stem of stride 2, pooling, stages of width 64 to 512, average pooling, affine. As in torchvision, a bottleneck's
    3x3 convolution has the stride ("v1.5"), not its first 1x1 convolution as in the paper; convolutions start by
    He's rule with fan-out. Needs images of 32 pixels at least; table 1 is for 224.
    """

    def __init__(self, network: Network, num_classes: int) -> None:
        stem = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        super().__init__(stem, network, num_classes, bias=True)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class XResNet(nn.Module):
    """3x3 stem, three stages of n pre-activation blocks, both global poolings side by side, affine.

    Basic blocks of width 16, 32, 64 make 6n+2 layers, bottlenecks of width 64, 128, 256 make 9n+2.
    """

    def __init__(self, network: Network, num_classes: int) -> None:
        super().__init__()
        layers, base = (9, 64) if network.block == "bottleneck" else (6, 16)
        in_width = network.stem_width or base
        self.conv = conv3x3(3, in_width)
        self.stages = nn.Sequential()
        for width in (base, 2 * base, 4 * base):
            stage = nn.Sequential()
            for position in range((network.depth - 2) // layers):
                stride = 2 if position == 0 and width > base else 1
                stage.append(XBlock(network, in_width, width, stride, first=position == 0))
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


class ConvNet(nn.Module):
    """3x3 stem of width 16, three stages of width 32, 64, 128, global max pooling, affine, times 0.125: from a programming
    exercise (KaushikRoy94/Work).

    Depth 8: stem, two 3x3 convolutions a stage, affine. Batch norm has no parameters and no memory: it takes
    the batch's statistics in evaluation too, so that a logit depends on the other images of its batch.
    """

    def __init__(self, network: Network, num_classes: int) -> None:
        super().__init__()
        eps = network.batch_norm_eps
        self.conv = conv3x3(3, 16)
        self.bn = batch_statistics(16, eps)
        self.stages = nn.Sequential(*(ConvNetStage(width, 2 * width, eps) for width in (16, 32, 64)))
        self.fc = nn.Linear(128, num_classes, bias=False)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.reset_parameters()  # anew, in this order: uniform by fan-in, torch's own initialisation

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)), inplace=True)
        for index, stage in enumerate(self.stages):
            x = stage(x if index == 0 else F.max_pool2d(x, 2))
        logits: Tensor = 0.125 * self.fc(x.amax((2, 3)))
        return logits
