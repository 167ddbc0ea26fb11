"""SET: drop the smallest weights, grow at random, at a fixed budget."""

from __future__ import annotations

from prune_lab.core.card import Card
from prune_lab.families.random_growth import RandomGrowth
from prune_lab.families.sparse_training import BY_SIGN


class SET(RandomGrowth):
    card = Card(
        summary="sparse from the start; every interval the smallest weights move to random places",
        paper="Mocanu et al. 2018, Scalable training of artificial neural networks with adaptive sparse connectivity, "
        "arXiv 1707.04780; schedule and drop rule as in the RigL paper's SET baseline",
        acts="during training, after the optimizer step, every method.interval steps until method.end of it",
        eligible="weights of convolutions and linear layers; depthwise ones only if included",
        cost="one bool per weight; one draw and one selection per layer and update",
        differences="default is the variant of RigL's tables; the SET paper's own rule is method.drop=by_sign with one "
        "update per epoch until the end (interval=null begin=null end=1 decay=constant), and its momentum restarts "
        "every time. Draws are keyed by seed, layer and step, so all processes agree. "
        f"{BY_SIGN}",
    )
