"""A small text in the layout of WikiText, and runs on it."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = ("the", "king", "is", "dead", "long", "live", "queen", "and", "her", "fool")


def write_text(folder: Path, *, train: int = 400, valid: int = 60, test: int = 80) -> Path:
    """Write so many words per split, in lines of ten, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    source = random.Random(0)
    for split, count in (("train", train), ("valid", valid), ("test", test)):
        words = [source.choice(WORDS) for _ in range(count)]
        lines = [" ".join(words[first:first + 10]) for first in range(0, count, 10)]
        (folder / f"wiki.{split}.tokens").write_text("\n".join(lines) + "\n")
    return folder


def options(folder: Path, *, model: str = "gru_lm", unit: str = "byte") -> tuple[str, ...]:
    """Return the options of a run of a few seconds on the text in `folder`."""
    return (
        "dataset=text", f"dataset.root={folder}", f"dataset.cache_dir={folder.parent}/cache", f"dataset.unit={unit}",
        "dataset.sequence_length=12", "dataset.eval_streams=4", f"model={model}", "model.embedding=8",
        "model.hidden=12", *(["model.readout=[10,8]"] if model == "gru_lm" else ["model.readout=[8]"]),
        "optimizer=adam", "schedule.batch_size=8", "schedule.train.lr=0.01", "schedule.train.epochs=2",
        "schedule.finetune.epochs=1", "trainer.device=cpu", "trainer.precision=fp32", "logger.wandb=disabled",
    )  # fmt: skip
