"""Top-1 and top-5 error of a network over every image of a set, each seen once by one rank."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from loaders.loader import Loader


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Errors in percent; `top5_error` is None where there are ten classes or fewer."""

    images: int
    error: float
    top5_error: float | None


def evaluate(
    network: nn.Module, loader: Loader, *, images: int, autocast: AbstractContextManager[None]
) -> Evaluation:
    """Evaluate `network` on the loader's set; `images` is how many the set has.

    Raises RuntimeError where the ranks together saw another number: an error over part of a set is not its error.
    """
    was_training = network.training
    network.eval()
    counts: torch.Tensor | None = None  # images, top-1 hits, top-5 hits
    classes = 0
    with torch.inference_mode(), autocast:
        for batch, labels in loader.epoch(0):
            logits = network(batch)
            classes = logits.shape[1]
            ranked = logits.topk(min(5, classes), dim=1).indices
            hits = ranked == labels[:, None]
            seen = torch.stack([torch.ones_like(labels).sum(), hits[:, 0].sum(), hits.sum()])
            counts = seen if counts is None else counts + seen
    network.train(was_training)
    if counts is None:  # more ranks than images
        counts = torch.zeros(3, dtype=torch.int64, device=next(network.parameters()).device)
    if dist.is_initialized():
        counts = counts.clone()
        dist.all_reduce(counts)
    total, top1, top5 = (int(c) for c in counts.tolist())
    if total != images:
        raise RuntimeError(f"evaluation saw {total} images of {images}")
    return Evaluation(
        images=total,
        error=100 * (total - top1) / total,
        top5_error=100 * (total - top5) / total if classes > 10 else None,
    )
