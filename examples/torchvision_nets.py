"""torchvision's networks beside ours: harness run --plugin examples/torchvision_nets.py --variants he2015,resnet18"""

from torchvision.models import mobilenet_v3_small, resnet18

NETWORKS = {"resnet18": resnet18, "mobilenet_v3_small": mobilenet_v3_small}
