"""Images per second of the in-memory data path against torchvision's PIL transforms in a DataLoader.

Both hand out the same images, cropped, flipped and normalised, in batches of 128. Rounds alternate and
medians are printed, because other work on the machine changes absolute times.

    python scripts/benchmark_data.py                              random images
    python scripts/benchmark_data.py --root data/cifar10.tar.xz   CIFAR-10 in any form that dataset=cifar10 takes
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from torchvision import transforms

from prune_lab.datasets import BatchFormat, cifar, fake, parse_config
from prune_lab.datasets.in_memory import InMemoryDataset

CONF = Path(__file__).parents[1] / "conf" / "dataset"
BATCH_SIZE = 128


class PilImages(torch.utils.data.Dataset):
    """Images held as arrays, transformed one by one, as torchvision.datasets.CIFAR10 does."""

    def __init__(self, images: np.ndarray, mean: list[float], std: list[float]) -> None:
        self._images = images
        self._transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._transform(Image.fromarray(self._images[index])), 0


def main() -> None:
    options = _parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    overrides = {"root": options.root} if options.root else {"num_train": 50_000, "num_test": 1_000}
    name = "cifar10" if options.root else "fake"
    node = OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), overrides)
    node.pop("defaults")  # Hydra's own
    config = parse_config(OmegaConf.to_container(node, resolve=True))
    arrays = (cifar if options.root else fake).read(config)
    device = torch.device(options.device)
    paths: dict[str, Callable[[int], Iterable]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for channels_last in (True, False):
            dataset = InMemoryDataset(config, arrays, BatchFormat(device, dtype, channels_last))
            name = f"in memory, {str(dtype)[6:]}, {'channels_last' if channels_last else 'contiguous'}"
            paths[name] = lambda epoch, dataset=dataset: dataset.train_batches(
                epoch=epoch, batch_size=BATCH_SIZE, start=0, seed=0, rank=0, world_size=1
            )
    reference = f"torchvision PIL, {options.workers} workers"
    loader = torch.utils.data.DataLoader(
        PilImages(np.array(arrays.train_images), config.mean, config.std),
        batch_size=BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        num_workers=options.workers,
        persistent_workers=True,
    )
    paths[reference] = lambda epoch: ((pixels.to(device), labels.to(device)) for pixels, labels in loader)
    print(f"{dataset.info.num_train} images, batch {BATCH_SIZE}, {device}, {torch.get_num_threads()} torch threads")
    _report(_measure(paths, options.rounds, device), reference)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", help="CIFAR-10 files; without it, random images")
    parser.add_argument("--device", default="cpu", help="where the batches are needed (default: cpu)")
    parser.add_argument("--workers", type=int, default=2, help="processes of the DataLoader (default: 2)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's choice)")
    parser.add_argument("--rounds", type=int, default=5, help="timed epochs per path, after one warm-up (default: 5)")
    return parser.parse_args()


def _measure(paths: dict[str, Callable[[int], Iterable]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return images per second of each path, one number per round."""
    rates: dict[str, list[float]] = {name: [] for name in paths}
    for epoch in range(rounds + 1):
        for name, batches in paths.items():
            began = time.perf_counter()
            num_images = sum(len(labels) for _, labels in batches(epoch))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if epoch:
                rates[name].append(num_images / (time.perf_counter() - began))
    return rates


def _report(rates: dict[str, list[float]], reference: str) -> None:
    base = statistics.median(rates[reference])
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name:<40} {median:>10,.0f} images/s (min {min(values):,.0f})  {median / base:5.1f}x")


if __name__ == "__main__":
    main()
