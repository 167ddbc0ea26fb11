"""Small folders of images and the options of a run on them. Holds no tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers.runs import TINY

OPTIONS = (*TINY[5:], "dataset.image_size=16", "schedule.train.epochs=1", "trainer.device=cpu")
FOLDER = ("dataset=imagefolder", "dataset.workers=0", *OPTIONS)


def write_images(root: Path, *, seed: int, num_train: int = 8, test: str = "test") -> Path:
    """Write images of 16 pixels: `num_train` of each of two classes to train on, 2 to test."""
    source = np.random.default_rng(seed)
    for split, count in (("train", num_train), (test, 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = source.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root
