"""SNIP: keep the weights whose removal would affect the loss of one batch most, before training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from prune_lab.core.card import Card
from prune_lab.families.initial_pruning import ImageScores, ImageScoresConfig
from prune_lab.foundations.lazy import torch
from prune_lab.pruning.scores import evaluation_mode, gradients

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.core.context import Context


@dataclass(frozen=True)
class SNIPConfig(ImageScoresConfig):
    combine: Literal["abs_of_sum", "sum_of_abs"]
    """for several batches. abs_of_sum: |w x gradient| of all images together; sum_of_abs: |w x gradient| of each batch,
    added (Frankle et al. 2021, arXiv 2009.08576). The paper has one batch, where both agree"""


class SNIP(ImageScores):
    Config = SNIPConfig
    card = Card(
        summary="keep the largest |weight x gradient| at initialisation, then train with that mask",
        paper="Lee, Ajanthan, Torr 2019, SNIP: Single-shot Network Pruning based on Connection Sensitivity, "
        "arXiv 1810.02340",
        acts="once, before training",
        eligible="weights of convolutions and linear layers (the official code also prunes biases); depthwise ones "
        "only if included",
        cost="one forward and backward pass over the scoring images; one bool per weight",
        differences="scores the weights that are trained (the official code scores another draw), with batch norm on "
        "batch statistics (official: running ones, method.bn_mode=eval), on images balanced over classes",
    )

    def scores(self, context: Context) -> dict[str, Tensor]:
        """Return |w * dL/dw| of the mean loss over the scoring images (the paper's normalisation keeps the ranks)."""
        config, named = self.config, context.parameters()
        weights = {layer.parameter: named[layer.parameter] for layer in context.eligible()}
        tensors = list(weights.values())
        sums = [torch.zeros_like(weight) for weight in tensors]
        with evaluation_mode.preserve_state(context.model, train_mode=config.bn_mode == "train"):
            data = self.batches(context, augment=config.augment_scoring)
            for slopes in gradients.gradients(context.model, tensors, data):
                one_batch = torch._foreach_abs(slopes) if config.combine == "sum_of_abs" else slopes
                torch._foreach_add_(sums, one_batch, alpha=1 / self.num_images(context))
        return {
            name: (weight.detach() * total).abs() for (name, weight), total in zip(weights.items(), sums, strict=True)
        }

    def scoring_cost(self, context: Context) -> int:
        """Return the MACs of the scoring pass: forward and backward, 3 f_D per image."""
        return 3 * context.dense_macs * self.num_images(context)

    def paper_train_ratio(self, context: Context) -> float:
        """Return f_S / f_D (Evci et al. 2020, appendix H, for SNIP and static masks); it excludes scoring."""
        return context.forward_macs / context.dense_macs
