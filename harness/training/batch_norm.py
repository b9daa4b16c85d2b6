"""Batch norm over the global batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

AllReduce = Callable[[Tensor], Any]
"""Sums a tensor over the ranks, in place."""


class SyncBatchNorm(nn.BatchNorm2d):
    """A batch norm whose training statistics are those of all ranks' images, by one all-reduce forward and one backward;
    evaluation is that of its base class.

    torch's own refuses CPU tensors and gathers every rank's statistics; this serves CPU and GPU alike, and a CUDA graph
    can hold it: no number of it comes to the host. `all_reduce` sums a tensor over the ranks in place; the step sets it.
    """

    all_reduce: AllReduce

    def _check_input_dim(self, input: Tensor) -> None:
        """(n, C) too."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, C) or (n, C, H, W), of this rank. Every rank calls it, with one image at least."""
        if not self.training:
            return super().forward(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight: Tensor = (
            self.weight if self.affine else torch.ones(self.num_features, dtype=dtype, device=x.device)
        )
        out, mean, var, count = _Normalise.apply(x, weight, self.bias, self.eps, self.all_reduce)
        if self.running_mean is not None and self.running_var is not None and self.momentum is not None:
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_((var * (count / (count - 1))).to(var.dtype), self.momentum)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
        return out  # type: ignore[no-any-return]


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, with mean and variance of each channel over the global batch.

    The gradients of weight and bias are of this rank's images: they are summed over the ranks with all others.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, all_reduce: AllReduce
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        precise = x.to(weight.dtype)
        var, mean = torch.var_mean(precise, [0, *range(2, x.ndim)], correction=0)
        count = torch.full_like(mean[:1], x.numel() / x.shape[1], dtype=torch.float64)
        # in float64, or the square of a mean that is far from zero would drown the variance
        square = var.double() + mean.double().square()
        sums = torch.cat([count, mean * count, square * count])
        all_reduce(sums)
        count, (total_mean, total_square) = sums[:1], (sums[1:] / sums[0]).view(2, -1)
        mean, var = total_mean.to(mean.dtype), (total_square - total_mean.square()).clamp(min=0).to(mean.dtype)
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps, ctx.all_reduce, ctx.has_bias = eps, all_reduce, bias is not None
        ctx.mark_non_differentiable(mean, var, count)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        none = mean.new_empty(0)
        # as if mean and variance were constants: one kernel, and the two sums that the rest needs
        constant, for_weight, for_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, var, none, none, False, ctx.eps, [True, True, True]
        )
        sums = torch.cat([for_bias, for_weight])
        ctx.all_reduce(sums)
        by_mean, by_var = (sums / count.to(sums.dtype)).view(2, -1)
        shape = [1, -1] + [1] * (x.ndim - 2)
        inverse_std = (var + ctx.eps).rsqrt()
        slope, level = by_var * weight * inverse_std.square(), by_mean * weight * inverse_std
        centred = x - mean.view(shape)
        for_x = constant - torch.addcmul(level.view(shape), centred, slope.view(shape))
        return for_x.to(x.dtype), for_weight, for_bias if ctx.has_bias else None, None, None


def synchronise_batch_norms(network: nn.Module) -> None:
    """Make every batch norm of the network one over all ranks, in place; names and values stay.

    Raises ValueError for one that does more than torch's own, timm's with its activation, say, or averages all batches.
    """
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm):
            averages = module.track_running_stats and module.momentum is None
            if type(module).forward is not _BatchNorm.forward or averages:
                what = "momentum=None" if averages else f"{type(module).__name__}, with a forward pass of its own"
                raise ValueError(
                    f"--batch-norm sync takes torch's own batch norm with a momentum; {name} is {what}"
                )
            module.__class__ = SyncBatchNorm
