"""History of the masks in a phase: explored positions, overlap with the start, dead filters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_INITIAL, _EVER = 1, 2


class MaskHistory:
    """The first masks of a phase and every position that has been active since, keyed by parameter path.

    Both are bits of one byte per weight: two bool copies of the masks would take a tenth of a small batch's memory.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._bits = {name: mask.to(torch.uint8) * (_INITIAL | _EVER) for name, mask in masks.items()}

    @property
    def initial(self) -> dict[str, Tensor]:
        """bool, built at each call"""
        return {name: (bits & _INITIAL).bool() for name, bits in self._bits.items()}

    @property
    def ever(self) -> dict[str, Tensor]:
        """bool, built at each call"""
        return {name: (bits & _EVER).bool() for name, bits in self._bits.items()}

    def observe(self, masks: Mapping[str, Tensor]) -> None:
        """Record the current masks."""
        for name, mask in masks.items():
            self._bits[name] |= mask.to(torch.uint8) * _EVER

    def totals(self, masks: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the figures of the whole network, without those per layer."""
        return {key: value for key, value in self.figures(masks).items() if key.count("/") == 1}

    def figures(self, masks: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the flat figures of an epoch's record.

        mask/exploration: fraction of positions active at least once since the phase began, R_s of Liu et al. 2021,
            arXiv 2102.02887.
        mask/overlap: fraction of the active weights that were active at the start.
        mask/dead_filters: output channels and neurons without any weight.
        mask/density/LAYER: kept fraction of a layer's weights; the three above also have a value per layer.
        """
        layers = {name: name.removesuffix(".weight") for name in masks}
        rows = torch.stack(
            [
                torch.stack(
                    [
                        mask.sum(),
                        (self._bits[name] & _EVER).count_nonzero(),
                        (mask & (self._bits[name] & _INITIAL).bool()).sum(),
                        (~mask.flatten(1).any(1)).sum(),
                    ]
                )
                for name, mask in masks.items()
            ]
        ).tolist()  # one transfer from the device
        sizes = [mask.numel() for mask in masks.values()]
        active, ever, same, dead = (sum(column) for column in zip(*rows, strict=True))
        figures: dict[str, float] = {
            "mask/exploration": ever / sum(sizes),
            "mask/overlap": same / active if active else 0.0,
            "mask/dead_filters": dead,
        }
        for layer, size, row in zip(layers.values(), sizes, rows, strict=True):
            figures[f"mask/density/{layer}"] = row[0] / size
            figures[f"mask/exploration/{layer}"] = row[1] / size
            figures[f"mask/overlap/{layer}"] = row[2] / row[0] if row[0] else 0.0
            figures[f"mask/dead_filters/{layer}"] = row[3]
        return figures

    def state_dict(self) -> dict[str, Any]:
        return {"initial": self.initial, "ever": self.ever}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, bits in self._bits.items():
            initial, ever = (state[kind][name].to(bits) for kind in ("initial", "ever"))
            bits.copy_(initial * _INITIAL | ever * _EVER)
