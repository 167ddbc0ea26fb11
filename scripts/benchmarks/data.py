"""Batches of training images: the in-memory data path over torchvision's transforms in a DataLoader."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from benchmarks import plain, workload
from benchmarks.report import Report
from benchmarks.timing import in_turn, output_of
from benchmarks.workload import Options
from prune_lab import datasets
from prune_lab.config.run import RunConfig
from prune_lab.datasets import BatchFormat, cifar, fake
from prune_lab.datasets.in_memory import ImageArrays, InMemoryDataset
from prune_lab.datasets.worker_pool import num_usable_cores
from prune_lab.training.device_config import resolve_device_config


def images(options: Options) -> tuple[RunConfig, ImageArrays]:
    """Return a run's options and real CIFAR-10 images with --root, else as many random ones."""
    if options.root:
        config = workload.compose(options.over(*workload.SMALL))
        return config, cifar.read(config.dataset)
    sizes = ("dataset.num_train=50000", "dataset.num_test=10000", "schedule=cifar_short")
    config = workload.compose(options.over(*workload.SMALL, "dataset=fake", *sizes))
    return config, fake.read(config.dataset)


def last_batches(dataset: datasets.Dataset, batch_size: int, count: int, epoch: int) -> Callable:
    """Return the last `count` batches of an epoch as an iterator; what they need is drawn, not more."""
    start = dataset.num_batches(batch_size) - count
    return dataset.train_batches(epoch=epoch, batch_size=batch_size, start=start, seed=0, rank=0, world_size=1)


def run(options: Options, report: Report) -> None:
    config, arrays = images(options)
    device_config, batch_size = resolve_device_config(config.trainer), config.schedule.batch_size
    device, count = device_config.torch_device, options.batches

    def drain(loader: DataLoader) -> None:
        deque(((x.to(device), y.to(device)) for x, y in loader), maxlen=0)

    counts = plain.worker_counts(num_usable_cores())
    loader, workers = plain.fastest(
        lambda workers: plain.loader(arrays, config.dataset.mean, config.dataset.std, batch_size, num_batches=count,
                                     workers=workers), drain, counts)  # fmt: skip
    calls: dict[str, Callable[[], object]] = {"torchvision": lambda: drain(loader)}
    for dtype in (torch.float32, torch.bfloat16):
        for channels_last in (True, False):
            dataset = InMemoryDataset(config.dataset, arrays, BatchFormat(device, dtype, channels_last))
            name = f"{str(dtype)[6:]}, {'channels_last' if channels_last else 'contiguous'}"
            calls[name] = lambda dataset=dataset: deque(last_batches(dataset, batch_size, count, 0), maxlen=0)
    times = in_turn(calls, options.plan(12, 60), device)
    report.note(f"{'real' if options.root else 'random'} images, {count} batches of {batch_size}, DataLoader with "
                f"{workers} workers (the fastest; tried: {', '.join(map(str, counts))})")  # fmt: skip
    for name in list(calls)[1:]:
        report.compare(f"images/s in memory ({name}) over torchvision", times["torchvision"], times[name])


def stream(options: Options, report: Report) -> None:
    """Run the script for streamed images in a process of its own: it computes with one thread."""
    script = Path(__file__).with_name("stream.py")
    if not script.exists():
        report.note(f"not run: {script.name} is not there")
        return
    rounds = ["--rounds", "1", "--images", "128"] if options.quick else []
    for line in output_of([sys.executable, str(script), *rounds], os.environ).splitlines():
        report.note(line)
