#!/usr/bin/env bash
# Most would guess: torch.func.functional_call computes with the tensors it is given and leaves the network as it
# was. With a module that the network holds under two names, as recurrent blocks and shared heads do, it does not:
# by default (tie_weights=True) it exchanges that module's tensors twice, and what it puts back the second time are
# the ones it was given. Afterwards the layer has a plain tensor in place of its parameter. Nothing is raised. It
# matters for scores, Hessian products, meta-learning and torch.vmap over networks: later steps train nothing there.
# With tie_weights=False and each tensor of the module given once the network stays whole.
#
# Seen with torch 2.13.0 and 2.14.1: the layer holds a zero tensor after a call with zeros; its parameter is gone.
# Output: what the layer holds before and after each call; exit code 1 if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch import nn
from torch.func import functional_call

print("torch", torch.__version__)


class Twice(nn.Module):
    def __init__(self, is_shared: bool) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = self.first if is_shared else nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def is_left_alone(is_shared: bool, **options: bool) -> bool:
    """Call the network with zeros for all of its weights; return whether it has its own parameters afterwards."""
    network = Twice(is_shared)
    own, zeros = network.first.weight, {name: torch.zeros(p.shape) for name, p in network.named_parameters()}
    assert not functional_call(network, zeros, torch.ones(1, 2), **options).any()
    held = network.first.weight
    print(f"shared: {is_shared}, {options or 'defaults'}: then a {type(held).__name__}, zeros only: {not held.any()}")
    return held is own


found = [is_left_alone(False), is_left_alone(True), is_left_alone(True, tie_weights=False)]
is_as_found = found == [True, False, True]
print("as found: a shared module loses its parameters" if is_as_found else "the behaviour has changed")
sys.exit(not is_as_found)
PYTHON
