"""Small runs within the test process, and comparisons of what two runs left behind. Holds no tests."""

from __future__ import annotations

import copy
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from prune_lab.compose import check
from prune_lab.compose.choices import conf_dir
from prune_lab.compose.overrides import compose_checked
from prune_lab.config.run import RunConfig
from prune_lab.pipeline.runner import run

TINY = (
    "dataset=fake", "dataset.num_train=48", "dataset.num_test=20", "dataset.image_size=16", "dataset.num_classes=4",
    "model=resnet20", "model.width=0.25", "schedule.batch_size=8", "schedule.train.epochs=2",
    "schedule.train.warmup_epochs=0", "schedule.finetune.epochs=1", "trainer.precision=fp32", "logger.wandb=disabled",
)  # fmt: skip
"""Options of a run of 6 steps per epoch that takes a fraction of a second."""

METHODS = {
    "dense": ("method=dense",),
    "static": ("method=static",),
    "set": ("method=set", "method.interval=2"),
    "rigl": ("method=rigl", "method.interval=2"),
    "rigl_itop": ("method=rigl_itop", "method.interval=2"),
    "set_itop": ("method=set_itop", "method.interval=2"),
    "rigl_structured": ("method=rigl_structured", "method.interval=2"),
    "snfs": ("method=snfs", "method.interval=2"),
    "dst_ee": ("method=dst_ee", "method.interval=2"),
    "gmp": ("method=gmp", "method.num_cuts=3"),
    "magnitude": ("method=magnitude",),
    "snip": ("method=snip", "method.samples_per_class=3"),
    "grasp": ("method=grasp", "method.samples_per_class=2", "method.rounds=2", "method.reinit_linear=true"),
    "random": ("method=random", "method.samples_per_class=3", "method.sparsity=0.7"),
    "magnitude_init": ("method=magnitude_init", "method.samples_per_class=3"),
    "synflow": ("method=synflow", "method.rounds=5", "method.samples_per_class=3"),
    "autosparse": ("method=autosparse",),
    "autosparse_topk": ("method=autosparse_topk",),
    "str": ("method=str", "method.threshold_init=-10", "method.threshold_decay=0.2"),
    "directional": ("method=directional", "method.c=0.05"),
    "l0": ("method=l0", "method.gate_lr=1", "method.penalty=1000", "method.bn_images=0"),
    "constrained_l0": (
        "method=constrained_l0", "method.sparsity=0.5", "method.gate_optimizer=sgd", "method.gate_lr=30",
        "method.drop_rate=0.01", "method.dual_lr=1000", "method.rounding=exact", "method.bn_images=0",
    ),
    "l0 filter": (
        "method=l0", "method.granularity=filter", "method.gate_optimizer=sgd", "method.gate_lr=6",
        "method.penalty=0.0005", "method.drop_rate=0.85", "method.bn_images=0",
    ),
    "constrained_l0 filter": (
        "method=constrained_l0", "method.granularity=filter", "method.sparsity=null", "method.macs_ratio=0.6",
        "method.rounding=exact", "method.gate_optimizer=sgd", "method.gate_lr=3", "method.bn_images=0",
    ),
    "dep_l0": ("method=dep_l0", "method.macs_ratio=0.6"),
    "dep_l0 dense": (
        "method=dep_l0", "method.start=dense", "method.macs_ratio=null", "method.penalty=0.001",
        "method.generator=backward", "method.freeze_fraction=0", "method.gate_lr=0.02",
    ),
    "lottery": ("method=lottery", "method.levels=2", "method.arm=IMP-rewind", "method.rewind_to=7it"),
    "greedy": ("method=greedy", "method.images=24", "method.positions=4", "method.between_batch=8"),
    "l1_filter": ("method=l1_filter", "method.macs_ratio=null", "method.params_ratio=0.5", "method.scope=global"),
    "fpgm": (
        "method=fpgm", "method.macs_ratio=null", "method.channels_ratio=0.6", "method.by_norm=0.2",
        "method.reselect_every=1",
    ),
    "haste": ("method=haste", "method.min_channels=4", "method.hyperplanes=3"),
    "slimming": ("method=slimming", "method.scale_penalty=0.01"),
    "gdp": ("method=gdp", "method.gate_lr=1", "method.dual_lr=1000"),
    "structured_directional": ("method=structured_directional", "method.macs_ratio=0.7", "method.bn_images=16"),
    "structured_directional SDP": (
        "method=structured_directional", "method.variant=SDP", "method.macs_ratio=0.7", "method.eigenvectors=2",
        "method.hessian_images=8", "method.bn_images=0",
    ),
    "masksparsity": ("method=masksparsity", "method.scale_penalty=0.01"),
    "small_dense": ("method=small_dense", "method.sparsity=0.5", "method.tolerance=0.3"),
}
"""Each method with the options that make it act within such a run."""


def compose(*overrides: str) -> RunConfig:
    """Return the checked configuration of a recipe with these options: none of them counts as typed."""
    return replace(composed(*overrides), overrides=())


def composed(*overrides: str) -> RunConfig:
    """Return the checked configuration of a command with these options.

    Composing takes as long as a small run. It is done once for all that differ in an absolute `output_dir` only.
    """
    folders = [line.removeprefix("output_dir=") for line in overrides if line.startswith("output_dir=/")]
    rest = tuple(line for line in overrides if not line.startswith("output_dir=/"))
    for folder in folders:
        check._check_output_dir(folder)
    environment = os.environ.get("PRUNE_LAB_CACHE"), os.environ.get("HOME")
    config = replace(copy.deepcopy(_composed(rest, *environment)), overrides=overrides)
    return replace(config, output_dir=folders[-1]) if folders else config


@cache
def _composed(overrides: tuple[str, ...], *_environment: str | None) -> RunConfig:
    """Return the configuration; the part of the environment that composing reads is not in the overrides."""
    (config,) = compose_checked(conf_dir(), list(overrides), sweep=False)
    return config


def execute(folder: Path, *overrides: str) -> int:
    """Run one command in this process with its outputs in `folder`; return its exit code."""
    return run(compose(*overrides, f"output_dir={folder}"))


def run_dir(folder: Path) -> Path:
    """Return the directory of the only run in `folder`."""
    (path,) = folder.glob("*/run.json")
    return path.parent


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((run_dir(folder) / "summary.json").read_text())


def records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl without measured times; every line must be whole."""
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def status(folder: Path) -> dict[str, Any]:
    return json.loads((run_dir(folder) / "status.json").read_text())


def assert_same_run(one: Path, other: Path) -> None:
    """Assert that two output folders hold the same run: network bit for bit, records, figures but for times."""
    mine, theirs = load_file(run_dir(one) / "model.safetensors"), load_file(run_dir(other) / "model.safetensors")
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name
    assert records(run_dir(one)) == records(run_dir(other))
    assert (run_dir(one) / "layers.json").read_text() == (run_dir(other) / "layers.json").read_text()
    assert _timeless(summary(one)) == _timeless(summary(other))


def assert_same_network(one: Path, other: Path, **tolerance: float) -> None:
    """Assert that the runs in two output folders ended with the same network, bit for bit without tolerances."""
    mine, theirs = (load_file(run_dir(folder) / "model.safetensors") for folder in (one, other))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], **(tolerance or {"rtol": 0, "atol": 0}))


def _timeless(flat: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in flat.items() if not key.startswith("time/") and key != "run/command"}
    kept["phases"] = [{key: phase[key] for key in ("name", "key", "epochs")} for phase in flat["phases"]]
    return kept


def damage(path: Path, how: str) -> None:
    """Spoil a file: "flip" one bit, "cut" the last byte, or leave a "stub" of ten bytes."""
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
    elif how == "cut":
        content = content[:-1]
    else:
        content = content[:10]
    path.write_bytes(content)


def fork(log: Path, call: Callable[[], int]) -> int:
    """Start `call` in a process of its own, its output appended to `log`; return its id. Its result is the exit code.

    A fork instead of a new interpreter saves the seconds that importing torch takes.
    """
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        with open(log, "a", buffering=1) as stream:
            for number in (1, 2):
                os.dup2(stream.fileno(), number)
            sys.stdout = sys.stderr = stream
            try:
                code = call()
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


def fork_run(folder: Path, *overrides: str) -> int:
    """Start one command with its outputs in `folder` and what it prints beside it; return the process id."""
    log = folder.with_name(f"{folder.name}.{len(list(folder.parent.glob(f'{folder.name}.*.log')))}.log")
    log.touch()
    compose(*overrides, f"output_dir={folder}")  # here, so that the process and its successors know the options
    return fork(log, lambda: execute(folder, *overrides))


def fork_pair(log: Path, call: Callable[[], int]) -> list[int]:
    """Start `call` in two processes that find each other as under torchrun; return their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def member(rank: int) -> int:
        os.environ.update(group, RANK=str(rank), LOCAL_RANK=str(rank))
        return call()

    return [fork(log, lambda rank=rank: member(rank)) for rank in (0, 1)]


def wait_for(child: int) -> int:
    """Return the exit code of a process, negative for the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
