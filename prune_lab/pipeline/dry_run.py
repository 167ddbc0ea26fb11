"""dry_run=true: the whole run in miniature on random images; prints the plan and what it costs, trains nothing."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from prune_lab import datasets
from prune_lab.accounting import targets, training
from prune_lab.accounting.costs import count_parameters, layer_table
from prune_lab.config.run import RunConfig
from prune_lab.core import chain
from prune_lab.core.usable_layers import usable_layers
from prune_lab.foundations.files import write_json
from prune_lab.foundations.schema import ConfigError
from prune_lab.pipeline import identity, matching, results, run_folder
from prune_lab.pipeline import summary as pipeline_summary
from prune_lab.pipeline.outlook import PhaseOutlook
from prune_lab.pipeline.rehearsal import RandomImages, job_without_files, one_step
from prune_lab.pipeline.settling import settled
from prune_lab.tracking.lines import quantity, summary_lines
from prune_lab.training import numerics
from prune_lab.training.numerics import Numerics
from prune_lab.training.phases import build_model, dense_note, layer_costs, open_context


def dry_run(config: RunConfig) -> int:
    """Build everything, do one step per phase, print and write `dry_run.json`; return 0.

    Raises:
        ConfigError: whatever the run itself would refuse, except for missing or damaged data.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("dry_run=true needs one process only: start it without torchrun")
    arithmetic = numerics.resolve(config.trainer)
    info = datasets.describe(config.dataset)
    config = settled(config, info)
    sizes = {"num_classes": info.num_classes, "image_size": info.image_size}
    model_config = config.method.adapt_model(config.model, **sizes)
    config = matching.matched(config, model_config, info, arithmetic)
    planned = identity.plan(config, model=model_config, fingerprint=None, numerics=arithmetic.identity(), world_size=1)
    inputs = {"model": model_config, "numerics": arithmetic.identity(), "world_size": 1}
    folder = run_folder.RunFolder.of(config, fingerprint=None, content=datasets.content(config.dataset), **inputs)
    dataset, spent, kept, noted, told = RandomImages(info, arithmetic.torch_device), 0, {}, {}, []
    done = chain.Results(entry.phase for entry in planned)
    removes, removable = any(entry.phase.hook == "remove" for entry in planned), None
    for entry in planned:
        # Later phases would speak of weights that only a training gives.
        report = told.append if entry is planned[0] else lambda text: None
        job = job_without_files(config, model_config, entry, dataset, arithmetic, done, report=report)
        with matching.naming_reference(config):
            if removes and removable is None:
                removable = config.method.trial_cut(open_context(job)).line()
            result, context = one_step(job)
        done.add(entry.phase, result)
        noted |= result.get("noted", {})
        outlook = PhaseOutlook(entry.phase, job.method, context, config.schedule.batch_size)
        layout, cost = outlook.layout(), 0 if entry.phase.repeated else outlook.macs()
        spent = None if spent is None or cost is None else spent + cost
        kept = layout[-1][1] if layout else layout if layout is None else kept
    model = build_model(model_config, **sizes, seed=config.seed)
    costs = layer_costs(model_config, **sizes)
    layers = usable_layers(config.method, model, costs)
    rows = layer_table(layers, costs, kept)
    if config.method.costs_depend_on_images:
        rows = [row | ({"macs_kept": None} if row["eligible"] else {}) for row in rows]
    known = {"spent": spent, "info": info, "arithmetic": arithmetic}
    summary = _summary(config, folder, planned, model, costs, layers, kept, **known)
    if removable:
        summary |= _removed(None if kept is None else count_parameters(context.model), noted)
    folder.directory.mkdir(parents=True, exist_ok=True)
    write_json(folder.directory / "dry_run.json", summary | {"layers": rows})
    _show(folder.directory, planned, rows, summary)
    print(*told, "data: " + "; ".join(info.lines()), sep="\n")
    if note := dense_note(config, model_config, info):
        print(note)
    if removable:
        print(removable)
    if config.method.costs_depend_on_images:
        print("? depends on the images: measured on the evaluation images of the run")
    if config.matched:
        print(config.matched.line())
    if line := targets.plan_line(config.method.asked()):
        print(line)
    if config.method.without_control():
        print(f"control {config.method.config.control}: the real command first does the method's own run")
    print("MAC: multiply-accumulate of conv and linear layers, one image; nothing was trained")
    return 0


def _removed(params: int | None, noted: dict[str, float]) -> dict[str, Any]:
    """Return the keys of a network without some channels: it has no sparsity; None: what goes depends on training."""
    counts = {"params/total": params, "params/kept": params, "params/nonzero": None, "sparsity/achieved": None}
    return counts if params is None else counts | {k: noted[k] for k in ("remove/channels_kept",) if k in noted}


def _summary(
    config: RunConfig, folder: run_folder.RunFolder, planned: list, model: Any, costs: list, layers: list,
    kept: dict[str, int] | None, *, spent: int | None, info: datasets.DatasetInfo, arithmetic: Numerics,
) -> dict[str, Any]:
    sizes = {"num_classes": info.num_classes, "image_size": info.image_size}
    counts = pipeline_summary.cost_counts(model, costs, kept or {}, dense_config=config.model, **sizes)
    requested = config.method.requested_sparsity()
    counts |= pipeline_summary.sparsity_counts(layers, kept or {}, requested)
    if kept is None and requested is None:
        counts |= dict.fromkeys(("macs/inference", "macs/inference_ratio", "params/nonzero", "params/kept"))
    elif kept is None:  # a global cut: the totals are known, the layout is not
        total = sum(layer.size for layer in layers if layer.eligible)
        cut = total - results.num_keep_total(total, requested)
        left = counts["params/total"] - cut
        counts |= {"macs/inference": None, "macs/inference_ratio": None, "sparsity/achieved": cut / total,
                   "params/nonzero": left, "params/kept": left}
    if config.method.costs_depend_on_images:
        counts |= dict.fromkeys(("macs/inference", "macs/inference_ratio"))
    steps = info.num_train // config.schedule.batch_size
    train_dense = training.training_macs(config, counts["macs/dense"], steps)
    summary = {
        "run/seed": config.seed,
        "run/group": folder.group,
        "run/command": shlex.join(["prune-lab", *config.overrides]),
        "run/device": pipeline_summary.device_name(arithmetic),
        "run/versions": pipeline_summary.versions(),
        **pipeline_summary.choices(config),
        **info.figures(),
        **counts,
        **config.method.chosen(),
        "macs/train": spent,
        "macs/train_dense": train_dense,
        "macs/train_ratio": spent / train_dense if spent is not None and train_dense else None,
        "phases": [
            {"name": entry.phase.name, "epochs": entry.epochs} for entry in planned
        ],
    }
    return summary | (config.matched.figures(summary) if config.matched else {})


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
        print(f"? depends on the {'trained weights' if planned[0].phase.hook == 'train' else 'scores'}")
    for line in summary_lines(summary):
        print(line)
