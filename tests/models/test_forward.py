"""Every model computes: shapes, gradients, tracing, memory formats, small widths, rebuilding from a description."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from prune_lab import models
from prune_lab.foundations.errors import UserError
from prune_lab.models.configs import RECURRENT_NAMES
from tests.helpers.models import build, node

SMALL_WIDTH = 0.125
"""Keeps the tests quick; the full widths are counted in test_model_counts.py."""


IMAGE_MODELS = [name for name in models.names() if name not in RECURRENT_NAMES]


def small(name: str, image_size: int = 32, **changes) -> nn.Module:
    return build(name, num_classes=7, image_size=image_size, width=SMALL_WIDTH, **changes)


@pytest.mark.thin(3)
@pytest.mark.parametrize("image_size", [8, 28, 32, 64, 96])
@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_forward_and_backward(name, image_size):
    torch.manual_seed(0)
    model = small(name, image_size)
    logits = model(torch.randn(4, 3, image_size, image_size))
    assert logits.shape == (4, 7)
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    without = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_traceable_and_equal_in_channels_last(name):
    torch.manual_seed(0)
    model = small(name).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = model(images)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(images), logits, rtol=0, atol=0)
        nhwc = model.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(nhwc, logits, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_bf16_autocast_in_channels_last(name):
    torch.manual_seed(0)
    model = small(name).to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    assert logits.dtype == torch.bfloat16
    nn.functional.cross_entropy(logits.float(), torch.arange(4)).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_description_rebuilds_the_network(name):
    config = models.parse_config(node(name, width=SMALL_WIDTH, weights="somewhere/else.pt"))
    description = json.loads(json.dumps(models.describe(config, 7, 32)))
    assert description["model"]["weights"] is None
    torch.manual_seed(3)
    original = models.build(config, num_classes=7, image_size=32)
    torch.manual_seed(3)
    rebuilt = models.from_description(description)
    assert str(rebuilt) == str(original)
    for (key, value), (other_key, other) in zip(
        original.state_dict().items(), rebuilt.state_dict().items(), strict=True
    ):
        assert key == other_key and torch.equal(value, other)


def test_incomplete_description_is_named():
    with pytest.raises(UserError, match="model description lacks num_classes, image_size"):
        models.from_description({"model": node("resnet20")})


def test_option_a_shortcut_by_hand():
    """2 to 4 channels: every second pixel, one zero channel in front and one behind."""
    from prune_lab.models.resnet_cifar import ZeroPadShortcut

    images = torch.arange(32.0).reshape(1, 2, 4, 4)
    out = ZeroPadShortcut(2, 4)(images)
    assert torch.equal(out[0, :, 0, 0], torch.tensor([0.0, 0.0, 16.0, 0.0]))
    assert torch.equal(out[0, 1], torch.tensor([[0.0, 2.0], [8.0, 10.0]]))
    # An odd difference puts the spare zero behind.
    assert ZeroPadShortcut(2, 5)(images).abs().amax((0, 2, 3)).gt(0).tolist() == [False, True, True, False, False]


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "vgg16_bn", "vgg19_bn"])
def test_same_function_as_torchvision(name):
    """torchvision's state dict loads key for key and gives torchvision's logits."""
    import torchvision

    torch.manual_seed(0)
    reference = torchvision.models.get_model(name, num_classes=5).eval()
    ours = build(name.removesuffix("_bn"), num_classes=5, image_size=96).eval()
    ours.load_state_dict(reference.state_dict())
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), reference(images))


def test_wide_resnet_dropout_only_while_training():
    torch.manual_seed(0)
    model = small("wrn_16_8", dropout=0.5)
    images = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


@pytest.mark.parametrize("name", ["googlenet", "resnext50_32x4d", "densenet121"])
def test_torchvision_classifier_by_name(name):
    model = build("torchvision", name=name, num_classes=7, image_size=64)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_shapes_of_a_network_that_computes_its_widths_with_tensors():
    config = models.parse_config(node("torchvision", name="regnet_y_400mf"))
    state = torch.get_rng_state()
    shapes = models.build_on_meta(config, num_classes=7, image_size=32)
    assert torch.equal(torch.get_rng_state(), state)
    assert {parameter.device.type for parameter in shapes.parameters()} == {"meta"}
    whole = models.build(config, num_classes=7, image_size=32)
    assert [tensor.shape for tensor in shapes.parameters()] == [tensor.shape for tensor in whole.parameters()]
