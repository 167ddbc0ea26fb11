"""The target of a run, the value it reached, and whether the two agree. Torch-free.

Budgets that are counted beforehand are met exactly or the run fails. A target that is learned, penalised or rounded to
whole channels may be missed, and tables must show that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TOLERANCE = 0.01
"""largest difference, absolute in the unit of the target, that counts as met: about the effect of one channel in a
network of some hundred channels, and less than the steps in which published tables give sparsities and costs"""

UNITS = {"sparsity": "sparsity", "gated_sparsity": "sparsity of the gated weights", "macs": "MACs ratio",
         "params": "parameters ratio", "channels": "channels ratio"}  # fmt: skip
"""unit of a target -> its text; a sparsity is the fraction removed, a ratio the fraction kept"""


def figures(asked: Mapping[str, float], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return target/unit, /asked, /reached and /met for a summary; nothing without a target or a figure for it.

    Several targets are limits on the cost. The reported one binds: its cost comes nearest to its limit, or exceeds it
    most.
    """
    found = {unit: _reached(unit, summary) for unit in asked}
    known = {unit: value for unit, value in found.items() if value is not None}
    if not known:
        return {}
    unit = max(known, key=lambda name: _excess(name, asked[name], known[name]))
    met = abs(_excess(unit, asked[unit], known[unit])) <= TOLERANCE
    return {"target/unit": unit, "target/asked": asked[unit], "target/reached": known[unit], "target/met": met}


def plan_line(asked: Mapping[str, float]) -> str | None:
    """Return a line on several targets for the plan; None if there is at most one."""
    if len(asked) < 2:
        return None
    return "targets: " + " and ".join(f"{UNITS[unit]} {value:g}" for unit, value in asked.items()) + ", all of them"


def line(summary: Mapping[str, Any]) -> str | None:
    """Return the comparison for the end of a run; None if the requested sparsity is shown already."""
    unit, met = summary.get("target/unit"), summary.get("target/met")
    if unit is None or (met and unit == "sparsity"):
        return None
    text = f"{UNITS[unit]} {summary['target/asked']:g} asked, {summary['target/reached']:.4g} reached"
    return text if met else f"MISSED by more than {TOLERANCE:g}: {text}"


def _excess(unit: str, asked: float, reached: float) -> float:
    """Return the amount by which the cost exceeds its limit; negative if it is lower."""
    return asked - reached if unit.endswith("sparsity") else reached - asked


def _reached(unit: str, summary: Mapping[str, Any]) -> float | None:
    """Return the figure of a summary that a target is compared with; None if it has none."""
    if unit == "gated_sparsity":
        density = summary.get("l0/density")
        return None if density is None else 1 - density
    if unit == "params":
        kept = summary.get("params/kept")
        return None if kept is None else kept / summary["params/dense"]
    keys = {"sparsity": ("sparsity/achieved",), "macs": ("macs/inference_ratio",),
            "channels": ("remove/channels_kept", "prune/channels_kept")}  # fmt: skip
    return next((summary[key] for key in keys[unit] if summary.get(key) is not None), None)
