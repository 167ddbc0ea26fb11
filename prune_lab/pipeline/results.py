"""What a run leaves behind: its directory, its finished network, its summary."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from prune_lab import models
from prune_lab.accounting.costs import layer_table, profile
from prune_lab.accounting.eligibility import Layer, reshaped
from prune_lab.config.run import RunConfig
from prune_lab.core.usable_layers import usable_layers
from prune_lab.foundations import distributed
from prune_lab.foundations.bits import make_zeros_positive
from prune_lab.pipeline.saved_model import save_model
from prune_lab.pipeline.summary import control_lines, cost_counts, observed_counts, sparsity_counts, summarise
from prune_lab.pruning.masks.distributions import num_keep_total
from prune_lab.training.evaluation import measure
from prune_lab.training.job import fresh
from prune_lab.training.numerics import Numerics
from prune_lab.training.phases import layer_costs, restore_model

if TYPE_CHECKING:
    from prune_lab.core.method import Method
    from prune_lab.pipeline.run import Run


def complete(run: Run, result: dict[str, Any], *, wall_s: float) -> None:
    """Finish the network, measure it as it is saved, and write model, layer table and summary.

    Raises:
        RuntimeError: the achieved sparsity is not the requested one.
    """
    config, info = run.config, run.dataset.info
    sizes = {"num_classes": info.num_classes, "image_size": info.image_size}
    model = restore_model(run.model_config, result, **sizes)
    masked = {name: int(mask.sum()) for name, mask in (result["masks"] or {}).items()}
    check_zeros(model, result["masks"] or {})
    method = fresh(config.method)
    if run.planned[-1].phase.active:
        method.load_state_dict(result["method"])
    finished = method.finish(model)
    make_zeros_positive(finished)
    unchanged = finished is model
    model = finished
    layers, kept = whole_layers(run, method, model, masked)
    is_cut = result.get("widths") is not None
    check_sparsity(config, layers, kept)
    exact = run.numerics.exact()
    exact.placed(model)
    splits = {"final": run.dataset.eval_split} | ({"test": "test"} if run.dataset.eval_split == "val" else {})
    score = partial(_score, run, numerics=exact)
    batches = partial(run.dataset.eval_batches, splits["final"], config.trainer.eval_batch_size,
                      rank=distributed.rank(), world_size=distributed.world_size())
    measured = method.measure(model, partial(score, splits["final"]), batches)
    known = {"final": measured.scores} if measured else {"final": run.outcomes[-1]} if unchanged else {}
    scores = {
        name: {key: known[name][key] for key in ("loss", "top1", "top5")} if name in known else score(split, model)
        for name, split in splits.items()
    }
    as_built = unchanged and not is_cut
    costs = layer_costs(run.model_config, **sizes) if as_built else profile(model, info.image_size)
    rows = layer_table(layers, costs, kept)
    counts = {
        **sparsity_counts(reshaped(layers, model) if is_cut else layers, masked, config.method.requested_sparsity()),
        **cost_counts(model, costs, masked, dense_config=config.model, is_cut=is_cut, **sizes),
    }
    if measured:
        counts |= observed_counts(rows, measured, counts["macs/dense"])
    if not distributed.is_main():
        return
    removed = {"channels": result["widths"]} if is_cut else {}
    save_model(model, models.describe(run.model_config, **sizes) | removed, run.folder.directory)
    run.tracker.layers(rows)
    summary = summarise(run, scores, counts, wall_s=wall_s)
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
    info = run.dataset.info
    sizes = {"num_classes": info.num_classes, "image_size": info.image_size}
    whole = models.build_on_meta(run.model_config, **sizes)
    left = {name: parameter.numel() for name, parameter in model.named_parameters()}
    layers = usable_layers(method, whole, layer_costs(run.model_config, **sizes))
    sizes_left = {layer: left.get(layer.parameter, layer.size) for layer in layers}
    cut = {layer.parameter: size for layer, size in sizes_left.items() if size != layer.size}
    return layers, cut | masked


def _score(run: Run, split: str, model: nn.Module, *, numerics: Numerics) -> dict[str, float]:
    return measure(model, run.dataset, split, numerics=numerics, trainer=run.config.trainer, poll=run.poll_alone)


def check_zeros(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Raise RuntimeError if a weight that counts as pruned is not zero in the network that is saved."""
    named = dict(model.named_parameters())
    wrong = [name for name, mask in masks.items() if bool(named[name].detach()[~mask].any())]
    if wrong:
        raise RuntimeError(f"pruned weights are not zero in {', '.join(wrong)}")


def check_sparsity(config: RunConfig, layers: list, kept: dict[str, int]) -> None:
    requested = config.method.requested_sparsity()
    if requested is None or not config.method.budget_is_exact():
        return
    total = sum(layer.size for layer in layers if layer.eligible)
    achieved = sum(kept.get(layer.parameter, layer.size) for layer in layers if layer.eligible)
    if achieved != num_keep_total(total, requested):
        raise RuntimeError(f"kept {achieved} of {total} eligible weights, method.sparsity={requested} asks for "
                           f"{num_keep_total(total, requested)}")
