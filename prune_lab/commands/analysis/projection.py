"""Top eigenvectors of a network's Hessian, and the part of a direction that lies in their span."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prune_lab.commands.analysis.bench import Bench, trained
from prune_lab.commands.analysis.runs import FinishedRun
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.seeding import generator
from prune_lab.pruning.scores.hessian import flatten, hessian_product
from prune_lab.pruning.scores.lanczos import largest, projection_ratio

_REPORT_EVERY = 10


@dataclass(frozen=True)
class Plan:
    """How the eigenvectors are computed."""

    eigenvectors: int
    images: int
    batch_size: int
    iterations: int
    tolerance: float
    random_directions: int


def project(
    bench: Bench, runs: tuple[FinishedRun, FinishedRun], plan: Plan, *, report: Callable[[str], None]
) -> dict[str, Any]:
    """Return rho = |P d| / |d| for d = w_sgd - w_other, with the figures needed to judge it.

    P projects onto the eigenvectors of the largest eigenvalues of the Hessian at w_sgd; d is over all trainable
    parameters. The level of a random direction is sqrt(k / D).

    Raises:
        UserError: more eigenvectors than parameters, a loss that is not finite, no second derivatives.

    Source: Chao et al. 2020, arXiv 2006.09358; its notebook shows rho / sqrt(10).
    """
    model, other = (bench.network(run) for run in runs)
    weights = list(trained(model).values())
    w_sgd, w_other = flatten(weights), flatten(list(trained(other).values()))
    size, count = len(w_sgd), plan.eigenvectors
    if count > size:
        raise UserError(f"--eigenvectors must lie in [1, {size}] (trainable parameters), got {count}")
    chosen = bench.drawn("images of the Hessian", plan.images)
    loss = bench.training_scores(model, chosen)["loss"]
    if not math.isfinite(loss):
        raise UserError(f"{runs[0].directory}: the loss of this network is {loss}; there is no Hessian")

    def show(done: int, values: Tensor, residuals: Tensor) -> None:
        if done % _REPORT_EVERY == 0:
            report(f"product {done}/{plan.iterations}  largest {float(values[0]):.4g}  smallest wanted "
                   f"{float(values[-1]):.4g}  largest residual {float(residuals.max()):.2g}")

    pairs = largest(
        lambda vector: hessian_product(
            model, weights, lambda: bench.training_images(chosen, plan.batch_size), vector
        ),
        _normal(bench, size, "start vector", like=w_sgd),
        count,
        iterations=plan.iterations,
        tolerance=plan.tolerance,
        source=generator(bench.seed, "restarts"),
        report=show,
    )
    d = w_sgd.double() - w_other.double()
    drawn = [_normal(bench, size, "direction", index, like=w_sgd) for index in range(plan.random_directions)]
    return {
        "rho": projection_ratio(pairs.vectors, d),
        "random_level": (count / size) ** 0.5,
        "random_rho": [projection_ratio(pairs.vectors, direction) for direction in drawn],
        "parameters": size,
        "eigenvalues": pairs.values.tolist(),
        "residuals": pairs.residuals.tolist(),
        "cosines": (pairs.vectors.double() @ d / d.norm()).tolist(),
        "products": pairs.num_products,
        "converged": pairs.converged,
        "loss": loss,
        "distance": float(d.norm()),
        "norm": [float(w.double().norm()) for w in (w_sgd, w_other)],
        "spread": [spread(w) for w in (w_sgd, w_other)],
    }


def spread(w: Tensor) -> float:
    """Return |w|_2 / |w|_1: 1 / sqrt(D) for values of one size, 1 if a single one is not zero."""
    return float(w.double().norm() / w.double().abs().sum())


def _normal(bench: Bench, size: int, *keys: object, like: Tensor) -> Tensor:
    return torch.randn(size, generator=generator(bench.seed, *keys)).to(like)
