"""Agreement of exported networks: what a check can see, and what rounding alone may not refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prune_lab.commands.export import agreement, catalog, files, timing, work
from prune_lab.foundations.errors import UserError


def make_network() -> nn.Module:
    torch.manual_seed(0)
    features = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*features, nn.Linear(8, 4)).eval().requires_grad_(False)


def with_bias(model: nn.Module, value: float) -> nn.Module:
    """Return the network with outputs that hardly differ, of their size, between images."""
    model[4].bias.fill_(value)
    return model


class Noisy(nn.Module):
    """Multiplies and divides by a number that fp32 cannot hold beside what it is added to."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 3e3 - 3e3


class Half(nn.Module):
    """Makes a tensor of its own precision, whatever the network's."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :4] @ torch.eye(4)


def test_the_reference_is_computed_in_float64() -> None:
    model = make_network()
    reference = agreement.make_reference(model, 16)
    assert [len(batch) for batch in reference.images] == [1, 3, 28]
    assert reference.wanted.dtype == torch.float64 and 0 < reference.rounding < 1e-5
    double = make_network().double()
    agreed = agreement.compare(reference, lambda images: double(images.double()))
    assert agreed.max_difference == 0 and agreed.same_top1 == agreed.images == 32
    assert agreement.compare(reference, model, is_same_arithmetic=True).max_difference == 0
    assert next(model.parameters()).dtype == torch.float32


def test_what_all_images_share_does_not_hide_a_fault() -> None:
    """A filter is missing: of the largest output within the tolerance of 1e-4, of what images tell far from it."""
    model, wrong = (with_bias(make_network(), 3e3) for _ in range(2))
    wrong[0].weight[0] = 0
    reference = agreement.make_reference(model, 16)
    agreed = agreement.compare(reference, wrong)
    assert agreed.max_difference / reference.largest < 1e-4
    assert agreed.relative == agreed.max_difference / reference.scale and not agreed.within(1e-3)


@pytest.mark.parametrize("bias", [0.0, 30.0, 3e3])
def test_rounding_alone_refuses_nothing(bias: float) -> None:
    model = with_bias(make_network(), bias)
    reference = agreement.make_reference(model, 16)
    assert agreement.compare(reference, model).within(1e-4) and reference.rounding < 5e-5
    assert reference.scale <= reference.largest


def test_outputs_that_do_not_depend_on_images_are_refused() -> None:
    model = make_network()
    model[4].weight.fill_(0)
    with pytest.raises(UserError, match="are the same for all random images: any file that ignores"):
        agreement.make_reference(model, 16)


def test_images_differ_in_more_than_their_noise() -> None:
    """Noise of 96 px has nearly one mean: networks that average over pixels give nearly one output."""
    (images,) = agreement.make_reference(make_network(), 96, batches=(8,)).images
    assert images.shape == (8, 3, 96, 96)
    assert float(images.mean((2, 3)).std()) > 0.1


def test_a_module_of_its_own_precision_is_compared_in_fp32() -> None:
    reference = agreement.make_reference(Half(), 4)
    assert reference.exact is None and reference.rounding == 0
    assert agreement.compare(reference, Half()).max_difference == 0


def test_a_refusal_says_that_the_network_amplifies_rounding() -> None:
    model = make_network()
    model.insert(5, Noisy())
    export = object.__new__(work._Export)
    export._reference = agreement.make_reference(model, 16)
    agreed = agreement.compare(export._reference, make_network())
    check = files.Check(catalog.Runtime("X", "onnx"), agreed, 1e-4)
    assert export._reference.rounding > 1e-4
    assert "(the network amplifies rounding: PyTorch in fp32 is itself " in export._sensitivity(check)
    export._reference = agreement.make_reference(make_network(), 16)
    assert export._sensitivity(check) == ""


def test_other_forms_are_held_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """One timed image has no spread: forms are compared on more of them."""
    model = with_bias(make_network(), 30.0)
    image = torch.randn(1, 3, 16, 16)
    monkeypatch.setattr(timing.sparse, "faster_layers", lambda model, images: ["4"])
    assert timing._sparse(model, image, 1e-4) is not None

    def spoilt(model: nn.Module, layers: list[str]) -> nn.Module:
        other = with_bias(make_network(), 30.0)
        other[4].weight[:, 0] = 0
        return other

    monkeypatch.setattr(timing.sparse, "with_csr", spoilt)
    assert timing._sparse(model, image, 1e-2) is None
