"""A phase: one link of a method's chain. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prune_lab.config.time import Time
    from prune_lab.core.context import Context

Action = Callable[[Any, "Context"], "dict[str, float] | None"]
"""a phase's work on (method, context); returns figures for the phase's record, if there are any"""


def prune(method: Any, context: Context) -> dict[str, float] | None:
    """Let the method prune the network (see Method.prune)."""
    figures: dict[str, float] | None = method.prune(context)
    return figures


def remove(method: Any, context: Context) -> dict[str, float] | None:
    """Let the method remove channels from the network (see Method.remove)."""
    figures: dict[str, float] | None = method.remove(context)
    return figures


@dataclass(frozen=True)
class Phase:
    """One link of a method's chain."""

    name: str
    """unique in the chain; the value of `phase` in metrics.jsonl"""
    acts: Action | None
    """the function of a phase without training; None: the phase runs the training loop"""
    schedule: str | None
    """block of the schedule with epochs and learning rate; None for phases without training"""
    active: bool
    """False: the method does nothing here, so that all methods share the finished phase"""
    fresh: bool = False
    """True: starts from the initial network, regardless of earlier phases in the chain"""
    origin: str | None = None
    """name of an earlier phase whose result is read in addition to that of the previous one"""
    begin: Time | None = None
    """training: position in the schedule where it starts; None: the start"""
    end: Time | None = None
    """training: position in the schedule where it ends; None: the end"""
    order: str | None = None
    """training: phases with the same key see their batches in the same order; None: its name"""
    keeps_optimizer: bool = False
    """True: the result holds the optimizer's state, so that a later phase can resume from it"""
    repeated: bool = False
    """True: a later phase of the chain repeats the same steps; the run's cost counts them there"""

    @property
    def is_training(self) -> bool:
        """Whether the phase runs the training loop."""
        return self.acts is None


TRAIN_DENSE = Phase("train", None, "train", active=False, fresh=True)
TRAIN = Phase("train", None, "train", active=True)
PRUNE = Phase("prune", prune, None, active=True)
REMOVE = Phase("remove", remove, None, active=True)
FINETUNE = Phase("finetune", None, "finetune", active=True)
