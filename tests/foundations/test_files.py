"""Files: replaced whole or not at all, also where a network stands between process and disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from prune_lab.foundations import files
from prune_lab.foundations.files import SaveError, move, read_bytes, read_json, write_bytes, write_json


def test_a_rename_that_was_done_although_its_answer_was_lost_is_no_error(tmp_path, monkeypatch):
    """NFS: the server renames, the answer is lost, the client asks again and is told that there is no such file."""
    real = os.replace

    def replace(source, target):
        real(source, target)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(source))

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(files.os, "replace", replace)
    write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize("target_exists", [False, True])
def test_a_rename_that_was_not_done_is_an_error(tmp_path, monkeypatch, target_exists):
    def replace(source, _target):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(source))

    (tmp_path / "a").write_text("new")
    if target_exists:
        (tmp_path / "b").write_text("another file")
    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(FileNotFoundError):
        move(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOENT])
def test_a_file_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch, number):
    write_json(tmp_path / "a.json", {"x": 1})
    real, calls = Path.read_bytes, []

    def read(path):
        calls.append(path)
        if len(calls) == 1:
            raise OSError(number, os.strerror(number))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    assert read_json(tmp_path / "a.json") == {"x": 1}


@pytest.mark.parametrize("number, calls_made", [(errno.ESTALE, 2), (errno.EIO, 1)])
def test_a_file_that_cannot_be_read_is_asked_for_twice_at_most(tmp_path, monkeypatch, number, calls_made):
    calls = []

    def read(path):
        calls.append(path)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "read_bytes", read)
    with pytest.raises(OSError, match=os.strerror(number)):
        read_bytes(tmp_path / "a")
    assert len(calls) == calls_made


def test_renames_are_written_out_with_their_directory(tmp_path, monkeypatch):
    real, synced = os.fsync, []

    def fsync(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    write_bytes(tmp_path / "a", b"x")
    assert synced == [f"a.{os.getpid()}.tmp", tmp_path.name]


@pytest.mark.parametrize("number, refused", [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_directory_that_cannot_be_written_out(tmp_path, monkeypatch, number, refused):
    real = os.fsync

    def fsync(descriptor):
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_dir():
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    if refused:
        with pytest.raises(SaveError, match="cannot write"):
            write_bytes(tmp_path / "a", b"x")
    else:
        write_bytes(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_text() == "x"
