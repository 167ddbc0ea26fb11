"""SET on the ITOP schedule: few, well-informed updates until the end of training."""

from __future__ import annotations

from prune_lab.core.card import Card
from prune_lab.families.random_growth import RandomGrowth
from prune_lab.families.sparse_training import BY_SIGN


class SETITOP(RandomGrowth):
    published_interval = 1500
    card = Card(
        summary="SET with long intervals and updates until the end, so that more positions are tried (R_s)",
        paper="Liu, Yin, Mocanu, Pechenizkiy 2021, Do We Actually Need Dense Over-Parameterization? In-Time "
        "Over-Parameterization in Sparse Training, arXiv 2102.02887",
        acts="during training, after the optimizer step, every method.interval steps until the end",
        eligible="weights of convolutions and linear layers; depthwise ones only if included",
        cost="that of SET",
        differences="floor instead of ceil for the moved count; exact counts, where the official code drops by a "
        "threshold and ties go together. An update follows the optimizer step of its batch in both; the official code "
        "also multiplies the momentum by the mask after every step, here new weights start with zero momentum, the "
        f"same for them. {BY_SIGN}",
    )
