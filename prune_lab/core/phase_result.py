"""The result of a phase: its state for the next one and its figures. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class PhaseResult:
    """The state that a phase passes to the next one, and the figures that it reports."""

    model: dict[str, Tensor]
    """state of the network"""
    masks: dict[str, Tensor] | None
    """parameter path -> bool, True = kept; None: no masks"""
    method: dict[str, Any]
    """result of Method.state_dict"""
    widths: dict[str, list[int]] | None
    """sizes of a network whose channels were removed (see surgery.Widths); None: as its options build it"""
    optimizer: dict[str, Any] | None
    """initial state of the next phase's optimizer; None: fresh"""
    figures: dict[str, Any]
    """numbers for the summary"""

    def tensors(self) -> dict[str, Any]:
        """Return everything but the figures, which are stored separately."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "figures"}
