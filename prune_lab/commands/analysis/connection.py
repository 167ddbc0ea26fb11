"""Loss and error along a curve between two finished networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from prune_lab.commands.analysis.bench import (
    Bench,
    norm_layers,
    place,
    recompute_statistics,
    statistics,
    trained,
    zeros,
)
from prune_lab.commands.analysis.curve_training import Recipe, train_middle
from prune_lab.commands.analysis.curves import Curve, barrier, distance, positions
from prune_lab.commands.analysis.runs import FinishedRun
from prune_lab.foundations.checkpoint import CheckpointPair
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.files import jsonable, write_bytes
from prune_lab.tracking.jsonl import append_record, read_records, rewrite

FIGURES = ("loss", "error")
NORM_BATCH_SIZE = 500
"""images per batch of statistics; fixed, because the variance within a batch depends on it"""


@dataclass(frozen=True)
class Plan:
    """The measurements along the curve."""

    points: int
    train_images: int | None
    """training images for loss and error; None: all"""
    norm_images: int | None
    """training images for recomputing batch-norm statistics at every point; None: they are interpolated"""
    recipe: Recipe | None
    """how the middle of a Bezier curve is trained; None: the straight line"""


@dataclass(frozen=True)
class _Survey:
    """A network that can be set to any point of a curve."""

    bench: Bench
    model: nn.Module
    curve: Curve
    norms: Curve
    """statistics of batch norm: a straight line"""
    plan: Plan

    def go(self, t: float) -> None:
        """Set the network to the point at `t`."""
        place(self.model, self.curve.at(t))
        for buffer, value in zip(statistics(self.model).values(), self.norms.at(t), strict=True):
            buffer.copy_(value)
        if self.plan.norm_images is not None:
            chosen = self.bench.drawn("images for batch norm", self.plan.norm_images)
            batches = self.bench.training_images(chosen, NORM_BATCH_SIZE, augment=True)
            recompute_statistics(self.model, batches)

    def measure(self, t: float) -> dict[str, float]:
        """Return the figures of the point at `t`."""
        self.go(t)
        chosen = self.bench.drawn("training images", self.plan.train_images)
        scores = {"train": self.bench.training_scores(self.model, chosen)}
        scores[self.bench.dataset.eval_split] = self.bench.eval_scores(self.model)
        figures = {f"{split}/{key}": values[key] for split, values in scores.items() for key in FIGURES}
        return {"t": t, **figures, "zeros": zeros(self.model)}


def explore(
    bench: Bench,
    runs: tuple[FinishedRun, FinishedRun],
    plan: Plan,
    folder: Path,
    *,
    report: Callable[[str], None],
    show: Callable[[dict], None],
) -> dict[str, Any]:
    """Return the points of the curve between two networks, its barriers and lengths.

    The results of a stopped call in `folder` are reused: epochs of the curve, and measured points.

    Args:
        report: called with lines on the training of the curve.
        show: called with the figures of each point, in order.

    Raises:
        UserError: tensors of the networks differ, or the training of the curve diverges.
    """
    models = [bench.network(run) for run in runs]
    _require_equal_shapes(models, runs)
    curve, norms = (Curve(*([value.detach().clone() for value in pick(model).values()] for model in models))
                    for pick in (trained, statistics))
    model = models[0]
    if plan.recipe is not None:
        checkpoints = CheckpointPair(folder, report)
        curve = train_middle(model, curve, bench, plan.recipe, checkpoints, report)
        _save_middle(model, curve, folder)
    survey = _Survey(bench, model, curve, norms, plan)
    points = _measure_points(survey, folder / "points.jsonl", show)
    if plan.recipe is not None:
        checkpoints.remove()
    return {
        "split": bench.dataset.eval_split,
        "norm_layers": len(norm_layers(model)),
        "distance": distance(curve.start, curve.end),
        "length": curve.length(),
        "barrier": barriers(points),
        "zeros": {"start": points[0]["zeros"], "middle": _zeros_at_middle(survey), "end": points[-1]["zeros"]},
        "points": points,
    }


def barriers(points: list[dict[str, float | None]]) -> dict[str, float]:
    """Return the barrier of every figure; None, which JSON has for infinite and NaN, makes it infinite."""
    names = [name for name in points[0] if "/" in name]
    return {name: barrier([math.inf if p[name] is None else p[name] for p in points]) for name in names}


def _measure_points(survey: _Survey, path: Path, show: Callable[[dict], None]) -> list[dict[str, Any]]:
    done = read_records(path) if path.exists() else []
    rewrite(path, done)  # without a last line truncated by a kill
    for point in done:
        show(point)
    for t in positions(survey.plan.points)[len(done) :]:
        point = jsonable(survey.measure(t))
        append_record(path, point)
        done.append(point)
        show(point)
    return done


def _zeros_at_middle(survey: _Survey) -> float:
    place(survey.model, survey.curve.at(0.5))
    return zeros(survey.model)


def _save_middle(model: nn.Module, curve: Curve, folder: Path) -> None:
    """Save the trained middle, so that the curve can be reproduced."""
    tensors = {name: value.cpu().contiguous() for name, value in zip(trained(model), curve.middle, strict=True)}
    write_bytes(folder / "middle.safetensors", save(tensors))


def _require_equal_shapes(models: list[nn.Module], runs: tuple[FinishedRun, FinishedRun]) -> None:
    one, other = ({name: tuple(value.shape) for name, value in model.state_dict().items()} for model in models)
    for name in dict.fromkeys([*one, *other]):
        if one.get(name) != other.get(name):
            shapes = [f"{shapes.get(name)} in {run.directory}" for shapes, run in zip((one, other), runs, strict=True)]
            raise UserError(f"the runs have different networks: {name} is {', '.join(shapes)}")

