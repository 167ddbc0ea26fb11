"""Linear minimisation oracles: the point of a convex set at which a linear function is least.

For a gradient g of any shape and a size tau > 0 each returns argmin <g, v> over its set, zeros where g has none.

Source: the sets of Pokutta, Spiegel, Zimmer 2020, arXiv 2010.07243 (from memory, not checked with the paper).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prune_lab.foundations.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def l2_ball(gradient: Tensor, tau: float) -> Tensor:
    """Return the minimiser over |v|_2 <= tau: -tau g / |g|."""
    norm = torch.linalg.vector_norm(gradient)
    return -tau * gradient / torch.where(norm > 0, norm, 1.0)


def box(gradient: Tensor, tau: float) -> Tensor:
    """Return the minimiser over |v_i| <= tau: -tau sign(g)."""
    return -tau * gradient.sign()


def k_sparse(gradient: Tensor, tau: float, k: int) -> Tensor:
    """Return the minimiser over the convex hull of vectors with k entries +-tau, zeros elsewhere."""
    return box(_largest(gradient, k), tau)


def k_support(gradient: Tensor, tau: float, k: int) -> Tensor:
    """Return the minimiser over the convex hull of vectors with k non-zero entries and |v|_2 <= tau."""
    return l2_ball(_largest(gradient, k), tau)


def _largest(gradient: Tensor, k: int) -> Tensor:
    """Return `gradient` with zeros but for its k largest magnitudes; of equal ones the first.

    Raises:
        ValueError: k lies outside 1 to the number of entries.
    """
    if not 1 <= k <= gradient.numel():
        raise ValueError(f"k must lie in [1, {gradient.numel()}], got {k}")
    flat = gradient.flatten()
    order = flat.abs().argsort(descending=True, stable=True)[:k]
    return torch.zeros_like(flat).index_copy(0, order, flat[order]).view_as(gradient)
