"""Equal cost: solves a method's budget so that its run costs what a reference layout costs (method.match).

Source of the comparison at equal FLOPs: Sundar, Dwaraknath 2021, Reproducibility Report: Rigging the Lottery,
arXiv 2103.15767, where ERK is made sparser until it costs what a uniform layout costs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

from prune_lab import models
from prune_lab.accounting.costs import count_parameters, sparse_macs
from prune_lab.accounting.eligibility import Layer
from prune_lab.accounting.training import training_macs
from prune_lab.config.matched import COSTS, Matched
from prune_lab.config.run import RunConfig
from prune_lab.config.schedule import ScheduleConfig
from prune_lab.core.context import Context
from prune_lab.core.method import Method, build_method
from prune_lab.core.usable_layers import usable_layers
from prune_lab.datasets import DatasetInfo
from prune_lab.families.weight_pruning import WeightPruning, WeightPruningConfig
from prune_lab.foundations.errors import UserError
from prune_lab.pipeline.phase_plan import PhasePlan, plan_costs
from prune_lab.pipeline.validation import RandomImages
from prune_lab.pruning.masks.distributions import num_keep_total
from prune_lab.training.device_config import DeviceConfig
from prune_lab.training.phases import layer_costs

_NEIGHBOURS = 64
"""how far from the result of a bisection a closer cost is searched for"""


def matched(config: RunConfig, model_config: Any, info: DatasetInfo, device_config: DeviceConfig) -> RunConfig:
    """Return `config` with the sparsity, or the epochs, at which the run costs as much as its reference.

    Without method.match it is returned unchanged. A control gets the solution for the method itself: only the control
    differs, even if it avoids some costs.

    Raises:
        UserError: the reference's cost is unreachable, the method's layout is not known before training, or a typed
            sparsity would be replaced.
    """
    if not is_matched(config):
        return config
    baseline = build_method(config).without_control()
    problem = _Problem(replace(config, method=baseline or config.method), model_config, info, device_config)
    if problem.options.match_by == "epochs":
        solved = _solve_epochs(problem)
    else:
        _check_nothing_is_replaced(config)
        with naming_reference(config):
            solved = _solve_density(problem)
    if baseline is None or solved.matched is None:
        return solved
    outcome = replace(solved.matched, detail=f"{solved.matched.detail}, solved for the method itself")
    return replace(solved, method=replace(config.method, sparsity=solved.method.sparsity), matched=outcome)


def is_matched(config: RunConfig) -> bool:
    """Return whether a cost is to be matched: method.match is an option of weight pruning only."""
    return isinstance(config.method, WeightPruningConfig) and config.method.match != "none"


def _check_nothing_is_replaced(config: RunConfig) -> None:
    typed = [line for line in config.overrides if line.partition("=")[0].lstrip("+") == "method.sparsity"]
    if typed:
        raise UserError(
            f"{typed[-1]}: method.match={config.method.match} with method.match_by=density solves for the "
            "sparsity; leave method.sparsity out"
        )


@contextlib.contextmanager
def naming_reference(config: RunConfig) -> Iterator[None]:
    """Make errors about a solved sparsity, which nobody typed, begin with method.match_to."""
    try:
        yield
    except UserError as error:
        solved = is_matched(config) and config.method.match_by == "density"
        if not solved or "method.sparsity" not in str(error) or "method.match_to" in str(error):
            raise
        raise UserError(f"method.match_to={config.method.match_to}: {error}") from error


class _Problem:
    """One run to be matched: its cost and that of its reference."""

    def __init__(self, config: RunConfig, model_config: Any, info: DatasetInfo, device_config: DeviceConfig) -> None:
        self.config, self.model_config, self.info, self.device_config = config, model_config, info, device_config
        self.method, self.options = build_method(config), config.method
        self.model = models.build_on_meta(model_config, **info.sizes)
        self.costs = layer_costs(model_config, **info.sizes)
        self.num_weights = sum(layer.size for layer in self._layers(self.method) if layer.eligible)
        self._set_up: dict[tuple[object, ...], list[PhasePlan]] = {}

    def _layers(self, method: Method) -> list[Layer]:
        return usable_layers(method, self.model, self.costs)

    def candidate(self, sparsity: float) -> Method:
        """Return the method with another sparsity.

        Raises:
            UserError: the sparsity is incompatible with the other options.
        """
        options = replace(self.options, sparsity=sparsity)
        options.check("method")
        return build_method(replace(self.config, method=options))

    def target(self) -> int:
        """Return the cost of the reference: a fixed mask of its layout, regardless of the method.

        Its training is that of the schedule's train block, 3 f_S per image. So two methods with the same reference
        have the same total cost.

        Raises:
            UserError: there is no such layout or training; the message begins with method.match_to.
        """
        try:
            return self._target()
        except UserError as error:
            raise UserError(f"method.match_to={self.options.match_to}: {error}") from error

    def _target(self) -> int:
        reference, kind = WeightPruning(self.options.reference()), self.options.match
        context = Context(
            model=self.model, costs=list(self.costs), layers=self._layers(reference), phase="", seed=0,
            total_steps=0, steps_per_epoch=0,
        )  # fmt: skip
        counts = reference.allocate(context, reference.config.sparsity)
        if kind == "params":
            pruned = sum(layer.size for layer in context.eligible()) - sum(counts.values())
            return count_parameters(self.model) - pruned
        forward = sparse_macs(self.costs, counts)
        return forward if kind == "macs" else self._training(forward)

    def _training(self, forward: int) -> int:
        steps = RandomImages(self.info, self.device_config.torch_device).num_batches(self.config.schedule.batch_size)
        cost = training_macs(self.config, forward, steps, units_per_row=self.info.units_per_row)
        if cost == 0:
            raise UserError("schedule.train has no steps whose cost could be matched")
        return cost

    def cost(self, method: Method, epochs: int | None = None) -> int:
        """Return the cost of the run with another budget, or another number of epochs.

        Raises:
            UserError: there is no such budget or schedule, or the layout is unknown.
        """
        phases, kind = self.phases(method, epochs), self.options.match
        if kind == "train_macs":
            return self._known(_total(phase.macs(method) for phase in phases))
        layout = phases[-1].layout(method)  # rejects a budget that no layout meets
        if kind == "macs":
            return self._known(None if layout is None else sparse_macs(self.costs, layout[-1][1]))
        exact = num_keep_total(self.num_weights, method.config.sparsity)
        kept = exact if layout is None else sum(layout[-1][1].values())
        return count_parameters(self.model) - self.num_weights + kept

    def phases(self, method: Method, epochs: int | None) -> list[PhasePlan]:
        """Return the phases set up: once per length and per chain, which may depend on the sparsity."""
        key = (method.chain(), epochs)
        if key not in self._set_up:
            config = replace(self.config, method=method.config)
            if epochs is not None:
                config = replace(config, schedule=stretched(config.schedule, epochs))
            self._set_up[key] = plan_costs(config, self.model_config, self.info, self.device_config)
        return self._set_up[key]

    def _known(self, cost: int | None) -> int:
        if cost is None:
            name, kind = self.options.name, self.options.match
            raise UserError(
                f"method.match={kind}: the layers' budgets of {name} with method.distribution="
                f"{self.options.distribution} are not known before training; method.match=params is possible"
            )
        return cost


def _total(costs: Iterable[int | None]) -> int | None:
    """Return the sum, None if one of them is unknown."""
    total = 0
    for cost in costs:
        if cost is None:
            return None
        total += cost
    return total


# The density


def _solve_density(problem: _Problem) -> RunConfig:
    config, options, total = problem.config, problem.options, problem.num_weights
    target = problem.target()

    @cache
    def cost(kept: int) -> int:
        return problem.cost(problem.candidate(sparsity_of(kept, total)))

    bounds = reachable(cost, total, start=_start(cost, problem))
    if not cost(bounds[0]) <= target <= cost(bounds[1]):
        words, ends = COSTS[options.match][1], [sparsity_of(kept, total) for kept in bounds]
        hint = "; method.match_by=epochs would change the length of training" * (options.match == "train_macs")
        raise UserError(
            f"method.match_to={options.match_to} is out of reach: it has {target} {words}, {options.name} with "
            f"method.distribution={options.distribution} from {cost(bounds[0])} to {cost(bounds[1])} (method.sparsity "
            f"{ends[0]} to {ends[1]}){hint}"
        )
    kept = nearest(cost, target, *bounds)
    sparsity = sparsity_of(kept, total)
    outcome = Matched(
        options.match, options.match_to, "density", target, cost(kept), sparsity,
        configured_epochs=config.schedule.phase("train").epochs, detail=f" (kept {kept} of {total} weights)",
    )  # fmt: skip
    return replace(config, method=problem.candidate(sparsity).config, matched=outcome)


def _start(cost: Callable[[int], int], problem: _Problem) -> int:
    """Return a possible number of kept weights: that of the typed sparsity, or of the reference.

    Raises:
        UserError: neither is possible.
    """
    total, options = problem.num_weights, problem.options
    typed, other = (
        min(max(num_keep_total(total, sparsity), 1), total - 1)
        for sparsity in (options.sparsity, options.reference().sparsity)
    )
    if possible(cost, typed):
        return typed
    cost(other)
    return other


def sparsity_of(kept: int, total: int) -> float:
    """Return the sparsity with the fewest decimals that keeps exactly `kept` of `total` weights; 0 < kept < total."""
    for digits in range(1, 18):
        sparsity = round(1 - kept / total, digits)
        if 0 < sparsity < 1 and num_keep_total(total, sparsity) == kept:
            return sparsity
    raise ValueError(f"no sparsity keeps {kept} of {total} weights")


def possible(cost: Callable[[int], int], kept: int) -> bool:
    """Return whether there is a layout with `kept` weights."""
    try:
        cost(kept)
    except UserError:
        return False
    return True


def reachable(cost: Callable[[int], int], total: int, *, start: int) -> tuple[int, int]:
    """Return the minimum and maximum possible kept weights below `total`; `start` is possible, and all in between."""
    return _last_possible(cost, start, 1), _last_possible(cost, start, total - 1)


def _last_possible(cost: Callable[[int], int], inside: int, outside: int) -> int:
    if possible(cost, outside):
        return outside
    while abs(outside - inside) > 1:
        middle = (inside + outside) // 2
        inside, outside = (middle, outside) if possible(cost, middle) else (inside, middle)
    return inside


def nearest(cost: Callable[[int], int], target: int, low: int, high: int) -> int:
    """Return the argument in [low, high] whose cost is nearest to `target`.

    Costs rise except for small fluctuations between neighbours: rounding to whole weights or kernels moves weights
    between layers. A bisection is followed by a search over `_NEIGHBOURS` arguments on both sides of its result.
    """
    least, most = low, high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= target else (low, middle)
    found = min((low, high), key=lambda argument: abs(cost(argument) - target))
    around = range(max(least, found - _NEIGHBOURS), min(most, found + _NEIGHBOURS) + 1)
    candidates = [argument for argument in around if possible(cost, argument)]
    return min(candidates, key=lambda argument: (abs(cost(argument) - target), abs(argument - found)))


# The length of training


def _solve_epochs(problem: _Problem) -> RunConfig:
    config, options = problem.config, problem.options
    configured, target = config.schedule.phase("train").epochs, problem.target()

    @cache
    def cost(epochs: int) -> int:
        return problem.cost(problem.method, epochs)

    per_epoch = cost(configured + 1) - cost(configured)
    if per_epoch <= 0:
        raise UserError(f"method.match_by=epochs: schedule.train.epochs does not raise the cost of {options.name}")
    epochs = nearest_epochs(cost, target, guess=configured + round((target - cost(configured)) / per_epoch))
    if cost(epochs) - target > per_epoch / 2:
        raise UserError(
            f"method.match_to={options.match_to} is out of reach: it has {target} training MACs, {options.name} "
            f"{cost(epochs)} or more with method.sparsity={options.sparsity} (from {epochs} epochs on)"
        )
    schedule = stretched(config.schedule, epochs)
    outcome = Matched(
        options.match, options.match_to, "epochs", target, cost(epochs), epochs,
        configured_epochs=configured, detail=f" instead of {configured}",
    )  # fmt: skip
    return replace(config, schedule=schedule, matched=outcome)


def stretched(schedule: ScheduleConfig, epochs: int) -> ScheduleConfig:
    """Return the schedule with a train block of `epochs` epochs, milestones and warm-up in proportion."""
    train = schedule.phase("train")
    train = train.stretched(epochs / train.epochs)
    return replace(schedule, multiplier=1.0, train=train, finetune=schedule.phase("finetune"))


def nearest_epochs(cost: Callable[[int], int], target: int, *, guess: int) -> int:
    """Return the number of epochs, at least 1, whose cost is nearest to `target`.

    The cost is nearly linear, so a few steps from a good guess are enough.

    Raises:
        UserError: the method rejects so few epochs.
    """
    epochs = max(1, guess)
    while cost(epochs) < target:
        epochs += 1
    while epochs > 1 and possible(cost, epochs - 1) and cost(epochs - 1) >= target:
        epochs -= 1
    below = [epochs - 1] if epochs > 1 and possible(cost, epochs - 1) else []
    return min([epochs, *below], key=lambda argument: abs(cost(argument) - target))
