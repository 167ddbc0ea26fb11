"""The peer: CIFAR-10 as an ordinary PyTorch script trains it, with torchvision's transforms and a DataLoader.

Eager, SGD, fp32 unless another format is passed; nothing of prune-lab but the network's definition, which both share.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms


class Images(torch.utils.data.Dataset):
    """Images held as arrays and transformed one by one, as torchvision.datasets.CIFAR10 does."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Callable) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def loader(
    arrays, mean: list[float], std: list[float], batch_size: int, *, num_batches: int, workers: int = 2
) -> DataLoader:
    """Return training batches; an epoch of it ends after `num_batches`, drawn from all images."""
    transform = transforms.Compose([
        transforms.RandomCrop(32, padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
    ])  # fmt: skip
    dataset = Images(np.array(arrays.train_images), arrays.train_labels, transform)
    sampler = RandomSampler(dataset, num_samples=num_batches * batch_size)
    pinned = torch.cuda.is_available()
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, num_workers=workers, drop_last=True,
                      persistent_workers=workers > 0, pin_memory=pinned)  # fmt: skip


def worker_counts(cores: int) -> list[int]:
    """Return the numbers of workers that a careful user would try."""
    return [count for count in (2, 4, 8) if count <= max(2, cores)]


def fastest(
    make: Callable[[int], DataLoader], use: Callable[[DataLoader], object], counts: Sequence[int]
) -> tuple[DataLoader, int]:
    """Return the loader, with its number of workers, that `use` takes least time with, after a first use of each."""

    def seconds(batches: DataLoader) -> float:
        use(batches)
        begin = time.perf_counter()
        use(batches)
        return time.perf_counter() - begin

    loaders = {count: make(count) for count in counts}
    best = counts[0]
    if len(counts) > 1:
        taken = {count: seconds(batches) for count, batches in loaders.items()}
        best = min(taken, key=taken.get)
    return loaders[best], best


def train_epoch(
    model: nn.Module, batches: DataLoader, optimizer: torch.optim.Optimizer, scheduler=None,
    device: torch.device | str = "cpu", *, autocast: Callable = contextlib.nullcontext,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> float:  # fmt: skip
    """Train on all batches and return the mean loss; `autocast` opens the context of the forward pass."""
    model.train()
    total, count = 0.0, 0
    for images, labels in batches:
        images = images.to(device, non_blocking=True, memory_format=memory_format)
        labels = labels.to(device, non_blocking=True)
        optimizer.zero_grad()
        with autocast():
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        total, count = total + loss.item(), count + 1
    return total / count


@torch.no_grad()
def top1(model: nn.Module, arrays, mean: list[float], std: list[float], device: torch.device | str = "cpu") -> float:
    """Return percent of the test images that are classified rightly."""
    model.eval()
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    dataset = Images(np.array(arrays.test_images), arrays.test_labels, transform)
    correct = 0
    for images, labels in DataLoader(dataset, batch_size=500):
        correct += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
    return 100 * correct / len(dataset)
