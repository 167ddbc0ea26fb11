"""The card of a method: its paper, where it acts, its cost, and how the code differs from the official one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """Facts about a method for its users; `prune-lab list methods` prints them."""

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
