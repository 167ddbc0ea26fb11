"""MACs of torchvision networks as other tools count them, beside ours: python counts.py NAME [NAME ...]; 224 px.

One line per tool: its number, and what it is above ours. Needs prune-lab and the packages of README.md.
"""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Callable

import torch
import torchvision
from calflops import calculate_flops
from fvcore.nn import FlopCountAnalysis
from ptflops import get_model_complexity_info
from thop import profile as thop_profile
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torch_kirigami.measurement import calculate_model_complexity
from torchinfo import summary
from torchprofile import profile_macs

from prune_lab.accounting import dense_macs, profile

SHAPE = (1, 3, 224, 224)
QUIET = {"print_results": False, "print_detailed": False, "output_as_string": False}


def torch_counter(model: nn.Module, images: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return counter.get_total_flops() // 2


def ptflops(model: nn.Module, backend: str) -> int:
    return get_model_complexity_info(model, SHAPE[1:], as_strings=False, print_per_layer_stat=False, backend=backend)[0]


TOOLS: dict[str, Callable[[nn.Module, torch.Tensor], float]] = {
    "prune-lab": lambda model, images: dense_macs(profile(model, SHAPE[-1])),
    "calflops": lambda model, images: calculate_flops(model, input_shape=SHAPE, **QUIET)[1],
    "torch-kirigami": lambda model, images: calculate_model_complexity(model, images).macs,
    "torch FlopCounterMode / 2": torch_counter,
    "torchinfo": lambda model, images: summary(model, input_data=images, verbose=0).total_mult_adds,
    "ptflops, aten": lambda model, images: ptflops(model, "aten"),
    "torchprofile": profile_macs,
    "fvcore": lambda model, images: FlopCountAnalysis(model, images).total(),
    "ptflops, pytorch": lambda model, images: ptflops(model, "pytorch"),
    "thop": lambda model, images: thop_profile(model, inputs=(images,), verbose=False)[0],
}


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    for name in names:
        ours = 0
        for tool, count in TOOLS.items():
            torch.manual_seed(0)
            model, images = torchvision.models.get_model(name).eval(), torch.randn(SHAPE)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                found = int(count(model, images))
            ours = ours or found
            print(f"{name:20} {tool:26} {found:>14,} {found - ours:>+15,}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
