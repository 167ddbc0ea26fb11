"""Remove the filters with the smallest L1 norm from a trained network, then fine-tune."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prune_lab.core.card import Card
from prune_lab.families.channel_pruning import ChannelPruning
from prune_lab.pruning.channels import filter_scores

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.core.context import Context
    from prune_lab.pruning.channels.groups import ChannelMap


class L1Filter(ChannelPruning):
    card = Card(
        summary="train dense, remove the filters with the smallest sum of absolute weights, fine-tune",
        paper="Li, Kadav, Durdanovic, Samet, Graf 2017, Pruning Filters for Efficient ConvNets, arXiv 1608.08710",
        acts="once, between dense training and fine-tuning; the fine-tuning trains the smaller network",
        eligible="output channels of convolutions and hidden linear layers; channels that an addition ties go together "
        "(method.residual) by the mean of the norms of all filters that write them",
        cost="one pass over the weights; fine-tuning costs what the smaller network costs",
        differences="the paper prunes the first convolution of each residual block only, per stage and without some "
        "sensitive layers: residual=false with layer_channels and exclude. Budgets of MACs or parameters, scope=global "
        "(norms divided by their layer's mean) and depthwise networks are this program's",
    )

    def scores(self, context: Context, channels: ChannelMap) -> Tensor:
        return filter_scores.per_class(context.model, channels, filter_scores.l1_norms)
