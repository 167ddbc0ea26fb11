"""What a network is trained for: its loss, the figures of an epoch and of an evaluation, the metric that counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

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
    digits: int = 2

    def text(self, value: float) -> str:
        """Return title, value and unit."""
        return " ".join(filter(None, [self.title, f"{value:.{self.digits}f}", self.unit]))


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
    def figures(self) -> tuple[str, ...]:
        """The keys of an evaluation's figures."""

    @property
    def num_training_sums(self) -> int:
        """Length of the sums of a training."""

    @property
    def num_evaluation_sums(self) -> int:
        """Length of the sums of an evaluation."""

    def forward(self, network: Callable[..., Any], inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return the outputs of a batch in fp32, and the state with which the next batch goes through the network."""

    def num_units(self, targets: Tensor) -> int:
        """Return how many units a batch holds; costs are per unit."""

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
    figures: tuple[str, ...] = ("loss", "top1", "top5")
    num_training_sums: int = 3
    num_evaluation_sums: int = 4

    def forward(self, network: Callable[..., Any], inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        return network(inputs).float(), None

    def num_units(self, targets: Tensor) -> int:
        return len(targets)

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


IGNORED = -100
"""target that does not count: torch's ignore_index"""


@dataclass(frozen=True)
class LanguageModelling:
    """The next symbol of a text: cross-entropy in nats. Outputs [rows, time, symbols], targets [rows, time].

    Bits per character are nats / ln 2 where a symbol is a byte; perplexity is e^nats where it is a word.
    """

    unit: str = "bytes"
    carry_state: bool = True
    """False: the state of a recurrent network begins anew with each batch"""
    num_training_sums: int = 2
    num_evaluation_sums: int = 2

    @property
    def headline(self) -> Metric:
        if self.unit == "bytes":
            return Metric("bpc", "bits per character", "", more_is_better=False, digits=4)
        return Metric("perplexity", "perplexity", "", more_is_better=False)

    @property
    def figures(self) -> tuple[str, ...]:
        return ("loss", self.headline.key)

    def forward(self, network: Callable[..., Any], inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        outputs, state = network(inputs, state if self.carry_state else None)
        return outputs.float(), state

    def loss(self, outputs: Tensor, targets: Tensor, *, label_smoothing: float) -> Tensor:
        return _cross_entropy(outputs, targets, label_smoothing=label_smoothing)

    def num_units(self, targets: Tensor) -> int:
        return targets.numel()

    def add_training(self, sums: Tensor, loss: Tensor, outputs: Tensor, targets: Tensor) -> None:
        sums[0] += loss * targets.numel()
        sums[1] += targets.numel()

    def training_figures(self, sums: Sequence[float]) -> dict[str, float]:
        nats = sums[0] / sums[1]
        return {"loss": nats, self.headline.key: nats / math.log(2) if self.unit == "bytes" else _exp(nats)}

    def add_evaluation(self, sums: Tensor, outputs: Tensor, targets: Tensor) -> None:
        sums[0] += _cross_entropy(outputs, targets, reduction="sum")
        sums[1] += (targets != IGNORED).sum()

    def evaluation_figures(self, sums: Sequence[float]) -> dict[str, float]:
        return self.training_figures(sums)


def _cross_entropy(outputs: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return torch.nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, **options)


def _exp(nats: float) -> float:
    """Return e^nats, infinite where that is no float64."""
    return math.exp(nats) if nats < 700 else math.inf
