"""Small real runs inside the test process, and a look at the loop after every step of them."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from prune_lab.compose.choices import choices, options_of
from prune_lab.config.run import RunConfig
from prune_lab.core.method import Method
from prune_lab.foundations import checkpoint
from prune_lab.foundations.schema import parse
from prune_lab.pipeline import runner
from prune_lab.training import loop
from prune_lab.training.loop import TrainState
from tests.helpers.runs import composed

CONF = Path(__file__).parents[2] / "conf"

NAMES = choices(CONF, "method")

# Three steps per epoch: nine of training, six of fine-tuning.
TINY = (
    "dataset=fake", "dataset.image_size=16", "dataset.num_train=24", "dataset.num_test=8", "model=resnet20",
    "model.width=0.25", "schedule.batch_size=8", "schedule.train.epochs=3", "schedule.finetune.epochs=2",
    "trainer.device=cpu", "trainer.precision=fp32", "logger.wandb=disabled",
)  # fmt: skip

# Values for short runs, by the name of the option, so that new methods with the same options fit in.
SHORT = {
    "sparsity": 0.8, "interval": 2, "num_cuts": 3, "samples_per_class": 2, "threshold_init": -10,
    "threshold_decay": 0.2, "c": 0.05, "gate_lr": 1.0, "dual_lr": 1000.0, "penalty": 1000.0,
    "rounding": "exact", "bn_images": 0, "macs_ratio": 0.8,
    "min_channels": 2, "pointwise": "true", "hyperplanes": 4,
}  # fmt: skip

# For methods in which the same name stands for something of another size.
SHORT_OF = {"structured_directional": {"c": "null"}}


def yaml_node(name: str) -> dict[str, Any]:
    """Return the options of conf/method/NAME.yaml, inherited ones included."""
    return copy.deepcopy(_read(name))


@cache
def _read(name: str) -> dict[str, Any]:
    return options_of(CONF / "method" / f"{name}.yaml")


def brings(name: str, group: str) -> bool:
    """Return whether conf/method/NAME.yaml chooses the options of another group, such as optimizer, itself."""
    return f"- override /{group}@" in (CONF / "method" / f"{name}.yaml").read_text()


@cache
def method_class(name: str) -> type[Method]:
    module, _, attribute = yaml_node(name)["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@cache
def option_names(name: str) -> frozenset[str]:
    return frozenset(field.name for field in fields(method_class(name).Config))


def make(name: str, **changes: Any) -> Method:
    """Return the method with the options of its YAML file and `changes`."""
    node = {key: value for key, value in yaml_node(name).items() if key != "_target_"} | changes
    cls = method_class(name)
    return cls(parse(cls.Config, node, "method"))


def configure(output_dir: Path, name: str, *overrides: str, short: dict[str, Any] = SHORT) -> RunConfig:
    """Return the checked options of a tiny run of method `name`; later overrides win."""
    values = short | SHORT_OF.get(name, {})
    options = [f"method.{key}={value}" for key, value in values.items() if key in option_names(name)]
    chosen = {line.partition("=")[0]: line for line in (*TINY, f"method={name}", *options, *overrides)}
    return composed(*chosen.values(), f"output_dir={output_dir}")


def finish(config: RunConfig) -> Path:
    """Do the run to its end and return its directory."""
    assert runner.run(config) == 0
    return run_folder(config)


def run_folder(config: RunConfig) -> Path:
    (path,) = Path(config.output_dir).glob("*/config.yaml")
    return path.parent


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def last_result(folder: Path) -> dict[str, Any]:
    """Return the tensors of the run's last phase: model, masks, method."""
    return checkpoint.load(sorted((folder / "phases").iterdir())[-1] / "result.pt")


def watch(monkeypatch: pytest.MonkeyPatch, look: Callable[[TrainState, int], None]) -> None:
    """Have `look(training, step)` called after every training step of the runs that follow."""
    original = loop.train_step

    def step(training: TrainState, images: torch.Tensor, labels: torch.Tensor) -> None:
        original(training, images, labels)
        look(training, training.progress.step)

    monkeypatch.setattr(loop, "train_step", step)
