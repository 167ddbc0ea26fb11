"""When masks change and by how much, against the published formulas."""

from __future__ import annotations

import pytest

from prune_lab.pruning.masks.sparsity_schedules import cubic_sparsity, drop_fraction, update_steps

RIGL = {"alpha": 0.3, "begin": 0, "end": 25_000}


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.3), (2_500, 0.292658), (6_250, 0.256066), (12_500, 0.15), (18_750, 0.043934), (25_000, 0.0)],
)
def test_cosine_of_the_rigl_example(step, expected):
    assert drop_fraction(step, **RIGL, shape="cosine") == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize(("shape", "expected"), [("linear", 0.15), ("cubic", 0.0375), ("constant", 0.3)])
def test_other_shapes_half_way(shape, expected):
    assert drop_fraction(12_500, **RIGL, shape=shape) == pytest.approx(expected)


@pytest.mark.parametrize("shape", ["cosine", "linear", "cubic"])
def test_all_shapes_count_from_begin_and_stay_within_zero_and_alpha(shape):
    late = [drop_fraction(step, alpha=0.3, begin=50, end=150, shape=shape) for step in range(0, 300, 10)]
    early = [drop_fraction(step, alpha=0.3, begin=0, end=100, shape=shape) for step in range(-50, 250, 10)]
    assert late == early
    assert late[:6] == [0.3] * 6
    assert late[15:] == [0.0] * 15
    assert late == sorted(late, reverse=True)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (9_999, 0), (10_000, 0), (11_000, 0.149570), (12_000, 0.279230), (12_500, 0.337037), (15_000, 0.562963),
        (17_500, 0.7), (20_000, 0.770370), (22_500, 0.796296), (25_000, 0.8), (32_000, 0.8),
    ],
)  # fmt: skip
def test_cubic_of_the_gmp_example(step, expected):
    assert cubic_sparsity(step, begin=10_000, end=25_000, initial=0, final=0.8) == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize(("step", "expected"), [(21_000, 0.048204), (47_500, 0.7875)])
def test_cubic_of_the_cifar_example(step, expected):
    assert cubic_sparsity(step, begin=20_000, end=75_000, initial=0, final=0.9) == pytest.approx(expected, abs=5e-7)


def test_cubic_is_exact_at_the_end_and_averages_three_quarters_of_the_target():
    assert cubic_sparsity(30, begin=0, end=30, initial=0.1, final=0.9) == 0.9
    ramp = [cubic_sparsity(step, begin=0, end=10_000, initial=0, final=0.8) for step in range(10_000)]
    assert sum(ramp) / len(ramp) == pytest.approx(0.75 * 0.8, abs=1e-4)


def test_updates_begin_at_begin_and_end_below_end():
    steps = update_steps(0, 25_000, 100)
    assert (steps[0], steps[-1], len(steps)) == (0, 24_900, 250)
    assert list(update_steps(5, 26, 10)) == [5, 15, 25]
    assert list(update_steps(5, 25, 10)) == [5, 15]
    assert list(update_steps(30, 20, 10)) == []
