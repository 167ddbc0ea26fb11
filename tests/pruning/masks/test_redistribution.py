"""How freed weights are shared among layers: the worked example of sparse momentum, exact totals, extremes."""

from __future__ import annotations

import random

import pytest

from prune_lab.pruning.masks.redistribution import apportion, apportion_official, drop_fractions, shares

SHARES = shares({"a": 0.3, "b": 0.1})


def test_shares_of_the_example():
    assert SHARES == pytest.approx({"a": 0.75, "b": 0.25})
    assert shares({"a": 7.0, "b": 7.0, "c": 7.0}) == pytest.approx(dict.fromkeys("abc", 1 / 3))
    assert shares({"a": 3.0, "b": 1.0}) == pytest.approx(SHARES)  # scale does not matter


@pytest.mark.parametrize("claims", [{"a": 0.0, "b": 0.0}, {"a": float("nan"), "b": 1.0}, {"a": float("inf")}])
def test_shares_without_a_finite_claim_are_an_error(claims):
    with pytest.raises(ValueError, match="claims"):
        shares(claims)


def test_exact_growth_of_the_example():
    """15 freed weights: targets 11.25 and 3.75, rounded by largest remainder."""
    assert apportion(SHARES, {"a": 35, "b": 190}, 15) == {"a": 11, "b": 4}


def test_official_growth_of_the_example():
    assert apportion_official(SHARES, {"a": 35, "b": 190}, 15) == {"a": 12, "b": 4}
    assert apportion_official(SHARES, {"a": 4, "b": 190}, 12) == {"a": 3, "b": 8}  # cap 0.99 * 4 = 3.96


def test_a_nearly_dense_layer_drops_no_more_than_its_sparsity():
    fractions = drop_fractions(0.5, SHARES, {"a": 1 - 10 / 12, "b": 0.9})
    assert fractions == pytest.approx({"a": 2 / 12, "b": 0.5})
    assert drop_fractions(0.1, SHARES, {"a": 0.15, "b": 0.9}) == {"a": 0.1, "b": 0.1}
    assert drop_fractions(0.5, SHARES, {"a": 0.25, "b": 0.1}) == {"a": 0.5, "b": 0.5}  # b has less than its share


def test_a_full_layer_hands_its_part_on_in_proportion():
    assert apportion({"a": 0.6, "b": 0.3, "c": 0.1}, {"a": 2, "b": 100, "c": 100}, 10) == {"a": 2, "b": 6, "c": 2}


def test_layers_without_a_share_take_only_what_nobody_else_can():
    assert apportion({"a": 1.0, "b": 0.0, "c": 0.0}, {"a": 10, "b": 30, "c": 10}, 8) == {"a": 8, "b": 0, "c": 0}
    assert apportion({"a": 1.0, "b": 0.0, "c": 0.0}, {"a": 10, "b": 30, "c": 10}, 14) == {"a": 10, "b": 3, "c": 1}


def test_totals_are_exact_and_within_the_room_for_random_cases():
    draw = random.Random(0)
    for _ in range(500):
        names = [str(i) for i in range(draw.randint(1, 12))]
        room = {name: draw.randint(0, 50) for name in names}
        claims = {name: draw.random() ** 4 for name in names}
        total = draw.randint(0, sum(room.values()))
        grown = apportion(shares(claims), room, total)
        assert sum(grown.values()) == total
        assert all(0 <= grown[name] <= room[name] for name in names)


def test_more_than_fits_is_an_error():
    with pytest.raises(ValueError, match="no room for 5"):
        apportion({"a": 1.0}, {"a": 4}, 5)
