"""SNIP: keep the weights whose removal the loss of one batch would feel most, before training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prune_lab.lazy import lazy_import
from prune_lab.methods.base import Card
from prune_lab.methods.families.initial_pruning import InitialPruning

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.context import Context

torch = lazy_import("torch")
scoring = lazy_import("prune_lab.scoring")


class SNIP(InitialPruning):
    card = Card(
        summary="keep the largest |weight x gradient| at initialisation, then train with that mask",
        paper="Lee, Ajanthan, Torr 2019, SNIP: Single-shot Network Pruning based on Connection Sensitivity, "
        "arXiv 1810.02340",
        acts="once, before training",
        eligible="weights of convolutions and linear layers (the official code also prunes biases); depthwise ones "
        "only if included",
        cost="one forward and backward pass over the scoring images; one bool per weight",
        differences="scores the weights that are trained (the official code scores another draw), with batch norm on "
        "batch statistics, on images balanced over classes and not augmented; gradients are summed before |.|",
    )

    def scores(self, context: Context) -> dict[str, Tensor]:
        """Return |w * dL/dw| of the mean loss over the scoring images (paper, eq. 6; its normalisation ranks alike)."""
        named = context.parameters()
        weights = {layer.parameter: named[layer.parameter] for layer in context.eligible()}
        sums = [torch.zeros_like(weight) for weight in weights.values()]
        with scoring.untouched(context.model, train_mode=True):
            for images, labels in self.batches(context):
                loss = scoring.loss(context.model, images, labels) / self.num_images(context)
                torch._foreach_add_(sums, torch.autograd.grad(loss, list(weights.values())))
        return {
            name: (weight.detach() * total).abs()
            for (name, weight), total in zip(weights.items(), sums, strict=True)
        }

    def phase_cost(self, context: Context) -> int:
        """Return the MACs of the scoring pass: forward and backward, 3 f_D per image."""
        return 3 * context.dense_macs * self.num_images(context)
