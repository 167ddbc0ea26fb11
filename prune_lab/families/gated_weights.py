"""Methods that multiply weights by hard-concrete gates, redrawn in each step and trained with the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from prune_lab.accounting import eligibility
from prune_lab.core import removal
from prune_lab.core.method import Method, MethodConfig
from prune_lab.core.phase import REMOVE, TRAIN, Phase
from prune_lab.families.annealed_gradient import restore
from prune_lab.foundations import distributed, seeding
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import Index, OpenFraction, Positive
from prune_lab.pruning.batch_norm import statistics
from prune_lab.pruning.gates import hard_concrete
from prune_lab.pruning.gates.layout import FilterGates, WeightGates

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prune_lab.accounting.eligibility import Layer
    from prune_lab.config.run import RunConfig
    from prune_lab.core.context import Context


_BATCH = 128
"""images per forward pass when batch norm measures its statistics"""

LOWEST = 0.04713
"""P(open) of a gate that the clamp holds at -log 100"""


@dataclass(frozen=True)
class GatesConfig(MethodConfig):
    granularity: Literal["weight", "filter"]
    """one gate per weight, or one per hidden channel; channels closed at the end are removed"""
    drop_rate: OpenFraction
    """rho: gates start at a = log((1 - rho) / rho) with a standard deviation of 0.01"""
    rescale: bool
    """whether gated weights are divided by 1 - rho at the start"""
    gate_optimizer: Literal["adam", "sgd"]
    """optimizer of the gates; sgd has momentum 0.9"""
    gate_lr: Positive | None
    """learning rate of the gates, which no schedule changes; None: see `gate_rate`"""
    clamp_gates: bool
    """whether a is clamped to +-log 100 after each step"""
    decay_moves_gates: bool
    """whether the weight decay 0.5 wd P(open) |w|^2 also pushes gates shut"""
    bn_images: Index
    """training images on which batch norm measures its statistics with the deterministic gates, after each epoch;
    0: statistics accumulated with drawn gates, as published"""
    include: list[str]
    """weight: layer patterns to gate although they are dense by default (depthwise convolutions)"""
    exclude: list[str]
    """layer patterns without gates"""

    def check(self, path: str) -> None:
        if self.include and self.granularity == "filter":
            raise UserError(
                f"{path}.include={','.join(self.include)} goes with {path}.granularity=weight: with filter a depthwise "
                "convolution follows the channels it gets"
            )
        if self.bn_images == 1:
            raise UserError(f"{path}.bn_images=1: one image has no variance; allowed: 0 (off), or 2 and more")


def gate_rate(optimizer: str, num_steps: int) -> float:
    """Return the learning rate of the gates if none is given.

    sgd: 6, published for the filters of a WRN-28-10. adam: 20 / steps, but at least 0.001 (Li, Ji 2021, arXiv
    2107.00070) and at most 0.1. Adam's steps are about as long as its rate. So in a short training a gate can still
    cross [-log 100, log 100] twice, and in a long one gates remain stable.
    """
    return 6.0 if optimizer == "sgd" else min(max(20 / max(num_steps, 1), 1e-3), 0.1)


class GatedWeights(Method):
    """Keeps the raw weights, which the optimizer updates; the network holds them times the gates.

    In a step these are the gates drawn for it, between steps the deterministic gates (`rule`). So evaluation, moving
    average, saved network and costs see real zeros. Subclasses define the cost of open gates in `price`.
    """

    needs_images = "its gates are those of convolutions and linear layers"
    rule: Literal["louizos", "median"]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.raw: dict[str, Tensor] = {}
        self.log_alpha: Tensor | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.figures: dict[str, float] = {}
        self.layout_of: WeightGates | None = None
        self.optimizer_group: dict[str, int] = {}
        self.drawn: Tensor | None = None
        self.probability: Tensor | None = None
        self.overflow = False

    def chain(self) -> tuple[Phase, ...]:
        return (TRAIN, REMOVE) if self.config.granularity == "filter" else (TRAIN,)

    def check_run(self, config: RunConfig) -> None:
        """Reject training without steps, and averaged weights, whose batch norm cannot be measured here."""
        config.require_training(f"method={self.config.name}: the gates are trained there")
        if self.config.bn_images and config.trainer.ema_decay is not None:
            raise UserError(
                f"trainer.ema_decay={config.trainer.ema_decay:g} needs method.bn_images=0: batch norm is measured on "
                "the network itself, not on its moving average",
                "trainer.ema_decay",
            )

    def layers(self, model: nn.Module) -> list[Layer]:
        """Return the layers; filters of depthwise convolutions are removed with their channel."""
        include = ["*"] if self.config.granularity == "filter" else self.config.include
        return eligibility.select_layers(model, include=include, exclude=self.config.exclude)

    def price(self, context: Context, probability: Tensor) -> Tensor:
        """Return the derivative [gates] of the added loss term with respect to each gate's P(open)."""
        raise TypeError(f"{type(self).__name__} does not say what an open gate costs")

    def forward_macs(self, context: Context) -> int:
        """Return the MACs of the dense network: drawn zeros save nothing."""
        return context.dense_macs

    def trains_pruned(self) -> bool:
        return True

    def setup(self, context: Context) -> None:
        """Create gates and raw weights; phases after the training need none.

        Raises:
            UserError: a network without channels to gate.
        """
        if context.optimizer is None:
            return
        config, named = self.config, context.parameters()
        kind = FilterGates if config.granularity == "filter" else WeightGates
        self.layout_of = kind(context.network)
        spread = torch.randn(self.layout_of.num_gates, generator=context.generator("gates at the start"))
        start = (spread * 0.01 + hard_concrete.start(config.drop_rate)).to(context.device)
        self.log_alpha = torch.nn.Parameter(start)
        rate = config.gate_lr or gate_rate(config.gate_optimizer, context.total_steps)
        if config.gate_optimizer == "sgd":
            self.optimizer = torch.optim.SGD([self.log_alpha], lr=rate, momentum=0.9)
        else:
            self.optimizer = torch.optim.Adam([self.log_alpha], lr=rate)
        self.raw = {path: named[path].detach().clone() for path in self.layout_of.parameters}
        if config.rescale:
            for group in self.layout_of.groups:
                self.raw[group.parameter].div_(1 - config.drop_rate)
        self.optimizer_group = _optimizer_groups(context, [group.parameter for group in self.layout_of.groups])
        weights = 0.0 if context.schedule is None else context.schedule.lr
        if config.gate_optimizer == "sgd" and rate <= weights:
            context.report(
                f"method.gate_lr={rate:g} does not exceed the weights' learning rate {weights:g}: the gates will "
                "hardly move; 6 is published"
            )
        context.install_masks(self.project(context))

    def project(self, context: Context) -> dict[str, Tensor]:
        """Write the weights times the deterministic gates into the model and return the masks."""
        gates = hard_concrete.fixed_gate(self.log_alpha.detach(), self.rule)
        self.write(context, gates)
        return self.layout_of.masks(context.model, gates)

    def write(self, context: Context, gates: Tensor) -> None:
        """Write the raw weights times `gates` into the model."""
        named, factors = context.parameters(), self.layout_of.factors(gates)
        products = torch._foreach_mul([self.raw[path] for path in factors], list(factors.values()))
        torch._foreach_copy_([named[path].detach() for path in factors], products)

    def before_forward(self, context: Context, step: int) -> None:
        """Draw the gates of the step, the same on every process."""
        source = seeding.generator(context.seed, context.phase, "gates", step, device=context.device)
        logistic = hard_concrete.noise(self.layout_of.num_gates, source)
        self.drawn = hard_concrete.sample(self.log_alpha.detach(), logistic)
        self.write(context, self.drawn)
        self.layout_of.save_statistics()

    def after_backward(self, context: Context, step: int) -> bool:
        """Convert dL/d(w z) into dL/dw and dL/da, and give the raw weights to the optimizer."""
        named = context.parameters()
        self.layout_of.restore_statistics(self.drawn)
        self.overflow = context.amp_scaled and not _finite(context.model)
        gradients = {path: _gradient(named[path]) for path in self.raw}
        self.probability = hard_concrete.open_probability(self.log_alpha.detach())
        by_gates = self.layout_of.gate_gradient(gradients, self.raw, self.drawn)
        price = self.price(context, self.probability) + self._decay_price(context)
        steepness = self.probability * (1 - self.probability)
        self.log_alpha.grad = hard_concrete.slope(self.drawn) * by_gates + steepness * price
        for path, factor in self.layout_of.factors(self.drawn).items():
            gradients[path].mul_(factor)
        self._correct_decay(context, gradients, decoupled=False)
        torch._foreach_copy_([named[path].detach() for path in self.raw], list(self.raw.values()))
        return True

    def _decay_price(self, context: Context) -> Tensor | float:
        """Return the derivative of 0.5 wd P |w|^2 with respect to P, per gate."""
        if not self.config.decay_moves_gates:
            return 0.0
        decays = [group["weight_decay"] for _, group in self._decayed(context)]
        squares = self.layout_of.squares(self.raw)
        return torch.cat([0.5 * decay * square for decay, square in zip(decays, squares, strict=True)])

    def _decayed(self, context: Context) -> list[tuple[str, dict[str, Any]]]:
        """Return each gated parameter's path with the optimizer's options for it."""
        groups = context.optimizer.param_groups  # new objects after a resume
        return [(path, groups[index]) for path, index in self.optimizer_group.items()]

    def _correct_decay(self, context: Context, targets: dict[str, Tensor], *, decoupled: bool) -> None:
        """Change the optimizer's weight decay of gated weights from wd w to wd P(open) w.

        Args:
            targets: gradients, if the optimizer adds wd w to them; the weights after its step, if it shrinks them by
                lr wd separately from the gradient (AdamW).

        Source: Louizos et al. 2018, section 2.3: the L2 norm counts open weights.
        """
        shut = self.layout_of.parts(self.probability - 1)
        for (path, group), part in zip(self._decayed(context), shut, strict=True):
            if group["weight_decay"] and bool(group.get("decoupled_weight_decay")) == decoupled:
                factor = -group["lr"] * group["weight_decay"] if decoupled else group["weight_decay"]
                targets[path].addcmul_(self.raw[path], part, value=factor)

    def after_step(self, context: Context, step: int) -> None:
        """Read the raw weights back and update the gates; a step that fp16 skipped updates neither."""
        if not self.overflow:
            weights = {path: context.parameters()[path].detach() for path in self.raw}
            self._correct_decay(context, weights, decoupled=True)
            torch._foreach_copy_(list(self.raw.values()), list(weights.values()))
            self.move_gates()
        context.masks.replace_all(self.project(context))
        context.commit(compare=False)

    def move_gates(self) -> None:
        """Perform the optimizer step of the gates."""
        self.optimizer.step()
        if self.config.clamp_gates:
            self.log_alpha.detach().clamp_(-hard_concrete.LIMIT, hard_concrete.LIMIT)

    def open_fractions(self) -> Tensor:
        """Return the mean P(open) of each layer's gates [groups]."""
        return self.layout_of.fractions(hard_concrete.open_probability(self.log_alpha.detach()))

    def end_epoch(self, context: Context, epoch: int) -> dict[str, float]:
        """Return the densities under the gates, as fractions of the gated weights.

        l0/expected_density: sum of P(open) times the weights of the gate; l0/density: of the deterministic gates;
        l0/open_gates: open ones among all gates; l0/undecided: gates that are neither 0 nor 1. sparsity: of all
        eligible weights; with filters instead channels/kept: the fraction of all channels that the masks keep.
        """
        if distributed.world_size() > 1:
            distributed.assert_same(context.masks.digest(), "masks")
        log_alpha = self.log_alpha.detach()
        gates, sizes = hard_concrete.fixed_gate(log_alpha, self.rule), [g.weights for g in self.layout_of.groups]
        expected = self.open_fractions().tolist()
        opened = self.layout_of.fractions((gates > 0).float()).tolist()
        total = sum(sizes)
        self.figures = {
            "l0/expected_density": sum(a * b for a, b in zip(expected, sizes, strict=True)) / total,
            "l0/density": sum(a * b for a, b in zip(opened, sizes, strict=True)) / total,
            "l0/open_gates": float((gates > 0).double().mean()),
            "l0/undecided": float(((gates > 0) & (gates < 1)).double().mean()),
        }
        if (epoch + 1) * context.steps_per_epoch >= context.last_step:
            self.settle(context)
            self._report(context, dict(zip([group.name for group in self.layout_of.groups], opened, strict=True)))
        if self.config.bn_images:
            self._measure_statistics(context)
        return self.figures | self._left(context) | {"macs/inference": context.forward_macs}

    def _left(self, context: Context) -> dict[str, float]:
        """Return the sparsity, or kept channels, of the network under the gates, which may have been settled."""
        if isinstance(self.layout_of, FilterGates):
            return {"channels/kept": self.layout_of.map.fraction_kept(context.masks)}
        return {"sparsity": context.sparsity}

    def settle(self, context: Context) -> None:
        """Finalise the network after the last step: a layer without channels keeps its best one."""
        if isinstance(self.layout_of, FilterGates):
            log_alpha = self.log_alpha.detach()
            opened = hard_concrete.fixed_gate(log_alpha, self.rule) > 0
            kept = self.layout_of.removable(context.network).keep_one(opened, log_alpha)
            if not torch.equal(kept, opened):
                self.leave(context, kept)

    def leave(self, context: Context, kept: Tensor) -> None:
        """Write and mask the network with exactly these gates open, bool [num_gates].

        A closed gate among them takes the middle of its variable before stretching, which is never 0.
        """
        log_alpha = self.log_alpha.detach()
        gates = hard_concrete.fixed_gate(log_alpha, self.rule)
        gates = torch.where(gates > 0, gates, hard_concrete.middle(log_alpha, self.rule)) * kept
        self.write(context, gates)
        context.masks.replace_all(self.layout_of.masks(context.model, gates))
        context.commit()

    def remove(self, context: Context) -> dict[str, float]:
        """Remove the closed channels; after the single step of a dry run this is meaningless."""
        if not context.validating:
            return super().remove(context)
        removal.try_cut(context, self.trial_cut(context))
        return {}

    def _measure_statistics(self, context: Context) -> None:
        """Measure batch-norm statistics of the network as it is evaluated; the forward passes count as training."""
        dataset, source = context.dataset, context.generator("batch norm")
        drawn = torch.randperm(len(dataset.train_labels), generator=source)[: self.config.bn_images]
        whole = drawn[: len(drawn) // _BATCH * _BATCH] if len(drawn) > _BATCH else drawn  # batches have equal weight
        with torch.autocast(context.device.type, enabled=False):
            batches = (images for images, _ in dataset.train_subset(whole.split(_BATCH), augment_seed=context.seed))
            num_images = statistics.measure_statistics(context.model, batches)
        context.cost.total += num_images * context.forward_macs

    def _report(self, context: Context, opened: dict[str, float]) -> None:
        empty = [name for name, fraction in opened.items() if fraction == 0]
        if empty:
            note = " (each keeps its best channel all the same)" if self.config.granularity == "filter" else ""
            context.report(f"layers without any open gate: {', '.join(empty)}{note}")
        if context.masks.density == 1:
            chance = self.figures["l0/expected_density"]
            context.report(f"nothing was pruned: no gate is closed; on average P(open) is {chance:.4g}")

    def explain(self) -> dict[str, float]:
        return self.figures

    def layout(self, context: Context) -> list[tuple[int, dict[str, int]]] | None:
        """Return None: which gates close is learned."""
        return None

    def state_dict(self) -> dict[str, Any]:
        if self.log_alpha is None:  # after the training
            return {"figures": dict(self.figures)}
        return {
            "raw": dict(self.raw),
            "log_alpha": self.log_alpha.detach(),
            "gate_optimizer": self.optimizer.state_dict(),
            "figures": dict(self.figures),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state; the gates' optimizer only after `setup`, because nothing else needs it."""
        restore(self.raw, state.get("raw", {}))
        self.figures = dict(state["figures"])
        if self.log_alpha is not None:
            self.log_alpha.detach().copy_(state["log_alpha"])
            self.optimizer.load_state_dict(state["gate_optimizer"])


def _optimizer_groups(context: Context, paths: list[str]) -> dict[str, int]:
    """Return the index of each parameter's optimizer group, by path."""
    groups = context.optimizer.param_groups
    owner = {id(parameter): index for index, group in enumerate(groups) for parameter in group["params"]}
    named = context.parameters()
    return {path: owner[id(named[path])] for path in paths}


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _finite(model: nn.Module) -> bool:
    """Return whether all gradients are finite; otherwise the loss scaler skips the step."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return bool(torch.stack([torch.isfinite(gradient).all() for gradient in gradients]).all())
