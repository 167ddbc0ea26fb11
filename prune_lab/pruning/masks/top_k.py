"""Exact selection of the largest scores, with ties broken in one fixed way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from prune_lab.foundations.bits import bits_of
from prune_lab.foundations.lazy import torch
from prune_lab.pruning.masks.sparsity_schedules import floor_product

if TYPE_CHECKING:
    from torch import Tensor


def keep_top(score: Tensor, num_keep: int, *, candidates: Tensor | None = None) -> Tensor:
    """Return a bool mask shaped like `score` with exactly `num_keep` True: the highest scores among `candidates`.

    Ties go to the lower index in row-major order, for any memory format, so that every process chooses the same.

    Args:
        score: any shape, higher is kept first.
        num_keep: 0 <= num_keep <= number of candidates.
        candidates: bool, shaped like `score`; None: all positions.

    Raises:
        ValueError: NaN among the candidates, or fewer candidates than `num_keep`.
    """
    flat = ranks(score.detach().reshape(-1))
    where = None if candidates is None else candidates.reshape(-1)
    pool = flat if where is None else _select(flat, where)
    if not 0 <= num_keep <= len(pool):
        raise ValueError(f"cannot keep {num_keep} of {len(pool)} candidates")
    if score.is_floating_point() and len(pool):
        infinity = int(bits_of(torch.tensor(torch.inf, dtype=score.dtype)))
        if max(abs(int(bound)) for bound in pool.aminmax()) > infinity:
            raise ValueError("score is NaN at a candidate position")
    if num_keep == 0:
        return torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    # The threshold is found by selection: a full index sort of 2.4 M values takes 3-4 times as long.
    threshold = _kth_largest(pool, num_keep)
    mask, ties = flat > threshold, flat == threshold
    if where is not None:
        mask &= where
        ties &= where
    mask[ties.nonzero().squeeze(1)[: num_keep - int(torch.count_nonzero(mask))]] = True
    return mask.view(score.shape)


def _select(values: Tensor, where: Tensor) -> Tensor:
    """Return the values at True positions; NumPy's selection is several times faster than torch's on a CPU."""
    if values.device.type != "cpu":
        return values[where]
    return torch.from_numpy(values.numpy()[where.numpy()])


def _kth_largest(pool: Tensor, k: int) -> Tensor:
    position = len(pool) - k
    if pool.device.type == "cpu":
        # NumPy's introselect is the fastest selection on a CPU.
        import numpy

        return torch.as_tensor(numpy.partition(pool.numpy(), position)[position])
    return pool.kthvalue(position + 1).values


def keep_top_global(
    scores: Mapping[str, Tensor],
    num_keep: int,
    *,
    candidates: Mapping[str, Tensor] | None = None,
    least: int = 0,
) -> dict[str, Tensor]:
    """Return masks with `num_keep` True over all layers together; ties: earlier layer, then lower index.

    Args:
        least: minimum number of weights of every layer (all of its candidates if it has fewer).
    """
    flat = torch.cat([score.detach().reshape(-1) for score in scores.values()])
    pool = None if candidates is None else torch.cat([candidates[name].reshape(-1) for name in scores])
    kept = torch.zeros_like(flat, dtype=torch.bool)
    if least:
        everywhere = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
        where = everywhere if candidates is None else candidates
        sure = [keep_top(s, min(least, int(where[n].sum())), candidates=where[n]) for n, s in scores.items()]
        kept = torch.cat([mask.reshape(-1) for mask in sure])
        pool = ~kept if pool is None else pool & ~kept
    kept = kept | keep_top(flat, num_keep - int(kept.sum()), candidates=pool)
    parts = kept.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def random_mask(shape: tuple[int, ...], num_keep: int, generator: torch.Generator) -> Tensor:
    """Return a bool mask of `shape` with exactly `num_keep` True, every choice equally likely."""
    return keep_top(torch.rand(shape, generator=generator, dtype=torch.float64), num_keep)


def grow(kept: Tensor, score: Tensor, num_total: int) -> Tensor:
    """Return `kept` joined with the highest-scoring other positions, `num_total` True in all.

    Positions just dropped are candidates like all others.

    Source: Evci et al. 2020, algorithm 1, arXiv 1911.11134.
    """
    return kept | keep_top(score, num_total - int(torch.count_nonzero(kept)), candidates=~kept)


def keep_by_sign(weight: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """Return `mask` without floor(fraction * count) weights nearest to zero on each side of zero.

    Kept weights that are exactly zero (just grown) count as positive.

    Source: Mocanu et al. 2018, arXiv 1707.04780.
    """
    kept = torch.zeros_like(mask)
    for side in (mask & (weight >= 0), mask & (weight < 0)):
        count = int(side.sum())
        kept |= keep_top(weight.abs(), count - floor_product(fraction * count), candidates=side)
    return kept


def ranks(score: Tensor) -> Tensor:
    """Return integers, shaped like `score`, in the order of its values: equal for both zeros, beyond infinity for NaN.

    Comparing them is exact in every thread. Numbers below the normal range act as zero in threads that flush them and
    not in others. A selection that compares such scores in several threads keeps a wrong number of them.
    """
    if not score.is_floating_point():
        return score
    bits = bits_of(score)
    negative = bits < 0
    if not negative.any():  # scores are mostly absolute values
        return bits
    return torch.where(negative, torch.iinfo(bits.dtype).min - bits, bits)  # sign and magnitude to two's complement
