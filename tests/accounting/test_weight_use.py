"""Which layers hand their own parameter to the product, and what every convolution and matrix product costs."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.prune import l1_unstructured
from torch.utils.flop_counter import FlopCounterMode

from prune_lab.accounting.costs import dense_macs, layer_table, macs_without_weight, profile
from prune_lab.accounting.eligibility import select_layers
from prune_lab.accounting.weight_use import COMPUTED, PARTS, computed_weights


class StandardisedConv2d(nn.Conv2d):
    """Its kernel is the parameter with mean 0 and variance 1 per output."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.flatten(1).std(1)[:, None, None, None], self.bias, self.stride, self.padding)


class PaddedConv2d(nn.Conv2d):
    """Its kernel is the parameter, what it reads is padded by hand."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class Mixture(nn.Module):
    """Four kernels mixed per image, the batch folded into groups."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.routing = nn.Parameter(torch.randn(4, 6 * 3 * 9)), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        kernels = torch.sigmoid(self.routing(x.mean((2, 3)))) @ self.weight
        kernels = kernels.view(len(x) * 6, 3, 3, 3)
        return F.conv2d(x.flatten(0, 1)[None], kernels, padding=1, groups=len(x)).view(len(x), 6, *x.shape[2:])


class Scaled(nn.Module):
    """A parent scales the kernel of a layer that it never calls, by what the image says."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.conv.weight * x.mean().sigmoid())
        return F.linear(x.mean((2, 3)), self.linear.weight.abs())


class Attention(nn.Module):
    """A packed projection in parts, a transposed and a reshaped weight, products of two activations."""

    def __init__(self, rows: int = 2) -> None:
        super().__init__()
        self.rows = rows
        self.packed, self.out, self.last = nn.Linear(3, 9, bias=False), nn.Linear(3, 3), nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        first, second, third = self.packed.weight.chunk(3)
        query, key, value = tokens[:, : self.rows] @ first.t(), F.linear(tokens, second), F.linear(tokens, third)
        mixed = (query @ key.transpose(1, 2)).softmax(-1) @ value
        return F.linear(self.out(mixed), self.last.weight.flatten(1))


def normed(wrap) -> nn.Module:
    layer = nn.Conv2d(3, 6, 3)
    return nn.Sequential(wrap(layer) or layer, nn.ReLU())


@pytest.mark.parametrize(
    ("model", "listed"),
    [
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Flatten(), nn.Linear(96, 2)), []),
        (nn.Sequential(StandardisedConv2d(3, 6, 3), nn.Conv2d(6, 2, 1)), ["0"]),
        (nn.Sequential(PaddedConv2d(3, 6, 3), nn.ConvTranspose2d(6, 2, 2)), []),
        (nn.Sequential(Mixture(), nn.Conv2d(6, 2, 1)), ["0"]),
        (Scaled(), ["conv", "linear"]),
        (Attention(rows=64), []),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), None),
    ],
)  # fmt: skip
def test_layers_whose_parameter_is_not_what_reaches_the_product(model, listed):
    if listed is None:
        model, listed = nn.Sequential(nn.Conv2d(3, 8, 8), nn.Flatten(1, 2), nn.Unflatten(1, (8, 1)), nn.Flatten(2),
                                      nn.Unflatten(1, (1, 8)), nn.Flatten(2), model), []  # fmt: skip
    found = computed_weights(model, 8)
    assert found == dict.fromkeys(listed, COMPUTED)
    assert model.training and not any(module._forward_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal,
             nn.utils.weight_norm, nn.utils.spectral_norm, lambda layer: l1_unstructured(layer, "weight", 9)]
)  # fmt: skip
def test_weights_that_torch_computes_from_others_are_listed_and_count_as_the_layer(wrap):
    model = normed(wrap)
    assert computed_weights(model, 8) == {"0": COMPUTED}
    (cost,) = profile(model, 8)
    assert (cost.parameter, cost.shape, cost.macs) == ("0.weight", (6, 3, 3, 3), 162 * 36)
    assert cost.computed == COMPUTED


def test_parts_of_a_weight_that_are_used_differently_often_are_listed_and_counted_to_the_mac():
    model = Attention(rows=2)
    assert computed_weights(model, 8) == {"packed": PARTS}
    assert dense_macs(profile(model, 8)) == 9 * (2 + 64 + 64) + 9 * 2 + 15 * 2


def test_kernels_that_are_computed_from_the_image_count():
    costs = profile(Mixture(), 8)
    assert [(cost.parameter, cost.macs) for cost in costs] == [
        ("routing.weight", 12), ("weight", 4 * 162), ("weight (computed kernel)", 162 * 64)
    ]  # fmt: skip
    model = nn.Sequential(Mixture(), nn.Conv2d(6, 2, 1))
    costs = profile(model, 8)
    assert costs[-1].macs == 12 * 64
    reasons = {(row["name"], row["reason"]) for row in layer_table(select_layers(model), costs, {})}
    assert ("0", COMPUTED) in reasons  # not that it has no layer of its own


class MixedLinear(nn.Module):
    """The matrix of a linear layer mixed for each image by a product, as in timm's CondLinear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.routing = nn.Parameter(torch.randn(4, 5 * 3)), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        matrices = (self.routing(x).sigmoid() @ self.weight).view(len(x), 5, 3)
        return torch.bmm(matrices, x[:, :, None])[:, :, 0]


def test_products_without_a_weight_are_told_apart_and_counted():
    assert dense_macs(profile(MixedLinear(), 8)) == 12 + 4 * 15
    assert macs_without_weight(MixedLinear(), 8) == 15
    assert macs_without_weight(Attention(rows=64), 8) == 2 * 64 * 64 * 3
    assert macs_without_weight(nn.Sequential(Mixture(), StandardisedConv2d(6, 2, 1)), 8) == 0
    with torch.device("meta"):
        assert macs_without_weight(torchvision.models.vit_b_16(), 224) == 12 * 2 * 197 * 197 * 768


class Product(nn.Module):
    """One function of the image [1, 3, 8, 8] and a parameter."""

    def __init__(self, function, *shape: int) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(shape)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


@pytest.mark.parametrize(
    ("function", "shape", "macs"),
    [
        (lambda x, w: torch.einsum("bchw,oc->bohw", x, w), (5, 3), 64 * 15),
        (lambda x, w: torch.tensordot(x, w, dims=([1], [1])), (5, 3), 64 * 15),
        (lambda x, w: F.bilinear(x.mean((2, 3)), x.mean((2, 3)), w), (5, 3, 3), 45),
        (lambda x, w: torch.dot(x.flatten(), w), (192,), 192),
        (lambda x, w: torch.addbmm(x.new_zeros(64, 5), x.flatten(2).transpose(1, 2), w), (1, 3, 5), 64 * 15),
        (lambda x, w: F.conv_transpose1d(x.flatten(2), w), (3, 5, 2), 64 * 30),
    ],
)  # fmt: skip
def test_every_form_of_a_product_with_a_parameter_counts(function, shape, macs):
    model = Product(function, *shape)
    assert dense_macs(profile(model, 8)) == macs and computed_weights(model, 8) == {}


def flops(model: nn.Module, image_size: int) -> int:
    """Return half of what torch counts for one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, image_size, image_size))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "densenet121", "googlenet"])
def test_counts_agree_with_torchs_own_counter(name):
    model = torchvision.models.get_model(name, num_classes=10)
    assert dense_macs(profile(model, 64)) == flops(model, 64)


@pytest.mark.parametrize(
    "model", [Mixture(), Scaled(), nn.Sequential(StandardisedConv2d(3, 6, 3), PaddedConv2d(6, 4, 3))]
)
def test_computed_kernels_agree_with_torchs_own_counter(model):
    assert dense_macs(profile(model, 8)) == flops(model, 8)


def test_mixtures_of_kernels_in_timm_count():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("tf_efficientnet_cc_b0_4e", num_classes=10)
    assert dense_macs(profile(model, 64)) == 42_678_528
    assert computed_weights(model, 64)["blocks.4.0.conv_pw"] == COMPUTED


@pytest.mark.parametrize("name", ["nf_resnet26", "resnetv2_50x1_bit"])
def test_weight_standardisation_in_timm_is_found(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    found = computed_weights(model, 32)
    assert set(found) == {path for path, module in model.named_modules() if type(module).__name__.startswith("S")
                          and isinstance(module, nn.Conv2d)}  # fmt: skip
    assert set(found.values()) == {COMPUTED}
