"""Text in three files, train, valid and test: found, read, turned into numbers."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from prune_lab.foundations.errors import UserError

SPLITS = ("train", "valid", "test")
LAYOUT = ("a folder or a tar (also .gz, .xz, .bz2) with three UTF-8 text files whose names hold train, valid and test, "
          "such as wiki.train.tokens, one folder deep at most")  # fmt: skip
UNKNOWN, END = "<unk>", "<eos>"


def read_splits(source: Path) -> dict[str, bytes]:
    """Return the content of the file of each of SPLITS.

    Raises:
        UserError: nothing at `source`, a split without a file or with several, a damaged tar, text that is not UTF-8.
    """
    if not source.exists():
        raise UserError(f"dataset.root={source} does not exist; expected: {LAYOUT}", "dataset.root")
    found: dict[str, dict[str, bytes]] = {split: {} for split in SPLITS}
    for name, content in _folder(source) if source.is_dir() else _tar(source):
        for split in SPLITS:
            if split in name.rpartition("/")[2].lower():
                found[split][name] = content
    for split, files in found.items():
        if len(files) != 1:
            what = f"several files for {split} ({', '.join(sorted(files))})" if files else f"no file for {split}"
            raise UserError(f"dataset.root={source} has {what}; expected: {LAYOUT}", "dataset.root")
    splits = {split: files.popitem() for split, files in found.items()}
    for name, content in splits.values():
        _check_utf8(f"{source}: {name}", content)
    return {split: content for split, (_, content) in splits.items()}


def _folder(source: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted([*source.glob("*"), *source.glob("*/*")]):
        name = path.relative_to(source).as_posix()
        if _counts(name) and path.is_file():
            yield name, path.read_bytes()


def _tar(source: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isfile() and _counts(member.name) else None
                if file is not None:
                    yield member.name, file.read()
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{source} is damaged or no tar ({error}); expected: {LAYOUT}", "dataset.root") from error


def _counts(name: str) -> bool:
    """Return whether a file is the data's: not hidden, one folder deep at most, named for a split."""
    parts = name.removeprefix("./").split("/")
    is_hidden = any(part.startswith(".") for part in parts)
    return len(parts) <= 2 and not is_hidden and any(split in parts[-1].lower() for split in SPLITS)


def _check_utf8(name: str, content: bytes) -> None:
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text (byte {error.start})", "dataset.root") from error
    if not content:
        raise UserError(f"{name} is empty", "dataset.root")


def as_bytes(splits: dict[str, bytes]) -> dict[str, np.ndarray]:
    """Return the numbers of the bytes, uint8 [bytes], per split."""
    return {split: np.frombuffer(content, dtype=np.uint8) for split, content in splits.items()}


def as_words(splits: dict[str, bytes]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the numbers of the words, int32 [words], per split, and the vocabulary.

    Words are what blanks separate; the end of each line is the word <eos>. The vocabulary is that of train, in order of
    first appearance; words of other splits that it lacks are <unk>.

    Raises:
        UserError: a word is not in train, and <unk> is not either.
    """
    numbers: dict[str, int] = {}
    coded = {}
    for split in SPLITS:
        words = _words(splits[split].decode())
        if split == "train":
            coded[split] = np.fromiter((numbers.setdefault(word, len(numbers)) for word in words), dtype=np.int32)
        else:
            coded[split] = np.fromiter(_known(words, numbers, split), dtype=np.int32)
    return coded, list(numbers)


def _words(text: str) -> Iterator[str]:
    for line in text.removesuffix("\n").split("\n"):
        yield from line.split()
        yield END


def _known(words: Iterable[str], numbers: dict[str, int], split: str) -> Iterator[int]:
    unknown = numbers.get(UNKNOWN)
    for word in words:
        number = numbers.get(word, unknown)
        if number is None:
            raise UserError(
                f"{word!r} of {split} is no word of train, and train has no {UNKNOWN}; use dataset.unit=byte",
                "dataset.unit",
            )
        yield number
