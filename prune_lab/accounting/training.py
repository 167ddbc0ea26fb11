"""MACs of training: counted while a run trains, and planned before it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from torch import Tensor

from prune_lab.accounting.costs import LayerCost, dense_macs, sparse_macs
from prune_lab.accounting.device_counts import DeviceCounts
from prune_lab.config.run import RunConfig


class TrainingCost:
    """MACs spent on training so far, over all images and processes."""

    def __init__(self) -> None:
        self.images = 0
        self._macs = DeviceCounts({"total": 0, "forward": 0})

    @property
    def total(self) -> int:
        return self._macs.read()["total"]

    @total.setter
    def total(self, value: int) -> None:
        self._macs.add({"total": value - self.total})

    @property
    def forward(self) -> int:
        """MACs of the forward passes alone."""
        return self._macs.read()["forward"]

    @property
    def mean_forward(self) -> float | None:
        """MACs per image of the networks trained so far, on average; None before the first step."""
        return self.forward / self.images if self.images else None

    def add(self, images: int, forward: int | Tensor, dense_gradient: int | None = None) -> None:
        """Add one step; a number that is still on the device is read with the sums.

        Args:
            images: images of the step over all processes.
            forward: MACs per image of the network as masked in this step.
            dense_gradient: MACs of the dense network if gradients of pruned weights were needed, else None.

        Source: Evci et al. 2020, appendix H, arXiv 1911.11134: 3 f_S, and 2 f_S + f_D with the dense gradient.
        """
        self.images += images
        step = images * (2 * forward + (forward if dense_gradient is None else dense_gradient))
        self._macs.add({"total": step, "forward": images * forward})

    def state_dict(self) -> dict[str, int]:
        return {"images": self.images} | self._macs.read()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.images = state["images"]
        self._macs = DeviceCounts({name: state[name] for name in self._macs.names})


def planned_training_macs(
    costs: Sequence[LayerCost],
    layout: Sequence[tuple[int, Mapping[str, int]]],
    *,
    last_step: int,
    units_per_step: int,
    dense_steps: Sequence[int],
    first_step: int = 0,
) -> int:
    """Return the MACs of a training phase whose masks are known beforehand.

    Args:
        first_step, last_step: the phase runs the steps from `first_step` up to `last_step` - 1 of its schedule.
        layout: (first step, kept weights per parameter) in order, as from Method.layout.
        dense_steps: the steps that need gradients of pruned weights, ascending.
    """
    cost, dense = TrainingCost(), dense_macs(costs)
    starts = [min(max(start, first_step), last_step) for start, _ in layout] + [last_step]
    for (_, kept), start, end in zip(layout, starts[:-1], starts[1:], strict=True):
        forward = sparse_macs(costs, kept)
        num_dense = bisect_left(dense_steps, end) - bisect_left(dense_steps, start)
        cost.add(units_per_step * (end - start - num_dense), forward)
        cost.add(units_per_step * num_dense, forward, dense)
    return cost.total


def rigl_training_ratio(sparse: int, dense: int, interval: int) -> float:
    """Return RigL's training cost over dense training by its paper's formula, which assumes updates until the end.

    Source: Evci et al. 2020, appendix H, arXiv 1911.11134: (3 f_S dT + 2 f_S + f_D) / (3 f_D (dT + 1)).
    """
    return (3 * sparse * interval + 2 * sparse + dense) / (3 * dense * (interval + 1))


def training_macs(config: RunConfig, forward: int, steps_per_epoch: int, *, units_per_row: int = 1) -> int:
    """Return the MACs of training a fixed network once over the schedule's train phase.

    The phase has its configured length, even if method.match_by=epochs has stretched it.

    Args:
        forward: MACs per unit (image, symbol) of the network, dense or masked; training costs 3 times as much.
        units_per_row: see DatasetInfo.
    """
    epochs = config.matched.configured_epochs if config.matched else config.schedule.phase("train").epochs
    limit = config.trainer.limit_train_batches
    steps = steps_per_epoch if limit is None else min(steps_per_epoch, limit)
    return 3 * forward * epochs * steps * config.schedule.batch_size * units_per_row
