"""Run-time merging of similar channels: a trained network's convolutions hash their input tile by tile."""

from __future__ import annotations

import copy
import fnmatch
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from prune_lab.accounting import eligibility
from prune_lab.accounting.costs import dense_macs, profile
from prune_lab.core.card import Card
from prune_lab.core.method import Measured, Method, MethodConfig
from prune_lab.foundations import seeding
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import Count, Index, NonNegative, Range
from prune_lab.pruning.dynamic import merging_cost, wall_clock

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prune_lab.accounting.eligibility import Layer
    from prune_lab.config.run import RunConfig
    from prune_lab.pruning.dynamic.merging_cost import Observation


@dataclass(frozen=True)
class HasteConfig(MethodConfig):
    hyperplanes: Annotated[int, Range(0, 62)]
    """bits of a channel's hash code: more bits merge fewer channels"""
    zero_fraction: Annotated[float, Range(0, 1, open_high=True)]
    """probability of a zero in a hyperplane"""
    tile: Annotated[int, Range(1, 256)]
    """side of the square tiles of the output plane within which channels are merged"""
    min_channels: Count
    """minimum number of input channels of a converted convolution"""
    pointwise: bool
    """whether 1x1 convolutions are converted, too"""
    exclude: list[str]
    """patterns of layers that are not converted"""
    hash_seed: Index
    """seed of the hyperplanes"""
    seeds: Count
    """number of evaluated draws of the hyperplanes"""
    addition_cost: NonNegative
    """MACs counted for one addition of hashing and merging"""


class HASTE(Method):
    needs_images = "it merges channels of convolutions"
    Config = HasteConfig
    card = Card(
        summary="train dense, then merge alike input channels at run time by hashing, tile by tile (reconstruction)",
        paper="Meiner, Mehnert, Condurache 2023, Instant Complexity Reduction in CNNs using Locality-Sensitive "
        "Hashing, arXiv 2309.17211 (later: Data-Free Dynamic Compression of CNNs for Tractable Efficiency)",
        acts="after training, in inference only; no weight changes and none is removed, and no data is needed",
        eligible="the inputs of convolutions with a kernel larger than 1x1, one group and method.min_channels channels",
        cost="no training; inference is usually slower than the dense network's on the clock, whatever the MACs say: "
        "both times are measured and reported",
        differences="a reconstruction: neither code nor the paper's full text were available, only abstracts and "
        "public reviews. Reconstructed: tiles that do not overlap in the output, with the kernel's halo, 8 wide; "
        "which layers are taken; the counts of additions for centring, averaging and summing kernels. From memory, "
        "to be checked: centring before hashing, P(0) = 2/3 (method.zero_fraction), 14 hyperplanes for CIFAR-10 and "
        "20 for ImageNet (method.hyperplanes). Ours: windows of one value are not merged, as centring leaves "
        "nothing of them. MACs include the overhead, an addition as method.addition_cost MACs",
    )
    costs_depend_on_images = True

    def check_run(self, config: RunConfig) -> None:
        """Reject merging channels of an untrained network."""
        config.require_trained(f"method={self.config.name}")

    def layers(self, model: nn.Module) -> list[Layer]:
        """Return all layers; eligible are the convolutions whose input channels are merged.

        Raises:
            UserError: there are none, or a pattern of method.exclude matches no layer.
        """
        layers = []
        for layer in eligibility.select_layers(model, exclude=self.config.exclude):
            reason = self._reason(layer.name, model.get_submodule(layer.name))
            layers.append(replace(layer, eligible=not reason, reason=reason))
        if not any(layer.eligible for layer in layers):
            reasons = dict.fromkeys(layer.reason for layer in layers)
            raise UserError(f"method={self.config.name} takes no layer of this network: {', '.join(reasons)}")
        return layers

    def _reason(self, name: str, module: nn.Module) -> str:
        """Return why a layer is not converted, empty if its input channels are merged."""
        from prune_lab.pruning.dynamic.hashed_convolution import (
            HashedConv2d,  # its file defines an nn.Module and so imports torch
        )

        config = self.config
        if any(fnmatch.fnmatch(name, pattern) for pattern in config.exclude):
            return "left out by method.exclude"
        if isinstance(module, torch.nn.Linear):
            return "no convolution"
        if not isinstance(module, torch.nn.Conv2d) or type(module) not in (torch.nn.Conv2d, HashedConv2d):
            return f"a class of its own ({type(module).__name__})"
        if module.groups > 1:
            return "grouped convolution"
        if module.in_channels < config.min_channels:
            return f"input channels below method.min_channels={config.min_channels}"
        if max(module.kernel_size) == 1 and not config.pointwise:
            return "1x1 convolution (method.pointwise=false)"
        return ""

    def finish(self, model: nn.Module) -> nn.Module:
        """Return a copy of the network with hashed convolutions; parameters and their names are the same."""
        from prune_lab.pruning.dynamic.hashed_convolution import HashedConv2d

        finished, options = copy.deepcopy(model), self._options()
        made: dict[nn.Module, nn.Module] = {}
        for layer in self.layers(finished):
            conv = finished.get_submodule(layer.name)
            if layer.eligible and isinstance(conv, torch.nn.Conv2d):
                made[conv] = HashedConv2d.of(conv, seed=self._seed(layer.name, 0), **options)
        for path, module in list(finished.named_modules(remove_duplicate=False)):
            if module in made:
                finished.set_submodule(path, made[module])
        return finished.eval()  # it cannot be trained

    def _options(self) -> dict[str, Any]:
        config = self.config
        return {"num_hyperplanes": config.hyperplanes, "zero_fraction": config.zero_fraction, "tile": config.tile}

    def _seed(self, layer: str, draw: int) -> int:
        return seeding.stable_hash(self.config.hash_seed + draw, "hyperplanes", layer)

    def measure(
        self, model: nn.Module, score: Callable[[nn.Module], dict[str, float]], batches: Callable[[], Iterable]
    ) -> Measured:
        """Return scores, costs over all evaluation images, and times; further draws show how much they vary."""
        draws = [self._observed(model, number, score) for number in range(self.config.seeds)]
        first, rate = draws[0], self.config.addition_cost
        size = next(iter(batches()))[0].shape[-1]
        dense = dense_macs(profile(model, size))
        figures = {
            "haste/channels_left": first.channels_left,
            "haste/overhead_ratio": sum(layer.overhead(rate) for layer in first.operations.values()) / dense,
            "haste/macs_ratio_without_overhead": first.macs_ratio(dense, 0.0),
        }
        if len(draws) > 1:
            figures |= _spread("top1", [draw.scores["top1"] for draw in draws])
            figures |= _spread("macs_ratio", [draw.macs_ratio(dense, rate) for draw in draws])
        forwards = (model, partial(_plain_forward, model))
        times = wall_clock.seconds_per_image(forwards, (images for images, _ in batches()))
        figures |= dict(zip(("time/inference_s_per_image", "time/inference_dense_s_per_image"), times, strict=True))
        return Measured(first.scores, first.columns(rate), figures)

    def _observed(self, model: nn.Module, draw: int, score: Callable) -> Observation:
        """Return scores and costs with one draw of the hyperplanes; draw 0 is the network's own."""
        from prune_lab.pruning.dynamic.hashed_convolution import hashed_layers

        network = model if draw == 0 else copy.deepcopy(model)
        layers = hashed_layers(network)
        if draw:
            for path, layer in layers.items():
                layer.redraw(self._seed(path, draw))
        return merging_cost.observe(network, layers, score)


def _spread(what: str, values: list[float]) -> dict[str, float]:
    return {f"haste/{what}_mean": statistics.fmean(values), f"haste/{what}_std": statistics.stdev(values)}


def _plain_forward(model: nn.Module, images: Tensor) -> Tensor:
    from prune_lab.pruning.dynamic.hashed_convolution import plain

    with plain(model):
        return model(images)
