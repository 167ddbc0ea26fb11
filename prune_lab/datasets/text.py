"""Text as streams of bytes or words, to be predicted symbol by symbol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from prune_lab.datasets import splits
from prune_lab.datasets.base import BatchFormat, DatasetInfo, Split
from prune_lab.datasets.task import IGNORED, LanguageModelling, Task
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import Count, FilePath, Name

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.datasets.text_cache import EncodedText

_FILES = {"val": "valid", "test": "test"}


@dataclass(frozen=True)
class Config:
    """Options of the data sets of text."""

    name: Name
    kind: str
    root: FilePath
    cache_dir: FilePath
    unit: Literal["byte", "word"]
    sequence_length: Count
    carry_state: bool
    eval_streams: Count

    def task(self) -> LanguageModelling:
        return LanguageModelling("bytes" if self.unit == "byte" else "words", self.carry_state)


@dataclass(frozen=True)
class TextInfo(DatasetInfo):
    """Sizes of a text: `num_classes` symbols, no images; `num_train` in sequences, the others in predicted symbols."""

    sequence_length: int = 1
    task: Task = field(default=LanguageModelling("bytes"), compare=False)

    @property
    def units_per_row(self) -> int:
        return self.sequence_length

    def lines(self) -> list[str]:
        unit = self.task.unit
        return [f"{self.num_train} training sequences of {self.sequence_length} {unit}, {self.num_val} validation and "
                f"{self.num_test} test {unit} of {self.num_classes} kinds"]  # fmt: skip


    def figures(self) -> dict[str, int]:
        unit = self.task.unit
        return {"data/num_train_sequences": self.num_train, f"data/num_val_{unit}": self.num_val,
                f"data/num_test_{unit}": self.num_test, "data/num_symbols": self.num_classes}  # fmt: skip


def describe(config: Config) -> TextInfo:
    """Return the sizes; the text is encoded, if it never was."""
    return _info(config, _encoded(config))


def content(config: Config) -> str:
    """Return the data set's `content`: the options do not fix the text."""
    return _encoded(config).content_hash


def load(config: Config, fmt: BatchFormat) -> TextDataset:
    """Return the text.

    Raises:
        UserError: no text at `root`, or less than a sequence.
    """
    return TextDataset(config, _encoded(config), fmt)


def _encoded(config: Config) -> EncodedText:
    from prune_lab.datasets.text_cache import cached

    return cached(Path(config.root), Path(config.cache_dir), unit=config.unit)


def _info(config: Config, text: EncodedText) -> TextInfo:
    predicted = {split: len(symbols) - 1 for split, symbols in text.symbols.items()}
    if predicted["train"] < config.sequence_length:
        raise UserError(
            f"dataset.sequence_length={config.sequence_length} is longer than the text for training, which has "
            f"{predicted['train'] + 1} {config.unit}s",
            "dataset.sequence_length",
        )
    return TextInfo(
        num_classes=text.num_symbols, image_size=0, num_train=predicted["train"] // config.sequence_length,
        num_val=predicted["valid"], num_test=predicted["test"], task=config.task(),
        sequence_length=config.sequence_length,
    )  # fmt: skip


class TextDataset:
    """Batches [rows, time] of symbols and of those that follow them, int64; row r of a batch continues row r before.

    Training cuts the text into `num_train` sequences. Row r of the batches of an epoch reads the r-th of `batch_size`
    equal parts of them in order. What is left over, less than a sequence per row, is not used.
    """

    eval_split: Split = "val"

    def __init__(self, config: Config, text: EncodedText, fmt: BatchFormat) -> None:
        self.info = _info(config, text)
        self.fingerprint = f"{text.content_hash} {config.unit}"
        self.content: str | None = text.content_hash
        self._length, self._streams = config.sequence_length, config.eval_streams
        self._symbols, self._device = text.symbols, fmt.device

    def num_batches(self, batch_size: int) -> int:
        return splits.count_batches(self.info.num_train, batch_size)

    def train_batches(
        self, *, epoch: int, batch_size: int, start: int, seed: int, rank: int, world_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's rows of the batches `start`, `start` + 1, ...; the same in every epoch."""
        steps = self.num_batches(batch_size)
        rows = np.arange(batch_size)[splits.batch_shard(batch_size, rank=rank, world_size=world_size)]
        for step in range(start, steps):
            yield self._cut("train", (rows * steps + step) * self._length)

    def eval_batches(
        self, split: Split, batch_size: int, *, rank: int, world_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the split in `eval_streams` rows side by side, whatever `batch_size`: where rows begin changes figures.

        Targets behind the end of the text are IGNORED.
        """
        file = _FILES[split]
        steps = -(-(len(self._symbols[file]) - 1) // (self._streams * self._length))
        rows = np.array(splits.eval_range(self._streams, rank=rank, world_size=world_size))
        for step in range(steps) if len(rows) else ():
            yield self._cut(file, (rows * steps + step) * self._length)

    def _cut(self, file: str, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the sequences that begin at `starts`, and what follows each symbol."""
        symbols, length = self._symbols[file], self._length
        whole = np.full((len(starts), length + 1), IGNORED, dtype=np.int64)
        for row, start in enumerate(starts.tolist()):
            part = symbols[start:start + length + 1]
            whole[row, :len(part)] = part
        batch = torch.from_numpy(whole).to(self._device, non_blocking=True)
        return batch[:, :-1].clamp(min=0), batch[:, 1:]

    def train_subset(self, batches: Sequence[Tensor], *, augment_seed: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the training sequences whose numbers each of `batches` lists."""
        for batch in batches:
            yield self._cut("train", batch.numpy() * self._length)

    def close(self) -> None:
        """Nothing to release."""


def random_batch(info: Any, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a batch of random symbols."""
    symbols = torch.randint(info.num_classes, (rows, info.sequence_length + 1), device=device)
    return symbols[:, :-1], symbols[:, 1:]
