"""Dep-L0: hard-concrete gates on channels; one small network generates their parameters layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from prune_lab.accounting import eligibility
from prune_lab.core.card import Card
from prune_lab.core.method import Method, MethodConfig
from prune_lab.core.phase import REMOVE, TRAIN, TRAIN_DENSE, Phase
from prune_lab.families.annealed_gradient import restore
from prune_lab.families.gated_weights import gate_rate
from prune_lab.foundations import distributed, seeding
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import Count, NonNegative, OpenFraction, Positive, Range
from prune_lab.pruning.channels import selection
from prune_lab.pruning.gates import budget, channels, hard_concrete, multipliers
from prune_lab.pruning.gates.norms import GatedNorms, find_norms

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prune_lab.accounting.eligibility import Layer
    from prune_lab.config.run import RunConfig
    from prune_lab.core.context import Context
    from prune_lab.pruning.channels.costs import Unit
    from prune_lab.pruning.channels.groups import ChannelGroup
    from prune_lab.pruning.gates.channels import GatedChannels
    from prune_lab.pruning.gates.generator import GateParameters


_RATIOS: dict[str, Unit] = {"macs_ratio": "macs", "params_ratio": "params", "channels_ratio": "channels"}
"""option -> unit of its target"""

_GATES = Phase("gates", None, "finetune", active=True)


@dataclass(frozen=True)
class DepL0Config(MethodConfig):
    macs_ratio: OpenFraction | None
    """kept fraction of the network's MACs; None, as for the other ratios: the penalty alone decides"""
    params_ratio: OpenFraction | None
    """kept fraction of the network's parameters"""
    channels_ratio: OpenFraction | None
    """kept fraction of the channels that could be removed"""
    penalty: NonNegative
    """lambda: price of one expected weight; with a ratio it adds to that of the multiplier"""
    penalise: Literal["weights", "macs"]
    """basis of the price lambda, weights: each the same; macs: each by the MACs it takes part in, equal on average"""
    start: Literal["scratch", "dense"]
    """scratch: gates from the first step, over the schedule's train block; dense: train first, then add gates and
    continue over the finetune block"""
    generator: Literal["forward", "backward", "independent"]
    """forward, backward: order in which a small network generates the layers' gates; independent: one value each"""
    generator_width: Count | None
    """number of ones in the small network's input; None: the number of gates of the first generated layer"""
    gate_lr: Positive | None
    """learning rate of the gates' Adam; None: see `learning_rate`"""
    gate_schedule: Literal["constant", "weights"]
    """constant: fixed rate; weights: the rate decays as that of the weights"""
    dual_lr: Positive | None
    """learning rate of the multiplier; None: see `dual_rate`"""
    dual_restart: bool
    """whether the multiplier is set to 0 when the target is met (strictly)"""
    freeze_fraction: Annotated[float, Range(0, 1, open_high=True)]
    """final fraction of the steps, in which the gates are fixed"""
    exclude: list[str]
    """patterns of layers whose output channels have no gates"""

    GOALS = tuple(_RATIOS)

    @property
    def unit(self) -> Unit | None:
        """Unit of the target."""
        return next((unit for name, unit in _RATIOS.items() if getattr(self, name) is not None), None)

    @property
    def ratio(self) -> float:
        return getattr(self, f"{self.unit}_ratio")

    def check(self, path: str) -> None:
        given = [f"{path}.{name}={value:g}" for name in _RATIOS if (value := getattr(self, name)) is not None]
        names = ", ".join(f"{path}.{name}" for name in _RATIOS)
        if len(given) > 1:
            raise UserError(f"at most one of {names} may be set, the others null; got {' and '.join(given)}")
        if not given and not self.penalty:
            raise UserError(f"{path}.penalty=0 without one of {names} asks for nothing; set one of them")
        if self.generator == "independent" and self.generator_width is not None:
            raise UserError(
                f"{path}.generator_width={self.generator_width} goes with {path}.generator=forward or backward, got "
                "independent"
            )


def learning_rate(generator: str, num_steps: int) -> float:
    """Return the learning rate of the gates if none is given.

    With a generator: 0.001 as published, but at least 3 / steps. A gate follows all weights of its row and moves many
    times as far as one of them. Independent gates: see `gate_rate`.
    """
    return gate_rate("adam", num_steps) if generator == "independent" else max(1e-3, 3 / max(num_steps, 1))


def dual_rate(num_gates: int, num_steps: int) -> float:
    """Return the learning rate of the multiplier if none is given: gates / steps.

    Gates start open with a probability of 0.998, where a price has little effect. The rule is this program's.
    """
    return num_gates / max(num_steps, 1)


class DepL0(Method):
    """Gates follow batch norms and are drawn for every image.

    Between steps scale and shift include the deterministic gates, so that evaluation, moving average and saved network
    see the pruned network.
    """

    needs_images = "it removes channels of convolutions"
    Config = DepL0Config
    can_compile = False
    card = Card(
        summary="random gates on channels, made layer by layer by one small network, learn to stay shut",
        paper="Li, Ji 2021, Dep-L0: Improving L0-based Network Sparsification via Dependency Modeling, "
        "arXiv 2107.00070; gates of Louizos, Welling, Kingma 2018, arXiv 1712.01312",
        acts="during training, in every step, until the gates are fixed (freeze_fraction); closed channels are removed "
        "at its end",
        eligible="channels of layers that a batch norm follows and that no addition or concatenation ties to others; "
        "behind a depthwise convolution the gate stands after its batch norm",
        cost="a random number per image and channel, one more pass over the activations of gated layers, and the small "
        "network; training is computed dense until the gates are fixed",
        differences="abstract and official code were read, no value of the paper's tables could be verified. The code "
        "gates a ResNet-56's stem, too, whose channels an addition ties and which stays here; its prices count the "
        "kernel of a ResNet-50 twice and chain a ResNet-56's layers across blocks, here they are those of the real "
        "structure, with the layers that read gated channels; where it freezes gates it keeps them beside scale and "
        "shift, here they become part of them. Targets, the multiplier and exact rounding are this program's",
    )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.gates: GateParameters | None = None
        self.settled = False
        self.overflow = False
        self.figures: dict[str, float] = {}

    def chain(self) -> tuple[Phase, ...]:
        return (TRAIN, REMOVE) if self.config.start == "scratch" else (TRAIN_DENSE, _GATES, REMOVE)

    def check_run(self, config: RunConfig) -> None:
        """Reject compiled networks, schedules without steps for the gates, and an untrained network to start from."""
        block = "train" if self.config.start == "scratch" else "finetune"
        wanted = config.trainer.compile
        if wanted not in (False, "auto"):
            raise UserError(
                f"trainer.compile={str(wanted).lower()} does not go with method={self.config.name}, whose gates "
                "change in every step",
                "trainer.compile",
            )
        if config.schedule.phase(block).epochs == 0:
            raise UserError(
                f"schedule.{block}.epochs=0 does not go with method.start={self.config.start}: gates are trained there",
                f"schedule.{block}.epochs",
            )
        if self.config.start == "dense":
            config.require_trained("method.start=dense")

    def asked(self) -> dict[str, float]:
        return {self.config.unit: self.config.ratio} if self.config.unit else {}

    def layers(self, model: nn.Module) -> list[Layer]:
        """Return all layers, including depthwise ones: their filters are removed with the channel."""
        return eligibility.select_layers(model, include=["*"], exclude=self.config.exclude)

    # Set-up

    def setup(self, context: Context) -> None:
        """Create gates, raw scales and shifts, and the costs of open gates.

        Raises:
            UserError: no channels to gate, an unreachable target, or no step for the gates.
        """
        if context.optimizer is None:
            return
        config, pairs = self.config, self._pairs(context)
        self.gated = channels.GatedChannels(context.network, [group for group, _ in pairs])
        self._check_reach(self.gated)
        self.freeze_step = round((1 - config.freeze_fraction) * context.total_steps)
        if not self.freeze_step:
            raise UserError(f"method.freeze_fraction={config.freeze_fraction:g} leaves no step for the gates: there "
                              f"are {context.total_steps}")
        self.norms = GatedNorms(context.network, [path for _, path in pairs], context.parameters)
        self._make_gates(context)
        self._make_prices(context)
        self.norms.fold(self.fixed_gates())
        self._report_start(context)

    def _pairs(self, context: Context) -> list[tuple[ChannelGroup, str]]:
        """Return the channels with gates and the path of the batch norm that they follow.

        Raises:
            UserError: there are none.
        """
        allowed = {layer.name for layer in context.eligible()}
        found = find_norms(context.model, context.dataset.info.image_size)
        pairs = [(group, path) for group, path in found if group.producer in allowed]
        if not pairs:
            raise UserError(
                f"method={self.config.name}: {type(context.model).__name__} has no channels of their own behind a "
                "batch norm among the layers that method.exclude leaves"
            )
        return pairs

    def _check_reach(self, gated: GatedChannels) -> None:
        if self.config.unit:
            self._best(gated, torch.zeros(gated.num_gates))

    def _make_gates(self, context: Context) -> None:
        from prune_lab.pruning.gates.generator import (  # its file defines an nn.Module and so imports torch
            GateParameters,
            build,
        )

        config, source = self.config, context.generator("gates at the start")
        made = build(config.generator, self.gated.sizes, width=config.generator_width, source=source)
        rate = config.gate_lr or learning_rate(config.generator, self.freeze_step)
        self.gates = GateParameters(made.to(context.device), rate)
        if context.amp_scaled:  # so that the gradient is unscaled with the others; the optimizer never reads it
            context.optimizer.add_param_group({"params": [self.gates.leaf], "weight_decay": 0.0})

    def _make_prices(self, context: Context) -> None:
        """Create the expected costs: for the price lambda, and in the target's unit as a fraction."""
        config, gated, device = self.config, self.gated, context.device
        weights = gated.weights.at("macs", gated.costs.sizes)
        scale = weights / gated.dense("macs") if config.penalise == "macs" else 1.0
        self.priced = channels.ExpectedCost(gated, config.penalise, config.penalty * scale, device)
        self.unit: Unit = config.unit or "macs"
        self.share = channels.ExpectedCost(gated, self.unit, 1 / gated.dense(self.unit), device)
        self.multiplier = torch.zeros((), device=device)
        self.dual_lr = config.dual_lr or dual_rate(gated.num_gates, self.freeze_step)

    def _best(self, gated: GatedChannels, ranking: Tensor) -> Tensor:
        """Return the highest gates within the target, bool [num_gates].

        Raises:
            UserError: the target is out of reach.
        """
        return gated.best_within(ranking, selection.Budget(self.config.unit, self.config.ratio))

    def _report_start(self, context: Context) -> None:
        target = f" (target {self.config.ratio:g})" if self.config.unit else ""
        value, _ = self.share.at(hard_concrete.open_probability(self.gates.values))
        made_by = sum(parameter.numel() for parameter in self.gates.generator.parameters())
        context.report(
            f"gates: {self.gated.num_gates} on {len(self.gated.sizes)} layers, from {made_by} parameters; expected at "
            f"the start: {float(value):.4g} of the {budget.WORDS[self.unit]}{target}; fixed from step "
            f"{self.freeze_step} of {context.total_steps} on"
        )

    def fixed_gates(self) -> Tensor:
        """Return the deterministic gates [num_gates]."""
        return hard_concrete.fixed_gate(self.gates.values, "louizos")

    def before_forward(self, context: Context, step: int) -> None:
        """Let the forward passes draw gates."""
        if not self.settled:
            keys = (context.seed, context.phase, "gates", step)
            self.norms.begin(self.gates.leaf, lambda n: seeding.generator(*keys, n, device=context.device))

    def after_backward(self, context: Context, step: int) -> bool:
        """Add the price of open gates to their gradient."""
        if self.settled:
            return True
        self.norms.end()
        by_draws = distributed.total(self.gates.take_gradient()) / distributed.world_size()
        opened = hard_concrete.open_probability(self.gates.values)
        _, by_share = self.share.at(opened)
        # Deterministic gates stay open down to P(open) = 0.31: an expected cost would be met long before theirs.
        left, _ = self.share.at((self.fixed_gates() > 0).float())
        self.violation = left - self.config.ratio if self.config.unit else -left
        price = self.priced.at(opened)[1] + self.multiplier * by_share
        self.gradient = by_draws + opened * (1 - opened) * price
        self.overflow = context.amp_scaled and not _finite(context.model, self.gradient)
        return True

    def after_step(self, context: Context, step: int) -> None:
        """Restore scales and shifts and update the gates; a step that fp16 skipped updates neither."""
        if self.settled:
            return
        self.norms.take()
        if not self.overflow:
            self.move_gates(context)
        if step + 1 == self.freeze_step:
            self.settle(context)
        else:
            self.norms.fold(self.fixed_gates())

    def move_gates(self, context: Context) -> None:
        """Update the gates' parameters and the multiplier, both from the cost of the step."""
        fading = self.config.gate_schedule == "weights"
        slower = context.optimizer.param_groups[0]["lr"] / context.schedule.lr if fading else 1.0
        self.gates.step(self.gradient, slower=slower)
        restart = self.config.dual_restart
        self.multiplier = multipliers.ascend(self.multiplier, self.violation, lr=self.dual_lr, restart=restart)

    def settle(self, context: Context) -> None:
        """Decide which channels stay, and fix their gates in scale and shift.

        With a target they are those with the highest gates; a closed one among them takes the value of its gate before
        stretching. Without one, they are those with open deterministic gates, and the best of a layer without any.
        """
        log_alpha, gates, ranking = self.gates.values, self.fixed_gates(), self.gates.ranking()
        kept = self._best(self.gated, ranking) if self.config.unit else self.gated.keep_one(gates > 0, ranking)
        self._report_end(context, gates > 0, kept)
        self.figures = self._figures(kept)
        self.norms.fold(torch.where(gates > 0, gates, hard_concrete.middle(log_alpha, "louizos")) * kept)
        masks = self.gated.channels.weight_masks(self.gated.alive(kept), context.model)
        masks = {name: mask.to(context.device) for name, mask in masks.items() if not bool(mask.all())}
        if masks:
            context.install_masks(masks)
        self.norms.remove_hooks()
        self.settled = True

    def _report_end(self, context: Context, opened: Tensor, kept: Tensor) -> None:
        share = self.gated.cost(self.unit, kept) / self.gated.dense(self.unit)
        words = f"gates are fixed: {share:.4%} of the {budget.WORDS[self.unit]} stay"
        back, gone = int((kept & ~opened).sum()), int((opened & ~kept).sum())
        if self.config.unit:
            words += f" (method.{self.unit}_ratio={self.config.ratio:g})"
        if back or gone:
            words += f"; {int((~opened).sum())} of {len(kept)} were closed, {back} of them stay all the same, {gone} go"
        context.report(words)

    def end_epoch(self, context: Context, epoch: int) -> dict[str, float]:
        """Return the state of the gates.

        l0/open_gates: deterministic ones that are open, among all gates; l0/undecided: gates that are neither 0 nor 1;
        l0/expected_UNIT: expected cost, as a fraction; l0/UNIT: cost of the network with the deterministic gates;
        l0/multiplier: with a target; channels/kept: open ones of all channels. UNIT is macs, or the target's unit.
        When the gates are fixed, the figures are those of the channels that stay.
        """
        if distributed.world_size() > 1:
            distributed.assert_same(str(self.gates.values.tolist()), "gates")
        if self.settled:
            return self.figures | {"channels/kept": self.gated.channels.fraction_kept(context.masks)}
        opened = self.fixed_gates() > 0
        self.figures = self._figures(opened)
        macs = self.gated.cost("macs", opened)
        return self.figures | {"macs/inference": macs, "channels/kept": float(self.gated.alive(opened).double().mean())}

    def _figures(self, opened: Tensor) -> dict[str, float]:
        gates, gated = self.fixed_gates(), self.gated
        expected, _ = self.share.at(hard_concrete.open_probability(self.gates.values))
        return {
            "l0/open_gates": float(opened.double().mean()),
            "l0/undecided": float(((gates > 0) & (gates < 1)).double().mean()),
            f"l0/expected_{self.unit}": float(expected),
            f"l0/{self.unit}": gated.cost(self.unit, opened) / gated.dense(self.unit),
        } | ({"l0/multiplier": float(self.multiplier)} if self.config.unit else {})

    def explain(self) -> dict[str, float]:
        return self.figures

    def layout(self, context: Context) -> None:
        """Reject an unreachable target; which gates close is learned."""
        if context.widths is None and context.masks is None:
            self._check_reach(channels.GatedChannels(context.network, [group for group, _ in self._pairs(context)]))

    def state_dict(self) -> dict[str, Any]:
        if self.gates is None:  # after the training
            return {"figures": dict(self.figures)}
        return {
            "gates": self.gates.state_dict(),
            "raw": dict(self.norms.raw),
            "multiplier": self.multiplier,
            "settled": self.settled,
            "figures": dict(self.figures),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state; all but the figures only where gates are trained."""
        self.figures = dict(state["figures"])
        if self.gates is None:
            return
        self.gates.load_state_dict(state["gates"])
        restore(self.norms.raw, state["raw"])
        self.multiplier.copy_(state["multiplier"])
        self.settled = state["settled"]
        if self.settled:
            self.norms.remove_hooks()


def _finite(model: nn.Module, gradient: Tensor) -> bool:
    """Return whether all gradients are finite; otherwise the loss scaler skips the step."""
    others = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return bool(torch.stack([torch.isfinite(tensor).all() for tensor in (gradient, *others)]).all())
