"""From masks that leave out channels to the network without them, within a run."""

from __future__ import annotations

from torch import Tensor

from prune_lab import distributed, surgery
from prune_lab.accounting import profile
from prune_lab.channels import ChannelMap, channel_map
from prune_lab.context import Context
from prune_lab.schema import ConfigError


def remove_dead(context: Context) -> dict[str, float]:
    """Replace the context's network by the one without the channels that its masks leave out; return figures.

    A channel is dead when no weight writes it or none reads it. What a channel that is only read makes of its zeros, by
    a bias or the shift of a batch norm, goes with it. Masks of single weights go on in the layers that are left.

    remove/channels_kept: fraction of the channels that could be removed; remove/difference: largest difference
    between the outputs of the masked and of the smaller network, relative, measured with random batch norms.

    Raises:
        ConfigError: no channel is dead, a layer would be empty, the network is wrapped, or an optimizer holds its
            parameters.
        RuntimeError: the outputs differ.
    """
    if context.optimizer is not None:
        raise ConfigError("channels are removed between phases: the optimizer of this one holds the old parameters")
    image_size = context.dataset.info.image_size
    channels = channel_map(context.model, image_size)
    masks = {} if context.masks is None else context.masks.masks
    alive = ~channels.dead(masks)
    if bool(alive.all()):
        if context.rehearsal:
            return {}  # what closes is an outcome of the training
        raise ConfigError(
            "nothing to remove: no channel has all of its weights at zero; prune more, or train longer so that "
            "channels close"
        )
    if lanes := surgery.emptied(channels, alive):
        names = ", ".join(lane.name for lane in lanes)
        raise ConfigError(f"layers would be left without channels: {names}; prune less, or exclude them")
    difference = surgery.check_equal(context.model, channels, alive, image_size)
    _replace(context, channels, alive, masks)
    if distributed.world_size() > 1:
        distributed.assert_same(str(context.widths), "widths")
    kept, (written, read) = int(alive.sum()), channels.used(masks)
    constants = int((read & ~written).sum())
    context.report(
        f"removed {channels.num_classes - kept} of {channels.num_classes} channels; outputs equal the masked "
        f"network's to {difference:.1e}"
        + (f", but for the constants of {constants} channels that were still read" if constants else "")
    )
    return {"remove/channels_kept": kept / channels.num_classes, "remove/difference": difference}


def _replace(context: Context, channels: ChannelMap, alive: Tensor, masks: dict[str, Tensor]) -> None:
    small = surgery.remove_channels(context.model, channels, alive)
    left = {name: _cut(mask, name, channels, alive) for name, mask in masks.items()}
    left = {name: mask for name, mask in left.items() if not bool(mask.all())}
    context.model = small
    context.widths = surgery.widths(context.model, channels)
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

