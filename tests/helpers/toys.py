"""Networks of one or two layers whose weights and gradients are written out by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prune_lab.accounting.costs import profile
from prune_lab.core.context import Context
from prune_lab.core.method import Method

# rigl.md section 12, example B
WEIGHT = torch.tensor([[0.9, -0.1, 0, 0], [0.05, 0.4, 0, -0.7], [0, 0, 0.2, 0.3]])
GRADIENT = torch.tensor([[0.1, 0.2, 0.8, -0.3], [-0.9, 0.05, 0.1, 0.4], [0.6, -0.2, 0.3, 0]])


class OneLayer(nn.Module):
    """A linear layer behind a flattening; takes images [N, 3, 2, 2] whose first values it uses."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.fc = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(weight)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1)[:, : self.fc.in_features])


def open_phase(
    model: nn.Module,
    method: Method,
    *,
    masks: dict[str, Tensor] | None = None,
    steps: int = 10,
    optimizer: str = "sgd",
) -> Context:
    """Return a phase of `steps` optimizer steps after the method's set-up, its masks replaced by `masks`."""
    context = Context(
        model=model,
        costs=profile(model, 2),
        layers=method.layers(model),
        phase="train",
        seed=0,
        total_steps=steps,
        steps_per_epoch=steps,
    )
    kinds = {
        "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    }
    context.optimizer = kinds[optimizer](model.parameters())
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    method.setup(context)
    if masks is not None:
        model.load_state_dict(weights, strict=False)  # set-up has zeroed weights by its own masks
        context.install_masks(masks)
    return context


def example_b(method: Method, *, optimizer: str = "sgd", steps: int = 10) -> Context:
    """Return rigl.md's example B: 7 of 12 weights, gradient in place, optimizer state all ones after one step."""
    context = open_phase(
        OneLayer(WEIGHT), method, masks={"fc.weight": WEIGHT != 0}, steps=steps, optimizer=optimizer
    )
    weight = context.parameters()["fc.weight"]
    weight.grad = torch.zeros_like(weight)
    context.optimizer.step()
    for value in context.optimizer.state[weight].values():
        value.fill_(1.0)
    with torch.no_grad():
        weight.copy_(WEIGHT)
    weight.grad = GRADIENT.clone()
    return context


def one_step(context: Context, method: Method, step: int) -> bool:
    """Do what the loop does after the backward pass; return whether the optimizer stepped."""
    stepped = method.after_backward(context, step)
    if stepped:
        context.optimizer.step()
    method.after_step(context, step)
    context.masks.apply()
    return stepped


def mask_of(context: Context, name: str = "fc.weight") -> list:
    return context.masks.masks[name].int().tolist()


def state_of(context: Context, key: str, name: str = "fc.weight") -> Tensor:
    return context.optimizer.state[context.parameters()[name]][key]
