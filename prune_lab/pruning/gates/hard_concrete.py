"""Hard-concrete gates: random numbers in [0, 1] that are exactly 0 or 1 with a probability that has a gradient.

a = log alpha is the parameter of a gate; z its value.

Source: Louizos, Welling, Kingma 2018, arXiv 1712.01312.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from prune_lab.foundations.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

BETA = 2 / 3
"""temperature"""
GAMMA, ZETA = -0.1, 1.1
"""the concrete variable is stretched to (GAMMA, ZETA), then cut to [0, 1]"""
MARGIN = 1e-6
"""the uniform draws come from (MARGIN, 1 - MARGIN)"""
OFFSET = BETA * math.log(-GAMMA / ZETA)
"""P(z > 0) = sigmoid(a - OFFSET), P(z = 1) = sigmoid(a + OFFSET); -1.5986"""
LIMIT = math.log(100)
"""the official codes keep a within [-LIMIT, LIMIT] after each step"""

Rule = Literal["louizos", "median"]


def start(drop_rate: float) -> float:
    """Return the a whose concrete variable lies above 1/2 with probability 1 - `drop_rate`, in (0, 1)."""
    return math.log((1 - drop_rate) / drop_rate)


def noise(size: int | tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return log u - log(1 - u) of uniform draws, shape `size`, float32 on the generator's device."""
    drawn = torch.empty(size, device=generator.device)
    return drawn.uniform_(MARGIN, 1 - MARGIN, generator=generator).logit_()


def sample(log_alpha: Tensor, logistic: Tensor) -> Tensor:
    """Return gates z, shaped like `logistic`: clamp(s (zeta - gamma) + gamma, 0, 1), s = sigmoid((noise + a) / beta).

    Args:
        log_alpha: a, of a shape that broadcasts; gradients reach it.
        logistic: draws from `noise`.

    Source: equations 10 and 11.
    """
    return (logistic + log_alpha).div_(BETA).sigmoid_().mul(ZETA - GAMMA).add_(GAMMA).clamp_(0, 1)


def slope(gate: Tensor) -> Tensor:
    """Return dz/da of drawn gates, shaped like them: (zeta - gamma) s (1 - s) / beta, 0 where z is 0 or 1."""
    inside = (gate > 0) & (gate < 1)
    return (gate - GAMMA).mul_(ZETA - gate).mul_(inside).div_((ZETA - GAMMA) * BETA)


def open_probability(log_alpha: Tensor) -> Tensor:
    """Return P(z > 0), shaped like `log_alpha`. Its derivative is P (1 - P).

    Source: equation 12.
    """
    return torch.sigmoid(log_alpha - OFFSET)


def fixed_gate(log_alpha: Tensor, rule: Rule) -> Tensor:
    """Return the deterministic gates with which a network is evaluated and finished, shaped like `log_alpha`.

    Args:
        rule: louizos: clamp(sigmoid(a) (zeta - gamma) + gamma, 0, 1), which is 0 up to P(z > 0) = 0.31 (equation 13);
            median: the true median, with sigmoid(a / beta), which is 0 up to P(z > 0) = 0.5 (official code of
            Gallego-Posada et al. 2022, arXiv 2208.04425).
    """
    return middle(log_alpha, rule).mul_(ZETA - GAMMA).add_(GAMMA).clamp_(0, 1)


def middle(log_alpha: Tensor, rule: Rule) -> Tensor:
    """Return the input that `fixed_gate` stretches and clamps, in (0, 1): the value of a gate that must stay open."""
    return torch.sigmoid(log_alpha if rule == "louizos" else log_alpha / BETA)


@dataclass(frozen=True)
class Term:
    """Part of a cost: `amount` times the open fractions of at most two groups of gates."""

    amount: float
    rows: int | None = None
    """index of the group whose gates scale the rows; None: none do"""
    columns: int | None = None
    """index of the group whose gates control the input columns; None: none do"""


def cost_matrix(terms: Sequence[Term], num_groups: int) -> Tensor:
    """Return A [groups + 1, groups + 1] for `expected_cost`; the last row and column are for ungated parts."""
    matrix = torch.zeros(num_groups + 1, num_groups + 1, dtype=torch.float64)
    for term in terms:
        row, column = (num_groups if index is None else index for index in (term.rows, term.columns))
        matrix[row, column] += term.amount
    return matrix.float()


def expected_cost(fractions: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return x A x, a scalar, and its gradient with respect to `fractions`; x is `fractions` followed by a 1.

    Gates are independent, so the expectation of a product over two groups is the product of the expectations.

    Args:
        fractions: mean of P(z > 0) of each group [groups].
        matrix: A, from `cost_matrix`.
    """
    extended = torch.cat([fractions, fractions.new_ones(1)])
    product = matrix @ extended
    return extended @ product, (product + extended @ matrix)[:-1]
