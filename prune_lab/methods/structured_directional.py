"""Structured directional pruning: group gRDA drives whole channels to zero while the network is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from prune_lab.accounting import eligibility
from prune_lab.core import removal
from prune_lab.core.card import Card
from prune_lab.core.images import DrawnImages
from prune_lab.core.method import Method, MethodConfig
from prune_lab.core.phase import FINETUNE, PRUNE, REMOVE, TRAIN, TRAIN_DENSE, Phase
from prune_lab.families.dual_averaging import check_plain_sgd, theory_note
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import Count, Index, OpenFraction, Positive, Range
from prune_lab.optim import learning_rate
from prune_lab.optim.grda_threshold import thresholds
from prune_lab.optim.row_groups import group_sizes
from prune_lab.pruning.batch_norm import statistics
from prune_lab.pruning.channels.removable import RemovableChannels
from prune_lab.pruning.scores import flat_directions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prune_lab.accounting.eligibility import Layer
    from prune_lab.config.run import RunConfig
    from prune_lab.core.context import Context
    from prune_lab.core.removal import TrialCut
    from prune_lab.optim.group_grda import GroupGRDA


_DIRECTIONAL = Phase("directional", None, "finetune", active=True)
"""training with group gRDA that starts from a trained network"""

_REACH, _REACH_FOR_TARGET = 3.0, 6.0
"""Filters before a batch norm grow in training, small ones most: a threshold at their initial norm would zero hardly
any. Digits, ResNet-20 of half the width, 20 epochs: 2.1 leaves 78 % of the MACs, 3 leaves 67 %. With a target the
threshold stops there. It must reach the target, because cutting nonzero channels at the end costs accuracy:
macs_ratio=0.5 ends at 59 % top-1 with 4, at 97 % with 6."""

_GROWN = 440
"""Steps of those 20 epochs. In fewer steps filters grow less: after the demo's 176 at full width 1.7 leaves 75 % of the
MACs and 97 % top-1, 2.1 leaves 49 % and 71 %, 3 leaves 15 % and 38 %. At 1 half of the channels that do not grow are
removed."""

_CHECK_EVERY = 50
"""maximum steps between two checks of whether the threshold meets the target; each waits for the device"""

_BATCH = 128
"""images per forward pass when batch norm measures its statistics"""


@dataclass(frozen=True)
class StructuredDirectionalConfig(MethodConfig):
    variant: Literal["AltSDP", "SDP"]
    """AltSDP: every training step applies the threshold; SDP: one projection of a trained network"""
    start: Literal["scratch", "dense"]
    """AltSDP, scratch: the only training uses group gRDA; dense: plain SGD first, then group gRDA over the
    schedule's finetune block"""
    c: Positive | None
    """AltSDP: size of the threshold; None: see `_size`"""
    mu: Annotated[float, Range(0, 1, open_low=True)]
    """AltSDP: exponent of the threshold's growth with the steps"""
    scale_by_size: bool
    """whether a group's threshold is multiplied by the root of the number of its values"""
    bn_scale: bool
    """whether the scales of the batch norms that a channel passes belong to its group"""
    residual: bool
    """whether channels that are added to others may be removed; all filters of their trunk for one form a group"""
    exclude: list[str]
    """patterns of layers that keep all of their output channels"""
    macs_ratio: OpenFraction | None
    """maximum kept fraction of the MACs. AltSDP: the threshold stops growing there, and the result is cut to it; None:
    c and mu decide. SDP: determines the strength of the single shrinkage"""
    eigenvectors: Count
    """SDP: number of directions with the largest eigenvalues of the Hessian, which are not flat"""
    hessian_images: Count
    """SDP: training images on which the Hessian is measured"""
    bn_images: Index
    """training images on which batch norm measures its statistics without the pruned channels; 0: none"""
    finetune: bool
    """whether the smaller network is trained over the schedule's finetune block"""

    @classmethod
    def absent(cls, option: str) -> str | None:
        if option != "sparsity":
            return None
        return "channels are removed under method.macs_ratio, or as far as method.c and method.mu lead"

    def check(self, path: str) -> None:
        if self.variant == "SDP" and self.macs_ratio is None:
            raise UserError(
                f"{path}.variant=SDP needs {path}.macs_ratio, which decides how strongly it shrinks; got null"
            )
        if self.variant == "SDP" and self.c is not None:
            raise UserError(f"{path}.c={self.c:g} goes with {path}.variant=AltSDP, got SDP, which has no threshold")
        if self.variant == "AltSDP" and self.start == "dense" and self.finetune:
            raise UserError(
                f"{path}.finetune=true needs {path}.start=scratch: with dense the schedule's finetune block is the "
                "training with the threshold"
            )
        if self.bn_images == 1:
            raise UserError(f"{path}.bn_images=1: one image has no variance; allowed: 0 (off), or 2 and more")


class StructuredDirectional(Method):
    needs_images = "it removes channels of convolutions"
    Config = StructuredDirectionalConfig
    card = Card(
        summary="reconstruction: a threshold that grows in every step of the training makes whole channels zero, which "
        "are then removed",
        paper="Li, Liu, Shao, Wang, Geng 2021, Structured Directional Pruning via Perturbation Orthogonal Projection, "
        "arXiv 2107.05328",
        acts="AltSDP: in every step of one training, in place of the optimizer; zero channels may come back until its "
        "end. SDP: once, on a trained network. No fine-tuning unless it is asked for",
        eligible="output channels of convolutions and hidden linear layers. A group is all that writes a channel: its "
        "filter, depthwise ones and the filters of its residual trunk too, with bn_scale also its batch-norm scales. "
        "Biases and batch-norm shifts have no threshold and go with the channel",
        cost="AltSDP: one more tensor of the grouped weights' size, one norm per group and step; training is computed "
        "dense, and SGD without momentum takes more epochs. SDP: up to 20 + 3 x eigenvectors Hessian-vector products",
        differences="the paper's full text could not be read and its code was never released. Known are the abstract, "
        "the names SDP and AltSDP, and the unstructured predecessor (method=directional). Reconstructed are the group "
        "threshold, the direction score of a group, and what tells AltSDP (accumulating gradients and thresholding "
        "alternate) from SDP (the projection itself). bn_scale=true: where filter and scale are both zero neither gets "
        "a gradient, so that the channel never comes back; with false it can, but batch norm hides how small a filter "
        "is, which therefore grows while it is trained. This program's: c=null, macs_ratio, bn_images, finetune",
    )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.figures: dict[str, float] = {}
        self.norms: Tensor | None = None
        """|a_G| / s_G when last measured, float64 [num_classes]"""
        self.zero: Tensor | None = None
        """which classes were zero then, bool [num_classes]"""
        self.channels: RemovableChannels | None = None
        self.optimizer: GroupGRDA | None = None
        self._spent = 0

    def chain(self) -> tuple[Phase, ...]:
        trained: tuple[Phase, ...]
        if self.config.variant == "SDP":
            trained = (TRAIN_DENSE,)
        else:
            trained = (TRAIN,) if self.config.start == "scratch" else (TRAIN_DENSE, _DIRECTIONAL)
        return (*trained, PRUNE, REMOVE, *((FINETUNE,) if self.config.finetune else ()))

    def check_run(self, config: RunConfig) -> None:
        """Reject any optimizer other than plain SGD, training without steps, and an untrained network."""
        if self.config.variant == "AltSDP":
            check_plain_sgd(config)
            block = "train" if self.config.start == "scratch" else "finetune"
            if config.schedule.phase(block).epochs == 0:
                raise UserError(
                    f"schedule.{block}.epochs=0 does not go with method.start={self.config.start}: the threshold grows "
                    "there",
                    f"schedule.{block}.epochs",
                )
        if self.chain()[0] is TRAIN_DENSE:
            config.require_trained(f"method.{'variant=SDP' if self.config.variant == 'SDP' else 'start=dense'}")

    def asked(self) -> dict[str, float]:
        return {} if self.config.macs_ratio is None else {"macs": self.config.macs_ratio}

    def layers(self, model: nn.Module) -> list[Layer]:
        return eligibility.select_layers(model, include=["*"])

    def layout(self, context: Context) -> list[tuple[int, dict[str, int]]] | None:
        """Return None: which channels become zero is an outcome of the training.

        Raises:
            UserError: unreachable MACs, a pattern that matches nothing, or no channel that may be removed.
        """
        if context.widths is None:
            channels = self._channels(context)
            if self.config.macs_ratio is not None:
                channels.best(torch.zeros(channels.map.num_classes, dtype=torch.float64), self.config.macs_ratio)
        return None

    def trial_cut(self, context: Context) -> TrialCut:
        """Return half of the channels that may be removed."""
        channels = self._channels(context)
        return removal.half(channels.map, channels.free_lanes)

    def _channels(self, context: Context) -> RemovableChannels:
        config = self.config
        return RemovableChannels(context.network, residual=config.residual, exclude=config.exclude)

    def _groups(self, context: Context, channels: RemovableChannels) -> tuple[dict[nn.Parameter, Tensor], Tensor]:
        """Return the class of each row of the grouped parameters, and s_G [num_classes]."""
        rows = channels.rows(context.model, norm_scales=self.config.bn_scale)
        sizes = group_sizes(rows, channels.map.num_classes).clamp(min=1)
        return rows, sizes.sqrt() if self.config.scale_by_size else torch.ones_like(sizes)

    def setup(self, context: Context) -> None:
        """Replace the optimizer by group gRDA in the phase that trains with it.

        Only here is the image size known, without which channels cannot be traced through a flatten.
        """
        if context.phase not in (TRAIN.name, _DIRECTIONAL.name):
            return
        config, self.channels = self.config, self._channels(context)
        from prune_lab.optim.group_grda import GroupGRDA  # its file defines an Optimizer and so imports torch

        rows, scales = self._groups(context, self.channels)
        trained = [parameter for parameter in context.model.parameters() if parameter.requires_grad]
        self.optimizer = GroupGRDA(trained, 0.0, c=0.0, mu=config.mu, rows=rows, scales=scales)
        context.optimizer = self.optimizer
        self._look()
        steps = range(context.total_steps)
        rates = (learning_rate.learning_rate(context.schedule, step, context.steps_per_epoch) for step in steps)
        values = list(thresholds(rates, c=1.0, mu=config.mu))
        c = config.c or self._size(values)
        self.optimizer.param_groups[0]["c"] = c
        if config.macs_ratio is not None:
            self._limit()
        if note := theory_note(config.mu):
            context.report(note)
        if values:
            context.report(self._outlook(c, [c * value for value in values]))

    def _size(self, values: list[float]) -> float:
        """Return c if none is given: the threshold ends at a multiple of the channels' initial median norm.

        Args:
            values: the threshold after each step with c = 1.
        """
        reach = max(_REACH * min(len(values) / _GROWN, 1) ** 0.6, 1.0)
        if self.config.macs_ratio is not None:
            reach = _REACH_FOR_TARGET
        return reach * float(self.norms[self.channels.free].median()) / values[-1] if values else 0.0

    def _outlook(self, c: float, values: list[float]) -> str:
        norms, end = self.norms[self.channels.free], values[-1]
        low, middle, high = (float(norms.quantile(part)) for part in (0, 0.5, 1))
        stop = "" if self.config.macs_ratio is None else ", or where method.macs_ratio is met"
        text = (
            f"threshold: from 0 to {end:.4g} in {len(values)} steps (method.c={c:.4g}){stop}; the {len(norms)} "
            f"channels have norms of {low:.4g} to {high:.4g}, median {middle:.4g}; without gradient "
        )
        reached = next((step for step, value in enumerate(values, start=1) if value >= middle), None)
        if reached is not None:
            return f"{text}half of them are zero after step {reached}"
        gone = int((norms <= end).sum())
        return f"{text}{gone} are zero at the end, half of them with method.c={c * middle / end:.2g}"

    def _look(self) -> None:
        """Record the norm of each channel, and which are zero."""
        optimizer = self.optimizer
        self.norms = (optimizer.norms() / optimizer.scales).double().cpu()
        self.zero = (optimizer.factors() == 0).cpu() & self.channels.free

    def _limit(self) -> None:
        """Stop the threshold from growing beyond the target."""
        self._look()
        self.optimizer.limit(self.channels.threshold(self.norms, self.config.macs_ratio))

    def after_step(self, context: Context, step: int) -> None:
        if self.channels is None or self.config.macs_ratio is None:
            return
        if step % min(_CHECK_EVERY, 1 + context.total_steps // 100) == 0:
            self._limit()

    def end_epoch(self, context: Context, epoch: int) -> dict[str, float]:
        """Return the channels' distance from zero.

        threshold: that of a group with s_G = 1; groups/zero: fraction of the removable channels that are zero;
        groups/norm: median of |a_G| / s_G; channels/kept: fraction of channels that are not zero;
        macs/inference: without the zero channels.
        """
        if self.channels is None:  # fine-tuning
            return {}
        self._look()
        alive, channels = ~self.zero, self.channels
        self.figures = {
            "threshold": self.optimizer.threshold,
            "groups/zero": float(self.zero.sum() / channels.free.sum()),
            "groups/norm": float(self.norms[channels.free].median()),
        }
        costs, left = channels.costs, {"channels/kept": float(alive.double().mean())}
        return self.figures | left | {"macs/inference": costs.at("macs", costs.kept(alive))}

    def prune(self, context: Context) -> dict[str, float]:
        """Mask the channels that are zero, for SDP after its projection; return the remaining size.

        Raises:
            UserError: no channel is zero and there is no budget.
        """
        channels = self._channels(context)
        alive = self._project(context, channels) if self.config.variant == "SDP" else self._left(context, channels)
        if bool(alive.all()):
            return self._refuse_nothing(context)
        masks = channels.map.weight_masks(alive, context.model)
        masks = {name: mask.to(context.device) for name, mask in masks.items() if not bool(mask.all())}
        # The mask history starts with a dense network, as training did.
        context.install_masks({name: torch.ones_like(mask) for name, mask in masks.items()})
        context.install_masks(masks)
        self._measure_statistics(context)
        figures = {f"prune/{unit}_kept": channels.at(unit, alive) for unit in ("channels", "macs", "params")}
        context.report("keeps {:.4%} of the channels, {:.4%} of the MACs, {:.4%} of the parameters".format(
            *figures.values()))
        return figures

    def _left(self, context: Context, channels: RemovableChannels) -> Tensor:
        """Return the nonzero classes; under a budget of MACs, those with the largest |a_G| / s_G."""
        alive = ~self.zero
        if self.config.macs_ratio is not None:
            best = channels.best(self.norms, self.config.macs_ratio)
            if cut := int((alive & ~best).sum()):
                context.report(
                    f"the threshold left {channels.at('macs', alive):.4g} of the MACs: {cut} channels that are not "
                    "zero go as well to meet method.macs_ratio; a higher method.c leaves fewer of them"
                )
            alive &= best
        kept = channels.largest_of_empty(self.norms, alive)
        if kept:
            alive[list(kept.values())] = True
            context.report(f"one channel, the largest, is kept where all were zero: {', '.join(kept)}")
        return alive

    def _project(self, context: Context, channels: RemovableChannels) -> Tensor:
        """Shrink the groups along flat directions until the budget is met; return the classes to keep."""
        config = self.config
        rows, scales = self._groups(context, channels)
        drawn = DrawnImages(context, "Hessian", augment=False)
        positions = drawn.positions("images", config.hessian_images)
        parts = positions.tensor_split(-(-len(positions) // _BATCH))
        found = flat_directions.measure(
            context.network, rows, scales, lambda: drawn.read("images", parts), eigenvectors=config.eigenvectors,
            num_images=len(positions), generator=context.generator, report=context.report,
            validating=context.validating,
        )  # fmt: skip
        self._spent += found.macs
        alive = channels.best(flat_directions.order(found.norms, found.scores), config.macs_ratio)
        strength = flat_directions.strength(found.norms, found.scores, channels.free & ~alive)
        flat_directions.shrink(context.model, rows, found, strength)
        self.figures = {
            "flat/sharp_share": found.sharp,
            "flat/sharp_share_by_chance": found.by_chance,
            "flat/pushed_outward": float((found.scores[channels.free] < 0).double().mean()),
            "flat/strength": strength,
        }
        context.report(
            f"{found.sharp:.4g} of the groups' directions lies in the {config.eigenvectors} sharpest directions of the "
            f"loss ({found.by_chance:.4g} by chance); eigenvalues {float(found.pairs.values[0]):.4g} to "
            f"{float(found.pairs.values[-1]):.4g}{'' if found.pairs.converged else ', not converged'}"
        )
        return alive

    def _refuse_nothing(self, context: Context) -> dict[str, float]:
        if context.validating:
            return {}  # the zero channels are an outcome of the training
        raise UserError(
            f"no channel became zero: the threshold reached {self.figures['threshold']:.4g}, the smallest norm is "
            f"{float(self.norms.min()):.4g}; raise method.c or method.mu, or set method.macs_ratio",
            "method.c",
        )

    def _measure_statistics(self, context: Context) -> None:
        """Measure batch-norm statistics without the masked channels, whose shifts had remained."""
        if not self.config.bn_images:
            return
        images = DrawnImages(context, "network", augment=True)
        drawn = images.positions("batch norm", self.config.bn_images)
        whole = drawn[: len(drawn) // _BATCH * _BATCH] if len(drawn) > _BATCH else drawn  # batches have equal weight
        batches = (batch for batch, _ in images.read("batch norm", whole.split(_BATCH)))
        self._spent += statistics.measure_statistics(context.model, batches) * context.forward_macs

    def phase_cost(self, context: Context) -> int | None:
        """Return the MACs of the Hessian and of the images for batch norm; unknown in advance, like the channels."""
        unknown = self.config.bn_images or self.config.variant == "SDP"
        return None if context.validating and context.phase == PRUNE.name and unknown else self._spent

    def explain(self) -> dict[str, float]:
        return self.figures

    def state_dict(self) -> dict[str, Any]:
        return {"figures": self.figures, "norms": self.norms, "zero": self.zero}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.figures, self.norms, self.zero = dict(state["figures"]), state["norms"], state["zero"]
