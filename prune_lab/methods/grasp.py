"""GraSP: remove the weights whose removal raises the gradient norm most, before training."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from prune_lab.core.card import Card
from prune_lab.families.initial_pruning import ImageScores, ImageScoresConfig
from prune_lab.foundations.schema import Count, Positive
from prune_lab.pruning.scores import evaluation_mode, second_derivatives

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.core.context import Context


@dataclass(frozen=True)
class GraSPConfig(ImageScoresConfig):
    temperature: Positive
    """divisor of the logits in both derivatives; 200 in every published run"""
    rounds: Count
    """number of draws of `samples_per_class` new images; their gradients and products are added"""
    split: Literal["stratified", "class_sorted", "random"]
    """order of images in a batch: classes in turn, class after class (official code) or at random; it matters with
    bn_mode=train, where batch norm sees one batch"""
    hvp_mode: Literal["sum", "per_batch"]
    """sum: Hessian and gradient of all images (official code); per_batch: the product of each batch, averaged
    (Frankle et al. 2021, arXiv 2009.08576)"""
    reinit_linear: bool
    """score with redrawn linear weights (Xavier normal), although the original ones are trained, as the official code;
    its ImageNet version redraws only the last layer"""
    low_memory: bool
    """store only the inputs of residual blocks and recompute the rest, for the same scores up to rounding.
    ResNet-50 at 224 px on a CPU: about 0.11 instead of 0.19 GiB per image, 1.5 times as long"""


class GraSP(ImageScores):
    Config = GraSPConfig
    card = Card(
        summary="keep the weights whose removal would lower the gradient norm most, then train with that mask",
        paper="Wang, Zhang, Grosse 2020, Picking Winning Tickets Before Training by Preserving Gradient Flow, "
        "arXiv 2002.07376",
        acts="once, before training",
        eligible="weights of convolutions and linear layers; depthwise ones only if included",
        cost="two passes over the scoring images, one of them differentiated twice; about twice the activations of a "
        "training step of scoring_batch images (less with method.low_memory); two values per weight",
        differences="exact count (the official threshold keeps one more); images not augmented "
        "(method.augment_scoring), classes in turn (method.split=class_sorted), linear layers scored as trained "
        "(method.reinit_linear); no division of scores by their sum, which ranks alike. Single "
        "precision moves the edge of the ranking: 98 to 99.6 % of a mask of density 0.1 agreed with double precision "
        "on narrow ResNet-20s",
    )

    @property
    def rounds(self) -> int:
        return self.config.rounds

    def scores(self, context: Context) -> dict[str, Tensor]:
        """Return w * (H g): the paper's S (eq. 8) with the opposite sign, so that the highest are kept."""
        config, named = self.config, context.parameters()
        weights = {layer.parameter: named[layer.parameter] for layer in context.eligible()}
        drawn: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if config.reinit_linear:
            source = partial(context.generator, "linear weights")
            drawn = evaluation_mode.redrawn_linear(context.model, source)
        with evaluation_mode.preserve_state(context.model, train_mode=config.bn_mode == "train"), drawn:
            products = second_derivatives.hessian_gradient(
                context.model,
                list(weights.values()),
                lambda: self.batches(context, order=config.split, augment=config.augment_scoring, rounds=config.rounds),
                num_images=config.rounds * self.num_images(context),
                temperature=config.temperature,
                per_batch=config.hvp_mode == "per_batch",
                low_memory=config.low_memory,
            )
            return {
                name: weight.detach() * product
                for (name, weight), product in zip(weights.items(), products, strict=True)
            }

    def scoring_cost(self, context: Context) -> int:
        """Return the MACs of scoring; a backward pass counts twice the pass that it differentiates.

        Gradient: forward and backward, 3 f_D per image. Hessian-gradient product: forward, backward and backward
        through both, 3 + 6 f_D. With hvp_mode=per_batch the gradient is a by-product; low_memory repeats passes.
        """
        config = self.config
        per_image = (12 if config.hvp_mode == "sum" else 9) * context.dense_macs
        if config.low_memory:
            from prune_lab.pruning.scores.recompute import (
                extra_macs,  # its file defines an nn.Module and so imports torch
            )

            per_image += extra_macs(context.model, context.costs)
        return per_image * config.rounds * self.num_images(context)
