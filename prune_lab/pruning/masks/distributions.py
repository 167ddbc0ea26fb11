"""How a budget of kept weights is shared among layers: exact integers, no tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import yaml

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import suggestion
from prune_lab.pruning.masks.selection import SEMI_STRUCTURED


@dataclass(frozen=True)
class LayerSize:
    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def num_keep_total(num_weights: int, sparsity: float) -> int:
    """Return round((1 - sparsity) * num_weights), halves to even, in exact decimal arithmetic.

    In floating point 1 - 0.9 is 0.09999999999999998; the sparsity is taken as the decimal that was typed.
    """
    return round((1 - Fraction(repr(sparsity))) * num_weights)


def allocate(
    distribution: str,
    layers: Sequence[LayerSize],
    num_keep: int,
    *,
    first_layer: str = "sparse",
    power: float = 1.0,
) -> dict[str, int]:
    """Return kept weights per layer; they add up to `num_keep` and every layer keeps at least one.

    Args:
        distribution: "uniform", "er", "erk" or "balanced". Raw density of a layer: 1, (n_in + n_out) / (n_in n_out),
            (sum of the dimensions) / (product of the dimensions) or 1 / (product of the dimensions), the same number
            of weights in each; to the power `power`. "smart_ratio" and "smart_ratio_vgg": see `smart_ratio`. "2:4" is
            "uniform": half of each group of four is half of each layer.
        first_layer: "sparse", or "dense_compensated": the first layer stays dense and the others compensate.

    Layers whose density would pass 1 are made dense one at a time, largest first, and the rest is solved again.

    Raises:
        UserError: the budget cannot be met; the message gives the largest reachable sparsity.

    Source: Evci et al. 2020, section 3(1), arXiv 1911.11134; saturation as in google-research/rigl.
    """
    forced = {layers[0].name} if first_layer == "dense_compensated" else set()
    total = sum(layer.size for layer in layers)
    least = sum(layer.size if layer.name in forced else 1 for layer in layers)
    if num_keep < least:
        raise _unreachable(total, least, "every layer must keep a weight" + (", the first one all" if forced else ""))
    sizes = {layer.name: layer.size for layer in layers}

    def targets(budget: int) -> dict[str, float]:
        if distribution.startswith("smart_ratio"):
            return smart_ratio(layers, budget, steep=distribution == "smart_ratio_vgg")
        raw = {layer.name: _raw_density(distribution, layer.shape) for layer in layers}
        return _saturated(layers, budget, raw=raw, power=power, forced=forced)

    def solve(budget: int) -> dict[str, int]:
        return largest_remainder(targets(budget), sizes, budget)

    counts = solve(num_keep)
    empty = [name for name, count in counts.items() if count == 0]
    if empty:
        least = _least_budget(lambda budget: all(solve(budget).values()), num_keep, total)
        raise _unreachable(total, least, f"{empty[0]} would keep no weight")
    return counts


def _least_budget(feasible: Callable[[int], bool], low: int, high: int) -> int:
    """Return by bisection a feasible budget whose predecessor is not; `low` is not feasible, `high` is."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if feasible(middle) else (middle, high)
    return high


def _raw_density(distribution: str, shape: tuple[int, ...]) -> float:
    if distribution in ("uniform", SEMI_STRUCTURED):
        return 1.0
    if distribution == "balanced":
        return 1 / math.prod(shape)
    dims = shape[:2] if distribution == "er" else shape
    return sum(dims) / math.prod(dims)


def _saturated(
    layers: Sequence[LayerSize], num_keep: int, *, raw: Mapping[str, float], power: float, forced: set[str]
) -> dict[str, float]:
    """Return real-valued kept weights per layer: eps * raw**power * size; other layers compensate for dense ones."""
    targets = {layer.name: float(layer.size) for layer in layers}
    free = [layer for layer in layers if layer.name not in forced]
    left = num_keep - sum(layer.size for layer in layers if layer.name in forced)
    while free:
        highest = max(raw[layer.name] for layer in free)
        # Relative to the highest, so that no power makes all densities vanish; eps is then that layer's density.
        share = {layer.name: (raw[layer.name] / highest) ** power for layer in free}
        eps = left / sum(share[layer.name] * layer.size for layer in free)
        if eps <= 1:
            return targets | {layer.name: eps * share[layer.name] * layer.size for layer in free}
        left -= sum(layer.size for layer in free if raw[layer.name] == highest)
        free = [layer for layer in free if raw[layer.name] < highest]
    return targets


def smart_ratio(
    layers: Sequence[LayerSize], num_keep: int, *, steep: bool = False, linear_density: float = 0.3
) -> dict[str, float]:
    """Return real-valued kept weights per layer: densities fall with depth, linear layers have a fixed one.

    Convolution l of L layers (1 is the first, linear ones are counted) has density proportional to
    (L-l+1)^2 + (L-l+1); the excess over a layer's size goes to the following convolutions, finally to linear layers.

    Args:
        num_keep: the sum of the result; if linear layers alone need more, nothing is left for convolutions.
        steep: divide by l^2 as well, the official code's rule for VGG.

    Source: Su et al. 2020, section 4, arXiv 2009.11094; linear layers and overflow as in the official code.
    """
    targets = {layer.name: linear_density * layer.size if len(layer.shape) == 2 else 0.0 for layer in layers}
    left = num_keep - sum(targets.values())
    if left < 0:
        return {name: target * num_keep / sum(targets.values()) for name, target in targets.items()}
    share = {}
    for index, layer in enumerate(layers, start=1):
        if len(layer.shape) != 2:
            rest = len(layers) - index + 1
            share[layer.name] = (rest**2 + rest) / (index**2 if steep else 1) * layer.size
    scale = left / sum(share.values()) if share else 0.0
    overflow = 0.0 if share else left
    for layer in sorted(layers, key=lambda layer: len(layer.shape) == 2):  # stable: convolutions, then linear layers
        wanted = targets[layer.name] + scale * share.get(layer.name, 0.0) + overflow
        targets[layer.name] = min(wanted, float(layer.size))
        overflow = wanted - targets[layer.name]
    return targets


def largest_remainder(targets: Mapping[str, float | Fraction], sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Return integers near `targets` with sum `total`, each in [0, size].

    Floors first; the remainder goes to the largest fractional parts, ties in layer order.

    Raises:
        ValueError: `total` exceeds the sum of `sizes`.
    """
    if total > sum(sizes.values()):
        raise ValueError(f"cannot keep {total} of {sum(sizes.values())} weights")
    counts = {name: min(sizes[name], math.floor(target + 1e-9)) for name, target in targets.items()}
    order = sorted(targets, key=lambda name: counts[name] - targets[name])  # stable: ties keep layer order
    missing = total - sum(counts.values())
    while missing > 0:
        for name in order:
            if missing and counts[name] < sizes[name]:
                counts[name] += 1
                missing -= 1
    return counts


def whole_units(counts: Mapping[str, int], units: Mapping[str, int]) -> dict[str, int]:
    """Return counts that are multiples of `units` per layer, at least one unit, with a sum as close as that allows.

    Rounded down first; missing units go to the largest remainders, ties in layer order, while that brings the sum
    closer.
    """
    whole = {name: max(count // units[name], 1) * units[name] for name, count in counts.items()}
    missing = sum(counts.values()) - sum(whole.values())
    for name in sorted(counts, key=lambda name: (whole[name] - counts[name]) / units[name]):
        if missing * 2 > units[name] and whole[name] < counts[name]:
            whole[name] += units[name]
            missing -= units[name]
    return whole


def _unreachable(total: int, least: int, why: str) -> UserError:
    highest = math.floor(1e6 * (1 - least / total)) / 1e6  # rounded down: the printed figure must work when typed
    return UserError(
        f"method.sparsity is out of reach: {why}; the reachable maximum is {highest} for this model, "
        "method.distribution and method.first_layer"
    )


def clamp_counts(
    wanted: Mapping[str, int], *, low: Mapping[str, int], high: Mapping[str, int], total: int
) -> dict[str, int]:
    """Return `wanted` moved into [low, high] per layer, with the sum brought to `total` in layer order.

    Raises:
        ValueError: `total` lies outside the sums of `low` and `high`.
    """
    if not sum(low.values()) <= total <= sum(high.values()):
        raise ValueError(f"no counts between {sum(low.values())} and {sum(high.values())} add up to {total}")
    counts = {name: min(max(count, low[name]), high[name]) for name, count in wanted.items()}
    for name in counts:
        missing = total - sum(counts.values())
        counts[name] = min(max(counts[name] + missing, low[name]), high[name])
    return counts


def load_densities(path: str, names: Mapping[str, str]) -> dict[str, float]:
    """Return parameter -> density read from a YAML or JSON file of layer name -> density in (0, 1].

    Args:
        names: layer name -> parameter of every eligible layer; the file must name all of them and no other.

    Raises:
        UserError: missing or unreadable file, names that do not match, density out of range.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"method.densities={path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise UserError(f"method.densities={path} must hold a mapping of layer name to density")
    for name in content:
        if name not in names:
            raise UserError(f"method.densities={path}: {name} is no eligible layer{suggestion(str(name), names)}")
    missing = [name for name in names if name not in content]
    if missing:
        raise UserError(f"method.densities={path}: no density for {', '.join(missing[:3])} ({len(missing)} missing)")
    for name, value in content.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise UserError(f"method.densities={path}: {name} must lie in (0, 1], got {value}")
    return {names[name]: float(content[name]) for name in names}


def file_counts(
    layers: Sequence[LayerSize], densities: Mapping[str, float], *, target: float, sparsity: float
) -> dict[str, int]:
    """Return kept weights per layer on their way to a file's densities, adding up to the budget of `sparsity`.

    At `target` layer l has its density d_l from the file, at a lower sparsity s the density 1 - (1 - d_l) s / target.

    Raises:
        UserError: the densities give a sparsity that differs from `target` by more than 0.001, or leave a layer without
            weights.
        ValueError: `sparsity` exceeds `target`.
    """
    if not 0 <= sparsity <= target:
        raise ValueError(f"sparsity must lie between 0 and the target {target:g}, got {sparsity:g}")
    sizes = {layer.name: layer.size for layer in layers}
    final = _final_counts(sizes, densities, target)
    done = Fraction(repr(sparsity)) / Fraction(repr(target))
    wanted = {name: size - (size - final[name]) * done for name, size in sizes.items()}
    return largest_remainder(wanted, sizes, num_keep_total(sum(sizes.values()), sparsity))


def _final_counts(sizes: Mapping[str, int], densities: Mapping[str, float], target: float) -> dict[str, int]:
    total = sum(sizes.values())
    targets = {name: densities[name] * size for name, size in sizes.items()}
    asked = 1 - sum(targets.values()) / total
    if abs(asked - target) > 1e-3:
        raise UserError(
            f"method.densities asks for sparsity {asked:.6g}, method.sparsity for {target:g}; make them agree"
        )
    budget = num_keep_total(total, target)
    factor = budget / sum(targets.values())  # at most a thousandth: densities in a file are rounded
    near = {name: min(share * factor, sizes[name]) for name, share in targets.items()}
    counts = largest_remainder(near, sizes, budget)
    empty = [name for name, count in counts.items() if count == 0]
    if empty:
        raise UserError(f"method.densities: {empty[0]} would keep no weight; raise its density")
    return counts
