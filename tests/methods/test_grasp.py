"""GraSP: the worked examples and the sign, what its options change, the identities that the scores obey."""

from __future__ import annotations

import contextlib
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from prune_lab import models
from prune_lab.compose.overrides import compose_checked
from prune_lab.foundations.errors import UserError
from prune_lab.pruning.scores import evaluation_mode, gradients, recompute
from tests.helpers.method_runs import CONF, make
from tests.helpers.score_phases import Images, Net, Row, noise_images, one_image, phase, unchanged, with_loss
from tests.pruning.scores.test_gradients import Doubling


def scores(model: nn.Module, data: Images | None = None, **options) -> dict[str, Tensor]:
    method = make("grasp", **({"samples_per_class": 6} | options))
    return method.scores(phase(model, method, data))


def kept_share(one: dict[str, Tensor], other: dict[str, Tensor], density: float = 0.3) -> float:
    """Return the overlap of the best weights by two scores."""
    flat = [torch.cat([score.flatten() for score in scores.values()]) for scores in (one, other)]
    count = round(density * len(flat[0]))
    best = [set(scores.topk(count).indices.tolist()) for scores in flat]
    return len(best[0] & best[1]) / count


# Sign and worked examples

A, B = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([1.0, 0.0])
EXAMPLES = {
    # 0.5 w'Aw - b'w at [1, -1]: Hg = [-2, -6], S = [2, -6]; |g|^2 is 4, without weight 1 13, without weight 2 2
    "quadratic": ((1.0, -1.0), lambda w: 0.5 * w @ A @ w - B @ w, [2, -6], 1),
    # 0.5 (w2 w1 x - y)^2, x = 1, y = 3, at [2, 0.5]: Hg = [3.75, -15], S = [-7.5, 7.5]
    "product": ((2.0, 0.5), lambda w: 0.5 * (w[1] * w[0] - 3) ** 2, [-7.5, 7.5], 0),
}


@pytest.mark.parametrize("hvp_mode", ["sum", "per_batch"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_examples(name, hvp_mode, monkeypatch):
    weights, formula, published, kept = EXAMPLES[name]
    with_loss(monkeypatch, formula)
    method = make("grasp", sparsity=0.5, samples_per_class=1, hvp_mode=hvp_mode)
    context = phase(Row(*weights), method, one_image())
    assert (-method.scores(context)["fc.weight"]).tolist() == [published]
    assert method.choose(context)["fc.weight"].flatten().nonzero().flatten().tolist() == [kept]


def test_ten_ranked_weights_leave_exactly_two():
    """S = [5 ... -4], sparsity 0.8: the last two stay (the official threshold keeps three)."""
    method = make("grasp", sparsity=0.8, samples_per_class=1)
    context = phase(Row(*range(1, 11)), method, one_image())
    published = torch.tensor([[5.0, 4, 3, 2, 1, 0, -1, -2, -3, -4]])
    mask = method.select(context, {"fc.weight": -published}, 0.8)["fc.weight"]
    assert mask.flatten().nonzero().flatten().tolist() == [8, 9]


def test_scores_are_the_slope_of_the_gradient_norm():
    """S_q = d|g|^2 / 2 when weight q moves towards zero, measured by moving it."""
    model, data = Net().double(), noise_images()
    data.images = data.images.double()
    found = scores(model, data, temperature=1.0)
    probe = Net().double()
    for module in probe:
        module.train(isinstance(module, nn.BatchNorm2d))
    names = list(found)

    def squared_norm(name: str, index: int, factor: float) -> float:
        weights = {key: probe.get_parameter(key).detach().clone() for key in names}
        weights[name].view(-1)[index] *= factor
        leaves = {key: weight.requires_grad_() for key, weight in weights.items()}
        loss = F.cross_entropy(functional_call(probe, leaves, data.images), data.train_labels)
        return float(sum(slope.square().sum() for slope in torch.autograd.grad(loss, list(leaves.values()))))

    for name, index in [("0.weight", 5), ("3.weight", 17), ("8.weight", 3), ("11.weight", 4)]:
        slope = (squared_norm(name, index, 1 - 1e-5) - squared_norm(name, index, 1 + 1e-5)) / 2e-5
        assert -float(found[name].flatten()[index]) == pytest.approx(slope / 2, rel=1e-4, abs=1e-9)


# Identities


def test_scores_of_a_normalised_filter_sum_to_its_squared_gradient():
    """Its scale does not matter, so H w_f = -g_f on the block and S sums to |g_f|^2: a wrong sign fails at once."""
    model, data = Net(eps=1e-12).double(), noise_images()
    data.images = data.images.double()
    found = scores(model, data, temperature=1.0)
    for module in model:
        module.train(isinstance(module, nn.BatchNorm2d))
    weights = [model[0].weight, model[3].weight]
    slopes = torch.autograd.grad(F.cross_entropy(model(data.images), data.train_labels), weights)
    for name, weight, slope in zip(("0.weight", "3.weight"), weights, slopes, strict=True):
        assert float((weight.detach() * slope).flatten(1).sum(1).abs().max()) < 1e-10
        squared = slope.flatten(1).square().sum(1)
        assert torch.allclose(-found[name].flatten(1).sum(1), squared, rtol=1e-6), name


def test_the_sum_over_a_normalised_filter_falls_with_its_squared_scale():
    model = Net(eps=1e-12).double()
    data = noise_images()
    data.images = data.images.double()
    before = scores(model, data)["0.weight"][2].sum()
    with torch.no_grad():
        model[0].weight[2] *= 3
    assert float(scores(model, data)["0.weight"][2].sum() / before) == pytest.approx(1 / 9, rel=1e-6)


def test_scores_fall_with_the_squared_temperature_and_the_ranking_stays():
    cool, warm, hot = (scores(Net(), temperature=value) for value in (1.0, 200.0, 400.0))
    ratio = torch.cat([(warm[name] / hot[name]).flatten() for name in warm]).median()
    assert float(ratio) == pytest.approx(4, rel=0.01)
    assert kept_share(warm, hot) > 0.98 > kept_share(cool, hot)


def test_single_precision_keeps_what_double_precision_keeps():
    data, exact = noise_images(), noise_images()
    exact.images = exact.images.double()
    method = make("grasp", samples_per_class=6, sparsity=0.7)
    single = method.choose(phase(Net(), method, data))
    double = method.choose(phase(Net().double(), method, exact))
    assert all(torch.equal(single[name], mask) for name, mask in double.items())


# Options


def test_sum_with_running_statistics_does_not_depend_on_how_batches_are_cut():
    options = {"bn_mode": "eval", "temperature": 1.0}
    whole = scores(Net(), **options)
    parts = scores(Net(), scoring_batch=5, **options)
    assert all(torch.allclose(whole[name], parts[name], rtol=1e-3, atol=1e-7) for name in whole)
    each = scores(Net(), scoring_batch=5, hvp_mode="per_batch", **options)
    assert not any(torch.allclose(whole[name], each[name], rtol=1e-2) for name in whole)


def test_one_batch_has_one_product():
    whole, each = scores(Net()), scores(Net(), hvp_mode="per_batch")
    assert all(torch.allclose(whole[name], each[name], rtol=1e-4, atol=1e-12) for name in whole)


def test_sorted_classes_are_another_ranking_under_batch_statistics():
    """Halves by class hide from batch norm what tells classes apart; stratified halves are near the whole."""
    data = noise_images(per_class=8)
    whole = scores(Net(), data, samples_per_class=8)
    near, far = (
        kept_share(whole, scores(Net(), data, samples_per_class=8, scoring_batch=12, split=split))
        for split in ("stratified", "class_sorted")
    )
    assert near > far


def test_batch_norm_mode_matters():
    assert kept_share(scores(Net()), scores(Net(), bn_mode="eval")) < 0.9


def test_every_round_adds_other_images():
    data = noise_images()
    method = make("grasp", samples_per_class=2, rounds=3, bn_mode="eval")
    found = method.scores(phase(Net(), method, data))
    assert sorted(torch.cat(data.seen).tolist()) == sorted([*range(18)] * 2)  # for the gradient and for the product
    assert [batch.tolist() for batch in data.seen[:3]] == [batch.tolist() for batch in data.seen[3:]]
    once = scores(Net(), bn_mode="eval")
    assert all(torch.allclose(found[name], once[name], rtol=1e-3, atol=1e-12) for name in once)


def test_augmented_images_give_other_scores_the_same_each_time():
    plain, one, again = (scores(Net(), augment_scoring=augment) for augment in (False, True, True))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert kept_share(plain, one) < 1


def test_linear_weights_are_drawn_anew_for_scores_only():
    model = Net()
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with unchanged(model):
        found, again = (scores(model, reinit_linear=True) for _ in range(2))
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert not torch.allclose(found["11.weight"], scores(model)["11.weight"], rtol=0.1)
    method = make("grasp", samples_per_class=3, reinit_linear=True, sparsity=0.5)
    method.prune(context := phase(model, method))
    for name, mask in context.masks.masks.items():
        assert torch.equal(model.get_parameter(name).detach(), own[name] * mask)


def test_cost_by_the_rule_of_twice_what_a_pass_runs_back_through():
    for options, passes in (({}, 12), ({"hvp_mode": "per_batch"}, 9), ({"rounds": 3}, 36)):
        method = make("grasp", samples_per_class=2, **options)
        context = phase(Net(), method)
        assert method.phase_cost(context) == passes * 6 * context.dense_macs


# Less memory


class Residual(nn.Module):
    """A block that works in place on its input first and needs it twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x, inplace=True)
        return x + self.second(torch.tanh(self.first(self.norm(x))))


def residual_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Sequential(Residual(4), Residual(4)), nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"hvp_mode": "per_batch", "scoring_batch": 6}, {"bn_mode": "eval"}])
def test_computing_again_gives_the_same_scores(options):
    model, data = residual_net().double(), noise_images()
    data.images = data.images.double()
    assert recompute.find_blocks(model) == [*model[2]]
    plain = scores(model, data, temperature=2.0, **options)
    with unchanged(model):
        again = scores(model, data, temperature=2.0, low_memory=True, **options)
    for name, score in plain.items():
        assert score.any() and torch.allclose(score, again[name], rtol=1e-9, atol=1e-15), name


def test_blocks_store_their_input_only():
    """In the graphs of both derivatives: of a block no more than its input and the gradient of its output."""
    model, data = residual_net(), noise_images()
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def stored(part: contextlib.AbstractContextManager) -> int:
        """Return how many activations are held."""
        held: weakref.WeakSet[Held] = weakref.WeakSet()

        def pack(tensor: Tensor) -> Held:
            held.add(box := Held(tensor))
            return box

        with evaluation_mode.preserve_state(model, train_mode=True), part:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
                loss = gradients.loss(model, data.images, data.train_labels)
                slopes = torch.autograd.grad(loss, weights, create_graph=True)
            shape = (len(data.images), 4, 4, 4)
            found = {box.tensor.data_ptr() for box in held if box.tensor.shape == shape}
            del slopes
        return len(found)

    assert stored(recompute.blocks(model, weights)) < 0.6 * stored(contextlib.nullcontext())


def test_repeated_passes_are_counted():
    """Two blocks of two convolutions on 4 x 4 positions: 2 x (4 x 4 x 9 + 4 x 4) x 16 MACs, four times."""
    model = residual_net()
    plain, low = (make("grasp", samples_per_class=2, low_memory=value) for value in (False, True))
    context = phase(model, plain)
    assert low.phase_cost(context) - plain.phase_cost(context) == 6 * 4 * 2 * (4 * 4 * 9 + 4 * 4) * 16


@pytest.mark.parametrize(
    ("family", "count"), [("resnet20", 9), ("resnet50", 16), ("wrn_16_8", 6), ("mobilenet_v2", 17), ("vgg16", 0)]
)
def test_blocks_of_the_model_families(family, count):
    (config,) = compose_checked(CONF, [f"model={family}"], sweep=False)
    with torch.device("meta"):
        model = models.build(config.model, num_classes=10, image_size=32)
    assert len(recompute.find_blocks(model)) == count


# Bad input


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(value):
    with pytest.raises(UserError, match="method.temperature"):
        make("grasp", temperature=value)


def test_more_rounds_than_images_are_refused_at_set_up():
    method = make("grasp", samples_per_class=2, rounds=4)
    with pytest.raises(UserError, match="=2 x method.rounds=4 exceeds the 6 training images of class 0"):
        method.setup(phase(Net(), method))


def test_weights_that_are_not_finite_end_in_one_line():
    model = Net()
    with torch.no_grad():
        model[11].weight[0, 0] = torch.inf
    with pytest.raises(UserError, match="loss of the scoring images is"):
        scores(model)


def test_a_score_that_is_not_finite_names_its_layer():
    method = make("grasp", samples_per_class=1)
    context = phase(Row(1.0, 2.0), method, one_image())
    with pytest.raises(UserError, match=r"scores of fc.weight are infinite or NaN \(1 of 1 layers\)"):
        method.select(context, {"fc.weight": torch.tensor([[1.0, torch.nan]])}, 0.5)


def test_a_module_without_second_derivative_is_named_and_all_is_as_before():
    model = Net()
    model[9] = Doubling()
    with unchanged(model), pytest.raises(UserError, match=r"which 9 \(Doubling\) does not have"):
        scores(model)
