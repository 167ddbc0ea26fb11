"""Lottery tickets: iterative or one-shot magnitude pruning, and the point to which surviving weights are rewound."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from prune_lab.accounting import eligibility
from prune_lab.config.time import parse_time
from prune_lab.core.card import Card
from prune_lab.core.method import Method, MethodConfig
from prune_lab.core.phase import TRAIN_DENSE, Phase, prune
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import Example, Index, OpenFraction
from prune_lab.pruning.masks import distributions, top_k
from prune_lab.pruning.masks.selection import SEMI_STRUCTURED, check_semi_structured, selection
from prune_lab.pruning.scores import weight_overlap

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prune_lab.accounting.eligibility import Layer
    from prune_lab.config.run import RunConfig
    from prune_lab.core.context import Context


Arm = Literal["LT-IMP", "LT-OMP", "RR-IMP", "RR-OMP", "IMP-rewind", "OMP-rewind", "LR-rewinding-IMP",
              "LR-rewinding-OMP", "fine-tune-IMP", "fine-tune-OMP", "random-layerwise", "random-global"]  # fmt: skip

_REWINDS = ("IMP-rewind", "OMP-rewind", "LR-rewinding-IMP", "LR-rewinding-OMP", "random-layerwise", "random-global",
            "RR-IMP")  # fmt: skip
"""arms that restart at `rewind_to`, RR-IMP in the rounds before its last; the others restart at the beginning"""
_LEVELS = 4
"""rounds without a target; four rounds of 0.2 give 0.59, the lowest sparsity in the tables of Ma et al. 2021"""
_LARGE = 0.1
"""fraction of a layer's weights that count as large (Ma et al. 2021)"""


@dataclass(frozen=True)
class LotteryConfig(MethodConfig):
    arm: Arm
    """origin of the mask and of the surviving weights' start values (Ma et al. 2021, Renda et al. 2020)"""
    levels: Index | None
    """rounds of pruning; None: as many as `sparsity` needs, 4 without a target"""
    sparsity: OpenFraction | None
    """target over eligible weights; the last round prunes less if needed to meet it. None: the result of `levels`"""
    fraction: OpenFraction
    """fraction of the surviving weights that each round removes"""
    distribution: Literal["global", "uniform", "2:4"]
    """one ranking over all layers, or the same fraction of each layer; 2:4: uniform with two of every four input
    channels at the end and two or more before"""
    rewind_to: Annotated[str, Example("8ep")]
    """rewind point in the dense training, as epochs (8ep) or steps (500it), for weights and schedule; in RR-IMP, the
    control of IMP-rewind, in the rounds that find the mask"""
    optimizer_state: Literal["restore", "zero"]
    """the optimizer's running means after weight rewinding: those of that step, or zeros (official code, open_lth);
    the other arms start without any"""
    copy: Index
    """above 0: the last training sees its batches in another order, drawn from this number, so that two copies from
    one point can be compared (Frankle et al. 2020)"""
    include: list[str]
    """layer patterns to prune although they are dense by default (depthwise convolutions)"""
    exclude: list[str]
    """layer patterns to keep dense and out of the count"""

    def check(self, path: str) -> None:
        if self.levels is not None and self.sparsity is not None:
            raise UserError(
                f"{path}.levels={self.levels} and {path}.sparsity={self.sparsity:g}: give one of them; levels of "
                f"{path}.fraction={self.fraction:g} end at sparsity {1 - (1 - self.fraction) ** self.levels:.6g}"
            )
        check_semi_structured(self, path)
        if self.distribution == SEMI_STRUCTURED and self.arm == "random-global":
            raise UserError(f"{path}.arm=random-global draws over all layers, {path}.distribution=2:4 in each; use "
                              "random-layerwise")
        place = parse_time(self.rewind_to, f"{path}.rewind_to")
        if place.count and self.arm not in _REWINDS:
            raise UserError(
                f"{path}.rewind_to={self.rewind_to}: {path}.arm={self.arm} starts at the beginning of the training; "
                f"arms that rewind: {', '.join(_REWINDS)}"
            )
        if self.levels == 0 and self.arm not in ("LT-IMP", "IMP-rewind"):
            raise UserError(f"{path}.levels=0 prunes nothing; it goes with {path}.arm=LT-IMP or IMP-rewind")


class Lottery(Method):
    Config = LotteryConfig
    card = Card(
        summary="prune the smallest weights of the trained network in rounds, start the rest again from early weights",
        paper="Frankle, Carbin 2019, The Lottery Ticket Hypothesis, arXiv 1803.03635; Frankle et al. 2020, Linear Mode "
        "Connectivity and the Lottery Ticket Hypothesis, arXiv 1912.05671; Renda, Frankle, Carbin 2020, Comparing "
        "Rewinding and Fine-tuning in Neural Network Pruning, arXiv 2003.02389; Ma et al. 2021, Sanity Checks for "
        "Lottery Tickets, arXiv 2107.00166",
        acts="between complete trainings; masks never change within one",
        eligible="weights of convolutions and linear layers, depthwise ones only if included; open_lth keeps VGG's "
        "linear layer, Ma et al. the first convolution and the last linear layer (method.exclude)",
        cost="a training per round, shared by all runs with the same rounds; no extra time within one",
        differences="removes exactly round(fraction * survivors), where open_lth removes one more; momentum is "
        "restored at rewind_to > 0 (method.optimizer_state=zero as open_lth); the mask comes from the last epoch, in "
        "Ma et al.'s code from the epoch with the best test accuracy",
    )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.start: dict[str, Tensor] = {}  # weights at the start of the current training

    @property
    def levels(self) -> int:
        """Rounds of pruning."""
        config = self.config
        if config.sparsity is None:
            return _LEVELS if config.levels is None else config.levels
        # 0.5904 is four rounds of 0.2, although logarithms give 4.000...1
        return max(1, math.ceil(math.log(1 - config.sparsity) / math.log(1 - config.fraction) - 1e-9))

    def check_run(self, config: RunConfig) -> None:
        """Reject a rewind point beyond the training or within its warm-up."""
        place, train = parse_time(self.config.rewind_to, "method.rewind_to"), config.schedule.train
        if place.unit == "ep" and place.count > train.epochs:
            raise UserError(
                f"method.rewind_to={self.config.rewind_to} lies beyond schedule.train.epochs={train.epochs}"
            )
        if place.unit == "ep" and 0 < place.count < train.warmup_epochs:
            raise UserError(
                f"method.rewind_to={self.config.rewind_to} lies within the warm-up "
                f"(schedule.train.warmup_epochs={train.warmup_epochs:g})"
            )

    def chain(self) -> tuple[Phase, ...]:
        arm, last = self.config.arm, self.levels
        early = Phase("early", None, "train", active=False, end=self._place(), order="train", keeps_optimizer=True,
                      repeated=last > 0)  # fmt: skip
        if last == 0:
            return (early, *self._anew(0), self._train(0)) if self.config.copy else (TRAIN_DENSE,)
        kept = "LR-rewinding" in arm or "fine-tune" in arm
        head = (TRAIN_DENSE,) if kept else (early, TRAIN_DENSE)
        if self._at_once():
            return (*head, self._prune(last), *self._restart(last))
        before = [phase for level in range(1, last) for phase in (self._prune(level), *self._again(level))]
        return (*head, *before, self._prune(last), *self._restart(last))

    def _at_once(self) -> bool:
        """Return whether one phase performs the pruning of all rounds."""
        return self.config.arm.endswith("-OMP") or self.config.arm == "OMP-rewind"

    def _place(self) -> Any:
        return parse_time(self.config.rewind_to, "method.rewind_to")

    def _anew(self, level: int) -> tuple[Phase, ...]:
        """Return the rewinding phase, if one is needed; without pruning it only discards the optimizer's state."""
        if level == 0 and self._optimizer_state() == "restore":
            return ()
        return (Phase(f"rewind_{level}", type(self).rewind, None, active=True, origin="early"),)

    def _optimizer_state(self) -> str:
        """Return the treatment of the optimizer's state; at the start of training there is none."""
        return self.config.optimizer_state if self._place().count else "restore"

    def _prune(self, level: int) -> Phase:
        return Phase(f"prune_{level}", prune, None, active=True)

    def _train(self, level: int, block: str = "train") -> Phase:
        """Return the training of a round: from `rewind_to`, except for new weights and fine-tuning."""
        arm, last = self.config.arm, level == self.levels
        from_start = block == "finetune" or (last and arm.startswith("RR"))
        begin = None if from_start or not self._place().count else self._place()
        order = f"copy_{self.config.copy}" if last and self.config.copy else None
        return Phase(f"{block}_{level}", None, block, active=True, begin=begin, order=order)

    def _again(self, level: int) -> tuple[Phase, ...]:
        """Return the phases of a round after its pruning."""
        if "fine-tune" in self.config.arm:
            return (self._train(level, "finetune"),)
        if "LR-rewinding" in self.config.arm:
            return (self._train(level),)
        return *self._anew(level), self._train(level)

    def _restart(self, level: int) -> tuple[Phase, ...]:
        """Return the arm's phases after the final mask."""
        if self.config.arm in ("RR-IMP", "RR-OMP"):
            return Phase(f"reinit_{level}", type(self).reinit, None, active=True), self._train(level)
        if self.config.arm in ("random-layerwise", "random-global"):
            shuffle = Phase(f"shuffle_{level}", type(self).shuffle, None, active=True, origin="early")
            return shuffle, self._train(level)
        return self._again(level)

    def phase_identity(self, phase: Phase) -> dict[str, Any]:
        """Return the options a phase depends on, so that runs which differ only in others share it."""
        config, place = self.config, phase.name.partition("_")[0]
        if phase.acts is prune:
            options = {key: getattr(config, key) for key in ("fraction", "distribution", "include", "exclude")}
            final = config.sparsity if phase.name == f"prune_{self.levels}" else None
            return {"lottery": options, "from": self.levels if self._at_once() else 1, "target": final}
        state = self._optimizer_state()
        return {"lottery": {"rewind": state, "shuffle": [config.arm, state]}.get(place)}

    def requested_sparsity(self) -> float | None:
        return self.config.sparsity

    def layers(self, model: nn.Module) -> list[Layer]:
        config = self.config
        return eligibility.select_layers(model, include=config.include, exclude=config.exclude,
                                         grouped=config.distribution == SEMI_STRUCTURED)

    def _at_target(self, counts: dict[str, int], sizes: dict[str, int]) -> dict[str, int]:
        """Return the counts after the last round, which keeps as many of `counts` as the target needs."""
        target = self.config.sparsity
        keep = distributions.num_keep_total(sum(sizes.values()), target)
        if keep > sum(counts.values()):
            raise UserError(f"method.sparsity={target:g} is what {self.levels - 1} rounds leave but for rounding; "
                              f"use method.levels={self.levels - 1}")
        if len(sizes) == 1:
            return dict.fromkeys(sizes, keep)
        layers = [distributions.LayerSize(name, (size,)) for name, size in sizes.items()]
        wanted = distributions.allocate("uniform", layers, keep)
        # Rounding in every round may have left a layer one weight less than its part of the target.
        return distributions.clamp_counts(wanted, low=dict.fromkeys(wanted, 1), high=counts, total=keep)

    def counts_at(self, context: Context, level: int) -> dict[str, int]:
        """Return the kept weights after round `level`: in all ("all") with one ranking, per parameter otherwise."""
        sizes = {layer.parameter: layer.size for layer in context.eligible()}
        if self.config.distribution == "global":
            sizes = {"all": sum(sizes.values())}
        counts = sizes
        for number in range(1, level + 1):
            if number == self.levels and self.config.sparsity is not None:
                return self._at_target(counts, sizes)
            counts = {name: count - round(self.config.fraction * count) for name, count in counts.items()}
            if self.config.distribution == SEMI_STRUCTURED:  # rounding may fall below two of four before the last round
                counts = {name: max(count, sizes[name] // 2) for name, count in counts.items()}
        return counts

    def layout(self, context: Context) -> list[tuple[int, dict[str, int]]] | None:
        level, final = _level(context.phase), self.counts_at(context, self.levels)  # raises if unreachable
        if self.config.distribution == "global" and level:
            return None
        return [(0, {} if not level else final if level == self.levels else self.counts_at(context, level))]

    def prune(self, context: Context) -> None:
        """Remove the smallest |w| among the remaining weights; ties remove the later position."""
        named, level = context.parameters(), _level(context.phase)
        scores = {layer.parameter: named[layer.parameter].detach().abs() for layer in context.eligible()}
        old = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
        old = old if context.masks is None else context.masks.masks
        counts = self.counts_at(context, level)
        if self.config.sparsity is not None and level == self.levels:
            context.report(f"round {level} ends at method.sparsity={self.config.sparsity:g}")
        if self.config.distribution == "global":
            kept = top_k.keep_top_global(scores, counts["all"], candidates=old)
        else:
            keep_top = selection(self.config.distribution).keep_top
            kept = {name: keep_top(score, counts[name], candidates=old[name]) for name, score in scores.items()}
        context.install_masks(kept)
        empty = [name.removesuffix(".weight") for name, count in context.masks.counts().items() if count == 0]
        if empty:
            context.report(f"layers without any weight left: {', '.join(empty)}")

    def rewind(self, context: Context) -> None:
        """Rewind the network to its state at `rewind_to` of the dense training, including batch-norm statistics."""
        context.model.load_state_dict(context.origin.model)
        if context.masks is not None:
            context.masks.apply()
        if self.config.optimizer_state == "restore":
            # A copy: the optimizer updates its tensors in place, and later rounds start from the same ones.
            context.optimizer_state = copy.deepcopy(context.origin.optimizer)

    def reinit(self, context: Context) -> None:
        """Reinitialise the network under the same masks."""
        context.model.load_state_dict(context.fresh_model("reinit").state_dict())
        context.masks.apply()

    def shuffle(self, context: Context) -> None:
        """Redraw the kept positions, within each layer or over all layers, and rewind."""
        old, source = context.masks, context.generator("shuffle")
        shapes = {name: tuple(mask.shape) for name, mask in old.masks.items()}
        if self.config.arm == "random-layerwise":
            counts = old.counts()
            random_mask = selection(self.config.distribution).random_mask
            drawn = {name: random_mask(shape, counts[name], source) for name, shape in shapes.items()}
        else:
            parts = top_k.random_mask((old.num_weights,), old.num_kept, source).split(
                [mask.numel() for mask in old.masks.values()]
            )
            drawn = {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
        context.install_masks({name: mask.to(context.device) for name, mask in drawn.items()})
        self.rewind(context)

    def setup(self, context: Context) -> None:
        named = context.parameters()
        if context.masks is not None:
            self.start = {name: named[name].detach().clone() for name in context.masks.masks}

    def after_step(self, context: Context, step: int) -> None:
        """Keep the running means of pruned weights at zero, like the weights themselves."""
        if context.masks is not None:
            context.masks.mask_state(context.optimizer)

    def end_epoch(self, context: Context, epoch: int) -> dict[str, float]:
        """Return the fraction of the large weights that were already large at the start of this training."""
        if context.masks is None:
            return {}
        now = {name: context.parameters()[name].detach() for name in self.start}
        return {"weights/overlap": weight_overlap.overlap_of_largest(self.start, now, _LARGE, context.masks.masks)}

    def chosen(self) -> dict[str, Any]:
        """Return the arm and its number of rounds."""
        config = self.config
        return {"lottery/arm": config.arm, "lottery/levels": self.levels, "lottery/rewind_to": config.rewind_to}


def _level(phase: str) -> int:
    """Return the round a phase belongs to; 0 before the first."""
    number = phase.rpartition("_")[2]
    return int(number) if number.isdigit() else 0


ARMS = get_args(Arm)
