"""Images per second and core of the streaming data path against torchvision's ImageFolder in a DataLoader.

All hand out batches of random 224 px crops, mirrored half of the time, as normalised fp32 on the device. Rounds
alternate and medians are printed, because other work on the machine changes absolute times; quote the ratios.
Without workers the clock is the processor time of the one process, which other work hardly touches.

    python scripts/benchmarks/stream.py                        made-up JPEGs of ImageNet's usual size, 500 x 375
    python scripts/benchmarks/stream.py --root data/imagenet   the images below train/CLASS/ of a folder
    python scripts/benchmarks/stream.py --workers 8            wall time with worker processes
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from torchvision import datasets, transforms

from prune_lab.datasets import BatchFormat, image_crops, load, parse_config
from prune_lab.datasets.worker_pool import num_usable_cores
from prune_lab.foundations.seeding import generator

CONF = Path(__file__).parents[2] / "conf" / "dataset"
SIZE, CACHED_SIDE = 224, 256


def main() -> None:
    options = _parse_arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(options.root).expanduser() if options.root else _made_up(Path(folder) / "images", options.images)
        ours = {name: _ours(root, Path(folder), side, options) for name, side in
                (("prune-lab, JPEG files", None), (f"prune-lab, cached_side={CACHED_SIDE}", CACHED_SIDE))}  # fmt: skip
        reference = "torchvision ImageFolder"
        paths = {reference: _torchvision(root, options)} | {
            name: lambda epoch, dataset=dataset: dataset.train_batches(
                epoch=epoch, batch_size=options.batch, start=0, seed=0, rank=0, world_size=1
            )
            for name, dataset in ours.items()
        }
        num_cores = max(1, min(options.workers, num_usable_cores()))
        num_images = next(iter(ours.values())).info.num_train
        what = root if options.root else "noise and ramps, 500 x 375"
        print(f"{num_images} images of {what}, batch {options.batch}, {options.workers} workers, {options.device}")
        rates = _measure(paths, options, num_cores)
        _report(rates, reference, options)
        for dataset in ours.values():
            dataset.close()
        _report_draft(sorted((root / "train").rglob("*.[jJ]*"))[: options.images], options.rounds)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", help="folder with train/CLASS/*; without it, made-up images")
    parser.add_argument("--images", type=int, default=256, help="made-up images (default: 256)")
    parser.add_argument("--batch", type=int, default=32, help="images per batch (default: 32)")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode (default: 0)")
    parser.add_argument("--device", default="cpu", help="where the batches are needed (default: cpu)")
    parser.add_argument("--rounds", type=int, default=5, help="timed epochs per path, after one warm-up (default: 5)")
    rate = "images/s of a training step to feed (default: 2800, assumed for ResNet-50 on one H100)"
    parser.add_argument("--train-rate", type=float, default=2800, help=rate)
    return parser.parse_args()


def _made_up(root: Path, num_images: int) -> Path:
    """Write JPEGs of about ImageNet's size in pixels and bytes: ramps under noise of half the resolution."""
    random = np.random.default_rng(0)
    ramp = np.add.outer(np.arange(375), np.arange(500))[..., None] * np.array([0.2, 0.15, 0.1])
    for i in range(num_images):
        path = root / "train" / f"class{i % 8}" / f"{i:05}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = random.normal(0, 22, (188, 250, 3)).repeat(2, axis=0).repeat(2, axis=1)[:375]
        Image.fromarray((ramp + noise + 40).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    (root / "val").symlink_to(root / "train")
    return root


def _ours(root: Path, folder: Path, side: int | None, options: argparse.Namespace):
    node = OmegaConf.to_container(OmegaConf.load(CONF / "imagefolder.yaml"), resolve=True)
    node.pop("defaults")  # Hydra's own
    node |= {"root": str(root), "workers": options.workers, "cached_side": side, "cache_dir": str(folder / "cache"),
             "check_counts": False, "test_folder": "val" if (root / "val").is_dir() else "train"}  # fmt: skip
    return load(parse_config(node), BatchFormat(torch.device(options.device), torch.float32, channels_last=True))


def _torchvision(root: Path, options: argparse.Namespace) -> Callable[[int], Iterable]:
    steps = [
        transforms.RandomResizedCrop(SIZE),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    loader = torch.utils.data.DataLoader(
        datasets.ImageFolder(root / "train", transforms.Compose(steps)),
        batch_size=options.batch,
        shuffle=True,
        drop_last=True,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
        pin_memory=options.device != "cpu",
    )

    def batches(_epoch: int) -> Iterable:
        for images, labels in loader:
            yield images.to(options.device, non_blocking=True), labels.to(options.device, non_blocking=True)

    return batches


def _measure(
    paths: dict[str, Callable[[int], Iterable]], options: argparse.Namespace, num_cores: int
) -> dict[str, list[float]]:
    """Return images per second and decoding core of each path, one number per round.

    The clock starts before the first batch is asked for: workers fetch several at once, which must not come free.
    """
    clock = time.perf_counter if options.workers or options.device != "cpu" else time.process_time
    rates: dict[str, list[float]] = {name: [] for name in paths}
    for epoch in range(options.rounds + 1):
        for name, batches in paths.items():
            began = clock()
            with closing(_generator(batches(epoch))) as stream:
                num_images = sum(len(labels) for _, labels in stream)
            if options.device != "cpu":
                torch.cuda.synchronize()
            if epoch:
                rates[name].append(num_images / (clock() - began) / num_cores)
    return rates


def _generator(batches: Iterable) -> Iterable:
    yield from batches


def _report(rates: dict[str, list[float]], reference: str, options: argparse.Namespace) -> None:
    rate = options.train_rate
    for name, values in rates.items():
        ratios = [value / other for value, other in zip(values, rates[reference], strict=True)]
        median = statistics.median(values)
        spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:<28} {median:7,.0f} images/s per core {statistics.median(ratios):7.2f}x {spread:<16} "
              f"{rate / median:5.1f} cores feed a step of {rate:,.0f} images/s")  # fmt: skip


def _report_draft(paths: list[Path], rounds: int) -> None:
    """Compare reading files whole with libjpeg's reduced decoding wherever the crop allows it; one core, no workers."""
    seconds: dict[str, list[float]] = {"whole": [], "draft": []}
    num_reduced = 0
    for epoch in range(rounds + 1):
        for name, read in (("whole", _crop), ("draft", _crop_reduced)):
            began = time.process_time()
            num_reduced = sum(read(path, generator(0, "draft", epoch, i)) for i, path in enumerate(paths))
            if epoch:
                seconds[name].append(time.process_time() - began)
    ratios = [whole / draft for whole, draft in zip(*seconds.values(), strict=True)]
    print(f"decoding at reduced scale where the crop allows: {statistics.median(ratios):.2f}x of decoding whole "
          f"({num_reduced / len(paths):.0%} of the images reduced); not an option of prune-lab")  # fmt: skip


def _box(width: int, height: int, source: torch.Generator) -> tuple[int, int, int, int]:
    draws = torch.rand(4 * image_crops.NUM_TRIES, generator=source, dtype=torch.float64).tolist()
    return image_crops.random_box(width, height, min_scale=0.08, draws=draws)


def _crop(path: Path, source: torch.Generator) -> bool:
    image = image_crops.read_rgb(path)
    left, top, width, height = _box(*image.size, source)
    image_crops.resize(image, SIZE, SIZE, box=(left, top, left + width, top + height))
    return False


def _crop_reduced(path: Path, source: torch.Generator) -> bool:
    with Image.open(path) as image:
        whole = image.size
        left, top, width, height = _box(*whole, source)
        image.draft("RGB", tuple(int(side * SIZE / part) for side, part in zip(whole, (width, height), strict=True)))
        across, down = (small / side for small, side in zip(image.size, whole, strict=True))
        box = (left * across, top * down, (left + width) * across, (top + height) * down)
        image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
        return image.size != whole


if __name__ == "__main__":
    main()
