"""What the options of a run were matched to, and how closely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

COSTS = {
    "params": ("params/nonzero", "nonzero parameters"),
    "macs": ("macs/inference", "MACs"),
    "train_macs": ("macs/train", "training MACs"),
}
"""kind -> (key of the summary, text)"""


@dataclass(frozen=True)
class Matched:
    """Which budget was matched to which reference, and the outcome."""

    kind: str
    """params, macs or train_macs"""
    to: str
    """the reference, DENSITY:DISTRIBUTION"""
    by: str
    """density or epochs"""
    target: int
    """cost of the reference"""
    planned: int
    """cost of the solved run"""
    solution: float | int
    """sparsity, or epochs of the train block"""
    configured_epochs: int
    """epochs of the train block before they were solved for"""
    detail: str = ""

    def wanted(self) -> list[str]:
        """Return what separates matched runs."""
        return [self.kind, self.to, self.by]

    def line(self) -> str:
        """Return the outcome on one line."""
        what = "sparsity" if self.by == "density" else "epochs"
        off = (self.planned - self.target) / self.target
        return (
            f"matched {self.kind} of {self.to}: {what} {self.solution}{self.detail}, {COSTS[self.kind][1]} "
            f"{self.planned} against {self.target} ({off:+.3%})"
        )

    def figures(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Return flat keys for a summary; `match/achieved` is what the summary counted."""
        what = "sparsity" if self.by == "density" else "epochs"
        return {
            "match/kind": self.kind,
            "match/to": self.to,
            "match/by": self.by,
            "match/target": self.target,
            "match/achieved": summary[COSTS[self.kind][0]],
            f"match/{what}": self.solution,
        }
