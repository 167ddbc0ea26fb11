"""GDP: gates before convolutions that training drives to exactly 0 or far from it, under a cost target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from prune_lab.accounting import eligibility
from prune_lab.core import removal
from prune_lab.core.card import Card
from prune_lab.core.method import Method, MethodConfig
from prune_lab.core.phase import REMOVE, TRAIN, TRAIN_DENSE, Phase
from prune_lab.families.annealed_gradient import restore
from prune_lab.foundations import distributed
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import OpenFraction, Positive, Range
from prune_lab.pruning.gates import budget, multipliers, polarized

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prune_lab.accounting.eligibility import Layer
    from prune_lab.config.run import RunConfig
    from prune_lab.core.context import Context
    from prune_lab.core.removal import TrialCut
    from prune_lab.pruning.channels.costs import Unit
    from prune_lab.pruning.gates.budget import GateBudget


_RATIOS: dict[str, Unit] = {"macs_ratio": "macs", "params_ratio": "params", "channels_ratio": "channels"}
"""option -> unit of its target"""

_GATES = Phase("gates", None, "finetune", active=True)

TOLERANCE = 0.01
"""excess over the target, as a fraction of the dense cost, up to which it counts as met"""


@dataclass(frozen=True)
class GDPConfig(MethodConfig):
    macs_ratio: OpenFraction | None
    """kept fraction of the network's MACs"""
    params_ratio: OpenFraction | None
    """kept fraction of the network's parameters"""
    channels_ratio: OpenFraction | None
    """kept fraction of the channels that could be removed"""
    start: Literal["scratch", "dense"]
    """scratch: gates from the first step, over the schedule's train block; dense: train first, then add gates and
    continue over the finetune block"""
    eps_start: Positive
    """eps of t^2 / (t^2 + eps) at the start"""
    eps_end: Positive
    """eps when t is fixed; geometric interpolation in between"""
    t_init: Positive
    """t of all gates at the start"""
    gate_lr: Positive | None
    """constant learning rate of t; None: see `gate_rate`"""
    dual_lr: Positive | None
    """learning rate of the multiplier; None: see `dual_rate`"""
    dual_restart: bool
    """whether the multiplier is set to 0 when the target is met (strictly)"""
    freeze_fraction: Annotated[float, Range(0, 1, open_high=True)]
    """final fraction of the steps, in which t is fixed"""
    rounding: Literal["exact", "gates"]
    """when t is fixed, exact: the highest |t| stay open, as many as the target allows; gates: those with t != 0"""
    gate_linear: bool
    """whether linear layers have gates; if not, the channels that they read are kept"""
    residual: bool
    """whether channels that are added to others have gates"""
    exclude: list[str]
    """patterns of layers whose output channels have no gates"""

    def check(self, path: str) -> None:
        given = [f"{path}.{name}={value:g}" for name in _RATIOS if (value := getattr(self, name)) is not None]
        if len(given) != 1:
            names = ", ".join(f"{path}.{name}" for name in _RATIOS)
            raise UserError(
                f"exactly one of {names} must be set, the others null; got {' and '.join(given) or 'none'}"
            )
        if self.eps_end > self.eps_start:
            raise UserError(
                f"{path}.eps_end={self.eps_end:g} must not exceed {path}.eps_start={self.eps_start:g}: gates sharpen"
            )

    GOALS = tuple(_RATIOS)

    @property
    def unit(self) -> Unit:
        """Unit of the target."""
        return next(unit for name, unit in _RATIOS.items() if getattr(self, name) is not None)

    @property
    def ratio(self) -> float:
        return getattr(self, f"{self.unit}_ratio")


def gate_rate(num_steps: int) -> float:
    """Return the learning rate of t if none is given: 2000 / steps, but at least 0.01 and at most 2.

    At t = 1 the slope of a gate is about 0.2, and the gradients dL/dg of batches have means of about 0.0005 (ResNet-20
    on CIFAR-10). So the loss moves t by some tenths, regardless of the length of training. With much smaller rates the
    price alone decides which gates close. The rule is this program's.
    """
    return min(max(2000 / max(num_steps, 1), 0.01), 2.0)


def dual_rate(price: float, excess: float, num_steps: int, gate_lr: float) -> float:
    """Return the learning rate of the multiplier if none is given: 18 / (gate_lr x price x excess x steps^2).

    With it the price alone moves t from 1 to 0 in a third of the steps, if the target is missed by as much as at the
    start. The loss holds gates open for longer. The rule is this program's.

    Args:
        price: mean initial cost of a gate, as a fraction of the dense network.
        excess: amount by which the dense network exceeds the target, as the same fraction.
    """
    return 18 / (gate_lr * price * excess * max(num_steps, 1) ** 2)


class GDP(Method):
    """Keeps the raw weights, which the optimizer updates; the network holds them times the gates of their columns."""

    needs_images = "it removes channels of convolutions"
    Config = GDPConfig
    card = Card(
        summary="reconstruction: gates before convolutions learn to be 0 or far from it until the target is met",
        paper="Guo, Yuan, Tan, Wang, Yang, Liu 2021, GDP: Stabilized Neural Network Pruning via Gates with "
        "Differentiable Polarization, arXiv 2109.02220",
        acts="during training, in every step, until t is fixed (freeze_fraction); then the closed channels are removed",
        eligible="channels that regular convolutions (and linear layers) read; channels that an addition ties, or that "
        "pass a depthwise convolution, share one gate",
        cost="a second copy of the weights and a few passes over them per step; training is computed dense until t is "
        "fixed, nothing is left at inference",
        differences="only the abstract and a third-party summary of the paper's figure of the gates could be read; "
        "there is no official code. From them: gates before regular convolutions and never before depthwise ones, "
        "shared where skip connections tie tensors, a bilinear cost. Reconstructed: the gate t^2 / (t^2 + eps) with "
        "falling eps, the proximal step of t, all rates, the multiplier that rises until the target is met, fixing t, "
        "rounding. Whole blocks may vanish in the paper, here every layer keeps at least one channel",
    )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.raw: dict[str, Tensor] = {}
        self.t: Tensor | None = None
        self.overflow = False
        self.figures: dict[str, float] = {}

    def chain(self) -> tuple[Phase, ...]:
        return (TRAIN, REMOVE) if self.config.start == "scratch" else (TRAIN_DENSE, _GATES, REMOVE)

    def check_run(self, config: RunConfig) -> None:
        """Reject schedules without steps for the gates, and an untrained network where a trained one is required."""
        block = "train" if self.config.start == "scratch" else "finetune"
        if config.schedule.phase(block).epochs == 0:
            raise UserError(
                f"schedule.{block}.epochs=0 does not go with method.start={self.config.start}: gates are trained there",
                f"schedule.{block}.epochs",
            )
        if self.config.start == "dense":
            config.require_trained("method.start=dense")

    def asked(self) -> dict[str, float]:
        return {self.config.unit: self.config.ratio}

    def layers(self, model: nn.Module) -> list[Layer]:
        """Return all layers, including depthwise ones: their filters are removed with the channel."""
        return eligibility.select_layers(model, include=["*"])

    def trains_pruned(self) -> bool:
        return True

    # Set-up

    def setup(self, context: Context) -> None:
        """Create gates, raw weights and the cost.

        Raises:
            UserError: no channels to gate, a pattern without a match, an unreachable target, no step for the gates.
        """
        if context.schedule is None:
            return
        config, named = self.config, context.parameters()
        self.problem, device = self._problem(context), context.device
        problem = self.problem
        self.columns = polarized.ColumnGates(context.model, problem.map, problem.free)
        self.gated, self.lane_of = problem.free.to(device), problem.lane_of.to(device)
        self.lanes = polarized.members(problem.lane_of, len(problem.map.lanes)).to(device)
        self.matrix = problem.matrix.float().to(device)
        self.t = torch.full((len(self.gated),), config.t_init, device=device)
        self.last_open = torch.zeros_like(self.t)
        self.multiplier = torch.zeros((), device=device)
        self.last_gate_step = round((1 - config.freeze_fraction) * context.total_steps)
        if not self.last_gate_step:
            raise UserError(f"method.freeze_fraction={config.freeze_fraction:g} leaves no step for the gates: there "
                              f"are {context.total_steps}")
        self.gate_lr = config.gate_lr or gate_rate(context.total_steps)
        price = float(problem.prices().mean())
        self.dual_lr = config.dual_lr or dual_rate(price, 1 - config.ratio, context.total_steps, self.gate_lr)
        self.raw = {path: named[path].detach().clone() for path in self.columns.parameters}
        # Divided by the gates, so that the network starts unchanged.
        torch._foreach_div_(list(self.raw.values()), self.columns.factors(self.gates(0)))
        context.report(
            f"gates: {problem.num_gates} on {sum(problem.lane_is_free)} groups of channels; t is fixed from step "
            f"{self.last_gate_step} of {context.total_steps} on; rates: gates {self.gate_lr:.3g}, multiplier "
            f"{self.dual_lr:.3g}"
        )

    def trial_cut(self, context: Context) -> TrialCut:
        """Return half of the channels that have gates."""
        problem = self._problem(context)
        return removal.half(problem.map, problem.lane_is_free)

    def _problem(self, context: Context) -> GateBudget:
        config = self.config
        return budget.GateBudget(
            context.network, config.unit, config.ratio, linear=config.gate_linear, residual=config.residual,
            exclude=config.exclude,
        )

    def gates(self, step: int) -> Tensor:
        """Return the gates of a step per class of channels, 1 for a class without gate [num_classes]."""
        return torch.where(self.gated, polarized.gate(self.t, self.eps(step)), 1.0)

    def eps(self, step: int) -> float:
        config = self.config
        return polarized.eps_at(
            step, start=config.eps_start, end=config.eps_end, num_steps=self.last_gate_step
        )

    def write(self, context: Context, gates: Tensor) -> None:
        """Write the raw weights times the gates into the model."""
        named = context.parameters()
        for (path, raw), factor in zip(self.raw.items(), self.columns.factors(gates), strict=True):
            torch.mul(raw, factor, out=named[path].detach())

    def after_backward(self, context: Context, step: int) -> bool:
        """Convert dL/d(w g) into dL/dw and dL/dt, and give the raw weights to the optimizer."""
        named = context.parameters()
        self.overflow = context.amp_scaled and not _finite(context.model)
        gradients = {path: _gradient(named[path]) for path in self.raw}
        if step < self.last_gate_step:
            by_gates = self.columns.gradient(gradients, self.raw)
            self.gradient = by_gates * polarized.slope(self.t, self.eps(step)) * self.gated
        torch._foreach_mul_(list(gradients.values()), self.columns.factors(self.gates(step)))
        torch._foreach_copy_([named[path].detach() for path in self.raw], list(self.raw.values()))
        return True

    def after_step(self, context: Context, step: int) -> None:
        """Read the raw weights back and update the gates; a step that fp16 skipped updates neither."""
        if not self.overflow:
            named = context.parameters()
            torch._foreach_copy_(list(self.raw.values()), [named[path].detach() for path in self.raw])
            if step < self.last_gate_step:
                self.move_gates(step)
        if step + 1 == self.last_gate_step:
            self.settle(context, step + 1)
        self.write(context, self.gates(step + 1))

    def smooth_cost(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the cost, a fraction of the dense one, and that of one more channel per lane, by the gates' sums."""
        return polarized.cost(polarized.sums(self.gates(step), self.lanes), self.matrix)

    def open_cost(self) -> Tensor:
        """Return the cost, a fraction of the dense one, by the number of gates that are not 0."""
        return polarized.cost(polarized.sums((self.t != 0).float(), self.lanes), self.matrix)[0]

    def move_gates(self, step: int) -> None:
        """Update gates and multiplier simultaneously, both from the cost of the step.

        The multiplier rises until enough gates are 0. Their sums would meet the target earlier, with many gates between
        0 and 1 that reopen as eps falls.
        """
        excess = self.open_cost() - self.config.ratio
        price = self.multiplier * self.smooth_cost(step)[1][self.lane_of] * self.gated
        moved = polarized.proximal_step(self.t, self.gradient, price, self.gate_lr)
        self.t = polarized.keep_best(moved, self.t, self.lanes)
        self.last_open.masked_fill_(self.t != 0, step + 1)
        self.multiplier = multipliers.ascend(
            self.multiplier, excess, lr=self.dual_lr, restart=self.config.dual_restart
        )

    def settle(self, context: Context, step: int) -> None:
        """Decide which channels stay, close the gates of the others permanently and mask the dependent weights."""
        problem, opened = self.problem, (self.t != 0).cpu()
        alive = opened if self.config.rounding == "gates" else problem.largest(self._ranking(step))
        means = polarized.sums(self.t.abs(), self.lanes) / polarized.sums((self.t != 0).float(), self.lanes)
        chosen = alive.to(self.t.device)
        # A reopened gate gets the mean |t| of its lane.
        self.t = torch.where(chosen, torch.where(self.t == 0, means[self.lane_of], self.t), 0.0)
        masks = problem.map.weight_masks(alive, context.model)
        masks = {name: mask.to(context.device) for name, mask in masks.items() if not bool(mask.all())}
        if masks:
            context.install_masks(masks)
        self._report(context, alive, opened)

    def _ranking(self, step: int) -> Tensor:
        """Return float64 [classes]: |t| of open gates, below 0 for closed ones, which rank by closing time."""
        ranking = torch.where(self.t != 0, self.t.abs(), self.last_open / step - 2)
        return ranking.cpu().double()

    def _report(self, context: Context, alive: Tensor, opened: Tensor) -> None:
        kept = self.problem.kept(alive)
        words = f"{self.problem.budget.option}: t is fixed with {kept:.4%} of the {budget.WORDS[self.config.unit]}"
        if self.config.rounding == "exact":
            words += (f"; of {self.problem.num_gates} gates {int((~opened).sum())} were closed, rounding closed "
                      f"{int((opened & ~alive).sum())} more and opened {int((alive & ~opened).sum())}")
        elif kept - self.config.ratio > TOLERANCE:
            words += "; the target is missed: raise method.gate_lr or method.dual_lr, or train longer"
        context.report(words)

    def end_epoch(self, context: Context, epoch: int) -> dict[str, float]:
        """Return the state of gates and cost, a fraction of the dense network's; UNIT is the target's unit.

        gdp/open_gates: gates that are not 0, among all; gdp/undecided: gates between 0.1 and 0.9; gdp/expected_UNIT:
        the cost by the sums of the gates; gdp/UNIT: by the number of open ones; gdp/feasible: 1 if that is at most
        0.01 above the target; gdp/multiplier; gdp/eps; channels/kept: fraction of channels whose gates are not 0.
        """
        if distributed.world_size() > 1:
            distributed.assert_same(str(self.t.tolist()), "gates")
        step = (epoch + 1) * context.steps_per_epoch
        gates = self.gates(step)[self.gated].cpu()
        expected, _ = self.smooth_cost(step)
        kept = self.problem.kept((self.t != 0).cpu())
        self.figures = {
            "gdp/open_gates": float((gates > 0).double().mean()),
            "gdp/undecided": float(((gates > 0.1) & (gates < 0.9)).double().mean()),
            f"gdp/expected_{self.config.unit}": float(expected),
            f"gdp/{self.config.unit}": kept,
            "gdp/feasible": float(kept - self.config.ratio <= TOLERANCE),
            "gdp/multiplier": float(self.multiplier),
            "gdp/eps": self.eps(step),
        }
        return self.figures | {"channels/kept": float((self.t != 0).double().mean())}

    def explain(self) -> dict[str, float]:
        return self.figures

    def layout(self, context: Context) -> None:
        """Reject an unreachable target; which gates close is learned."""
        if context.widths is None:
            self._problem(context)

    def state_dict(self) -> dict[str, Any]:
        if self.t is None:
            return {}
        names = ("t", "last_open", "multiplier")
        return {"raw": dict(self.raw), "figures": dict(self.figures)} | {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state where gates are trained; the removal needs none of it."""
        if self.t is None or not state:
            return
        restore(self.raw, state["raw"])
        self.figures = dict(state["figures"])
        for name in ("t", "last_open", "multiplier"):
            getattr(self, name).copy_(state[name])


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _finite(model: nn.Module) -> bool:
    """Return whether all gradients are finite; otherwise the loss scaler skips the step."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return bool(torch.stack([torch.isfinite(gradient).all() for gradient in gradients]).all())
