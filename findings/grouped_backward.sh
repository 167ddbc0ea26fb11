#!/usr/bin/env bash
# Most would guess: the backward pass of a convolution costs twice its forward pass, whatever its groups, and
# torch's own counter says so. It does not: torch.utils.flop_counter gives the backward pass of a convolution in G
# groups 1 + G times the forward pass, and 33 instead of 2 at G = 32. It matters wherever costs of training are
# reported for ResNeXt, MobileNet, EfficientNet or ConvNeXt: the count of a depthwise layer grows with the square
# of its channels.
#
# Seen with torch 2.13.0 and 2.14.1: ratios 2, 3, 5, 9, 17, 33 for G = 1, 2, 4, 8, 16, 32.
# Output: a line per G; exit code 1 if the ratios are others.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

print("torch", torch.__version__)
wrong = False
for groups in (1, 2, 4, 8, 16, 32):
    layer = torch.nn.Conv2d(32, 32, 3, padding=1, groups=groups, bias=False)
    images = torch.randn(1, 32, 8, 8, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        total = layer(images).sum()
    with FlopCounterMode(display=False) as backward:
        total.backward()
    # Both gradients take as many products as the forward pass: 32 * (32 / G) * 9 at each of 64 places.
    by_hand = 2 * 32 * (32 // groups) * 9 * 64
    ratio = backward.get_total_flops() / forward.get_total_flops()
    print(f"G = {groups:2}: forward {forward.get_total_flops():8,} (by hand {by_hand:8,}), backward {ratio:g} times")
    wrong |= ratio != 1 + groups or forward.get_total_flops() != by_hand
print("the behaviour has changed" if wrong else "as found: 1 + G times, where 2 is right")
sys.exit(wrong)
PYTHON
