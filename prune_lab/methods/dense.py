"""Dense training: the reference for every method."""

from __future__ import annotations

from prune_lab.core.card import Card
from prune_lab.core.method import Method


class Dense(Method):
    card = Card(
        summary="dense training, nothing pruned; the finished phase is shared with every dense-to-sparse method",
        paper="none",
        acts="nowhere",
        eligible="none",
        cost="none",
        differences="none",
    )
