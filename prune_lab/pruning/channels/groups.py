"""The channels of a network that can be removed, and the weights that go with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prune_lab.accounting.eligibility import layer_kind
from prune_lab.foundations.lazy import torch
from prune_lab.pruning.batch_norm.kind import is_norm

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prune_lab.pruning.masks.mask_set import MaskSet


@dataclass(frozen=True)
class Consumer:
    """A layer that reads the channels of a group."""

    path: str
    """module path of an ungrouped convolution or a linear layer"""
    span: int
    """channel i feeds the input columns i * span up to (i + 1) * span: H * W after a flatten, else 1"""


@dataclass(frozen=True)
class ChannelGroup:
    """Hidden channels of one layer that can be removed without a change to any other channel.

    To remove channel i: row i of the producer (weight and bias), entry i of every norm, row i of every follower, and
    its columns of every consumer.
    """

    producer: str
    """module path of the ungrouped convolution or linear layer whose output rows they are"""
    norms: tuple[str, ...]
    """module paths of the batch norms they pass"""
    followers: tuple[str, ...]
    """module paths of other layers with a row per channel: depthwise convolutions, and what makes the factors of a
    squeeze-and-excitation"""
    consumers: tuple[Consumer, ...]
    size: int
    """number of channels"""

    def layers(self) -> tuple[str, ...]:
        """Return the module paths of all convolutions and linear layers that lose weights with a channel."""
        return (self.producer, *self.followers, *(consumer.path for consumer in self.consumers))


@dataclass(frozen=True)
class Lane:
    """Channel classes that the same layers make and read. A class is what is removed at once."""

    name: str
    """module path of the first layer that makes them; #2 ... where that layer makes several lanes"""
    producers: tuple[str, ...]
    """module paths of the layers whose output rows they are; several where additions or products tie them"""
    classes: Tensor
    """int64 [size], rising"""
    summed: bool
    """whether they are added to others: a residual trunk"""

    @property
    def size(self) -> int:
        return len(self.classes)


@dataclass(frozen=True)
class ChannelMap:
    """Which class of channels every row and column of a network belongs to; -1: it stays."""

    rows: dict[str, Tensor]
    """module path of an ungrouped or depthwise convolution or linear layer -> int64 [outputs]"""
    columns: dict[str, Tensor]
    """module path of an ungrouped convolution or linear layer -> int64 [inputs]"""
    norms: dict[str, Tensor]
    """module path of a batch norm -> int64 [channels]"""
    pads: dict[str, tuple[Tensor, Tensor]]
    """module path of a padded shortcut -> classes of its zero channels in front and behind"""
    lanes: tuple[Lane, ...]
    """in the order in which the forward pass reaches their first producers"""
    num_classes: int
    held: Mapping[str, int] = field(default_factory=dict)
    """what channels stay for, but for the outputs -> how many that convolutions and linear layers make, most first"""

    def share(self, free: Sequence[bool]) -> str:
        """Return a line that says how many channels can be removed and what holds the others.

        Args:
            free: per lane, whether the method may remove its channels.
        """
        made = torch.cat([torch.empty(0, dtype=torch.int64), *(self.rows[path] for path in self.columns)])
        made, allowed = made[made >= 0], self.members(free)
        left, once = int(allowed[made].sum()), int(allowed.sum())
        held = Counter(self.held) + Counter({"the method and its options": len(made) - left})
        total, what = left + held.total(), "channels that layers make"
        all_but = f"all {left} {what}, but for the outputs"
        parts = [f"{left} of {total} {what} ({left / total:.1%})" if held else all_but]
        parts += [f"{once} counting tied ones once"] if once < left else []
        parts += [f"others are held by {_most(held)}"] if held else []
        return f"removable: {'; '.join(parts)}"

    def holders(self) -> str:
        """Return a phrase that names the operations which most channels stay for."""
        return f"they are held by {_most(Counter(self.held))}" if self.held else "its layers make the outputs only"

    def members(self, lanes: Sequence[bool]) -> Tensor:
        """Return the classes of some lanes, bool [num_classes].

        Args:
            lanes: per lane, whether it is one of them.
        """
        found = torch.zeros(self.num_classes, dtype=torch.bool)
        for lane, chosen in zip(self.lanes, lanes, strict=True):
            found[lane.classes] = chosen
        return found

    def producers(self) -> list[str]:
        """Return the module paths of all layers that make channels, in the order of the forward pass."""
        return list(self.columns)

    def lane_of(self) -> Tensor:
        """Return the index of each class's lane, int64 [num_classes]."""
        index = torch.zeros(self.num_classes, dtype=torch.int64)
        for number, lane in enumerate(self.lanes):
            index[lane.classes] = number
        return index

    def kept(self, classes: Tensor, alive: Tensor) -> Tensor:
        """Return which of the positions with these classes are left, bool.

        Args:
            alive: bool [num_classes].
        """
        return torch.cat([alive, alive.new_ones(1)])[classes]  # -1 is the last

    def weight_masks(self, alive: Tensor, model: nn.Module) -> dict[str, Tensor]:
        """Return masks that leave out the dead classes' rows and columns: parameter path -> bool, True = kept.

        Where a channel is not read it may carry anything, so the masked network computes what the network without the
        channel does, whatever batch norm makes of its zeros.
        """
        masks = {}
        for path, rows in self.rows.items():
            weight = model.get_parameter(f"{path}.weight")
            mask = self.kept(rows, alive).view(-1, *[1] * (weight.dim() - 1)).expand(weight.shape)
            if path in self.columns:
                mask = mask & self.kept(self.columns[path], alive).view(1, -1, *[1] * (weight.dim() - 2))
            masks[f"{path}.weight"] = mask.contiguous()
        return masks

    def dead(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Return the classes without any weight in their rows or without any in their columns, bool [num_classes]."""
        written, read = self.used(masks)
        return ~(written & read)

    def fraction_kept(self, masks: MaskSet | None) -> float:
        """Return the fraction of the channels that can be removed at all which masks leave; None: no masks."""
        return float((~self.dead({} if masks is None else masks.masks)).double().mean())

    def used(self, masks: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the classes that some weight writes and those that some weight reads, bool [num_classes] each.

        Args:
            masks: parameter path -> bool, True = kept; a parameter that is missing keeps all.
        """
        written, read = (torch.zeros(self.num_classes + 1, dtype=torch.bool) for _ in range(2))
        for path, columns in self.columns.items():
            mask = masks.get(f"{path}.weight")
            rows = self.rows[path]
            used_rows = torch.ones(len(rows), dtype=torch.bool) if mask is None else mask.flatten(1).any(1).cpu()
            used = torch.ones(len(columns), dtype=torch.bool) if mask is None else (
                mask.transpose(0, 1).flatten(1).any(1).cpu()
            )
            written[rows[used_rows]] = True
            read[columns[used]] = True
        return written[:-1], read[:-1]


def _most(held: Counter[str]) -> str:
    named = [f"{holder}: {count}" for holder, count in held.most_common(3)]
    more = f" and {len(held) - 3} more" if len(held) > 3 else ""
    return f"{', '.join(named)}{more}"


def channel_map(model: nn.Module, image_size: int) -> ChannelMap:
    """Return the channel classes of `model`.

    Args:
        image_size: height and width of the RGB images, px; decides how often a flatten repeats a channel.

    Raises:
        UserError: the network's data flow cannot be traced.
    """
    # Not above, so that options are checked without numpy and without torch, whose tracer `trace` subclasses.
    import numpy as np

    from prune_lab.pruning.channels.flow import follow
    from prune_lab.pruning.channels.trace import trace

    flow = follow(trace(model, image_size))
    none = np.empty(0, dtype=np.int64)
    made = np.concatenate([none, *(flow.identities.roots(flow.rows[path]) for path in flow.columns)])
    classes = {root: index for index, root in enumerate(dict.fromkeys(made[made > 0].tolist()))}

    def numbered(ids: np.ndarray) -> Tensor:
        return torch.tensor([classes.get(root, -1) for root in flow.identities.roots(ids).tolist()], dtype=torch.int64)

    normed = {path for path in flow.rows if is_norm(model.get_submodule(path))}
    rows = {path: numbered(ids) for path, ids in flow.rows.items() if path not in normed}
    norms = {path: numbered(ids) for path, ids in flow.rows.items() if path in normed}
    columns = {path: numbered(ids) for path, ids in flow.columns.items()}
    pads = {path: (numbered(front), numbered(back)) for path, (front, back) in flow.pads.items()}
    summed = torch.zeros(len(classes), dtype=torch.bool)
    summed[[classes[root] for root in flow.identities.summed() if root in classes]] = True
    sizes = {path: module.weight.shape[0] for path, module in model.named_modules() if layer_kind(module)}
    return ChannelMap(rows, columns, norms, pads, _lanes(rows, columns, summed), len(classes), flow.held(sizes))


def _lanes(rows: dict[str, Tensor], columns: dict[str, Tensor], summed: Tensor) -> tuple[Lane, ...]:
    """Return the classes in groups that appear in the same rows and columns equally often."""
    num_classes = len(summed)
    if not num_classes:
        return ()
    places = [ids for part in (rows, columns) for ids in part.values()]
    counts = [torch.bincount(ids + 1, minlength=num_classes + 1)[1:] for ids in places]
    signatures, lane_of = torch.unique(torch.stack([*counts, summed.long()], 1), dim=0, return_inverse=True)
    members = [(lane_of == index).nonzero().flatten() for index in range(len(signatures))]
    members.sort(key=lambda classes: int(classes[0]))
    lanes: list[Lane] = []
    names: dict[str, int] = {}
    for classes in members:
        producers = tuple(path for path in columns if bool((rows[path] == classes[0]).any()))
        names[producers[0]] = names.get(producers[0], 0) + 1
        name = producers[0] if names[producers[0]] == 1 else f"{producers[0]}#{names[producers[0]]}"
        lanes.append(Lane(name, producers, classes, bool(summed[classes[0]])))
    return tuple(lanes)


def channel_groups(model: nn.Module, image_size: int) -> list[ChannelGroup]:
    """Return the channels of `model` that are not added to others, by the layer that makes them.

    They pass only through batch norms, pointwise activations, pooling, dropout, a flatten, depthwise convolutions,
    concatenations and squeeze-and-excitation, and only ungrouped convolutions and linear layers read them. Where a
    trunk begins or ends without an addition, as the stem of a ResNet-50 or the last 1x1 convolution of a MobileNet, its
    channels are a group like any other. A layer that is called more than once, or shares its weight, has none.

    Raises:
        UserError: the network's data flow cannot be traced.
    """
    return groups_of(channel_map(model, image_size))


def groups_of(found: ChannelMap) -> list[ChannelGroup]:
    """Return the channels of a map that are not added to others, by the layer that makes them."""
    return [group for lane in found.lanes if (group := _as_group(found, lane)) is not None]


def _as_group(found: ChannelMap, lane: Lane) -> ChannelGroup | None:
    """Return a lane as the outputs of one layer; None where it is more, less, or in another order."""
    producer, members = lane.producers[0], lane.classes
    if lane.summed or not torch.equal(found.rows[producer], members):
        return None
    following = {path: rows for path, rows in found.rows.items() if path != producer and _meets(rows, members)}
    passed = {path: rows for path, rows in found.norms.items() if _meets(rows, members)}
    reading = {path: columns for path, columns in found.columns.items() if _meets(columns, members)}
    spans = {path: len(columns) // len(members) for path, columns in reading.items()}
    in_order = [torch.equal(rows, members) for rows in (*following.values(), *passed.values())]
    in_order += [torch.equal(columns, members.repeat_interleave(spans[path])) for path, columns in reading.items()]
    if not reading or not all(in_order):
        return None  # for example a part of a concatenation
    consumers = tuple(Consumer(path, span) for path, span in spans.items())
    return ChannelGroup(producer, tuple(passed), tuple(following), consumers, len(members))


def _meets(classes: Tensor, members: Tensor) -> bool:
    return bool(torch.isin(classes, members).any())


def columns(channels: Tensor, span: int) -> Tensor:
    """Return the input columns [len(channels) * span] that belong to `channels` (indices or a bool mask over all)."""
    if channels.dtype == torch.bool:
        return channels.repeat_interleave(span)
    return (channels[:, None] * span + torch.arange(span, device=channels.device)).flatten()


def weight_masks(
    model: nn.Module, groups: Sequence[ChannelGroup], kept: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the masks that leave out channels: parameter path -> bool, True = kept, for all layers of `groups`.

    Args:
        kept: producer -> bool [size]; a group that is missing keeps all of its channels.
    """
    device = next(model.parameters()).device
    paths = dict.fromkeys(path for group in groups for path in group.layers())
    masks = {path: torch.ones_like(model.get_parameter(f"{path}.weight"), dtype=torch.bool) for path in paths}
    for group in groups:
        if group.producer not in kept:
            continue
        gone = ~kept[group.producer].to(device)
        for path in (group.producer, *group.followers):
            masks[path][gone] = False
        for consumer in group.consumers:
            masks[consumer.path][:, columns(gone, consumer.span)] = False
    return {f"{path}.weight": mask for path, mask in masks.items()}


def weight_counts(model: nn.Module, groups: Sequence[ChannelGroup], kept: Mapping[str, int]) -> dict[str, int]:
    """Return the weights that `weight_masks` keeps per parameter when each producer keeps so many channels."""
    paths = dict.fromkeys(path for group in groups for path in group.layers())
    counts = {path: model.get_parameter(f"{path}.weight").numel() for path in paths}
    for group in groups:
        for path in group.layers():  # a layer's rows and columns belong to one group each
            counts[path] = counts[path] // group.size * kept.get(group.producer, group.size)
    return {f"{path}.weight": count for path, count in counts.items()}
