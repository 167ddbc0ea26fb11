"""Networks trained by others load key for key and reach the accuracy measured with their authors' code."""

from __future__ import annotations

import io
import tarfile

import numpy
import pytest
import torch
from PIL import Image

from prune_lab import models
from tests.helpers.models import build, node

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def test_images(shared_folder):
    """Return the 10,000 JPEG-coded CIFAR-10 test images, normalised, and their labels (classes by name)."""
    archive = shared_folder / "data" / "cifar10-jpeg.tar.xz"
    if not archive.is_file():
        pytest.skip("data/cifar10-jpeg.tar.xz is not in the shared data")
    pixels, classes = [], []
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and "test/" in member.name:
                with Image.open(io.BytesIO(tar.extractfile(member).read())) as image:
                    pixels.append(numpy.asarray(image.convert("RGB")))
                classes.append(member.name.split("/")[-2])
    names = sorted(set(classes))
    assert len(pixels) == 10_000 and len(names) == 10
    images = torch.from_numpy(numpy.stack(pixels)).permute(0, 3, 1, 2).float().div_(255)
    images.sub_(torch.tensor(MEAN).view(3, 1, 1)).div_(torch.tensor(STD).view(3, 1, 1))
    return images, torch.tensor([names.index(name) for name in classes])


@pytest.mark.thin(4)
@pytest.mark.parametrize(
    "name, file, accuracy",
    [("resnet20", "resnet20-12fca82f.th", 0.8103), ("resnet56", "resnet56-4bfd9763.th", 0.8320)],
)
def test_accuracy(shared_folder, test_images, name, file, accuracy):
    config = models.parse_config(node(name, weights=str(shared_folder / "pretrained" / file)))
    model = build(name, num_classes=10, image_size=32)
    models.load_weights(model, config)
    model.eval().to(memory_format=torch.channels_last)
    images, labels = test_images
    num_correct = 0
    with torch.inference_mode():
        for batch, target in zip(images.split(100), labels.split(100), strict=True):
            batch = batch.contiguous(memory_format=torch.channels_last)
            num_correct += int((model(batch).argmax(1) == target).sum())
    # One network evaluated by two codes: only the order of float additions may move an image or two.
    assert num_correct / len(labels) == pytest.approx(accuracy, abs=2e-4)
