"""Data parallelism under torchrun: rank, reductions, batch norm over the joined batch. No-ops on one process."""

from __future__ import annotations

import functools
import itertools
import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from prune_lab.foundations.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed import Store

T = TypeVar("T")

# The main process may wait for hours while another run trains a phase that both need, and the others wait with it.
_TIMEOUT = timedelta(days=7)

# Groups that this process joined. Each has its own names: torchrun's store keeps the addresses of groups that are
# gone.
_groups = itertools.count()


def start(device: torch.device) -> None:
    """Join the process group that torchrun describes in the environment, if any."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or torch.distributed.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # objects and barriers travel through the current device
    store, own_rank, size = _rendezvous()
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=torch.distributed.PrefixStore(f"group {next(_groups)}", store),
        rank=own_rank,
        world_size=size,
        timeout=_TIMEOUT,
    )


@functools.cache
def _rendezvous() -> tuple[Store, int, int]:
    """Return the store where the processes meet, this one's rank and the number of processes.

    Called once for all runs of a sweep: a store opened again may be the one that another process is still closing.
    """
    store, own_rank, size = next(torch.distributed.rendezvous("env://", timeout=_TIMEOUT))
    return torch.distributed.PrefixStore(meet(store, own_rank, size), store), own_rank, size


def meet(store: Store, own_rank: int, size: int) -> str:
    """Return a key that the processes of this start share with those of no other start.

    When torchrun restarts a group, its store still holds the dead processes' addresses, and torch would connect to
    them. The restart count of torchrun differs between a machine that stayed and one that has just joined.
    """
    own = uuid.uuid4().hex
    store.set(f"here {own_rank}", own)
    while True:
        if own_rank == 0:  # lists whom it sees, dead ones perhaps included, until all of them answer with its own key
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
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes; read from the environment before the group exists."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def share(value: T) -> T:
    """Return rank 0's `value` on every rank."""
    return on_main(lambda: value)


def on_main(function: Callable[[], T]) -> T:
    """Return on every rank what `function` returns on rank 0, the only one that calls it."""
    if not torch.distributed.is_initialized():
        return function()
    box: list[Any] = [function() if is_main() else None]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def share_masks(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return rank 0's bool `masks` on every rank."""
    if not torch.distributed.is_initialized():
        return masks
    wire = {name: mask.to(torch.uint8).contiguous() for name, mask in masks.items()}
    for values in wire.values():
        torch.distributed.broadcast(values, src=0)
    return {name: values.bool() for name, values in wire.items()}


def total(values: Tensor) -> Tensor:
    """Return the sum of `values` over all ranks."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether `flag` is set on any rank."""
    if not torch.distributed.is_initialized():
        return flag
    return bool(total(torch.tensor(float(flag), device=device)).item())


def parallel(model: nn.Module) -> nn.Module:
    """Return `model` with gradients averaged over all processes; on one process `model` itself."""
    if not torch.distributed.is_initialized():
        return model
    return torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


def share_buffers(model: nn.Module) -> None:
    """Copy rank 0's buffers to every rank; they differ where batch norm sees each rank's own images."""
    if torch.distributed.is_initialized():
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)


def assert_same(digest: str, what: str) -> None:
    """Stop every rank if `digest` differs between them.

    Raises:
        RuntimeError: the ranks disagree; training would average gradients of different networks.
    """
    if not torch.distributed.is_initialized():
        return
    digests = [digest] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(digests, digest)
    if len(set(digests)) > 1:
        raise RuntimeError(f"{what} differ between processes: {digests}")


def join_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Return `model` with every batch norm taking its statistics over all processes; parameters are kept."""
    if world_size() == 1:
        return model
    if device.type == "cuda":
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    from prune_lab.foundations.joined_batch_norm import (
        JoinedBatchNorm,  # its file defines an nn.Module and so imports torch
    )

    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            module.__class__ = JoinedBatchNorm
    return model
