"""A narrower dense network with as many parameters (or MACs) as a sparse one."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal

from prune_lab import models
from prune_lab.accounting.costs import count_parameters, dense_macs, profile
from prune_lab.core.card import Card
from prune_lab.core.method import Method, MethodConfig
from prune_lab.core.phase import TRAIN, Phase
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import OpenFraction


@dataclass(frozen=True)
class SmallDenseConfig(MethodConfig):
    sparsity: OpenFraction
    """the narrow network keeps 1 - sparsity of the cost of the full one"""
    match: Literal["params", "macs"]
    """the cost to match, counted on the built networks"""
    tolerance: OpenFraction
    """largest allowed difference from the target cost, as a fraction of it"""


class SmallDense(Method):
    Config = SmallDenseConfig
    card = Card(
        summary="one factor on all widths, chosen so that parameters or MACs match a sparse network's",
        paper="baseline of Evci et al. 2020, Rigging the Lottery, arXiv 1911.11134",
        acts="before training: the network is built narrower",
        eligible="none; there are no masks",
        cost="that of the narrow network",
        differences="the factor is found by bisection on real counts, batch-norm and biases included (the paper's "
        "notebooks use fixed factors and count one bit per position for the mask; a reproduction takes sqrt(density))",
    )

    def asked(self) -> dict[str, float]:
        return {self.config.match: 1 - self.config.sparsity}

    def chain(self) -> tuple[Phase, ...]:
        return (TRAIN,)

    def adapt_model(self, config: Any, *, num_classes: int, image_size: int) -> Any:
        """Return `config` with the width whose actual cost is nearest to the target.

        Raises:
            UserError: the model's widths are fixed, or none is within method.tolerance.
        """
        @functools.cache
        def cost(width: float) -> int:
            return self._cost(replace(config, width=width), num_classes=num_classes, image_size=image_size)

        wanted = (1 - self.config.sparsity) * cost(config.width)
        low, high = 1e-6, config.width
        for _ in range(20):  # channel counts are integers: a millionth is finer than any step
            middle = round((low + high) / 2, 9)
            low, high = (middle, high) if cost(middle) < wanted else (low, middle)
        width = min((low, high), key=lambda factor: abs(cost(factor) - wanted))
        reached = cost(width) / wanted
        if abs(reached - 1) > self.config.tolerance:
            raise UserError(
                f"method.sparsity={self.config.sparsity:g}: the nearest width of {config.name} ({width:g}) has "
                f"{reached:.3f} times the wanted {self.config.match}; method.tolerance={self.config.tolerance:g}"
            )
        return replace(config, width=width)

    def _cost(self, config: Any, *, num_classes: int, image_size: int) -> int:
        model = models.build_on_meta(config, num_classes=num_classes, image_size=image_size)
        if self.config.match == "params":
            return count_parameters(model)
        return dense_macs(profile(model, image_size))

