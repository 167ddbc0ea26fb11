"""SynFlow: iteratively prune the weights that carry the least flow from input to output, without data."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from prune_lab.core.card import Card
from prune_lab.families.initial_pruning import InitialPruning, InitialPruningConfig
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import Count
from prune_lab.pruning.scores import evaluation_mode, synaptic_flow

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.core.context import Context
    from prune_lab.pruning.scores.synaptic_flow import Flow


@dataclass(frozen=True)
class SynFlowConfig(InitialPruningConfig):
    rounds: Count
    """number of rounds of scoring and pruning"""
    schedule: Literal["exponential", "linear"]
    """how density falls from 1 to d = 1 - sparsity over n rounds: d^(k/n) after round k, or 1 - (1 - d) k/n"""
    dtype: Literal["float64", "float32"]
    """number format of the scores; the flow of deep networks (ResNet-50, ResNet-110) exceeds float32's range"""


class SynFlow(InitialPruning):
    Config = SynFlowConfig
    card = Card(
        summary="score |w| x d(sum of outputs)/d|w| on an image of ones, cut the lowest a little, score again; then "
        "train with that mask",
        paper="Tanaka, Kunin, Yamins, Ganguli 2020, Pruning neural networks without any data by iteratively "
        "conserving synaptic flow, arXiv 2006.05467",
        acts="once, before training",
        eligible="weights of convolutions and linear layers; depthwise ones only if included",
        cost="a forward and backward pass of one image per round; weights and their gradients in float64 while scoring",
        differences="float64 instead of the official code's float32; biases and running means count as zero, not as "
        "their absolute values; ReLU stands in for activations that saturate (ReLU6, hard-swish, SiLU, GELU ...) and 1 "
        "for squeeze-and-excitation gates while scoring; exactly the planned number is kept in each round",
    )

    def setup(self, context: Context) -> None:
        super().setup(context)
        if self.config.dtype == "float64" and context.device.type == "mps":
            raise UserError("method.dtype=float64: MPS lacks it; use trainer.device=cpu or method.dtype=float32")
        if self.config.dtype == "float32" and context.validating:  # checked before anything is written
            with evaluation_mode.preserve_state(context.model, train_mode=False):
                self._check(synaptic_flow.flow(context.model, *self._scoring_form(context)), 1)

    def choose(self, context: Context) -> dict[str, Tensor]:
        """Score and prune in rounds, each among the weights left by the previous; a validation runs one round.

        Raises:
            UserError: the flow leaves the range of the number format.
        """
        form, names, image = self._scoring_form(context)
        rounds, started = 1 if context.validating else self.config.rounds, time.monotonic()
        kept: dict[str, Tensor] | None = None
        with evaluation_mode.preserve_state(context.model, train_mode=False):
            for index in range(1, rounds + 1):
                context.poll()
                flow = synaptic_flow.flow(context.model, form, names, image)
                self._check(flow, index)
                if index == 1:
                    self._describe(context, flow)
                kept = self._cut(context, flow.scores, index / rounds, kept)
                torch._foreach_mul_([form[name] for name in kept], list(kept.values()))
                seconds = time.monotonic() - started
                if index == 1 and seconds * rounds > 60:
                    context.report(f"{rounds} rounds of about {seconds:.1f} s each")
        self._name_floors(context, kept)
        return kept

    def _scoring_form(self, context: Context) -> tuple[dict[str, Tensor], list[str], Tensor]:
        """Return the network's positive tensors, the names of its eligible weights, and an image of ones."""
        dtype, size = getattr(torch, self.config.dtype), context.dataset.info.image_size
        names = [layer.parameter for layer in context.eligible()]
        image = torch.ones(1, 3, size, size, dtype=dtype, device=context.device)
        return synaptic_flow.positive_form(context.model, dtype), names, image

    def _cut(
        self, context: Context, scores: dict[str, Tensor], done: float, kept: dict[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """Return the masks at fraction `done` of the rounds, chosen among `kept`."""
        config = self.config
        if config.control == "invert":  # the lowest positive scores are kept; zero flow is still cut first
            last = torch.finfo(getattr(torch, config.dtype)).max
            scores = {name: score.masked_fill(score == 0, last) for name, score in scores.items()}
        level = config.sparsity if done == 1 else 1 - falling(1 - config.sparsity, done, config.schedule)
        if config.distribution == "global":
            return self.select(context, scores, level, kept)
        sizes = {layer.parameter: layer.size for layer in context.eligible()}
        above = sizes if kept is None else {name: int(torch.count_nonzero(mask)) for name, mask in kept.items()}
        counts, sign = self.allocate_nested(context, level, above), -1 if config.control == "invert" else 1
        return self.keep_best({name: sign * score for name, score in scores.items()}, counts, kept)

    def _check(self, flow: Flow, index: int) -> None:
        if math.isfinite(flow.total) and all(bool(torch.isfinite(score.sum())) for score in flow.scores.values()):
            return
        advice = "use method.dtype=float64"
        if self.config.dtype == "float64":
            advice = "look for weights that are not finite, or start from another initialisation"
        raise UserError(
            f"method.dtype={self.config.dtype}: the flow in round {index} is not finite (sum of outputs "
            f"{flow.total:g}); {advice}"
        )

    def _describe(self, context: Context, flow: Flow) -> None:
        """Report why the scores differ from those of a plain ReLU network."""
        if self.config.dtype == "float32":
            context.report("method.dtype=float32: deep networks need float64, their flow exceeds float32's range")
        if flow.replaced:
            calls = ", ".join(f"{name} ({count})" for name, count in sorted(flow.replaced.items()))
            context.report(f"while scoring, ReLU stands in for activations and 1 for gates: {calls}")
        tolerance = 1e-6 if self.config.dtype == "float64" else 1e-2
        if not abs(flow.conserved - 1) <= tolerance:
            context.report(
                f"flow is not conserved (input / output {flow.conserved:.3g} instead of 1): the network holds what is "
                "not linear, such as layer norm or attention; scores of different layers do not compare"
            )
        dry = [name.removesuffix(".weight") for name, score in flow.scores.items() if not score.any()]
        if dry:
            shown = ", ".join(dry[:3]) + (", ..." if len(dry) > 3 else "")
            context.report(f"no flow reaches {len(dry)} layers, which are cut first: {shown}; see method.exclude")

    def _name_floors(self, context: Context, kept: dict[str, Tensor]) -> None:
        least = self.config.min_per_layer
        held = [name.removesuffix(".weight") for name, mask in kept.items() if 0 < int(mask.sum()) <= least]
        if held:
            context.report(f"layers held at method.min_per_layer={least}: {', '.join(held)}")

    def scoring_cost(self, context: Context) -> int:
        """Return the MACs of all rounds: 3 f_D for one image each, counted dense although later rounds are sparse."""
        return 3 * context.dense_macs * self.config.rounds


def falling(end: float, done: float, schedule: str) -> float:
    """Return the density at fraction `done` of the way from 1 to `end`: end^done, or linear."""
    return end**done if schedule == "exponential" else 1 - (1 - end) * done
