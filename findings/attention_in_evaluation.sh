#!/usr/bin/env bash
# Most would guess: a flop counter says the same about a network in training and in evaluation mode. For attention
# it does not: torch's counter finds nothing at all in nn.MultiheadAttention and nn.TransformerEncoderLayer once
# eval() was called, because one fused operation then computes them that the counter has no formula for, and it
# does not say that it left one out. It matters for tables: torchvision's ViT-B/16 loses a third of its multiply-
# adds by eval(), the mode in which networks are counted.
#
# Seen with torch 2.13.0 and 2.14.1: 589,824 and 1,114,112 in training mode, 0 and 0 in evaluation mode.
# Output: a line per module and mode; exit code 1 if the counts are others.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

print("torch", torch.__version__)
tokens = torch.randn(1, 16, 64)
attention = nn.MultiheadAttention(64, 4, batch_first=True)
layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
found = []
for module, inputs in ((attention, (tokens, tokens, tokens)), (layer, (tokens,))):
    for training in (True, False):
        module.train(training)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(*inputs)
        found.append(counter.get_total_flops())
        print(f"{type(module).__name__:24} {'training' if training else 'evaluation':10} {found[-1]:9,} flops")
is_as_found = found == [589_824, 0, 1_114_112, 0]
print("as found: nothing in evaluation mode" if is_as_found else "the behaviour has changed")
sys.exit(not is_as_found)
PYTHON
