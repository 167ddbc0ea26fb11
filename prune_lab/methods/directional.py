"""Directional pruning: the gRDA optimizer drives weights to zero along flat directions of the loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from prune_lab.accounting import eligibility
from prune_lab.accounting.costs import sparse_macs
from prune_lab.core.card import Card
from prune_lab.core.method import Method, MethodConfig
from prune_lab.core.phase import TRAIN, Phase
from prune_lab.families import schedule_length
from prune_lab.families.dual_averaging import check_plain_sgd, theory_note
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import NonNegative, Range
from prune_lab.optim import learning_rate
from prune_lab.optim.grda_threshold import steps_to_reach, thresholds

if TYPE_CHECKING:
    from torch import nn

    from prune_lab.accounting.eligibility import Layer
    from prune_lab.config.optimizer import OptimizerConfig
    from prune_lab.config.run import RunConfig
    from prune_lab.core.context import Context
    from prune_lab.optim.grda import GRDA


_PUBLISHED = 0.001
"""c of WRN-28-10 on CIFAR"""

_REACH = 1.3
"""Multiple of the median weight at which the threshold ends on short trainings. Digits, ResNet-20, 176 steps: 1.3
leaves 39 % of the weights and plain SGD's accuracy, 1.8 costs four points. The published WRN-28-10 end at 1.7 (mu
0.501, 82.7 % zeros) and 2.6 (0.55, 90.2 %)."""

_TYPICAL_WEIGHT = 0.02
"""weight magnitude for the set-up's report of the schedule's reach"""


@dataclass(frozen=True)
class DirectionalConfig(MethodConfig):
    c: NonNegative | Literal["auto"]
    """size of the threshold; 0: plain SGD; auto: published on long trainings, derived from the weights on short ones"""
    mu: Annotated[float, Range(0, 1, open_low=True)]
    """exponent of the threshold's growth with the steps"""
    prune_bn: bool
    """whether weights and biases of normalisation layers are thresholded too"""
    prune_bias: bool
    """whether biases of all other layers are thresholded too"""

    @classmethod
    def absent(cls, option: str) -> str | None:
        if option != "sparsity":
            return None
        return (
            "the sparsity is an outcome of method.c, method.mu, the learning rates and the number of steps; raise "
            "method.c or method.mu for more zeros"
        )


class Directional(Method):
    Config = DirectionalConfig
    card = Card(
        summary="train with gRDA, whose growing soft threshold zeroes the weights that the loss does not hold in place",
        paper="Chao, Wang, Xing, Cheng 2020, Directional Pruning of Deep Neural Networks, arXiv 2006.09358",
        acts="in every step of one training, in place of the optimizer; zeros may come back until its end",
        eligible="all trained parameters; the sparsity that is compared counts weights of convolutions (depthwise ones "
        "too) and linear layers, sparsity/all_parameters the rest as well (what the published logs count), which "
        "params/nonzero takes for nonzero",
        cost="one more tensor as large as the parameters, two passes over them per step; training is computed dense",
        differences="threshold summed up with the learning rates in force, as in the official PyTorch and TensorFlow "
        "code (Keras and PlaidML: from the present rate). The official code's CIFAR schedule (constant to half, linear "
        "to a hundredth at 0.9, then constant) is not offered; step and linear come near it. trainer.ema_decay keeps "
        f"all zeros. c=auto is {_PUBLISHED} (published for WRN-28-10) from {schedule_length.LONG:,} steps on, and on "
        f"shorter trainings (this program's) so large that the threshold ends at {_REACH:g} times the median weight of "
        "the start",
    )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.figures: dict[str, float] = {}
        self.optimizer: GRDA | None = None

    def chain(self) -> tuple[Phase, ...]:
        return (TRAIN,)

    def check_run(self, config: RunConfig) -> None:
        """Reject any optimizer other than plain SGD, and training without steps."""
        check_plain_sgd(config)
        config.require_training(f"method={self.config.name}: the threshold grows there")

    def for_schedule(self, config: RunConfig, steps_per_epoch: int) -> MethodConfig:
        if self.config.c != "auto" or not schedule_length.is_long(config, steps_per_epoch):
            return self.config
        return replace(self.config, c=_PUBLISHED)

    def layers(self, model: nn.Module) -> list[Layer]:
        return eligibility.select_layers(model, include=["*"])

    def build_optimizer(self, model: nn.Module, config: OptimizerConfig) -> GRDA:
        """Return gRDA; parameters without a threshold form a group with c = 0."""
        from prune_lab.optim.grda import GRDA  # its file defines an Optimizer and so imports torch

        spared = self._spared(model)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        groups: list[dict[str, Any]] = [
            {"params": [parameter for name, parameter in trained.items() if name not in spared]},
            {"params": [trained[name] for name in trained if name in spared], "c": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        c = _PUBLISHED if self.config.c == "auto" else self.config.c  # `setup` determines that of a short training
        self.optimizer = GRDA(groups, lr=0.0, c=c, mu=self.config.mu)
        return self.optimizer

    def _spared(self, model: nn.Module) -> set[str]:
        """Return the paths of the parameters that plain SGD trains."""
        paths = set()
        for name, module in model.named_modules():
            is_norm = isinstance(module, _norm_types())
            for own, _ in module.named_parameters(recurse=False):
                kept = not self.config.prune_bn if is_norm else own.endswith("bias") and not self.config.prune_bias
                if kept:
                    paths.add(f"{name}.{own}" if name else own)
        return paths

    def setup(self, context: Context) -> None:
        """Resolve the size of the threshold and report its final value: a short schedule prunes little."""
        config = self.config
        if note := theory_note(config.mu):
            context.report(note)
        if not config.c or not context.total_steps:
            return
        steps = range(context.total_steps)
        rates = [learning_rate.learning_rate(context.schedule, step, context.steps_per_epoch) for step in steps]
        c = self._short(context, rates) if config.c == "auto" else config.c
        context.report(self._outlook(context, c, rates))

    def _short(self, context: Context, rates: list[float]) -> float:
        """Set and return the optimizer's c so that the threshold ends at a multiple of the median weight."""
        *_, end = thresholds(rates, c=1.0, mu=self.config.mu)
        c = max(_PUBLISHED, _REACH * schedule_length.median_weight(context) / end)
        for group in context.optimizer.param_groups:
            if group["c"]:
                group["c"] = c
        return c

    def _outlook(self, context: Context, c: float, rates: list[float]) -> str:
        total, rule = len(rates), {"c": c, "mu": self.config.mu}
        values = list(thresholds(rates, **rule))
        reached = next((step for step, value in enumerate(values, start=1) if value >= _TYPICAL_WEIGHT), None)
        known = f"threshold: from 0 to {values[-1]:.4g} in {total} steps (method.c={c:.4g}); a weight of "
        known += f"{_TYPICAL_WEIGHT} without gradient"
        if reached is not None:
            return f"{known} is zero after {reached}"
        needed = steps_to_reach(_TYPICAL_WEIGHT, context.schedule.lr, **rule)
        return (
            f"{known} stays above it (at a constant learning rate of {context.schedule.lr:g} it is zero after "
            f"{needed:.6g}); method.c={c * _TYPICAL_WEIGHT / values[-1]:.2g} would zero it at the end"
        )

    def end_epoch(self, context: Context, epoch: int) -> dict[str, float]:
        """Return threshold, sparsity and density per layer; after the last epoch zeros become the masks.

        sparsity counts the weights of convolutions and linear layers, sparsity/all_parameters all trained values.
        Both, and the masks, refer to the trained weights, not to their moving average.
        """
        named = context.parameters()
        counts = torch.stack([torch.count_nonzero(parameter.detach()) for parameter in named.values()]).tolist()
        nonzero = dict(zip(named, counts, strict=True))
        layers = context.eligible()
        kept = {layer.parameter: nonzero[layer.parameter] for layer in layers}
        # including packed attention
        counted = kept | {cost.parameter: nonzero[cost.parameter] for cost in context.costs if not cost.computed}
        self.figures = {
            "threshold": self.optimizer.threshold,
            "sparsity/all_parameters": 1 - sum(counts) / sum(parameter.numel() for parameter in named.values()),
        }
        masked = {}
        if (epoch + 1) * context.steps_per_epoch >= context.last_step:
            self._take_masks(context, counted)
            masked = context.history.figures(context.masks.masks)  # a resumed run has masks already
        return self.figures | masked | {
            "sparsity": 1 - sum(kept.values()) / sum(layer.size for layer in layers),
            "macs/inference": sparse_macs(context.costs, counted),
            **{f"mask/density/{layer.name}": kept[layer.parameter] / layer.size for layer in layers},
        }

    def _take_masks(self, context: Context, kept: dict[str, int]) -> None:
        named = context.parameters()
        # The mask history starts with a dense network, as training did.
        context.install_masks({name: torch.ones_like(named[name], dtype=torch.bool) for name in kept})
        context.install_masks({name: named[name].detach() != 0 for name in kept})
        if context.masks.density == 1 and self.config.c:
            context.report("nothing was pruned: no weight became zero; raise method.c or train longer")
        empty = [name.removesuffix(".weight") for name, count in kept.items() if count == 0]
        if empty:
            context.report(f"layers without any weight left: {', '.join(empty)}; lower method.c or method.mu")

    def layout(self, context: Context) -> list[tuple[int, dict[str, int]]] | None:
        """Return None: which weights become zero is an outcome of the training."""
        return None

    def explain(self) -> dict[str, float]:
        return self.figures

    def state_dict(self) -> dict[str, Any]:
        return {"figures": self.figures}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.figures = dict(state["figures"])


def _norm_types() -> tuple[type, ...]:
    norm = torch.nn.modules
    return (norm.batchnorm._NormBase, torch.nn.GroupNorm, torch.nn.LayerNorm)
