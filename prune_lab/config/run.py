"""All options of one run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from prune_lab.config.logger import LoggerConfig
from prune_lab.config.optimizer import OptimizerConfig
from prune_lab.config.paper import PaperConfig
from prune_lab.config.schedule import ScheduleConfig
from prune_lab.config.trainer import TrainerConfig
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.home import without_home
from prune_lab.foundations.schema import FilePath

if TYPE_CHECKING:
    from prune_lab.config.matched import Matched


@dataclass(frozen=True)
class RunConfig:
    """The options of one run: records of plain values, one per group of conf/."""

    model: Any
    dataset: Any
    method: Any
    """options of the method, a MethodConfig"""
    method_target: str
    """dotted name of the method's class: `_target_` in its file"""
    schedule: ScheduleConfig
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    logger: LoggerConfig
    seed: int
    output_dir: FilePath
    dry_run: bool
    overrides: tuple[str, ...] = ()
    """the command's options as typed, for the record"""
    paper: PaperConfig | None = None
    """published numbers to compare with, from a recipe"""
    matched: Matched | None = None
    """how the budget was solved, with method.match; `method` and `schedule` hold the outcome"""

    def require_training(self, what: str) -> None:
        """Reject a schedule whose block `train` has no epochs.

        Args:
            what: the option that needs them, as typed, and why.

        Raises:
            UserError: `what` is incompatible with schedule.train.epochs=0.
        """
        if self.schedule.train.epochs == 0:
            raise UserError(f"schedule.train.epochs=0 does not go with {what}", "schedule.train.epochs")

    def require_trained(self, option: str) -> None:
        """Reject pruning an untrained network: no epochs in the block `train`, and no start weights.

        Raises:
            UserError: naming `option`, as typed.
        """
        if self.model.weights is None:
            self.require_training(f"{option}, which needs a trained network; train it, or give model.weights")


def as_mapping(config: RunConfig) -> dict[str, Any]:
    """Return the options as Hydra composes them: plain containers by group, home folders as ~."""
    options = asdict(config)
    for key in ("overrides", "matched"):
        del options[key]
    target = options.pop("method_target")
    mapping: dict[str, Any] = without_home(options | {"method": {"_target_": target} | options["method"]})
    return mapping
