"""Device and number format of a run: `auto` options resolved for this machine."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from prune_lab.config.trainer import TrainerConfig
from prune_lab.foundations.errors import UserError
from prune_lab.training.allocator import keep_freed_memory

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class DeviceConfig:
    device: str
    precision: str
    channels_last: bool
    compile: bool | str
    """True: torch.compile; "graphs": each pass replayed as a CUDA graph"""
    vectorised: bool = False
    """True: computed together with the networks of other runs (see prune_lab.launch.vectorised)"""

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.precision]

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def placed(self, model: nn.Module) -> nn.Module:
        """Return `model` on the device, its tensors of rank 4 in the memory format of the images."""
        model.to(self.torch_device)
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() == 4:  # Module.to(memory_format=...) fails on kernels of rank 5
                tensor.data = tensor.data.to(memory_format=self.memory_format)
        return model

    def compiled(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return `forward` compiled if the options say so; shapes never change while training."""
        if not self.compile:
            return forward
        return torch.compile(forward, dynamic=False, mode="reduce-overhead" if self.compile == "graphs" else None)

    def autocast(self):
        """Return a context in which matrix work runs in the chosen precision; the rest stays in fp32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.torch_device.type, self.dtype)

    def in_fp32(self) -> DeviceConfig:
        """Return the same device and memory format in fp32, for reported figures."""
        return DeviceConfig(self.device, "fp32", self.channels_last, False)

    def identity(self) -> dict:
        """Return the properties that affect results: the device type, not its index; on a CPU how sums are split."""
        threads = torch.get_num_threads() if self.torch_device.type == "cpu" else None
        return {**asdict(self), "device": self.torch_device.type, "threads": threads}


def resolve_device_config(config: TrainerConfig, *, local_rank: int = 0) -> DeviceConfig:
    """Return the options with every `auto` replaced by the choice measured fastest, and set torch's threads.

    Measured on two AVX-512/AMX cores, ResNet-20 training step: bf16 with channels_last 2.3x of contiguous fp32,
    bf16 alone 2.0x; channels_last alone 0.94x (VGG16) to 1.57x (MobileNetV2), so it is combined with bf16 only.

    Raises:
        UserError: the device does not exist or cannot compute in the precision.
    """
    device = _device(config.device, local_rank)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    # Denormal numbers made fp32 ResNet-20 steps on a CPU 7 times as long after ten steps of training. Worker threads
    # inherit this setting, so it is set before they start.
    torch.set_flush_denormal(True)
    if device.type == "cpu":
        keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; exact evaluation relies on it
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if _has_bf16(device) else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise UserError("trainer.precision=fp16 needs a GPU; allowed on a CPU: fp32, bf16")
    channels_last = precision != "fp32" if config.channels_last == "auto" else config.channels_last
    return DeviceConfig(str(device), precision, channels_last, _compiled(config.compile, device))


def _compiled(wanted: bool | str, device: torch.device) -> bool | str:
    """Return `trainer.compile` with auto resolved.

    Raises:
        UserError: CUDA graphs without CUDA, or no C++ compiler on a machine without a GPU.
    """
    if wanted == "graphs" and device.type != "cuda":
        raise UserError(f"trainer.compile=graphs needs a CUDA device, got {device.type}; allowed: true, false")
    if wanted is True and device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise UserError("trainer.compile=true needs a C++ compiler on a CPU, and there is no g++ or clang++")
    return device.type == "cuda" if wanted == "auto" else wanted


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"trainer.device={name}: this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("trainer.device=mps: not available on this machine")
    return device


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported()
