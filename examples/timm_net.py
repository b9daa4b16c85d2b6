"""Any network of timm: harness run --plugin examples/timm_net.py --variants resnet10t --set model=mobilenetv4_conv_small"""

import timm

from harness import plugin


@plugin.network
def resnet10t(num_classes: int, model: str = "resnet10t"):
    return timm.create_model(model, num_classes=num_classes)
