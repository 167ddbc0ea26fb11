"""Phases on disk: records, finished results, damage, locks."""

from __future__ import annotations

import errno

import pytest

from prune_lab.core.phase_result import PhaseResult
from prune_lab.foundations.files import SaveError
from prune_lab.pipeline.store import PhaseStore, lock
from tests.helpers.runs import damage

RESULT = PhaseResult({}, masks=None, method={"step": 1}, widths=None, optimizer=None, figures={"top1": 50.0})


@pytest.fixture
def messages() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path, messages):
    """A phase's directory, held by its lock."""
    held = PhaseStore(tmp_path, "key", messages.append)
    with held.lock(what="phase", poll=lambda: None):
        held.begin(-1)
        yield held


def test_store_keeps_records_up_to_the_checkpoint_and_removes_leftovers(store):
    for epoch in (1, 2, 3):
        store.append({"epoch": epoch, "step": 4 * epoch})
    with open(store.directory / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 4, "st')
    (store.directory / "checkpoint.next.pt.123.tmp").write_bytes(b"half")
    assert [row["epoch"] for row in store.begin(2)] == [1, 2]
    assert [row["epoch"] for row in store.records()] == [1, 2]
    assert sorted(path.name for path in store.directory.iterdir()) == ["lock", "metrics.jsonl"]


def test_store_does_a_damaged_result_again(store, messages):
    store.finish(RESULT, {})
    assert store.load() == RESULT
    damage(store.directory / "result.pt", "flip")
    assert store.load() is None and store.load() is None
    assert "done again" in messages[0]


def test_store_does_a_phase_with_damaged_figures_again(store, messages):
    store.finish(RESULT, {})
    (store.directory / "phase.json").write_text('{"key": ')
    assert store.load() is None and "damaged" in messages[0]


def test_a_phase_counts_as_finished_only_when_all_is_written(store, monkeypatch):
    store.checkpoints.save({"step": 1})

    def full(path, _value):
        raise SaveError(errno.ENOSPC, f"cannot write {path}")

    monkeypatch.setattr("prune_lab.pipeline.store.write_json", full)
    with pytest.raises(SaveError):
        store.finish(RESULT, {})
    assert store.load() is None and store.checkpoints.load()["step"] == 1


def test_lock_is_exclusive_and_waiting_can_be_given_up(tmp_path):
    lines: list[str] = []

    class GivenUp(Exception):
        pass

    def give_up():
        raise GivenUp

    with lock(tmp_path / "lock", what="this", report=lines.append, poll=give_up):
        with pytest.raises(GivenUp):
            with lock(tmp_path / "lock", what="this", report=lines.append, poll=give_up):
                pass
    assert lines == ["waiting for another process that is working on this"]
    with lock(tmp_path / "lock", what="this", report=lines.append, poll=give_up):
        pass
