"""On a GPU: images per second, the fraction of its bf16 peak, seconds per CIFAR-10 epoch. Not run without one."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from benchmarks import workload
from benchmarks.report import Report
from benchmarks.timing import in_turn
from benchmarks.workload import Options, Workload

_SHAPES = {
    "resnet20": ("dataset=cifar10", "schedule.batch_size=128"),
    "resnet110": ("dataset=cifar10", "schedule.batch_size=128"),
    "vgg16": ("dataset=cifar10", "schedule.batch_size=128"),
    "resnet50": ("dataset=imagenet", "schedule.batch_size=64"),
}
_SIDE = 8192
_EPOCH = 50_000
"""images of CIFAR-10"""


def run(options: Options, report: Report) -> None:
    if not torch.cuda.is_available():
        report.note("not run: there is no GPU")
        return
    report.note(f"the peak is that of a bf16 product of {_SIDE} x {_SIDE} matrices, measured in turn with the steps; "
                "a step is taken as three forward passes of 2 FLOPs per MAC")  # fmt: skip
    for model, shape in _SHAPES.items():
        work = workload.workload("dense", options.over(*workload.SMALL, f"model={model}", *shape))
        _one(model, work, options, report)


def _one(model: str, work: Workload, options: Options, report: Report) -> None:
    multiply, flops = _product(work.device)
    times = in_turn({"step": work.ordinary, "product": multiply}, options.plan(30, 60), work.device)
    work.check()
    images, macs = work.training.batch_size, work.training.context.dense_macs
    step = statistics.median(times["step"])
    report.figure(f"{model}, batch {images}: images/s", images / step, "images/s")
    ideal = [value * 6 * macs * images / flops for value in times["product"]]
    report.compare(f"{model}: fraction of the bf16 peak", ideal, times["step"])
    if work.training.dataset.info.num_train == _EPOCH:
        report.figure(f"{model}: an epoch of CIFAR-10, steps only", _EPOCH / images * step, "s")


def _product(device: torch.device) -> tuple[Callable[[], object], int]:
    """Return a large bf16 matrix product and its FLOPs."""
    a, b = (torch.randn(_SIDE, _SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2 * _SIDE**3
