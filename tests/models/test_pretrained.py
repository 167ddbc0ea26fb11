"""Networks trained by others load key for key and reach the accuracy measured with their authors' code."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from prune_lab import models
from tests.helpers.models import build, node

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


NETWORKS = [("resnet20", "resnet20-12fca82f.th", 0.8103), ("resnet56", "resnet56-4bfd9763.th", 0.8320)]


def read(shared_folder: Path, every: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one in `every` of the 10,000 JPEG-coded CIFAR-10 test images, normalised, and labels (classes by name)."""
    archive = shared_folder / "data" / "cifar10-jpeg.tar.xz"
    if not archive.is_file():
        pytest.skip("data/cifar10-jpeg.tar.xz is not in the shared data")
    with tarfile.open(archive) as tar:
        files = [(member.name, tar.extractfile(member).read()) for member in tar
                 if member.isfile() and "test/" in member.name]  # fmt: skip
    classes = [name.split("/")[-2] for name, _ in files]
    names = sorted(set(classes))
    assert len(files) == 10_000 and len(names) == 10
    pixels = []
    for _, content in files[::every]:
        with Image.open(io.BytesIO(content)) as image:
            pixels.append(numpy.asarray(image.convert("RGB")))
    images = torch.from_numpy(numpy.stack(pixels)).permute(0, 3, 1, 2).float().div_(255)
    images.sub_(torch.tensor(MEAN).view(3, 1, 1)).div_(torch.tensor(STD).view(3, 1, 1))
    return images, torch.tensor([names.index(name) for name in classes[::every]])


@pytest.fixture(scope="module")
def test_images(shared_folder):
    return read(shared_folder, every=1)


def accuracy_of(name: str, weights: Path, images: torch.Tensor, labels: torch.Tensor) -> float:
    config = models.parse_config(node(name, weights=str(weights)))
    model = build(name, num_classes=10, image_size=32)
    models.load_weights(model, config)
    model.eval().to(memory_format=torch.channels_last)
    num_correct = 0
    with torch.inference_mode():
        for batch, target in zip(images.split(100), labels.split(100), strict=True):
            batch = batch.contiguous(memory_format=torch.channels_last)
            num_correct += int((model(batch).argmax(1) == target).sum())
    return num_correct / len(labels)


@pytest.mark.slow
@pytest.mark.parametrize("name, file, accuracy", NETWORKS)
def test_accuracy(shared_folder, test_images, name, file, accuracy):
    # One network evaluated by two codes: only the order of float additions may move an image or two.
    assert accuracy_of(name, shared_folder / "pretrained" / file, *test_images) == pytest.approx(accuracy, abs=2e-4)


@pytest.mark.thin(4)
@pytest.mark.parametrize("name, file, accuracy", NETWORKS)
def test_a_tenth_of_the_images_tells_that_the_weights_are_read_rightly(shared_folder, name, file, accuracy):
    found = accuracy_of(name, shared_folder / "pretrained" / file, *read(shared_folder, every=10))
    assert found == pytest.approx(accuracy, abs=0.04)  # three standard deviations of 1,000 draws
