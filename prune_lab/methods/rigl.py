"""RigL: drop the smallest weights, grow where the loss gradient is largest, at a fixed budget."""

from __future__ import annotations

from prune_lab.core.card import Card
from prune_lab.families.gradient_growth import GradientGrowth
from prune_lab.families.sparse_training import BY_SIGN, REDISTRIBUTION


class RigL(GradientGrowth):
    card = Card(
        summary="sparse from the start; every interval the smallest weights move to the largest gradients",
        paper="Evci, Gale, Menick, Castro, Elsen 2020, Rigging the Lottery: Making All Tickets Winners, "
        "arXiv 1911.11134",
        acts="during training, every method.interval steps until method.end of it",
        eligible="weights of convolutions and linear layers; depthwise ones only if included (RigL 4.1.2)",
        cost="one bool per weight; a dense weight gradient on update steps; two selections per layer and update",
        differences="ranks by exact index instead of adding 1e-5 noise; t counts update steps too (alg. 1), where the "
        "official code draws an extra batch; Adam's shared step counter is not restarted for grown weights. "
        f"{REDISTRIBUTION}. {BY_SIGN}",
    )
