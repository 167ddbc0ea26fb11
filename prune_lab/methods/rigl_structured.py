"""Structured RigL: RigL whose unit is a whole k x k kernel of a convolution."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from prune_lab.core.card import Card
from prune_lab.families.gradient_growth import GradientGrowth, GradientGrowthConfig
from prune_lab.families.sparse_training import check_dense
from prune_lab.foundations.lazy import torch
from prune_lab.pruning.masks import distributions

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from prune_lab.accounting.eligibility import Layer
    from prune_lab.core.context import Context


_DENSE = "linear layers stay dense in structured RigL"


@dataclass(frozen=True)
class StructuredRigLConfig(GradientGrowthConfig):
    drop: Literal["magnitude"]
    """kernels with the lowest score of their weights are dropped"""
    kernel_score: Literal["abs_of_mean", "mean_of_abs"]
    """ranking of kernels, by weights to drop and by gradients to grow; abs_of_mean: |mean| of a kernel's values (the
    report's repository); mean_of_abs: mean of their absolute values, in which signs do not cancel"""
    redistribution: Literal["none"]
    """layers keep their counts, because redistribution moves single weights"""


class StructuredRigL(GradientGrowth):
    needs_images = "it prunes kernels of convolutions"
    Config = StructuredRigLConfig
    card = Card(
        summary="RigL that drops and grows whole kernels: all k x k weights between one input and one output channel",
        paper="Sundar, Dwaraknath 2021, [Reproducibility Report] Rigging the Lottery, arXiv 2103.15767 (table 7)",
        acts="during training, every method.interval steps until method.end of it",
        eligible="weights of convolutions; linear layers stay dense; depthwise ones only if included",
        cost="RigL's",
        differences="kernels are ranked by |mean w| and |mean gradient|, as in the report's repository "
        "(rigl-reproducibility); the report leaves it open. method.kernel_score=mean_of_abs takes mean |w| and mean "
        "|gradient|. The repository's target counts the dense linear layers too, which convolutions pay for (ResNet-50 "
        "on CIFAR-100 at density 0.1: 0.0921); here method.sparsity is that of the convolutions, and the run prints "
        "the value that pays. It rounds up the kernels to drop (here down) and takes zeros for masked. A layer keeps "
        "whole kernels, so the total can differ from the target by half a kernel; with 2:4 the kernels of two in four "
        "input channels stay",
    )

    def budget_is_exact(self) -> bool:
        return False

    def layers(self, model: nn.Module) -> list[Layer]:
        return [
            replace(layer, eligible=False, reason=_DENSE)
            if layer.eligible and layer.kind == "linear"
            else layer
            for layer in super().layers(model)
        ]

    def setup(self, context: Context) -> None:
        """Draw the masks; report what the linear layers, which stay dense, add to the budget."""
        super().setup(context)
        dense = sum(layer.size for layer in context.layers if layer.reason == _DENSE)
        total = sum(layer.size for layer in context.eligible())
        keep = distributions.num_keep_total(total + dense, self.config.sparsity) - dense
        pays = f"method.sparsity={1 - keep / total:.4g} pays for them" if keep > 0 else "nothing could pay for them"
        context.report(f"linear layers stay dense: {dense} weights beside a budget of {context.masks.num_kept}; {pays}")

    def allocate(self, context: Context, sparsity: float) -> dict[str, int]:
        """Return kept weights per parameter, whole kernels everywhere, as close to the budget as possible."""
        units = {layer.parameter: _kernel_size(layer.shape) for layer in context.eligible()}
        return distributions.whole_units(super().allocate(context, sparsity), units)

    def draw(self, shape: tuple[int, ...], count: int, source: Generator) -> Tensor:
        # Equal scores within a kernel: ties go to the lower index, so that kernels are never cut.
        scores = torch.rand((*shape[:2], 1, 1), generator=source, dtype=torch.float64)
        return self.selection.keep_top(scores.expand(shape), count)

    def num_dropped(self, fraction: float, count: int, shape: tuple[int, ...]) -> int:
        size = _kernel_size(shape)
        return super().num_dropped(fraction, count // size, shape) * size

    def drop_scores(self, weight: Tensor) -> Tensor:
        return self._kernel_scores(weight)

    def grow_scores(self, context: Context, step: int, candidates: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the score of each kernel's gradient at all of its weights.

        Raises:
            RuntimeError: every gradient of the pruned weights is zero, because they were masked.
        """
        gradients = self.gradients(context, candidates)
        check_dense(gradients, candidates, f"gradients at step {step}")
        return {name: self._kernel_scores(gradient) for name, gradient in gradients.items()}

    def _kernel_scores(self, values: Tensor) -> Tensor:
        values = values if self.config.kernel_score == "abs_of_mean" else values.abs()
        return values.mean((2, 3), keepdim=True).abs().expand_as(values)


def _kernel_size(shape: tuple[int, ...]) -> int:
    return shape[2] * shape[3]
