"""What prune-lab's loop costs over the same step in bare PyTorch, and what masks, mask updates and methods add.

Rounds alternate between the variants and medians are printed with the ratios, because other work on the machine
changes absolute times; quote the ratios.

    python scripts/benchmark.py                       ResNet-20, batch 128, this machine's defaults
    python scripts/benchmark.py model=vgg16           any options of prune-lab
    python scripts/benchmark.py --root cifar10.tar.xz   also: part of an epoch against the recipe of older repositories
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from benchmark_data import PilImages

from prune_lab import chain, datasets, identity, numerics
from prune_lab.cli import conf_dir
from prune_lab.config import RunConfig
from prune_lab.datasets import BatchFormat, cifar
from prune_lab.loop import Training, train_step
from prune_lab.overrides import compose_checked
from prune_lab.phases import build_model, open_context, open_training
from prune_lab.rehearsal import RandomImages, job_without_files

METHODS = ("static", "directional", "constrained_l0")
"""compared with the dense step"""


def main() -> None:
    options, overrides = _arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    runs = {name: _training(name, overrides) for name in ("dense", *METHODS, "rigl")}
    device = runs["dense"].numerics.torch_device
    batch = _random_batch(runs["dense"])
    steps: dict[str, Callable[[], None]] = {"bare PyTorch": _bare_step(runs["dense"], *batch)}
    for name in ("dense", *METHODS):
        steps[f"prune-lab {name}"] = lambda training=runs[name]: _our_step(training, *batch)
    steps["rigl mask update"] = lambda: runs["rigl"].method.update(runs["rigl"].context, 100)
    _our_step(runs["rigl"], *batch)  # gradients to update from
    print(f"{runs['dense'].numerics}, {torch.get_num_threads()} threads, batch {len(batch[1])}")
    times = _measure(steps, options.rounds, device)
    base = statistics.median(times["bare PyTorch"])
    for name, values in times.items():
        ratios = [value / other for value, other in zip(values, times["bare PyTorch"], strict=True)]
        print(f"{name:20} {1000 * statistics.median(values):9.2f} ms  {statistics.median(ratios):7.4f} x bare step")
    dense = statistics.median(times["prune-lab dense"])
    interval = runs["rigl"].method.config.interval
    update = statistics.median(times["rigl mask update"])
    print(f"loop over bare step: {dense / base:.4f}")
    for name in METHODS:
        pairs = zip(times[f"prune-lab {name}"], times["prune-lab dense"], strict=True)
        print(f"{name} over dense step: {statistics.median(value / other for value, other in pairs):.4f}")
    _compare_optimizers(runs["directional"], options.rounds)
    print(f"RigL update, spread over {interval} steps: {100 * update / (interval * dense):.3f} % of a step")
    if options.root:
        _compare_epochs(runs["static"], options)


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds after two warm-up rounds (default: 15)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's choice)")
    parser.add_argument("--root", help="CIFAR-10 in any form dataset=cifar10 takes, for the comparison of epochs")
    parser.add_argument("--batches", type=int, default=30, help="batches per timed stretch of an epoch (default: 30)")
    return parser.parse_known_args()


def _config(overrides: list[str]) -> RunConfig:
    return next(iter(compose_checked(conf_dir(), overrides, sweep=False)))


def _training(method: str, overrides: list[str]) -> Training:
    """Return the loop's state at the first step of `method`, on random images of CIFAR-10's sizes."""
    config = _config(["dataset=cifar10", f"method={method}", *overrides])
    arithmetic = numerics.resolve(config.trainer)
    (entry,) = identity.plan(
        config, model=config.model, fingerprint=None, numerics=arithmetic.identity(), world_size=1
    )
    dataset = RandomImages(datasets.describe(config.dataset), arithmetic.torch_device)
    job = job_without_files(config, config.model, entry, dataset, arithmetic, chain.Results(()))
    context = open_context(job)
    training = open_training(job, context)
    job.method.setup(context)
    context.model.train()
    return training


def _compare_optimizers(training: Training, rounds: int) -> None:
    """Print the time of gRDA's step alone against that of torch's fused SGD without momentum, on equal parameters."""
    grda = training.context.optimizer
    parameters = [parameter for group in grda.param_groups for parameter in group["params"]]
    copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    for parameter, copied in zip(parameters, copies, strict=True):
        copied.grad = parameter.grad.clone()
    sgd = torch.optim.SGD(copies, lr=0.1, fused=True)
    times = _measure({"gRDA": grda.step, "SGD": sgd.step}, rounds * 10, training.numerics.torch_device)
    micro = {name: 1e6 * statistics.median(values) for name, values in times.items()}
    print(f"optimizer alone: gRDA {micro['gRDA']:.0f} us, SGD {micro['SGD']:.0f} us")


def _random_batch(training: Training) -> tuple[torch.Tensor, torch.Tensor]:
    info, device = training.dataset.info, training.numerics.torch_device
    images = torch.randn(training.batch_size, 3, info.image_size, info.image_size, device=device)
    labels = torch.randint(info.num_classes, (training.batch_size,), device=device)
    return images.to(memory_format=training.numerics.memory_format), labels


def _our_step(training: Training, images: torch.Tensor, labels: torch.Tensor) -> None:
    train_step(training, images, labels)
    training.progress.step = 1  # stays away from update steps and from the end of the schedule


def _bare_step(training: Training, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """Return the same step without prune-lab: forward, loss, backward, fused SGD, in the same formats."""
    numeric, model = training.numerics, copy.deepcopy(training.context.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with numeric.autocast():
            logits = model(images).float()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()

    return step


def _measure(steps: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds + 2):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if index >= 2:
                times[name].append(time.perf_counter() - began)
    return times


def _compare_epochs(training: Training, options: argparse.Namespace) -> None:
    """Print part of an epoch, data included: ours against eager fp32, contiguous, PIL transforms in a DataLoader."""
    config, numeric = _config(["dataset=cifar10", f"dataset.root={options.root}"]), training.numerics
    dataset = datasets.load(config.dataset, BatchFormat(numeric.torch_device, torch.float32, numeric.channels_last))
    arrays = cifar.read(config.dataset)
    loader = torch.utils.data.DataLoader(
        PilImages(arrays.train_images, config.dataset.mean, config.dataset.std),
        batch_size=training.batch_size, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True,
    )
    info = dataset.info
    peer = build_model(config.model, num_classes=info.num_classes, image_size=info.image_size, seed=0)
    peer.to(numeric.torch_device).train()
    optimizer = torch.optim.SGD(peer.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    def peer_stretch(epoch: int) -> None:
        for images, labels in itertools.islice(loader, options.batches):
            optimizer.zero_grad()
            F.cross_entropy(peer(images.to(numeric.torch_device)), labels.to(numeric.torch_device)).backward()
            optimizer.step()

    def our_stretch(epoch: int) -> None:
        batches = dataset.train_batches(
            epoch=epoch, batch_size=training.batch_size, start=0, seed=0, rank=0, world_size=1
        )
        for images, labels in itertools.islice(batches, options.batches):
            _our_step(training, images, labels)

    ratios = []
    for epoch in range(5):
        began = time.perf_counter()
        our_stretch(epoch)
        middle = time.perf_counter()
        peer_stretch(epoch)
        ratios.append((middle - began) / (time.perf_counter() - middle))
    shown = ", ".join(f"{ratio:.3f}" for ratio in ratios[1:])
    print(f"{options.batches} batches of real training: {statistics.median(ratios[1:]):.3f} x the time of the "
          f"DataLoader recipe (rounds: {shown})")


if __name__ == "__main__":
    main()
