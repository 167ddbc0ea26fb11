"""Greedy choice of neurons whose weighted mean imitates a layer's output, or lowers a loss: pure arithmetic, float64.

A layer's output is F = mean_i s_i over its N neurons, s_i being N times the contribution of neuron i with its outgoing
weights. A pruned layer is f = sum_i a_i s_i; where a_i is not 0 the neuron is kept. Multiplying neuron i by N a_i makes
the network compute f, so uniform weights 1 / N are the layer as it was.

Everything about the s_i that imitation needs is the Gram matrix G_ij = mean <s_i, s_j>: with v = G 1/N, the error
D(a) = mean |F - f|^2 is v.1/N - 2 a.v + a.Ga.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prune_lab.foundations.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 4096
"""most columns of a second-moment block: bounds the memory where a channel feeds many columns"""


@dataclass(frozen=True)
class Addition:
    """A layer after one more neuron was added."""

    index: int
    """the neuron that was added, perhaps once more"""
    step: float
    """its share t: a <- (1 - t) a + t e_index; with refit its weight"""
    weights: Tensor
    """a, float64 [N]"""
    error: float
    """D(a), or the loss"""


def gram(columns: Tensor, weight: Tensor, size: int) -> Tensor:
    """Return G [size, size] in float64: mean over samples, summed over outputs.

    With h the columns and W the weights, G = size^2 times the sum, over the columns of neuron i and those of neuron j,
    of (W^T W) * mean(h h^T). A linear layer or a 1x1 convolution has one column per neuron, a k x k convolution k^2,
    a linear layer behind a flatten as many as the map has pixels.

    Args:
        columns: [samples, size * span] what the next layer reads; for convolutions unfolded patches.
        weight: [outputs, size * span] its weights, flattened.
    """
    columns, weight = columns.double(), weight.double()
    span = columns.shape[1] // size
    per_block = max(1, _BLOCK // span)
    result = torch.zeros(size, size, dtype=torch.float64, device=columns.device)
    starts = range(0, size, per_block)
    for i in starts:
        rows = slice(i * span, (i + per_block) * span)
        for j in range(i, size, per_block):
            others = slice(j * span, (j + per_block) * span)
            product = (columns[:, rows].T @ columns[:, others]) * (weight[:, rows].T @ weight[:, others])
            height, width = product.shape[0] // span, product.shape[1] // span
            block = product.view(height, span, width, span).sum((1, 3))
            result[i : i + height, j : j + width] = block
            result[j : j + width, i : i + height] = block.T
    return result * (size**2 / len(columns))


def line_search(gram: Tensor) -> Iterator[Addition]:
    """Yield the layer after each addition of local imitation with exact line search; neurons may come again.

    num_i = <F - f, s_i - f>, den_i = |s_i - f|^2, t_i = clip(num_i / den_i, 0, 1); the largest gain
    2 t_i num_i - t_i^2 den_i is added, the lowest index on ties. The first neuron is the one nearest to F. Ends when no
    neuron gains anything.

    Source: after the local imitation of Ye, Wu, Liu 2020, arXiv 2010.15969; the closed form is derived.
    """
    target, diagonal = gram.mean(1), gram.diagonal()
    index = int((diagonal - 2 * target).argmin())
    weights, product, step = _unit(gram, index), gram[:, index].clone(), 1.0
    while True:
        yield Addition(index, step, weights, _error(weights, product, target))
        steps, gains = line_steps(diagonal, target, product, weights)
        index = int(gains.argmax())
        step = float(steps[index])
        if not float(gains[index]) > 0:
            return
        weights = (1 - step) * weights + step * _unit(gram, index)
        product = (1 - step) * product + step * gram[:, index]


def line_steps(diagonal: Tensor, target: Tensor, product: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best step t_i in [0, 1] towards each neuron and the fall of D it brings, both [N].

    A neuron that the layer already equals (den_i = 0) gets step 0.

    Args:
        product: G a.
    """
    square = weights @ product
    numerator = (target - product) - (weights @ target - square)
    denominator = diagonal - 2 * product + square
    # Rounding leaves a denominator that should be 0 at about 1e-16 of its terms, of either sign.
    real = denominator > 1e-14 * (diagonal.abs() + square.abs())
    steps = torch.where(real, numerator / torch.where(real, denominator, 1.0), 0.0).clamp(0, 1)
    return steps, 2 * steps * numerator - steps.square() * denominator


def fixed_step(gram: Tensor, *, repeat: bool) -> Iterator[Addition]:
    """Yield the layer after each addition of local imitation with step 1 / n at addition n.

    Args:
        repeat: True: a neuron may come again, so that weights are counts / n (as other implementations of Ye et al.
            2020, arXiv 2003.01794, have it); False: each comes once, weights are uniform (the official code), and it
            ends when all are in.
    """
    size, target, diagonal = len(gram), gram.mean(1), gram.diagonal()
    weights, product = torch.zeros_like(target), torch.zeros_like(target)
    for number in range(1, size + 1) if not repeat else _endless():
        step = 1 / number
        # D after the step, without what all neurons share.
        change = (1 - step) * step * 2 * product + step**2 * diagonal - 2 * step * target
        if not repeat:
            change[weights > 0] = math.inf
        index = int(change.argmin())
        weights = (1 - step) * weights + step * _unit(gram, index)
        product = (1 - step) * product + step * gram[:, index]
        yield Addition(index, step, weights, _error(weights, product, target))


def refit(gram: Tensor, *, ridge: float = 1e-10) -> Iterator[Addition]:
    """Yield the layer after each addition of orthogonal matching pursuit: all weights are refitted by least squares.

    The next neuron is the argmax of (v_i - (G a)_i)^2 / G_ii among those not kept; then G_SS a_S = v_S is solved, by
    a Cholesky factor that grows by a row. Weights may have any sign and sum. Ends when all neurons are in; neurons
    without any output come last.

    Args:
        ridge: added to the diagonal, relative to its mean: neurons that depend on each other stay solvable.
    """
    size, target, diagonal = len(gram), gram.mean(1), gram.diagonal()
    extra = ridge * float(diagonal.mean()) or torch.finfo(torch.float64).tiny
    factor = torch.zeros(size, size, dtype=gram.dtype, device=gram.device)
    weights, product = torch.zeros_like(target), torch.zeros_like(target)
    kept = torch.zeros(size, dtype=torch.bool, device=gram.device)
    chosen: list[int] = []
    for number in range(size):
        score = (target - product).square() / diagonal.clamp_min(extra)
        score[kept] = -1.0
        index = int(score.argmax())
        row = gram[index, chosen]
        solved = torch.linalg.solve_triangular(factor[:number, :number], row[:, None], upper=False)[:, 0]
        factor[number, :number] = solved
        factor[number, number] = (diagonal[index] + extra - solved @ solved).clamp_min(extra).sqrt()
        kept[index] = True
        chosen.append(index)
        lower = factor[: number + 1, : number + 1]
        weights = torch.zeros_like(target)
        weights[chosen] = torch.cholesky_solve(target[chosen][:, None], lower)[:, 0]
        product = gram @ weights
        yield Addition(index, float(weights[index]), weights, _error(weights, product, target))


STEP_FACTORS = (0.25, 0.5, 2.0, 4.0)
"""steps that a step search tries besides 1 / n, as multiples of it"""


def descend(
    size: int,
    loss: Callable[[Tensor], float],
    shortlist: Callable[[Tensor, Tensor], Sequence[int]],
    *,
    repeat: bool,
    search: bool = False,
) -> Iterator[Addition]:
    """Yield the layer after each addition of global imitation: the neuron, among a shortlist, of the lowest loss.

    The first of equals is added. Ends when all neurons are in, unless they may come again.

    Args:
        loss: of the network with weights a, float64 [size].
        shortlist: (a, allowed bool [size]) -> neurons to try, at least one of the allowed; called once per addition.
        repeat: whether a neuron may come again. False with step 1 / n: uniform weights (official code); True: counts
            / n, as in `fixed_step`.
        search: once the neuron is found with step 1 / n, try other steps towards it (STEP_FACTORS).
    """
    weights, allowed = torch.zeros(size, dtype=torch.float64), torch.ones(size, dtype=torch.bool)
    for number in range(1, size + 1) if not repeat else _endless():
        trials = [_towards(weights, index, 1 / number, loss) for index in shortlist(weights, allowed)]
        best = min(trials, key=lambda trial: trial.error)
        if search and number > 1:
            steps = [factor / number for factor in STEP_FACTORS if factor < number]
            best = min([best, *(_towards(weights, best.index, step, loss) for step in steps)], key=lambda t: t.error)
        weights = best.weights
        allowed[best.index] = repeat
        yield best


def _towards(weights: Tensor, index: int, step: float, loss: Callable[[Tensor], float]) -> Addition:
    moved = (1 - step) * weights
    moved[index] += step
    return Addition(index, step, moved, loss(moved))


def growing(additions: Iterator[Addition], *, patience: int) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (kept neurons in the order in which they came, a) each time a neuron comes in for the first time.

    Ends with the additions, or when the last `patience` of them brought no new neuron.
    """
    kept: list[int] = []
    waited = 0
    for addition in additions:
        waited += 1
        if addition.index not in kept:
            kept.append(addition.index)
            waited = 0
            yield list(kept), addition.weights
        if waited >= patience:
            return


def _unit(gram: Tensor, index: int) -> Tensor:
    unit = torch.zeros(len(gram), dtype=gram.dtype, device=gram.device)
    unit[index] = 1
    return unit


def _error(weights: Tensor, product: Tensor, target: Tensor) -> float:
    return float(target.mean() - 2 * weights @ target + weights @ product)


def _endless() -> Iterator[int]:
    number = 1
    while True:
        yield number
        number += 1
