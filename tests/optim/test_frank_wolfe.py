"""Frank-Wolfe inner loop and the oracles: hand examples of the note, and what must hold for any gradients."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from prune_lab.optim import oracles
from prune_lab.optim.frank_wolfe import FrankWolfe

SHAPES = ((3, 4), (5,), ())


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def draws(count: int, seed: int = 1) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(count)]


def step(optimizer: FrankWolfe, gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """Do one call and return copies of the weights after it."""
    weights = optimizer.param_groups[0]["params"]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = None if gradient is None else gradient.clone()
    optimizer.step()
    return [weight.detach().clone() for weight in weights]


def points(steps: int, gradients: Sequence[Sequence[float]], point: str = "official") -> tuple[list[Tensor], Tensor]:
    """Return the weights after each call, from p = (1, 0) with radius 0.1 and outer SGD of lr 1, and the gradient."""
    weight = nn.Parameter(torch.tensor([1.0, 0.0], dtype=torch.float64))
    optimizer = FrankWolfe(torch.optim.SGD([weight], lr=1.0), radius=0.1, steps=steps, point=point)
    found = [step(optimizer, [torch.tensor(g, dtype=torch.float64)])[0] for g in gradients]
    return found, weight.grad


def close(found: Tensor, wanted: Sequence[float]) -> bool:
    return torch.allclose(found, torch.tensor(wanted, dtype=found.dtype), atol=1e-6)


def test_two_inner_steps_by_hand():
    found, handed = points(2, [(3, 4), (0, 2)])
    assert close(found[0], (0.94, -0.08)) and close(handed, (0.3, 0.9)) and close(found[1], (0.7, -0.9))


def test_three_inner_steps_by_hand_and_where_the_ball_would_be():
    found, handed = points(3, [(3, 4), (0, 2), (1, 0)])
    assert close(found[0], (0.94, -0.08)) and close(found[1], (0.91, -0.17)) and close(handed, (1.6 / 3, 0.6))
    within, same = points(3, [(3, 4), (0, 2), (1, 0)], "ball")
    assert close(within[0], (0.94, -0.08)) and close(within[1], (0.97, -0.09)) and torch.equal(same, handed)


@pytest.mark.parametrize("point", ["official", "ball"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_gradient_is_the_mean_of_unit_gradients_and_the_start_comes_back(steps, point):
    weights, batches = parameters(), draws(2 * steps)
    before = [weight.detach().clone() for weight in weights]
    optimizer = FrankWolfe(torch.optim.SGD(weights, lr=0.0), radius=1e-2, steps=steps, point=point)
    for first in (0, steps):
        group = batches[first:first + steps]
        for gradients in group:
            after = step(optimizer, gradients)
        assert all(map(torch.equal, after, before))  # the outer step has lr 0
        for index, weight in enumerate(weights):
            mean = torch.stack([gradients[index] / gradients[index].norm() for gradients in group]).mean(0)
            torch.testing.assert_close(weight.grad, mean)
            assert weight.grad.norm() <= 1 + 1e-6


def test_parallel_gradients_give_norm_one_and_scaling_changes_nothing():
    weights = parameters()
    optimizer = FrankWolfe(torch.optim.SGD(weights, lr=0.1, momentum=0.9), radius=1e-3, steps=3)
    other = FrankWolfe(torch.optim.SGD(parameters(), lr=0.1, momentum=0.9), radius=1e-3, steps=3)
    (gradients,) = draws(1)
    for factor in (1, 4, 1024):
        scaled = step(other, [factor * gradient for gradient in gradients])
        assert all(map(torch.equal, step(optimizer, [gradient.clone() for gradient in gradients]), scaled))
    assert all(abs(float(weight.grad.norm()) - 1) < 1e-6 for weight in weights)


def test_one_inner_step_is_sgd_with_normalised_gradients():
    weights, plain = parameters(), parameters()
    optimizer = FrankWolfe(torch.optim.SGD(weights, lr=0.1, momentum=0.9), radius=0.5, steps=1)
    reference = torch.optim.SGD(plain, lr=0.1, momentum=0.9)
    for gradients in draws(4):
        step(optimizer, gradients)
        for weight, gradient in zip(plain, gradients, strict=True):
            weight.grad = gradient / gradient.norm()
        reference.step()
    for weight, wanted in zip(weights, plain, strict=True):
        torch.testing.assert_close(weight, wanted)


def test_a_gradient_of_zeros_and_one_that_is_missing_move_nothing():
    weights = parameters()
    before = [weight.detach().clone() for weight in weights]
    optimizer = FrankWolfe(torch.optim.SGD(weights, lr=1.0), radius=0.1, steps=2)
    for _ in range(2):
        after = step(optimizer, [torch.zeros(SHAPES[0]), None, torch.ones(())])
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1]) and weights[1].grad is None
    assert close(after[2], float(before[2]) - 1)


def test_entries_without_gradient_stay_where_they_are():
    weights = [nn.Parameter(torch.tensor([0.0, 2.0, 0.0, -1.0]))]
    optimizer = FrankWolfe(torch.optim.SGD(weights, lr=0.3), radius=0.1, steps=3)
    for gradient in torch.randn(7, 4, generator=torch.Generator().manual_seed(0)):
        (after,) = step(optimizer, [gradient * torch.tensor([0.0, 1.0, 0.0, 1.0])])
        assert after[0] == after[2] == 0 and after[1] != 2


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_state_within_an_inner_loop_resumes_bit_for_bit(kind, stop):
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    whole, batches = parameters(), draws(8)
    optimizer = FrankWolfe(kind(whole, lr=0.1, **options), radius=0.1, steps=3)
    for gradients in batches[:stop]:
        step(optimizer, gradients)
    weights = [nn.Parameter(weight.detach().clone()) for weight in whole]
    resumed = FrankWolfe(kind(weights, lr=0.0, **options), radius=0.1, steps=3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for gradients in batches[stop:]:
        assert all(map(torch.equal, step(optimizer, gradients), step(resumed, gradients)))


def test_the_learning_rate_is_the_outer_optimizer_s():
    weights = parameters()
    before = weights[0].detach().clone()
    optimizer = FrankWolfe(torch.optim.SGD(weights, lr=0.0), radius=0.1, steps=1)
    optimizer.param_groups[0]["lr"] = 0.5
    step(optimizer, draws(1)[0])
    assert torch.allclose((weights[0] - before).norm(), torch.tensor(0.5))


def test_leaving_the_inner_loop_restores_the_start():
    weights = parameters()
    before = [weight.detach().clone() for weight in weights]
    optimizer = FrankWolfe(torch.optim.SGD(weights, lr=1.0), radius=0.1, steps=3)
    assert not all(map(torch.equal, step(optimizer, draws(1)[0]), before))
    optimizer.leave_inner_loop()
    assert all(map(torch.equal, weights, before)) and optimizer.calls == 0


@pytest.mark.parametrize(("radius", "steps"), [(0, 1), (-1, 1), (float("nan"), 1), (0.1, 0)])
def test_numbers_out_of_range_are_refused(radius, steps):
    with pytest.raises(ValueError, match="radius must be above 0 and steps 1 or more"):
        FrankWolfe(torch.optim.SGD(parameters(), lr=0.1), radius=radius, steps=steps)


@pytest.mark.parametrize(("oracle", "wanted"), [
    (lambda g: oracles.l2_ball(g, 2), (-1.171, 1.5614, -0.3904, -0.1952)),
    (lambda g: oracles.box(g, 2), (-2, 2, -2, -2)),
    (lambda g: oracles.k_sparse(g, 2, 2), (-2, 2, 0, 0)),
    (lambda g: oracles.k_support(g, 2, 2), (-1.2, 1.6, 0, 0)),
])  # fmt: skip
def test_oracles_by_hand(oracle, wanted):
    gradient = torch.tensor([3, -4, 1, 0.5])
    assert torch.allclose(oracle(gradient), torch.tensor(wanted, dtype=torch.float32), atol=1e-4)
    assert torch.equal(oracle(gradient.view(2, 2)), oracle(gradient).view(2, 2))
    assert not oracle(torch.zeros(4)).any()


def test_no_point_of_the_set_is_better_than_the_oracle_s():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        gradient, inside = torch.randn(6, generator=generator), torch.randn(6, generator=generator)
        sparse = torch.randn(6, generator=generator)
        sparse[torch.randperm(6, generator=generator)[:3]] = 0
        candidates = {
            oracles.l2_ball(gradient, 1.5): 1.5 * inside / inside.norm(),
            oracles.box(gradient, 1.5): (1.5 * inside).clamp(-1.5, 1.5),
            oracles.k_sparse(gradient, 1.5, 3): 1.5 * sparse.sign(),
            oracles.k_support(gradient, 1.5, 3): 1.5 * sparse / sparse.norm(),
        }
        assert all(gradient @ best <= gradient @ other + 1e-5 for best, other in candidates.items())


@pytest.mark.parametrize("k", [0, 5])
def test_more_entries_than_there_are_is_refused(k):
    with pytest.raises(ValueError, match=r"k must lie in \[1, 4\]"):
        oracles.k_sparse(torch.ones(4), 1, k)
