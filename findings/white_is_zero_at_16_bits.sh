#!/usr/bin/env bash
# Most would guess: a grey TIFF that says "white is zero" (tag 262 = 0, as scanners and microscopes write) looks the
# same whether it has 8 or 16 bits. It does not: Pillow turns the values of 8-bit files round and leaves those of
# 16-bit files as they are; OpenCV does so with IMREAD_UNCHANGED, but with IMREAD_GRAYSCALE turns both. So one 16-bit
# file is a negative in one loader and a positive in the next, without a warning. It matters for classification on
# X-rays, microscopy and scans: a network trained with one loader is evaluated on negatives with the other.
#
# Seen with pillow 13.0.0, opencv-python-headless 5.0.0.93, tifffile 2026.3.3 and numpy 2.4.6. Values 0, a quarter,
# full. 8 bits: 255, 192, 0 in all three. 16 bits: 0, 16383, 65535 in Pillow and OpenCV unchanged, 255, 192, 0 in
# OpenCV greyscale.
# Output: what each reads; exit code 1 if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0 opencv-python-headless==5.0.0.93 tifffile==2026.3.3 numpy==2.4.6
FOLDER="$folder" "$folder/venv/bin/python" - <<'PYTHON'
import os
import sys

import cv2
import numpy as np
import PIL
import tifffile
from PIL import Image

print("pillow", PIL.__version__, "opencv", cv2.__version__, "tifffile", tifffile.__version__, "numpy", np.__version__)
path = os.path.join(os.environ["FOLDER"], "grey.tif")
found = []
for kind in (np.uint8, np.uint16):
    full = int(np.iinfo(kind).max)
    tifffile.imwrite(path, np.array([[0, full // 4, full]], dtype=kind), photometric="miniswhite")
    read = {
        "Pillow": np.asarray(Image.open(path)),
        "OpenCV, unchanged": cv2.imread(path, cv2.IMREAD_UNCHANGED),
        "OpenCV, greyscale": cv2.imread(path, cv2.IMREAD_GRAYSCALE),
    }
    for name, values in read.items():
        print(f"{np.dtype(kind).name:8} {name:18} {values[0].tolist()}")
        found.append("negative" if values[0, 0] > values[0, 2] else "as stored")
is_as_found = found == ["negative"] * 3 + ["as stored", "as stored", "negative"]
print("as found: at 16 bits the loaders differ" if is_as_found else "the behaviour has changed")
sys.exit(not is_as_found)
PYTHON
