"""Forward and backward passes of equal networks as one: their weights stacked, each layer computed once for all."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.func import vmap

from prune_lab.foundations import tied
from prune_lab.training.device_config import DeviceConfig
from prune_lab.training.loop import TrainState


@dataclass
class Batch:
    """A micro-batch that a run has prepared."""

    training: TrainState
    images: Tensor
    """[b, 3, H, W]"""
    labels: Tensor
    """int64 [b]"""


def reason_not_joint(training: TrainState) -> str | None:
    """Return why a network cannot be computed together with others; None if it can."""
    device_config = training.device_config
    if device_config.torch_device.type == "cpu" and device_config.precision != "fp32":
        return f"on a CPU {device_config.precision} does not reach stacked convolutions; trainer.precision=fp32 does"
    for module in training.context.model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return "its dropout would draw other numbers than in a run of its own"
        if module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module):
            return "the method changes its forward pass"
    return None


def kind(training: TrainState) -> Hashable:
    """Return the key that jointly computed networks must share: modules and options, shapes, number format."""
    model = training.context.model
    tensors = chain(model.named_parameters(), model.named_buffers())
    shapes = tuple((name, tensor.shape, tensor.requires_grad) for name, tensor in tensors)
    return repr(model), shapes, training.device_config


class JointNetworks:
    """Networks of the same `kind`, each with its own weights, images and loss.

    Weights are copied in before and gradients out after each pass, in a few fused operations. So any change of a method
    to its weights takes effect, and the rest of the run is not involved. Extra memory: a copy of the parameters,
    gradients and buffers of all networks.

    Source: torch.func.vmap over stacked parameters, as in PyTorch's tutorial on model ensembling.
    """

    def __init__(self, trainings: Sequence[TrainState]) -> None:
        self.trainings = tuple(trainings)
        models = [training.context.model for training in trainings]
        one = models[0]
        self._stacked = _stack([dict(model.named_parameters()) for model in models])
        for name, parameter in one.named_parameters():
            self._stacked[name].requires_grad_(parameter.requires_grad)
        self._stacked_buffers = _stack([dict(model.named_buffers()) for model in models])
        # The same tensors network by network, as fused copies require.
        self._parameters: list[Tensor] = [parameter for model in models for parameter in model.parameters()]
        self._buffers = [buffer for model in models for buffer in model.buffers()]
        self._parts = _parts(self._stacked.values(), len(models))
        self._buffer_parts = _parts(self._stacked_buffers.values(), len(models))
        self._device_config = trainings[0].device_config
        # References `one` only: a reference to this object would keep all networks until a full garbage collection.
        forward = partial(_forward, one, tied.places(one), self._device_config)
        self._together = self._device_config.compiled(vmap(forward, randomness="error"))

    def differentiate(self, batches: Sequence[Batch]) -> list[tuple[Tensor, Tensor]]:
        """Apply `loop.differentiate` to the batch of every network; return its results, in order.

        An error leaves the networks and their gradients as they were.
        """
        for value in self._stacked.values():
            value.grad = None
        _copy(self._parts, self._parameters)
        _copy(self._buffer_parts, self._buffers)
        images = torch.stack([batch.images for batch in batches])
        logits = self._together(self._stacked, self._stacked_buffers, images).float()
        losses = [
            batch.training.task.loss(output, batch.labels, label_smoothing=batch.training.label_smoothing)
            for output, batch in zip(logits, batches, strict=True)
        ]
        scaled = [
            batch.training.scaler.scale(loss / batch.training.trainer.accumulate)
            for loss, batch in zip(losses, batches, strict=True)
        ]
        torch.stack(scaled).sum().backward()
        self._add_gradients()
        _copy(self._buffers, self._buffer_parts)
        return [(loss.detach(), output.detach()) for loss, output in zip(losses, logits, strict=True)]

    @torch.no_grad()
    def _add_gradients(self) -> None:
        """Add the gradients to those of the networks' own parameters."""
        reached = [value.grad is not None for value in self._stacked.values()]
        gradients = _parts([value.grad for value in self._stacked.values() if value.grad is not None], self._num)
        parameters = [p for p, is_reached in zip(self._parameters, reached * self._num, strict=True) if is_reached]
        own: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:  # in the layout of the weights, as fused optimizers require
                parameter.grad = torch.zeros_like(parameter)
            own.append(parameter.grad)
        if own:
            torch._foreach_add_(own, gradients)

    @property
    def _num(self) -> int:
        return len(self.trainings)


def _forward(
    one: nn.Module,
    places: dict[str, str],
    device_config: DeviceConfig,
    parameters: dict[str, Tensor],
    buffers: dict[str, Tensor],
    images: Tensor,
) -> Tensor:
    with device_config.autocast():  # inside `vmap`, as torch.func requires
        return tied.call(one, places, parameters | buffers, images)


def _stack(named: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([tensors[name].detach() for tensors in named]) for name in named[0]}


def _parts(stacked: Iterable[Tensor], num: int) -> list[Tensor]:
    """Return views of stacked tensors: all of the first network, then all of the second ..."""
    stacked = [tensor.detach() for tensor in stacked]
    return [tensor[index] for index in range(num) for tensor in stacked]


@torch.no_grad()
def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
