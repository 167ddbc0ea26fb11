"""Checkpoints: whole or not at all, checked when read, an older one always at hand."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prune_lab.foundations import checkpoint, files
from prune_lab.foundations.checkpoint import CheckpointPair, DamagedFile, SaveError
from tests.helpers.runs import damage


def state(step: int) -> dict:
    return {"step": step, "weight": torch.full((50,), float(step)), "nested": {"list": [1, 2.5, "text", None]}}


@pytest.fixture
def messages() -> list[str]:
    return []


@pytest.fixture
def pair(tmp_path, messages) -> CheckpointPair:
    return CheckpointPair(tmp_path, messages.append)


def test_what_is_saved_is_loaded(tmp_path):
    checkpoint.save(state(3), tmp_path / "a.pt")
    loaded = checkpoint.load(tmp_path / "a.pt")
    assert loaded["step"] == 3 and loaded["nested"] == state(3)["nested"]
    assert torch.equal(loaded["weight"], state(3)["weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("how", ["flip", "cut", "stub"])
def test_damage_is_detected(tmp_path, how):
    path = tmp_path / "a.pt"
    checkpoint.save(state(3), path)
    damage(path, how)
    with pytest.raises(DamagedFile, match="a.pt is damaged"):
        checkpoint.load(path)


def test_the_newest_of_several_is_loaded(pair):
    for step in (1, 2, 3):
        pair.save(state(step))
    assert pair.load()["step"] == 3
    assert checkpoint.load(pair.previous)["step"] == 2


def test_nothing_there_is_no_checkpoint(pair, messages):
    assert pair.load() is None and pair.last_good() is None and messages == []


def test_damaged_newest_is_reported_and_the_previous_one_used(pair, messages):
    pair.save(state(1))
    pair.save(state(2))
    damage(pair.newest, "flip")
    assert pair.load()["step"] == 1
    (message,) = messages
    assert str(pair.newest) in message and "damaged" in message and "the one before it is used" in message


def test_a_damaged_checkpoint_never_replaces_the_good_previous_one(pair):
    pair.save(state(1))
    pair.save(state(2))
    damage(pair.newest, "flip")
    pair.load()
    assert pair.last_good() == pair.previous
    pair.save(state(3))
    damage(pair.newest, "flip")
    assert pair.load()["step"] == 1


def test_both_damaged_begins_again_and_says_so(pair, messages):
    pair.save(state(1))
    pair.save(state(2))
    damage(pair.newest, "cut")
    damage(pair.previous, "stub")
    assert pair.load() is None
    assert len(messages) == 3 and "begins again" in messages[-1]


@pytest.mark.parametrize("renames_done", [0, 1])
def test_killed_between_the_renames_loses_nothing(pair, monkeypatch, renames_done):
    pair.save(state(1))
    pair.save(state(2))
    real, calls = os.replace, []

    def replace(source, target):
        if Path(target).parent == pair.newest.parent and "next" not in Path(target).name:
            if len(calls) == renames_done:
                raise KeyboardInterrupt  # stands for the kill: nothing after it runs
            calls.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        pair.save(state(3))
    monkeypatch.undo()
    assert pair.load()["step"] == 3
    pair.save(state(4))
    assert pair.load()["step"] == 4 and checkpoint.load(pair.previous)["step"] in (2, 3)


@pytest.mark.parametrize("refused", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, refused):
    path = tmp_path / "a.pt"
    checkpoint.save(state(1), path)

    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, refused, full)
    with pytest.raises(SaveError, match=r"cannot write .*a\.pt: No space left on device"):
        checkpoint.save(state(2), path)
    monkeypatch.undo()
    assert checkpoint.load(path)["step"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"]


def test_a_limit_of_the_system_is_met_while_writing(tmp_path):
    """A child that may write 20 kB per file saves a small state, then a large one."""
    program = """
import signal, sys, pathlib, torch
from prune_lab.foundations import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
pair = checkpoint.CheckpointPair(pathlib.Path(sys.argv[1]), print)
pair.save({"step": 1})
try:
    pair.save({"step": 2, "big": torch.zeros(100_000)})
except checkpoint.SaveError as error:
    print("refused:", error.strerror)
print("kept:", pair.load()["step"])
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "refused: cannot write" in done.stdout and "kept: 1" in done.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_remove_leaves_nothing(pair, tmp_path):
    pair.save(state(1))
    pair.save(state(2))
    checkpoint.save(state(3), tmp_path / "checkpoint.next.pt")
    pair.remove()
    assert list(tmp_path.iterdir()) == []
