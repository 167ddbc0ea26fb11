"""Minibatches of training images for measurements outside of the training loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from prune_lab.context import Context
from prune_lab.seeding import stable_hash


class DrawnImages:
    """Training images drawn from the seed, the phase and a word of their own; the same on every process."""

    def __init__(self, context: Context, layer: str, *, augment: bool) -> None:
        """Take `layer` as part of the key of every draw.

        Args:
            augment: crops and flips of training; False: images as for evaluation.
        """
        self.context, self._layer, self._augment = context, layer, augment

    def positions(self, word: str, count: int) -> Tensor:
        """Return `count` different positions in the training set, or all of it in random order if it has no more."""
        order = torch.randperm(
            self.context.dataset.info.num_train, generator=self.context.generator(word, self._layer)
        )
        return order[:count]

    def read(self, word: str, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels) at each of `batches` of positions."""
        seed = stable_hash(self.context.seed, word, self._layer) if self._augment else None
        for images, labels in self.context.dataset.train_subset(list(batches), augment_seed=seed):
            self.context.poll()
            yield images, labels

    def stream(
        self, word: str, batch: int, *, fresh: bool, count: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield minibatches, `count` of them or without end: epoch after epoch in random order, or always the first."""
        num_train = self.context.dataset.info.num_train
        batch, done = min(batch, num_train), 0
        for round_number in range(1 << 62):
            order = self.positions(f"{word} {round_number}", num_train)
            parts = [part for part in order.split(batch) if len(part) == batch][: 1 if not fresh else count]
            for pair in self.read(f"{word} {round_number}", parts):
                while True:
                    yield pair
                    done += 1
                    if done == count:
                        return
                    if fresh:
                        break


def evenly(available: int, wanted: int) -> Tensor:
    """Return positions evenly spread over `available`, all of them if no more are there."""
    wanted = min(wanted, available)
    return torch.arange(wanted) * available // wanted
