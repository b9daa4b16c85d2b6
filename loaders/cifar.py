"""The classes of CIFAR-10 and CIFAR-100, fine and coarse (www.cs.toronto.edu/~kriz/cifar.html)."""

from __future__ import annotations

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SUPERCLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale", "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip", "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe", "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm", "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle", "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train", "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}  # fmt: skip
"""The 20 coarse classes of CIFAR-100 and their fine ones; in its files both are numbered by the alphabet."""
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
