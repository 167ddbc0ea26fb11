"""AutoSparse: learned soft thresholds; gradients of pruned weights count less and less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from prune_lab.lazy import lazy_import
from prune_lab.methods.base import Card
from prune_lab.methods.families.annealed_gradient import AnnealingConfig, GradientAnnealing
from prune_lab.methods.families.soft_threshold import SoftThreshold, SoftThresholdConfig, check_decay
from prune_lab.schema import ConfigError, NonNegative, Range

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.context import Context

torch = lazy_import("torch")
masks = lazy_import("prune_lab.masks")


@dataclass(frozen=True)
class AutoSparseConfig(SoftThresholdConfig, AnnealingConfig):
    threshold_decay: NonNegative
    """weight decay of the thresholds"""
    backward_density: Annotated[float, Range(0, 1, open_low=True)]
    """fraction of a layer's weights, those nearest to their threshold or above it, that get any gradient; 1: all"""

    def check(self, path: str) -> None:
        check_decay(path, init=self.threshold_init, decay=self.threshold_decay)


class AutoSparse(GradientAnnealing, SoftThreshold):
    Config = AutoSparseConfig
    card = Card(
        summary="each layer learns a soft threshold; gradients of pruned weights count alpha times, alpha falls to 0",
        paper="Kundu, Mellempudi, Vooturi, Kaul, Dubey 2023, AutoSparse: Towards Automated Sparse Training of Deep "
        "Neural Networks, arXiv 2304.06941",
        acts="during training, in every step",
        eligible="weights of convolutions and linear layers; depthwise ones only if included",
        cost="a second copy of the weights, a dense weight gradient while alpha is above 0; a few elementwise passes "
        "over the weights per step",
        differences="no official code is known, and the default values are not checked against the paper. The PQuant "
        "library multiplies alpha by its schedule again and again (method.compound=true). The sparsity is an outcome. "
        "Thresholds are not clipped; the training cost counts the dense gradient whatever method.backward_density is",
    )

    def setup(self, context: Context) -> None:
        super().setup(context)
        self._check_backward(context, "at the start")

    def after_step(self, context: Context, step: int) -> None:
        super().after_step(context, step)
        self._check_backward(context, f"after step {step}")

    def _check_backward(self, context: Context, when: str) -> None:
        """Raise ConfigError if weights in use would get no gradient."""
        if self.config.backward_density == 1:
            return
        for name, count in context.masks.counts().items():
            size = self.raw[name].numel()
            if count > self._num_trained(size):
                raise ConfigError(
                    f"method.backward_density={self.config.backward_density:g} is below the density {count / size:.4g} "
                    f"of {name.removesuffix('.weight')} {when}: weights in use would get no gradient"
                )

    def _num_trained(self, size: int) -> int:
        return round(self.config.backward_density * size)

    def gate(self, context: Context, name: str, step: int) -> Tensor:
        factor = super().gate(context, name, step)
        if self.config.backward_density == 1:
            return factor
        excess = self.raw[name].abs() - torch.sigmoid(self.thresholds[name].detach())
        return factor * masks.keep_top(excess, self._num_trained(excess.numel()))
