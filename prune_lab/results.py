"""What a run leaves behind: its directory, its finished network, its summary."""

from __future__ import annotations

import contextlib
import platform
import shlex
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor, nn

from prune_lab import __version__, accounting, control_runs, distributed, models, targets
from prune_lab.accounting import LayerCost, count_parameters, dense_macs, layer_table, profile, sparse_macs
from prune_lab.chain import PlannedPhase
from prune_lab.config import RunConfig
from prune_lab.datasets.splits import eval_range
from prune_lab.distributions import num_keep_total
from prune_lab.eligibility import Layer, reshaped, sparsity, usable_layers
from prune_lab.files import read_json, write_text
from prune_lab.identity import group_key, plan, run_key
from prune_lab.loop import measure
from prune_lab.methods.base import Measured
from prune_lab.numerics import Numerics, make_zeros_positive
from prune_lab.phases import fresh, layer_costs, restore_model
from prune_lab.saved_model import save_model
from prune_lab.schema import ConfigError
from prune_lab.tracking import RunInfo, Tracker, open_tracker

if TYPE_CHECKING:
    from prune_lab.methods.base import Method
    from prune_lab.pipeline import Run


@dataclass(frozen=True)
class RunFolder:
    """The directory outputs/<dataset>-<model>-<method>-s<seed>-<hash8> of one run."""

    directory: Path
    key: str
    group: str

    @classmethod
    def of(cls, config: RunConfig, *, fingerprint: str | None, content: str | None, **inputs: Any) -> RunFolder:
        """Return the folder of a run.

        Args:
            fingerprint: of the data set, part of the run's identity; None: not known.
            content: of the data set, part of the directory's name (see Dataset.content).
            inputs: as for identity.plan.
        """
        short = run_key(plan(config, fingerprint=content, **inputs), config)[:8]
        name = f"{config.dataset.name}-{config.model.name}-{config.method.config.name}-s{config.seed}-{short}"
        key = run_key(plan(config, fingerprint=fingerprint, **inputs), config)
        return cls(Path(config.output_dir) / name, key, group_key(config, fingerprint=fingerprint, **inputs))

    def tracker(self, config: RunConfig) -> Tracker:
        return open_tracker(config.logger) if distributed.is_main() else Tracker()

    def finished(self) -> dict[str, Any] | None:
        """Return the summary if this very run is finished here.

        Raises:
            ConfigError: the directory was written by another configuration.
        """
        owner = self._owner()
        if owner not in (None, self.key):
            raise ConfigError(
                f"output_dir: {self.directory} was written by another configuration or from other data (run id "
                f"{owner}, this one is {self.key}); move it away or choose another output_dir"
            )
        try:
            if read_json(self.directory / "status.json")["status"] != "finished":  # written last
                return None
            summary = read_json(self.directory / "summary.json")
            kept = [self.directory / name for name in ("model.json", "model.safetensors", "metrics.jsonl")]
            return summary if summary["status"] == "finished" and all(path.exists() for path in kept) else None
        except (FileNotFoundError, ValueError, KeyError):
            return None

    def _owner(self) -> str | None:
        """Return the run id that the directory's files carry, None for a directory without a run."""
        for name, key in (("run.json", "id"), ("summary.json", "run/id")):
            with contextlib.suppress(FileNotFoundError, ValueError):
                return str(read_json(self.directory / name).get(key))
        return "unknown" if (self.directory / "config.yaml").exists() else None  # run.json is written before it

    def start(self, tracker: Tracker, config: RunConfig, planned: list[PlannedPhase]) -> None:
        """Begin or begin again: options on disk, all sinks told."""
        plan = [
            {"name": entry.phase.name, "key": entry.key, "epochs": entry.schedule.epochs if entry.schedule else 0,
             "length": entry.length}
            for entry in planned
        ]
        if distributed.is_main():
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / "summary.json").unlink(missing_ok=True)
        tags = [config.dataset.name, config.model.name, config.method.config.name, *config.logger.tags]
        tracker.start(RunInfo(self.directory, self.key, self.directory.name, self.group, tags, config.resolved, plan))
        if distributed.is_main():
            write_text(self.directory / "config.yaml", yaml.safe_dump(config.resolved, sort_keys=False))
            self._link_phases(planned)

    def _link_phases(self, planned: list[PlannedPhase]) -> None:
        """Show under the run's directory which phases it consists of."""
        links = self.directory / "phases"
        links.mkdir(exist_ok=True)
        width = len(str(len(planned) - 1))  # so that names sort
        for index, entry in enumerate(planned):
            link = links / f"{index:0{width}}-{entry.phase.name}"
            link.unlink(missing_ok=True)
            link.symlink_to(Path("..") / ".." / "phases" / entry.key)

    def crash(self, tracker: Tracker, error: BaseException) -> None:
        """Leave the traceback in the log and one line in the status."""
        if distributed.is_main() and self.directory.exists():
            with open(self.directory / "log.txt", "a", encoding="utf-8") as log:
                log.write(traceback.format_exc())
        tracker.finish("failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


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


def observed_counts(rows: list[dict[str, Any]], measured: Measured, dense: int) -> dict[str, Any]:
    """Put measured costs into the layer table and return the summary's keys that change with them.

    Args:
        rows: of `layer_table`, in which `measured` replaces and adds columns.
        dense: MACs per image of the dense network.
    """
    for row in rows:
        row |= measured.layers.get(row["name"], {})
    forward = sum(row["macs_kept"] for row in rows)
    return {"macs/inference": round(forward), "macs/inference_ratio": forward / dense, **measured.figures}


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


def sparsity_counts(layers: list, kept: dict[str, int], requested: float | None) -> dict[str, Any]:
    """Return the target and what came of it; a network without masks of single weights has neither.

    Args:
        layers: with the shapes of the network that is saved.
        kept: weights left per parameter under a mask.
    """
    has_masks = requested is not None or bool(kept)
    return {"sparsity/requested": requested, "sparsity/achieved": sparsity(layers, kept) if has_masks else None}


def cost_counts(
    model: nn.Module, costs: Sequence[LayerCost], kept: dict[str, int], *, dense_config: Any, is_cut: bool = False,
    **sizes: int,
) -> dict[str, Any]:
    """Return parameters and MACs of the finished network beside those of the network as configured, dense.

    params/nonzero is None where channels were removed and no masks are left; params/kept is there for all.
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
        "macs/not_counted": accounting.macs_without_weight(model, sizes["image_size"]),
    }


def summarise(run: Run, scores: dict[str, dict], counts: dict[str, Any], *, wall_s: float) -> dict[str, Any]:
    """Return the flat summary of design section 7; percentages for accuracies, counts for parameters and MACs."""
    config, folder = run.config, run.folder
    dense = [figures for entry, figures in zip(run.planned, run.outcomes, strict=True)
             if entry.phase.hook == "train" and not entry.phase.active and entry.phase.end is None]
    train_dense = training_macs(config, counts["macs/dense"], run.dataset.num_batches(config.schedule.batch_size))
    spent = run.macs_offset
    flat = {f"{split}/{key}": value for split, values in scores.items() for key, value in values.items()}
    summary = {
        "status": "finished",
        "run/id": folder.key,
        "run/group": folder.group,
        "run/seed": config.seed,
        "run/command": shlex.join(["prune-lab", *config.overrides]),
        "run/device": device_name(run.numerics),
        "run/versions": versions(),
        **choices(config),
        **run.dataset.info.figures(),
        "data/content": run.dataset.content,
        **flat,
        "dense/top1": dense[0]["top1"] if dense else None,
        "delta/top1": scores["final"]["top1"] - dense[0]["top1"] if dense else None,
        "dense/epochs": dense[0]["epochs"] if dense else None,
        **images_seen(run),
        **counts,
        **explained([figures["explained"] for figures in run.outcomes]),
        "macs/train": spent,
        "macs/train_dense": train_dense,
        "macs/train_ratio": spent / train_dense if train_dense else None,
        "macs/train_ratio_paper": run.outcomes[-1]["paper_train_ratio"],
        **config.method.chosen(),
        "phases": [
            {"name": entry.phase.name, "key": entry.key, "epochs": figures["epochs"], "reused": figures["reused"],
             "wall_s": figures["wall_s"]}
            for entry, figures in zip(run.planned, run.outcomes, strict=True)
        ],
        "time/wall_s": wall_s,
        "time/images_per_s": run.images_done / run.train_s if run.train_s else None,
    }
    summary |= targets.figures(config.method.asked(), summary)
    if config.matched:
        summary |= config.matched.figures(summary)
    if own := own_summary(run):
        control, top1 = config.method.config.control, scores["final"]["top1"]
        summary |= control_runs.figures(control, top1, own=own, own_name=run.own.directory.name)
    return summary


def images_seen(run: Run) -> dict[str, int | None]:
    """Return of how many images the accuracies are, and of how many an epoch was.

    `train/images_per_epoch` is null unless `trainer.limit_train_batches` leaves out whole batches.
    """
    info, trainer, batch = run.dataset.info, run.config.trainer, run.config.schedule.batch_size
    limit, steps, world = trainer.limit_eval_batches, trainer.limit_train_batches, distributed.world_size()

    def evaluated(num_images: int) -> int:
        shares = [len(eval_range(num_images, rank=rank, world_size=world)) for rank in range(world)]
        return sum(share if limit is None else min(share, limit * trainer.eval_batch_size) for share in shares)

    limited = steps is not None and steps < run.dataset.num_batches(batch)
    return {
        "data/num_eval": info.num_eval,
        "final/images": evaluated(info.num_eval),
        **({"test/images": evaluated(info.num_test)} if info.num_val else {}),
        "train/images_per_epoch": steps * batch if limited else None,
    }


def explained(told: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the figures that the phases tell, later ones first.

    Those of masks are the last phase's alone: masks of earlier phases may be gone with the channels they left out.
    """
    merged = {key: value for figures in told for key, value in figures.items()}
    return {key: value for key, value in merged.items() if key in told[-1] or not key.startswith("mask/")}


def own_summary(run: Run) -> dict[str, Any] | None:
    """Return the summary of the method's own run beside a control, None if there is no such run."""
    return run.own.finished() if run.own and distributed.is_main() else None


def control_lines(run: Run, summary: dict[str, Any]) -> list[str]:
    """Return a control's results beside the method's own; nothing for other runs."""
    own = own_summary(run)
    return control_runs.beside(summary, own, run.config.method.config.control) if own else []


def choices(config: RunConfig) -> dict[str, str]:
    return {
        "config/model": config.model.name,
        "config/dataset": config.dataset.name,
        "config/method": config.method.config.name,
        "config/schedule": config.schedule.name,
    }


def training_macs(config: RunConfig, forward: int, steps_per_epoch: int) -> int:
    """Return the MACs of training a network that never changes once over the schedule's train phase.

    The phase has its length as configured, also where method.match_by=epochs has stretched it.

    Args:
        forward: MACs per image of the network, dense or masked; a training step costs 3 times as much.
    """
    epochs = config.matched.configured_epochs if config.matched else config.schedule.phase("train").epochs
    limit = config.trainer.limit_train_batches
    steps = steps_per_epoch if limit is None else min(steps_per_epoch, limit)
    return 3 * forward * epochs * steps * config.schedule.batch_size


def device_name(numerics: Numerics) -> str:
    if numerics.torch_device.type == "cuda":
        return f"{torch.cuda.get_device_name(numerics.torch_device)} ({numerics.precision})"
    return f"{platform.processor() or platform.machine()} {torch.get_num_threads()} threads ({numerics.precision})"


def versions() -> dict[str, str]:
    return {"prune-lab": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "hydra-core": version("hydra-core")}
