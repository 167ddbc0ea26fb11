"""The largest eigenvalues of a symmetric operator by the Lanczos method. Knows nothing of networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prune_lab.foundations.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDING = 1e-6
"""relative to the operator's size: a step with a smaller remainder has found an invariant subspace"""


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues in descending order; those at the operator's lower end are not computed."""

    values: Tensor
    """[k], fp64 on the CPU"""
    vectors: Tensor
    """[k, n], orthonormal rows"""
    residuals: Tensor
    """[k], |A e - lambda e| from the recurrence; at least the rounding error"""
    num_products: int
    converged: bool
    """whether every residual is at most tolerance x its eigenvalue"""


def largest(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    count: int,
    *,
    iterations: int,
    tolerance: float,
    source: torch.Generator,
    report: Callable[[int, Tensor, Tensor], None] = lambda done, values, residuals: None,
) -> Eigenpairs:
    """Return the `count` algebraically largest eigenpairs of the operator v -> product(v).

    Every vector is orthogonalised against all earlier ones, twice: otherwise rounding would reintroduce found
    eigenvectors as copies. Memory: iterations x n values.

    Args:
        product: the operator, symmetric, on vectors [n] of the dtype and device of `start`.
        start: [n], not zero; a random one has a component along every eigenvector.
        count: 1 <= count <= n.
        iterations: maximum number of products, raised to `count` and lowered to n.
        tolerance: relative to each eigenvalue; stops early when all residuals are within it.
        source: draws a new direction in an invariant subspace, where the method would stop too early.
        report: called after each product with the number of products, eigenvalues [count] and residuals [count].

    Raises:
        ValueError: a product is not finite.

    Source: Parlett 1998, The Symmetric Eigenvalue Problem, chapter 13.
    """
    size = len(start)
    iterations = min(max(iterations, count), size)
    basis = torch.empty(iterations, size, dtype=start.dtype, device=start.device)
    basis[0] = start / start.norm()
    tridiagonal = torch.zeros(iterations, iterations, dtype=torch.float64)
    found: Tensor | None = None  # eigenvalues when a subspace was last exhausted
    for step in range(iterations):
        image = product(basis[step])
        if not bool(torch.isfinite(image).all()):
            raise ValueError(f"product {step + 1} is not finite")
        tridiagonal[step, step] = float(image @ basis[step])
        rest = _orthogonal(image, basis[: step + 1])
        beta = float(rest.norm())
        values, mixing = torch.linalg.eigh(tridiagonal[: step + 1, : step + 1])
        chosen = values.argsort(descending=True)[:count]
        scale = float(values.abs().max())
        residuals = (beta * mixing[-1, chosen].abs()).clamp(min=torch.finfo(start.dtype).eps * scale)
        report(step + 1, values[chosen], residuals)
        enough = step + 1 >= count and bool((residuals <= tolerance * values[chosen].abs() + _ROUNDING * scale).all())
        # An invariant subspace may lack eigenvectors, such as a second one of the same eigenvalue, although all
        # residuals are zero. From then on, stop only when the subspace of a newly drawn direction has added nothing.
        broken = beta <= _ROUNDING * scale
        if found is None:
            whole = not broken
        else:
            whole = broken and found.shape == values[chosen].shape and torch.allclose(values[chosen], found)
        if (enough and whole) or step + 1 == iterations:
            break
        if broken:
            found = values[chosen]
            drawn = torch.randn(size, generator=source, dtype=torch.float64).to(start)
            rest, beta = _orthogonal(drawn, basis[: step + 1]), 0.0
        basis[step + 1] = rest / rest.norm()
        tridiagonal[step, step + 1] = tridiagonal[step + 1, step] = beta
    vectors = mixing[:, chosen].T.to(basis) @ basis[: step + 1]
    return Eigenpairs(values[chosen], vectors, residuals, step + 1, enough)


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """Return the component of `vector` [n] orthogonal to the orthonormal rows of `basis` [m, n]."""
    for _ in range(2):
        vector = vector - basis.T @ (basis @ vector)
    return vector


def projection_ratio(vectors: Tensor, direction: Tensor) -> float:
    """Return |P d| / |d|, where P projects on the orthonormal rows of `vectors` [k, n], d = `direction` [n]."""
    return float((vectors.double() @ direction.double()).norm() / direction.double().norm())
