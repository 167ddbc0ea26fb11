"""Small data sets on disk and shortcuts for the data-set tests."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image

from prune_lab.datasets import BatchFormat, load, parse_config

REPO = Path(__file__).parents[2]
CONF = REPO / "conf" / "dataset"
FORMAT = BatchFormat(torch.device("cpu"), torch.float32, channels_last=True)


def shared_data() -> Path:
    """Return the folder with real test data; it need not exist."""
    return Path(os.environ.get("PRUNE_LAB_TEST_DATA", REPO.parent / "shared")) / "data"


def node(name: str, **overrides) -> dict:
    """Return the resolved options of conf/dataset/NAME.yaml with `overrides`."""
    options = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"), resolve=True) | overrides
    return {key: value for key, value in options.items() if key != "defaults"}  # Hydra's own


def make(name: str, fmt: BatchFormat = FORMAT, **overrides):
    return load(parse_config(node(name, **overrides)), fmt)


def train(dataset, *, epoch=0, batch_size=16, start=0, seed=0, rank=0, world_size=1) -> list:
    return list(
        dataset.train_batches(
            epoch=epoch, batch_size=batch_size, start=start, seed=seed, rank=rank, world_size=world_size
        )
    )


def evaluate(dataset, split="test", batch_size=16, *, rank=0, world_size=1) -> list:
    return list(dataset.eval_batches(split, batch_size, rank=rank, world_size=world_size))


def assert_equal_batches(first: list, second: list) -> None:
    assert len(first) == len(second)
    for (images, labels), (other_images, other_labels) in zip(first, second, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


def image_bytes(value: int, *, size=32, mode="RGB", kind="PNG") -> bytes:
    buffer = io.BytesIO()
    colour = value if mode in ("L", "P") else (value,) * len(mode)
    Image.new(mode, (size, size), colour).save(buffer, format=kind)
    return buffer.getvalue()


def write_tree(root: Path, counts: dict[str, dict[str, int]], *, size=32) -> Path:
    """Write {split: {class: count}} single-coloured PNGs; returns `root`."""
    value = 0
    for split, classes in counts.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                value = (value + 7) % 256
                (root / split / name / f"{i:03}.png").write_bytes(image_bytes(value, size=size))
    return root


def small_cifar(tmp_path: Path, root: Path, **overrides) -> dict:
    """Return overrides for a CIFAR of 2 classes, 5 training and 3 test images."""
    sizes = {"num_classes": 2, "num_train": 5, "num_test": 3}
    return {"root": str(root), "cache_dir": str(tmp_path / "cache"), **sizes, **overrides}


def published_files(*, payload=None) -> dict[str, bytes]:
    """Return the files of a tiny CIFAR-10 archive as its authors wrote them: 1 image per training batch."""
    files = {}
    for i, name in enumerate([f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]):
        num = 3 if name == "test_batch" else 1
        data = np.full((num, 3072), 10 * i, dtype=np.uint8)
        data[:, :1024] += 1  # the red plane comes first
        files[name] = pickle.dumps({b"data": data, b"labels": [(i + k) % 2 for k in range(num)]}, protocol=4)
    files["batches.meta"] = pickle.dumps(payload or {b"label_names": [b"cat", b"dog"]}, protocol=4)
    return files


def tar_bytes(files: dict[str, bytes], mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()
