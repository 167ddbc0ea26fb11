#!/usr/bin/env bash
# Most would guess: an ONNX file whose batch size is left open can be given a batch size, as long as the input's
# shape allows it. A file of torch.onnx.export cannot in tract: the exporter writes the shape of every inner
# result too, with the symbol of the batch, and tract takes what the file says about the inside as binding: a
# number at the input contradicts it. onnxruntime runs such a file. It matters because the entries are optional
# and runtimes infer them: without them the file runs in both.
#
# Seen with torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2, tract 0.23.9: refused as written, right without the inner
# shapes.
# Output: what tract says of both files; exit code 1 if it says anything else.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 tract==0.23.9
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import sys

import onnx
import torch
import tract
from torch import nn

print("torch", torch.__version__, "onnx", onnx.__version__)
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
images = torch.randn(3, 3, 8, 8)
torch.onnx.export(model, (images,), "network.onnx", dynamo=True, dynamic_shapes=({0: "batch"},), input_names=["images"],
                  external_data=False, verbose=False)
network = onnx.load("network.onnx")
shapes = len(network.graph.value_info)
del network.graph.value_info[:]
onnx.save(network, "without.onnx")


def ask(path):
    """Return what the file gives for three images, or why tract refuses it."""
    read = tract.onnx().load(path)
    read.set_input_fact(0, "3,3,8,8,f32")
    try:
        found = read.into_model().into_runnable().run([images.numpy()])[0].to_numpy()
    except Exception as error:
        return next(line.strip() for line in str(error).splitlines() if "unify" in line)
    return "right" if (torch.from_numpy(found) - model(images)).abs().max() < 1e-5 else "wrong"


answers = ask("network.onnx"), ask("without.onnx")
print(f"as written, {shapes} inner shapes: {answers[0]}")
print(f"without them: {answers[1]}")
is_as_found = "Impossible to unify Sym(batch) with Val(3)" in answers[0] and answers[1] == "right"
print("as found" if is_as_found else "the behaviour has changed")
sys.exit(not is_as_found)
PYTHON
