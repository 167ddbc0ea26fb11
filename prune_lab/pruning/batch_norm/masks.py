"""Masks over batch-norm channels: read from a file, and converted between channels and the classes removed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import suggestion
from prune_lab.pruning.channels.groups import ChannelMap

if TYPE_CHECKING:
    from torch import Tensor


def load(path: str, channels: ChannelMap) -> Tensor:
    """Return the classes of channels that a file keeps, bool [num_classes].

    Args:
        path: JSON, {module path of a batch norm: [true for each kept channel, else false]}; a norm that is missing
            keeps all. Norms whose outputs are added must agree.

    Raises:
        UserError: unreadable file, no batch norm of the network, another number of channels, values other than true
            and false, a norm without channels, norms that disagree, channels that cannot be removed.
    """
    option = f"method.mask_file={path}"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{option} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise UserError(f"{option} must hold a mapping of batch norm to a list of true (stays) and false")
    masks = {name: _mask(f"{option}: {name}", name, values, channels) for name, values in content.items()}
    return _classes(option, channels, masks)


def _mask(what: str, name: str, values: object, channels: ChannelMap) -> Tensor:
    if name not in channels.norms:
        raise UserError(f"{what} is no batch norm of this network{suggestion(name, channels.norms)}")
    size = len(channels.norms[name])
    if not isinstance(values, list) or not all(isinstance(value, bool) for value in values):
        raise UserError(f"{what} must be a list of true (stays) and false")
    if len(values) != size:
        raise UserError(f"{what} has {len(values)} entries, the batch norm has {size} channels; is the mask that of "
                          "a network that was pruned before?")
    if not any(values):
        raise UserError(f"{what} leaves no channel")
    return torch.tensor(values)


def _classes(option: str, channels: ChannelMap, masks: Mapping[str, Tensor]) -> Tensor:
    kept = torch.ones(channels.num_classes + 1, dtype=torch.bool)  # the last: channels that must stay
    for name, mask in masks.items():
        kept[channels.norms[name][~mask]] = False
    if not kept[-1]:
        names = [name for name, mask in masks.items() if bool((channels.norms[name][~mask] < 0).any())]
        raise UserError(f"{option}: {', '.join(names)} would lose channels that cannot be removed")
    for name, mask in masks.items():
        if bool((mask & ~kept[channels.norms[name]]).any()):
            raise UserError(f"{option}: {name} keeps channels that another batch norm leaves out, to whose outputs "
                              "they are tied; give both the same mask")
    return kept[:-1]


def left_out(channels: ChannelMap, alive: Tensor) -> dict[str, Tensor]:
    """Return the removed channels of each batch norm: module path -> bool [channels], True = removed.

    Args:
        alive: bool [num_classes].
    """
    return {path: ~channels.kept(rows, alive) for path, rows in channels.norms.items()}
