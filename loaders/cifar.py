"""The classes of CIFAR-10 and CIFAR-100, fine and coarse, and what torchvision calls those sets."""

from __future__ import annotations

import tomllib
from pathlib import Path

_DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
CIFAR10_CLASSES: tuple[str, ...] = tuple(_DATA["cifar10"].split())
SUPERCLASSES: dict[str, str] = _DATA["cifar100"]
"""The 20 coarse classes of CIFAR-100 and their fine ones."""
SUPERCLASS = {fine: coarse for coarse, members in SUPERCLASSES.items() for fine in members.split()}
TORCHVISION: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py", CIFAR10_CLASSES),
    "cifar100": ("CIFAR100", "cifar-100-python", tuple(sorted(SUPERCLASS))),
}
"""torchvision's class, which knows the address and the checksums, its folder, and the classes in their order."""
RELABELLED = {
    "cifar2": ("cifar10", {name: name for name in CIFAR10_CLASSES[:2]}),
    "cifar100-coarse": ("cifar100", SUPERCLASS),
}
"""Data sets made of another's images: the class of each of its classes; images of others are left out."""
