"""A method's view of its run: the model, its masks, its optimizer, the schedule and the cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prune_lab.accounting.costs import masked_macs
from prune_lab.accounting.eligibility import sparsity
from prune_lab.accounting.network import LayeredNetwork, Network
from prune_lab.accounting.training import TrainingCost
from prune_lab.foundations import distributed
from prune_lab.foundations.seeding import generator
from prune_lab.pruning.masks.history import MaskHistory
from prune_lab.pruning.masks.mask_set import MaskSet

if TYPE_CHECKING:
    from prune_lab.config.schedule import PhaseSchedule
    from prune_lab.core.phase_result import PhaseResult


@dataclass
class Context(LayeredNetwork):
    """A running phase. Methods read all of it and change `model` and masks only through the functions below."""

    phase: str
    seed: int
    total_steps: int
    """optimizer steps of the phase's schedule, 0 for a phase without training"""
    steps_per_epoch: int
    first_step: int = 0
    """step of the schedule at which the phase starts"""
    last_step: int | None = None
    """step of the schedule before which the phase ends; None: `total_steps`"""
    schedule: PhaseSchedule | None = None
    """learning rates of the phase, None for a phase without training"""
    block: str | None = None
    """name of the block of options that `schedule` comes from, such as finetune"""
    origin: PhaseResult | None = None
    """result of the earlier phase that the chain names as origin"""
    optimizer_state: dict[str, Any] | None = None
    """initial state of the next phase's optimizer; None: fresh"""
    dataset: Any = None
    """the training images, for methods that score weights on them (see images.batches)"""
    fresh_model: Callable[[str], nn.Module] | None = None
    """returns the network with fresh initial weights, drawn from the seed and the given key"""
    poll: Callable[[], None] = lambda: None
    """to be called regularly in long work outside the training loop: stops the run if a signal requested it"""
    validating: bool = False
    """True in a dry run: repeated work is done once, and its results are discarded"""
    widths: dict[str, list[int]] | None = None
    """sizes of a network whose channels were removed (see surgery.Widths); None: as its options build it"""
    removes_channels: bool = False
    """True: masks represent channels until a phase of the chain has removed them"""
    masks: MaskSet | None = None
    history: MaskHistory | None = None
    """history of the masks in this phase"""
    optimizer: torch.optim.Optimizer | None = None
    cost: TrainingCost = field(default_factory=TrainingCost)
    report: Callable[[str], None] = lambda text: None
    amp_scaled: bool = False
    """True under fp16, where a gradient may overflow, which skips the step"""

    def __post_init__(self) -> None:
        self._named: tuple[nn.Module, Mapping[str, nn.Parameter]] | None = None
        self._macs: int | Tensor | None = None
        if self.last_step is None:
            self.last_step = self.total_steps

    @property
    def network(self) -> Network:
        """The part of a run that components of methods need: the network, its layers and their costs."""
        return Network(self.model, self.layers, self.costs, self.dataset.info.image_size)

    @property
    def forward_macs(self) -> int:
        """MACs per image of the network under the masks of the last `commit`."""
        self._macs = int(self.forward_macs_without_waiting())
        return self._macs

    def forward_macs_without_waiting(self) -> int | Tensor:
        """Return `forward_macs`, as an int64 tensor on the device if the host would have to wait for the number."""
        if self._macs is None:
            self._macs = self.dense_macs if self.masks is None else masked_macs(self.costs, self.masks.kept)
        return self._macs

    @property
    def sparsity(self) -> float | None:
        """Fraction of zeros among the eligible weights; None without masks, and where masks represent channels."""
        if self.masks is None or (self.removes_channels and self.widths is None):
            return None
        return sparsity(self.layers, self.masks.counts())

    def mask_figures(self) -> dict[str, float]:
        """Return the figures on the masks for a record: sparsity, if defined, and their history."""
        assert self.masks is not None and self.history is not None
        sparsity, figures = self.sparsity, self.history.figures(self.masks.masks)
        return figures if sparsity is None else {"sparsity": sparsity} | figures

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the network's parameters by path; cached, because finding them walks over all modules."""
        if self._named is None or self._named[0] is not self.model:
            self._named = self.model, MappingProxyType(dict(self.model.named_parameters()))
        return self._named[1]

    def generator(self, *keys: Any) -> torch.Generator:
        """Return a generator keyed by the seed, the phase and `keys`: the same draws on every process."""
        return generator(self.seed, self.phase, *keys)

    def install_masks(self, masks: dict[str, Tensor]) -> None:
        """Take `masks` (parameter path -> bool, True = kept) as the network's masks and zero the rest."""
        named = self.parameters()
        self.masks = MaskSet({name: named[name] for name in masks}, masks)
        self.commit()

    def unmask(self) -> None:
        """Continue without masks, with the network's current weights."""
        self.masks = self.history = self._macs = None

    def commit(self, *, compare: bool = True) -> None:
        """Apply changed masks: zero weights, recount the cost, record the history, compare processes.

        Args:
            compare: False for masks that change in every step, where comparing would take longer than the step.

        Raises:
            RuntimeError: masks differ between processes.
        """
        assert self.masks is not None
        self.masks.apply()
        self._macs = None
        if self.history is None:
            self.history = MaskHistory(self.masks.masks)
        else:
            self.history.observe(self.masks.masks)
        if compare and distributed.world_size() > 1:
            distributed.assert_same(self.masks.digest(), "masks")
