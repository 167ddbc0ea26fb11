"""What a phase leaves for the next one, and what it reports. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class PhaseResult:
    """What a phase leaves for the next one, and what it reports."""

    model: dict[str, Tensor]
    """state of the network"""
    masks: dict[str, Tensor] | None
    """parameter path -> bool, True = kept; None: no masks"""
    method: dict[str, Any]
    """what Method.state_dict returned"""
    widths: dict[str, list[int]] | None
    """sizes of a network whose channels were removed (see surgery.Widths); None: as its options build it"""
    optimizer: dict[str, Any] | None
    """state with which the optimizer of the next phase starts; None: anew"""
    figures: dict[str, Any]
    """numbers for the summary"""

    def tensors(self) -> dict[str, Any]:
        """Return everything but the figures, which are stored by themselves."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "figures"}
