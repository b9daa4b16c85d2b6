"""Top-1 and top-5 error of a network over every image of a set, each seen once by one rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from harness.cluster.workers import count_ranks
from harness.loaders.loader import Loader
from harness.spec import Precision
from harness.training.step import make_autocast


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Errors in percent; `top5_error` is None where there are ten classes or fewer. The loss is the mean cross-entropy."""

    error: float
    top5_error: float | None
    eval_loss: float


@dataclass(frozen=True, slots=True)
class MultiScale:
    """A network's scores averaged over sizes of the image and, with `flip`, over its mirror image at each.

    The average is of logits, or of the classes' probabilities, whose logarithms are then the scores. `on_scale` is given
    every batch's probabilities at each scale, (n, classes). A scale is the shorter side in pixels; images are resized
    to it by bilinear interpolation, antialiased, and the network, which ends in a global pooling, is applied to the
    whole of them: arXiv:1512.03385, section 3.4.
    """

    network: Callable[[Tensor], Tensor]
    scales: tuple[int, ...]
    flip: bool
    average: Literal["logits", "probabilities"] = "logits"
    on_scale: Callable[[int, Tensor], None] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, classes)."""
        views: list[Tensor] = []
        for scale in self.scales:
            resized = resize(images, scale)
            both = (resized, resized.flip(3)) if self.flip else (resized,)
            views.append(torch.stack([self.network(view) for view in both]))
            if self.on_scale:
                self.on_scale(scale, views[-1].softmax(2).mean(0))
        every = torch.cat(views)
        if self.average == "logits":
            return every.mean(0)
        return every.log_softmax(2).logsumexp(0) - math.log(len(every))


def resize(images: Tensor, scale: int) -> Tensor:
    """(n, 3, H, W), floating point -> the same with the shorter of H and W at `scale` pixels."""
    height, width = images.shape[2:]
    shorter = min(height, width)
    if shorter == scale:
        return images
    size = (round(height * scale / shorter), round(width * scale / shorter))
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """What an evaluation is done in, but for the precision of the network."""
    training = [module for module in network.modules() if module.training]  # others are frozen
    network.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def evaluate(
    network: nn.Module,
    loader: Loader,
    *,
    images: int,
    precision: Precision = "fp32",
    forward: Callable[[Tensor], Tensor] | None = None,
    on_ranked: Callable[[Tensor], None] | None = None,
) -> Evaluation:
    """Evaluate `network` on the loader's set; `images` is how many the set has.

    `forward` is the network as it is carried out, captured say, or at many scales; its logits need to last until the next
    batch only.
    `on_ranked` is given each batch's likeliest classes: (n, 5), best first, or fewer where there are fewer classes.

    Raises RuntimeError where the ranks together saw another number: an error over part of a set is not its error.
    """
    # images, top-1 hits, top-5 hits, loss; stays so where there are more ranks than images
    device = next(network.parameters()).device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    classes = 0
    with evaluating(network):
        for batch, labels in loader.epoch(0):
            with make_autocast(device, precision):  # of the network alone: a loader's arithmetic is fp32
                logits = (forward or network)(batch)
            classes = logits.shape[1]
            ranked = logits.topk(min(5, classes), dim=1).indices
            hits = ranked == labels[:, None]
            loss = F.cross_entropy(logits.float(), labels, reduction="sum")
            counts = (torch.ones_like(labels).sum(), hits[:, 0].sum(), hits.sum(), loss)
            sums = sums + torch.stack([count.double() for count in counts])
            if on_ranked:
                on_ranked(ranked)
    if count_ranks() > 1:
        sums = sums.clone()  # no longer of inference mode
        dist.all_reduce(sums)
    total, top1, top5, loss_sum = sums.tolist()
    if total != images:
        raise RuntimeError(f"evaluation saw {total:.0f} images of {images}")
    return Evaluation(
        error=100 * (total - top1) / total,
        top5_error=100 * (total - top5) / total if classes > 10 else None,
        eval_loss=loss_sum / total,
    )
