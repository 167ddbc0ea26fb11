"""The interface between every data set and the loop, and the options all data sets share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypedDict

from prune_lab.datasets.task import Classification, Task
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import Count, Index, Name, Positive, Range

if TYPE_CHECKING:
    import torch

Split = Literal["val", "test"]


@dataclass(frozen=True)
class BatchFormat:
    """Device and format of the images of a batch."""

    device: torch.device
    dtype: torch.dtype
    """Floating-point type of the images, normally the training type."""
    channels_last: bool
    """Memory format of the images; their shape is [b, 3, H, W] in both cases."""


class Sizes(TypedDict):
    """Sizes of a network that the data determine, named as the arguments of functions that build one."""

    num_classes: int
    image_size: int
    """height and width in pixels"""


@dataclass(frozen=True)
class DatasetInfo:
    """Sizes that the model and the plan depend on."""

    num_classes: int
    image_size: int
    """Height and width in pixels."""
    num_train: int
    """Images trained on, after the held-out validation images are taken out."""
    num_val: int
    """Images held out of training; 0: none."""
    num_test: int
    note: str = field(default="", compare=False)
    """One line on unusual files and classes, "" if there are none."""
    task: Task = field(default=Classification(), compare=False)

    @property
    def sizes(self) -> Sizes:
        """Sizes of a network that the data determine."""
        return {"num_classes": self.num_classes, "image_size": self.image_size}

    @property
    def units_per_row(self) -> int:
        """What one row of a batch counts as, in units of the task: 1 image, or the symbols of a sequence."""
        return 1

    @property
    def num_eval(self) -> int:
        """Images of the split that runs are evaluated on (`Dataset.eval_split`)."""
        return self.num_val or self.num_test

    def lines(self) -> list[str]:
        """Return the sizes as text, and the note if there is one."""
        counts = {"training": self.num_train, "validation": self.num_val, "test": self.num_test}
        *first, last = (f"{count} {split}" for split, count in counts.items() if split != "validation" or count)
        sizes = f"{', '.join(first)} and {last} images of {self.num_classes} classes"
        return [sizes, *filter(None, [self.note])]

    def figures(self) -> dict[str, int]:
        """Return the sizes under their keys in a run's summary."""
        held_out = {"data/num_val": self.num_val} if self.num_val else {}
        counts = {"data/num_train": self.num_train, **held_out, "data/num_test": self.num_test}
        return counts | {"data/num_classes": self.num_classes}


class Dataset(Protocol):
    """Batches of normalised images [b, 3, H, W] and int64 labels [b] on the training device."""

    info: DatasetInfo
    fingerprint: str
    """Hash of everything about the data that can change a result: images, labels, split, preparation."""
    content: str | None
    """Identifies the data among others with the same options, for directory names; None: the options suffice."""
    eval_split: Split
    """"val" where training images are held out, otherwise "test"."""

    train_labels: torch.Tensor
    """int64 [num_train] on the CPU"""

    def num_batches(self, batch_size: int) -> int:
        """Return the number of batches per epoch; the last partial batch is dropped."""

    def train_batches(
        self, *, epoch: int, batch_size: int, start: int, seed: int, rank: int, world_size: int
    ) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Yield this rank's shard of the global batches `start`, `start` + 1, ... of `epoch`.

        Order and augmentation depend on `seed`, `epoch` and the position in the epoch only. So the shards
        of all ranks together are the batch of a single process.

        Raises:
            UserError: `batch_size` exceeds the training images or is no multiple of `world_size`.
        """

    def eval_batches(
        self, split: Split, batch_size: int, *, rank: int, world_size: int
    ) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Yield every image of `split` exactly once over all ranks, in a fixed order, not augmented.

        Raises:
            UserError: `split` is "val" and no training images are held out.
        """

    def train_subset(
        self, batches: Sequence[torch.Tensor], *, augment_seed: int | None
    ) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the training images at the positions listed in each element of `batches`, the same on all ranks.

        Args:
            batches: positions in `train_labels`, one tensor per batch.
            augment_seed: draws crops and flips; None: as for evaluation.
        """

    def close(self) -> None:
        """Release workers and memory."""


@dataclass(frozen=True)
class CommonConfig:
    """Options of every data set (values: conf/dataset/*.yaml)."""

    name: Name
    kind: str
    image_size: Count
    """Height and width in pixels."""
    validation: Annotated[float, Range(0, 1, open_high=True)]
    """Fraction of the training images held out, stratified by class."""
    validation_seed: Index
    """Chooses which images are held out; independent of the run's seed."""
    augment: bool
    mean: list[float]
    """Per channel, pixels scaled to [0, 1]."""
    std: list[Positive]

    def check(self, path: str) -> None:
        for option in ("mean", "std"):
            values = getattr(self, option)
            if len(values) != 3:
                raise UserError(f"{path}.{option} must hold 3 numbers (one per channel), got {values}")

    def info(
        self, *, num_classes: int, num_train_images: int, num_test_images: int, note: str = ""
    ) -> DatasetInfo:
        """Return the sizes after `validation` of `num_train_images` is held out."""
        num_val = round(self.validation * num_train_images)
        return DatasetInfo(num_classes, self.image_size, num_train_images - num_val, num_val, num_test_images, note)


@dataclass(frozen=True)
class InMemoryConfig(CommonConfig):
    """Options of the data sets that fit into the memory of the training device."""

    crop_padding: Index
    """Black pixels added on each side before a random crop of `image_size`; 0: no random crop."""
    flip: bool
    """Mirror half of the training images."""


# Options for the location of the data and the speed of reading. They cannot change a result.
_NOT_IDENTITY = ("root", "cache_dir", "download", "workers", "check_counts")


def identity(config: CommonConfig) -> dict[str, Any]:
    """Return the options that can change a result: no paths, workers or checks."""
    return {key: value for key, value in asdict(config).items() if key not in _NOT_IDENTITY}
