"""Assignment of images: held-out images, order of an epoch, shards of ranks. No images here."""

from __future__ import annotations

import torch
from torch import Tensor

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.seeding import generator


def held_out_counts(counts: list[int], fraction: float) -> list[int]:
    """Return how many images of each class to hold out, round(fraction * sum(counts)) in total.

    Args:
        counts: images per class.
        fraction: in [0, 1). Classes share the total by largest remainder; ties go to the lower class.
    """
    total = round(fraction * sum(counts))
    quotas = [fraction * count for count in counts]
    result = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(counts)), key=lambda c: (result[c] - quotas[c], c))
    for c in by_remainder[: total - sum(result)]:
        result[c] += 1
    return result


def hold_out(labels: Tensor, fraction: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices (kept, held out) of a stratified split, both ascending.

    Args:
        labels: [N] int64, classes 0, 1, ...
        fraction: of all images to hold out, in [0, 1).
        seed: chooses the images within each class.

    Raises:
        UserError: the fraction is so small that no image, or so large that every image, is held out.
    """
    is_held_out = torch.zeros(len(labels), dtype=torch.bool)
    if fraction > 0:
        counts = torch.bincount(labels).tolist()
        for c, num in enumerate(held_out_counts(counts, fraction)):
            members = (labels == c).nonzero().flatten()
            chosen = torch.randperm(len(members), generator=generator(seed, "validation", c))[:num]
            is_held_out[members[chosen]] = True
        num = int(is_held_out.sum())
        if num in (0, len(labels)):
            raise UserError(f"dataset.validation={fraction} holds out {num} of {len(labels)} training images")
    return (~is_held_out).nonzero().flatten(), is_held_out.nonzero().flatten()


def epoch_order(num_images: int, *, epoch: int, seed: int) -> Tensor:
    """Return the permutation [num_images] in which `epoch` visits the images."""
    return torch.randperm(num_images, generator=generator(seed, "order", epoch))


def count_batches(num_images: int, batch_size: int) -> int:
    """Return the number of full batches in an epoch.

    Raises:
        UserError: not even one batch is full.
    """
    if not 1 <= batch_size <= num_images:
        raise UserError(f"schedule.batch_size must lie in [1, {num_images}] (training images), got {batch_size}")
    return num_images // batch_size


def batch_shard(batch_size: int, *, rank: int, world_size: int) -> slice:
    """Return the part of every global batch that `rank` trains on.

    Raises:
        UserError: ranks would get shards of different size, and their averaged gradients a wrong weight.
    """
    if batch_size % world_size:
        raise UserError(f"schedule.batch_size must be a multiple of the {world_size} processes, got {batch_size}")
    size = batch_size // world_size
    return slice(rank * size, (rank + 1) * size)


def eval_range(num_images: int, *, rank: int, world_size: int) -> range:
    """Return the images that `rank` evaluates; the ranges of all ranks cover every image exactly once."""
    return range(rank * num_images // world_size, (rank + 1) * num_images // world_size)


def eval_order(num_images: int) -> Tensor:
    """Return the fixed order in which a split is evaluated: shuffled, always the same."""
    return torch.randperm(num_images, generator=generator(0, "evaluation order", num_images))
