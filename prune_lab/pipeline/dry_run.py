"""dry_run=true: the whole run in miniature on random images; prints the plan and its cost, trains nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prune_lab import datasets
from prune_lab.accounting import targets
from prune_lab.accounting.costs import count_parameters, layer_table
from prune_lab.accounting.eligibility import Layer
from prune_lab.config.run import RunConfig
from prune_lab.core.chain import Results
from prune_lab.core.method import Method, build_method
from prune_lab.core.usable_layers import usable_layers
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.files import write_json
from prune_lab.pipeline import matching
from prune_lab.pipeline import summary as pipeline_summary
from prune_lab.pipeline.phase_plan import PhasePlan
from prune_lab.pipeline.settling import SettledRun, settle, settled
from prune_lab.pipeline.validation import RandomImages, one_step, task_without_files
from prune_lab.pruning.masks.distributions import num_keep_total
from prune_lab.tracking.lines import quantity, summary_lines
from prune_lab.training.device_config import DeviceConfig, resolve_device_config
from prune_lab.training.phases import build_model, dense_note, layer_costs, open_context, uncounted_macs


def dry_run(config: RunConfig) -> int:
    """Build everything, run one step per phase, print and write `dry_run.json`; return 0.

    Raises:
        UserError: whatever the run itself would reject, except for missing or damaged data.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("dry_run=true needs one process only: start it without torchrun")
    device_config = resolve_device_config(config.trainer)
    info, content = datasets.describe(config.dataset), datasets.content(config.dataset)
    plan = settle(settled(config, info), info, device_config, fingerprint=None, content=content)
    chain = _step_through(plan, info, device_config)
    rows, summary = _count(plan, chain, info, device_config)
    plan.folder.directory.mkdir(parents=True, exist_ok=True)
    write_json(plan.folder.directory / "dry_run.json", summary | {"layers": rows})
    _show(plan.folder.directory, plan.planned, rows, summary)
    for line in _last_lines(plan, chain, info):
        print(line)
    return 0


@dataclass
class _Chain:
    """Findings from one step of each phase."""

    removable: str | None = None
    """text on the removable channels; None: the method removes none"""
    spent: int | None = 0
    """MACs of the whole training; None: not known in advance"""
    kept: dict[str, int] | None = field(default_factory=dict)
    """kept weights per parameter at the end; None: they depend on trained weights"""
    figures: dict[str, float] = field(default_factory=dict)
    """of the phases without training"""
    params: int = 0
    """number of parameters after the last phase"""
    reported: list[str] = field(default_factory=list)

    def spend(self, macs: int | None) -> None:
        self.spent = None if self.spent is None or macs is None else self.spent + macs


def _step_through(plan: SettledRun, info: datasets.DatasetInfo, device_config: DeviceConfig) -> _Chain:
    """Run the first step of every phase, each on the result of the previous one."""
    dataset = RandomImages(info, device_config.torch_device)
    done, found = Results(entry.phase for entry in plan.planned), _Chain()
    method = build_method(plan.config)
    for entry in plan.planned:
        # Later phases would report on weights that only training produces.
        report = found.reported.append if entry is plan.planned[0] else lambda text: None
        task = task_without_files(plan.config, plan.model_config, entry, dataset, device_config, done, report=report)
        with matching.naming_reference(plan.config):
            if method.removes_channels() and found.removable is None:
                found.removable = method.trial_cut(open_context(task)).line()
            result, context = one_step(task)
        done.add(entry.phase, result)
        found.figures |= result.figures
        costs = PhasePlan(entry.phase, task.method, context, plan.config.schedule.batch_size * info.units_per_row)
        layout = costs.layout()
        if layout is None:
            found.kept = None
        elif layout:
            found.kept = layout[-1][1]
        found.spend(0 if entry.phase.repeated else costs.macs())
    found.params = count_parameters(context.model)
    return found


def _count(
    plan: SettledRun, chain: _Chain, info: datasets.DatasetInfo, device_config: DeviceConfig
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the layer table and the summary of a run that has not run."""
    config, method = plan.config, build_method(plan.config)
    model = build_model(plan.model_config, **info.sizes, seed=config.seed)
    costs = layer_costs(plan.model_config, **info.sizes)
    layers = usable_layers(method, model, costs)
    rows = layer_table(layers, costs, chain.kept)
    counts = pipeline_summary.cost_counts(
        model, costs, chain.kept or {}, uncounted=uncounted_macs(plan.model_config, **info.sizes),
        dense_config=config.model, **info.sizes,
    )  # fmt: skip
    counts |= pipeline_summary.sparsity_counts(layers, chain.kept or {}, method.requested_sparsity())
    counts |= _open_counts(method, layers, chain.kept, counts["params/total"])
    if method.costs_depend_on_images:
        rows = [row | ({"macs_kept": None} if row["eligible"] else {}) for row in rows]
        counts |= dict.fromkeys(("macs/inference", "macs/inference_ratio"))
    steps = info.num_train // config.schedule.batch_size
    summary = {
        **pipeline_summary.origin(config, plan.folder.group, device_config, info),
        **counts,
        **method.chosen(),
        **pipeline_summary.training_cost(config, info, chain.spent, counts["macs/dense"], steps),
        "phases": [{"name": entry.phase.name, "epochs": entry.epochs} for entry in plan.planned],
    }
    summary |= config.matched.figures(summary) if config.matched else {}
    return rows, summary | (_removed(chain) if chain.removable else {})


def _open_counts(method: Method, layers: list[Layer], kept: dict[str, int] | None, params: int) -> dict[str, Any]:
    """Return the keys that are only known after a run: null, or the value that the target requires.

    Args:
        kept: weights per parameter; None: they depend on trained weights.
        params: parameters of the network.
    """
    if kept is not None:
        return {}
    requested, unknown = method.requested_sparsity(), dict.fromkeys(("macs/inference", "macs/inference_ratio"))
    if requested is None:
        return unknown | dict.fromkeys(("params/nonzero", "params/kept"))
    # One ranking over all layers: the total is known, the layout is not.
    total = sum(layer.size for layer in layers if layer.eligible)
    cut = total - num_keep_total(total, requested)
    return unknown | {"sparsity/achieved": cut / total, "params/nonzero": params - cut, "params/kept": params - cut}


def _removed(chain: _Chain) -> dict[str, Any]:
    """Return the keys of a network with removed channels: it has no sparsity; null: training decides the channels."""
    counts = {"params/total": None, "params/kept": None, "params/nonzero": None, "sparsity/achieved": None}
    if chain.kept is None:
        return counts
    known = {key: chain.figures[key] for key in ("remove/channels_kept",) if key in chain.figures}
    return counts | {"params/total": chain.params, "params/kept": chain.params} | known


def _last_lines(plan: SettledRun, chain: _Chain, info: datasets.DatasetInfo) -> Iterator[str]:
    """Yield the lines that the tables do not cover."""
    config, method = plan.config, build_method(plan.config)
    yield from chain.reported
    yield "data: " + "; ".join(info.lines())
    if note := dense_note(config, plan.model_config, info.sizes):
        yield note
    if chain.removable:
        yield chain.removable
    if method.costs_depend_on_images:
        yield "? depends on the images: measured on the evaluation images of the run"
    if config.matched:
        yield config.matched.line()
    if line := targets.plan_line(method.asked()):
        yield line
    if method.without_control():
        yield f"control {config.method.control}: the real command first does the method's own run"
    yield "MAC: multiply-accumulate of conv and linear layers, one image; nothing was trained"


def _show(directory: Path, planned: list, rows: list[dict], summary: dict[str, Any]) -> None:
    print(f"dry run of {directory.name}")
    lengths = {entry.phase.name: f" ({entry.length})" if entry.length else "" for entry in planned}
    print("plan: " + " -> ".join(name + length for name, length in lengths.items()))
    width = max(len(row["name"]) for row in rows)
    print(f"{'layer':{width}}  {'kind':14} {'shape':>18} {'density':>8} {'kept':>11} "
          f"{'MACs dense':>11} {'MACs kept':>11}  why dense")
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        if row["kept"] is None:
            kept = ("?", "?", "?")
        else:
            macs = "?" if row["macs_kept"] is None else quantity(row["macs_kept"])
            kept = (f"{row['density']:.4f}", str(row["kept"]), macs)
        print(f"{row['name']:{width}}  {row['kind']:14} {shape:>18} {kept[0]:>8} {kept[1]:>11} "
              f"{quantity(row['macs_dense']):>11} {kept[2]:>11}  {row['reason']}".rstrip())
    if any(row["kept"] is None for row in rows):
        print(f"? depends on the {'trained weights' if planned[0].phase.is_training else 'scores'}")
    for line in summary_lines(summary):
        print(line)
