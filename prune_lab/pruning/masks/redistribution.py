"""Redistribution of the dropped weights among layers: pure functions of numbers, no tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

from prune_lab.pruning.masks.distributions import largest_remainder

_NEARLY_DENSE = 0.2


def shares(claims: Mapping[str, float]) -> dict[str, float]:
    """Return claims scaled to the sum 1.

    Raises:
        ValueError: no layer has a claim, or one is not finite.
    """
    total = sum(claims.values())
    if not 0 < total < math.inf:
        raise ValueError(f"the claims of all layers on new weights add up to {total:g}")
    return {name: claim / total for name, claim in claims.items()}


def drop_fractions(
    fraction: float, share: Mapping[str, float], sparsity: Mapping[str, float]
) -> dict[str, float]:
    """Return the fraction that each layer drops: less for a nearly dense layer that would regrow it all.

    Source: official code of Dettmers, Zettlemoyer 2019, arXiv 1907.04840: a layer of sparsity below 0.2 with more than
    the average share drops at most its sparsity.
    """
    return {
        name: min(sparsity[name], fraction) if sparsity[name] < _NEARLY_DENSE and part > 1 / len(share) else fraction
        for name, part in share.items()
    }


def apportion(share: Mapping[str, float], room: Mapping[str, int], total: int) -> dict[str, int]:
    """Return integers in proportion to `share`, none above `room`, that add up to `total` exactly.

    Layers without room for their part are filled and the rest is shared again in proportion; fractions are rounded by
    largest remainder. The excess over the room of layers with a share goes to the others in proportion to their room.

    Raises:
        ValueError: `total` exceeds the room of all layers.
    """
    if total > sum(room.values()):
        raise ValueError(f"no room for {total} weights in {sum(room.values())} positions")
    targets = dict.fromkeys(share, 0.0)
    for weight in (share, room):  # the second round only places the excess of the first
        free = {name for name in share if weight[name] > 0 and targets[name] < room[name]}
        left = total - sum(targets.values())
        while free and left > 1e-9:
            per_weight = left / sum(weight[name] for name in share if name in free)
            full = {name for name in free if targets[name] + per_weight * weight[name] >= room[name]}
            for name in full or free:
                targets[name] = float(room[name]) if full else targets[name] + per_weight * weight[name]
            left = total - sum(targets.values())
            free = free - full if full else set()
    return largest_remainder(targets, room, total)


def apportion_official(share: Mapping[str, float], room: Mapping[str, int], total: float) -> dict[str, int]:
    """Return the growth per layer by the official rule of sparse momentum; it need not add up to `total`.

    ceil(share * total), at most 0.99 of the room. The excess is divided equally among all layers, repeatedly; finally
    rounded down.

    Source: official code of Dettmers, Zettlemoyer 2019, arXiv 1907.04840.
    """
    caps = {name: 0.99 * places for name, places in room.items()}
    grown = {name: float(math.ceil(part * total)) for name, part in share.items()}
    for _ in range(1000):
        excess = sum(max(grown[name] - caps[name], 0.0) for name in grown)
        if excess <= 1e-9:
            break
        grown = {name: min(grown[name], caps[name]) + excess / len(grown) for name in grown}
    return {name: max(math.floor(min(grown[name], caps[name]) + 1e-6), 0) for name in grown}
