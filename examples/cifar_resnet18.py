"""ResNet-18 as it is usually written for CIFAR: a 3x3 stem, no pooling after it, widths 64 to 512."""

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from harness import plugin


@plugin.network(duration=200, unit="epoch", schedule="cosine", milestones=[], weight_decay=5e-4)
def cifar_resnet18(num_classes: int) -> nn.Module:
    network = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
    network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return network
