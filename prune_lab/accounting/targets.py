"""What a run was asked to reach, what it has reached, and whether the two agree. Torch-free.

Budgets that are counted beforehand are met exactly or the run fails; a target that is learned, penalised or rounded to
whole channels may be missed, and a table must show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TOLERANCE = 0.01
"""largest difference, absolute in the unit of the target, that counts as met: about what a channel more or less makes
of a network of some hundred channels, and less than the steps in which published tables give sparsities and costs"""

UNITS = {"sparsity": "sparsity", "gated_sparsity": "sparsity of the gated weights", "macs": "MACs ratio",
         "params": "parameters ratio", "channels": "channels ratio"}  # fmt: skip
"""what a target counts -> its text; a sparsity is the fraction that goes, a ratio the fraction that is kept"""


def figures(asked: Mapping[str, float], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return target/unit, /asked, /reached and /met for a summary; nothing without a target or a figure for it.

    Of several targets, which are limits on the cost, it is the one that binds: whose cost comes nearest to its limit,
    or exceeds it most.
    """
    found = {unit: _reached(unit, summary) for unit in asked}
    known = {unit: value for unit, value in found.items() if value is not None}
    if not known:
        return {}
    unit = max(known, key=lambda name: _excess(name, asked[name], known[name]))
    met = abs(_excess(unit, asked[unit], known[unit])) <= TOLERANCE
    return {"target/unit": unit, "target/asked": asked[unit], "target/reached": known[unit], "target/met": met}


def plan_line(asked: Mapping[str, float]) -> str | None:
    """Return a line on several targets for the plan; None: there is one at most."""
    if len(asked) < 2:
        return None
    return "targets: " + " and ".join(f"{UNITS[unit]} {value:g}" for unit, value in asked.items()) + ", all of them"


def line(summary: Mapping[str, Any]) -> str | None:
    """Return the comparison for the end of a run; None where the requested sparsity is shown already."""
    unit, met = summary.get("target/unit"), summary.get("target/met")
    if unit is None or (met and unit == "sparsity"):
        return None
    text = f"{UNITS[unit]} {summary['target/asked']:g} asked, {summary['target/reached']:.4g} reached"
    return text if met else f"MISSED by more than {TOLERANCE:g}: {text}"


def _excess(unit: str, asked: float, reached: float) -> float:
    """Return by how much the cost exceeds its limit; below 0: it is lower."""
    return asked - reached if unit.endswith("sparsity") else reached - asked


def _reached(unit: str, summary: Mapping[str, Any]) -> float | None:
    """Return the figure of a summary that a target is compared with; None: it has none."""
    if unit == "gated_sparsity":
        density = summary.get("l0/density")
        return None if density is None else 1 - density
    if unit == "params":
        kept = summary.get("params/kept")
        return None if kept is None else kept / summary["params/dense"]
    keys = {"sparsity": ("sparsity/achieved",), "macs": ("macs/inference_ratio",),
            "channels": ("remove/channels_kept", "prune/channels_kept")}  # fmt: skip
    return next((summary[key] for key in keys[unit] if summary.get(key) is not None), None)
