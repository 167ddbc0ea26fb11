"""The exponential moving average of a network, which is zero wherever the network is."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def moving_average(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """Return the average of the weights, which starts as the network is now: masked already where it begins sparse."""
    if decay is None:
        return None
    average = get_ema_multi_avg_fn(decay)
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    averaged.n_averaged = averaged.n_averaged.cpu()  # asked for in every step: on a GPU the host would wait for it
    return averaged


@torch.no_grad()
def clear(average: AveragedModel, model: nn.Module) -> None:
    """Let the average of every weight of `model` that is exactly zero be zero.

    By itself it never gets there: in float32 it stops at 6.99e-43. So it follows the masks, and the zeros that
    a method makes without one.
    """
    factors = torch._foreach_sign(list(model.parameters()))
    torch._foreach_abs_(factors)
    torch._foreach_mul_(list(average.module.parameters()), factors)


@torch.no_grad()
def follow(average: AveragedModel, model: nn.Module) -> None:
    """Let the average follow what a method did to `model` since the last update.

    Weights that it opened only now have no average but zero: they begin as they are.
    """
    clear(average, model)
    for mine, theirs in zip(average.module.parameters(), model.parameters(), strict=True):
        mine.copy_(torch.where(mine == 0, theirs, mine))
