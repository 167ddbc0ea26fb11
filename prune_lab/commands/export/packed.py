"""2:4 networks as a file: kept values and their positions in groups of four input channels, all else unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from prune_lab import models
from prune_lab.accounting.eligibility import has_groups
from prune_lab.commands.export.formats import NotExportable
from prune_lab.commands.export.sparse import zeros
from prune_lab.foundations import tied
from prune_lab.pruning.channels import surgery
from prune_lab.pruning.masks.semi_structured import is_semi_structured, pack, unpack

_FILE = "model_2_4.safetensors"
_VALUES, _PLACES = ".values", ".places"


def layers_2_4(model: nn.Module) -> list[str]:
    """Return the paths of the layers that have at most two weights in every group of four input channels."""
    return [path for path, module in _candidates(model) if is_semi_structured(module.weight)]


def check(model: nn.Module) -> None:
    """Raise NotExportable unless some layers are 2:4 and all others have few zeros, naming one that is not."""
    found = set(layers_2_4(model))
    others = [(path, module) for path, module in _candidates(model) if path not in found]
    pruned = [path for path, module in others if zeros(module.weight) >= 0.5]  # fewer: intentionally dense
    wrong = pruned or ([] if found else [path for path, _ in others])
    if wrong:
        raise NotExportable(f"the network is not 2:4: {wrong[0]} has groups of four input channels with more than two "
                            "weights; train with method.distribution=2:4")
    if not found:
        raise NotExportable("the network is not 2:4: no layer has a multiple of four input channels")


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and has_groups(tuple(module.weight.shape)):
            yield path, module


def write_packed(model: nn.Module, description: dict[str, Any], folder: Path) -> None:
    """Write the network; a dense one has nothing to pack and is written whole."""
    tensors, other_names = tied.written(model.state_dict())
    for path in layers_2_4(model):
        name = f"{path}.weight"
        if name not in tensors:  # tied to a packed layer
            continue
        values, places = pack(tensors.pop(name))
        tensors |= {name + _VALUES: values.contiguous(), name + _PLACES: places.contiguous()}
    save_file(tensors, folder / _FILE, metadata={"description": json.dumps(description), **(other_names or {})})


def load_packed(folder: Path) -> nn.Module:
    """Return the network of `write_packed` with its zeros, in eval mode on the CPU."""
    with safe_open(folder / _FILE, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        description = json.loads(file.metadata()["description"])
    for name in [name.removesuffix(_PLACES) for name in tensors if name.endswith(_PLACES)]:
        tensors[name] = unpack(tensors.pop(name + _VALUES), tensors.pop(name + _PLACES))
    model = models.from_description(description)
    surgery.narrow(model, description.get("channels", {}))
    model.load_state_dict(tied.completed(tensors, model))
    return model.eval()
