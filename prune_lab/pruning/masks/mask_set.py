"""The masks of a network, which keep pruned weights at zero."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prune_lab.accounting.device_counts import DeviceCounts


class MaskSet:
    """The masks of a network, True = kept, keyed by parameter path.

    Masks take the memory format of their weights, so that one fused multiplication applies them all.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        """Install `masks` on `parameters`.

        Raises:
            ValueError: names that do not match, wrong shape, or a mask that is not bool.
        """
        self._parameters = dict(parameters)
        self.masks: dict[str, Tensor] = {}
        self.replace_all(masks)

    def replace(self, name: str, mask: Tensor) -> None:
        """Install a new mask for parameter `name`; the weights follow at the next `apply`."""
        if name not in self._parameters:
            raise ValueError(f"no parameter {name} under masks")
        self.kept = DeviceCounts(self.counts() | {name: int(self._put(name, mask))})

    def replace_all(self, masks: Mapping[str, Tensor]) -> None:
        """Install new masks for all parameters, as `replace` does; their counts stay on the device until read."""
        if set(self._parameters) != set(masks):
            raise ValueError(f"masks and parameters differ: {sorted(set(self._parameters) ^ set(masks))}")
        self.kept = DeviceCounts({name: self._put(name, masks[name]) for name in self.masks or list(masks)})

    def _put(self, name: str, mask: Tensor) -> Tensor:
        """Store a mask and return its count, still on the device."""
        weight = self._parameters[name]
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            wanted, got = tuple(weight.shape), tuple(mask.shape)
            raise ValueError(f"mask of {name} must be bool of shape {wanted}, got {mask.dtype} {got}")
        self.masks[name] = torch.empty_like(weight, dtype=torch.bool).copy_(mask)
        return torch.count_nonzero(self.masks[name])

    @torch.no_grad()
    def apply(self) -> None:
        """Zero every pruned weight in place."""
        torch._foreach_mul_([self._parameters[name] for name in self.masks], list(self.masks.values()))

    @torch.no_grad()
    def mask_grads(self) -> None:
        """Zero the gradients of pruned weights in place."""
        named = [(grad, mask) for name, mask in self.masks.items() if (grad := self._parameters[name].grad) is not None]
        torch._foreach_mul_([grad for grad, _ in named], [mask for _, mask in named])

    def masked_grads(self) -> dict[str, Tensor]:
        """Return copies of the gradients with zeros at pruned positions."""
        found = {name: grad for name in self.masks if (grad := self._parameters[name].grad) is not None}
        grads = torch._foreach_mul(list(found.values()), [self.masks[name] for name in found])
        return dict(zip(found, grads, strict=True))

    def counts(self) -> dict[str, int]:
        """Return kept weights per parameter; the first time after `replace_all` the host waits for the device."""
        return self.kept.read()

    @property
    def num_kept(self) -> int:
        return sum(self.counts().values())

    @property
    def num_weights(self) -> int:
        return sum(mask.numel() for mask in self.masks.values())

    @property
    def density(self) -> float:
        return self.num_kept / self.num_weights

    def digest(self) -> str:
        """Return a hash of all masks in row-major order."""
        hasher = hashlib.sha256()
        for name, mask in self.masks.items():
            hasher.update(name.encode())
            hasher.update(mask.contiguous().cpu().numpy().tobytes())
        return hasher.hexdigest()

    @torch.no_grad()
    def zero_state(self, optimizer: torch.optim.Optimizer, positions: Mapping[str, Tensor]) -> None:
        """Zero the optimizer's state (momentum, both Adam moments) at `positions`; step counters stay.

        Raises:
            ValueError: the optimizer has a state tensor of another shape than the weight, whose meaning is unknown.
        """
        for name, where in positions.items():
            parameter = self._parameters[name]
            for key, value in optimizer.state.get(parameter, {}).items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    value.masked_fill_(where, 0)
                elif torch.is_tensor(value) and value.numel() != 1:
                    raise ValueError(f"optimizer state {key} of {name} has shape {tuple(value.shape)}: cannot reset it")

    @torch.no_grad()
    def mask_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero the optimizer's running means of every pruned weight."""
        named = [(self._parameters[name], mask) for name, mask in self.masks.items()]
        states = [(value, mask) for parameter, mask in named for value in optimizer.state.get(parameter, {}).values()
                  if torch.is_tensor(value) and value.shape == parameter.shape]
        if states:
            torch._foreach_mul_([value for value, _ in states], [mask for _, mask in states])

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.masks)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore masks.

        Raises:
            ValueError: names or shapes differ from the current ones.
        """
        if set(state) != set(self.masks):
            raise ValueError(f"masks in the file are for other parameters: {sorted(set(state) ^ set(self.masks))}")
        for name, mask in state.items():
            self.replace(name, mask)
