"""An ordinary training step of any method reads nothing back from the device: a GPU would stand still for it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prune_lab import datasets
from prune_lab.core import chain
from prune_lab.pipeline import identity
from prune_lab.pipeline.validation import RandomImages, task_without_files
from prune_lab.training.averaging import moving_average
from prune_lab.training.device_config import resolve_device_config
from prune_lab.training.loop import TrainState, train_step
from prune_lab.training.phases import open_context, open_training
from tests.helpers.runs import METHODS, TINY, compose

READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")
"""what of a tensor's functions brings values to the host"""
WAITS = {"aten::nonzero", "aten::masked_select", "aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero",
         "aten::unique", "aten::_unique2", "aten::bincount"}  # fmt: skip
"""operations whose result's size or value the host must know"""


class Watch(TorchDispatchMode):
    """Notes where the host waits for values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
        if func.name().removesuffix(".default") in WAITS or (
            by_mask and any(part is not None and part.dtype == torch.bool for part in args[1])
        ):
            self.note(func.name())
        return func(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        ours = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in traceback.extract_stack()
                if "prune_lab" in frame.filename]  # fmt: skip
        if any("torch/optim/" in frame.filename for frame in traceback.extract_stack()):
            return  # optimizers and the moving average count their steps in tensors on the host
        self.found.append(f"{what} at {' < '.join(reversed(ours)) or 'torch'}")


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Give what notes every wait of the host in the block."""
    with monkeypatch.context() as patch, Watch() as watch:
        for name in READS:
            original = getattr(torch.Tensor, name)

            def noting(self, *args, original=original, name=name, **kwargs):
                watch.note(name)
                return original(self, *args, **kwargs)

            patch.setattr(torch.Tensor, name, noting)
        yield watch


def first_training(*overrides: str) -> TrainState:
    """Return the loop's state at the start of the first training phase in which the method acts."""
    config = compose(*TINY, *overrides)
    device_config = resolve_device_config(config.trainer)
    inputs = {"device_config": device_config.identity(), "world_size": 1}
    planned = identity.plan_phases(config, model=config.model, fingerprint=None, **inputs)
    dataset = RandomImages(datasets.describe(config.dataset), device_config.torch_device)
    trains = [entry for entry in planned if entry.phase.is_training]
    entry = next((entry for entry in trains if entry.phase.active), trains[0])
    job = task_without_files(config, config.model, entry, dataset, device_config, chain.Results(()))
    context = open_context(job)
    training = open_training(job, context)
    job.method.setup(context)
    training.ema = moving_average(context.model, config.trainer.ema_decay)
    context.model.train()
    return training


SLOW = {"str": ("method.threshold_decay=0.00001",)}
"""what keeps a method from going too far in so long a schedule"""
SELECTING = ("autosparse_topk",)
"""choose their weights anew in every step, by a threshold that the host reads"""
LONG = ("schedule.train.epochs=2000", "schedule.finetune.epochs=2000", "trainer.ema_decay=0.9", "trainer.clip_norm=10")


def test_the_watch_sees_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(4.0)
    with watched(monkeypatch) as watch:
        values[values > 1].sum().item()
        bool(values.sum() > 2), float(values[0]), values.tolist(), values.nonzero()
    kinds = {line.split(" at ")[0] for line in watch.found}
    assert {"item", "__bool__", "__float__", "tolist", "aten::index.Tensor", "aten::nonzero"} <= kinds


def test_the_moving_average_counts_its_steps_on_the_host() -> None:
    average = moving_average(torch.nn.Linear(2, 2, device="meta"), 0.9)
    assert average.module.weight.device.type == "meta" and average.n_averaged.device.type == "cpu"


@pytest.mark.thin(3)
@pytest.mark.parametrize("method", [method for method in METHODS if method not in SELECTING])
def test_an_ordinary_step_reads_nothing_back(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [o for o in METHODS[method] if not o.startswith(("method.interval", "method.threshold_decay"))]
    training = first_training(*LONG, *SLOW.get(method, ()), *options)
    images, labels = training.dataset.batch(training.batch_size)
    for _ in range(2):
        train_step(training, images, labels)
        training.progress.step += 1
    with watched(monkeypatch) as watch:
        train_step(training, images, labels)
    assert watch.found == []


def num_calls(work) -> int:
    """Return how many functions, of Python or built in, are called while `work` runs."""
    seen = []

    def note(frame, event, argument):
        if event in ("call", "c_call"):
            seen.append(event)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return len(seen)


def calls_beside_torch(method: str, model: str) -> int:
    """Return the calls of an ordinary step but for forward, backward and optimizer, which are torch's."""
    options = [option for option in METHODS[method] if not option.startswith("method.interval")]
    training = first_training(*options, f"model={model}", "schedule.train.epochs=2000")
    images, labels = training.dataset.batch(training.batch_size)
    for _ in range(3):  # the first ones make what later ones find: momentum, and masks that are installed
        train_step(training, images, labels)
        training.progress.step += 1
    optimizer = training.context.optimizer
    gradients = [parameter.grad for parameter in training.context.model.parameters()]

    def device_config(*_):
        for parameter, gradient in zip(training.context.model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        return torch.zeros(()), torch.zeros(len(labels), 4)

    training.differentiate = device_config

    def torchs_part():
        optimizer.zero_grad(set_to_none=True)
        device_config()
        optimizer.step()

    return num_calls(lambda: train_step(training, images, labels)) - num_calls(torchs_part)


@pytest.mark.parametrize("method", ["dense", "static", "rigl", "set", "gmp", "magnitude"])
def test_the_loop_adds_no_python_per_layer(method: str) -> None:
    small, large = (calls_beside_torch(method, model) for model in ("resnet20", "resnet44"))
    assert small == large < 200
