"""Measurements for analyses: a run's network and data, loss and error over images, batch-norm statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab import datasets
from prune_lab.commands.analysis.runs import FinishedRun, data_options
from prune_lab.config.trainer import TrainerConfig
from prune_lab.datasets import BatchFormat, Dataset, DatasetInfo
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.seeding import generator, stable_hash
from prune_lab.pipeline.saved_model import load_model
from prune_lab.training.device_config import DeviceConfig, resolve_device_config
from prune_lab.training.evaluation import measure

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Bench:
    """Data and device that two runs share."""

    dataset: Dataset
    device_config: DeviceConfig
    """for training; figures are measured in fp32"""
    trainer: TrainerConfig
    seed: int

    def network(self, run: FinishedRun) -> nn.Module:
        """Return the run's network in eval mode on the device."""
        return self.device_config.placed(load_model(run.directory))

    def drawn(self, what: str, count: int | None) -> Tensor:
        """Return the positions of `count` (None: all) training images, drawn from the seed and `what`."""
        total = self.dataset.info.num_train
        if count is None or count >= total:
            return torch.arange(total)
        return torch.randperm(total, generator=generator(self.seed, what))[:count]

    def training_images(self, chosen: Tensor, batch_size: int, *, augment: bool = False) -> Batches:
        """Return the training images at the positions `chosen` in batches of nearly equal size, always the same."""
        parts = chosen.tensor_split(-(-len(chosen) // batch_size))
        seed = stable_hash(self.seed, "crops of an analysis") if augment else None
        return self.dataset.train_subset(parts, augment_seed=seed)

    def training_scores(self, model: nn.Module, chosen: Tensor) -> dict[str, float]:
        """Return loss and error (percent) over training images without augmentation."""
        images = _Images(lambda batch_size: self.training_images(chosen, batch_size), self.dataset.info)
        return self._scores(model, images, "train")

    def eval_scores(self, model: nn.Module) -> dict[str, float]:
        """Return loss and error (percent) over the split that the runs were evaluated on."""
        return self._scores(model, self.dataset, self.dataset.eval_split)

    def _scores(self, model: nn.Module, images: Any, split: str) -> dict[str, float]:
        result = measure(model, images, split, device_config=self.device_config.in_fp32(), trainer=self.trainer)
        return {"loss": result["loss"], "error": 100 - result["top1"]}


@dataclass(frozen=True)
class _Images:
    """Images in the format of the evaluation loop."""

    read: Callable[[int], Batches]
    info: DatasetInfo

    def eval_batches(self, _split: str, batch_size: int, *, rank: int, world_size: int) -> Batches:
        return self.read(batch_size)


def open_bench(a: FinishedRun, b: FinishedRun, *, root: str | None, device: str, seed: int) -> Bench:
    """Return the bench of two comparable runs.

    Args:
        root: replaces dataset.root of the runs; None: as in the runs.
        device: auto, cpu, cuda, cuda:N or mps.

    Raises:
        UserError: the device or the data do not exist; names the run.
    """
    trainer = replace(
        a.trainer, device=device, precision="auto", channels_last="auto", compile=False, threads=None,
        limit_eval_batches=None,
    )  # fmt: skip
    try:
        trainer.check("trainer")
        device_config = resolve_device_config(trainer)
    except UserError as error:
        raise UserError(str(error).replace("trainer.device=", "--device ")) from error
    options = data_options(a, b, root)
    try:
        fmt = BatchFormat(device_config.torch_device, torch.float32, device_config.channels_last)
        dataset = datasets.load(options, fmt)
    except UserError as error:
        raise UserError(f"the data of {a.directory} (--data ROOT names another place): {error}") from error
    return Bench(dataset, device_config, trainer, seed)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name; a shared one counts once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the floating-point buffers by name: batch norm's running statistics, and never its counters."""
    return {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def norm_layers(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the batch-norm layers that evaluate with running statistics."""
    kind = nn.modules.batchnorm._BatchNorm
    return [module for module in model.modules() if isinstance(module, kind) and module.running_mean is not None]


@torch.no_grad()
def recompute_statistics(model: nn.Module, batches: Batches) -> None:
    """Set the running statistics of batch norm to their means over `batches`; nothing else of `model` changes.

    Every batch has the same weight. Other layers are in eval mode, because dropout would change the statistics.
    """
    layers = norm_layers(model)
    if not layers:
        return
    modes = {module: module.training for module in model.modules()}
    kept = [(layer.momentum, layer.num_batches_tracked.clone()) for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative mean
        layer.training = True
    for images, _ in batches:
        model(images)
    for layer, (momentum, count) in zip(layers, kept, strict=True):
        layer.momentum = momentum
        layer.num_batches_tracked.copy_(count)
    for module, mode in modes.items():
        module.training = mode


@torch.no_grad()
def place(model: nn.Module, values: Sequence[Tensor]) -> None:
    """Copy `values` into the trainable parameters, in their order."""
    torch._foreach_copy_(list(trained(model).values()), list(values))


def zeros(model: nn.Module) -> float:
    """Return the fraction of exact zeros among the weights of conv and linear layers."""
    weights = list(_weights(model))
    return sum(int((weight == 0).sum()) for weight in weights) / max(sum(weight.numel() for weight in weights), 1)


def _weights(model: nn.Module) -> Iterator[Tensor]:
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            yield module.weight.detach()
