"""SET: drop the smallest weights, grow at random, at a fixed budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prune_lab.lazy import lazy_import
from prune_lab.methods.base import Card
from prune_lab.methods.families.sparse_training import DropAndGrow

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.context import Context

torch = lazy_import("torch")


class SET(DropAndGrow):
    card = Card(
        summary="sparse from the start; every interval the smallest weights move to random places",
        paper="Mocanu et al. 2018, Scalable training of artificial neural networks with adaptive sparse connectivity, "
        "arXiv 1707.04780; schedule and drop rule as in the RigL paper's SET baseline",
        acts="during training, after the optimizer step, every method.interval steps until method.end of it",
        eligible="weights of convolutions and linear layers; depthwise ones only if included",
        cost="one bool per weight; one draw and one selection per layer and update",
        differences="default is the variant of RigL's tables; the SET paper's own rule is method.drop=by_sign with one "
        "update per epoch and method.decay=constant. Draws are keyed by seed, layer and step, so all processes agree",
    )

    def after_backward(self, context: Context, step: int) -> bool:
        if self.config.skip_step_on_update and step in self.updates:
            self.update(context, step)
            return False
        return True

    def after_step(self, context: Context, step: int) -> None:
        if not self.config.skip_step_on_update and step in self.updates:
            self.update(context, step)

    def grow_scores(self, context: Context, step: int, candidates: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return one uniform number per position, keyed by (seed, parameter name, step)."""
        return {
            name: torch.rand(mask.shape, generator=context.generator("grow", name, step)).to(mask.device)
            for name, mask in candidates.items()
        }

    def paper_train_ratio(self, context: Context) -> float:
        return context.forward_macs / context.dense_macs
