"""Phases of a method: what each is called, what it does, and with which schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:

    from prune_lab.config.position import Position


@dataclass(frozen=True)
class Phase:
    """One link of a method's chain."""

    name: str
    """unique in the chain; the value of `phase` in metrics.jsonl"""
    hook: str
    """"train" runs the training loop; anything else names the method's function that does the work, such as "prune" """
    schedule: str | None
    """block of the schedule that says how long and with which learning rate; None for phases without steps"""
    active: bool
    """False: the method does nothing here, so that every method shares the finished phase"""
    fresh: bool = False
    """True: starts from the initial network, whatever comes before it in the chain"""
    origin: str | None = None
    """name of an earlier phase whose result the hook reads besides that of the one before"""
    begin: Position | None = None
    """training: where in the schedule it starts; None: at the start"""
    end: Position | None = None
    """training: where in the schedule it ends; None: at the end"""
    order: str | None = None
    """training: phases with the same word see their batches in the same order; None: its name"""
    keeps_optimizer: bool = False
    """True: the result holds the optimizer's state, so that a later phase can go on with it"""
    repeated: bool = False
    """True: a later phase of the chain takes the same steps once more; the run's cost counts them there"""


TRAIN_DENSE = Phase("train", "train", "train", active=False, fresh=True)
TRAIN = Phase("train", "train", "train", active=True)
PRUNE = Phase("prune", "prune", None, active=True)
REMOVE = Phase("remove", "remove", None, active=True)
FINETUNE = Phase("finetune", "train", "finetune", active=True)
