"""SNIP: the worked example, the gate gradient, what batches, batch norm and loss scale do to scores."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from prune_lab.pruning.scores import gradients
from tests.helpers.method_runs import make
from tests.helpers.score_phases import Images, Net, Row, noise_images, one_image, phase, unchanged, with_loss


def scores(model: nn.Module, data: Images | None = None, **options) -> dict[str, Tensor]:
    method = make("snip", **({"samples_per_class": 6} | options))
    return method.scores(phase(model, method, data))


@pytest.mark.parametrize(("sparsity", "kept"), [(0.6, [1]), (0.4, [0, 1])])
def test_worked_example(sparsity, kept, monkeypatch):
    """w = [1, -2, 0.5], x = [1, 1, 2], L = 0.5 (w.x - 1)^2: scores [1, 2, 1]; a tie goes to the lower index."""
    x = torch.tensor([1.0, 1.0, 2.0])
    with_loss(monkeypatch, lambda w: 0.5 * (w @ x - 1) ** 2)
    method = make("snip", sparsity=sparsity, samples_per_class=1)
    context = phase(Row(1.0, -2.0, 0.5), method, one_image())
    assert method.scores(context)["fc.weight"].tolist() == [[1, 2, 1]]
    assert method.choose(context)["fc.weight"].flatten().nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("bn_mode", ["train", "eval"])
def test_scores_are_gradients_of_gates(bn_mode):
    model, data = Net(), noise_images()
    found = scores(model, data, bn_mode=bn_mode)
    probe = Net()
    for module in probe:
        module.train(bn_mode == "train" and isinstance(module, nn.BatchNorm2d))
    gates = {name: torch.ones_like(score, requires_grad=True) for name, score in found.items()}
    gated = {name: gate * probe.get_parameter(name).detach() for name, gate in gates.items()}
    loss = F.cross_entropy(functional_call(probe, gated, data.images), data.train_labels)
    slopes = torch.autograd.grad(loss, list(gates.values()))
    assert len(found) == 4
    for score, slope in zip(found.values(), slopes, strict=True):
        assert float(slope.abs().max()) > 1e-4
        assert torch.allclose(score, slope.abs(), atol=1e-6, rtol=1e-4)


def test_the_scale_of_the_loss_does_not_matter(monkeypatch):
    method = make("snip", samples_per_class=6, sparsity=0.7)
    plain = method.choose(phase(Net(), method))
    original = gradients.loss
    monkeypatch.setattr(gradients, "loss", lambda *args, **options: 512 * original(*args, **options))
    scaled = method.choose(phase(Net(), method))
    assert all(torch.equal(scaled[name], mask) for name, mask in plain.items())


def test_batches_are_combined_before_or_after_the_absolute_value(monkeypatch):
    """Two batches of one image pull the two weights apart: w = (2, 1), gradients (3, 1) and (-3, 1) of each."""
    pulls = iter([torch.tensor([3.0, 1.0]), torch.tensor([-3.0, 1.0])] * 2)
    monkeypatch.setattr(
        gradients, "loss", lambda model, *batch, temperature=1.0: (model.fc.weight[0] * next(pulls)).sum()
    )
    data = Images(torch.zeros(2, 3, 6, 6), torch.zeros(2, dtype=torch.long), 1)
    options = {"samples_per_class": 2, "scoring_batch": 1}
    assert scores(Row(2.0, 1.0), data, combine="abs_of_sum", **options)["fc.weight"].tolist() == [[0, 1]]
    assert scores(Row(2.0, 1.0), data, combine="sum_of_abs", **options)["fc.weight"].tolist() == [[6, 1]]


def test_both_combinations_agree_on_a_single_batch():
    one, other = scores(Net(), combine="abs_of_sum"), scores(Net(), combine="sum_of_abs")
    assert all(torch.allclose(one[name], other[name], rtol=1e-6) for name in one)


def test_with_running_statistics_the_size_of_batches_does_not_matter():
    def difference(bn_mode: str) -> float:
        whole, parts = (scores(Net(), bn_mode=bn_mode, scoring_batch=size) for size in (18, 6))
        return max(float((whole[name] - parts[name]).abs().max()) for name in whole)

    assert difference("eval") < 1e-6 < 1e-3 < difference("train")


def test_augmented_images_give_other_scores_the_same_each_time():
    plain, one, again = (scores(Net(), augment_scoring=augment) for augment in (False, True, True))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.allclose(one[name], plain[name], rtol=1e-2) for name in one)


@pytest.mark.parametrize("name", ["snip", "grasp"])
def test_scoring_leaves_no_trace(name):
    model = Net()
    model[3].weight.requires_grad_(False)
    model[4].eval()
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
    method = make(name, samples_per_class=3)
    context = phase(model, method)
    with unchanged(model):
        found = method.scores(context)
        weights = {layer.parameter: model.get_parameter(layer.parameter) for layer in context.eligible()}
        assert gradients.gradient_norm(model, weights, {}, method.batches(context), train_mode=True) > 0
    assert set(found) == {"0.weight", "3.weight", "8.weight", "11.weight"} and found["3.weight"].any()


def test_cost_is_three_forward_passes_per_image():
    method = make("snip", samples_per_class=4)
    context = phase(Net(), method)
    assert method.phase_cost(context) == 3 * 12 * context.dense_macs
