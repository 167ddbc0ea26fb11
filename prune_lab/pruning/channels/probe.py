"""A network whose channels of one group are weighed as they are read: Gram matrices, losses, slopes, accuracy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from prune_lab.foundations.lazy import no_grad, torch
from prune_lab.pruning.channels import imitation
from prune_lab.pruning.channels.groups import ChannelGroup

if TYPE_CHECKING:
    from torch import Tensor, nn

Objective = Literal["cross_entropy", "output_distance"]


class WeighedNetwork:
    """The network with N a_i on each channel of a group, applied where the channel is read.

    Use it as a context; a = 1 / N, the network as it is, leaves values untouched.
    """

    def __init__(self, model: nn.Module, group: ChannelGroup, *, objective: Objective = "cross_entropy") -> None:
        self.model, self.group, self.objective = model, group, objective
        self.num_images = 0
        """images passed so far; a backward pass counts as one more, since weights get no gradients"""
        self._factors: Tensor | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> WeighedNetwork:
        for consumer in self.group.consumers:
            module = self.model.get_submodule(consumer.path)
            self._handles.append(module.register_forward_pre_hook(partial(self._weigh, consumer.span)))
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _weigh(self, span: int, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._factors is None:
            return None
        factors = self._factors.to(args[0].dtype).repeat_interleave(span)
        return (args[0] * (factors.view(-1, 1, 1) if isinstance(module, torch.nn.Conv2d) else factors),)

    def use(self, weights: Tensor | None) -> None:
        """Take weights a [N] from now on; None: 1 / N."""
        self._factors = None if weights is None else self._scaled(weights)

    def _scaled(self, weights: Tensor) -> Tensor:
        """Return N a, float32 on the device of the network."""
        return (self.group.size * weights).to(next(self.model.parameters()).device, torch.float32)

    def logits(self, images: Tensor, weights: Tensor | None) -> Tensor:
        self.use(weights)
        self.num_images += len(images)
        logits: Tensor = self.model(images).float()
        return logits

    @no_grad
    def see(self, images: Tensor, labels: Tensor) -> None:
        """Take the images that `loss` and `slopes` are measured on."""
        self._images, self._labels = images, labels
        if self.objective == "output_distance":
            self._reference = self.logits(images, None)

    @no_grad
    def loss(self, weights: Tensor) -> float:
        """Return the mean loss with weights a."""
        return float(self._loss(self.logits(self._images, weights)))

    def slopes(self, weights: Tensor) -> Tensor:
        """Return dL/da_i, float64 [N], on the CPU."""
        with torch.enable_grad():
            factors = self._factors = self._scaled(weights).requires_grad_()
            self.num_images += 2 * len(self._images)
            (gradient,) = torch.autograd.grad(self._loss(self.model(self._images).float()), factors)
        return self.group.size * gradient.double().cpu()

    def _loss(self, logits: Tensor) -> Tensor:
        if self.objective == "output_distance":
            return (logits - self._reference).square().sum(1).mean()
        return torch.nn.functional.cross_entropy(logits, self._labels)

    @no_grad
    def accuracy(self, data: Iterable[tuple[Tensor, Tensor]], weights: Tensor | None) -> float:
        """Return the fraction of images whose label gets the highest logit."""
        hits, images_seen = torch.zeros((), dtype=torch.int64), 0
        for images, labels in data:
            hits = hits.to(labels.device) + (self.logits(images, weights).argmax(1) == labels).sum()
            images_seen += len(labels)
        return int(hits) / images_seen


@no_grad
def group_gram(
    model: nn.Module,
    group: ChannelGroup,
    data: Iterable[tuple[Tensor, Tensor]],
    *,
    num_positions: int,
    generator: torch.Generator,
) -> Tensor:
    """Return the Gram matrix of a group's contributions (see imitation), float64 [size, size] on the CPU.

    Where several layers read the channels, the sum over them.

    Args:
        num_positions: places of the reading layer's output, drawn anew for each image; all if it has no more.
    """
    total, images_seen = torch.zeros(group.size, group.size, dtype=torch.float64), 0

    def measure(module: Any, args: tuple[Tensor, ...]) -> None:
        nonlocal total
        read = read_columns(module, args[0], num_positions=num_positions, generator=generator)
        part = imitation.gram(read, module.weight.flatten(1), group.size)
        total = total + part.cpu() * len(args[0])

    with contextlib.ExitStack() as stack:
        for consumer in group.consumers:
            handle = model.get_submodule(consumer.path).register_forward_pre_hook(measure)
            stack.callback(handle.remove)
        for images, _ in data:
            model(images)
            images_seen += len(images)
    return total / images_seen


def read_columns(
    module: Any, inputs: Tensor, *, num_positions: int, generator: torch.Generator
) -> Tensor:
    """Return what `module` reads at some places of its output: [images * places, input columns].

    Multiplied by the transpose of the module's weight, flattened from its second dimension on, it gives the module's
    output at those places, without the bias.

    Args:
        module: a convolution or a linear layer.
        inputs: [images, channels, height, width] of a convolution, [images, ..., features] of a linear layer.
    """
    count = len(inputs)
    if isinstance(module, torch.nn.Linear):
        rows = inputs.reshape(count, -1, inputs.shape[-1])
        which, where = _places(count, rows.shape[1], num_positions, generator=generator, device=inputs.device)
        return rows[which, where].flatten(0, 1)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padding = module._reversed_padding_repeated_twice  # also for padding="same"
    windows = torch.nn.functional.pad(inputs, padding, mode=mode)
    for dim in (0, 1):
        reach = module.dilation[dim] * (module.kernel_size[dim] - 1) + 1
        windows = windows.unfold(2 + dim, reach, module.stride[dim])
    windows = windows[..., :: module.dilation[0], :: module.dilation[1]]  # [images, channels, out_h, out_w, k, k]
    height, width = windows.shape[2:4]
    which, where = _places(count, height * width, num_positions, generator=generator, device=inputs.device)
    return windows[which, :, where // width, where % width].flatten(2).flatten(0, 1)


def _places(
    num_images: int, available: int, wanted: int, *, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return indices of images and of places in them, both [num_images, min(available, wanted)]."""
    if available <= wanted:
        where = torch.arange(available, device=device).expand(num_images, -1)
    else:
        where = torch.randint(available, (num_images, wanted), generator=generator).to(device)
    return torch.arange(num_images, device=device)[:, None].expand_as(where), where


@no_grad
def fold(model: nn.Module, group: ChannelGroup, kept: Tensor, factors: Tensor) -> None:
    """Write a selection into the weights: columns times `factors`; zeros where a channel is gone.

    Args:
        kept: bool [size].
        factors: N a_i, float64 [size]; those of channels that are not kept do not matter.
    """
    device = next(model.parameters()).device
    kept = kept.to(device)
    scale = torch.where(kept, factors.to(device), 0.0)
    for path in (group.producer, *group.followers):
        model.get_parameter(f"{path}.weight")[~kept] = 0
    for consumer in group.consumers:
        weight = model.get_parameter(f"{consumer.path}.weight")
        wide = scale.repeat_interleave(consumer.span).view(1, -1, *[1] * (weight.dim() - 2))
        weight.copy_(weight.double() * wide)
