"""Greedy forward selection: each layer starts empty and regains first the channels that best restore its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from prune_lab.accounting import eligibility
from prune_lab.core import removal, short_training
from prune_lab.core.card import Card
from prune_lab.core.images import DrawnImages, evenly
from prune_lab.core.method import Method, MethodConfig
from prune_lab.core.phase import FINETUNE, PRUNE, REMOVE, TRAIN_DENSE, Phase
from prune_lab.foundations import distributed, patterns
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import Count, Momentum, NonNegative, OpenFraction, Positive, Range, require_one
from prune_lab.pruning.channels import imitation, probe
from prune_lab.pruning.channels.budget import alike, macs
from prune_lab.pruning.channels.groups import channel_groups, channel_map, weight_counts, weight_masks
from prune_lab.pruning.scores import evaluation_mode

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prune_lab.accounting.eligibility import Layer
    from prune_lab.config.run import RunConfig
    from prune_lab.core.context import Context
    from prune_lab.core.removal import TrialCut
    from prune_lab.pruning.channels.costs import Unit
    from prune_lab.pruning.channels.groups import ChannelGroup
    from prune_lab.pruning.channels.probe import Objective, WeighedNetwork


_GLOBAL = ("global-code", "global")
_MAY_REPEAT = ("local-uniform", "global-code")
_PATIENCE = 10
"""additions allowed without a new channel, per channel of the layer; step searches can cycle among a few"""


@dataclass(frozen=True)
class GreedyConfig(MethodConfig):
    variant: Literal["local-refit", "local-line-search", "local-uniform", "global-code", "global"]
    """criterion for choosing a channel, and its weight when added"""
    macs_ratio: OpenFraction | None
    """kept fraction of the network's MACs; every layer keeps about the same fraction of its channels"""
    params_ratio: OpenFraction | None
    """kept fraction of the network's parameters, likewise"""
    channels_ratio: OpenFraction | None
    """kept fraction of each layer's channels"""
    top1_tol: OpenFraction | None
    """each layer grows until the training accuracy is at most this fraction below its value before that layer"""
    skip_eval_converge: Annotated[float, Range(0, 1, open_high=True)]
    """top1_tol: the accuracy is measured once that on a minibatch is at most this fraction below its original value"""
    eval_images: Count
    """top1_tol: training images for measuring the accuracy"""
    repeat: bool
    """local-uniform, global-code: a channel may be added repeatedly; its weight is its fraction of the additions"""
    loss: Literal["cross_entropy", "output_distance"]
    """global variants: loss on the labels, or squared distance of the logits to those before the layer was pruned"""
    candidates: Literal["taylor", "random"]
    """global variants: which channels are tried in each step"""
    num_evaluate: Count
    """global variants: number of channels tried in each step"""
    batch: Count
    """images of the minibatch for measuring losses"""
    fresh_batch: bool
    """global variants: a new minibatch for each addition"""
    images: Count
    """local variants: training images on which the layer's output is imitated"""
    positions: Count
    """local variants: positions per image, if the next layer is a convolution"""
    augment_scoring: bool
    """whether the images of all these measurements are cropped and flipped as in training"""
    exclude: list[str]
    """patterns of layers that keep all of their output channels"""
    between_epochs: NonNegative
    """epochs of training after each pruned layer"""
    between_lr: Positive
    between_momentum: Momentum
    between_weight_decay: NonNegative
    between_batch: Count

    GOALS = ("macs_ratio", "params_ratio", "channels_ratio", "top1_tol")

    def check(self, path: str) -> None:
        require_one(path, {name: getattr(self, name) for name in self.GOALS})
        if self.repeat and self.variant not in _MAY_REPEAT:
            raise UserError(
                f"{path}.repeat=true is for {path}.variant={' or '.join(_MAY_REPEAT)}; {self.variant} has a rule of "
                "its own"
            )
        for option, usual in (("loss", "cross_entropy"), ("candidates", "taylor")):
            if getattr(self, option) != usual and self.variant not in _GLOBAL:
                raise UserError(
                    f"{path}.{option}={getattr(self, option)} is for {path}.variant={' or '.join(_GLOBAL)}; "
                    f"{self.variant} does without a loss"
                )


class Greedy(Method):
    needs_images = "it removes channels of convolutions"
    Config = GreedyConfig
    card = Card(
        summary="train dense, then rebuild each layer from its most useful channels, re-weighted; fine-tune",
        paper="Ye, Gong, Nie, Zhou, Klivans, Liu 2020, Good Subnetworks Provably Exist: Pruning via Greedy Forward "
        "Selection, arXiv 2003.01794; Ye, Wu, Liu 2020, Greedy Optimization Provably Wins the Lottery, "
        "arXiv 2010.15969",
        acts="between dense training and fine-tuning, layer after layer from the input, with a little training between",
        eligible="channels that are not added to others; only batch norm, activations, pooling, depthwise convolutions "
        "and squeeze-and-excitation separate them from their readers",
        cost="local: one pass over method.images per layer; global: method.num_evaluate passes per channel; "
        "method.between_epochs of training per layer",
        differences="the official code has variant=global-code with candidates=random, top1_tol=0.02, batch=128 and "
        "augment_scoring=true, for MobileNetV2 only, where it leaves out the first block and the last 1x1 convolution "
        "(exclude=[features.0.0,features.18.0]) and also drops channels of its residual sums, which stay here. "
        "Under squeeze-and-excitation the layer that reads the channels' means is imitated, too. The closed form of "
        "local-line-search and the refit (least squares) are derived, not taken from the papers",
    )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._spent = 0

    def check_run(self, config: RunConfig) -> None:
        """Reject choosing channels of an untrained network."""
        config.require_trained(f"method={self.config.name}")

    def chain(self) -> tuple[Phase, ...]:
        return (TRAIN_DENSE, PRUNE, REMOVE, FINETUNE)

    def asked(self) -> dict[str, float]:
        """Return the target for the whole network; channels and accuracy are targets per layer."""
        targets = {"macs": self.config.macs_ratio, "params": self.config.params_ratio}
        return {unit: value for unit, value in targets.items() if value is not None}

    def layers(self, model: nn.Module) -> list[Layer]:
        """Return all layers, including depthwise ones: their filters are removed with the channel."""
        return eligibility.select_layers(model, include=["*"])

    def layout(self, context: Context) -> list[tuple[int, dict[str, int]]] | None:
        """Return the kept weights of the budget; with top1_tol they depend on trained weights."""
        if context.widths is not None:
            left = {cost.parameter: cost.weights for cost in context.costs}
            return None if self.config.top1_tol else [(0, left)]
        groups = self.groups(context)
        budget = self.budget(context, groups)
        if budget is None:
            return None
        whole = {layer.parameter: layer.size for layer in context.eligible()}
        return [(0, whole | weight_counts(context.model, groups, budget))]

    def groups(self, context: Context) -> list[ChannelGroup]:
        """Return the channel groups to prune, from input to output.

        Raises:
            UserError: there are none, or a pattern of method.exclude matches none.
        """
        found = channel_groups(context.model, context.dataset.info.image_size)
        names = [group.producer for group in found]
        patterns.check("method.exclude", self.config.exclude, names, "layer whose channels can be removed")
        groups = [group for group in found if not patterns.matches(self.config.exclude, group.producer)]
        if not groups:
            if found:
                raise UserError("method.exclude leaves no layer to prune")
            raise UserError("method=greedy: no hidden channels of this network can be removed on their own")
        return groups

    def trial_cut(self, context: Context) -> TrialCut:
        """Return a cut of half of the channels of each group."""
        return removal.half_of_groups(context, {group.producer for group in self.groups(context)})

    def budget(self, context: Context, groups: list[ChannelGroup]) -> dict[str, int] | None:
        """Return the number of channels that each producer keeps; None: the accuracy decides.

        Raises:
            UserError: a target below the cost of one channel per layer.
        """
        config = self.config
        if config.channels_ratio is not None:
            return {group.producer: max(1, round(config.channels_ratio * group.size)) for group in groups}
        if config.top1_tol is not None:
            return None
        unit: Unit = "macs" if config.params_ratio is None else "params"
        return alike(context.network, groups, unit, getattr(config, f"{unit}_ratio"))

    def prune(self, context: Context) -> dict[str, float]:
        """Select the channels of each group, write their weights into the network, train briefly, repeat."""
        groups = self.groups(context)
        budget = self.budget(context, groups)
        masks: dict[str, Tensor] = {}
        for number, group in enumerate(groups):
            counts = {name: int(mask.sum()) for name, mask in masks.items()}
            if context.validating and number:
                count = group.size if budget is None else budget[group.producer]
                masks[group.producer] = torch.arange(group.size) < count
            else:
                want = None if budget is None else budget[group.producer]
                cost = macs(context.network, groups, counts)
                masks[group.producer] = self._prune_group(context, group, want, cost)
            kept = masks[group.producer]
            if not context.validating:
                context.report(f"{group.producer}: {int(kept.sum())} of {group.size} channels kept")
            if not bool(kept.all()) and not (context.validating and number):
                counts[group.producer] = int(kept.sum())
                self._train_between(context, groups, masks, macs(context.network, groups, counts))
        whole = {layer.parameter: torch.ones(layer.shape, dtype=torch.bool) for layer in context.eligible()}
        whole = {name: mask.to(context.device) for name, mask in whole.items()}
        context.install_masks(whole | weight_masks(context.model, groups, masks))
        found = channel_map(context.model, context.dataset.info.image_size)
        return {"prune/channels_kept": found.fraction_kept(context.masks)}

    def phase_cost(self, context: Context) -> int | None:
        """Return the MACs of selection and of the training between layers.

        With a ratio they are known in advance, except for a global variant that may add channels repeatedly. Otherwise
        they are None in a dry run, and the actual MACs afterwards. Images for the accuracy of top1_tol are counted; the
        arithmetic on Gram matrices is not (it is not a pass through the network).
        """
        return self._planned(context) if context.validating and context.widths is None else self._spent

    def _prune_group(self, context: Context, group: ChannelGroup, want: int | None, macs: int) -> Tensor:
        """Choose and re-weight the channels of one group; return the kept ones, bool [size]."""
        with evaluation_mode.preserve_state(context.model, train_mode=False), torch.no_grad():
            context.model.requires_grad_(False)  # gradients are those of the multipliers: earlier layers need no graph
            kept, weights = distributed.share(self._select(context, group, want, macs))
        mask = torch.zeros(group.size, dtype=torch.bool)
        mask[kept] = True
        if not bool(mask.all()):
            probe.fold(context.model, group, mask, group.size * weights)
        return mask

    def _select(
        self, context: Context, group: ChannelGroup, want: int | None, macs: int
    ) -> tuple[list[int], Tensor]:
        """Return (kept channels, weights a): the first `want` added, or as many as the accuracy needs."""
        source = DrawnImages(context, group.producer, augment=self.config.augment_scoring)
        objective: Objective = self.config.loss if self.config.variant in _GLOBAL else "cross_entropy"
        with probe.WeighedNetwork(context.model, group, objective=objective) as network:
            if self.config.variant in _GLOBAL:
                additions = self._global(network, source)
            else:
                additions = self._local(context, group, source, macs)
            enough = self._enough(context, network, source, want)
            kept, weights = self._grow(context, additions, enough, group.size, want)
        self._spent += network.num_images * macs
        return kept, weights

    def _grow(
        self, context: Context, additions: Iterator, enough: Callable, size: int, want: int | None
    ) -> tuple[list[int], Tensor]:
        kept: list[int] = []
        weights = torch.zeros(size, dtype=torch.float64)
        for kept, weights in imitation.growing(additions, patience=_PATIENCE * size):
            context.poll()
            if context.validating or enough(kept, weights):
                break
        else:
            want = size if want is None else want  # never within the tolerance: the layer is kept whole
        missing = [index for index in range(size) if index not in kept][: (want or 0) - len(kept)]
        return (kept + missing if want else kept), weights  # without a weight: their readers start from zero

    def _local(self, context: Context, group: ChannelGroup, source: DrawnImages, macs: int) -> Iterator:
        config = self.config
        positions = source.positions("imitation", config.images).split(config.batch)
        data = source.read("imitation", positions)
        places = {"num_positions": config.positions, "generator": context.generator("positions", group.producer)}
        gram = probe.group_gram(context.model, group, data, **places)
        if not bool(torch.isfinite(gram).all()):
            raise UserError(
                f"outputs of {group.producer} are infinite or NaN: look at the trained weights, or lower "
                "method.between_lr"
            )
        self._spent += sum(map(len, positions)) * macs
        if config.variant == "local-refit":
            return imitation.refit(gram)
        if config.variant == "local-line-search":
            return imitation.line_search(gram)
        return imitation.fixed_step(gram, repeat=config.repeat)

    def _global(self, network: WeighedNetwork, source: DrawnImages) -> Iterator:
        config, size = self.config, network.group.size
        search = config.variant == "global"
        minibatches = source.stream("minibatch", config.batch, fresh=config.fresh_batch)
        draws = source.context.generator("candidates", network.group.producer)
        shown = None

        def shortlist(weights: Tensor, allowed: Tensor) -> list[int]:
            nonlocal shown
            source.context.poll()
            batch = next(minibatches)
            if batch is not shown:
                network.see(*batch)
                shown = batch
            pool = allowed.nonzero().flatten()
            if config.candidates == "random" or not bool(weights.any()):  # an empty layer has no gradient to rank by
                chosen = pool[torch.randperm(len(pool), generator=draws)]
            else:
                chosen = pool[network.slopes(weights)[pool].argsort(stable=True)]
            return chosen[: config.num_evaluate].tolist()

        return imitation.descend(size, network.loss, shortlist, repeat=config.repeat or search, search=search)

    def _enough(
        self, context: Context, network: WeighedNetwork, source: DrawnImages, want: int | None
    ) -> Callable[[list[int], Tensor], bool]:
        """Return the stopping criterion of a layer's growth."""
        if want is not None:
            return lambda kept, weights: len(kept) >= want
        config = self.config
        if context.validating:
            return lambda kept, weights: True
        spread = evenly(context.dataset.info.num_train, config.eval_images).split(config.batch)
        first_look = list(source.stream("first look", config.batch, fresh=False, count=1))

        def accuracy(weights: Tensor | None) -> float:
            return network.accuracy(source.read("accuracy", spread), weights)

        # Each compared with its own images: a minibatch of hard ones would never approach the accuracy on all.
        before, first_before = accuracy(None), network.accuracy(first_look, None)

        def enough(kept: list[int], weights: Tensor) -> bool:
            if network.accuracy(first_look, weights) < (1 - config.skip_eval_converge) * first_before:
                return False
            return accuracy(weights) >= (1 - config.top1_tol) * before

        return enough

    def _train_between(
        self, context: Context, groups: list[ChannelGroup], kept: dict[str, Tensor], macs: int
    ) -> None:
        """Train the whole network briefly, with batch-norm batch statistics; removed channels stay zero."""
        config = self.config
        steps, batch = self._between_steps(context)
        if not steps:
            return
        key = f"between {len(kept)}"
        source = DrawnImages(context, key, augment=True)
        num_images = short_training.short_finetune(
            context,
            source.stream("order", batch, fresh=True, count=1 if context.validating else steps),
            weight_masks(context.model, groups, kept),
            key=key,
            lr=config.between_lr,
            momentum=config.between_momentum,
            weight_decay=config.between_weight_decay,
        )
        self._spent += 3 * num_images * macs

    def _between_steps(self, context: Context) -> tuple[int, int]:
        """Return (steps, images per step) of the training after a layer."""
        num_train = context.dataset.info.num_train
        batch = min(self.config.between_batch, num_train)
        epochs = self.config.between_epochs
        return (max(1, round(epochs * num_train / batch)) if epochs else 0), batch

    def _planned(self, context: Context) -> int | None:
        groups = self.groups(context)
        budget = self.budget(context, groups)
        repeats = self.config.variant == "global" or (self.config.variant == "global-code" and self.config.repeat)
        if budget is None or repeats:
            return None
        steps, batch = self._between_steps(context)
        done: dict[str, int] = {}
        total = 0
        for group in groups:
            want = budget[group.producer]
            total += self._images_for(context, group.size, want) * macs(context.network, groups, done)
            done[group.producer] = want
            total += 3 * batch * steps * macs(context.network, groups, done) if want < group.size else 0
        return total

    def _images_for(self, context: Context, size: int, want: int) -> int:
        """Return the images that pass the network while `want` of `size` channels are chosen; global: none repeated."""
        config, num_train = self.config, context.dataset.info.num_train
        if config.variant not in _GLOBAL:
            return min(config.images, num_train)
        passes = sum(min(config.num_evaluate, size - have) for have in range(want))
        passes += 2 * (want - 1) if config.candidates == "taylor" else 0
        if config.loss == "output_distance":
            passes += want if config.fresh_batch else 1
        return passes * min(config.batch, num_train)
