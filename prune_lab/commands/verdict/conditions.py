"""Is a pruned network a winning ticket? The five conditions of Ma et al. 2021, from accuracies alone. No torch.

Source: Ma et al. 2021, Sanity Checks for Lottery Tickets, NeurIPS, arXiv 2107.00166, section 2. The paper gives the
order of the conditions and the margins; our own additions are marked so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prune_lab.commands.compare.groups import Stat, stat
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import suggestion

DENSE, TICKET, REINIT, SMALL = "dense", "LT-IMP", "RR-IMP", "small_dense"
"""the whole network; pruned weights back at their first values; the same mask, fresh values; equally small, no mask"""

SIMILAR = {"cifar10": 0.5, "cifar100": 1.0, "tiny_imagenet": 1.0, "imagenet": 1.5}
"""points of top-1 within which an accuracy is similar, by data set; the paper has no others"""

_ROUNDING = 1e-9
"""means of decimals are inexact: 92.4 - 91.9 counts as 0.5, which is similar but no clear gap"""

Accuracies = Mapping[float, Sequence[float]]
"""learning rate -> top-1 of each seed, percent"""

Outcome = Literal["jackpot", "secondary prize", "none", "insufficient", "incomplete", "refused"]

PRIZES: tuple[Outcome, ...] = ("jackpot", "secondary prize")
TITLES: dict[Outcome, str] = {
    "jackpot": "Jackpot winning ticket",
    "secondary prize": "secondary prize ticket",
    "none": "no winning ticket",
    "insufficient": "insufficient",
    "incomplete": "incomplete",
    "refused": "refused",
}


@dataclass(frozen=True)
class Rules:
    """The margins of a verdict, in points of top-1."""

    similar: float
    """at most this much below counts as similar"""
    gap: float = 0.5
    """more than this much above is clearly better; the paper has no number for the small dense network, so ours is
    used there"""
    min_sparsity: float = 0.59
    """below it a sparsity is trivial: the lowest one in the paper's tables"""
    same_lr: bool = False
    """one learning rate must satisfy conditions 3 and 4 together (ours, stricter than the paper)"""
    min_seeds: int = 2
    """fewer runs of any arm at any learning rate give no verdict"""


@dataclass(frozen=True)
class Condition:
    """One of the five conditions: whether it holds, and on which numbers."""

    number: int
    text: str
    holds: bool | None
    """None: an arm that it compares is missing"""
    lrs: tuple[float, ...] = ()
    """learning rates of the ticket that satisfy it"""
    ticket: tuple[float, Stat] | None = None
    """learning rate and accuracy of the ticket's best case; None for condition 1"""
    other: tuple[float, Stat] | None = None
    """those of the network it is compared with"""

    @property
    def difference(self) -> float | None:
        """Return the ticket's mean minus the other's, in points."""
        return None if self.ticket is None or self.other is None else self.ticket[1].mean - self.other[1].mean

    @property
    def noise(self) -> float | None:
        """Return two standard errors of `difference`; None with a single run on either side (ours, not the paper's)."""
        return None if self.ticket is None or self.other is None else two_standard_errors(self.ticket[1], self.other[1])


@dataclass(frozen=True)
class Verdict:
    outcome: Outcome
    conditions: tuple[Condition, ...]
    reasons: tuple[str, ...] = ()
    """missing, insufficient or differing runs; why the conditions alone do not decide"""

    @property
    def title(self) -> str:
        return TITLES[self.outcome]


def similar_margin(dataset: str, given: float | None) -> float:
    """Return the margin of "similar accuracy" for a data set: as `given`, else the published one.

    Raises:
        UserError: there is neither.
    """
    if given is not None:
        return given
    if dataset not in SIMILAR:
        published = ", ".join(f"{name} {margin}" for name, margin in SIMILAR.items())
        raise UserError(
            f"dataset={dataset} has no published margin of similar accuracy{suggestion(dataset, SIMILAR)}: give "
            f"--sim POINTS; published: {published}"
        )
    return SIMILAR[dataset]


def two_standard_errors(one: Stat, other: Stat) -> float | None:
    """Return 2 * sqrt(s1^2 / n1 + s2^2 / n2), None if a standard deviation is unknown."""
    if one.std is None or other.std is None:
        return None
    return 2 * math.sqrt(one.std**2 / one.n + other.std**2 / other.n)


def is_clearly_above(value: float, other: float, gap: float) -> bool:
    """Return whether `value` exceeds `other` by more than `gap`; exactly `gap` is not enough."""
    return value - other > gap + _ROUNDING


def is_similar(value: float, other: float, margin: float) -> bool:
    """Return whether `value` is above `other` or at most `margin` below it."""
    return value >= other - margin - _ROUNDING


def judge(
    arms: Mapping[str, Accuracies], *, sparsity: float, rules: Rules, ticket: str = TICKET,
    settings: Mapping[str, Mapping[str, Any]] | None = None, missing: Sequence[str] = (),
) -> Verdict:
    """Return the verdict on one sparsity.

    Args:
        arms: accuracies of dense, `ticket`, RR-IMP and small_dense; others are ignored.
        sparsity: fraction of zero weights of ticket and RR-IMP, in (0, 1).
        ticket: the arm that is judged.
        settings: options of each arm that must be equal in all that have them, such as epochs; None: they are.
        missing: runs that are known to be missing; there is no verdict without them.

    Returns:
        `refused` if the arms' settings differ, `incomplete` if runs are missing, `insufficient` with too few seeds,
        otherwise the result of the five conditions. `reasons` names every difference and every missing run.
    """
    used = {name: {lr: runs for lr, runs in arms.get(name, {}).items() if runs}
            for name in (DENSE, ticket, REINIT, SMALL)}
    conditions = _conditions(used, sparsity, rules, ticket)
    known = {name: settings[name] for name in used if name in settings} if settings else {}
    problems: list[tuple[Outcome, list[str]]] = [
        ("refused", differences(known)),
        ("incomplete", [*missing, *_missing(used, ticket)]),
        ("insufficient", _too_few(used, rules.min_seeds)),
    ]
    for outcome, reasons in problems:
        if reasons:
            return Verdict(outcome, conditions, tuple(reasons))
    return _prize(conditions, rules)


def differences(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return one line for every option that has different values in the arms that have it."""
    lines = []
    for option in dict.fromkeys(name for values in settings.values() for name in values):
        having = {arm: values[option] for arm, values in settings.items() if option in values}
        if len({repr(value) for value in having.values()}) > 1:
            lines.append(f"{option} differs: {', '.join(f'{value} in {arm}' for arm, value in having.items())}")
    return lines


def _conditions(
    arms: dict[str, dict[float, Sequence[float]]], sparsity: float, rules: Rules, ticket: str
) -> tuple[Condition, ...]:
    stats = {name: {lr: stat(runs) for lr, runs in cells.items()} for name, cells in arms.items()}
    found, dense = stats[ticket], stats[DENSE]
    enough = sparsity >= rules.min_sparsity - _ROUNDING
    first = Condition(1, f"non-trivial sparsity: {sparsity:.4g} against at least {rules.min_sparsity:g}", enough)
    better = [
        _against_best(number, f"clearly better than {name} at any lr (by more than {rules.gap:g})", found, stats[name],
                      lambda value, other: is_clearly_above(value, other, rules.gap))
        for number, name in ((2, SMALL), (3, REINIT))
    ]  # fmt: skip
    best = _against_best(5, f"similar to the best dense network (within {rules.similar:g}) or above it", found, dense,
                         lambda value, other: is_similar(value, other, rules.similar))  # fmt: skip
    return (first, *better, _at_the_same_lr(found, dense, rules), best)


def _against_best(
    number: int, text: str, ticket: dict[float, Stat], others: dict[float, Stat],
    holds: Callable[[float, float], bool],
) -> Condition:
    """Return a condition that compares the ticket at any learning rate with the best of `others`."""
    if not ticket or not others:
        return Condition(number, text, None)
    other = max(others.items(), key=lambda cell: cell[1].mean)
    lrs = tuple(lr for lr, value in sorted(ticket.items()) if holds(value.mean, other[1].mean))
    return Condition(number, text, bool(lrs), lrs, max(ticket.items(), key=lambda cell: cell[1].mean), other)


def _at_the_same_lr(ticket: dict[float, Stat], dense: dict[float, Stat], rules: Rules) -> Condition:
    """Return condition 4; unknown while a learning rate of the ticket without dense network could still satisfy it."""
    text = f"similar to dense at the same lr (within {rules.similar:g}) or above it"
    shared = sorted(ticket.keys() & dense.keys())
    if not shared:
        return Condition(4, text, None)
    lrs = tuple(lr for lr in shared if is_similar(ticket[lr].mean, dense[lr].mean, rules.similar))
    best = max(shared, key=lambda lr: ticket[lr].mean - dense[lr].mean)
    holds = True if lrs else None if ticket.keys() - dense.keys() else False
    return Condition(4, text, holds, lrs, (best, ticket[best]), (best, dense[best]))


def _missing(arms: dict[str, dict[float, Sequence[float]]], ticket: str) -> list[str]:
    """Return the arms without any run and the learning rates of the ticket that another arm was not trained with.

    The definition is meant to exclude a comparison in which only the ticket has its learning rate tuned.
    """
    lines = [f"{name} is missing" for name, cells in arms.items() if not cells]
    if len(arms[DENSE]) == 1:
        lines.append(f"dense has one learning rate only, lr={next(iter(arms[DENSE])):g}: at least two make a best one")
    for name, cells in arms.items():
        untried = sorted(arms[ticket].keys() - cells.keys()) if cells else []
        lines += [f"{name} at lr={lr:g} is missing" for lr in untried]
    return lines


def _too_few(arms: dict[str, dict[float, Sequence[float]]], least: int) -> list[str]:
    return [
        f"{name} at lr={lr:g} has {len(runs)} run{'s' if len(runs) != 1 else ''}, at least {least} seeds are needed"
        for name, cells in arms.items() for lr, runs in sorted(cells.items()) if len(runs) < least
    ]  # fmt: skip


def _prize(conditions: tuple[Condition, ...], rules: Rules) -> Verdict:
    holds = {condition.number: condition.holds for condition in conditions}
    lrs = {condition.number: set(condition.lrs) for condition in conditions}
    if holds[5] and not holds[4]:
        raise AssertionError(f"condition 5 implies condition 4: {conditions}")
    if not all(holds[number] for number in (1, 2, 3, 4)):
        return Verdict("none", conditions)
    if rules.same_lr and not lrs[3] & lrs[4]:
        return Verdict("none", conditions, ("no single lr satisfies conditions 3 and 4 (--same-lr)",))
    return Verdict("jackpot" if holds[5] else "secondary prize", conditions)
