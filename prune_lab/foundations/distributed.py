"""Data parallelism under torchrun: rank, reductions, batch norm over the joined batch. No-ops on one process."""

from __future__ import annotations

import functools
import itertools
import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

T = TypeVar("T")

# The main process may wait for hours while another run works on a phase that both need, and the others wait with it.
_TIMEOUT = timedelta(days=7)

# Groups that this process joined. Each has names of its own: torchrun's store keeps the addresses of groups that are
# gone.
_groups = itertools.count()


def start(device: torch.device) -> None:
    """Join the process group that torchrun describes in the environment, if any."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # objects and barriers travel through the current device
    store, own_rank, size = _rendezvous()
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"group {next(_groups)}", store),
        rank=own_rank,
        world_size=size,
        timeout=_TIMEOUT,
    )


@functools.cache
def _rendezvous() -> tuple[dist.Store, int, int]:
    """Return where the processes meet, this one's rank and how many there are.

    Once for all runs of a sweep: a store that is opened anew may still be the one another process is closing.
    """
    store, own_rank, size = next(dist.rendezvous("env://", timeout=_TIMEOUT))
    return dist.PrefixStore(meet(store, own_rank, size), store), own_rank, size


def meet(store: dist.Store, own_rank: int, size: int) -> str:
    """Return a word that the processes of this start have in common and those of no other start had.

    When torchrun starts a group again, its store still holds what the dead processes wrote, and torch would connect to
    their addresses. torchrun's own count of starts differs between a machine that stayed and one that came anew.
    """
    own = uuid.uuid4().hex
    store.set(f"here {own_rank}", own)
    while True:
        if own_rank == 0:  # names whom it sees, perhaps dead ones still, until all of them answer to its own word
            here = [store.get(f"here {rank}").decode() for rank in range(size)]
            store.set("together", " ".join(here))
            if store.check([f"{own} {word}" for word in here[1:]]):
                return own
        else:
            here = store.get("together").decode().split()
            if here[own_rank:own_rank + 1] == [own]:
                store.set(f"{here[0]} {own}", "")
                return here[0]
        time.sleep(0.05)


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


def share(value: T) -> T:
    """Return rank 0's `value` on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(function: Callable[[], T]) -> T:
    """Return on every rank what `function` returns on rank 0, the only one that calls it."""
    return share(function() if is_main() else None)


def share_masks(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return rank 0's bool `masks` on every rank."""
    if not dist.is_initialized():
        return masks
    wire = {name: mask.to(torch.uint8).contiguous() for name, mask in masks.items()}
    for values in wire.values():
        dist.broadcast(values, src=0)
    return {name: values.bool() for name, values in wire.items()}


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


def parallel(model: nn.Module) -> nn.Module:
    """Return `model` with gradients averaged over all processes; on one process `model` itself."""
    if not dist.is_initialized():
        return model
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


def share_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0, which differ where batch norm works on each rank's own images."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


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
        if not dist.is_initialized() or not (self.training or self.running_mean is None):
            return super().forward(x)
        dims = [dim for dim in range(x.dim()) if dim != 1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = all_reduce(wide.sum(dims)) / count
        shape = [1, -1] + [1] * (x.dim() - 2)
        centred = wide - mean.view(shape)
        variance = all_reduce(centred.square().sum(dims)) / count
        if self.training and self.running_mean is not None:
            self._follow(mean.detach(), variance.detach() * (count / (count - 1)))
        scale = torch.rsqrt(variance + self.eps)
        if not self.affine:
            return (centred * scale.view(shape)).to(x.dtype)
        return (centred * (self.weight * scale).view(shape) + self.bias.view(shape)).to(x.dtype)

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics; momentum None asks for the plain average over all batches."""
        self.num_batches_tracked.add_(1)
        fraction = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, fraction)
        self.running_var.lerp_(variance, fraction)

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
