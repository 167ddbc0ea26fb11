"""Group gRDA: momentum-free SGD whose weights are its iterate, shrunk group by group by a growing threshold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.optim.grda_threshold import increment
from prune_lab.optim.row_groups import RowGroups, as_rows


def shrink_factors(norms: Tensor, thresholds: Tensor) -> Tensor:
    """Return max(0, 1 - t / |a|) for groups of these norms; 0 where |a| = t, so also where both are 0.

    Times a_G it is the proximal operator of t |a_G|, the group soft threshold.

    Args:
        norms: |a_G| [groups].
        thresholds: t, at least 0, [groups].
    """
    return torch.where(norms > thresholds, 1 - thresholds / norms, torch.zeros_like(norms))


class GroupGRDA(torch.optim.Optimizer):
    """gRDA with a group soft threshold. One extra tensor per grouped parameter.

    State of each grouped parameter: `a`, the SGD iterate, which starts as a copy of the weight. Steps `n` and
    threshold `T` are those of the whole network. Each step with gradients g: a -= lr g, T += increment(n, lr), but not
    beyond `cap` (see `limit`), w_G = max(0, 1 - T s_G / |a_G|) a_G. All other parameters take plain SGD steps; with
    c = 0 all do, bit for bit. A zero group continues to accumulate the network's gradients, and returns when |a_G|
    exceeds its threshold again.

    Source: reconstruction. Accumulator and growth of the threshold: official code of the unstructured gRDA (Chao et
    al. 2020, arXiv 2006.09358). The group soft threshold extends it from single weights to whole groups.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, *, c: float, mu: float,
        rows: Mapping[nn.Parameter, Tensor], scales: Tensor,
    ) -> None:
        """Optimize `params`; grouped weights changed from outside revert to `a` in the next step.

        Args:
            lr: learning rate, at least 0.
            c: size of the threshold, at least 0.
            mu: exponent of its growth, in (0, 1].
            rows: parameter -> group of each of its rows, int64 [first dimension]; -1: in no group.
            scales: s_G, positive, [groups].

        Raises:
            ValueError: a number out of range.
        """
        if not lr >= 0 or not c >= 0 or not 0 < mu <= 1:
            raise ValueError(f"lr and c must be at least 0 and mu in (0, 1], got lr={lr}, c={c}, mu={mu}")
        super().__init__(params, {"lr": lr, "c": c, "mu": mu, "n": 0, "T": 0.0, "cap": math.inf})
        trained = self.param_groups[0]["params"]
        self._grouped = [parameter for parameter in trained if parameter in rows]
        self._plain = [parameter for parameter in trained if parameter not in rows]
        self.scales = scales.to(trained[0])
        self._rows = RowGroups([rows[parameter] for parameter in self._grouped], len(scales)).to(self.scales.device)
        for parameter in self._grouped:
            self.state[parameter] = {"a": parameter.detach().clone()}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step for every parameter that has a gradient; the threshold grows for all groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        _descend([(parameter, parameter.grad) for parameter in self._plain], group["lr"])
        _descend([(self.state[parameter]["a"], parameter.grad) for parameter in self._grouped], group["lr"])
        group["n"] += 1
        grown = group["T"] + increment(group["n"], group["lr"], c=group["c"], mu=group["mu"])
        group["T"] = max(group["T"], min(grown, group["cap"]))
        if self._grouped:
            self._shrink()
        return loss

    def _shrink(self) -> None:
        factors = self._rows.spread(self.factors(), outside=1.0)
        for parameter, factor in zip(self._grouped, factors, strict=True):
            torch.mul(self.state[parameter]["a"], as_rows(factor, parameter), out=parameter)

    def limit(self, cap: float) -> None:
        """Let the threshold grow to `cap` at most; it never decreases."""
        self.param_groups[0]["cap"] = cap

    @property
    def threshold(self) -> float:
        return self.param_groups[0]["T"]

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Return |a_G| [groups]."""
        return self._rows.norms([self.state[parameter]["a"] for parameter in self._grouped])

    def factors(self) -> Tensor:
        """Return the factor on each group of the iterate [groups]; 0: the group is zero."""
        return shrink_factors(self.norms(), self.threshold * self.scales)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state.

        Raises:
            ValueError: a of a grouped parameter, n or T is missing: the weights alone are not enough to resume.
        """
        (group,), held = state_dict["param_groups"], state_dict["state"]
        grouped = set(self._grouped)
        indices = [index for index, parameter in enumerate(self.param_groups[0]["params"]) if parameter in grouped]
        missing = {"n", "T"} - set(group)
        missing |= {"a" for index in indices if "a" not in held.get(index, {})}
        if missing:
            raise ValueError(f"group gRDA cannot go on without its state {', '.join(sorted(missing))}")
        super().load_state_dict(state_dict)


def _descend(pairs: Sequence[tuple[Tensor, Tensor | None]], lr: float) -> None:
    """Take one SGD step on each tensor that has a gradient."""
    moved = [(tensor, gradient) for tensor, gradient in pairs if gradient is not None]
    if moved:
        torch._foreach_add_([tensor for tensor, _ in moved], [gradient for _, gradient in moved], alpha=-lr)
