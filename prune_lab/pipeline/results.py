"""The results of a run: its directory, its finished network, its summary."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from prune_lab import models
from prune_lab.accounting.costs import layer_table, macs_without_weight, profile
from prune_lab.accounting.eligibility import Layer, reshaped
from prune_lab.core.method import Measured, Method, build_method
from prune_lab.core.phase_result import PhaseResult
from prune_lab.core.usable_layers import usable_layers
from prune_lab.foundations import distributed
from prune_lab.foundations.bits import make_zeros_positive
from prune_lab.pipeline.run import Run
from prune_lab.pipeline.saved_model import save_model
from prune_lab.pipeline.summary import control_lines, cost_counts, observed_counts, sparsity_counts, summarise
from prune_lab.pruning.masks.distributions import num_keep_total
from prune_lab.training.device_config import DeviceConfig
from prune_lab.training.evaluation import measure
from prune_lab.training.phases import layer_costs, restore_model, uncounted_macs


@dataclass(frozen=True)
class Finished:
    """The saved network of a run."""

    model: nn.Module
    method: Method
    layers: list[Layer]
    """as the run's options build them"""
    masked: dict[str, int]
    """kept weights per parameter under a mask"""
    kept: dict[str, int]
    """weights left in each parameter that has lost some, through masks or removed channels"""
    widths: dict[str, list[int]] | None
    is_unchanged: bool
    """whether the network is the one that the last phase returned and evaluated"""


def complete(run: Run, result: PhaseResult, *, wall_s: float) -> None:
    """Finish the network, measure it in its saved form, and write model, layer table and summary.

    Raises:
        RuntimeError: the achieved sparsity is not the requested one.
    """
    done = _finish(run, result)
    scores, measured = _measure(run, done)
    rows, counts = _count(run, done)
    if measured:
        counts |= observed_counts(rows, measured, counts["macs/dense"])
    if distributed.is_main():
        _write(run, done, rows, summarise(run, scores, counts, wall_s=wall_s))


def _finish(run: Run, result: PhaseResult) -> Finished:
    """Return the last phase's network, finished by the method and checked."""
    masks, method = result.masks or {}, build_method(run.config)
    model = restore_model(run.model_config, result, **run.dataset.info.sizes)
    check_zeros(model, masks)
    if run.planned[-1].phase.active:
        method.load_state_dict(result.method)
    finished = method.finish(model)
    make_zeros_positive(finished)
    masked = {name: int(mask.sum()) for name, mask in masks.items()}
    layers, kept = whole_layers(run, method, finished, masked)
    check_sparsity(method, layers, kept)
    return Finished(finished, method, layers, masked, kept, result.widths, finished is model)


def _measure(run: Run, done: Finished) -> tuple[dict[str, dict[str, float]], Measured | None]:
    """Return loss and accuracies per split, and the method's own measurements."""
    fp32, dataset = run.device_config.in_fp32(), run.dataset
    fp32.placed(done.model)
    splits = {"final": dataset.eval_split} | ({"test": "test"} if dataset.eval_split == "val" else {})
    score = partial(_score, run, device_config=fp32)
    batches = partial(dataset.eval_batches, splits["final"], run.config.trainer.eval_batch_size,
                      rank=distributed.rank(), world_size=distributed.world_size())  # fmt: skip
    measured = done.method.measure(done.model, partial(score, splits["final"]), batches)
    known = {"final": measured.scores} if measured else {"final": run.outcomes[-1]} if done.is_unchanged else {}
    scores = {name: known[name] if name in known else score(split, done.model) for name, split in splits.items()}
    return {name: {key: found[key] for key in dataset.info.task.figures} for name, found in scores.items()}, measured


def _count(run: Run, done: Finished) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the layer table, and the summary's parameters, MACs and sparsity."""
    sizes, is_cut = run.dataset.info.sizes, done.widths is not None
    as_built = done.is_unchanged and not is_cut
    if as_built:
        costs, uncounted = layer_costs(run.model_config, **sizes), uncounted_macs(run.model_config, **sizes)
    else:
        costs = tuple(profile(done.model, sizes["image_size"]))
        uncounted = macs_without_weight(done.model, sizes["image_size"])
    layers = reshaped(done.layers, done.model) if is_cut else done.layers
    counts = sparsity_counts(layers, done.masked, done.method.requested_sparsity()) | cost_counts(
        done.model, costs, done.masked, uncounted=uncounted, dense_config=run.config.model, is_cut=is_cut, **sizes
    )
    return layer_table(done.layers, costs, done.kept), counts


def _write(run: Run, done: Finished, rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    description = models.describe(run.model_config, **run.dataset.info.sizes)
    removed = {} if done.widths is None else {"channels": done.widths}
    save_model(done.model, description | removed, run.folder.directory)
    run.tracker.layers(rows)
    record = {"phase": "final", "epoch": 0, "global_step": run.step_offset}
    run.tracker.log(record | {key: value for key, value in summary.items() if key.startswith(("final/", "test/"))})
    run.tracker.summary(summary)
    for line in control_lines(run, summary):
        run.tracker.message(line)
    run.tracker.finish("finished", None)


def whole_layers(
    run: Run, method: Method, model: nn.Module, masked: dict[str, int]
) -> tuple[list[Layer], dict[str, int]]:
    """Return the layers as the run's options build them, and the weights left in each that has lost some.

    Args:
        model: the finished network; weights of channels that were removed from it count as pruned.
        masked: kept weights per parameter under a mask.
    """
    sizes = run.dataset.info.sizes
    whole = models.build_on_meta(run.model_config, **sizes)
    left = {name: parameter.numel() for name, parameter in model.named_parameters()}
    layers = usable_layers(method, whole, layer_costs(run.model_config, **sizes))
    sizes_left = {layer: left.get(layer.parameter, layer.size) for layer in layers}
    cut = {layer.parameter: size for layer, size in sizes_left.items() if size != layer.size}
    return layers, cut | masked


def _score(run: Run, split: str, model: nn.Module, *, device_config: DeviceConfig) -> dict[str, float]:
    trainer = run.config.trainer
    return measure(model, run.dataset, split, device_config=device_config, trainer=trainer, poll=run.poll_alone)


def check_zeros(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Raise RuntimeError if a pruned weight is not zero in the saved network."""
    named = dict(model.named_parameters())
    wrong = [name for name, mask in masks.items() if bool(named[name].detach()[~mask].any())]
    if wrong:
        raise RuntimeError(f"pruned weights are not zero in {', '.join(wrong)}")


def check_sparsity(method: Method, layers: list[Layer], kept: dict[str, int]) -> None:
    """Raise RuntimeError if the number of remaining eligible weights is not exactly the requested one."""
    requested = method.requested_sparsity()
    if requested is None or not method.budget_is_exact():
        return
    total = sum(layer.size for layer in layers if layer.eligible)
    achieved = sum(kept.get(layer.parameter, layer.size) for layer in layers if layer.eligible)
    if achieved != num_keep_total(total, requested):
        raise RuntimeError(f"kept {achieved} of {total} eligible weights, method.sparsity={requested} asks for "
                           f"{num_keep_total(total, requested)}")  # fmt: skip
