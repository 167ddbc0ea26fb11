"""Names of phases and runs: hashes of exactly what can change their results. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from typing import Any

from prune_lab import models
from prune_lab.config.run import RunConfig
from prune_lab.core.chain import PlannedPhase, resolve
from prune_lab.core.method import build_method
from prune_lab.core.phase import Phase
from prune_lab.datasets import base

FORMAT = 4
"""Raised when the meaning of stored results changes; older phases are then ignored and run again."""

# Resolved (`device_config`) or without effect on results; a limit on evaluation is counted in images.
_NOT_TRAINING = {
    "device", "precision", "channels_last", "compile", "checkpoint_interval_s", "threads", "eval_batch_size",
    "limit_eval_batches",
}


def plan_phases(
    config: RunConfig, *, model: Any, fingerprint: str | None, device_config: dict, world_size: int
) -> list[PlannedPhase]:
    """Return the phases of a run with their keys; a key covers its inputs and the key of the previous phase.

    Args:
        model: options of the network that is built, after the method adapted them.
        fingerprint: content hash of the data set; None: keys that depend on options alone.
        device_config: resolved precision, memory format and kind of device.
    """
    shared = {
        "format": FORMAT,
        "seed": config.seed,
        "model": _without(asdict(model), {"weights"}) | {"weights": models.weights_digest(model)},
        "dataset": base.identity(config.dataset) | {"fingerprint": fingerprint},
        "device_config": device_config,
        "world_size": world_size,
        "eval_images": _evaluated(config),
    }
    training = _without(asdict(config.trainer), _NOT_TRAINING)
    method, planned = build_method(config), []
    previous: str | None = None
    keys: dict[str, str] = {}
    for declared in method.chain():
        phase, schedule = resolve(declared, config)
        inputs = shared | {"phase": _fields(phase), "previous": None if phase.fresh else previous}
        if phase.origin is not None:
            inputs["origin"] = keys[phase.origin]
        if schedule is not None:
            inputs["schedule"] = asdict(schedule) | {
                "batch_size": config.schedule.batch_size,
                "label_smoothing": config.schedule.label_smoothing,
            }
            inputs["optimizer"] = asdict(config.optimizer)
            inputs["trainer"] = training
        if phase.active:
            inputs["method"] = method.phase_identity(phase)
        previous = keys[phase.name] = digest(inputs)
        planned.append(PlannedPhase(phase, previous, schedule, inputs))
    return planned


def _fields(phase: Phase) -> dict[str, Any]:
    """Return the fields of a phase that decide its result; its starting point has keys of its own."""
    acts = None if phase.acts is None else phase.acts.__name__
    fields = {"name": phase.name, "acts": acts, "schedule": phase.schedule, "active": phase.active}
    bounds = {"begin": phase.begin, "end": phase.end}
    places = {key: place and {"count": place.count, "unit": place.unit} for key, place in bounds.items()}
    return fields | places | {"order": phase.order, "keeps_optimizer": phase.keeps_optimizer}


def _evaluated(config: RunConfig) -> int | None:
    """Return the number of images after which an evaluation stops; None: it uses all, for any batch size."""
    limit = config.trainer.limit_eval_batches
    return None if limit is None else limit * config.trainer.eval_batch_size


def digest(value: Any) -> str:
    """Return 32 hexadecimal digits that depend only on `value` (JSON-able containers)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def run_key(planned: list[PlannedPhase], config: RunConfig) -> str:
    """Return the key of the whole run: its last phase, its method, and its match."""
    matched = [config.matched.wanted()] if config.matched else []
    return digest([planned[-1].key, build_method(config).identity(), *matched])


def group_key(config: RunConfig, **inputs: Any) -> str:
    """Return a name shared by runs whose results can differ only by the seed; `inputs` as for `plan_phases`."""
    seedless = replace(config, seed=0)
    key = run_key(plan_phases(seedless, **inputs), seedless)
    return f"{config.dataset.name}-{config.model.name}-{config.method.name}-{key[:8]}"


def _without(mapping: dict, names: set[str]) -> dict:
    return {key: value for key, value in mapping.items() if key not in names}
