"""What a network is trained for: its loss, the figures of an epoch and of an evaluation, the metric that counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from prune_lab.foundations.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """A figure by which networks are compared."""

    key: str
    """last part of its key in records and summaries, such as top1 in final/top1"""
    title: str
    unit: str
    """such as %, may be empty"""
    more_is_better: bool


class Task(Protocol):
    """What differs between the things that a network can be trained for.

    Sums are float64 tensors on the device to which batches are added in place, so that nothing waits for it. Their last
    entry counts the units that a mean is over.
    """

    @property
    def unit(self) -> str:
        """What is counted: images, characters, words."""

    @property
    def headline(self) -> Metric:
        """The metric by which networks are compared."""

    @property
    def num_training_sums(self) -> int:
        """Length of the sums of a training."""

    @property
    def num_evaluation_sums(self) -> int:
        """Length of the sums of an evaluation."""

    def loss(self, outputs: Tensor, targets: Tensor, *, label_smoothing: float) -> Tensor:
        """Return the mean loss of a batch."""

    def add_training(self, sums: Tensor, loss: Tensor, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch of training, whose mean loss is known."""

    def training_figures(self, sums: Sequence[float]) -> dict[str, float]:
        """Return the figures of an epoch, without the prefix train/."""

    def add_evaluation(self, sums: Tensor, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch of an evaluation."""

    def evaluation_figures(self, sums: Sequence[float]) -> dict[str, float]:
        """Return the figures of a split; `loss` is one of them, the headline another."""


@dataclass(frozen=True)
class Classification:
    """One label per image: cross-entropy in nats, percent top-1 and top-5. Outputs [b, classes], targets [b]."""

    unit: str = "images"
    headline: Metric = Metric("top1", "top-1", "%", more_is_better=True)
    num_training_sums: int = 3
    num_evaluation_sums: int = 4

    def loss(self, outputs: Tensor, targets: Tensor, *, label_smoothing: float) -> Tensor:
        return torch.nn.functional.cross_entropy(outputs, targets, label_smoothing=label_smoothing)

    def add_training(self, sums: Tensor, loss: Tensor, outputs: Tensor, targets: Tensor) -> None:
        sums[0] += loss * len(targets)
        sums[1] += (outputs.argmax(1) == targets).sum()
        sums[2] += len(targets)

    def training_figures(self, sums: Sequence[float]) -> dict[str, float]:
        loss, correct, images = sums
        return {"loss": loss / images, "top1": 100 * correct / images}

    def add_evaluation(self, sums: Tensor, outputs: Tensor, targets: Tensor) -> None:
        best = outputs.topk(min(5, outputs.shape[1]), dim=1).indices == targets[:, None]
        sums[0] += torch.nn.functional.cross_entropy(outputs, targets, reduction="sum")
        sums[1] += best[:, 0].sum()
        sums[2] += best.sum()
        sums[3] += len(targets)

    def evaluation_figures(self, sums: Sequence[float]) -> dict[str, float]:
        loss, top1, top5, images = sums
        return {"loss": loss / images, "top1": 100 * top1 / images, "top5": 100 * top5 / images}
