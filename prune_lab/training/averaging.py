"""The exponential moving average of a network, which is zero wherever the network is."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def moving_average(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """Return the average of the weights, initialised to the network, including its masks if it starts sparse."""
    if decay is None:
        return None
    average = get_ema_multi_avg_fn(decay)
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    averaged.n_averaged = averaged.n_averaged.cpu()  # read in every step: on a GPU the host would wait for it
    return averaged


@torch.no_grad()
def clear(average: AveragedModel, model: nn.Module) -> None:
    """Set the average to zero wherever the weight of `model` is exactly zero.

    On its own it never reaches zero: in float32 it stops at 6.99e-43. This way it follows the masks, and zeros that
    a method sets without one.
    """
    factors = torch._foreach_sign(list(model.parameters()))
    torch._foreach_abs_(factors)
    torch._foreach_mul_(list(average.module.parameters()), factors)


@torch.no_grad()
def follow(average: AveragedModel, model: nn.Module) -> None:
    """Let the average follow the changes of a method to `model` since the last update.

    Newly grown weights have only zeros in their average: it restarts at their current values.
    """
    clear(average, model)
    for mine, theirs in zip(average.module.parameters(), model.parameters(), strict=True):
        mine.copy_(torch.where(mine == 0, theirs, mine))
