"""Published figures that a recipe is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import suggestion


@dataclass(frozen=True)
class PaperConfig:
    """What a publication reports for the run that a recipe describes; changes nothing about the run."""

    cite: str
    """authors, year, arXiv number"""
    where: str
    """table or figure, and row"""
    certainty: Literal["paper", "abstract", "report", "code", "author", "issue", "figure", "summary", "third-party",
                       "derived", "memory"]
    """where the values were read: `report` is a reproduction's, `summary` a text about the paper, `memory` unchecked"""
    values: dict[str, float]
    """published numbers under the keys of summary.json"""
    std: dict[str, float]
    """their standard deviations over seeds, where published"""
    remark: str | None
    """where the recipe differs from the paper, or how its numbers were counted"""

    def check(self, path: str) -> None:
        for name, numbers in (("values", self.values), ("std", self.std)):
            for key in numbers:
                if key not in PAPER_KEYS:
                    raise UserError(f"unknown key {path}.{name}.{key}{suggestion(key, PAPER_KEYS)}; "
                                      f"allowed: {', '.join(PAPER_KEYS)}", path)  # fmt: skip
        for key, value in self.std.items():
            if key not in self.values or value < 0:
                raise UserError(f"{path}.std.{key} must be 0 or more, of a number that {path}.values has", path)


PAPER_KEYS = ("final/top1", "final/top5", "test/top1", "test/top5", "dense/top1", "delta/top1", "sparsity/achieved",
              "sparsity/all_parameters", "params/nonzero", "params/total", "params/dense", "macs/dense",
              "macs/inference", "macs/inference_ratio", "macs/train_ratio", "macs/train_ratio_paper")  # fmt: skip
"""keys of summary.json that a publication may report"""
