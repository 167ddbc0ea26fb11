"""Networks with chosen batch-norm scales within a phase of a method, for the tests of slimming and masksparsity."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from prune_lab import models
from prune_lab.core.context import Context
from prune_lab.core.method import Method
from tests.helpers.contexts import context_of
from tests.helpers.method_runs import make
from tests.helpers.runs import compose

IMAGE_SIZE = 16


def plain(*widths: int) -> nn.Sequential:
    """Return conv-BN-ReLU blocks of these widths and a linear layer, for images of 16 px."""
    parts: list[nn.Module] = []
    for inputs, outputs in zip((3, *widths), widths, strict=False):
        parts += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 4))


def network(*options: str) -> nn.Module:
    """Return a network of 4 classes whose batch-norm scales, shifts and statistics are drawn."""
    torch.manual_seed(0)
    model = models.build(compose(*options).model, num_classes=4, image_size=IMAGE_SIZE)
    for norm in norms(model).values():
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return model


def norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}


def set_scales(norm: nn.Module, values: list[float]) -> None:
    norm.weight.data = torch.tensor(values, dtype=norm.weight.dtype)


def phase_of(model: nn.Module, name: str) -> Context:
    """Return the phase `name` on `model`; what it reports is in `context.said`."""
    context = context_of(model, {}, IMAGE_SIZE)
    context.phase, context.dataset = name, SimpleNamespace(info=SimpleNamespace(image_size=IMAGE_SIZE))
    context.said = []
    context.report = context.said.append
    return context


def backward(model: nn.Module) -> None:
    """Leave fresh gradients of a loss on a fixed batch."""
    model.zero_grad(set_to_none=True)
    source = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, IMAGE_SIZE, IMAGE_SIZE, generator=source)
    nn.functional.cross_entropy(model(images), torch.arange(6) % 4).backward()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return float32 values as integers: 0.0 and -0.0 differ."""
    return tensor.view(torch.int32)


def refused(act: Callable[[], Any], match: str) -> None:
    """Assert that `act` is refused in one line."""
    from prune_lab.foundations.errors import UserError

    with pytest.raises(UserError, match=match) as caught:
        act()
    assert "\n" not in str(caught.value)


class Stubborn(nn.BatchNorm2d):
    """A batch norm that stays in evaluation mode."""

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


def unfit() -> dict[str, nn.Module]:
    """Return networks whose scales cannot be penalised, by what their error says."""
    frozen = plain(4)
    frozen[1].weight.requires_grad = False
    return {
        "this network has none": nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)),
        r"batch norm 1 has no scale \(affine=False\)": nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Conv2d(4, 2, 1)
        ),
        r"scale of the batch norm 1 is frozen": frozen,
        "batch norm 1 stays in evaluation mode": nn.Sequential(
            nn.Conv2d(3, 4, 1), Stubborn(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
        ),
    }


def method(name: str, **changes: Any) -> Method:
    """Return a method without a target but those in `changes`."""
    return make(name, **({"macs_ratio": None} | changes))
