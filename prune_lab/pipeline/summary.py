"""The summary of a run: every number that tables use."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prune_lab import models
from prune_lab.accounting import targets
from prune_lab.accounting.costs import LayerCost, count_parameters, dense_macs, sparse_macs
from prune_lab.accounting.eligibility import sparsity
from prune_lab.accounting.training import training_macs
from prune_lab.config.run import RunConfig
from prune_lab.core.method import Measured, build_method
from prune_lab.datasets import DatasetInfo
from prune_lab.datasets.splits import eval_range
from prune_lab.foundations import distributed
from prune_lab.foundations.version import __version__
from prune_lab.pipeline import control_runs
from prune_lab.training.device_config import DeviceConfig
from prune_lab.training.phases import layer_costs

if TYPE_CHECKING:
    from prune_lab.pipeline.run import Run


def observed_counts(rows: list[dict[str, Any]], measured: Measured, dense: int) -> dict[str, Any]:
    """Insert measured costs into the layer table and return the affected keys of the summary.

    Args:
        rows: of `layer_table`, in which `measured` replaces and adds columns.
        dense: MACs per image of the dense network.
    """
    for row in rows:
        row |= measured.layers.get(row["name"], {})
    forward = sum(row["macs_kept"] for row in rows)
    return {"macs/inference": round(forward), "macs/inference_ratio": forward / dense, **measured.figures}


def sparsity_counts(layers: list, kept: dict[str, int], requested: float | None) -> dict[str, Any]:
    """Return the target and the outcome; a network without masks of single weights has neither.

    Args:
        layers: with the shapes of the saved network.
        kept: weights left per parameter under a mask.
    """
    has_masks = requested is not None or bool(kept)
    return {"sparsity/requested": requested, "sparsity/achieved": sparsity(layers, kept) if has_masks else None}


def cost_counts(
    model: nn.Module, costs: Sequence[LayerCost], kept: dict[str, int], *, uncounted: int, dense_config: Any,
    is_cut: bool = False, **sizes: int,
) -> dict[str, Any]:
    """Return parameters and MACs of the finished network beside those of the dense network as configured.

    params/nonzero is None if channels were removed and no masks are left; params/kept is always set.

    Args:
        uncounted: `macs_without_weight` of `model`.
    """
    dense = models.build_on_meta(dense_config, **sizes)
    total = count_parameters(model)
    weights = {cost.parameter: cost.weights for cost in costs}
    dense_forward = dense_macs(layer_costs(dense_config, **sizes))
    forward = sparse_macs(costs, kept)
    left = total - sum(weights[name] - count for name, count in kept.items())
    return {
        "params/dense": count_parameters(dense),
        "params/total": total,
        "params/nonzero": None if is_cut and not kept else left,
        "params/kept": left,
        "macs/dense": dense_forward,
        "macs/inference": forward,
        "macs/inference_ratio": forward / dense_forward,
        "macs/not_counted": uncounted,
    }


def summarise(run: Run, scores: dict[str, dict], counts: dict[str, Any], *, wall_s: float) -> dict[str, Any]:
    """Return the flat summary of design section 7; percentages for accuracies, counts for parameters and MACs."""
    config, info, outcomes = run.config, run.dataset.info, run.outcomes
    method = build_method(config)
    steps = run.dataset.num_batches(config.schedule.batch_size)
    summary = {
        "status": "finished",
        "run/id": run.folder.key,
        **origin(config, run.folder.group, run.device_config, info),
        "data/content": run.dataset.content,
        **{f"{split}/{key}": value for split, values in scores.items() for key, value in values.items()},
        **_dense_training(run, scores["final"]),
        **images_seen(run),
        **counts,
        **explained([figures["explained"] for figures in outcomes]),
        **training_cost(config, info, run.macs_offset, counts["macs/dense"], steps),
        "macs/train_ratio_paper": outcomes[-1]["paper_train_ratio"],
        **method.chosen(),
        "phases": [
            {"name": entry.phase.name, "key": entry.key} | {key: figures[key] for key in ("epochs", "reused", "wall_s")}
            for entry, figures in zip(run.planned, outcomes, strict=True)
        ],
        "time/wall_s": wall_s,
        "time/images_per_s": run.images_done / run.train_s if run.train_s else None,
    }
    summary |= targets.figures(method.asked(), summary)
    if config.matched:
        summary |= config.matched.figures(summary)
    if run.baseline and (baseline := baseline_summary(run)):
        control, name, key = config.method.control, run.baseline.directory.name, info.task.headline.key
        summary |= control_runs.figures(control, key, summary, baseline=baseline, baseline_name=name)
    return summary


def origin(config: RunConfig, group: str, device_config: DeviceConfig, info: DatasetInfo) -> dict[str, Any]:
    """Return the inputs of a run, and its machine."""
    return {
        "run/group": group,
        "run/seed": config.seed,
        "run/command": shlex.join(["prune-lab", *config.overrides]),
        "run/device": device_name(device_config),
        "run/versions": versions(),
        **choices(config),
        **info.figures(),
    }


def training_cost(
    config: RunConfig, info: DatasetInfo, spent: int | None, dense: int, steps: int
) -> dict[str, Any]:
    """Return the MACs of training beside those of dense training.

    Args:
        spent: MACs of all phases; None: not known.
        dense: MACs per image of the dense network.
        steps: optimizer steps per epoch.
    """
    whole = training_macs(config, dense, steps, units_per_row=info.units_per_row)
    ratio = spent / whole if spent is not None and whole else None
    return {"macs/train": spent, "macs/train_dense": whole, "macs/train_ratio": ratio}


def _dense_training(run: Run, scores: dict[str, float]) -> dict[str, Any]:
    """Return the headline metric after the chain's dense training, and the change by pruning; null without one."""
    key = run.dataset.info.task.headline.key
    dense = [figures for entry, figures in zip(run.planned, run.outcomes, strict=True)
             if entry.phase.is_training and not entry.phase.active and entry.phase.end is None]  # fmt: skip
    if not dense:
        return dict.fromkeys((f"dense/{key}", f"delta/{key}", "dense/epochs"))
    before = dense[0][key]
    return {f"dense/{key}": before, f"delta/{key}": scores[key] - before, "dense/epochs": dense[0]["epochs"]}


def images_seen(run: Run) -> dict[str, int | None]:
    """Return the number of images behind each accuracy, and in an epoch.

    `train/images_per_epoch` is null unless `trainer.limit_train_batches` leaves out whole batches.
    """
    info, trainer, batch = run.dataset.info, run.config.trainer, run.config.schedule.batch_size
    if info.task.unit != "images":
        return {"data/num_eval": info.num_eval, "task/headline": info.task.headline.key, "task/unit": info.task.unit}
    limit, steps, world = trainer.limit_eval_batches, trainer.limit_train_batches, distributed.world_size()

    def evaluated(num_images: int) -> int:
        shares = [len(eval_range(num_images, rank=rank, world_size=world)) for rank in range(world)]
        return sum(share if limit is None else min(share, limit * trainer.eval_batch_size) for share in shares)

    images = steps * batch if steps is not None and steps < run.dataset.num_batches(batch) else None
    return {
        "data/num_eval": info.num_eval,
        "final/images": evaluated(info.num_eval),
        **({"test/images": evaluated(info.num_test)} if info.num_val else {}),
        "train/images_per_epoch": images,
    }


def explained(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the figures that the phases report, later ones first.

    Mask figures come from the last phase only: masks of earlier phases may be gone with the channels they removed.
    """
    merged = {key: value for phase in figures for key, value in phase.items()}
    return {key: value for key, value in merged.items() if key in figures[-1] or not key.startswith("mask/")}


def baseline_summary(run: Run) -> dict[str, Any] | None:
    """Return the summary of the method's own run beside a control, None if there is no such run."""
    return run.baseline.finished() if run.baseline and distributed.is_main() else None


def control_lines(run: Run, summary: dict[str, Any]) -> list[str]:
    """Return a control's results beside the method's own; empty for other runs."""
    baseline = baseline_summary(run)
    return control_runs.comparison(summary, baseline, run.config.method.control) if baseline else []


def choices(config: RunConfig) -> dict[str, str]:
    return {
        "config/model": config.model.name,
        "config/dataset": config.dataset.name,
        "config/method": config.method.name,
        "config/schedule": config.schedule.name,
    }


def device_name(device_config: DeviceConfig) -> str:
    if device_config.torch_device.type == "cuda":
        return f"{torch.cuda.get_device_name(device_config.torch_device)} ({device_config.precision})"
    return f"{platform.processor() or platform.machine()} {torch.get_num_threads()} threads ({device_config.precision})"


def versions() -> dict[str, str]:
    return {"prune-lab": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "hydra-core": version("hydra-core")}
