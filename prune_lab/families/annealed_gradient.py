"""Methods that keep pruned weights beside the network; a factor on their gradients falls to zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from prune_lab.core.method import Method, MethodConfig
from prune_lab.core.phase import TRAIN, Phase
from prune_lab.foundations import distributed
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import Fraction, Range

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.core.context import Context


Shape = Literal["sigmoid_cosine", "cosine", "sigmoid", "linear", "constant"]


@dataclass(frozen=True)
class AnnealingConfig(MethodConfig):
    alpha: Fraction
    """factor on the gradients of pruned weights in the first epoch; 0: they stay pruned, 1: all gradients count"""
    schedule: Shape
    """how the factor falls from epoch to epoch, over the whole training"""
    cutoff: Annotated[float, Range(0, 1, open_low=True)]
    """fraction of the training after which the factor is 0, regardless of the schedule"""
    compound: bool
    """false: alpha times the schedule's value for the epoch; true: the factor is multiplied by that value after every
    epoch, so that values compound (the PQuant library)"""


def decline(shape: str, progress: float) -> float:
    """Return the schedule's value at `progress` in [0, 1]: from 1 (sigmoid: 0.9975) to 0 (sigmoid: 0.0025).

    Args:
        shape: sigmoid_cosine is the larger of the two at each point, so it does not end at 0 either.
    """
    cosine = (1 + math.cos(math.pi * progress)) / 2
    sigmoid = 1 / (1 + math.exp(12 * progress - 6))
    values = {"cosine": cosine, "sigmoid": sigmoid, "linear": 1 - progress, "constant": 1.0}
    return max(cosine, sigmoid) if shape == "sigmoid_cosine" else values[shape]


@lru_cache
def alpha_at(epoch: int, *, alpha: float, shape: str, epochs: int, compound: bool) -> float:
    """Return the factor on the gradients of pruned weights in `epoch`, from 0 to `epochs` - 1.

    Args:
        epochs: length of the schedule.
        compound: use the product of the values of all earlier epochs instead of this epoch's value.
    """
    if not compound:
        return alpha * decline(shape, epoch / epochs)
    return alpha * math.prod(decline(shape, before / epochs) for before in range(epoch))


class RawWeights(Method):
    """Keeps the raw weights, which the optimizer updates; between steps the model holds the effective ones.

    So evaluation, moving average, saved network and cost see zeros where the method prunes. Subclasses define the
    effective weights in `project`, and the factor on a pruned weight's gradient in `alpha`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.raw: dict[str, Tensor] = {}

    def chain(self) -> tuple[Phase, ...]:
        return (TRAIN,)

    def alpha(self, step: int) -> float:
        """Return the factor on the gradients of pruned weights at `step`."""
        return 0.0

    def project(self, context: Context) -> dict[str, Tensor]:
        """Write effective weights into the model, which holds the raw ones, and return masks; masks zero the rest."""
        raise TypeError(f"{type(self).__name__} does not say which weights are effective")

    def trains_pruned(self) -> bool:
        return True

    def needs_dense_gradient(self, step: int) -> bool:
        return self.alpha(step) > 0

    def setup(self, context: Context) -> None:
        named = context.parameters()
        self.raw = {layer.parameter: named[layer.parameter].detach().clone() for layer in context.eligible()}
        context.install_masks(self.project(context))

    def gate(self, context: Context, name: str, step: int) -> Tensor:
        """Return the factor on each gradient of parameter `name`: 1 where the weight is kept, else `alpha`."""
        return torch.where(context.masks.masks[name], 1.0, self.alpha(step))

    def after_backward(self, context: Context, step: int) -> bool:
        """Scale the gradients and give the raw weights to the optimizer."""
        named = context.parameters()
        for name, raw in self.raw.items():
            if named[name].grad is not None:
                named[name].grad.mul_(self.gate(context, name, step))
            named[name].detach().copy_(raw)
        return True

    def after_step(self, context: Context, step: int) -> None:
        """Read the raw weights back; a step that fp16 skipped has not changed them."""
        named = context.parameters()
        for name, raw in self.raw.items():
            raw.copy_(named[name].detach())
        context.masks.replace_all(self.project(context))
        context.commit(compare=False)

    def end_epoch(self, context: Context, epoch: int) -> dict[str, float]:
        if distributed.world_size() > 1:
            distributed.assert_same(context.masks.digest(), "masks")
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"raw": dict(self.raw)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self.raw, state["raw"])


class GradientAnnealing(RawWeights):
    """Raw weights with the factor of `AnnealingConfig`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.total_steps, self.steps_per_epoch = 0, 1

    def setup(self, context: Context) -> None:
        super().setup(context)
        self.total_steps, self.steps_per_epoch = context.total_steps, max(context.steps_per_epoch, 1)
        first = math.ceil(self.cutoff())
        if self.config.alpha and first < self.total_steps:
            context.report(f"alpha is 0 from step {first} of {self.total_steps} on")
        elif self.config.alpha:
            context.report(
                f"alpha is above 0 in all {self.total_steps} steps, so pruned weights can return until the end; lower "
                "method.cutoff to fix the support before"
            )

    def cutoff(self) -> float:
        """Return the first step at which the factor is 0; it may lie within an epoch."""
        return round(self.config.cutoff * self.total_steps, 6)  # 0.29 * 100 is 28.999999999999996 in binary

    def alpha(self, step: int) -> float:
        """Return the schedule's value for the step's epoch, 0 from the cut-off on."""
        config = self.config
        if step >= self.cutoff():
            return 0.0
        epoch, epochs = step // self.steps_per_epoch, self.total_steps // self.steps_per_epoch
        return alpha_at(epoch, alpha=config.alpha, shape=config.schedule, epochs=epochs, compound=config.compound)

    def end_epoch(self, context: Context, epoch: int) -> dict[str, float]:
        """Return the factor at the end of the epoch."""
        return super().end_epoch(context, epoch) | {"alpha": self.alpha((epoch + 1) * self.steps_per_epoch - 1)}


def restore(tensors: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Copy `state` into the existing tensors, which an optimizer may reference, and add the others."""
    for name, value in state.items():
        if name in tensors:
            tensors[name].detach().copy_(value)
        else:
            tensors[name] = value
