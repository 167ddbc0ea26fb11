"""Five conditions of a winning ticket: examples by hand, what may strengthen or weaken them, what is refused."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from prune_lab.commands.compare.groups import Stat
from prune_lab.commands.verdict.conditions import (
    DENSE,
    REINIT,
    SMALL,
    TICKET,
    Rules,
    is_clearly_above,
    is_similar,
    judge,
    similar_margin,
    two_standard_errors,
)
from prune_lab.foundations.errors import UserError

CIFAR10 = Rules(similar=0.5)
RANKS = {"none": 0, "secondary prize": 1, "jackpot": 2}


def arms(dense, ticket, reinit, small, *, lrs=(0.01, 0.1), seeds=2):
    """Return the accuracies of arms whose runs all have the given mean at each learning rate."""
    named = zip((DENSE, TICKET, REINIT, SMALL), (dense, ticket, reinit, small), strict=True)
    return {name: {lr: [value] * seeds for lr, value in zip(lrs, values, strict=True)} for name, values in named}


def holds(verdict):
    return [condition.holds for condition in verdict.conditions]


@pytest.mark.parametrize(
    ("dense", "ticket", "reinit", "small", "sparsity", "expected", "outcome"),
    [
        ((90.3, 92.4), (92.0, 91.5), (89.0, 91.3), (90.5, 91.0), 0.832, "TTTTT", "jackpot"),
        ((90.3, 92.4), (90.0, 87.3), (87.0, 87.2), (86.0, 88.5), 0.832, "TTTTF", "secondary prize"),
        ((90.3, 92.4), (89.4, 87.3), (80.0, 80.0), (80.0, 80.0), 0.914, "TTTFF", "none"),
        ((90.3, 92.4), (89.4, 87.3), (95.0, 95.0), (95.0, 95.0), 0.914, "TFFFF", "none"),
        ((93.0, 93.8), (92.5, 93.6), (92.4, 93.4), (91.0, 92.0), 0.914, "TTFTT", "none"),
        ((90.3, 92.4), (92.0, 91.5), (89.0, 91.3), (90.5, 91.0), 0.36, "FTTTT", "none"),
    ],
)
def test_examples_by_hand(dense, ticket, reinit, small, sparsity, expected, outcome):
    verdict = judge(arms(dense, ticket, reinit, small), sparsity=sparsity, rules=CIFAR10)
    assert holds(verdict) == [letter == "T" for letter in expected]
    assert (verdict.outcome, verdict.reasons) == (outcome, ())


def test_half_a_point_is_similar_and_no_clear_gap():
    assert not is_clearly_above(92.4, 91.9, 0.5) and is_clearly_above(92.41, 91.9, 0.5)  # 92.4 - 91.9 is 0.50000...01
    assert is_similar(91.9, 92.4, 0.5) and not is_similar(91.89, 92.4, 0.5)
    verdict = judge(arms((92.4, 92.0), (91.9, 90), (91.4, 90), (91.4, 90)), sparsity=0.832, rules=CIFAR10)
    assert holds(verdict) == [True, False, False, True, True]


def test_four_levels_are_the_lowest_sparsity_that_is_not_trivial():
    for level, enough in ((3, False), (4, True)):
        verdict = judge(arms((90, 92), (92, 92), (80, 80), (80, 80)), sparsity=1 - 0.8**level, rules=CIFAR10)
        assert verdict.conditions[0].holds is enough
    lower = Rules(similar=0.5, min_sparsity=0.3)
    assert judge(arms((90, 92), (92, 92), (80, 80), (80, 80)), sparsity=0.36, rules=lower).outcome == "jackpot"


def test_the_learning_rates_that_satisfy_each_condition_are_named():
    verdict = judge(arms((90.3, 92.4), (92.0, 91.5), (89.0, 91.3), (90.5, 91.0)), sparsity=0.832, rules=CIFAR10)
    assert [condition.lrs for condition in verdict.conditions] == [(), (0.01,), (0.01,), (0.01,), (0.01,)]
    small, reinit, same, best = verdict.conditions[1:]
    assert (small.ticket[0], small.other[0]) == (0.01, 0.1)
    assert [pytest.approx(entry.difference) for entry in (small, reinit, same, best)] == [1.0, 0.7, 1.7, -0.4]


def test_one_learning_rate_for_conditions_3_and_4_only_on_request():
    values = arms((92.0, 90.0), (91.0, 89.8), (90.0, 89.0), (88.0, 88.0))  # 3 at 0.01, 4 at 0.1
    assert judge(values, sparsity=0.832, rules=CIFAR10).outcome == "secondary prize"
    strict = judge(values, sparsity=0.832, rules=Rules(similar=0.5, same_lr=True))
    assert (strict.outcome, strict.reasons) == ("none", ("no single lr satisfies conditions 3 and 4 (--same-lr)",))


def test_means_over_seeds_decide_and_noise_is_two_standard_errors():
    values = arms((90, 92), (92, 91), (91, 90), (88, 88))
    values[TICKET][0.01], values[REINIT][0.01] = [91.0, 92.0, 93.0], [90.0, 91.0, 92.0, 91.0]
    condition = judge(values, sparsity=0.832, rules=CIFAR10).conditions[2]
    assert condition.holds and condition.difference == 1.0
    assert condition.noise == pytest.approx(2 * (1 / 3 + (2 / 3) / 4) ** 0.5)  # variances 1 and 2/3
    assert condition.difference < condition.noise
    assert two_standard_errors(Stat(90.0, None, 1), Stat(90.0, 1.0, 3)) is None


def random_arms(source, lrs=(0.01, 0.1)):
    values = [[round(source.uniform(88, 93), 1) for _ in lrs] for _ in range(4)]
    return arms(*values, lrs=lrs)


def test_condition_5_implies_condition_4():
    source = random.Random(0)
    verdicts = [judge(random_arms(source), sparsity=0.832, rules=CIFAR10) for _ in range(3000)]
    fifth = [verdict for verdict in verdicts if verdict.conditions[4].holds]
    assert len(fifth) > 300 and all(verdict.conditions[3].holds for verdict in fifth)
    assert {verdict.outcome for verdict in verdicts} == set(RANKS)


@pytest.mark.parametrize("same_lr", [False, True])
def test_better_controls_only_weaken_a_verdict_and_a_better_ticket_only_strengthens_it(same_lr):
    source, rules = random.Random(1), Rules(similar=0.5, same_lr=same_lr)
    for _ in range(500):
        values = random_arms(source)
        for name, sign in ((REINIT, -1), (SMALL, -1), (DENSE, -1), (TICKET, 1)):
            raised = {lr: [top1 + source.choice((0.0, 0.3, 1.5)) for top1 in runs] for lr, runs in values[name].items()}
            before, after = (RANKS[judge(case, sparsity=0.832, rules=rules).outcome]
                             for case in (values, values | {name: raised}))  # fmt: skip
            assert sign * (after - before) >= 0, (name, values, raised)


def test_more_learning_rates_of_a_control_only_weaken_and_more_of_the_ticket_only_strengthen():
    source = random.Random(2)
    changed = set()
    for _ in range(500):
        values = random_arms(source, lrs=(0.005, 0.01, 0.1))
        for name in (REINIT, SMALL, TICKET):
            # a ticket with a rate fewer than its controls is complete, a control with one more is too
            fewer = values | {TICKET: {lr: values[TICKET][lr] for lr in (0.01, 0.1)}}
            more = values if name == TICKET else fewer | {name: values[name] | {0.5: [source.uniform(88, 93)] * 2}}
            before, after = (RANKS[judge(case, sparsity=0.832, rules=CIFAR10).outcome] for case in (fewer, more))
            assert (after >= before) if name == TICKET else (after <= before)
            changed |= {name} if after != before else set()
    assert changed == {REINIT, SMALL, TICKET}


WINNING = arms((90.3, 92.4), (92.0, 91.5), (89.0, 91.3), (90.5, 91.0))


@pytest.mark.parametrize("name", [DENSE, TICKET, REINIT, SMALL])
def test_a_missing_arm_leaves_the_verdict_open(name):
    without = {arm: cells for arm, cells in WINNING.items() if arm != name}
    for values in (without, without | {name: {}}, without | {name: {0.01: []}}):
        verdict = judge(values, sparsity=0.832, rules=CIFAR10)
        assert verdict.outcome == "incomplete" and f"{name} is missing" in verdict.reasons
    unknown = {DENSE: (4, 5), TICKET: (2, 3, 4, 5), REINIT: (3,), SMALL: (2,)}[name]
    assert tuple(condition.number for condition in verdict.conditions if condition.holds is None) == unknown


@pytest.mark.parametrize("name", [DENSE, REINIT, SMALL])
def test_an_arm_without_one_of_the_tickets_learning_rates_leaves_the_verdict_open(name):
    verdict = judge(WINNING | {name: {0.1: WINNING[name][0.1]}}, sparsity=0.832, rules=CIFAR10)
    assert verdict.outcome == "incomplete" and f"{name} at lr=0.01 is missing" in verdict.reasons


def test_dense_at_one_learning_rate_is_no_well_trained_network():
    one = {name: {0.01: cells[0.01]} for name, cells in WINNING.items()}
    verdict = judge(one, sparsity=0.832, rules=CIFAR10)
    assert all(holds(verdict)) and verdict.outcome == "incomplete"
    assert verdict.reasons == ("dense has one learning rate only, lr=0.01: at least two make a best one",)


def test_condition_4_is_open_while_dense_lacks_a_learning_rate_of_the_ticket():
    values = arms((92.0, 92.4), (80.0, 80.0), (79.0, 79.0), (79.0, 79.0))
    values[TICKET][0.05] = [92.4, 92.4]
    verdict = judge(values, sparsity=0.832, rules=CIFAR10)
    assert holds(verdict)[3:] == [None, True] and verdict.outcome == "incomplete"


def test_one_seed_is_insufficient():
    values = WINNING | {REINIT: {0.01: [89.0], 0.1: [91.3, 91.3]}}
    verdict = judge(values, sparsity=0.832, rules=CIFAR10)
    assert verdict.outcome == "insufficient"
    assert verdict.reasons == ("RR-IMP at lr=0.01 has 1 run, at least 2 seeds are needed",)


def test_runs_known_to_be_missing_are_named():
    verdict = judge(WINNING, sparsity=0.832, rules=CIFAR10, missing=["RR-IMP at lr=0.1, seed 2: failed"])
    assert (verdict.outcome, verdict.reasons) == ("incomplete", ("RR-IMP at lr=0.1, seed 2: failed",))


def test_different_epochs_or_recipes_are_refused_and_named():
    same = {"schedule.train.epochs": 160, "optimizer.weight_decay": 5e-4}
    settings = {name: dict(same) for name in WINNING}
    assert judge(WINNING, sparsity=0.832, rules=CIFAR10, settings=settings).outcome == "jackpot"
    settings[TICKET]["schedule.train.epochs"] = 78
    settings[TICKET]["method.fraction"] = 0.2  # which dense training does not have
    verdict = judge(WINNING, sparsity=0.832, rules=CIFAR10, settings=settings)
    assert verdict.outcome == "refused"
    assert verdict.reasons == (
        "schedule.train.epochs differs: 160 in dense, 78 in LT-IMP, 160 in RR-IMP, 160 in small_dense",
    )


def test_published_margins_and_no_other():
    margins = [similar_margin(name, None) for name in ("cifar10", "cifar100", "tiny_imagenet", "imagenet")]
    assert margins == [0.5, 1.0, 1.0, 1.5]
    assert similar_margin("digits", 0.8) == 0.8 and similar_margin("cifar10", 0.1) == 0.1
    with pytest.raises(UserError, match=r"dataset=digits has no published margin.*--sim POINTS; published: cifar10"):
        similar_margin("digits", None)


def test_a_wider_margin_of_similarity_only_strengthens():
    values = arms((90.3, 92.4), (90.0, 87.3), (87.0, 87.2), (86.0, 88.5))
    outcomes = [judge(values, sparsity=0.832, rules=Rules(similar=margin)).outcome for margin in (0.2, 0.5, 2.4)]
    assert outcomes == ["none", "secondary prize", "jackpot"]
    assert all(RANKS[one] < RANKS[other] for one, other in pairwise(outcomes))
