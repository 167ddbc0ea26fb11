"""The finished network on disk: rebuilt exactly, refused in one line when something is missing or does not fit."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file

import prune_lab
from prune_lab import models
from prune_lab.foundations import files
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.files import SaveError
from prune_lab.pipeline.saved_model import save_model
from tests.helpers.runs import METHODS, TINY, compose, execute, run_dir

SIZES = {"num_classes": 4, "image_size": 16}


@pytest.fixture
def saved(tmp_path):
    """A network with moved batch-norm statistics and channels_last weights, and its folder."""
    config = compose("dataset=fake", "model=resnet20", "model.width=0.25").model
    model = models.build(config, **SIZES).to(memory_format=torch.channels_last)
    model(torch.randn(8, 3, 16, 16))
    save_model(model, models.describe(config, **SIZES), tmp_path)
    return model, tmp_path


def test_load_rebuilds_tensors_and_outputs_exactly(saved):
    model, folder = saved
    loaded = prune_lab.load(folder)
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model.eval()(images), rtol=1e-5, atol=1e-6)
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]


def negative_zeros(tensors):
    return sum(int((t.signbit() & (t == 0)).sum()) for t in tensors.values() if t.is_floating_point())


@pytest.mark.parametrize("method", ["static", "magnitude", "rigl", "l0"])
def test_pruned_weights_are_saved_as_positive_zeros(method, tmp_path):
    assert execute(tmp_path, *TINY, *METHODS[method]) == 0
    tensors = load_file(run_dir(tmp_path) / "model.safetensors")
    assert sum(int((tensor == 0).sum()) for tensor in tensors.values()) > 10_000
    assert negative_zeros(tensors) == 0


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_missing_file_is_one_line(saved, name):
    (saved[1] / name).unlink()
    with pytest.raises(UserError, match="holds no finished model"):
        prune_lab.load(saved[1])


def test_tensors_that_do_not_fit_the_description_are_one_line(saved):
    path = saved[1] / "model.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps(description | {"num_classes": 7}))
    with pytest.raises(UserError, match="does not fit model.json") as refusal:
        prune_lab.load(saved[1])
    assert "\n" not in str(refusal.value)


def test_damaged_tensors_are_one_line(saved):
    path = saved[1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="model.safetensors"):
        prune_lab.load(saved[1])


def test_a_full_disk_leaves_the_old_network(saved, monkeypatch):
    model, folder = saved
    before = (folder / "model.safetensors").read_bytes()

    def full(_number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(SaveError, match="cannot write .*model.safetensors: No space left"):
        save_model(model, {}, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]
