"""Frank-Wolfe inner loop: looks around within a small ball before an ordinary optimizer takes a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.foundations.errors import UserError


class FrankWolfe(torch.optim.Optimizer):
    """Hands the mean of several normalised gradients to another optimizer. Two extra tensors per parameter.

    Call t of `steps` moves each parameter tensor p, which began at p0 with b = 0, on the gradient g of its batch:
    b = (1 - 1/t) b - (radius/t) g/|g|, then p += b. After the last call p is p0 again, -b / radius is its gradient,
    and the outer optimizer takes its step. A gradient of zeros moves nothing.

    Parameter groups, and the state of each parameter, are those of the outer optimizer.

    Source: official code (fgsm.py) of Yue, Li, Saligrama, Zhang 2020, arXiv 2010.05397. Its third gradient is measured
    at p0 + b_1 + b_2, where the Frank-Wolfe algorithm on the ball would be at p0 + b_2; `point` chooses. Derived, not
    in the paper: -b / radius is the mean of the unit gradients, whatever the radius.
    """

    normalises = True
    """the gradient of a tensor as a whole: pruned weights must have none"""

    def __init__(self, outer: torch.optim.Optimizer, *, radius: float, steps: int, point: str = "official") -> None:
        """Wrap `outer`, which must not be stepped by others from now on.

        Args:
            radius: of the ball, per parameter tensor, above 0.
            steps: calls per step of the outer optimizer, 1 or more.
            point: "official": p += b; "ball": p = p0 + b.

        Raises:
            ValueError: a number out of its range.
        """
        if not radius > 0 or steps < 1:
            raise ValueError(f"radius must be above 0 and steps 1 or more, got radius={radius}, steps={steps}")
        super().__init__(outer.param_groups, outer.defaults)
        self.outer, self.radius, self.steps, self.point = outer, radius, steps, point
        self.calls = 0
        """calls of the inner loop that is under way"""
        self._start: dict[nn.Parameter, Tensor] = {}
        self._direction: dict[nn.Parameter, Tensor] = {}
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.outer.param_groups, self.outer.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one inner step, the last of which is a step of the outer optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.calls += 1
        self._move()
        if self.calls == self.steps:
            self._finish()
        return loss

    def _move(self) -> None:
        """Move every parameter that has had a gradient in this inner loop."""
        for parameter in self._parameters():
            if parameter.grad is not None and parameter not in self._start:
                self._start[parameter] = parameter.detach().clone()
                self._direction[parameter] = torch.zeros_like(parameter)
        if not self._start:
            return
        moved: list[Tensor] = [*self._start]
        directions = list(self._direction.values())
        torch._foreach_mul_(directions, 1 - 1 / self.calls)
        torch._foreach_sub_(directions, _unit([_gradient(p) for p in self._start]), alpha=self.radius / self.calls)
        if self.point == "ball":
            torch._foreach_copy_(moved, list(self._start.values()))
        torch._foreach_add_(moved, directions)

    def _finish(self) -> None:
        """Go back to where the inner loop began and step along its mean direction."""
        for parameter, start in self._start.items():
            parameter.copy_(start)
            parameter.grad = self._direction[parameter].div_(-self.radius)
        self.calls = 0
        self._start, self._direction = {}, {}
        self.outer.step()

    @torch.no_grad()
    def leave_inner_loop(self) -> None:
        """Go back to where the inner loop under way began; its gradients are lost."""
        for parameter, start in self._start.items():
            parameter.copy_(start)
        self.calls, self._start, self._direction = 0, {}, {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse parameters of a method's own: a threshold or gate would be normalised as if it were a weight.

        Raises:
            UserError: the optimizer has its parameters already.
        """
        if hasattr(self, "outer"):
            raise UserError(
                "optimizer=frank_wolfe does not go with a method that adds thresholds or gates to the optimizer",
                "optimizer",
            )
        super().add_param_group(param_group)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """Return the state, that of an inner loop under way too: parameters by their number."""
        numbers = {parameter: number for number, parameter in enumerate(self._parameters())}
        inner = {numbers[p]: (start, self._direction[p]) for p, start in self._start.items()}
        return {"outer": self.outer.state_dict(), "calls": self.calls, "inner": inner}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume, within an inner loop too."""
        self.outer.load_state_dict(state_dict["outer"])
        self._share()
        parameters = self._parameters()
        held = {parameters[number]: pair for number, pair in state_dict["inner"].items()}
        self.calls = state_dict["calls"]
        self._start = {p: torch.empty_like(p).copy_(start) for p, (start, _) in held.items()}
        self._direction = {p: torch.empty_like(p).copy_(direction) for p, (_, direction) in held.items()}


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _unit(gradients: list[Tensor]) -> list[Tensor]:
    """Return each gradient divided by its Euclidean norm; zeros stay zeros."""
    norms = [torch.where(norm > 0, norm, 1.0) for norm in torch._foreach_norm(gradients)]
    return list(torch._foreach_div(gradients, norms))
