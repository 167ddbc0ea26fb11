"""gRDA: momentum-free SGD whose weights are a soft-thresholded copy of its iterate; the threshold grows with time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from prune_lab.optim.grda_threshold import increment


class GRDA(torch.optim.Optimizer):
    """Generalised regularised dual averaging, for directional pruning. One extra tensor per parameter.

    State of each parameter: `v`, the SGD iterate, which starts as a copy of the weight; `n`, its steps; `T`, its
    threshold. Each step with gradient g: v -= lr * g, T += increment(n, lr), w = sign(v) * max(|v| - T, 0). The
    threshold accumulates with the current learning rates. In the closed form it would drop whenever the learning
    rate does, and restore weights that had become zero. With c = 0 this is SGD, bit for bit.

    Source: algorithm of the official code (grda_pytorch.py) of Chao et al. 2020, arXiv 2006.09358. Weights are written
    in place; n is a Python integer and T a Python float: a float32 counter would stop at 2^24 steps.
    """

    def __init__(self, params: Iterable[Any], lr: float, *, c: float, mu: float) -> None:
        """Optimize `params`; weights changed from outside afterwards revert to `v` in the next step.

        Args:
            params: parameters, or groups that may have their own lr, c and mu.
            lr: learning rate, at least 0.
            c: size of the threshold, at least 0.
            mu: exponent of its growth, in (0, 1].

        Raises:
            ValueError: a number out of range.
        """
        super().__init__(params, {"lr": lr, "c": c, "mu": mu})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if not group["lr"] >= 0 or not group["c"] >= 0 or not 0 < group["mu"] <= 1:
            wrong = f"got lr={group['lr']}, c={group['c']}, mu={group['mu']}"
            raise ValueError(f"lr and c must be at least 0 and mu in (0, 1], {wrong}")
        for parameter in group["params"]:
            self.state[parameter] = {"v": parameter.detach().clone(), "n": 0, "T": 0.0}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step for every parameter that has a gradient; the others count no step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step(group)
        return loss

    def _step(self, group: dict[str, Any]) -> None:
        weights = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not weights:
            return
        states = [self.state[weight] for weight in weights]
        torch._foreach_add_([state["v"] for state in states], [weight.grad for weight in weights], alpha=-group["lr"])
        for weight, state in zip(weights, states, strict=True):
            state["n"] += 1
            state["T"] += increment(state["n"], group["lr"], c=group["c"], mu=group["mu"])
            shrink(state["v"], state["T"], out=weight)

    @property
    def threshold(self) -> float:
        """The threshold of the parameters that have had a gradient in every step."""
        return max(state["T"] for state in self.state.values())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state.

        Raises:
            ValueError: v, n or T of a parameter is missing: without them the thresholds would restart from 0.
        """
        held = state_dict["state"]
        for index in (index for group in state_dict["param_groups"] for index in group["params"]):
            missing = {"v", "n", "T"} - set(held.get(index, {}))
            if missing:
                raise ValueError(f"gRDA cannot go on without the state {', '.join(sorted(missing))} of each parameter")
        super().load_state_dict(state_dict)


def shrink(iterate: Tensor, threshold: float, *, out: Tensor) -> Tensor:
    """Write sign(v) * max(|v| - T, 0) to `out`, which has the shape of the iterate v; NaN stays NaN."""
    # One pass over memory; clamping and subtracting take five.
    return torch.ops.aten.softshrink.out(iterate, threshold, out=out)
