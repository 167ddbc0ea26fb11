"""2:4 sparsity: exactly two weights stay in every group of four consecutive input channels.

A group has one output channel and one kernel position. It lies along the summation axis of a channels-last convolution
as a matrix product, as sparse tensor cores require (Mishra et al. 2021, arXiv 2104.08378).

`keep_top`, `grow` and `random_mask` are those of `masks` for 2:4, with the same arguments.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from prune_lab.accounting.eligibility import GROUP, has_groups
from prune_lab.foundations.lazy import torch
from prune_lab.pruning.masks import top_k

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 2


def to_groups(values: Tensor) -> Tensor:
    """Return [out, in, ...] as [out, in / 4, ..., 4], a view."""
    groups: Tensor = values.unflatten(1, (-1, GROUP))
    return groups.movedim(2, -1)


def from_groups(groups: Tensor) -> Tensor:
    """Return [out, in / 4, ..., n] as [out, in / 4 * n, ...]."""
    return groups.movedim(-1, 2).flatten(1, 2)


def is_semi_structured(weight: Tensor) -> bool:
    """Return whether no group of `weight`, which may be a mask, has more than two nonzeros."""
    return has_groups(tuple(weight.shape)) and bool((_count(weight != 0) <= KEPT).all())


def keep_top(score: Tensor, num_keep: int, *, candidates: Tensor | None = None) -> Tensor:
    """Return a mask with `num_keep` True: the best two candidates of each group, then the best of the rest.

    With half of the weights that is 2:4; a method that prunes in rounds keeps more before that. Ties go to the lower
    channel within a group and to the lower index among groups.

    Raises:
        ValueError: NaN among the candidates, a group with fewer than two, or `num_keep` below two of each group or
            above the number of candidates.
    """
    return grow(torch.zeros_like(score, dtype=torch.bool), score, num_keep, candidates=candidates)


def grow(kept: Tensor, score: Tensor, num_total: int, *, candidates: Tensor | None = None) -> Tensor:
    """Return `kept` joined with the best other candidates, `num_total` True in all.

    Each group is first filled up to two, so that a weight dropped from a 2:4 mask is replaced within its group.

    Raises:
        ValueError: as `keep_top`.
    """
    score = score.detach()
    free = ~kept if candidates is None else candidates & ~kept
    if (torch.isnan(score) & free).any():
        raise ValueError("score is NaN at a candidate position")
    score = top_k.ranks(score)
    lacking = KEPT - _count(kept)
    candidates_of = to_groups(free).unbind(-1)
    places = _places(to_groups(score).unbind(-1), candidates_of)
    chosen = [(place < lacking) & where for place, where in zip(places, candidates_of, strict=True)]
    filled = kept | torch.stack(chosen, 2).flatten(1, 2)
    if (_count(filled) < KEPT).any():
        raise ValueError("a group of four has fewer than two candidates")
    missing = num_total - int(torch.count_nonzero(filled))
    if missing < 0:
        raise ValueError(f"cannot keep {num_total} of {score.numel()} weights with two in every group of four")
    return filled | top_k.keep_top(score, missing, candidates=free & ~filled) if missing else filled


def _count(mask: Tensor) -> Tensor:
    """Return how many of each group are True; adding four slices takes less time than summing many short rows."""
    one, *others = to_groups(mask).unbind(-1)
    count = one.to(torch.int8)
    for other in others:
        count += other
    return count


def _places(scores: Sequence[Tensor], candidates: Sequence[Tensor]) -> list[Tensor]:
    """Return for each of a group's four positions its rank within the group, 0 for the best of the candidates.

    Comparing slices takes less time than sorting many short rows.
    """
    places = [torch.zeros(score.shape, dtype=torch.int8, device=score.device) for score in scores]
    for one, other in itertools.combinations(range(GROUP), 2):
        wins = candidates[one] & (~candidates[other] | (scores[one] >= scores[other]))
        places[other] += wins
        places[one] += ~wins
    return places


def random_mask(shape: tuple[int, ...], num_keep: int, generator: torch.Generator) -> Tensor:
    """Return a random mask of `shape`; with half of the weights each of a group's six pairs is equally likely."""
    return keep_top(torch.rand(shape, generator=generator, dtype=torch.float64), num_keep)


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two kept values of each group [out, in / 2, ...] and their positions [out, in / 4, ...].

    Positions are uint8: the first in bits 0-1, the second, which is the larger, in bits 2-3. This is the format of
    sparse tensor cores, four bits per group. A group with fewer than two nonzeros keeps zeros.

    Raises:
        ValueError: a group has more than two nonzeros.
    """
    if not is_semi_structured(weight):
        raise ValueError("the weights are not 2:4")
    groups = to_groups(weight.detach())
    mask = to_groups(keep_top(weight.detach().abs(), weight.numel() // 2))
    places = torch.arange(GROUP, device=weight.device).expand(groups.shape)[mask].view(*groups.shape[:-1], KEPT)
    return from_groups(groups.gather(-1, places)), (places[..., 0] | places[..., 1] << 2).to(torch.uint8)


def unpack(values: Tensor, places: Tensor) -> Tensor:
    """Return the weights from the result of `pack`, [out, in, ...]."""
    pairs = values.unflatten(1, (-1, KEPT)).movedim(2, -1)
    groups = values.new_zeros((*pairs.shape[:-1], GROUP))
    return from_groups(groups.scatter_(-1, torch.stack((places & 3, places >> 2), -1).long(), pairs))
