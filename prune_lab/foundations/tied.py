"""Tensors that a network has under several names (shared modules): written once, read and replaced under each name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


def first_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return for every name the first one under which `state` holds the same tensor, in memory or on "meta"."""
    first: dict[tuple[object, ...], str] = {}
    return {name: first.setdefault(_memory(tensor), name) for name, tensor in state.items()}


def written(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Return a state dict as a safetensors file takes it: contiguous tensors on the CPU, each once, and metadata.

    The metadata maps every other name to the one that is written, as safetensors.torch.save_model does; None: each
    tensor has one name. Tensors that overlap without being the same are copied, because the format refuses them.
    """
    first = first_names(state)
    tensors: dict[str, Tensor] = {}
    storages = set()
    for name, tensor in state.items():
        if first[name] != name:
            continue
        storage = tensor.untyped_storage()._cdata
        tensor = tensor.detach().clone() if storage in storages else tensor.detach()
        tensors[name] = tensor.cpu().contiguous()
        storages.add(storage)
    return tensors, {name: other for name, other in first.items() if name != other} or None


def completed(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return `tensors` with the names that a file leaves out because `model` ties them to one that it holds."""
    first = first_names(model.state_dict())
    held = {first[name]: name for name in reversed([*tensors]) if name in first}
    absent = {name: tensors[held[other]] for name, other in first.items() if name not in tensors and other in held}
    return {**tensors, **absent}


def places(model: nn.Module) -> dict[str, str]:
    """Return every path of a parameter or buffer in a network, each module counted once, with the tensor's name.

    The name is the one under which `named_parameters` or `named_buffers` yield the tensor.
    """
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return {
        f"{path}.{name}" if path else name: names[id(tensor)]
        for path, module in model.named_modules()
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if tensor is not None
    }


def call(model: nn.Module, places: Mapping[str, str], tensors: Mapping[str, Tensor], images: Tensor) -> Any:
    """Return model(images) computed with `tensors` (by name) at the paths in `places`.

    On its own torch's function replaces the tensors of a shared module twice. The second time it restores tensors that
    are not the network's.
    """
    exchanged = {place: tensors[name] for place, name in places.items() if name in tensors}
    return torch.func.functional_call(model, exchanged, (images,), tie_weights=False)


def require_tensors(model: nn.Module, name: str) -> None:
    """Raise UserError if the state of a network holds anything but tensors: a file of tensors cannot store it."""
    state: dict[str, Any] = model.state_dict()
    others = [key for key, value in state.items() if not torch.is_tensor(value)]
    if others:
        raise UserError(f"model.name={name} cannot be saved as tensors: its state {others[0]} is a "
                          f"{type(state[others[0]]).__name__}")  # fmt: skip


def _memory(tensor: Tensor) -> tuple[object, ...]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
