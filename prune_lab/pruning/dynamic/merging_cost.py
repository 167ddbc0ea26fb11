"""Cost of convolutions with merged channels on the images they processed, from the actual buckets of their tiles.

The convention of accounting.py, plus single additions, which only merging needs. The cost of hashing is from a public
review of arXiv 2309.17211: L (1 - s) d additions per channel, s being the hyperplanes' expected fraction of zeros.
The rest is reconstructed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from prune_lab.foundations import distributed
from prune_lab.foundations.lazy import torch

if TYPE_CHECKING:
    from torch import nn


@dataclass
class Tally:
    """The work of a layer so far, over all images; every count of operations follows from it."""

    tiles: int = 0
    values: int = 0
    """of the windows, one channel of each: heights times widths"""
    positions: int = 0
    """of the output plane"""
    buckets: int = 0
    bucket_positions: int = 0
    """of each tile its buckets times its positions"""

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Operations:
    """MACs of a convolution, dense and merged, and the single additions (averages: also products) of merging."""

    dense: float
    merged: float
    hashing: float
    centring: float
    averaging: float
    kernel_merge: float

    def overhead(self, addition_cost: float) -> float:
        """Return the cost of merging itself, in MACs, with an addition counted as `addition_cost` MACs."""
        return addition_cost * (self.hashing + self.centring + self.averaging + self.kernel_merge)

    def macs(self, addition_cost: float) -> float:
        return self.merged + self.overhead(addition_cost)

    def __truediv__(self, count: float) -> Operations:
        return Operations(*(value / count for value in astuple(self)))


def count_operations(
    tally: Tally, *, channels: int, outputs: int, kernel: tuple[int, int], num_hyperplanes: int, zero_fraction: float
) -> Operations:
    """Return the operations of a layer with `channels` inputs over all tiles of `tally`.

    Per tile with p positions, windows of d values, M buckets and kernels of k values: hashing takes
    channels * num_hyperplanes * (1 - zero_fraction) * d additions, centring 2 * channels * d, averaging
    (channels - M) * d additions and M * d products, merging kernels (channels - M) * outputs * k additions.
    """
    weights = outputs * prod(kernel)
    return Operations(
        dense=channels * weights * tally.positions,
        merged=weights * tally.bucket_positions,
        hashing=channels * num_hyperplanes * (1 - zero_fraction) * tally.values,
        centring=2 * channels * tally.values,
        averaging=channels * tally.values,
        kernel_merge=(channels * tally.tiles - tally.buckets) * weights,
    )


@dataclass(frozen=True)
class Observation:
    """A network with merging layers on all evaluation images."""

    scores: dict[str, float]
    operations: dict[str, Operations]
    """layer -> means per image"""
    left: dict[str, float]
    """layer -> merged channels over channels, mean over all tiles"""
    channels_left: float
    """the same over the tiles of all layers"""

    def macs_ratio(self, dense: int, addition_cost: float) -> float:
        """Return MACs per image over `dense`, those of the whole dense network; other layers have the rest of it."""
        saved = sum(layer.dense - layer.macs(addition_cost) for layer in self.operations.values())
        return 1 - saved / dense

    def columns(self, addition_cost: float) -> dict[str, dict[str, float]]:
        """Return columns of the layer table: fraction of channels left, MACs per image with and without overhead."""
        return {
            name: {"macs_kept": layer.macs(addition_cost), "macs_without_overhead": layer.merged,
                   "channels_left": self.left[name]}
            for name, layer in self.operations.items()
        }  # fmt: skip


def observe(
    network: nn.Module, layers: Mapping[str, Any], score: Callable[[nn.Module], dict[str, float]]
) -> Observation:
    """Return scores and costs of a network from one pass over all evaluation images; sums over processes.

    Args:
        layers: the network's HashedConv2d by path; their tallies are reset.
        score: passes the images through the network and returns its scores.
    """
    num_images = 0

    def note(_network: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal num_images
        num_images += len(inputs[0])

    for layer in layers.values():
        layer.tally = Tally()
    handle = network.register_forward_pre_hook(note)
    try:
        scores = score(network)
    finally:
        handle.remove()
    counts = [[num_images] * len(astuple(Tally()))] + [list(astuple(layer.tally)) for layer in layers.values()]
    device = next(network.parameters()).device
    total, *sums = distributed.total(torch.tensor(counts, dtype=torch.float64, device=device)).tolist()
    for layer, values in zip(layers.values(), sums, strict=True):
        layer.tally = Tally(*map(int, values))
    used = {name: layer for name, layer in layers.items() if layer.tally.tiles}
    channels = {name: layer.tally.tiles * layer.in_channels for name, layer in used.items()}
    return Observation(
        scores,
        {name: layer.operations() / total[0] for name, layer in used.items()},
        {name: layer.tally.buckets / channels[name] for name, layer in used.items()},
        sum(layer.tally.buckets for layer in used.values()) / sum(channels.values()),
    )
