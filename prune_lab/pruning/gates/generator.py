"""Generators of hard-concrete gate parameters: a small network that goes from layer to layer, or one value each.

Source: Li, Ji 2021, Dep-L0, arXiv 2107.00070, official code.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prune_lab.pruning.gates.hard_concrete import LIMIT

BIAS = 3.0
"""initial mean of the biases: a = LIMIT tanh 3 = 4.5824, apart from the contribution of the weights"""
SPREAD = 0.01
"""standard deviation of the biases, and of independent gates, at the start"""

Kind = Literal["forward", "backward", "independent"]


class GateGenerator(nn.Module):
    """A multilayer perceptron whose layers are the gates of the layers of a network, fed with ones.

    h_0 = 1; h_k = log(100) tanh(W_k h_(k-1) + b_k); a_k = h_k.
    """

    def __init__(self, sizes: Sequence[int], *, backward: bool, width: int | None, source: torch.Generator) -> None:
        """Draw the weights as torch's linear layers do, the biases around 3.

        Args:
            sizes: gates per layer, in the order of the forward pass.
            backward: whether the gates of the last layer are generated first.
            width: number of ones in the input; None: the number of gates of the first generated layer.
        """
        super().__init__()
        self._sizes, self._backward = list(sizes), backward
        made = self._sizes[::-1] if self._backward else self._sizes
        widths = [width or made[0], *made]
        self._width = widths[0]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in itertools.pairwise(widths):
            bound = 1 / math.sqrt(inputs)
            self.weights.append(torch.empty(outputs, inputs).uniform_(-bound, bound, generator=source))
            self.biases.append(torch.empty(outputs).normal_(BIAS, SPREAD, generator=source))

    def forward(self) -> Tensor:
        """Return a of all gates [sum of sizes], in the order of the forward pass, within +-log 100."""
        return torch.tanh(self.inner()) * LIMIT

    def inner(self) -> Tensor:
        """Return the argument of tanh, which still separates gates that are at the bounds [sum of sizes]."""
        hidden = self.biases[0].new_ones(self._width)
        made = []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            made.append(torch.addmv(bias, weight, hidden))
            hidden = torch.tanh(made[-1]) * LIMIT
        return torch.cat(made[::-1] if self._backward else made)


class IndependentGates(nn.Module):
    """Gates without interaction: a ~ N(3, 0.01) at the start, without bounds."""

    def __init__(self, sizes: Sequence[int], *, source: torch.Generator) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.empty(sum(sizes)).normal_(BIAS, SPREAD, generator=source))

    def forward(self) -> Tensor:
        """Return a of all gates [sum of sizes]."""
        return self.log_alpha.clone()

    def inner(self) -> Tensor:
        return self.log_alpha.clone()


Generator = GateGenerator | IndependentGates


def build(kind: Kind, sizes: Sequence[int], *, width: int | None, source: torch.Generator) -> Generator:
    """Return the generator for layers with `sizes` gates, on the CPU."""
    if kind == "independent":
        return IndependentGates(sizes, source=source)
    return GateGenerator(sizes, backward=kind == "backward", width=width, source=source)


class GateParameters:
    """a of all gates as training sees them: a leaf for gradients, which are passed on to the generator."""

    def __init__(self, generator: Generator, lr: float) -> None:
        """Optimize `generator`'s parameters with Adam."""
        self.generator, self._lr = generator, lr
        device = next(generator.parameters()).device
        fused = device.type in ("cpu", "cuda")
        self._optimizer = torch.optim.Adam(generator.parameters(), lr=lr, fused=fused)
        self.leaf = nn.Parameter(generator().detach())
        """a [num_gates]"""
        self._make()

    @property
    def values(self) -> Tensor:
        """a without gradients [num_gates]."""
        return self.leaf.detach()

    def ranking(self) -> Tensor:
        """Return values ordered as a, without ties at its bounds [num_gates]."""
        return self.generator.inner().detach()

    def _make(self) -> None:
        self._made = self.generator()
        self.values.copy_(self._made.detach())

    def take_gradient(self) -> Tensor:
        """Return dL/da [num_gates] of the forward passes so far, 0 where there was none, and clear it."""
        gradient, self.leaf.grad = self.leaf.grad, None
        return torch.zeros_like(self.leaf) if gradient is None else gradient

    def step(self, gradient: Tensor, *, slower: float) -> None:
        """Update the generator along -`gradient`, which is dL/da, at `slower` times the learning rate."""
        self._optimizer.zero_grad(set_to_none=True)
        self._made.backward(gradient)
        self._optimizer.param_groups[0]["lr"] = self._lr * slower
        self._optimizer.step()
        self._make()

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.load_state_dict(state["generator"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._make()
