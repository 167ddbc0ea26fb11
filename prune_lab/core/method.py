"""The interface of a method: the hooks that the loop and the pipeline call. Imports no torch."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from prune_lab.accounting import eligibility
from prune_lab.core import removal
from prune_lab.core.card import Card
from prune_lab.core.phase import REMOVE, TRAIN_DENSE, Phase
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import Name
from prune_lab.optim import optimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch
    from torch import nn

    from prune_lab.accounting.eligibility import Layer
    from prune_lab.config.optimizer import OptimizerConfig
    from prune_lab.config.run import RunConfig
    from prune_lab.core.context import Context
    from prune_lab.core.removal import TrialCut


@dataclass(frozen=True)
class MethodConfig:
    """Options every method has."""

    name: Name
    """the method's name as in method=NAME"""

    GOALS: ClassVar[tuple[str, ...]] = ()
    """options that each fix the kept amount: a typed one replaces those set by default"""

    @classmethod
    def absent(cls, option: str) -> str | None:
        """Return a hint for a user who typed `option`, which the method does not have; None: no hint."""
        return None


@dataclass(frozen=True)
class Measured:
    """Measurements of a finished network whose costs depend on the evaluation images."""

    scores: dict[str, float]
    """loss, top1 and top5 of the network that is saved"""
    layers: dict[str, dict[str, float]]
    """layer -> columns of its row in layers.json; macs_kept: mean MACs per image"""
    figures: dict[str, float | None]
    """further keys of the summary; measured times begin with time/"""


class Method:
    """A method without effect: dense training. Others override the hooks they use.

    One instance lives for one phase. State that must survive a checkpoint goes into `state_dict`.
    """

    Config: type = MethodConfig
    card: Card
    can_compile: bool = True
    """False: the forward pass changes too often for torch.compile, so trainer.compile=auto does not use it"""
    costs_depend_on_images: bool = False
    """True: only `measure` knows the MACs of the eligible layers"""
    needs_images: str = ""
    """why the method works on images only; empty: it works on any data"""

    def __init__(self, config: Any) -> None:
        self.config = config

    def identity(self) -> dict[str, Any]:
        """Return the options that decide the method's results; a file is identified by its content, not its name."""
        return asdict(self.config)

    def phase_identity(self, phase: Phase) -> dict[str, Any]:
        """Return the options that decide the result of one active phase, given that of the previous phase.

        A method that omits options which do not affect a phase lets runs that differ in them share it.
        """
        return self.identity()

    def check_run(self, config: RunConfig) -> None:
        """Reject options of other groups, such as an optimizer, that are incompatible with the method.

        Raises:
            UserError: naming the option as typed.
        """

    def for_schedule(self, config: RunConfig, steps_per_epoch: int) -> MethodConfig:
        """Return the options with numbers in place of those that depend on the length of the schedule.

        The run is named after these numbers, so that equal numbers share their phases, typed or resolved here.
        """
        options: MethodConfig = self.config
        return options

    def chain(self) -> tuple[Phase, ...]:
        """Return the phases of a run in order."""
        return (TRAIN_DENSE,)

    def removes_channels(self) -> bool:
        """Return whether the chain removes channels; their count, not a sparsity, is then reported."""
        return any(phase.acts is REMOVE.acts for phase in self.chain())

    def without_control(self) -> MethodConfig | None:
        """Return the options of the method itself if its option `control` chooses a sanity check, else None.

        That run comes first, and both results are shown side by side.
        """
        return None

    def requested_sparsity(self) -> float | None:
        """Return the target over eligible weights, or None for a method without one."""
        return None

    def asked(self) -> dict[str, float]:
        """Return the targets of the finished network by unit (see targets.UNITS), for comparison in the summary."""
        requested = self.requested_sparsity()
        return {} if requested is None else {"sparsity": requested}

    def budget_is_exact(self) -> bool:
        """Return whether the target is met to the weight; False for rules that only approximate it."""
        return True

    def adapt_model(self, config: Any, *, num_classes: int, image_size: int) -> Any:
        """Return the options of the model to build, for methods that change the architecture from the start."""
        return config

    def layers(self, model: nn.Module) -> list[Layer]:
        """Return every conv and linear layer with its eligibility; sparsity is counted over the eligible ones."""
        return eligibility.select_layers(model)

    def build_optimizer(self, model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
        """Return the optimizer of an active training phase; a method with its own optimizer builds it here."""
        return optimizer.build_optimizer(model, config)

    def setup(self, context: Context) -> None:
        """Prepare an active phase: masks, buffers. Called once, before any checkpoint is restored."""

    def before_forward(self, context: Context, step: int) -> None:
        """Act once in each step before the forward passes of its micro-batches; gradients are zero."""

    def forward_macs(self, context: Context) -> int | torch.Tensor:
        """Return the MACs per image of a training step's forward pass, a tensor if only the device knows."""
        return context.forward_macs_without_waiting()

    def needs_dense_gradient(self, step: int) -> bool:
        """Return whether `after_backward` reads gradients of pruned weights at `step` (counted in the cost)."""
        return False

    def weight_gradient_macs(self, context: Context, step: int) -> int | None:
        """Return the MACs per image of the weight gradients at `step`; None: as many as the forward pass."""
        return context.dense_macs if self.needs_dense_gradient(step) else None

    def after_backward(self, context: Context, step: int) -> bool:
        """Act on `param.grad`: averaged over processes and micro-batches, unscaled, before clipping, never masked.

        Returns:
            True to let the optimizer take its step on this batch, False to skip it.
        """
        return True

    def after_step(self, context: Context, step: int) -> None:
        """Act after the optimizer step (also if it was skipped) and before the masks are applied."""

    def end_epoch(self, context: Context, epoch: int) -> dict[str, float]:
        """Return figures for the epoch's record."""
        return {}

    def trains_pruned(self) -> bool:
        """Return whether pruned weights are trained too, so that clipping must include their gradients."""
        return False

    def phase_cost(self, context: Context) -> int | None:
        """Return the MACs that an active phase without steps spends, such as for scoring; known in advance."""
        return 0

    def explain(self) -> dict[str, float]:
        """Return figures of a finished phase for the summary; runs that share the phase share them."""
        return {}

    def chosen(self) -> dict[str, Any]:
        """Return options that the summary shows beside the method's name."""
        return {}

    def prune(self, context: Context) -> dict[str, float] | None:
        """Run the phase PRUNE; return figures for its record, if there are any.

        Raises:
            TypeError: the chain has such a phase but the method does not implement it.
        """
        raise TypeError(f"{type(self).__name__} has a prune phase but no function prune")

    def remove(self, context: Context) -> dict[str, float]:
        """Run the phase REMOVE: remove the channels that are fully masked."""
        figures = removal.remove_dead(context)
        if not figures:  # a validation run in which no channel has closed
            removal.try_cut(context, self.trial_cut(context))
        return figures

    def trial_cut(self, context: Context) -> TrialCut:
        """Return a trial cut of the whole network before training, and which channels may be removed.

        By default: half of the channels of eligible layers that can be removed without changing any other channel.
        """
        return removal.half_of_groups(context, {layer.name for layer in context.eligible()})

    def finish(self, model: nn.Module) -> nn.Module:
        """Return the plain module to save: zeros are written into it, channels were removed in an earlier phase."""
        return model

    def measure(
        self,
        model: nn.Module,
        score: Callable[[nn.Module], dict[str, float]],
        batches: Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor]]],
    ) -> Measured | None:
        """Measure a finished network whose costs depend on the evaluation images; None: they do not.

        Called once on the instance that finished it, on all processes.

        Args:
            score: returns loss, top1 and top5 of a network on all evaluation images; counts over all processes.
            batches: returns this process's share of the same images and their labels, batch by batch.
        """
        return None

    def layout(self, context: Context) -> list[tuple[int, dict[str, int]]] | None:
        """Return (first step, kept weights per parameter) in order: the layouts of this training phase.

        Parameters that are not listed are dense. None: layer shares depend on trained weights. Known before training,
        because budgets are integers; the dry run counts costs from it.
        """
        return [(0, {})]

    def paper_train_ratio(self, context: Context) -> float | None:
        """Return the training cost over dense training by the paper's own formula, if it has one."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to resume; tensors, numbers, strings and containers only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""


def build_method(config: RunConfig) -> Method:
    """Return a new instance of a run's method, not yet attached to a network and without state."""
    return method_class(config.method_target)(config.method)


def method_class(target: Any) -> type[Method]:
    """Return the class of a dotted name, as `_target_` in a method's file gives it.

    Raises:
        UserError: there is no such class, or it is not a Method.
    """
    option = "method._target_"
    if not isinstance(target, str) or "." not in target:
        raise UserError(f"{option} must name a class such as prune_lab.methods.rigl.RigL, got {target}", option)
    module_name, _, class_name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{option}={target} cannot be imported: {error}", option) from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UserError(f"{option}={target} is not a prune_lab.core.method.Method", option)
    return found
