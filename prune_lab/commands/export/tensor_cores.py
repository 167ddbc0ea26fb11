"""Layers computed by a GPU's 2:4 kernels: half the multiplications, which pays only in large products."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from prune_lab.pruning.masks.semi_structured import is_semi_structured

TITLE = "PyTorch CUDA bf16, 2:4"
_CAPABILITY = (8, 0)
_MULTIPLES = (32, 64)
"""multiples of outputs and inputs that the kernels require in bf16, for the stricter of PyTorch's two libraries"""


class SemiStructuredLayer(nn.Module):
    """A linear layer or a 1x1 convolution of stride 1 as a product over channels with 2:4 weights, on a CUDA device."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self._weight = to_sparse_semi_structured(layer.weight.detach().flatten(1).contiguous())
        self._bias = None if layer.bias is None else layer.bias.detach()
        self._is_conv = isinstance(layer, nn.Conv2d)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out] (linear) or [N, in, H, W] to [N, out, H, W] (convolution)."""
        if self._is_conv:
            return self._product(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # channels_last: no copies
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        return F.linear(x.reshape(-1, x.shape[-1]), self._weight, self._bias).view(*x.shape[:-1], -1)


def can_use_kernels(module: nn.Module) -> bool:
    """Return whether `SemiStructuredLayer` supports the kind, shape and zeros of `module`."""
    if type(module) is nn.Conv2d:
        is_point = module.groups == 1 and module.kernel_size == module.stride == (1, 1) and module.padding == (0, 0)
        return is_point and _fits(module.weight)
    return type(module) is nn.Linear and _fits(module.weight)


def _fits(weight: Tensor) -> bool:
    fits = all(size % multiple == 0 for size, multiple in zip(weight.shape[:2], _MULTIPLES, strict=True))
    return fits and is_semi_structured(weight)


def left_out() -> str | None:
    """Return why no kernel can be used here, None if they can."""
    needs = "they need a CUDA device of compute capability 8.0 or above"
    if not torch.cuda.is_available():
        return f"{needs}, and PyTorch finds no CUDA device"
    found = torch.cuda.get_device_capability()
    if found < _CAPABILITY:
        return f"{needs}, and {device_name()} has {found[0]}.{found[1]}"
    return None


def device_name() -> str:
    return torch.cuda.get_device_name()


def on_device(model: nn.Module) -> nn.Module:
    """Return a copy of `model` on the GPU in its fastest form without 2:4 kernels: bf16, channels_last."""
    return copy.deepcopy(model).to("cuda", torch.bfloat16).to(memory_format=torch.channels_last)


def images_on_device(images: Tensor) -> Tensor:
    return images.to("cuda", torch.bfloat16, memory_format=torch.channels_last)


def finished(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `call` such that it waits until the GPU is done, for timing."""

    def wait(*inputs: Tensor) -> Tensor:
        output = call(*inputs)
        torch.cuda.synchronize()
        return output

    return wait
