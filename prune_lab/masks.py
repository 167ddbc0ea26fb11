"""Masks: exact selections of weights, and the set of masks that keeps pruned weights at zero."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prune_lab.numerics import bits_of
from prune_lab.sparsity_schedules import floor_product


def keep_top(score: Tensor, num_keep: int, *, candidates: Tensor | None = None) -> Tensor:
    """Return a bool mask shaped like `score` with exactly `num_keep` True: the highest scores among `candidates`.

    Ties go to the lower index in row-major order, whatever the memory format, so every process chooses alike.

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


def ranks(score: Tensor) -> Tensor:
    """Return integers, shaped like `score`, in the order of its values: equal for both zeros, beyond infinity for NaN.

    Comparing them is exact in every thread. Numbers below the normal range act as zero in threads that flush them and
    not in others: a selection that compares such scores in several threads keeps a wrong number of them.
    """
    if not score.is_floating_point():
        return score
    bits = bits_of(score)
    negative = bits < 0
    if not negative.any():  # scores are mostly absolute values
        return bits
    return torch.where(negative, torch.iinfo(bits.dtype).min - bits, bits)  # sign and magnitude to two's complement


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
        least: weights that every layer keeps in any case (all of its candidates if it has fewer).
    """
    flat = torch.cat([score.detach().reshape(-1) for score in scores.values()])
    pool = None if candidates is None else torch.cat([candidates[name].reshape(-1) for name in scores])
    kept = torch.zeros_like(flat, dtype=torch.bool)
    if least:
        where = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
        where = where if candidates is None else candidates
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

    Positions dropped a moment ago are candidates like all others.

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


class MaskSet:
    """The masks of a network, True = kept, keyed by parameter path.

    Masks take the memory format of their weights, so that one fused multiplication applies them all.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        """Take `masks` for `parameters`.

        Raises:
            ValueError: names that do not match, wrong shape, or a mask that is not bool.
        """
        self._parameters = dict(parameters)
        self.masks: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._unread: Tensor | None = None
        self.replace_all(masks)

    def replace(self, name: str, mask: Tensor) -> None:
        """Take a new mask for parameter `name`; the weights follow at the next `apply`."""
        if name not in self._parameters:
            raise ValueError(f"no parameter {name} under masks")
        self._counts = self.counts() | {name: int(self._put(name, mask))}

    def replace_all(self, masks: Mapping[str, Tensor]) -> None:
        """Take new masks for all parameters, as `replace` does; their counts stay on the device until asked for."""
        if set(self._parameters) != set(masks):
            raise ValueError(f"masks and parameters differ: {sorted(set(self._parameters) ^ set(masks))}")
        counts = [self._put(name, masks[name]) for name in self.masks or list(masks)]
        self._unread = torch.stack(counts) if counts else None

    def _put(self, name: str, mask: Tensor) -> Tensor:
        """Take a mask and return its count, still on the device."""
        weight = self._parameters[name]
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            wanted, got = tuple(weight.shape), tuple(mask.shape)
            raise ValueError(f"mask of {name} must be bool of shape {wanted}, got {mask.dtype} {got}")
        self.masks[name] = torch.empty_like(weight, dtype=torch.bool).copy_(mask)
        return torch.count_nonzero(self.masks[name])

    @torch.no_grad()
    def apply(self) -> None:
        """Zero every pruned weight in place."""
        torch._foreach_mul_([self._parameters[name] for name in self.masks], list(self.masks.values()))

    def masked_grads(self) -> dict[str, Tensor]:
        """Return copies of the gradients with zeros at pruned positions."""
        named = {name: mask for name, mask in self.masks.items() if self._parameters[name].grad is not None}
        grads = torch._foreach_mul([self._parameters[name].grad for name in named], list(named.values()))
        return dict(zip(named, grads, strict=True))

    def counts(self) -> dict[str, int]:
        """Return kept weights per parameter; the first time after `replace_all` the host waits for the device."""
        if self._unread is not None:
            self._counts, self._unread = dict(zip(self.masks, self._unread.tolist(), strict=True)), None
        return dict(self._counts)

    def unread_counts(self) -> Tensor | None:
        """Return kept weights per mask as int64 [masks] on the device, None if `counts` costs nothing."""
        return self._unread

    @property
    def num_kept(self) -> int:
        return sum(self.counts().values())

    @property
    def num_weights(self) -> int:
        return sum(mask.numel() for mask in self.masks.values())

    @property
    def density(self) -> float:
        return self.num_kept / self.num_weights

    def digest(self) -> str:
        """Return a hash of all masks in row-major order."""
        hasher = hashlib.sha256()
        for name, mask in self.masks.items():
            hasher.update(name.encode())
            hasher.update(mask.contiguous().cpu().numpy().tobytes())
        return hasher.hexdigest()

    @torch.no_grad()
    def zero_state(self, optimizer: torch.optim.Optimizer, positions: Mapping[str, Tensor]) -> None:
        """Zero the optimizer's state (momentum, both Adam moments) at `positions`; step counters stay.

        Raises:
            ValueError: the optimizer keeps a tensor of another shape for a weight, whose meaning is unknown.
        """
        for name, where in positions.items():
            parameter = self._parameters[name]
            for key, value in optimizer.state.get(parameter, {}).items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    value.masked_fill_(where, 0)
                elif torch.is_tensor(value) and value.numel() != 1:
                    raise ValueError(f"optimizer state {key} of {name} has shape {tuple(value.shape)}: cannot reset it")

    @torch.no_grad()
    def mask_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero the optimizer's running means of every pruned weight."""
        named = [(self._parameters[name], mask) for name, mask in self.masks.items()]
        states = [(value, mask) for parameter, mask in named for value in optimizer.state.get(parameter, {}).values()
                  if torch.is_tensor(value) and value.shape == parameter.shape]
        if states:
            torch._foreach_mul_([value for value, _ in states], [mask for _, mask in states])

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.masks)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back masks.

        Raises:
            ValueError: names or shapes differ from the present ones.
        """
        if set(state) != set(self.masks):
            raise ValueError(f"masks in the file are for other parameters: {sorted(set(state) ^ set(self.masks))}")
        for name, mask in state.items():
            self.replace(name, mask)
