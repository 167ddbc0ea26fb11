"""scripts/benchmarks/sparse_inference.py: the layers it measures, their zeros, and its sums."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from prune_lab.pruning.masks.semi_structured import is_semi_structured

PATH = Path(__file__).parents[2] / "scripts" / "benchmarks" / "sparse_inference.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("sparse_inference", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_layer_of_resnet50_is_there(script) -> None:
    kinds = script.resnet50_layers()
    assert sum(kind.count for kind in kinds.values()) == 54
    assert sum(kind.count * kind.layer.weight.numel() for kind in kinds.values()) == 25_502_912
    assert kinds["3x3 256 -> 256 at 14 px"].count == 5
    assert kinds["1x1 64 -> 256 at 56 px"].shape == (64, 56, 56)
    assert len(script.quick(kinds)) == 10  # one stem, 1x1 and 3x3 at four sizes, one linear layer


def test_zeros_are_as_many_as_asked_for(script) -> None:
    layer = nn.Conv2d(8, 10, 3, bias=False)
    for label, sparsity in script.SPARSITIES.items():
        weight = script.pruned(layer, label).weight
        assert int((weight == 0).sum()) == layer.weight.numel() - round((1 - sparsity) * layer.weight.numel())
    assert is_semi_structured(script.pruned(layer, "2:4").weight)
    assert script.pruned(nn.Conv2d(3, 8, 3), "2:4") is None


def test_a_layer_is_timed_in_all_forms(script) -> None:
    found = script.measure(nn.Linear(64, 32), torch.randn(1, 64), 8)
    assert found.ratios.keys() == script.SPARSITIES.keys() and found.dense_s > 0
    assert all(ratio > 0 for ratio in found.ratios.values()) and found.in_turn <= found.ratios.keys()


def test_the_sum_takes_the_faster_form_of_each_layer(script) -> None:
    kinds = {"a": script.Kind(nn.Linear(4, 4), (4,), count=2), "b": script.Kind(nn.Linear(4, 4), (4,))}
    found = {
        "a": script.Timed(1.0, {"0.9": 0.5, "0.99": 0.1, "2:4": 3.0}, {"0.9", "0.99"}),
        "b": script.Timed(2.0, {"0.9": 1.5, "0.99": 0.3}, {"0.9", "0.99"}),
    }
    assert script._sum_row("all", kinds, found) == ["all", "1.00", "0.75", "1.00", "1.00", "0.20"]
    assert [found["a"].cell(label) for label in ("2:4", "0.9", "0.95")] == ["~3", "0.50", "-"]
