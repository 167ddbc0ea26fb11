"""The card of a method: its paper, its options there, and where the code departs from it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """What a user should know about a method; `prune-lab list methods` prints it."""

    summary: str
    """one line: what is pruned, when, by which rule"""
    paper: str
    """authors, year, title, identifier"""
    acts: str
    """where in the run it acts"""
    eligible: str
    """which tensors it may prune"""
    cost: str
    """extra memory and time over dense training"""
    differences: str
    """known differences from the official code and how they are set"""
