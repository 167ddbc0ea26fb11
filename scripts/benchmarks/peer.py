"""Training over the plain PyTorch script, data included; with --accuracy both are trained and their top-1 shown."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import plain, workload
from benchmarks.data import images, last_batches
from benchmarks.report import Report
from benchmarks.timing import Goal, in_turn
from benchmarks.workload import Options
from prune_lab import datasets
from prune_lab.config.run import RunConfig
from prune_lab.datasets import BatchFormat
from prune_lab.datasets.in_memory import InMemoryDataset
from prune_lab.datasets.worker_pool import num_usable_cores
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.files import read_json
from prune_lab.optim.learning_rate import learning_rate
from prune_lab.pipeline import runner
from prune_lab.training import loop
from prune_lab.training.device_config import resolve_device_config
from prune_lab.training.phases import build_model

GOAL = Goal(2.0, at_most=False)
_SEEDS = (0, 1, 2)


def run(options: Options, report: Report) -> None:
    if options.accuracy:
        _accuracy(options, report)
        return
    config, arrays = images(options)
    device_config = resolve_device_config(config.trainer)
    device, count, batch_size = device_config.torch_device, options.batches, config.schedule.batch_size
    dataset = InMemoryDataset(config.dataset, arrays, BatchFormat(device, torch.float32, device_config.channels_last))
    train = _plain_stretch(config, dataset.info, device)
    train_in_ours = _plain_stretch(config, dataset.info, device, autocast=device_config.autocast,
                                   memory_format=device_config.memory_format)  # fmt: skip
    counts = plain.worker_counts(num_usable_cores())
    batches, workers = plain.fastest(
        lambda workers: plain.loader(arrays, config.dataset.mean, config.dataset.std, batch_size, num_batches=count,
                                     workers=workers), train, counts)  # fmt: skip
    calls: dict[str, Callable[[], object]] = {
        "plain": lambda: train(batches),
        "plain in ours": lambda: train_in_ours(batches),
        "ours": _stretch(workload.workload("dense", options.over(*workload.SMALL)), dataset, batch_size, count),
    }
    report.note(f"{count} batches of {batch_size} per stretch, {'real' if options.root else 'random'} images, "
                f"ours: {device_config}; plain: fp32, contiguous, eager, {workers} workers (the fastest; "
                f"tried: {', '.join(map(str, counts))})")  # fmt: skip
    times = in_turn(calls, options.plan(8, 240), device)
    report.compare("training throughput over the plain script", times["plain"], times["ours"], GOAL)
    layout = "channels_last" if device_config.channels_last else "contiguous"
    in_ours = f"the plain script in {device_config.precision}, {layout}"
    report.compare(f"training throughput over {in_ours}", times["plain in ours"], times["ours"])
    report.compare(f"{in_ours}: over itself in fp32", times["plain"], times["plain in ours"])


def _plain_stretch(config: RunConfig, info: datasets.DatasetInfo, device: torch.device, **formats) -> Callable:
    """Return the plain script's training on a loader, with a network of its own in the formats of `train_epoch`."""
    model, optimizer, _ = _peer(config, info, device, seed=0)
    model.to(memory_format=formats.get("memory_format", torch.contiguous_format))
    return lambda batches: plain.train_epoch(model, batches, optimizer, device=device, **formats)


def _stretch(work: workload.Workload, dataset: datasets.Dataset, batch_size: int, count: int) -> Callable[[], None]:
    """Return training on the last `count` batches of an epoch."""
    training, first = work.training, work.training.context.first_step + 1
    epoch = 0

    def train() -> None:
        nonlocal epoch
        for offset, batch in enumerate(last_batches(dataset, batch_size, count, epoch)):
            training.progress.step = first + offset
            loop.train_step(training, *batch)
        work.check()
        epoch += 1

    return train


def _peer(config: RunConfig, info: datasets.DatasetInfo, device: torch.device, *, seed: int, steps: int | None = None):
    """Return the plain script's network, optimizer and learning rates, with the options of the run.

    Args:
        steps: per epoch; None: a small learning rate without schedule, for timing.
    """
    model = build_model(config.model, num_classes=info.num_classes, image_size=info.image_size, seed=seed).to(device)
    chosen, schedule = config.optimizer, config.schedule.phase("train")
    lr = schedule.lr if steps else workload.CALM_LR
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=chosen.momentum, weight_decay=chosen.weight_decay)
    if steps is None:
        return model, optimizer, None
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(schedule, step, steps) / schedule.lr
    )
    return model, optimizer, rates


def _accuracy(options: Options, report: Report) -> None:
    """Train both on the same schedule, seeds and number of batches, and print top-1 on the test images."""
    if not options.root:
        raise UserError("--accuracy needs real images: --root FILE")
    report.note(f"{options.epochs} epochs of {options.batches} batches, seeds {', '.join(map(str, _SEEDS))}")
    found: dict[str, list[float]] = {"prune-lab": [], "plain": []}
    for seed in _SEEDS:
        found["prune-lab"].append(_our_top1(options, seed))
        found["plain"].append(_plain_top1(options, seed))
        for name, values in found.items():
            report.figure(f"{name}, seed {seed}: top-1", values[-1], "%")
    for name, values in found.items():
        report.figure(f"{name}: mean top-1 of {len(values)} seeds", sum(values) / len(values), "%")


def _run_options(options: Options, seed: int, folder: str) -> RunConfig:
    length = (f"schedule.train.epochs={options.epochs}", f"trainer.limit_train_batches={options.batches}")
    rest = (f"schedule.train.warmup_epochs={min(1, options.epochs - 1)}", f"seed={seed}", f"output_dir={folder}")
    return workload.compose(options.over(*workload.SMALL, "schedule=cifar_short", "method=dense", *length, *rest))


def _our_top1(options: Options, seed: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        if runner.run(_run_options(options, seed, folder)):
            raise RuntimeError("the run of prune-lab did not finish")
        (path,) = Path(folder).glob("*/summary.json")
        return read_json(path)["final/top1"]


def _plain_top1(options: Options, seed: int) -> float:
    _, arrays = images(options)
    config = _run_options(options, seed, tempfile.gettempdir())
    device, mean, std = resolve_device_config(config.trainer).torch_device, config.dataset.mean, config.dataset.std
    info = datasets.describe(config.dataset)
    model, optimizer, scheduler = _peer(config, info, device, seed=seed, steps=options.batches)
    batches = plain.loader(arrays, mean, std, config.schedule.batch_size, num_batches=options.batches)
    for _ in range(config.schedule.phase("train").epochs):
        plain.train_epoch(model, batches, optimizer, scheduler, device)
    return plain.top1(model, arrays, mean, std, device)
