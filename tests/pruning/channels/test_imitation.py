"""Greedy imitation on hand-computed layers, on random ones against brute force, and in a network."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_lab.pruning.channels import imitation
from prune_lab.pruning.channels.groups import channel_groups
from prune_lab.pruning.channels.probe import WeighedNetwork, fold, group_gram, read_columns

THREE = torch.tensor([[4.0, 0.0], [0.0, 4.0], [1.0, 1.0]], dtype=torch.float64)


def gram_of(outputs: Tensor) -> Tensor:
    """Return G of neurons whose outputs are the rows [neurons, coordinates], D being the mean over coordinates."""
    return outputs @ outputs.T / outputs.shape[1]


def take(additions, count: int) -> list[imitation.Addition]:
    return list(itertools.islice(additions, count))


def picks(additions: list[imitation.Addition]) -> list[int]:
    return [addition.index + 1 for addition in additions]


def errors(additions: list[imitation.Addition]) -> list[float]:
    return [addition.error for addition in additions]


# By hand: s1 = [4, 0], s2 = [0, 4], s3 = [1, 1], F = [5/3, 5/3]


def test_line_search_by_hand() -> None:
    found = take(imitation.line_search(gram_of(THREE)), 5)
    assert picks(found) == [3, 1, 2, 1, 2]
    assert errors(found) == pytest.approx([0.44444, 0.35556, 0.16235, 0.09738, 0.06531], abs=1e-5)
    assert [addition.step for addition in found] == pytest.approx([1, 2 / 15, 0.18113, 0.11286, 0.08175], abs=1e-5)
    assert found[1].weights.tolist() == pytest.approx([2 / 15, 0, 13 / 15])
    assert (found[1].weights @ THREE).tolist() == pytest.approx([1.4, 0.86667], abs=1e-5)
    assert found[2].weights.tolist() == pytest.approx([0.10918, 0.18113, 0.70969], abs=1e-5)


def test_fixed_steps_with_repetition_by_hand() -> None:
    found = take(imitation.fixed_step(gram_of(THREE), repeat=True), 6)
    assert picks(found) == [3, 3, 3, 1, 2, 3]
    assert errors(found) == pytest.approx([0.44444, 0.44444, 0.44444, 0.42361, 0.07111, 0.11111], abs=1e-5)


def test_fixed_steps_without_repetition_by_hand() -> None:
    """Two neurons are worse than one: the error does not always fall."""
    found = list(imitation.fixed_step(gram_of(THREE), repeat=False))
    assert picks(found) == [3, 1, 2]
    assert errors(found) == pytest.approx([0.44444, 1.02778, 0], abs=1e-5)


@pytest.mark.parametrize("rule", [imitation.line_search, lambda gram: imitation.fixed_step(gram, repeat=False)])
def test_first_neuron_is_the_nearest_one(rule) -> None:
    """Alone, the three are off by 4.1111, 4.1111 and 0.4444."""
    for order in ([0, 1, 2], [2, 0, 1]):
        (first,) = take(rule(gram_of(THREE[order])), 1)
        assert first.index == order.index(2) and first.error == pytest.approx(0.4444, abs=1e-4)


def test_refit_by_hand() -> None:
    """Scores (v_i)^2 / G_ii: 25/9 for the third and the others' 25/18; alone it takes a = 5/3 and leaves nothing."""
    (first,) = take(imitation.refit(gram_of(THREE)), 1)
    assert picks([first]) == [3] and first.step == pytest.approx(5 / 3) and first.error == pytest.approx(0, abs=1e-8)


def test_rescaled_weights_harm_where_outputs_do_not_mix() -> None:
    """Four equal channels in coordinates of their own: two at factor 2 err as much as none, at factor 1 half of it."""
    gram = torch.diag(torch.full((4,), 16.0, dtype=torch.float64))  # N^2 times |c|^2 = 1
    rescaled, refitted = take(imitation.fixed_step(gram, repeat=False), 2)[1], take(imitation.refit(gram), 2)[1]
    assert float(gram.mean()) == 4  # D(0) = v.1 / N
    assert (4 * rescaled.weights).tolist() == pytest.approx([2, 2, 0, 0]) and rescaled.error == pytest.approx(4)
    assert (4 * refitted.weights).tolist() == pytest.approx([1, 1, 0, 0]) and refitted.error == pytest.approx(2)


# Random layers


def random_layer(seed: int, *, size: int = 12, samples: int = 40, outputs: int = 3) -> Tensor:
    """Return s [neurons, samples * outputs]."""
    source = torch.Generator().manual_seed(seed)
    hidden = torch.randn(samples, size, generator=source, dtype=torch.float64).relu()
    weight = torch.randn(outputs, size, generator=source, dtype=torch.float64)
    return (size * hidden.T[:, :, None] * weight.T[:, None, :]).flatten(1)


def measured(outputs: Tensor, weights: Tensor) -> float:
    return float((outputs.mean(0) - weights @ outputs).square().mean())


@pytest.mark.parametrize("seed", range(3))
def test_line_search_against_brute_force(seed: int) -> None:
    outputs = random_layer(seed)
    found = take(imitation.line_search(gram_of(outputs)), 15)
    for before, after in itertools.pairwise(found):
        assert after.error <= before.error
        assert after.error == pytest.approx(measured(outputs, after.weights), rel=1e-9)
        assert float(after.weights.sum()) == pytest.approx(1) and bool((after.weights >= 0).all())
        grid = torch.linspace(0, 1, 101, dtype=torch.float64)
        for index in range(len(outputs)):
            unit = F.one_hot(torch.tensor(index), len(outputs)).double()
            tried = [measured(outputs, (1 - step) * before.weights + step * unit) for step in grid]
            assert after.error <= min(tried) + 1e-12


@pytest.mark.parametrize("repeat", [True, False])
def test_fixed_step_takes_the_best_of_each_step(repeat: bool) -> None:
    outputs = random_layer(3)
    before = torch.zeros(len(outputs), dtype=torch.float64)
    for number, found in enumerate(take(imitation.fixed_step(gram_of(outputs), repeat=repeat), 12), start=1):
        tried = [
            measured(outputs, (1 - 1 / number) * before + F.one_hot(torch.tensor(index), 12).double() / number)
            for index in range(12)
            if repeat or before[index] == 0
        ]
        assert found.error == pytest.approx(min(tried), rel=1e-9)
        before = found.weights
        used = before[before > 0]
        if repeat:
            assert torch.allclose(used * number, (used * number).round())
        else:
            assert torch.allclose(used, torch.full_like(used, 1 / number)) and len(used) == number


@pytest.mark.parametrize("seed", range(3))
def test_refit_leaves_a_residual_orthogonal_to_what_is_kept(seed: int) -> None:
    outputs = random_layer(seed)
    kept: list[int] = []
    for found in imitation.refit(gram_of(outputs)):
        kept.append(found.index)
        residual = outputs.mean(0) - found.weights @ outputs
        assert (outputs[kept] @ residual).abs().max() < 1e-6 * outputs.square().sum(1).mean()
        assert found.error == pytest.approx(measured(outputs, found.weights), abs=1e-9)
        assert set(found.weights.nonzero().flatten().tolist()) == set(kept)
        exact = torch.linalg.lstsq(outputs[kept].T, outputs.mean(0)[:, None]).solution[:, 0]
        assert torch.allclose(found.weights[kept], exact, atol=1e-6)
    assert sorted(kept) == list(range(12)) and found.error == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("rule", ["line_search", "refit", "fixed_step"])
def test_permuted_neurons_give_permuted_choices(rule: str) -> None:
    options = {"repeat": False} if rule == "fixed_step" else {}
    outputs, order = random_layer(7), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    plain = take(getattr(imitation, rule)(gram_of(outputs), **options), 8)
    permuted = take(getattr(imitation, rule)(gram_of(outputs[order]), **options), 8)
    assert [int(order[addition.index]) for addition in permuted] == [addition.index for addition in plain]


def test_a_duplicate_has_the_effect_of_the_same_neuron_again() -> None:
    outputs = torch.cat([random_layer(1), random_layer(1)[:1]])
    target, gram = gram_of(outputs).mean(1), gram_of(outputs)
    weights = F.one_hot(torch.tensor(3), 13).double() * 0.5 + F.one_hot(torch.tensor(5), 13).double() * 0.5
    steps, gains = imitation.line_steps(gram.diagonal(), target, gram @ weights, weights)
    assert steps[0] == pytest.approx(float(steps[12])) and gains[0] == pytest.approx(float(gains[12]))


def test_the_neuron_the_layer_stands_on_gets_no_step() -> None:
    gram = gram_of(random_layer(2))
    weights = F.one_hot(torch.tensor(4), 12).double()
    steps, gains = imitation.line_steps(gram.diagonal(), gram.mean(1), gram @ weights, weights)
    assert steps[4] == 0 and gains[4] == 0 and bool(torch.isfinite(gains).all())


def test_neurons_without_output_come_last_and_break_nothing() -> None:
    outputs = random_layer(4)
    outputs[[0, 5]] = 0
    order = [addition.index for addition in imitation.refit(gram_of(outputs))]
    assert set(order[-2:]) == {0, 5}
    for dead in (imitation.refit, imitation.line_search):
        found = take(dead(torch.zeros(3, 3, dtype=torch.float64)), 3)
        assert all(bool(torch.isfinite(addition.weights).all()) for addition in found)


def test_dependent_neurons_stay_solvable() -> None:
    outputs = random_layer(6)[:3].repeat(4, 1)
    last = list(imitation.refit(gram_of(outputs)))[-1]
    assert last.error == pytest.approx(0, abs=1e-6 * float(outputs.square().mean()))


def test_order_and_level_of_the_rules_on_random_features() -> None:
    """256 random ReLU features, 2000 samples: error over the variance of the output, mean of three seeds.

    An independent draw of the same kind gave, at 8, 16 and 32 neurons, line search .435 .306 .223, refit .388 .270 .160
    and single uniform weights .638 .575 .490.
    """
    rules = {
        "line": imitation.line_search,
        "refit": imitation.refit,
        "uniform": lambda gram: imitation.fixed_step(gram, repeat=False),
    }
    mean = {rule: dict.fromkeys((8, 16, 32), 0.0) for rule in rules}
    for seed in range(3):
        source = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=source, dtype=torch.float64)  # noqa: B023, E731
        hidden, weight = (draw(2000, 20) @ draw(20, 256) / 20**0.5).relu(), draw(1, 256) / 256
        gram = imitation.gram(hidden, weight, 256)
        variance = float((hidden @ weight.T).var())
        for rule, additions in rules.items():
            for kept, weights in imitation.growing(additions(gram), patience=1000):
                if len(kept) in mean[rule]:
                    value = gram.mean() - 2 * weights @ gram.mean(1) + weights @ gram @ weights
                    mean[rule][len(kept)] += float(value) / variance / 3
                if len(kept) == 32:
                    break
    for count in (8, 16, 32):
        assert mean["refit"][count] < mean["line"][count] < mean["uniform"][count]
    levels = {"line": (0.435, 0.306, 0.223), "refit": (0.388, 0.27, 0.16), "uniform": (0.638, 0.575, 0.49)}
    for rule, wanted in levels.items():
        assert list(mean[rule].values()) == pytest.approx(wanted, rel=0.4), rule


# Gram matrices of layers


def contributions(layer: nn.Module, inputs: Tensor, size: int) -> Tensor:
    """Return N times what each channel adds to the layer's output: [channels, ...], the slow way."""
    bare = copy.deepcopy(layer).double()
    bare.bias = None
    span = inputs.shape[1] // size
    parts = []
    for channel in range(size):
        only = torch.zeros_like(inputs)
        only[:, channel * span : (channel + 1) * span] = inputs[:, channel * span : (channel + 1) * span]
        parts.append(size * bare(only))
    return torch.stack(parts).detach()


LAYERS = {
    "1x1": (nn.Conv2d(6, 5, 1), (4, 6, 5, 5), 6),
    "3x3": (nn.Conv2d(6, 5, 3, padding=1), (4, 6, 5, 5), 6),
    "strided, dilated": (nn.Conv2d(6, 5, 3, stride=2, padding=2, dilation=2), (4, 6, 7, 7), 6),
    "uneven": (nn.Conv2d(6, 5, (1, 3), padding="same", padding_mode="reflect"), (4, 6, 5, 5), 6),
    "linear": (nn.Linear(6, 5), (9, 6), 6),
    "linear behind a flatten": (nn.Linear(6 * 4, 5), (9, 24), 6),
}


@pytest.mark.parametrize("case", LAYERS)
def test_gram_of_a_layer_equals_all_pairs_of_contributions(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, shape, size = LAYERS[case]
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    read = read_columns(layer, inputs, num_positions=10**6, generator=torch.Generator())
    slow = contributions(layer, inputs, size)
    per_sample = slow.transpose(1, 2).flatten(2) if slow.dim() == 3 else slow.movedim(2, -1).flatten(1, 3)
    samples = len(read)
    slow_gram = per_sample.flatten(1) @ per_sample.flatten(1).T / samples
    fast = imitation.gram(read, layer.weight.detach().flatten(1), size)
    assert torch.allclose(fast, slow_gram, rtol=1e-10, atol=1e-10)
    monkeypatch.setattr(imitation, "_BLOCK", 8)
    assert torch.allclose(imitation.gram(read, layer.weight.detach().flatten(1), size), fast, rtol=1e-12)


@pytest.mark.parametrize("case", LAYERS)
def test_columns_read_give_outputs_of_the_layer(case: str) -> None:
    layer, shape, _ = LAYERS[case]
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    some = read_columns(layer, inputs, num_positions=3, generator=torch.Generator().manual_seed(1))
    bare = copy.deepcopy(layer)
    bare.bias = None
    whole = bare(inputs).detach()
    whole = whole if whole.dim() == 2 else whole.flatten(2).movedim(1, 2).flatten(0, 1)
    made = some @ layer.weight.detach().flatten(1).T
    for row in made:
        assert (whole - row).abs().amax(1).min() < 1e-5


# In a network


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 7, 3, padding=1), nn.BatchNorm2d(7)
        self.depthwise = nn.Conv2d(7, 7, 3, padding=1, groups=7)
        self.second, self.head = nn.Conv2d(7, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.depthwise(self.norm(self.first(x)).relu()).relu()).relu().mean((2, 3)))


def batch() -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(3)
    return torch.randn(8, 3, 6, 6, generator=source), torch.arange(8) % 3


def test_group_gram_predicts_the_error_of_the_folded_network() -> None:
    model = Small().eval()
    group, images = channel_groups(model, 6)[0], batch()[0]
    gram = group_gram(model, group, [(images[:5], None), (images[5:], None)], num_positions=36,
                      generator=torch.Generator())  # fmt: skip
    seen: list[Tensor] = []
    model.second.register_forward_hook(lambda module, args, output: seen.append(output))
    model(images)
    *_, (kept, weights) = itertools.islice(imitation.growing(imitation.refit(gram), patience=1), 3)
    mask = torch.zeros(7, dtype=torch.bool)
    mask[kept] = True
    fold(model, group, mask, 7 * weights)
    model(images)
    real = (seen[1] - seen[0]).detach().square().sum(1).mean()
    predicted = gram.mean() - 2 * weights @ gram.mean(1) + weights @ gram @ weights
    assert float(real) == pytest.approx(float(predicted), rel=1e-4)
    assert int(mask.sum()) == 3 and not model.first.weight[~mask].any() and not model.second.weight[:, ~mask].any()
    assert not model.depthwise.weight[~mask].any()


def test_weighed_network_equals_the_folded_one_and_leaves_no_trace() -> None:
    model, (images, _) = Small().eval(), batch()
    group, plain = channel_groups(model, 6)[0], model(images)
    weights = torch.tensor([0.5, 0, 0.2, 0, 0.3, 0, 0], dtype=torch.float64)
    with WeighedNetwork(model, group) as network, torch.no_grad():
        assert torch.equal(network.logits(images, None), plain)
        weighed = network.logits(images, weights)
    assert torch.equal(model(images), plain)
    fold(model, group, weights > 0, 7 * weights)
    assert torch.allclose(model(images), weighed, atol=1e-6)


@pytest.mark.parametrize("objective", ["cross_entropy", "output_distance"])
def test_slopes_are_the_derivatives_of_the_loss(objective: str) -> None:
    model, data = Small().eval().double(), batch()
    group = channel_groups(model, 6)[0]
    weights = torch.tensor([0.5, 0, 0.2, 0, 0.3, 0, 0], dtype=torch.float64)
    with WeighedNetwork(model, group, objective=objective) as network, torch.no_grad():
        network.see(data[0].double(), data[1])
        slopes = network.slopes(weights)
        for index in range(7):
            step = 1e-2 * F.one_hot(torch.tensor(index), 7)
            numeric = (network.loss(weights + step) - network.loss(weights - step)) / 2e-2
            assert float(slopes[index]) == pytest.approx(numeric, rel=2e-2, abs=2e-3)
        passes = 2 + 14 + (objective == "output_distance")
        assert network.num_images == 8 * passes


def test_uniform_weights_give_the_network_itself() -> None:
    model, (images, _) = Small().eval(), batch()
    group = channel_groups(model, 6)[0]
    with WeighedNetwork(model, group) as network, torch.no_grad():
        uniform = network.logits(images, torch.full((7,), 1 / 7, dtype=torch.float64))
    assert torch.allclose(uniform, model(images), atol=1e-6)


# Global imitation


def toy_loss(weights: Tensor) -> float:
    return measured(THREE, weights)


def everyone(weights: Tensor, allowed: Tensor) -> list[int]:
    return allowed.nonzero().flatten().tolist()


def test_descent_on_the_layer_error_is_local_imitation() -> None:
    for repeat, count in ((True, 6), (False, 3)):
        ours = take(imitation.descend(3, toy_loss, everyone, repeat=repeat), count)
        local = take(imitation.fixed_step(gram_of(THREE), repeat=repeat), count)
        assert picks(ours) == picks(local)
        assert errors(ours) == pytest.approx(errors(local))


def test_step_search_is_no_worse_than_the_fixed_step_it_starts_from() -> None:
    found = take(imitation.descend(3, toy_loss, everyone, repeat=True, search=True), 6)
    before = found[0]
    for number, addition in enumerate(found[1:], start=2):
        fixed = (1 - 1 / number) * before.weights
        fixed[addition.index] += 1 / number
        assert addition.error <= toy_loss(fixed)
        assert 0 < addition.step < 1 and float(addition.weights.sum()) == pytest.approx(1)
        before = addition


def test_only_the_shortlist_is_tried() -> None:
    tried: list[int] = []

    def loss(weights: Tensor) -> float:
        tried.append(int(weights.argmax()))
        return 0.0

    (first,) = take(imitation.descend(5, loss, lambda weights, allowed: [4, 2], repeat=False), 1)
    assert tried == [4, 2] and first.index == 4  # the first of equals


def test_growing_counts_neurons_and_not_additions() -> None:
    grown = list(itertools.islice(imitation.growing(imitation.line_search(gram_of(THREE)), patience=99), 3))
    assert [kept for kept, _ in grown] == [[2], [2, 0], [2, 0, 1]]
    assert list(imitation.growing(imitation.fixed_step(gram_of(THREE), repeat=True), patience=2))[-1][0] == [2]
    assert math.isclose(float(grown[1][1][0]), 2 / 15)
