"""Finished runs sorted into cases to judge: one network, recipe and sparsity each. Imports no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from prune_lab import datasets
from prune_lab.commands.compare.runs import RunResult
from prune_lab.commands.verdict.conditions import DENSE, REINIT, SMALL, TICKET, Rules, Verdict, differences, judge
from prune_lab.config.schedule import ScheduleConfig
from prune_lab.config.time import parse_time
from prune_lab.datasets import base
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import parse

REWOUND = "IMP-rewind"
"""the paper's appendix: the ticket starts from theta_t and trains T - t epochs; RR-IMP with its mask still trains T"""

PARAMS_TOLERANCE = 0.1
"""a small dense network matches a sparse one whose number of parameters differs by less; levels lie 20 % apart"""

_NOT_RECIPE = {"device", "compile", "checkpoint_interval_s", "threads", "eval_batch_size", "eval_interval",
               "limit_eval_batches"}  # fmt: skip
"""trainer options that change no result, or only where it is computed; limits on an evaluation count in images"""
EVALUATED = "images evaluated at most"
"""name of this limit among an entry's settings"""
_MASK_OPTIONS = ("fraction", "distribution", "include", "exclude")
"""options of method=lottery that decide the mask"""


@dataclass(frozen=True)
class Entry:
    """The properties of one run that a verdict needs."""

    arm: str
    network: dict[str, Any]
    """options of model and data set, as typed"""
    recipe: dict[str, Any]
    """how the network was trained, without the learning rate, as typed"""
    mask: dict[str, Any]
    """how the mask was made; empty for networks without one"""
    rewind: str
    """rewind point of the weights, empty for the beginning"""
    sparsity: float | None
    params: float | None
    """nonzero parameters, None while unknown"""
    lr: float
    seed: int
    top1: float | None
    """None: the run is not finished"""
    run: RunResult

    @property
    def settings(self) -> dict[str, Any]:
        return self.recipe | self.mask

    @property
    def label(self) -> str:
        return f"{self.arm} ({self.rewind})" if self.rewind else self.arm


@dataclass
class Case:
    """The runs that decide whether one network has a ticket at one sparsity."""

    network: dict[str, Any]
    settings: dict[str, Any]
    """of the ticket"""
    ticket: str
    sparsity: float
    rewind: str
    arms: dict[str, list[Entry]]
    """arms of the definition"""
    context: dict[str, list[Entry]] = field(default_factory=dict)
    """other arms at this sparsity, by label; no condition uses them"""

    def cells(self, arm: str) -> dict[float, list[float]]:
        """Return learning rate -> top-1 of each seed, only the first run of a seed."""
        found: dict[float, dict[int, float]] = defaultdict(dict)
        for entry in [*self.arms.get(arm, ()), *self.context.get(arm, ())]:
            if entry.top1 is not None:
                found[entry.lr].setdefault(entry.seed, entry.top1)
        return {lr: list(runs.values()) for lr, runs in sorted(found.items())}

    def params(self, arm: str) -> float | None:
        """Return the number of parameters of an arm's first finished run."""
        known = [entry.params for entry in [*self.arms.get(arm, ()), *self.context.get(arm, ())] if entry.params]
        return known[0] if known else None

    def unfinished(self) -> list[str]:
        """Return one line for every run of the definition's arms without result."""
        return [
            f"{arm} at lr={entry.lr:g}, seed {entry.seed}: {entry.run.status}"
            for arm, entries in self.arms.items() for entry in entries if entry.top1 is None
        ]  # fmt: skip

    def verdict(self, rules: Rules) -> Verdict:
        return judge(
            {arm: self.cells(arm) for arm in self.arms},
            sparsity=self.sparsity,
            rules=rules,
            ticket=self.ticket,
            settings={arm: entries[0].settings for arm, entries in self.arms.items() if entries},
            missing=self.unfinished(),
        )


def read_entries(runs: Iterable[RunResult]) -> tuple[list[Entry], list[str]]:
    """Return the runs of the arms that a verdict uses, and a note on each of them that cannot be used."""
    entries, notes = [], []
    for run in runs:
        method = run.config.get("method", {}).get("name")
        if method not in (DENSE, SMALL, "lottery"):
            continue
        unused = _unused(run.config["method"])
        if unused:
            notes.append(f"{run.path} is left out: {unused}")
            continue
        try:
            entries.append(_entry(run))
        except (UserError, KeyError, TypeError) as error:
            notes.append(f"{run.path} is left out, its options cannot be read: {error}")
    return entries, notes + _doubles(entries)


def _unused(method: Mapping[str, Any]) -> str | None:
    if method["name"] == SMALL and method.get("match") != "params":
        return f"method.match={method.get('match')}, where a verdict compares networks of equal parameters"
    if method.get("copy"):
        return f"method.copy={method['copy']} changes the order of batches"
    return None


def _entry(run: RunResult) -> Entry:
    method, lottery = run.config["method"], run.config["method"]["name"] == "lottery"
    schedule = parse(ScheduleConfig, run.config["schedule"], "schedule")
    train = asdict(schedule.phase("train"))
    lr = train.pop("lr")
    trainer = {key: value for key, value in run.config["trainer"].items() if key not in _NOT_RECIPE}
    limit = run.config["trainer"].get("limit_eval_batches")
    images = None if limit is None else limit * run.config["trainer"]["eval_batch_size"]
    rest = {"batch_size": schedule.batch_size, "label_smoothing": schedule.label_smoothing}
    dataset = base.identity(datasets.parse_config(run.config["dataset"]))
    count = run.summary.get("params/nonzero")
    return Entry(
        arm=method["arm"] if lottery else method["name"],
        network=_typed(model=run.config["model"], dataset=dataset),
        recipe=_typed(**{"schedule.train": train, "schedule": rest, "optimizer": run.config["optimizer"],
                         "trainer": trainer}) | {EVALUATED: images},
        mask=_typed(method={key: method[key] for key in _MASK_OPTIONS}) if lottery else {},
        rewind=_rewind(method) if lottery else "",
        sparsity=sparsity_of(method) if lottery or method["name"] == SMALL else None,
        params=count,
        lr=lr,
        seed=run.seed if run.seed is not None else run.config["seed"],
        top1=run.summary.get("final/top1"),
        run=run,
    )  # fmt: skip


def _typed(**groups: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{group}.{key}": value for group, options in groups.items() for key, value in options.items()}


def _rewind(method: Mapping[str, Any]) -> str:
    """Return the rewind point of the weights, with the treatment of the momentum if not the default."""
    place = method["rewind_to"]
    if parse_time(place, "method.rewind_to").count == 0:
        return ""
    return place if method["optimizer_state"] == "restore" else f"{place}, momentum zero"


def sparsity_of(method: Mapping[str, Any]) -> float:
    """Return the fraction of zero weights: the target, else the result of the rounds (4 without a number)."""
    if method.get("sparsity") is not None:
        return float(method["sparsity"])
    levels = method.get("levels")
    return 1 - (1 - method["fraction"]) ** (4 if levels is None else levels)


def _doubles(entries: Iterable[Entry]) -> list[str]:
    """Return a note on every further run of the same arm, learning rate and seed under equal options."""
    first: dict[str, Entry] = {}
    notes = []
    for entry in entries:
        key = repr((entry.network, entry.settings, entry.label, _level(entry), entry.lr, entry.seed))
        other = first.setdefault(key, entry)
        if other is not entry and entry.top1 is not None:
            notes.append(f"{entry.run.path} repeats seed {entry.seed} of {other.run.path} and is not counted")
    return notes


def find_cases(entries: Iterable[Entry]) -> list[Case]:
    """Return one case per network, recipe, kind of ticket and sparsity, in this order.

    An arm that was trained only with another recipe joins the case with the nearest one, so that the verdict can name
    the difference. Runs of RR-IMP without any ticket form a case too.
    """
    by_network: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_network[repr(entry.network)].append(entry)
    return [case for peers in by_network.values() for case in _cases_of(peers)]


def _cases_of(peers: list[Entry]) -> list[Case]:
    """Return the cases of one network."""
    leaders = [entry for entry in peers if entry.arm in (TICKET, REWOUND) and entry.sparsity]
    covered = {(_level(entry), entry.rewind) for entry in leaders}
    leaders += [entry for entry in peers if entry.arm == REINIT and (_level(entry), entry.rewind) not in covered]
    found: dict[str, Case] = {}
    for entry in sorted(leaders, key=lambda entry: (repr(entry.settings), entry.rewind, entry.sparsity)):
        key = repr((entry.settings, _ticket(entry), entry.rewind, _level(entry)))
        if key not in found:
            found[key] = _case(entry, peers)
    return list(found.values())


def _ticket(leader: Entry) -> str:
    """Return the arm that is judged in the case of a ticket or of its RR-IMP."""
    if leader.arm != REINIT:
        return leader.arm
    return REWOUND if leader.rewind else TICKET


def _level(entry: Entry) -> float:
    return round(entry.sparsity or 0.0, 6)


def _case(leader: Entry, peers: list[Entry]) -> Case:
    """Return the case that the run `leader` belongs to."""
    ticket = _ticket(leader)
    level = [entry for entry in peers if entry.mask and _level(entry) == _level(leader)]
    dense = next((entry.params for entry in peers if entry.arm == DENSE and entry.params), None)
    wanted = _parameters(leader, level, dense)

    def belongs(entry: Entry) -> bool:
        if entry.arm == SMALL:
            return _is_as_small(entry, wanted, dense)
        return entry.arm == DENSE or (entry in level and entry.rewind == leader.rewind)

    arms = {arm: _nearest([entry for entry in peers if entry.arm == arm and belongs(entry)], leader, wanted)
            for arm in (DENSE, ticket, REINIT, SMALL)}  # fmt: skip
    context: dict[str, list[Entry]] = defaultdict(list)
    for entry in level:
        used = entry.arm in (ticket, REINIT, TICKET, REWOUND)
        if not used and entry.settings == leader.settings and entry.top1 is not None:
            context[entry.label].append(entry)
    return Case(leader.network, leader.settings, ticket, leader.sparsity, leader.rewind, arms, dict(context))


def _parameters(leader: Entry, level: list[Entry], dense: float | None) -> float | None:
    """Return the number of parameters of the sparse network, if possible from a finished run of equal mask options."""
    counted = [entry.params for entry in level if entry.params and entry.mask == leader.mask]
    return counted[0] if counted else (1 - leader.sparsity) * dense if dense else None


def _is_as_small(entry: Entry, wanted: float | None, dense: float | None) -> bool:
    count = entry.params or ((1 - entry.sparsity) * dense if dense else None)
    return bool(count and wanted and abs(count / wanted - 1) < PARAMS_TOLERANCE)


def _nearest(entries: list[Entry], leader: Entry, wanted: float | None) -> list[Entry]:
    """Return those of `entries` whose settings differ least from the leader's, then with the nearest parameters."""
    if not entries:
        return []

    def distance(entry: Entry) -> tuple[int, float]:
        unlike = len(differences({"one": entry.settings, "other": leader.settings}))
        return unlike, abs((entry.params or 0.0) - (wanted or 0.0))

    nearest = min(entries, key=distance)
    return [entry for entry in entries if entry.settings == nearest.settings and _level(entry) == _level(nearest)]
