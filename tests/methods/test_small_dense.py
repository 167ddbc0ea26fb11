"""A narrower dense network as costly as a sparse one: widths found on real counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml

from prune_lab import models
from prune_lab.accounting.costs import count_parameters, dense_macs, profile
from prune_lab.foundations.errors import UserError
from tests.helpers.method_runs import CONF, configure, finish, make, summary


def model_config(choice: str, **changes):
    """Return the options of conf/model/CHOICE.yaml with `changes`."""
    node = yaml.safe_load((CONF / "model" / f"{choice}.yaml").read_text())
    return models.parse_config(node | changes)


def build(config, num_classes: int = 10, image_size: int = 32) -> torch.nn.Module:
    with torch.device("meta"):
        return models.build(config, num_classes=num_classes, image_size=image_size)


@pytest.mark.parametrize(("sparsity", "factor"), [(0.8, 0.465), (0.9, 0.34)])
def test_resnet50_factor_is_near_the_papers(sparsity: float, factor: float) -> None:
    """The paper's notebooks also count one bit per position for the mask: 1/32 of the dense size."""
    full = model_config("resnet50")
    method = make("small_dense", sparsity=sparsity)
    found = method.adapt_model(full, num_classes=1000, image_size=224)
    ratio = count_parameters(build(found, 1000, 224)) / count_parameters(build(full, 1000, 224))
    assert ratio == pytest.approx(1 - sparsity, rel=0.01)
    with_bits = make("small_dense", sparsity=sparsity - 1 / 32)
    assert with_bits.adapt_model(full, num_classes=1000, image_size=224).width == pytest.approx(factor, rel=0.03)


def test_macs_are_matched_on_request() -> None:
    full = model_config("resnet20")
    found = make("small_dense", sparsity=0.8, match="macs").adapt_model(full, num_classes=10, image_size=32)
    ratio = dense_macs(profile(build(found), 32)) / dense_macs(profile(build(full), 32))
    assert ratio == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_best_width_of_a_network_that_rounds_channels_to_eight(sparsity: float) -> None:
    """The cost is a step function there; no width on a fine grid comes nearer than the one found."""
    full = model_config("mobilenet_v3_small")
    found = make("small_dense", sparsity=sparsity, tolerance=0.2).adapt_model(full, num_classes=10, image_size=32)
    wanted = (1 - sparsity) * count_parameters(build(full))
    grid = [abs(count_parameters(build(replace(full, width=0.02 * step))) - wanted) for step in range(21, 51, 2)]
    assert abs(count_parameters(build(found)) - wanted) <= min(grid)


def test_unreachable_cost_is_refused() -> None:
    with pytest.raises(UserError, match=r"method\.sparsity=0\.9: the nearest width of mobilenet_v2 .*tolerance"):
        make("small_dense").adapt_model(model_config("mobilenet_v2", width=0.25), num_classes=10, image_size=32)


def test_fixed_widths_are_refused() -> None:
    config = model_config("torchvision", name="squeezenet1_1")
    with pytest.raises(UserError, match=r"method\.sparsity=0\.9.*squeezenet1_1"):
        make("small_dense").adapt_model(config, num_classes=10, image_size=64)


def test_factor_applies_to_the_width_that_was_asked_for() -> None:
    wide = model_config("resnet20", width=2.0)
    found = make("small_dense", sparsity=0.75).adapt_model(wide, num_classes=10, image_size=32)
    assert found.width == pytest.approx(1.0, rel=0.02)


def test_summary_counts_against_the_network_as_configured(tmp_path) -> None:
    written = summary(finish(configure(tmp_path, "small_dense", "method.sparsity=0.5")))
    assert written["params/nonzero"] == written["params/total"] < written["params/dense"]
    assert written["params/total"] / written["params/dense"] == pytest.approx(0.5, rel=0.05)
    assert written["macs/train_ratio"] == written["macs/inference_ratio"] < 1
    assert written["sparsity/requested"] is None and written["sparsity/achieved"] is None
