"""The folder of an analysis: done once, read afterwards, shared by processes that want the same."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from prune_lab.commands.analysis.output import ResultFolder
from prune_lab.foundations.errors import UserError
from prune_lab.pipeline import store


def folder_at(path: Path, **inputs: int) -> ResultFolder:
    runs = [SimpleNamespace(name="run", digest="d", directory=path / "run")]
    return ResultFolder.of("connect", runs, inputs, chosen=str(path / "analysis"))


def unwanted() -> dict:
    raise AssertionError("done twice")


def test_work_is_done_once_and_read_afterwards(tmp_path):
    said: list[str] = []
    first = folder_at(tmp_path).settle([], lambda: {"rho": 0.5, "worst": float("inf")}, report=said.append)
    again = folder_at(tmp_path).settle([], unwanted, report=said.append)
    assert first[0] == again[0] and first[0]["rho"] == 0.5 and first[0]["worst"] is None
    assert (first[1], again[1]) == (False, True)
    assert said == [f"done already: {tmp_path / 'analysis'}"]


def test_a_call_that_waited_for_another_one_reads_its_result(tmp_path, monkeypatch):
    real = store.lock

    @contextlib.contextmanager
    def lock(*arguments, **kwargs):
        monkeypatch.setattr(store, "lock", real)
        folder_at(tmp_path).settle([], lambda: {"rho": 0.25}, report=print)  # the other process was faster
        yield

    monkeypatch.setattr(store, "lock", lock)
    result, known = folder_at(tmp_path).settle([], unwanted, report=print)
    assert known and result["rho"] == 0.25


def test_what_failed_is_not_taken_for_done(tmp_path):
    with pytest.raises(AssertionError, match="done twice"):
        folder_at(tmp_path).settle([], unwanted, report=print)
    assert folder_at(tmp_path).settle([], lambda: {"rho": 1.0}, report=print)[1] is False


def test_a_folder_of_other_inputs_is_refused(tmp_path):
    folder_at(tmp_path, seed=0).settle([], dict, report=print)
    with pytest.raises(UserError, match="analysis holds another analysis"):
        folder_at(tmp_path, seed=1)


def test_a_folder_that_cannot_be_made_names_the_option():
    nowhere = Path("/proc")  # nobody makes folders there
    with pytest.raises(UserError, match="cannot make the folder /proc/analysis: .*; --output FOLDER names another"):
        folder_at(nowhere).settle([], dict, report=print)
