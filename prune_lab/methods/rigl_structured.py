"""Structured RigL: RigL whose unit is a whole k x k kernel of a convolution."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from prune_lab.lazy import lazy_import
from prune_lab.methods.base import Card
from prune_lab.methods.families.gradient_growth import GradientGrowth, GradientGrowthConfig

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from prune_lab.context import Context
    from prune_lab.eligibility import Layer

torch = lazy_import("torch")
distributions = lazy_import("prune_lab.distributions")


@dataclass(frozen=True)
class StructuredRigLConfig(GradientGrowthConfig):
    drop: Literal["magnitude"]
    """kernels are dropped by the mean |w|"""
    redistribution: Literal["none"]
    """layers keep their counts: redistribution moves single weights"""


class StructuredRigL(GradientGrowth):
    Config = StructuredRigLConfig
    card = Card(
        summary="RigL that drops and grows whole kernels: all k x k weights between one input and one output channel",
        paper="Sundar, Dwaraknath 2021, [Reproducibility Report] Rigging the Lottery, arXiv 2103.15767 (table 7)",
        acts="during training, every method.interval steps until method.end of it",
        eligible="weights of convolutions; linear layers stay dense; depthwise ones only if included",
        cost="RigL's",
        differences="kernels are ranked by the mean |w| and the mean |gradient| of their weights, which the report "
        "leaves open. A layer keeps whole kernels, so the total can differ from the target by half a kernel; with 2:4 "
        "the kernels of two in four input channels stay",
    )

    def budget_is_exact(self) -> bool:
        return False

    def layers(self, model: nn.Module) -> list[Layer]:
        return [
            replace(layer, eligible=False, reason="linear layers stay dense in structured RigL")
            if layer.eligible and layer.kind == "linear"
            else layer
            for layer in super().layers(model)
        ]

    def allocate(self, context: Context, sparsity: float) -> dict[str, int]:
        """Return kept weights per parameter, whole kernels everywhere, as near to the budget as they come."""
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
        return _kernel_mean(weight.abs())

    def grow_scores(self, context: Context, step: int, candidates: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean |gradient| of each kernel at all of its weights."""
        scores = super().grow_scores(context, step, candidates)
        return {name: _kernel_mean(score) for name, score in scores.items()}


def _kernel_size(shape: tuple[int, ...]) -> int:
    return shape[2] * shape[3]


def _kernel_mean(values: Tensor) -> Tensor:
    return values.mean((2, 3), keepdim=True).expand_as(values)
