"""Pruning at initialisation: score the untrained weights once, keep the best, train the rest with a fixed mask."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from prune_lab.core import images
from prune_lab.core.phase import PRUNE, TRAIN, Phase
from prune_lab.families.weight_pruning import WeightPruning, WeightPruningConfig
from prune_lab.foundations import distributed
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import Count, Index
from prune_lab.pruning.masks import top_k
from prune_lab.pruning.scores import gradients

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from prune_lab.core.context import Context
    from prune_lab.core.method import MethodConfig


@dataclass(frozen=True)
class InitialPruningConfig(WeightPruningConfig):
    min_per_layer: Index
    """global: minimum number of weights that every layer keeps, regardless of scores; 0 as published"""
    control: Literal["none", "shuffle", "reinit", "invert", "random"]
    """sanity checks of Frankle et al. 2021, arXiv 2009.08576. shuffle: random positions of the mask within each
    layer; reinit: the mask on new initial weights; invert: the lowest scores are kept; random: random scores"""
    samples_per_class: Count
    """training images of each class, for scores (if they need data) and gradient norms, which use fewer if a class has
    fewer"""
    scoring_batch: Count
    """maximum number of images per scoring pass: fewer take less memory, and batch norm sees fewer at a time"""

    def check(self, path: str) -> None:
        super().check(path)
        if self.min_per_layer and self.distribution != "global":
            raise UserError(
                f"{path}.min_per_layer={self.min_per_layer} is for distribution=global; with {self.distribution} every "
                "layer has a budget"
            )


@dataclass(frozen=True)
class ImageScoresConfig(InitialPruningConfig):
    """Options of the methods whose scores come from training images."""

    bn_mode: Literal["train", "eval"]
    """while scoring: train: batch norm uses the statistics of each batch; eval: the running ones, which are 0 and 1
    before training"""
    augment_scoring: bool
    """whether the scoring images are cropped and flipped as in training"""


class InitialPruning(WeightPruning):
    """Subclasses define `scores`; higher is kept."""

    needs_images = "its scores are measured on labelled images"
    Config: type[InitialPruningConfig] = InitialPruningConfig

    def chain(self) -> tuple[Phase, ...]:
        return (PRUNE, TRAIN)

    def without_control(self) -> MethodConfig | None:
        return None if self.config.control == "none" else replace(self.config, control="none")

    def setup(self, context: Context) -> None:
        """Reject a minimum above the size of a layer, before anything is written."""
        least = self.config.min_per_layer
        floor = sum(min(least, layer.size) for layer in context.eligible())
        total = self.total(context, self.config.sparsity)
        if floor > total:
            raise UserError(
                f"method.min_per_layer={least} keeps {floor} weights, method.sparsity={self.config.sparsity:g} only "
                f"{total}; lower one of them"
            )

    def scores(self, context: Context) -> dict[str, Tensor]:
        """Return a score per weight of each eligible parameter; higher is kept."""
        raise TypeError(f"{type(self).__name__} does not say how weights are scored")

    def choose(self, context: Context) -> dict[str, Tensor]:
        """Return the masks that follow from the scores; methods with several rounds override it, using `select`."""
        return self.select(context, self.scores(context), self.config.sparsity)

    def select(
        self,
        context: Context,
        scores: dict[str, Tensor],
        sparsity: float,
        candidates: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return masks that keep exactly the budget at `sparsity`: the best weights of each layer or of all together.

        Args:
            candidates: weights that may be kept, bool; None: all.

        Raises:
            UserError: a score is infinite or NaN.
        """
        bad = [name for name, score in scores.items() if not bool(torch.isfinite(score).all())]
        if bad:
            raise UserError(
                f"scores of {', '.join(bad[:3])} are infinite or NaN ({len(bad)} of {len(scores)} layers): look at the "
                "start weights and the images"
            )
        if self.config.control == "invert":
            scores = {name: -score for name, score in scores.items()}
        if self.config.distribution == "global":
            total = self.total(context, sparsity)
            least = self.config.min_per_layer
            return top_k.keep_top_global(scores, total, candidates=candidates, least=least)
        return self.keep_best(scores, self.allocate(context, sparsity), candidates)

    def prune(self, context: Context) -> dict[str, float]:
        """Choose masks, apply the control if any; return gradient norms and the number of empty layers."""
        if self.config.control == "random":
            chosen = self.select(context, random_scores(context), self.config.sparsity)
        else:
            chosen = self.choose(context)
        if self.config.control == "shuffle":
            chosen = self._shuffled(context, chosen)
        if self.config.control == "reinit":
            context.model.load_state_dict(context.fresh_model("control reinit").state_dict())
        before = self._gradient_norm(context)
        # Scores differ between processes by rounding; one weight at the edge would make their masks differ.
        self.cut(context, distributed.share_masks(chosen))
        after = self._gradient_norm(context)
        if after == 0:
            context.report("no gradient reaches the kept weights: this network cannot learn; see method.min_per_layer")
        norms = {"prune/gradient_norm_before": before, "prune/gradient_norm_after": after}
        empty = sum(count == 0 for count in context.masks.counts().values())
        return {key: value for key, value in norms.items() if value is not None} | {"prune/empty_layers": empty}

    def _shuffled(self, context: Context, chosen: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return masks with the same count per layer at random positions."""
        sources = {name: context.generator("shuffle", name) for name in chosen}
        return {
            name: self.selection.random_mask(tuple(mask.shape), int(mask.sum()), sources[name]).to(mask.device)
            for name, mask in chosen.items()
        }

    def _gradient_norm(self, context: Context) -> float | None:
        """Return the norm on the first scoring batch: enough for comparison, and cheap on large data sets.

        Classes with few images contribute all of them. None: a class has no image, or the norm is infinite or NaN.
        """
        config, dataset = self.config, context.dataset
        each = images.most_per_class(dataset.train_labels, config.samples_per_class, dataset.info.num_classes)
        if not each:
            return None
        first = itertools.islice(images.batches(context, per_class=each, batch_size=config.scoring_batch), 1)
        named, masks = context.parameters(), {} if context.masks is None else context.masks.masks
        weights = {layer.parameter: named[layer.parameter] for layer in context.eligible()}
        norm = gradients.gradient_norm(context.model, weights, masks, first, train_mode=True)
        return norm if math.isfinite(norm) else None

    def batches(self, context: Context, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Return (images, labels) of the balanced scoring images, the same in every call.

        Args:
            options: order, augment and rounds of `images.batches`.
        """
        config = self.config
        sizes = {"per_class": config.samples_per_class, "batch_size": config.scoring_batch}
        return images.batches(context, **sizes, **options)

    def scoring_cost(self, context: Context) -> int:
        """Return the MACs of `scores`; gradient norms are measurements, like evaluation, and do not count."""
        return 0

    def phase_cost(self, context: Context) -> int:
        return 0 if self.config.control == "random" else self.scoring_cost(context)

    def num_images(self, context: Context) -> int:
        """Return the number of images in one pass over `batches`."""
        return self.config.samples_per_class * context.dataset.info.num_classes


class ImageScores(InitialPruning):
    """Base of the methods whose scores come from training images."""

    Config: type[ImageScoresConfig] = ImageScoresConfig

    def setup(self, context: Context) -> None:
        """Reject more scoring images than exist, before anything is written."""
        super().setup(context)
        if self.config.control != "random":
            labels, num_classes = context.dataset.train_labels, context.dataset.info.num_classes
            images.check_classes(labels, self.config.samples_per_class, num_classes, rounds=self.rounds)

    @property
    def rounds(self) -> int:
        """Number of times that a new set of images is drawn."""
        return 1


def random_scores(context: Context) -> dict[str, Tensor]:
    """Return scores that are uniform in [0, 1) and independent, from the seed."""
    return {
        layer.parameter: torch.rand(layer.shape, generator=context.generator("random scores", layer.parameter)).to(
            context.device
        )
        for layer in context.eligible()
    }
