"""Sanity-check controls beside the method itself: which runs are needed, and how their results compare. No torch.

A control omits what a method claims to matter (Frankle et al. 2021, arXiv 2009.08576). Its result is meaningful only
beside the method's own, so that run comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from prune_lab.config.run import RunConfig
from prune_lab.core.method import build_method
from prune_lab.tracking.lines import part_evaluated, quantity


def in_order(config: RunConfig) -> tuple[RunConfig, ...]:
    """Return the runs of one command: a control comes after the method's own run, its baseline."""
    baseline = baseline_run(config)
    return (config,) if baseline is None else (baseline, config)


def baseline_run(config: RunConfig) -> RunConfig | None:
    """Return the method's own run with otherwise equal options, None if `config` is not a control."""
    method = build_method(config).without_control()
    if method is None:
        return None
    before, options = asdict(config.method), asdict(method)
    changed = {f"method.{key}": value for key, value in options.items() if value != before[key]}
    typed = [override for override in config.overrides if override.partition("=")[0] not in changed]
    return replace(config, method=method, overrides=(*typed, *(f"{key}={value}" for key, value in changed.items())))


def figures(
    kind: str, key: str, summary: dict[str, Any], *, baseline: dict[str, Any], baseline_name: str
) -> dict[str, Any]:
    """Return the flat keys that a control adds to its summary.

    Args:
        key: of the headline metric, such as top1.
        summary: the control's own.
        baseline: summary of the method's own run.
        baseline_name: directory name of that run.
    """
    return {
        "control/kind": kind,
        f"control/method_{key}": baseline[f"final/{key}"],
        "control/method_minus_control": baseline[f"final/{key}"] - summary[f"final/{key}"],
        "control/method_run": baseline_name,
    }


def comparison(summary: dict[str, Any], baseline: dict[str, Any], kind: str) -> list[str]:
    """Return the results of the method and of its control, and their difference, as lines of text."""
    top1, baseline_top1 = summary["final/top1"], baseline["final/top1"]
    remarks = "; ".join(filter(None, [_sign(baseline_top1 - top1), part_evaluated(summary)]))
    rows = [
        ("", "method", f"control {kind}", "method - control"),
        ("top-1", f"{baseline_top1:.2f} %", f"{top1:.2f} %", f"{baseline_top1 - top1:+.2f} ({remarks})"),
        _row("sparsity", baseline, summary, "sparsity/achieved", "{:.6g}".format),
        _row("channels kept", baseline, summary, "remove/channels_kept", "{:.6g}".format),
        _row("MACs per image", baseline, summary, "macs/inference", quantity),
    ]
    rows = [row for row in rows if row[1:3] != ("-", "-")]
    width = max(len(row[2]) for row in rows)
    return [f"{name:15} {method:10}  {control:{width}}  {off}".rstrip() for name, method, control, off in rows]


def _sign(off: float) -> str:
    return "no difference" if off == 0 else f"the method is {'better' if off > 0 else 'worse'}"


def _row(
    name: str, baseline: dict[str, Any], control: dict[str, Any], key: str, show: Callable[[Any], str]
) -> tuple[str, str, str, str]:
    own, other = baseline.get(key), control.get(key)
    shown, other_shown = ("-" if value is None else show(value) for value in (own, other))
    if own is None or other is None:
        return name, shown, other_shown, ""
    off = own - other
    return name, shown, other_shown, "0" if off == 0 else ("+" if off > 0 else "") + show(off)
