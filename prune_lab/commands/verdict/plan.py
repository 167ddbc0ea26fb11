"""The runs that a verdict needs, their order, and their shared phases."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prune_lab import datasets, models
from prune_lab.accounting.costs import count_parameters
from prune_lab.commands.verdict.cases import REWOUND, sparsity_of
from prune_lab.commands.verdict.conditions import DENSE, REINIT, TICKET
from prune_lab.compose.overrides import compose_checked
from prune_lab.config.run import RunConfig
from prune_lab.core.method import build_method
from prune_lab.core.usable_layers import usable_layers
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.pipeline import identity
from prune_lab.pipeline.run_folder import RunFolder

_CONTEXT = ("LT-OMP", "RR-OMP", "LR-rewinding-OMP")
"""one-shot pruning, and pruning the trained network with further training: rows beside the conditions"""

_SWEEP = ("schedule.train.lr=0.005,0.01,0.1", "seed=0,1,2", "method.levels=4,8,11,13,14")
"""learning rates of Ma et al. 2021 for ResNet-20, their 3 runs per point, the sparsities in their tables"""
PRESETS = {
    # How the verdict depends on the learning rate: small ones favour the ticket, large ones the dense network.
    "learning_rate": _SWEEP,
    # The same with half the training: 78 and 160 epochs, milestones scaled with them.
    "epochs": (*_SWEEP, "schedule=cifar_160", "schedule.multiplier=0.4875,1"),
    # The same with twice the channels: more redundancy preserves tickets up to higher sparsity.
    "width": (*_SWEEP, "model.width=1,2"),
}


@dataclass(frozen=True)
class Planned:
    """One of the runs that a verdict needs."""

    label: str
    config: RunConfig
    directory: Path
    trainings: tuple[str, ...]
    """keys of its phases that train"""


def with_preset(typed: Sequence[str], preset: str | None) -> list[str]:
    """Return the typed options and those of the preset that are not typed."""
    names = {argument.partition("=")[0] for argument in typed}
    if "method.sparsity" in names:
        names.add("method.levels")  # either of them decides the sparsity
    added = [line for line in PRESETS[preset] if line.partition("=")[0] not in names] if preset else []
    return [*added, *typed]


def plan(conf_dir: Path, overrides: Sequence[str]) -> list[Planned]:
    """Return the runs that the definition compares, all checked: dense ones first, then by sparsity.

    Args:
        overrides: options of the runs, lists of values allowed; those of `method` are options of method=lottery,
            except method.tolerance of the small dense network.

    Raises:
        UserError: a wrong option, or too few learning rates or seeds for any verdict.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("verdict starts its runs in one process, one after the other: start it without torchrun")
    _refuse(overrides)
    shared = [line for line in overrides if not line.startswith("method.")]
    small = [line for line in overrides if line.startswith("method.tolerance=")]
    lottery = [line for line in overrides if line.startswith("method.") and line not in small]
    rewinding = [line for line in lottery if line.startswith(("method.rewind_to=", "method.optimizer_state="))]
    masks = ["method=lottery", *(line for line in lottery if line not in rewinding)]
    arms = ",".join((TICKET, REINIT, *_CONTEXT))
    jobs = [*compose_checked(conf_dir, [*shared, "method=dense"], sweep=True),
            *compose_checked(conf_dir, [*shared, *masks, f"method.arm={arms}"], sweep=True)]  # fmt: skip
    _check_enough(config for config in jobs)
    if rewinding:
        rewound = f"{REWOUND},{REINIT}" if any(line.startswith("method.rewind_to=") for line in rewinding) else REWOUND
        jobs += compose_checked(conf_dir, [*shared, *masks, *rewinding, f"method.arm={rewound}"], sweep=True)
    jobs += [config for job in _small_jobs(jobs, small) for config in compose_checked(conf_dir, job, sweep=True)]
    varied = _varied(jobs)
    widths: dict[str, Any] = {}
    chosen = {repr(config.dataset): config.dataset for config in jobs}
    contents = {name: datasets.content(options) for name, options in chosen.items()}
    planned = {entry.directory: entry for entry in (_planned(config, varied, widths, contents) for config in jobs)}
    return sorted(planned.values(), key=_order)


def _refuse(overrides: Sequence[str]) -> None:
    for line in overrides:
        name = line.partition("=")[0].lstrip("+~")
        if name in ("method", "method.arm", "method.name", "method.copy"):
            raise UserError(f"{line}: verdict chooses methods and arms itself; leave {name}=... out")


def _check_enough(configs: Iterable[RunConfig]) -> None:
    """Reject runs that could give no verdict, whatever their results."""
    configs = list(configs)
    lrs, seeds = {config.schedule.train.lr for config in configs}, {config.seed for config in configs}
    if len(lrs) < 2:
        raise UserError(
            f"schedule.train.lr={lrs.pop():g}: a verdict needs two learning rates or more, such as "
            "schedule.train.lr=0.01,0.1, because dense training at one is not known to be its best"
        )
    if len(seeds) < 2:
        raise UserError(f"seed={seeds.pop()}: a verdict needs two seeds or more, such as seed=0,1,2")


def is_ticket(config: RunConfig) -> bool:
    return getattr(config.method, "arm", None) == TICKET


def _small_jobs(jobs: Sequence[RunConfig], small: Sequence[str]) -> list[list[str]]:
    """Return the options of the dense networks that have as many parameters as each ticket keeps."""
    found = {}
    for config in jobs:
        if is_ticket(config):
            shared = [line for line in config.overrides if not line.startswith("method")]
            job = [*shared, "method=small_dense", *small, f"method.sparsity={small_sparsity(config):.6g}"]
            found[tuple(job)] = job
    return list(found.values())


def small_sparsity(config: RunConfig) -> float:
    """Return the fraction of all parameters that a ticket lacks; its own sparsity counts only eligible weights."""
    from prune_lab.training.phases import layer_costs

    info = datasets.describe(config.dataset)
    sizes = {"num_classes": info.num_classes, "image_size": info.image_size}
    model = models.build_on_meta(config.model, **sizes)
    layers = usable_layers(build_method(config), model, layer_costs(config.model, **sizes))
    eligible = sum(layer.size for layer in layers if layer.eligible)
    return sparsity_of(asdict(config.method)) * eligible / count_parameters(model)


def _varied(jobs: Sequence[RunConfig]) -> set[str]:
    """Return the names of the options that separate runs."""
    lines = {line for config in jobs for line in config.overrides if not line.startswith(("method=", "method.arm="))}
    names = [line.partition("=")[0] for line in lines]
    return {name for name in names if names.count(name) > 1} | {"method.levels", "method.sparsity", "method.rewind_to"}


def _planned(
    config: RunConfig, varied: set[str], widths: dict[str, Any], contents: dict[str, str | None]
) -> Planned:
    """Return one run with the folder and the trainings that the pipeline will give it.

    Args:
        varied: names of the options to show.
        widths: known adapted model options; new ones are added.
        contents: `Dataset.content` of each data set's options.
    """
    from prune_lab.training.device_config import resolve_device_config

    info, method = datasets.describe(config.dataset), build_method(config)
    sizes = {"num_classes": info.num_classes, "image_size": info.image_size}
    key = repr((config.model, method.config, sizes))
    if key not in widths:
        widths[key] = method.adapt_model(config.model, **sizes)
    inputs = {"model": widths[key], "device_config": resolve_device_config(config.trainer).identity(), "world_size": 1}
    content = contents[repr(config.dataset)]
    phases = identity.plan_phases(config, fingerprint=content, **inputs)
    name = getattr(method.config, "arm", method.config.name)
    shown = [line for line in config.overrides if line.partition("=")[0] in varied]
    return Planned(
        " ".join([name, *shown]),
        config,
        RunFolder.of(config, fingerprint=None, content=content, **inputs).directory,
        tuple(entry.key for entry in phases if entry.trains),
    )


def _order(planned: Planned) -> tuple[bool, float]:
    """Dense runs first, then by sparsity."""
    method = asdict(planned.config.method)
    dense = method["name"] == DENSE
    return (not dense, 0.0 if dense else sparsity_of(method))


def sharing(planned: Sequence[Planned]) -> str:
    """Return the number of trainings in the runs, and the number without sharing."""
    keys = [key for entry in planned for key in entry.trainings]
    return f"{len(set(keys))} trainings, because equal phases are shared; {len(keys)} without sharing"


def check_data(planned: Sequence[Planned]) -> None:
    """Reject missing or damaged data once, instead of in every run."""
    from prune_lab.training.device_config import resolve_device_config

    for config in {repr(entry.config.dataset): entry.config for entry in planned}.values():
        device_config = resolve_device_config(config.trainer)
        fmt = datasets.BatchFormat(device_config.torch_device, torch.float32, device_config.channels_last)
        datasets.load(config.dataset, fmt).close()
