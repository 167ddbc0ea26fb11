"""From masks that leave out channels to the network without them, within a run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prune_lab.accounting import eligibility
from prune_lab.accounting.costs import profile
from prune_lab.foundations import distributed
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.pruning.channels import cut_check, surgery
from prune_lab.pruning.channels.groups import ChannelMap, channel_map, groups_of

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.core.context import Context


def remove_dead(context: Context) -> dict[str, float]:
    """Replace the context's network by the one without the channels that its masks leave out; return figures.

    A channel is dead when no weight writes it or none reads it. What a channel that is only read makes of its zeros, by
    a bias or the shift of a batch norm, goes with it. Masks of single weights go on in the layers that are left.

    remove/channels_kept: fraction of the channels that could be removed; remove/difference: largest difference
    between the masked and the smaller network, relative, measured in float64 with random weights.

    Raises:
        UserError: no channel is dead, a layer would be empty, the network is wrapped, an optimizer holds its
            parameters, or the two networks differ.
    """
    if context.optimizer is not None:
        raise UserError("channels are removed between phases: the optimizer of this one holds the old parameters")
    image_size = context.dataset.info.image_size
    channels = channel_map(context.model, image_size)
    masks = {} if context.masks is None else context.masks.masks
    alive = ~channels.dead(masks)
    if bool(alive.all()):
        if context.validating:
            return {}  # what closes is an outcome of the training
        raise UserError(
            "nothing to remove: no channel has all of its weights at zero; prune more, or train longer so that "
            "channels close"
        )
    if lanes := surgery.emptied(channels, alive):
        names = ", ".join(lane.name for lane in lanes)
        raise UserError(f"layers would be left without channels: {names}; prune less, or exclude them")
    difference = cut_check.check_equal(context.model, channels, alive, image_size)
    _replace(context, channels, alive, masks)
    if distributed.world_size() > 1:
        distributed.assert_same(str(context.widths), "widths")
    kept, (written, read) = int(alive.sum()), channels.used(masks)
    constants = int((read & ~written).sum())
    context.report(
        f"removed {channels.num_classes - kept} of {channels.num_classes} channels, tied ones counted once; outputs "
        f"equal the masked network's to {difference:.1e}"
        + (f", but for the constants of {constants} channels that were still read" if constants else "")
    )
    return {"remove/channels_kept": kept / channels.num_classes, "remove/difference": difference}


@dataclass(frozen=True)
class TrialCut:
    """A cut that is tried before the training."""

    channels: ChannelMap
    free: Sequence[bool]
    """per lane, whether the method may remove its channels"""
    alive: Tensor
    """bool [num_classes]: a plausible choice of those to keep"""

    def line(self) -> str:
        """Return a line that says which share of the channels may be removed and what holds the others."""
        return self.channels.share(self.free)


def try_cut(context: Context, cut: TrialCut) -> None:
    """Check a cut that has not been made.

    Raises:
        UserError: the smaller network differs from the masked one.
    """
    if not bool(cut.alive.all()):
        cut_check.check_equal(context.model, cut.channels, cut.alive, context.dataset.info.image_size)


def half_of_groups(context: Context, producers: Collection[str]) -> TrialCut:
    """Return a cut of half of the channels of each group that one of these layers makes."""
    channels = channel_map(context.model, context.dataset.info.image_size)
    names = {group.producer for group in groups_of(channels)}.intersection(producers)
    return half(channels, [lane.name in names for lane in channels.lanes])


def half(channels: ChannelMap, free: Sequence[bool]) -> TrialCut:
    """Return a cut of every second class of the lanes that are free."""
    alive = torch.ones(channels.num_classes, dtype=torch.bool)
    for lane, may_go in zip(channels.lanes, free, strict=True):
        if may_go:
            alive[lane.classes[1::2]] = False
    return TrialCut(channels, free, alive)


def _replace(context: Context, channels: ChannelMap, alive: Tensor, masks: dict[str, Tensor]) -> None:
    small = surgery.remove_channels(context.model, channels, alive)
    left = {name: _cut(mask, name, channels, alive) for name, mask in masks.items()}
    left = {name: mask for name, mask in left.items() if not bool(mask.all())}
    context.model = small
    context.widths = surgery.widths(context.model, channels)
    context.layers = eligibility.reshaped(context.layers, context.model)
    context.costs = list(profile(context.model, context.dataset.info.image_size))
    context.unmask()
    if left:
        context.install_masks(left)


def _cut(mask: Tensor, name: str, channels: ChannelMap, alive: Tensor) -> Tensor:
    """Return the rows and columns of a mask that stay."""
    path = name.removesuffix(".weight")
    if path in channels.rows:
        mask = mask[channels.kept(channels.rows[path], alive).to(mask.device)]
    if path in channels.columns:
        mask = mask[:, channels.kept(channels.columns[path], alive).to(mask.device)]
    return mask

