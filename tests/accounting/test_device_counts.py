"""Whole numbers that may still be on the device: exact, and read late."""

from __future__ import annotations

import torch

from prune_lab.accounting.costs import LayerCost, masked_macs, sparse_macs
from prune_lab.accounting.device_counts import DeviceCounts


def test_sums_are_exact_beyond_64_bits() -> None:
    counts = DeviceCounts({"a": 2**63 - 1, "b": torch.tensor(2**53 + 1)})
    for _ in range(2):
        counts.add({"a": torch.tensor(2**62), "b": 1})
        counts.read()
    assert counts.read() == {"a": 2**64 - 1, "b": 2**53 + 3}
    assert all(type(number) is int for number in counts.read().values())


def test_a_weighted_sum_is_a_tensor_until_the_numbers_are_read() -> None:
    counts, factors = DeviceCounts({"a": torch.tensor(2**30 + 1), "b": 7}), {"a": 2**30 + 1, "b": 3, "c": 9}
    waiting = counts.weighted_sum(factors)
    assert waiting.dtype == torch.int64 and waiting.item() == (2**30 + 1) ** 2 + 21
    counts.read()
    assert counts.weighted_sum(factors) == (2**30 + 1) ** 2 + 21 and DeviceCounts({}).weighted_sum({}) == 0


def test_macs_of_counts_on_the_device_are_those_of_the_host() -> None:
    """Weights that are used in two places, not at all, or without a mask."""
    used = (("a", 16, 9), ("b", 8, 4), ("a", 16, 25), ("c", 32, 1))
    costs = [LayerCost(name, name, "linear", (weights,), weights, positions) for name, weights, positions in used]
    kept = {"a": 5, "b": 0, "unused": 3}
    waiting = masked_macs(costs, DeviceCounts({name: torch.tensor(count) for name, count in kept.items()}))
    assert waiting.item() == masked_macs(costs, DeviceCounts(kept)) == sparse_macs(costs, kept) == 5 * 34 + 32
