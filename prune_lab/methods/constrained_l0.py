"""Constrained L0: hard-concrete gates, and multipliers that rise until an expected density is met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from prune_lab.core.card import Card
from prune_lab.families.gated_weights import LOWEST, GatedWeights, GatesConfig
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import OpenFraction, Positive, Range
from prune_lab.pruning.channels import selection
from prune_lab.pruning.gates import hard_concrete, multipliers
from prune_lab.pruning.gates.layout import FilterGates
from prune_lab.pruning.masks import distributions, top_k

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.core.context import Context


TOLERANCE = 0.01
"""excess over a target, as a fraction of the dense cost, up to which it counts as met"""


@dataclass(frozen=True)
class ConstrainedL0Config(GatesConfig):
    sparsity: OpenFraction | None
    """expected fraction of closed weights among the gated ones; null: only `macs_ratio` counts"""
    constrain: Literal["model", "layer"]
    """scope of the target `sparsity`: all gated layers together, or each of them"""
    layer_sparsities: list[Annotated[float, Range(0, 1, open_high=True)]]
    """layer: a target per gated layer, in order, instead of `sparsity` for each; []: none"""
    macs_ratio: OpenFraction | None
    """target of the expected MACs as a fraction of the dense network's, in addition to or instead of `sparsity`"""
    dual_lr: Positive | None
    """learning rate of the multipliers; None: see `multipliers.dual_rate`"""
    dual_restart: bool
    """whether a multiplier is set to 0 when its target is met (strictly)"""
    rounding: Literal["auto", "gates", "exact"]
    """at the end, gates: the open deterministic gates; exact: the budget, by the rank of the gates: weight: `sparsity`,
    filter: `macs_ratio`; auto: exact where that is the only target, else gates"""

    GOALS = ("sparsity", "macs_ratio")

    @property
    def exact(self) -> bool:
        """Whether the final gates are rounded to the budget."""
        if self.rounding != "auto":
            return self.rounding == "exact"
        if self.granularity == "filter":
            return self.sparsity is None
        return self.macs_ratio is None and self.constrain == "model" and self.sparsity is not None

    @classmethod
    def absent(cls, option: str) -> str | None:
        if option != "penalty":
            return None
        return "the price of open gates is found by the multipliers; method=l0 takes one"

    def check(self, path: str) -> None:
        super().check(path)
        if self.sparsity is None and self.macs_ratio is None:
            raise UserError(f"{path}.sparsity and {path}.macs_ratio are both null; give at least one target")
        if self.layer_sparsities and self.constrain != "layer":
            raise UserError(f"{path}.layer_sparsities goes with {path}.constrain=layer, got {self.constrain}")
        if self.sparsity is None and self.constrain == "layer":
            raise UserError(f"{path}.constrain=layer needs {path}.sparsity, got null")
        if self.rounding == "exact":
            self._check_exact(path)
        self._check_floor(path)

    def _check_exact(self, path: str) -> None:
        sparsity = "null" if self.sparsity is None else f"{self.sparsity:g}"
        if self.granularity == "weight" and (self.sparsity is None or self.constrain != "model"):
            raise UserError(
                f"{path}.rounding=exact with {path}.granularity=weight needs {path}.sparsity and "
                f"{path}.constrain=model, got {sparsity} and {self.constrain}"
            )
        if self.granularity == "filter" and (self.macs_ratio is None or self.sparsity is not None):
            macs = "null" if self.macs_ratio is None else f"{self.macs_ratio:g}"
            raise UserError(
                f"{path}.rounding=exact with {path}.granularity=filter meets {path}.macs_ratio alone: set it, and "
                f"{path}.sparsity=null; got {macs} and {sparsity}"
            )

    def _check_floor(self, path: str) -> None:
        targets = {f"{path}.sparsity": self.sparsity or 0.0}
        targets |= {f"{path}.layer_sparsities[{index}]": value for index, value in enumerate(self.layer_sparsities)}
        for option, value in targets.items():
            if self.clamp_gates and 1 - value < LOWEST:
                raise UserError(
                    f"{option}={value:g}: clamped gates are open with a probability of {LOWEST} at least; a target "
                    f"above {1 - LOWEST:.5g} needs {path}.clamp_gates=false"
                )


class ConstrainedL0(GatedWeights):
    Config = ConstrainedL0Config
    rule = "median"
    card = Card(
        summary="random gates on weights or channels learn to shut until the network, or each layer, has its density",
        paper="Gallego-Posada, Ramirez, Erraqabi, Bengio, Lacoste-Julien 2022, Controlled Sparsity via Constrained "
        "Optimization, arXiv 2208.04425",
        acts="during training, in every step; filter: closed channels are then removed",
        eligible="weight: weights of convolutions and linear layers, depthwise ones only if included; filter: channels "
        "that no addition or concatenation ties to others. The target counts gated layers only",
        cost="a second copy of the weights, with granularity=weight three more tensors of their size, a few passes "
        "over them per step; training is computed dense",
        differences="the official code clamps gates on one device only, here method.clamp_gates decides; it gates the "
        "filters of a bottleneck's third convolution, too, which stay here, and never the stem, which is gated here "
        "where no addition ties it (exclude it by its name); the target of MACs, rounding=exact (the default where it "
        "can be), measuring batch norm (bn_images) and Adam for the gates are this program's; biases have no gates",
    )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.multipliers: Tensor | None = None
        self.targets: Tensor | None = None
        self.violations: Tensor | None = None
        self.rates: Tensor | None = None
        self.names: list[str] = []
        self.costs: list[Tensor] = []

    def requested_sparsity(self) -> float | None:
        """Return the target if it covers the weights that `sparsity` counts, those of all gated layers."""
        config = self.config
        comparable = config.granularity == "weight" and not config.layer_sparsities
        return config.sparsity if comparable else None

    def asked(self) -> dict[str, float]:
        config = self.config
        unit = "sparsity" if config.granularity == "weight" else "gated_sparsity"
        sparsity = None if config.layer_sparsities else config.sparsity
        return {name: value for name, value in ((unit, sparsity), ("macs", config.macs_ratio)) if value is not None}

    def budget_is_exact(self) -> bool:
        return self.config.exact

    def setup(self, context: Context) -> None:
        """Set up gates, targets and multipliers.

        Raises:
            UserError: `layer_sparsities` of the wrong length, or MACs that gates cannot reach.
        """
        super().setup(context)
        if self.log_alpha is None:
            return
        config, groups = self.config, self.layout_of.groups
        if config.layer_sparsities and len(config.layer_sparsities) != len(groups):
            raise UserError(
                f"method.layer_sparsities has {len(config.layer_sparsities)} targets for {len(groups)} gated layers: "
                f"{', '.join(group.name for group in groups)}"
            )
        wanted: dict[str, float] = {}
        if config.constrain == "layer":
            each = config.layer_sparsities or [config.sparsity] * len(groups)
            wanted = {group.name: 1 - sparsity for group, sparsity in zip(groups, each, strict=True)}
        elif config.sparsity is not None:
            wanted["density"] = 1 - config.sparsity
        self.costs = self._cost_matrices(context)
        if config.macs_ratio is not None:
            wanted["MACs"] = config.macs_ratio
        self.names, self.targets = list(wanted), torch.tensor(list(wanted.values()), device=context.device)
        self.multipliers = torch.zeros_like(self.targets)
        self.rates = torch.tensor(self._rates(context.total_steps), device=context.device)
        self._check_reach()
        if config.exact and isinstance(self.layout_of, FilterGates):
            self._best_channels(context, self.layout_of)
        self._report_start(context)

    def _rates(self, num_steps: int) -> list[float]:
        """Return the learning rate of each multiplier."""
        if self.config.dual_lr is not None:
            return [self.config.dual_lr] * len(self.names)
        sizes = {group.name: group.size for group in self.layout_of.groups}
        return [multipliers.dual_rate(sizes.get(name, self.layout_of.num_gates), num_steps) for name in self.names]

    def _cost_matrices(self, context: Context) -> list[Tensor]:
        """Return the cost matrices with a target for the whole network."""
        config, terms = self.config, []
        if config.constrain == "model" and config.sparsity is not None:
            terms.append(self.layout_of.weight_terms())
        if config.macs_ratio is not None:
            terms.append(self.layout_of.macs_terms(context.costs))
        num_groups = len(self.layout_of.groups)
        return [hard_concrete.cost_matrix(part, num_groups).to(context.device) for part in terms]

    def _check_reach(self) -> None:
        """Reject a target of MACs that is exceeded even with all gates as closed as possible."""
        lowest = LOWEST if self.config.clamp_gates else 0.0
        values, _ = self._constrained(torch.full((len(self.layout_of.groups),), lowest, device=self.targets.device))
        if self.config.macs_ratio is not None and float(values[-1]) > self.config.macs_ratio:
            raise UserError(
                f"method.macs_ratio={self.config.macs_ratio:g} is out of reach: {float(values[-1]):.4g} of the MACs "
                "are in layers without gates or behind gates that cannot shut further"
            )

    def _report_start(self, context: Context) -> None:
        values, _ = self._constrained(self.open_fractions())
        rows = zip(self.names, values.tolist(), self.targets.tolist(), strict=True)
        shown = ", ".join(f"{name} {value:.4g} (target {target:.4g})" for name, value, target in rows)
        num_met = int((values <= self.targets).sum())
        note = f"; {num_met} of {len(values)} targets are met before training" if num_met else ""
        context.report(
            f"gates: {self.layout_of.num_gates} on {len(self.layout_of.groups)} layers; expected at the start: "
            f"{shown}{note}"
        )

    def _constrained(self, fractions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the constrained quantities [constraints] and their derivatives [constraints, groups].

        Args:
            fractions: expected open fraction of each group's gates [groups].
        """
        pairs = [hard_concrete.expected_cost(fractions, matrix) for matrix in self.costs]
        values, rows = [value[None] for value, _ in pairs], [gradient[None] for _, gradient in pairs]
        if self.config.constrain == "layer":
            values, rows = [fractions, *values], [torch.eye(len(fractions), device=fractions.device), *rows]
        return torch.cat(values), torch.cat(rows)

    def price(self, context: Context, probability: Tensor) -> Tensor:
        """Return the derivative of sum lambda (value - target) with respect to each P(open); record the violations."""
        values, derivatives = self._constrained(self.layout_of.fractions(probability))
        self.violations = values - self.targets
        return self.layout_of.spread(self.multipliers @ derivatives)

    def move_gates(self) -> None:
        """Update gates and multipliers simultaneously, both from the densities of the step."""
        super().move_gates()
        restart = self.config.dual_restart
        self.multipliers = multipliers.ascend(self.multipliers, self.violations, lr=self.rates, restart=restart)

    def end_epoch(self, context: Context, epoch: int) -> dict[str, float]:
        """Return also the constraint violations.

        l0/violation: the largest excess over a target; l0/feasible: 1 if it is at most 0.01; l0/multiplier,
        l0/multiplier_max: mean and largest multiplier; l0/expected_macs: with a target of MACs, as a fraction.
        """
        record = super().end_epoch(context, epoch)
        values, _ = self._constrained(self.open_fractions())
        violation = float((values - self.targets).max())
        self.figures |= {
            "l0/violation": violation,
            "l0/feasible": float(violation <= TOLERANCE),
            "l0/multiplier": float(self.multipliers.mean()),
            "l0/multiplier_max": float(self.multipliers.max()),
        }
        if self.config.macs_ratio is not None:
            self.figures["l0/expected_macs"] = float(values[-1])
        if violation > TOLERANCE and (epoch + 1) * context.steps_per_epoch >= context.last_step:
            context.report(
                f"the target is missed by {violation:.4g} (l0/violation); raise method.dual_lr or method.gate_lr, or "
                "train longer"
            )
        return record | self.figures

    def settle(self, context: Context) -> None:
        """Keep exactly the budget, by the highest gates, if the options demand it."""
        if not self.config.exact:
            super().settle(context)
        elif isinstance(self.layout_of, FilterGates):
            self.leave(context, self._best_channels(context, self.layout_of))
        else:
            num_keep = distributions.num_keep_total(self.layout_of.num_gates, self.config.sparsity)
            self.leave(context, top_k.keep_top(self.log_alpha, num_keep))

    def _best_channels(self, context: Context, layout: FilterGates) -> Tensor:
        """Return the channels with the highest gates within the budget of MACs, bool [num_gates].

        Raises:
            UserError: it is out of reach.
        """
        budget = selection.Budget("macs", self.config.macs_ratio)
        return layout.removable(context.network).best_within(self.log_alpha.detach(), budget)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state if self.multipliers is None else state | {"multipliers": self.multipliers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.multipliers is not None:
            self.multipliers.copy_(state["multipliers"])
