"""Data parallelism under torchrun: rank, reductions, batch norm over the joined batch. No-ops on one process."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


def start(device: torch.device) -> None:
    """Join the process group that torchrun describes in the environment, if any."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes; read from the environment before the group exists."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def share(value):
    """Return rank 0's `value` on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def total(values: Tensor) -> Tensor:
    """Return the sum of `values` over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether `flag` is set on any rank."""
    if not dist.is_initialized():
        return flag
    return bool(total(torch.tensor(float(flag), device=device)).item())


def assert_same(digest: str, what: str) -> None:
    """Stop every rank if `digest` differs between them.

    Raises:
        RuntimeError: the ranks disagree; going on would average gradients of different networks.
    """
    if not dist.is_initialized():
        return
    digests = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    if len(set(digests)) > 1:
        raise RuntimeError(f"{what} differ between processes: {digests}")


class JoinedBatchNorm(nn.BatchNorm2d):
    """Batch norm whose statistics are those of the joined batch of all processes, with exact gradients.

    torch.nn.SyncBatchNorm does the same but runs on CUDA only.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        dims = [dim for dim in range(x.dim()) if dim != 1]
        wide = x.float()
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = all_reduce(wide.sum(dims)) / count
        shape = [1, -1] + [1] * (x.dim() - 2)
        centred = wide - mean.view(shape)
        variance = all_reduce(centred.square().sum(dims)) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)

    def _check_input_dim(self, x: Tensor) -> None:
        """Accept what BatchNorm1d and BatchNorm2d accept."""


def join_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Return `model` with every batch norm taking its statistics over all processes; parameters are kept."""
    if world_size() == 1:
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.__class__ = JoinedBatchNorm
    return model
