"""Short training outside the training loop: between the layers of a pruning phase."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.seeding import stable_hash

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.core.context import Context


def short_finetune(
    context: Context,
    batches: Iterable[tuple[Tensor, Tensor]],
    masks: Mapping[str, Tensor],
    *,
    key: str,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> int:
    """Take one SGD step on the whole network per batch, with batch-norm batch statistics; return the images seen.

    Every process takes the same steps and ends with the weights of the first, because rounding makes them diverge.

    Args:
        batches: (images, labels).
        masks: parameter path -> bool, True = kept; the rest is zeroed after each step.
        key: part of the key of the dropout draws.

    Raises:
        UserError: the loss became infinite or NaN.
    """
    model, named = context.model, context.parameters()
    weights, kept = [named[name].data for name in masks], list(masks.values())
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=weight_decay)
    num_images, loss = 0, torch.zeros(())
    with torch.random.fork_rng([context.device] if context.device.type == "cuda" else []):
        torch.manual_seed(stable_hash(context.seed, key))  # dropout
        model.train()
        for images, labels in batches:
            context.poll()
            optimizer.zero_grad(set_to_none=True)
            loss = torch.nn.functional.cross_entropy(model(images).float(), labels)
            loss.backward()
            optimizer.step()
            torch._foreach_mul_(weights, kept)
            num_images += len(images)
        model.eval()
    optimizer.zero_grad(set_to_none=True)
    if not bool(torch.isfinite(loss)):
        raise UserError(f"the loss between layers became {loss.item()}: lower method.between_lr={lr:g}")
    if torch.distributed.is_initialized():
        for tensor in model.state_dict().values():
            torch.distributed.broadcast(tensor, src=0)
    return num_images
