"""A penalty on batch-norm scales: the affected tensors, and its gradient in one update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.pruning.batch_norm.kind import is_norm

if TYPE_CHECKING:
    from torch import Tensor, nn

Kind = Literal["l1", "l2", "smooth_l1"]


def scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the scale of every batch norm by the norm's module path.

    Raises:
        UserError: there is no batch norm, or one has no scale or does not train it.
    """
    norms = {path: module for path, module in model.named_modules() if is_norm(module)}
    if not norms:
        raise UserError("the penalty on batch-norm scales needs batch norms; this network has none")
    for path, norm in norms.items():
        if norm.weight is None:
            raise UserError(f"the batch norm {path} has no scale (affine=False); all need one to be penalised")
        if not norm.weight.requires_grad:
            raise UserError(f"the scale of the batch norm {path} is frozen (requires_grad=False); all have to train "
                              "to be penalised")
    return {path: norm.weight for path, norm in norms.items()}


def check_training(model: nn.Module) -> None:
    """Put `model` into training mode; raise UserError if a batch norm stays in evaluation mode."""
    model.train()
    for path, module in model.named_modules():
        if is_norm(module) and not module.training:
            raise UserError(f"the batch norm {path} stays in evaluation mode while the network trains; all have "
                              "to train for their scales to be penalised")


def gradient(values: Tensor, strength: float, kind: Kind, lr: float) -> Tensor:
    """Return the gradient of the penalty at the scales `values`, of the same shape; 0 at a scale of 0.

    l1: strength * sign(v); l2: strength * v; smooth_l1: strength * v where |v| < lr * strength, else
    strength * sign(v).

    Source: official code of Jiang et al. 2022, arXiv 2201.06776; l1: Liu et al. 2017, arXiv 1708.06519.
    """
    if kind == "l2":
        return strength * values
    slope = values.sign()
    if kind == "smooth_l1":
        slope = torch.where(values.abs() < lr * strength, values, slope)
    return strength * slope


class ScalePenalty:
    """Adds the penalty to the gradients of all scales, or of those that are marked, in one flat update."""

    def __init__(
        self, model: nn.Module, strength: float, kind: Kind = "l1", marked: Mapping[str, Tensor] | None = None
    ) -> None:
        """Look up the scales of `model`.

        Args:
            strength: factor of the penalty.
            marked: module path of a batch norm -> bool [channels], True = penalised; a missing norm is not penalised.
                None: all scales are penalised.

        Raises:
            UserError: see `scales`.
        """
        found = scales(model)
        self._strength, self._kind = strength, kind
        self._scales = list(found.values())
        self._sizes = [scale.numel() for scale in self._scales]
        self.marked = None
        if marked is not None:
            none = {path: torch.zeros(scale.shape, dtype=torch.bool) for path, scale in found.items()}
            self.marked = torch.cat([mask.cpu() for mask in (none | dict(marked)).values()]).to(self._scales[0].device)

    def values(self) -> Tensor:
        """Return all scales, [total]."""
        return torch.cat([scale.detach() for scale in self._scales])

    def add(self, lr: float) -> None:
        """Add the penalty to the gradients. Unmarked scales, and norms without gradient, do not change.

        Args:
            lr: learning rate of the step.
        """
        added = gradient(self.values(), self._strength, self._kind, lr)
        if self.marked is not None:
            added = added.where(self.marked, -0.0)  # x + -0.0 is x to the bit, -0.0 included
        pairs = [(scale.grad, part) for scale, part in zip(self._scales, added.split(self._sizes), strict=True)
                 if scale.grad is not None]
        torch._foreach_add_([gradient for gradient, _ in pairs], [part for _, part in pairs])
