"""Learned thresholds: weights below them act as zero, weights above are shrunk by them, and both are trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from prune_lab.accounting import eligibility
from prune_lab.core.method import MethodConfig
from prune_lab.families.annealed_gradient import RawWeights, restore
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import Range
from prune_lab.optim import learning_rate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prune_lab.accounting.eligibility import Layer
    from prune_lab.config.run import RunConfig
    from prune_lab.core.context import Context


AWAKE = -10.0
"""below it a raw threshold prunes almost nothing and has almost no gradient: sigmoid(-10) is 4.5e-5"""

HIGHER_STARTS = (-1000.0, -300.0, -100.0, -30.0, -15.0)
"""starts of thresholds to try if no decay fits the published ones"""

_HIGHEST_DECAY = 1e3
"""of the decays that are tried for a proposal"""


@dataclass(frozen=True)
class SoftThresholdConfig(MethodConfig):
    threshold_init: Annotated[float, Range(high=0)] | Literal["auto"]
    """start of the raw thresholds T; weights are compared with sigmoid(T); auto: the published start on long
    trainings, a suitable one on short ones"""
    granularity: Literal["layer", "channel"]
    """one threshold per layer or one per output channel"""
    include: list[str]
    """layer patterns to prune although they are dense by default (depthwise convolutions)"""
    exclude: list[str]
    """layer patterns to keep dense"""

    @classmethod
    def absent(cls, option: str) -> str | None:
        if option != "sparsity":
            return None
        return (
            "the sparsity is an outcome of trained thresholds, and a search for options that meet a target is not "
            "offered; for an exact budget take method=autosparse_topk"
        )


def check_decay(path: str, *, init: float, decay: float) -> None:
    """Raise UserError if the decay would also push towards 0 a threshold that is active from the start."""
    if decay > 0 and init > AWAKE:
        raise UserError(
            f"{path}.threshold_decay={decay:g} pushes T towards 0, where weights up to 0.5 are pruned; with "
            f"{path}.threshold_init={init:g}, above {AWAKE:g}, it must be 0"
        )


def shrink(raw: Tensor, threshold: Tensor) -> Tensor:
    """Return sign(W) * max(|W| - sigmoid(T), 0), shaped like `raw`.

    Args:
        raw: W, any shape.
        threshold: T, broadcasts to `raw`.

    Source: Kusupati et al. 2020, section 3.2, arXiv 2002.03231.
    """
    limit = torch.sigmoid(threshold)
    return raw - raw.clamp(-limit, limit)


def threshold_gradient(gradient: Tensor, raw: Tensor, threshold: Tensor) -> Tensor:
    """Return dL/dT, shaped like `threshold`: -sigmoid'(T) times the sum of dL/dW * sign(W) over T's weights.

    Args:
        gradient: dL/dW, the factor on pruned weights included.
        raw: W, shaped like `gradient`.
        threshold: T, one or as many as `raw` has rows, with as many dimensions as `raw`.
    """
    limit = torch.sigmoid(threshold)
    return -limit * (1 - limit) * (gradient * raw.sign()).sum_to_size(threshold.shape)


def decayed(init: float, decay: float, rates: Sequence[float], group: Mapping[str, Any]) -> Iterator[float]:
    """Yield T after each step when only its weight decay changes it, as long as its gradient is exactly 0.

    Args:
        rates: learning rate of each step.
        group: the optimizer's options: of SGD (momentum, nesterov) or of Adam and AdamW (betas, eps, decoupled).
    """
    value, first, second = init, 0.0, 0.0
    momentum, nesterov = group.get("momentum", 0.0), group.get("nesterov", False)
    beta1, beta2 = group.get("betas", (0.0, 0.0))
    coupled_adam = "betas" in group and not group["decoupled_weight_decay"]
    for step, rate in enumerate(rates, start=1):
        slope = decay * value
        if coupled_adam:
            first, second = beta1 * first + (1 - beta1) * slope, beta2 * second + (1 - beta2) * slope**2
            spread = math.sqrt(second / (1 - beta2**step)) + group["eps"]
            value -= rate * first / (1 - beta1**step) / spread
        else:  # AdamW decays separately from its moments: as SGD without momentum
            first = momentum * first + slope
            value -= rate * (slope + momentum * first if nesterov else first)
        yield value


def wake_step(init: float, decay: float, rates: Sequence[float], group: Mapping[str, Any]) -> int | None:
    """Return the number of steps until the decay alone has brought T to -10; None: not within `rates`."""
    if init >= AWAKE:
        return 0
    values = decayed(init, decay, rates, group)
    return next((step for step, value in enumerate(values, start=1) if value >= AWAKE), None)


def waking_decay(init: float, rates: Sequence[float], group: Mapping[str, Any]) -> float | None:
    """Return a decay, rounded up to two digits, that brings T to -10 in a third of `rates`, but never past 0.

    None: there is no such decay.
    """
    early = rates[: len(rates) // 3]
    if wake_step(init, _HIGHEST_DECAY, early, group) is None:  # Adam's step size has a limit that no decay raises
        return None
    low, high = 0.0, 1e-8
    while wake_step(init, high, early, group) is None:
        low, high = high, 2 * high
        if high > _HIGHEST_DECAY:
            return None
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if wake_step(init, middle, early, group) is not None else (middle, high)
    unit = 10.0 ** (math.floor(math.log10(high)) - 1)
    found = float(f"{math.ceil(high / unit) * unit:.1e}")
    return found if max(decayed(init, found, rates, group)) < 0 else None


def waking_start(
    starts: Iterable[float], rates: Sequence[float], group: Mapping[str, Any]
) -> tuple[float, float] | None:
    """Return the first of `starts` for which `waking_decay` finds a decay, and that decay; None: there is none."""
    decays = ((start, waking_decay(start, rates, group)) for start in starts)
    return next(((start, decay) for start, decay in decays if decay is not None), None)


def _advice(init: float, rates: Sequence[float], group: Mapping[str, Any]) -> str:
    found = waking_start((init, *HIGHER_STARTS), rates, group)
    if found is not None:
        setting = f"method.threshold_init={found[0]:g} with method.threshold_decay={found[1]:g}"
        return f"{setting} brings it to {AWAKE:g} by a third of the way"
    return (
        f"no decay brings it to {AWAKE:g} by a third of the way without passing 0: choose a method.threshold_init of "
        f"{AWAKE:g} or more"
    )


CHECK_EVERY = 20
"""steps between checks for a dead layer: each makes the host wait for the device"""


class SoftThreshold(RawWeights):
    """One trained threshold per layer or channel; achieved sparsity is an outcome."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.thresholds: dict[str, Tensor] = {}

    def check_run(self, config: RunConfig) -> None:
        """Reject training without steps."""
        config.require_training(f"method={self.config.name}: the thresholds are trained there")

    def start(self, context: Context) -> float:
        """Return the initial T of every threshold."""
        return self.config.threshold_init

    def decay(self, context: Context) -> float:
        """Return the weight decay of the thresholds."""
        return self.config.threshold_decay

    def layers(self, model: nn.Module) -> list[Layer]:
        return eligibility.select_layers(model, include=self.config.include, exclude=self.config.exclude)

    def setup(self, context: Context) -> None:
        """Create the thresholds, add them to the optimizer, and reject those that would never become active.

        Raises:
            UserError: decay and start of the thresholds do not fit each other or the schedule.
        """
        config, named, init = self.config, context.parameters(), self.start(context)
        for layer in context.eligible():
            shape = [1] * len(layer.shape)
            if config.granularity == "channel":
                shape[0] = layer.shape[0]
            start = torch.full(shape, init, dtype=torch.float32, device=named[layer.parameter].device)
            self.thresholds[layer.parameter] = torch.nn.Parameter(start)
        decay = self.decay(context)
        check_decay("method", init=init, decay=decay)
        context.optimizer.add_param_group({"params": list(self.thresholds.values()), "weight_decay": decay})
        waking = self._waking(context, init, decay)
        super().setup(context)
        self.check_alive(context, "at the start")
        context.report(
            f"thresholds: {sum(t.numel() for t in self.thresholds.values())}, one per {config.granularity}, T = "
            f"{init:.4g} with weight decay {decay:g}{waking}; density at the start "
            f"{context.masks.density:.4g}"
        )

    def _waking(self, context: Context, init: float, decay: float) -> str:
        """Return a text on the step at which the decay alone has brought T to the value where pruning begins.

        Raises:
            UserError: there is no such step, or the decay takes T past 0.
        """
        total = context.total_steps
        if init >= AWAKE and not decay:
            return ""
        group = context.optimizer.param_groups[-1]
        rates = [learning_rate.learning_rate(context.schedule, step, context.steps_per_epoch) for step in range(total)]
        setting = f"method.threshold_init={init:g} with method.threshold_decay={decay:g}"
        values = list(decayed(init, decay, rates, group))
        past = next((step for step, value in enumerate(values, start=1) if value > 0), None)
        if past is not None:
            raise UserError(
                f"{setting} takes T past 0, where weights up to 0.5 act as zero, at step {past} of {total}; "
                f"{'lower method.threshold_decay' if init >= AWAKE else _advice(init, rates, group)}"
            )
        if init >= AWAKE:
            return ""
        step = next((step for step, value in enumerate(values, start=1) if value >= AWAKE), None)
        if step is None:
            raise UserError(
                f"{setting} never brings T to {AWAKE:g}, where pruning begins, in {total} steps; "
                f"{_advice(init, rates, group)}"
            )
        return f", which alone brings T to {AWAKE:g} (there pruning begins) at step {step} of {total}"

    def gate(self, context: Context, name: str, step: int) -> Tensor:
        """Return the factor on each gradient; it is 0 where W is exactly 0, like sign(W) in dw/dW."""
        factor = super().gate(context, name, step)
        return factor.masked_fill_(self.raw[name] == 0, 0) if self.alpha(step) else factor

    def after_backward(self, context: Context, step: int) -> bool:
        """Set the thresholds' gradients; clipping, which comes next, includes only the model's."""
        super().after_backward(context, step)
        named = context.parameters()
        for name, threshold in self.thresholds.items():
            if named[name].grad is not None:
                threshold.grad = threshold_gradient(named[name].grad, self.raw[name], threshold.detach())
        return True

    def project(self, context: Context) -> dict[str, Tensor]:
        """Shrink the weights."""
        named, masks = context.parameters(), {}
        for name, raw in self.raw.items():
            effective = shrink(raw, self.thresholds[name].detach())
            named[name].detach().copy_(effective)
            masks[name] = effective != 0
        return masks

    def check_alive(self, context: Context, when: str) -> None:
        """Raise UserError if a layer has no weight left."""
        dead = next((name for name, count in context.masks.counts().items() if count == 0), None)
        if dead is not None:
            limit = float(torch.sigmoid(self.thresholds[dead].detach()).min())
            raise UserError(
                f"{dead.removesuffix('.weight')} has no weight left {when}: all are below its threshold {limit:.3g}; "
                "lower method.threshold_init or method.threshold_decay"
            )

    def after_step(self, context: Context, step: int) -> None:
        super().after_step(context, step)
        if step % CHECK_EVERY == CHECK_EVERY - 1:
            self.check_alive(context, f"after step {step}")

    def end_epoch(self, context: Context, epoch: int) -> dict[str, float]:
        """Return the mean effective threshold of each layer; report if nothing was pruned.

        Raises:
            UserError: a layer has no weight left.
        """
        self.check_alive(context, f"after epoch {epoch + 1}")
        if (epoch + 1) * context.steps_per_epoch == context.total_steps and context.masks.density == 1:
            context.report("nothing was pruned: no weight is below its threshold; see threshold/LAYER in metrics.jsonl")
        means = torch.stack([torch.sigmoid(t.detach()).mean() for t in self.thresholds.values()]).tolist()
        layers = (f"threshold/{name.removesuffix('.weight')}" for name in self.thresholds)
        return super().end_epoch(context, epoch) | dict(zip(layers, means, strict=True))

    def layout(self, context: Context) -> list[tuple[int, dict[str, int]]] | None:
        """Return None: how many weights each layer keeps is learned."""
        return None

    def state_dict(self) -> dict[str, Any]:
        thresholds = {name: threshold.detach() for name, threshold in self.thresholds.items()}
        return super().state_dict() | {"thresholds": thresholds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        restore(self.thresholds, state["thresholds"])
