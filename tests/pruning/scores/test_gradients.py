"""What scores are computed from: balanced images, a network that nobody notices was used, exact derivatives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from prune_lab.compose.overrides import compose_checked
from prune_lab.core import images as core_images
from prune_lab.datasets import load
from prune_lab.datasets.base import BatchFormat
from prune_lab.foundations.errors import UserError
from prune_lab.pruning.scores import evaluation_mode, gradients, second_derivatives
from tests.helpers.contexts import context_of
from tests.helpers.method_runs import CONF, make
from tests.helpers.score_phases import Images, Net, noise_images, one_image, phase, unchanged

CPU = BatchFormat(torch.device("cpu"), torch.float32, torch.contiguous_format)


def positions(data: Images, seed: int = 0, **options) -> list[list[int]]:
    """Return the positions of each batch that `images.batches` reads."""
    context = phase(Net(), make("snip"), data, seed=seed)
    data.seen.clear()
    batches = list(core_images.batches(context, **options))
    assert all(torch.equal(images, data.images[batch]) for (images, _), batch in zip(batches, data.seen, strict=True))
    return [batch.tolist() for batch in data.seen]


def classes(data: Images, batches: list[list[int]]) -> list[list[int]]:
    return [data.train_labels[batch].tolist() for batch in batches]


# Images


def test_stratified_batches_hold_all_classes_alike():
    data = noise_images(per_class=6)
    found = classes(data, positions(data, per_class=4, batch_size=6))
    assert found == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 1, 2]]


def test_class_sorted_batches_hold_some_classes_only():
    data = noise_images(per_class=6)
    assert classes(data, positions(data, per_class=4, batch_size=6, order="class_sorted")) == [
        [0, 0, 0, 0, 1, 1], [1, 1, 2, 2, 2, 2],
    ]  # fmt: skip


def test_the_order_chooses_no_other_images():
    data = noise_images(per_class=6)
    chosen = {
        order: sorted(sum(positions(data, per_class=4, batch_size=6, order=order), []))
        for order in ("stratified", "class_sorted", "random")
    }
    assert chosen["random"] == chosen["stratified"] == chosen["class_sorted"]
    assert len(set(chosen["random"])) == 12


def test_batches_are_nearly_equal_and_none_is_larger_than_asked():
    data = noise_images(per_class=6)
    assert [len(batch) for batch in positions(data, per_class=6, batch_size=7)] == [6, 6, 6]
    assert [len(batch) for batch in positions(data, per_class=5, batch_size=8)] == [8, 7]


def test_images_come_from_the_seed():
    data = noise_images(per_class=20)
    options = {"per_class": 3, "batch_size": 4, "order": "random"}
    assert positions(data, **options) == positions(data, **options)
    assert positions(data, **options) != positions(data, seed=1, **options)


def test_rounds_share_no_image_and_each_is_balanced():
    data = noise_images(per_class=6)
    found = positions(data, per_class=2, batch_size=3, rounds=3)
    assert len(found) == 6 and sorted(sum(found, [])) == list(range(18))
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert sorted(classes(data, [first + second])[0]) == [0, 0, 1, 1, 2, 2]


def test_too_few_images_of_a_class_are_refused_by_name():
    data = noise_images(per_class=6)
    with pytest.raises(UserError, match="method.samples_per_class=7 exceeds the 6 training images of class 0"):
        positions(data, per_class=7, batch_size=8)
    with pytest.raises(UserError, match=r"=3 x method.rounds=3 exceeds the 6 training images of class 0"):
        positions(data, per_class=3, batch_size=8, rounds=3)
    data.train_labels[data.train_labels == 2] = 1
    with pytest.raises(UserError, match="exceeds the 0 training images of class 2"):
        positions(data, per_class=1, batch_size=8)


def test_augmented_images_are_the_same_in_every_call():
    """The gradient and the Hessian must see the same crops, and each round others."""
    overrides = ["dataset=fake", "dataset.image_size=8", "dataset.num_train=30", "dataset.num_test=4"]
    (config,) = compose_checked(CONF, overrides, sweep=False)
    context = phase(Net(num_classes=10), make("snip"), load(config.dataset, CPU))
    first, again, plain = (
        [images for images, _ in core_images.batches(context, per_class=1, batch_size=10, rounds=3, augment=augment)]
        for augment in (True, True, False)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(first, plain, strict=True))


# The network


def test_a_scored_network_is_untouched():
    model = Net()
    model[0].weight.requires_grad_(False)
    model[1].eval()
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = -0.0
    with unchanged(model), evaluation_mode.preserve_state(model, train_mode=True):
        assert all(parameter.requires_grad for parameter in model.parameters())
        gradients.loss(model, torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 2, 0])).backward()
        assert model[1].running_mean.any() and torch.rand(1) is not None


def test_it_is_untouched_after_an_error_too():
    model = Net().eval()
    with unchanged(model), pytest.raises(RuntimeError, match="on the way"):
        redrawn = evaluation_mode.redrawn_linear(model, lambda name: torch.Generator())
        with evaluation_mode.preserve_state(model, train_mode=True), redrawn:
            model(torch.randn(4, 3, 6, 6))
            raise RuntimeError("on the way")


@pytest.mark.parametrize("train_mode", [True, False])
def test_only_batch_norm_is_in_training_mode(train_mode):
    model = Net().train(not train_mode)
    with evaluation_mode.preserve_state(model, train_mode=train_mode):
        modes = {type(module).__name__: module.training for module in model}
        assert modes["BatchNorm2d"] is train_mode and modes["Dropout"] is False
        images = torch.randn(4, 3, 6, 6)
        assert torch.equal(model(images), model(images))


def test_no_autocast_reaches_the_scores():
    model = Net()
    with torch.autocast("cpu", torch.bfloat16), evaluation_mode.preserve_state(model, train_mode=True):
        assert model(torch.randn(4, 3, 6, 6)).dtype == torch.float32


def test_linear_weights_are_drawn_anew_and_come_back():
    model = Net()
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn = []
    with unchanged(model):
        for _ in range(2):
            with evaluation_mode.redrawn_linear(model, lambda name: torch.Generator().manual_seed(len(name))):
                changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, own[name])}
                assert changed == {"8.weight", "11.weight"}
                drawn.append(model[8].weight.detach().clone())
    assert torch.equal(*drawn)


def test_redrawn_weights_have_xaviers_spread():
    model = nn.Sequential(nn.Linear(300, 200))
    with evaluation_mode.redrawn_linear(model, lambda name: torch.Generator().manual_seed(0)):
        assert float(model[0].weight.detach().std()) == pytest.approx((2 / 500) ** 0.5, rel=0.02)


# Derivatives


def flat_loss(model: nn.Module, names: list[str], images, labels, temperature: float):
    """Return the summed loss as a function of the named weights, flattened."""
    shapes = [model.get_parameter(name).shape for name in names]

    def value(vector: torch.Tensor) -> torch.Tensor:
        parts = vector.split([shape.numel() for shape in shapes])
        weights = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        logits = functional_call(model, weights, images) / temperature
        return nn.functional.cross_entropy(logits, labels, reduction="sum")

    return value


@pytest.mark.parametrize("per_batch", [False, True])
def test_hessian_gradient_equals_the_explicit_hessian_times_the_gradient(per_batch):
    """Two batches of unlike size: H g of the mean loss, or the mean of the batches' own H g."""
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
    images, labels = torch.randn(5, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    batches = [(images[:3], labels[:3]), (images[3:], labels[3:])]
    names = ["0.weight", "4.weight"]
    weights = [model.get_parameter(name) for name in names]
    start = torch.cat([weight.detach().flatten() for weight in weights])
    losses = [flat_loss(model, names, *batch, temperature=2.0) for batch in batches]
    slopes = [torch.autograd.functional.jacobian(loss, start) for loss in losses]
    curves = [hessian(loss, start) for loss in losses]
    if per_batch:
        expected = sum(curve @ slope / len(y) for curve, slope, (_, y) in zip(curves, slopes, batches, strict=True)) / 5
    else:
        expected = sum(curves) @ sum(slopes) / 25
    found = second_derivatives.hessian_gradient(
        model, weights, lambda: batches, num_images=5, temperature=2.0, per_batch=per_batch
    )
    assert torch.allclose(torch.cat([part.flatten() for part in found]), expected, rtol=1e-9, atol=1e-14)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, slope):
        return slope * 2


class Doubling(nn.Module):
    def forward(self, x):
        return Once.apply(x)


def test_a_module_without_second_derivative_is_named():
    model = Net()
    model[6] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.ReLU(inplace=True), Doubling())
    weights, data = [model[0].weight], noise_images()
    with unchanged(model), evaluation_mode.preserve_state(model, train_mode=True), pytest.raises(UserError) as caught:
        second_derivatives.hessian_gradient(
            model, weights, lambda: [(data.images, data.train_labels)], num_images=len(data.images)
        )
    assert "second derivatives, which 6.2 (Doubling) does not have" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hard_sigmoid_has_second_derivatives_while_scoring():
    """torch's own operator has none, and MobileNetV3 is full of them."""
    model = nn.Sequential(nn.Hardsigmoid(), nn.Hardsigmoid(inplace=True))
    x = torch.linspace(-5, 5, 401, dtype=torch.float64)
    expected = torch.nn.functional.hardsigmoid(torch.nn.functional.hardsigmoid(x))
    with unchanged(model), evaluation_mode.twice_differentiable(model):
        assert torch.allclose(model(x), expected, atol=1e-15)
        leaf = torch.tensor(0.5, requires_grad=True)
        (slope,) = torch.autograd.grad(model(leaf) ** 2, leaf, create_graph=True)
        assert float(torch.autograd.grad(slope, leaf)[0]) == pytest.approx(2 * (1 / 36) ** 2)


def test_a_loss_that_is_not_finite_ends_in_one_line():
    model = Net()
    with torch.no_grad():
        model[0].weight[0] = torch.nan
    with pytest.raises(UserError, match=r"loss of the scoring images is nan: look at"):
        gradients.loss(model, torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 2, 0]))


# Gradient norm


def test_gradient_norm_counts_kept_weights_of_eligible_layers():
    """Logits 0: dL/dw = (1/2 - [class]) x; x = (3, 4), class 0, weights [2, 2]: norm of (-1.5, -2, 1.5, 2)."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    nn.init.zeros_(model[1].weight)
    data = one_image()
    data.images = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    context = context_of(model, {}, image_size=1, channels=2)
    batch = [(data.images, data.train_labels)]
    weights = {layer.parameter: model.get_parameter(layer.parameter) for layer in context.eligible()}
    assert gradients.gradient_norm(model, weights, {}, batch, train_mode=True) == pytest.approx(12.5**0.5)
    assert gradients.gradient_norm(model, weights, {}, batch * 3, train_mode=True) == pytest.approx(12.5**0.5)
    context.install_masks({"1.weight": torch.tensor([[False, True], [False, False]])})
    masks = context.masks.masks
    assert gradients.gradient_norm(model, weights, masks, batch, train_mode=True) == pytest.approx(2)


# Memory


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["snip"], ["grasp", "low_memory=true"], ["grasp", "scoring_batch=32"]], ids=" ".join
)
def test_resnet50_is_scored_within_12_gigabytes(options):
    """64 images of 224 px on the CPU, in a process of its own."""
    command = [sys.executable, "-m", "tests.helpers.peak_memory", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1])
    print(f"peak {peak / 1e9:.2f} GB")
    assert peak < 12e9
