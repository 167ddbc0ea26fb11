"""Verdicts as text and as JSON: compared runs, conditions with their numbers, conclusions. No torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prune_lab.commands.compare.formats import markdown
from prune_lab.commands.compare.groups import Stat
from prune_lab.commands.verdict.cases import EVALUATED, REWOUND, Case
from prune_lab.commands.verdict.conditions import PRIZES, TITLES, Condition, Rules, Verdict, stat
from prune_lab.tracking.lines import quantity, to_ascii

Judged = tuple[Case, Rules, Verdict]

_WORDS = {True: "holds", False: "fails", None: "open"}


def text(judged: Sequence[Judged], notes: Sequence[str]) -> str:
    """Return the text for a reader, in ASCII: per network and recipe, the sparsities and whether it has a ticket."""
    lines = []
    for title, group in _groups(judged).items():
        lines += [title, "=" * len(title), ""]
        for case, rules, verdict in group:
            lines += [*_case_lines(case, rules, verdict), ""]
        lines += [f"{title}: {conclusion(group)}", ""]
    if judged:
        lines.append("accuracies: top-1 %, mean +- sample standard deviation (runs); conditions: Ma et al. 2021, "
                     "arXiv 2107.00166")  # fmt: skip
        lines.append("condition 1 also asks for enough epochs, which these numbers cannot tell: beside an undertrained "
                     "dense network any ticket looks good")  # fmt: skip
    lines += _partial(case.settings for case, _, _ in judged)
    if any(case.network.get("dataset.validation") for case, _, _ in judged):
        lines.append("with dataset.validation the accuracies are those of held-out training images")
    return to_ascii("\n".join([*lines, *notes])) + "\n"


def _partial(settings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return which images were left out, if any: accuracies on a part are not those on the whole."""
    limits: dict[str, set[int]] = defaultdict(set)
    for known in settings:
        for key in (EVALUATED, "trainer.limit_train_batches"):
            if known.get(key) is not None:
                limits[key].add(known[key])
    return [f"on a part of the images: {key} {', '.join(f'{limit:,}' for limit in sorted(found))}"
            for key, found in limits.items()]  # fmt: skip


def as_json(judged: Sequence[Judged], notes: Sequence[str]) -> dict[str, Any]:
    """Return the same as containers for JSON, with learning rates as strings."""
    networks = [
        {
            "title": title,
            "network": group[0][0].network,
            "settings": group[0][0].settings,
            "ticket": group[0][0].ticket,
            "rewind_to": group[0][0].rewind or None,
            "conclusion": conclusion(group),
            "sparsities": [_case_json(*entry) for entry in group],
        }
        for title, group in _groups(judged).items()
    ]
    return {"networks": networks, "notes": list(notes)}


def conclusion(group: Sequence[Judged]) -> str:
    """Return whether a network has a ticket: any non-trivial sparsity decides it; open ones are named."""
    found = {prize: [case.sparsity for case, _, verdict in group if verdict.outcome == prize] for prize in PRIZES}
    undecided = [case.sparsity for case, rules, verdict in group
                 if verdict.conditions[0].holds and verdict.outcome in ("insufficient", "incomplete", "refused")]
    parts = [f"has a {TITLES[prize]} at sparsity {_listed(found[prize])}" for prize in PRIZES if found[prize]]
    if not any(verdict.conditions[0].holds for _, _, verdict in group):
        parts.append("no verdict, every sparsity is trivial")
    elif not parts and not undecided:
        parts.append("has no winning ticket at any sparsity that was tried")
    return "; ".join([*parts, *([f"no verdict at sparsity {_listed(undecided)}"] if undecided else [])])


def _listed(sparsities: Sequence[float]) -> str:
    return ", ".join(f"{sparsity:.4g}" for sparsity in sparsities)


def _groups(judged: Sequence[Judged]) -> dict[str, list[Judged]]:
    """Return the cases of each network, recipe and kind of ticket under a title that separates them."""
    groups: dict[str, list[Judged]] = defaultdict(list)
    for entry in judged:
        case = entry[0]
        groups[repr((case.network, case.settings, case.ticket, case.rewind))].append(entry)
    options = [group[0][0].network | group[0][0].settings for group in groups.values()]
    shown = [key for key in dict.fromkeys(name for known in options for name in known)
             if key not in ("model.name", "dataset.name", "schedule.train.epochs")
             and len({repr(known.get(key)) for known in options}) > 1]  # fmt: skip
    return {_title(group[0][0], shown): group for group in groups.values()}


def _title(case: Case, shown: Sequence[str]) -> str:
    known = case.network | case.settings
    epochs = known["schedule.train.epochs"]
    differing = [f"{key}={known[key]}" for key in shown if key in known]
    start = f", tickets rewound to {case.rewind or 'the start'}" if case.ticket == REWOUND else ""
    name = f"{known['model.name']} on {known['dataset.name']}, {epochs} epochs{start}"
    return ", ".join([name, *differing])


def _case_lines(case: Case, rules: Rules, verdict: Verdict) -> list[str]:
    first = verdict.conditions[0]
    head = f"sparsity {case.sparsity:.4g}"
    if not first.holds:
        return [f"{head}: trivial, below {rules.min_sparsity:g}; not judged"]
    lines = [f"{head}:", "", *_table(case).splitlines(), ""]
    for condition in verdict.conditions:
        lines.append(f"  {condition.number} {_WORDS[condition.holds]:5}  {condition.text}")
        lines += [f"           {line}" for line in _numbers(condition)]
    lines.append(f"verdict at sparsity {case.sparsity:.4g}: {verdict.title}")
    return lines + [f"  {reason}" for reason in [*verdict.reasons, *_doubts(verdict)]]


def _doubts(verdict: Verdict) -> list[str]:
    """Return a line on gaps that decide a verdict but may be chance; no condition considers noise."""
    if verdict.outcome not in PRIZES:
        return []
    gaps = [condition for condition in verdict.conditions if condition.number in (2, 3)]
    weak = [str(gap.number) for gap in gaps if gap.noise is not None and gap.difference <= gap.noise]
    words = {1: "gap of condition", 2: "gaps of conditions"}
    return [f"may be chance: noise covers the {words[len(weak)]} {' and '.join(weak)}"] if weak else []


def _table(case: Case) -> str:
    """Return accuracies by arm and learning rate; arms that no condition uses come last."""
    names = [*case.arms, *sorted(case.context)]
    cells = {name: case.cells(name) for name in names}
    lrs = sorted({lr for by_lr in cells.values() for lr in by_lr})
    rows = []
    for name in names:
        count = case.params(name)
        mark = " *" if name in case.context else ""
        rows.append([f"{name}{mark}", "-" if count is None else quantity(count),
                     *(_spread(stat(cells[name][lr])) if lr in cells[name] else "-" for lr in lrs)])  # fmt: skip
    table = markdown(["arm", "parameters", *(f"lr={lr:g}" for lr in lrs)], rows)
    return table + ("* for context, part of no condition\n" if case.context else "")


def _spread(value: Stat) -> str:
    return f"{value.mean:.2f}{'' if value.std is None else f' +- {value.std:.2f}'} ({value.n})"


def _numbers(condition: Condition) -> Iterator[str]:
    """Yield the numbers behind a condition, and whether the difference is larger than noise."""
    if condition.ticket is None or condition.other is None:
        return
    (lr, ticket), (other_lr, other) = condition.ticket, condition.other
    line = f"{ticket.mean:.2f} (lr={lr:g}) against {other.mean:.2f} (lr={other_lr:g}): {condition.difference:+.2f}"
    yield line + (f"; satisfied at lr={', '.join(f'{rate:g}' for rate in condition.lrs)}" if condition.lrs else "")
    if condition.noise is not None:
        larger = "larger" if abs(condition.difference) > condition.noise else "no larger"
        yield f"the difference is {larger} than noise (two standard errors, {condition.noise:.2f})"


def _case_json(case: Case, rules: Rules, verdict: Verdict) -> dict[str, Any]:
    return {
        "sparsity": case.sparsity,
        "verdict": verdict.outcome,
        "reasons": list(verdict.reasons),
        "rules": vars(rules),
        "conditions": [_condition_json(condition) for condition in verdict.conditions],
        "arms": {name: _arm_json(case, name) for name in [*case.arms, *case.context]},
    }


def _condition_json(condition: Condition) -> dict[str, Any]:
    sides = {"ticket": condition.ticket, "other": condition.other}
    return {
        "number": condition.number,
        "text": condition.text,
        "holds": condition.holds,
        "lrs": list(condition.lrs),
        **{name: side and {"lr": side[0], **vars(side[1])} for name, side in sides.items()},
        "difference": condition.difference,
        "two_standard_errors": condition.noise,
    }


def _arm_json(case: Case, name: str) -> dict[str, Any]:
    entries = case.arms.get(name) or case.context.get(name, [])
    return {
        "condition": name in case.arms,
        "parameters": case.params(name),
        "top1": {f"{lr:g}": {**vars(stat(values)), "values": values} for lr, values in case.cells(name).items()},
        "runs": [entry.run.path.name for entry in entries],
    }
