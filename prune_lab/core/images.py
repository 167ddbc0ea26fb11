"""Minibatches of training images for measurements outside the training loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.seeding import stable_hash

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.core.context import Context


class DrawnImages:
    """Training images drawn from the seed, the phase and their own key; the same on every process."""

    def __init__(self, context: Context, layer: str, *, augment: bool) -> None:
        """Make `layer` part of the key of every draw.

        Args:
            augment: crops and flips as in training; False: images as for evaluation.
        """
        self.context, self._layer, self._augment = context, layer, augment

    def positions(self, key: str, count: int) -> Tensor:
        """Return `count` distinct positions in the training set, or all in random order if it has no more."""
        order = torch.randperm(
            self.context.dataset.info.num_train, generator=self.context.generator(key, self._layer)
        )
        return order[:count]

    def read(self, key: str, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels) for each batch of positions."""
        seed = stable_hash(self.context.seed, key, self._layer) if self._augment else None
        for images, labels in self.context.dataset.train_subset(list(batches), augment_seed=seed):
            self.context.poll()
            yield images, labels

    def stream(
        self, key: str, batch: int, *, fresh: bool, count: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `count` minibatches, or an endless stream: epochs in random order, or always the first one."""
        num_train = self.context.dataset.info.num_train
        batch, done = min(batch, num_train), 0
        for round_number in range(1 << 62):
            order = self.positions(f"{key} {round_number}", num_train)
            parts = [part for part in order.split(batch) if len(part) == batch][: 1 if not fresh else count]
            for pair in self.read(f"{key} {round_number}", parts):
                while True:
                    yield pair
                    done += 1
                    if done == count:
                        return
                    if fresh:
                        break


def evenly(available: int, wanted: int) -> Tensor:
    """Return `wanted` positions evenly spread over `available`, or all if there are no more."""
    wanted = min(wanted, available)
    return torch.arange(wanted) * available // wanted


Order = Literal["stratified", "class_sorted", "random"]


def batches(
    context: Context,
    *,
    per_class: int,
    batch_size: int,
    order: Order = "stratified",
    augment: bool = False,
    rounds: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images, labels) of `per_class` training images of every class, in batches of nearly equal size.

    The images are drawn from the seed, the same on every process and in every call.

    Args:
        batch_size: maximum number of images per batch.
        order: stratified: classes take turns, so that every batch holds equally many of each; class_sorted: class after
            class (official GraSP code); random.
        augment: crops and flips as in training, the same in every call; False: images as for evaluation.
        rounds: number of draws of `per_class` images of every class; no image is drawn twice.

    Raises:
        UserError: a class has fewer images.
    """
    source, num_classes = context.generator("scoring images"), context.dataset.info.num_classes
    check_classes(context.dataset.train_labels, per_class, num_classes, rounds=rounds)
    drawn = _draw(context.dataset.train_labels, per_class * rounds, num_classes, source)
    chosen = [_ordered(part, order, source) for part in drawn.split(per_class, dim=1)]
    parts = -(-per_class * num_classes // batch_size)
    seed = context.seed if augment else None
    positions = [batch for part in chosen for batch in part.tensor_split(parts)]
    for images, labels in context.dataset.train_subset(positions, augment_seed=seed):
        context.poll()
        yield images, labels


def _draw(labels: Tensor, count: int, num_classes: int, source: torch.Generator) -> Tensor:
    """Return random positions [num_classes, count] in `labels`, one row per class."""
    rows = []
    for label in range(num_classes):
        members = (labels == label).nonzero().flatten()
        rows.append(members[torch.randperm(len(members), generator=source)[:count]])
    return torch.stack(rows)


def _ordered(rows: Tensor, order: Order, source: torch.Generator) -> Tensor:
    """Return the entries of `rows` [num_classes, per_class], flat."""
    if order == "random":
        flat = rows.flatten()
        return flat[torch.randperm(len(flat), generator=source)]
    return rows.flatten() if order == "class_sorted" else rows.t().flatten()


def check_classes(labels: Tensor, per_class: int, num_classes: int, *, rounds: int = 1) -> None:
    """Raise UserError if a class has fewer than `per_class` x `rounds` of `labels`."""
    for label, count in enumerate(torch.bincount(labels, minlength=num_classes).tolist()):
        if count < per_class * rounds:
            times = f" x method.rounds={rounds}" if rounds > 1 else ""
            raise UserError(
                f"method.samples_per_class={per_class}{times} exceeds the {count} training images of class {label}"
            )


def most_per_class(labels: Tensor, wanted: int, num_classes: int) -> int:
    """Return the number of images that every class can provide, up to `wanted`; 0 if a class has none."""
    return min(wanted, int(torch.bincount(labels, minlength=num_classes).min()))
