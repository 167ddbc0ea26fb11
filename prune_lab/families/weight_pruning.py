"""Methods that zero individual weights under a budget: options, eligible layers, exact counts per layer."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from prune_lab.accounting import eligibility
from prune_lab.core.method import Method, MethodConfig
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import Example, FilePath, NonNegative, OpenFraction
from prune_lab.pruning.masks import distributions, top_k
from prune_lab.pruning.masks.selection import SEMI_STRUCTURED, check_semi_structured, selection

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prune_lab.accounting.eligibility import Layer
    from prune_lab.core.context import Context


_REFERENCES: dict[str, Literal["uniform", "er", "erk"]] = {"uniform": "uniform", "er": "er", "erk": "erk"}
"""distributions that `match_to` may name"""


@dataclass(frozen=True)
class WeightPruningConfig(MethodConfig):
    sparsity: OpenFraction
    """fraction of zero weights among eligible weights at the end"""
    distribution: Literal["uniform", "er", "erk", "file", "global", "2:4"]
    """how the kept weights are shared among layers; 2:4: two of every four input channels in each layer"""
    first_layer: Literal["auto", "sparse", "dense_uncompensated", "dense_compensated"]
    """the first layer; auto: dense and outside the budget with uniform and in networks with depthwise convolutions
    (RigL 3(1), 4.1.2), sparse otherwise"""
    power: NonNegative
    """er and erk: exponent of the density rule; 0 is uniform, 1 the published one"""
    densities: FilePath | None
    """file: YAML or JSON with a density per layer"""
    include: list[str]
    """layer patterns to prune although they are dense by default (depthwise convolutions)"""
    exclude: list[str]
    """layer patterns to keep dense and out of the budget"""
    match: Literal["none", "params", "macs", "train_macs"]
    """the cost to match to the reference: nonzero parameters, inference MACs, or MACs of the whole training"""
    match_to: Annotated[str, Example("0.1:uniform")] | None
    """the reference as DENSITY:DISTRIBUTION, with this method's first_layer, include and exclude; train_macs: fixed
    masks of that layout, or the dense network, trained over the schedule's train block"""
    match_by: Literal["density", "epochs"]
    """the unknown to solve for: the density, which replaces `sparsity`, or the epochs of the schedule's train block"""

    def check(self, path: str) -> None:
        if (self.distribution == "file") != (self.densities is not None):
            raise UserError(f"{path}.densities=FILE goes with {path}.distribution=file, got {self.distribution}")
        if self.power != 1 and self.distribution not in ("er", "erk"):
            raise UserError(f"{path}.power={self.power:g} is for er and erk; with {self.distribution} it must be 1")
        if self.distribution == "file" and self.first_layer == "dense_compensated":
            raise UserError(f"{path}.first_layer=dense_compensated: give density 1 in {path}.densities instead")
        if self.distribution == "global" and self.first_layer.startswith("dense"):
            raise UserError(f"{path}.first_layer={self.first_layer} needs a budget per layer; use {path}.exclude")
        check_semi_structured(self, path)
        self._check_match(path)

    def _check_match(self, path: str) -> None:
        if (self.match == "none") != (self.match_to is None):
            raise UserError(
                f"{path}.match=params, macs or train_macs goes with {path}.match_to=DENSITY:DISTRIBUTION, "
                f"got match={self.match} and match_to={'null' if self.match_to is None else self.match_to}"
            )
        if self.match_by == "epochs" and self.match != "train_macs":
            raise UserError(f"{path}.match_by=epochs goes with {path}.match=train_macs, got match={self.match}")
        if self.match != "none" and self.match_by == "density" and self.distribution in ("file", SEMI_STRUCTURED):
            raise UserError(f"{path}.match_by=density: {path}.distribution={self.distribution} fixes the densities")
        if self.match_to is not None:
            _parse_reference(self.match_to, path)

    def reference(self) -> WeightPruningConfig:
        """Return the options of the layout that `match_to` names; sparsity 0 means the dense network."""
        density, distribution = _parse_reference(self.match_to, "method")
        return replace(self, sparsity=float(1 - density), distribution=distribution, power=1.0, densities=None)


def _parse_reference(text: str, path: str) -> tuple[Fraction, Literal["uniform", "er", "erk"]]:
    """Return the density in (0, 1] and the distribution that DENSITY:DISTRIBUTION names.

    Raises:
        UserError: wrong format, or a value that is not allowed.
    """
    found = re.fullmatch(r"(\d*\.?\d+(?:[eE]-?\d+)?|\d+\.):(uniform|er|erk)", text)
    if found is None or not 0 < Fraction(found[1]) <= 1:
        raise UserError(
            f"{path}.match_to={text} must be DENSITY:DISTRIBUTION with a density in (0, 1] and uniform, er or erk, "
            "such as 0.1:uniform"
        )
    return Fraction(found[1]), _REFERENCES[found[2]]


class WeightPruning(Method):
    """Base of the methods whose target is `method.sparsity` over individual weights."""

    Config: type[WeightPruningConfig] = WeightPruningConfig

    def identity(self) -> dict[str, Any]:
        """Return the options, the file of densities by its content.

        The matching options are left out: the solution alone determines the results.

        Raises:
            UserError: the file cannot be read.
        """
        options = {key: value for key, value in super().identity().items() if not key.startswith("match")}
        path = self.config.densities
        if path is None:
            return options
        try:
            content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"method.densities={path} cannot be read: {error.strerror}") from error
        return options | {"densities": content}

    def requested_sparsity(self) -> float:
        return self.config.sparsity

    @property
    def selection(self) -> ModuleType:
        """The module that selects among a layer's weights: `keep_top`, `grow` and `random_mask`."""
        return selection(self.config.distribution)

    def layers(self, model: nn.Module) -> list[Layer]:
        config = self.config
        dense_first = config.first_layer == "dense_uncompensated"
        if config.first_layer == "auto":
            kinds = {eligibility.layer_kind(module) for module in model.modules()}
            dense_first = config.distribution == "uniform" or "depthwise conv" in kinds
        return eligibility.select_layers(
            model, include=config.include, exclude=config.exclude, dense_first=dense_first,
            grouped=config.distribution == SEMI_STRUCTURED,
        )  # fmt: skip

    def total(self, context: Context, sparsity: float) -> int:
        """Return the kept weights over all eligible layers at `sparsity`.

        Raises:
            UserError: a global cut that leaves fewer weights than there are layers.
        """
        layers = context.eligible()
        num_weights = sum(layer.size for layer in layers)
        keep = distributions.num_keep_total(num_weights, sparsity)
        if self.config.distribution == "global" and keep < len(layers):  # `allocate` checks the others
            raise UserError(
                f"method.sparsity={sparsity} leaves {keep} weights for {len(layers)} layers; the reachable maximum is "
                f"about {1 - len(layers) / num_weights:.6g}"
            )
        return keep

    def cut(self, context: Context, masks: dict[str, Tensor]) -> None:
        """Install the masks of a cut and report the layers it leaves empty."""
        context.install_masks(masks)
        empty = [name.removesuffix(".weight") for name, count in context.masks.counts().items() if count == 0]
        if empty:
            context.report(f"layers without any weight left: {', '.join(empty)}")

    def allocate(self, context: Context, sparsity: float) -> dict[str, int]:
        """Return kept weights per parameter at `sparsity`; they add up to `total` exactly.

        With distribution=file layers move linearly from dense to the file's densities at method.sparsity.

        Raises:
            UserError: no such layout exists; the message gives the reachable maximum.
        """
        config = self.config
        layers = [distributions.LayerSize(layer.parameter, layer.shape) for layer in context.eligible()]
        if config.distribution == "file":
            names = {layer.name: layer.parameter for layer in context.eligible()}
            densities = distributions.load_densities(config.densities, names)
            return distributions.file_counts(layers, densities, target=config.sparsity, sparsity=sparsity)
        compensated = config.first_layer == "dense_compensated"
        if compensated and not context.layers[0].eligible:
            first = context.layers[0]
            raise UserError(f"method.first_layer=dense_compensated: {first.name} has no budget, {first.reason}")
        first_layer = "dense_compensated" if compensated else "sparse"
        return distributions.allocate(
            config.distribution, layers, self.total(context, sparsity), first_layer=first_layer, power=config.power
        )

    def allocate_nested(self, context: Context, sparsity: float, above: dict[str, int]) -> dict[str, int]:
        """Return kept weights per parameter at a sparsity on the way to the target, `total` in all.

        No layer grows beyond `above`, the previous counts, or falls below its count at the target.
        """
        final = self.allocate(context, self.config.sparsity)
        wanted = self.allocate(context, sparsity)
        return distributions.clamp_counts(wanted, low=final, high=above, total=self.total(context, sparsity))

    def budget(self, context: Context, sparsity: float) -> int | dict[str, int]:
        """Return the weights to keep: over all layers together with distribution=global, else per parameter."""
        return (self.total if self.config.distribution == "global" else self.allocate)(context, sparsity)

    def keep_best(
        self, scores: dict[str, Tensor], budget: int | dict[str, int], candidates: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return masks of the highest scores: `budget` in all, or per parameter if it is a mapping."""
        if isinstance(budget, int):
            return top_k.keep_top_global(scores, budget, candidates=candidates)
        return {
            name: self.selection.keep_top(score, budget[name], candidates=candidates and candidates[name])
            for name, score in scores.items()
        }

    def layout(self, context: Context) -> list[tuple[int, dict[str, int]]] | None:
        self.total(context, self.config.sparsity)  # also rejects what a global cut cannot reach
        return None if self.config.distribution == "global" else [(0, self.allocate(context, self.config.sparsity))]
