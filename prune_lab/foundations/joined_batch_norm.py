"""Batch norm over the joined batch of all processes, also on a CPU."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class JoinedBatchNorm(nn.BatchNorm2d):
    """Batch norm whose statistics are those of the joined batch of all processes, with exact gradients.

    torch.nn.SyncBatchNorm does the same but runs on CUDA only.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not dist.is_initialized() or not (self.training or self.running_mean is None):
            return super().forward(x)
        dims = [dim for dim in range(x.dim()) if dim != 1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = all_reduce(wide.sum(dims)) / count
        shape = [1, -1] + [1] * (x.dim() - 2)
        centred = wide - mean.view(shape)
        variance = all_reduce(centred.square().sum(dims)) / count
        if self.training:
            self._follow(mean.detach(), variance.detach(), count)
        scale = torch.rsqrt(variance + self.eps)
        if not self.affine:
            return (centred * scale.view(shape)).to(x.dtype)
        return (centred * (self.weight * scale).view(shape) + self.bias.view(shape)).to(x.dtype)

    def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Update the running statistics, if there are any; momentum None means the plain average over all batches."""
        if self.num_batches_tracked is None or self.running_mean is None or self.running_var is None:
            return
        self.num_batches_tracked.add_(1)
        fraction = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, fraction)
        self.running_var.lerp_(variance * (count / (count - 1)), fraction)

    def _check_input_dim(self, x: Tensor) -> None:
        """Accept the inputs that BatchNorm1d and BatchNorm2d accept."""
