"""Text: which files count, how they are encoded, and that batches read every symbol in order."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from prune_lab import datasets
from prune_lab.datasets import text_files
from prune_lab.datasets.base import BatchFormat
from prune_lab.datasets.task import IGNORED
from prune_lab.foundations.errors import UserError
from tests.helpers.runs import compose
from tests.helpers.text import options, write_text

CPU = BatchFormat(torch.device("cpu"), torch.float32, channels_last=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text")


def config(folder: Path, *changes: str, unit: str = "byte"):
    return compose(*options(folder, unit=unit), *changes).dataset


def loaded(folder: Path, *changes: str, unit: str = "byte"):
    return datasets.load(config(folder, *changes, unit=unit), CPU)


def packed(folder: Path, target: Path, mode: str) -> Path:
    with tarfile.open(target, mode) as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, arcname=f"inside/{path.name}")
        hidden = tarfile.TarInfo("inside/._wiki.train.tokens")
        archive.addfile(hidden, io.BytesIO())
    return target


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_a_tar_with_a_folder_inside_is_the_folder(folder: Path, tmp_path: Path, mode: str) -> None:
    assert text_files.read_splits(packed(folder, tmp_path / "text.tar", mode)) == text_files.read_splits(folder)


def test_words_are_numbered_by_first_appearance_and_lines_end() -> None:
    splits = {"train": b"a b  a\n\nc <unk>\n", "valid": b"c d\n", "test": b"b"}
    coded, vocabulary = text_files.as_words(splits)
    assert vocabulary == ["a", "b", "<eos>", "c", "<unk>"]
    assert coded["train"].tolist() == [0, 1, 0, 2, 2, 3, 4, 2]
    assert coded["valid"].tolist() == [3, 4, 2] and coded["test"].tolist() == [1, 2]


def test_bytes_are_themselves(folder: Path) -> None:
    text = loaded(folder)
    assert bytes(text._symbols["train"]) == (folder / "wiki.train.tokens").read_bytes()
    assert text.info.num_classes == 256 and text.info.task.unit == "bytes"


@pytest.mark.parametrize(("break_it", "message"), [
    (lambda folder: (folder / "wiki.test.tokens").unlink(), "has no file for test; expected: a folder or a tar"),
    (lambda folder: (folder / "old.train.txt").write_text("x"), "has several files for train (old.train.txt, wiki.tr"),
    (lambda folder: (folder / "wiki.valid.tokens").write_bytes(b"caf\xe9"), "is not UTF-8 text (byte 3)"),
    (lambda folder: (folder / "wiki.valid.tokens").write_bytes(b""), "wiki.valid.tokens is empty"),
])  # fmt: skip
def test_a_missing_doubled_or_unreadable_file_is_named(folder: Path, break_it, message: str) -> None:
    break_it(folder)
    with pytest.raises(UserError) as refusal:
        loaded(folder)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_nothing_there_and_no_tar_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; expected: a folder or a tar"):
        text_files.read_splits(tmp_path / "none")
    (tmp_path / "text.tar").write_bytes(b"no tar")
    with pytest.raises(UserError, match="is damaged or no tar"):
        text_files.read_splits(tmp_path / "text.tar")


def test_a_word_that_train_lacks_needs_unk(folder: Path) -> None:
    (folder / "wiki.valid.tokens").write_text("the jester\n")
    with pytest.raises(UserError, match="'jester' of valid is no word of train, and train has no <unk>"):
        loaded(folder, unit="word")


def test_longer_sequences_and_larger_batches_than_the_text_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.sequence_length=100000 is longer than the text for training"):
        loaded(folder, "dataset.sequence_length=100000")
    with pytest.raises(UserError, match="batch_size"):
        loaded(folder).num_batches(100_000)


@pytest.mark.parametrize("unit", ["byte", "word"])
def test_rows_of_an_epoch_are_the_text_in_order(folder: Path, unit: str) -> None:
    text = loaded(folder, unit=unit)
    symbols, steps = np.asarray(text._symbols["train"]).astype(np.int64), text.num_batches(8)
    batches = list(text.train_batches(epoch=0, batch_size=8, start=0, seed=0, rank=0, world_size=1))
    assert len(batches) == steps == text.info.num_train // 8
    inputs, targets = (torch.cat(part, dim=1) for part in zip(*batches, strict=True))
    length = steps * text.info.sequence_length
    for row in range(8):
        assert inputs[row].tolist() == symbols[row * length:(row + 1) * length].tolist()
        assert targets[row].tolist() == symbols[row * length + 1:(row + 1) * length + 1].tolist()


def test_ranks_share_the_rows_and_a_start_leaves_the_first_batches_out(folder: Path) -> None:
    text = loaded(folder)
    sizes = {"epoch": 0, "batch_size": 8, "seed": 0}
    whole = list(text.train_batches(**sizes, start=0, rank=0, world_size=1))
    parts = [list(text.train_batches(**sizes, start=3, rank=rank, world_size=2)) for rank in (0, 1)]
    for index, (first, second) in enumerate(zip(*parts, strict=True)):
        assert torch.equal(torch.cat([first[0], second[0]]), whole[3 + index][0])


@pytest.mark.parametrize(("streams", "world_size"), [(1, 1), (4, 1), (4, 3), (7, 2), (2, 3)])
@pytest.mark.parametrize("split", ["val", "test"])
def test_an_evaluation_predicts_every_symbol_once(folder: Path, split: str, streams: int, world_size: int) -> None:
    text = loaded(folder, f"dataset.eval_streams={streams}")
    rows: list[torch.Tensor] = []
    for rank in range(world_size):
        batches = list(text.eval_batches(split, 99, rank=rank, world_size=world_size))
        rows += list(torch.cat([targets for _, targets in batches], dim=1)) if batches else []
    found = torch.cat([row[row != IGNORED] for row in rows])
    symbols = np.asarray(text._symbols["valid" if split == "val" else "test"])
    assert found.tolist() == symbols[1:].tolist()
    assert len(found) == (text.info.num_val if split == "val" else text.info.num_test)


def test_a_damaged_copy_is_encoded_again_and_content_is_the_text_s(folder: Path, tmp_path: Path, caplog) -> None:
    cache = tmp_path / "cache"
    before = loaded(folder, f"dataset.cache_dir={cache}")
    (entry,) = (path for path in cache.iterdir() if path.is_dir())
    (entry / "valid.npy").write_bytes((entry / "valid.npy").read_bytes()[:-1] + b"?")
    with caplog.at_level("WARNING", "prune_lab.datasets.text_cache"):
        again = loaded(folder, f"dataset.cache_dir={cache}")
    assert "is damaged; encoding again" in caplog.text and again.fingerprint == before.fingerprint
    assert datasets.content(config(folder, f"dataset.cache_dir={cache}")) == before.content
    (folder / "wiki.test.tokens").write_text("another text\n")
    other = loaded(folder, f"dataset.cache_dir={cache}")
    assert other.content != before.content and other.fingerprint != before.fingerprint
