"""Layers computed without their zeros (CSR): rarely faster than dense arithmetic, so each layer is timed first."""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_lab.commands.export.latency import MIN_ROUNDS, interleaved, roughly

TITLE = "PyTorch CSR"
WORTH_TRYING = 0.5
"""minimum fraction of zeros of a layer that is tried"""
_LEAST_GAIN = 1.1
_HOPELESS = 1.5
"""slowdown in a first measurement beyond which timing stops"""
_SAMPLE_S = 0.005


class CsrLayer(nn.Module):
    """A linear layer or an ungrouped, zero-padded convolution whose weights are stored without their zeros."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Sparse CSR tensor support is in beta state"
            matrix = layer.weight.detach().flatten(1).to_sparse_csr()
            # 32-bit positions take half the memory traffic of torch's default of 64.
            self._weight = torch.sparse_csr_tensor(
                matrix.crow_indices().int(), matrix.col_indices().int(), matrix.values(), size=matrix.shape
            )
        self._bias = None if layer.bias is None else layer.bias.detach()[:, None]
        self._conv = layer if isinstance(layer, nn.Conv2d) else None

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out] (linear) or [N, C, H, W] to [N, out, H', W'] (convolution)."""
        if self._conv is None:
            return self._product(x.reshape(-1, x.shape[-1]).T).T.reshape(*x.shape[:-1], -1)
        conv = self._conv
        padding = conv._reversed_padding_repeated_twice  # includes padding="same", in numbers
        x = F.pad(x, padding)
        height, width = (
            (size - dilation * (kernel - 1) - 1) // stride + 1
            for size, dilation, kernel, stride in zip(
                x.shape[2:], conv.dilation, conv.kernel_size, conv.stride, strict=True
            )
        )
        if conv.kernel_size == (1, 1):
            columns = x[:, :, :: conv.stride[0], :: conv.stride[1]].flatten(2)
        else:
            columns = F.unfold(x, conv.kernel_size, conv.dilation, 0, conv.stride)
        product = self._product(columns.transpose(0, 1).flatten(1))
        return product.view(-1, len(x), height, width).transpose(0, 1)

    def _product(self, columns: Tensor) -> Tensor:
        product = self._weight @ columns
        return product if self._bias is None else product + self._bias


def can_be_csr(module: nn.Module) -> bool:
    """Return whether `CsrLayer` supports this kind of module, and it has enough zeros to try."""
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros" and zeros(module.weight) >= WORTH_TRYING
    return type(module) is nn.Linear and zeros(module.weight) >= WORTH_TRYING


def zeros(weight: Tensor) -> float:
    """Return the fraction of exact zeros."""
    return float((weight == 0).float().mean())


def with_csr(model: nn.Module, layers: Collection[str]) -> nn.Module:
    """Return a copy of `model` whose `layers` (paths) compute without their zeros."""
    return replaced(model, layers, CsrLayer)


def replaced(model: nn.Module, layers: Collection[str], make: Callable[[Any], nn.Module]) -> nn.Module:
    """Return a copy of `model` with each of `layers` (paths) replaced by `make(layer)`."""
    model = copy.deepcopy(model)
    for path in layers:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, make(model.get_submodule(path)))
    return model


def faster_layers(
    model: nn.Module,
    images: Tensor,
    *,
    can_be: Callable[[nn.Module], bool] = can_be_csr,
    make: Callable[[Any], nn.Module] = CsrLayer,
    finished: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = lambda call: call,
) -> list[str]:
    """Return the paths of the layers that are clearly faster in another form, on their inputs for `images`.

    Args:
        can_be: which layers have the other form; the default is CSR, without zeros.
        make: returns a layer's other form.
        finished: makes a call wait until its work is done, for an asynchronous device.
    """
    found: list[str] = []
    hooks = []

    def try_layer(path: str):
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            other = make(layer)
            calls = (finished(lambda: layer.forward(*inputs)), finished(lambda: other(*inputs)))
            if roughly(calls[1]) > _HOPELESS * roughly(calls[0]):
                return
            samples = interleaved(calls, rounds=MIN_ROUNDS, seconds=0, sample_s=_SAMPLE_S)
            dense_s, other_s = map(statistics.median, samples)
            if other_s * _LEAST_GAIN < dense_s:
                found.append(path)

        return hook

    for path, module in model.named_modules():
        if can_be(module):
            hooks.append(module.register_forward_hook(try_layer(path)))
    try:
        with torch.inference_mode():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(found))
