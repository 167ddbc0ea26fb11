"""What start weights bring into a run is told: their accuracy before training, their zeros and what keeps them."""

from __future__ import annotations

import hashlib
import re
import shlex
from dataclasses import replace

import pytest
import torch

import prune_lab
from prune_lab import models
from prune_lab.accounting.eligibility import select_layers
from prune_lab.training import start_weights
from tests.helpers.runs import TINY, compose, execute, run_dir, summary

SIZES = {"num_classes": 4, "image_size": 16}


def weights_of(model) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    return {layer.parameter: named[layer.parameter].detach() for layer in select_layers(model)}


@pytest.fixture
def sparse_file(tmp_path):
    """A file with 88 % zeros, and where its weights are not zero."""
    torch.manual_seed(3)
    config = models.parse_config({"name": "resnet20", "weights": None, "width": 0.25, "shortcut": "A"})
    model = models.build(config, **SIZES)
    for weight in weights_of(model).values():
        weight[torch.rand_like(weight) < 0.88] = 0
    torch.save({"net": model.state_dict()}, tmp_path / "sparse.pt")
    return tmp_path / "sparse.pt", {name: weight != 0 for name, weight in weights_of(model).items()}


def test_zeros_are_told_and_the_options_that_are_named_keep_them(tmp_path, sparse_file, capsys):
    path, nonzero = sparse_file
    assert execute(tmp_path / "dense", *TINY, "method=dense", f"model.weights={path}") == 0
    said = capsys.readouterr().out
    total = sum(mask.numel() for mask in nonzero.values())
    share = 1 - sum(int(mask.sum()) for mask in nonzero.values()) / total
    assert f"start weights: {share:.2%} of the weights of convolutions and linear layers are zero; training" in said
    found = summary(tmp_path / "dense")
    assert found["start/zeros"] == pytest.approx(share) and 0.87 < share < 0.89
    assert f"start weights   top-1 {found['start/top1']:.2f} % before training, {share:.2%} zeros" in said
    assert all(bool((weight != 0).all()) for weight in weights_of(prune_lab.load(run_dir(tmp_path / "dense"))).values())

    options = shlex.split(re.search(r"; (method=magnitude_init .*) keeps these zeros", said)[1])
    assert execute(tmp_path / "kept", *TINY, *options, f"model.weights={path}") == 0
    kept = weights_of(prune_lab.load(run_dir(tmp_path / "kept")))
    assert all(torch.equal(weight != 0, nonzero[name]) for name, weight in kept.items())


def test_accuracy_before_training_is_that_of_the_file(tmp_path, capsys):
    """The finished network of one run starts another and is evaluated as the first one ended."""
    assert execute(tmp_path / "one", *TINY, "method=dense") == 0
    start = f"model.weights={run_dir(tmp_path / 'one') / 'model.safetensors'}"
    assert "start/top1" not in summary(tmp_path / "one")
    capsys.readouterr()
    assert execute(tmp_path / "two", *TINY, "method=magnitude", start) == 0
    said, found = capsys.readouterr().out, summary(tmp_path / "two")
    assert found["start/top1"] == summary(tmp_path / "one")["final/top1"] and found["start/zeros"] < 0.01
    digest = hashlib.sha256((run_dir(tmp_path / "one") / "model.safetensors").read_bytes()).hexdigest()
    assert found["start/content"] == digest
    line = f"start weights: top-1 {found['start/top1']:.2f} % on the test split before training"
    usual = "mean 0.5,0.5,0.5 and std 0.289,0.289,0.289"
    assert f"{line}; if they were trained with other values than {usual}, set dataset.mean, dataset.std\n" in said
    assert "are zero" not in said
    assert said.count("before training") == 2  # the line and the end of the run


def test_a_part_of_the_images_is_marked(tmp_path, sparse_file, capsys):
    part = ("trainer.limit_eval_batches=1", "trainer.eval_batch_size=8")
    assert execute(tmp_path / "run", *TINY, *part, "method=dense", f"model.weights={sparse_file[0]}") == 0
    said = capsys.readouterr().out
    assert "% on the test split (trainer.limit_eval_batches=1) before training" in said
    assert re.search(r"start weights   top-1 [\d.]+ % of 8 of 20 images before training", said)


def test_no_hint_where_the_normalisation_was_chosen():
    config = compose("dataset=fake", "model=resnet20")
    assert start_weights._hint(config).startswith("; if they were trained with other values than mean 0.5,")
    assert start_weights._hint(replace(config, overrides=("dataset.mean=[0.4,0.4,0.4]",))) == ""
