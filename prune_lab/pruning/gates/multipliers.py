"""Lagrange multipliers that rise while a target is missed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def dual_rate(num_gates: int, num_steps: int) -> float:
    """Return the learning rate of a multiplier if none is given: 0.01 x gates under its constraint / steps.

    So the price of a single gate rises at the same rate for any size of network and length of training. This rule is
    not the paper's; the rates of the official scripts are 0.006 to 0.05 x gates / steps.
    """
    return 0.01 * num_gates / max(num_steps, 1)


def ascend(multipliers: Tensor, violations: Tensor, *, lr: float | Tensor, restart: bool) -> Tensor:
    """Return the multipliers after a step: max(0, lambda + lr v), and 0 where v < 0 with `restart`.

    Args:
        multipliers: lambda, one per constraint.
        violations: v, expected cost or density minus its target; a target met exactly does not restart.

    Source: Gallego-Posada et al. 2022, arXiv 2208.04425, dual restarts as in cooper 0.1.
    """
    raised = (multipliers + lr * violations).clamp_(min=0)
    return raised.masked_fill_(violations < 0, 0) if restart else raised
