"""The functions that select among a layer's weights, by the method's distribution, and the requirements of 2:4."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from prune_lab.foundations.errors import UserError
from prune_lab.pruning.masks import semi_structured, top_k

SEMI_STRUCTURED = "2:4"
"""the distribution whose layers keep two weights in every group of four input channels"""

_NEEDED = {
    "sparsity": (0.5, "two of four weights are kept"),
    "first_layer": ("auto", "layers are chosen by their input channels; keep more of them dense with exclude"),
    "include": ([], "depthwise convolutions have no four input channels to choose among"),
}
"""option -> (the only value compatible with 2:4, why)"""


def selection(distribution: str) -> ModuleType:
    """Return the module with `keep_top`, `grow` and `random_mask` for a distribution: `top_k`, or that for 2:4."""
    return semi_structured if distribution == SEMI_STRUCTURED else top_k


def check_semi_structured(options: Any, path: str) -> None:
    """Raise UserError if an option is incompatible with 2:4; options of any other distribution pass."""
    if options.distribution != SEMI_STRUCTURED:
        return
    for name, (needed, why) in _NEEDED.items():
        value = getattr(options, name, needed)
        if value != needed:
            shown = f"[{','.join(value)}]" if isinstance(value, list) else "null" if value is None else value
            raise UserError(
                f"{path}.{name} must be {needed} with {path}.distribution={SEMI_STRUCTURED}, got {shown}: {why}",
                f"{path}.{name}",
            )
