"""A pruning phase before training on a network and images small enough to check scores by hand. Holds no tests."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from prune_lab.accounting.costs import profile
from prune_lab.core.context import Context
from prune_lab.core.method import Method
from prune_lab.pruning.scores import gradients, second_derivatives


class Images:
    """Training images of a data set, in memory; augmentation adds noise that depends on seed and batch."""

    def __init__(self, images: Tensor, labels: Tensor, num_classes: int) -> None:
        self.images, self.train_labels = images, labels
        self.info = SimpleNamespace(num_classes=num_classes, image_size=images.shape[-1])
        self.seen: list[Tensor] = []

    def train_subset(self, batches: Sequence[Tensor], *, augment_seed: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        for index, batch in enumerate(batches):
            self.seen.append(batch)
            images = self.images[batch]
            if augment_seed is not None:
                noise = torch.Generator().manual_seed(augment_seed + index)
                images = images + torch.randn(images.shape, generator=noise, dtype=images.dtype)
            yield images, self.train_labels[batch]


def noise_images(per_class: int = 6, num_classes: int = 3, size: int = 6) -> Images:
    """Return images of noise whose mean depends on the class, in shuffled order."""
    source = torch.Generator().manual_seed(1)
    labels = torch.arange(num_classes).repeat(per_class)[torch.randperm(per_class * num_classes, generator=source)]
    images = torch.randn(len(labels), 3, size, size, generator=source) + labels.view(-1, 1, 1, 1)
    return Images(images, labels, num_classes)


class Net(nn.Sequential):
    """Two convolutions with batch norm, dropout, two linear layers."""

    def __init__(self, seed: int = 0, num_classes: int = 3, *, eps: float = 1e-5) -> None:
        torch.manual_seed(seed)
        super().__init__(
            nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6, eps=eps), nn.ReLU(inplace=True),
            nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8, eps=eps), nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5), nn.Tanh(), nn.Dropout(0.5),
            nn.Linear(5, num_classes),
        )  # fmt: skip


def phase(model: nn.Module, method: Method, data: Images | None = None, *, seed: int = 0) -> Context:
    """Return the phase in which `method` prunes `model`; what it reports is in `context.reports`."""
    context = Context(
        model=model,
        costs=profile(model, 6),
        layers=method.layers(model),
        phase="prune",
        seed=seed,
        total_steps=0,
        steps_per_epoch=0,
        dataset=noise_images() if data is None else data,
        fresh_model=lambda word: Net(seed=len(word)),
    )
    context.reports = []
    context.report = context.reports.append
    return context


class Row(nn.Module):
    """A linear layer of one output without bias; takes images [N, 3, 6, 6] and uses their first values."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.fc = nn.Linear(len(weights), 1, bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor([weights]))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1)[:, : self.fc.in_features])


def with_loss(monkeypatch: pytest.MonkeyPatch, formula: Callable[[Tensor], Tensor]) -> None:
    """Put a function of the weights of a `Row` in place of the loss of each batch."""
    for module in (gradients, second_derivatives):
        monkeypatch.setattr(module, "loss", lambda model, *batch, temperature=1.0: formula(model.fc.weight[0]))


def one_image() -> Images:
    return Images(torch.zeros(1, 3, 6, 6), torch.zeros(1, dtype=torch.long), 1)


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Assert that values, buffers, modes, gradients, `requires_grad` and random state are the same afterwards."""

    def bits(tensor: Tensor) -> bytes:
        return tensor.detach().contiguous().numpy().tobytes()  # tells -0 from 0

    def state() -> dict:
        return {
            "values": {name: bits(tensor) for name, tensor in model.state_dict().items()},
            "modes": {name: module.training for name, module in model.named_modules()},
            "trained": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
            "own": {name: sorted(vars(module)) for name, module in model.named_modules()},
            "storage": {name: parameter.data_ptr() for name, parameter in model.named_parameters()},
            "random": bits(torch.get_rng_state()),
        }

    before = copy.deepcopy(state())
    yield
    assert state() == before
