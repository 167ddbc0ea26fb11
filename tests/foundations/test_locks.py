"""Locks: the kernel's, and the heartbeats that stand in for them on file systems without."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from prune_lab.foundations import locks
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.locks import HeartbeatLock, is_held, lock
from prune_lab.foundations.signals import stop_flag
from tests.helpers.runs import TINY, fork, fork_run, run_dir, wait_for


def refuse(number: int):
    def flock(*_arguments):
        raise OSError(number, os.strerror(number))

    return flock


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks; an owner counts as dead after one second."""
    monkeypatch.setattr(locks.fcntl, "flock", refuse(errno.ENOLCK))
    monkeypatch.setattr(locks, "STALE_S", 1.0)
    monkeypatch.setattr(locks, "BEAT_S", 0.3)
    monkeypatch.setattr(locks.time, "sleep", lambda _s, real=time.sleep: real(0.02))


def hold(path: Path, log: Path, name: str, seconds: float) -> int:
    """Hold the lock for a while; note when it was taken and when it is given back."""
    def note(text: str) -> None:
        with open(log, "a") as file:
            file.write(f"{name} {text}\n")

    with lock(path, what="this", report=lambda _line: None):
        note("begins")
        end = time.monotonic() + seconds
        while time.monotonic() < end:  # at work: only the heart's own thread can beat
            sum(range(1000))
        note("ends")
    return 0


def wait_until(condition, timeout_s: float = 30) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_once_and_waiting_can_be_given_up(tmp_path, monkeypatch, no_locks, number):
    monkeypatch.setattr(locks.fcntl, "flock", refuse(number))
    messages: list[str] = []

    def give_up() -> None:
        raise TimeoutError

    with lock(tmp_path / "lock", what="this", report=messages.append, poll=give_up):
        with pytest.raises(TimeoutError):
            with lock(tmp_path / "lock", what="this", report=messages.append, poll=give_up):
                pass
    assert messages == [f"{tmp_path} is on a file system without locks ({os.strerror(number)}); heartbeats stand in "
                        "for them"] * 2 + ["waiting for another process that is working on this"]  # fmt: skip
    begun = time.monotonic()
    with lock(tmp_path / "lock", what="this", report=messages.append, poll=give_up):
        assert time.monotonic() - begun < 0.5, "given back is free at once"


def test_another_error_of_the_lock_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(locks.fcntl, "flock", refuse(errno.EIO))
    with pytest.raises(UserError, match=r"output_dir: cannot lock .*/lock: Input/output error"):
        with lock(tmp_path / "lock", what="this", report=print):
            pass


def test_processes_take_turns_and_a_busy_owner_is_left_alone(tmp_path, no_locks):
    """Each holds the lock for longer than a dead owner is waited for, and computes all the while."""
    log = tmp_path / "log"
    children = [fork(tmp_path / "out", lambda n=name: hold(tmp_path / "lock", log, n, 1.7)) for name in "abc"]
    assert [wait_for(child) for child in children] == [0, 0, 0]
    order = [line.split()[0] for line in lines(log)]
    assert sorted(order[::2]) == ["a", "b", "c"] and order[::2] == order[1::2]
    assert [path.name for path in tmp_path.glob("lock.*")] == ["lock.3"]


def test_several_that_wait_for_a_killed_owner_do_not_get_its_lock_at_once(tmp_path, no_locks):
    log = tmp_path / "log"
    owner = fork(tmp_path / "out", lambda: hold(tmp_path / "lock", log, "killed", 60))
    wait_until(lambda: lines(log) == ["killed begins"])
    waiting = [fork(tmp_path / "out", lambda n=name: hold(tmp_path / "lock", log, n, 0.3)) for name in "abcd"]
    time.sleep(0.3)
    os.kill(owner, signal.SIGKILL)
    killed = time.monotonic()
    wait_for(owner)
    wait_until(lambda: len(lines(log)) > 1)
    assert time.monotonic() - killed > 0.6, "its last heartbeat was at most 0.3 s before"
    assert [wait_for(child) for child in waiting] == [0] * 4
    order = [line.split()[0] for line in lines(log)[1:]]
    assert sorted(order[::2]) == ["a", "b", "c", "d"] and order[::2] == order[1::2]


def test_an_owner_that_was_suspended_finds_itself_replaced_and_writes_nothing_more(tmp_path, no_locks):
    log = tmp_path / "log"

    def owner() -> int:
        with stop_flag() as stop, lock(tmp_path / "lock", what="this", report=print):
            log.write_text("begins\n")
            wait_until(stop)
            log.write_text("ends\n")
            return stop.exit_code

    child = fork(tmp_path / "out", owner)
    wait_until(lambda: lines(log) == ["begins"])
    os.kill(child, signal.SIGSTOP)
    with lock(tmp_path / "lock", what="this", report=print):
        os.kill(child, signal.SIGCONT)
        assert wait_for(child) == -signal.SIGKILL
    assert lines(log) == ["begins"]
    assert "was taken over by another process" in (tmp_path / "out").read_text()
    with lock(tmp_path / "lock", what="this", report=print, poll=lambda: pytest.fail("it was given back")):
        pass


def test_a_waiter_that_could_not_look_has_seen_no_silence(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(locks.time, "monotonic", lambda: now[0])
    (tmp_path / "lock.7").write_text("host 1 5\n")
    waiter = HeartbeatLock(tmp_path / "lock")
    for _ in range(7):
        assert not waiter.attempt()
        now[0] += 9
    now[0] += 9  # 72 s without a change, but nobody looked in the last 18 s
    assert not waiter.attempt()
    for _ in range(7):
        now[0] += 8.6
        taken = waiter.attempt()
    assert taken, "60.2 s of looking"
    waiter.release()
    assert (tmp_path / "lock.8").read_text().startswith("free")


def test_a_number_that_was_deleted_is_not_mistaken_for_a_free_one(tmp_path, monkeypatch):
    """A waiter judges number 1 and is delayed; meanwhile 2 and 3 had the lock and 2 is deleted."""
    (tmp_path / "lock.1").write_text("free\n")
    late, numbers = HeartbeatLock(tmp_path / "lock"), [[1], [2, 3]]
    (tmp_path / "lock.3").write_text("host 1 5\n")
    monkeypatch.setattr(late, "_numbers", lambda: numbers.pop(0))
    assert not late.attempt()
    assert (tmp_path / "lock.3").read_text() == "host 1 5\n"


def test_of_two_that_judge_the_same_owner_one_gets_the_next_number(tmp_path, monkeypatch):
    (tmp_path / "lock.1").write_text("free\n")
    (tmp_path / "lock.2").write_text("host 1 0\n")
    late = HeartbeatLock(tmp_path / "lock")
    monkeypatch.setattr(late, "_numbers", lambda: [1])
    assert not late.attempt()


def test_an_owner_s_file_deleted_while_it_is_read_is_no_free_lock(tmp_path, monkeypatch):
    waiter = HeartbeatLock(tmp_path / "lock")
    monkeypatch.setattr(waiter, "_numbers", lambda: [4])
    assert not waiter.attempt()


def test_the_same_command_twice_at_once_on_such_a_file_system(tmp_path, no_locks):
    """One trains, the other waits and finds all done."""
    children = [fork_run(tmp_path / "out", *TINY) for _ in range(2)]
    assert [wait_for(child) for child in children] == [0, 0]
    shown = "".join(log.read_text() for log in tmp_path.glob("out.*.log"))
    assert shown.count("done already") == 1 and shown.count("train 1/2") == 1
    log = (run_dir(tmp_path / "out") / "log.txt").read_text()
    assert "is on a file system without locks (No locks available); heartbeats stand in for them" in log


def held_while_and_after(path: Path) -> list[bool]:
    """Return whether the lock counts as held before, while and after this process holds it."""
    seen = [is_held(path)]
    with lock(path, what="this", report=lambda _line: None):
        seen.append(is_held(path))
    return [*seen, is_held(path)]


def test_whether_a_lock_is_held_is_known_without_taking_it(tmp_path: Path) -> None:
    assert held_while_and_after(tmp_path / "lock") == [False, True, False]


def test_the_same_without_locks_of_the_system(tmp_path: Path, no_locks: None) -> None:
    assert held_while_and_after(tmp_path / "lock") == [False, True, False]


def test_what_cannot_be_written_is_told_with_the_option_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^dataset\.cache_dir: cannot write .*file/lock"):
        with lock(tmp_path / "file" / "lock", what="this", report=print, option="dataset.cache_dir"):
            pass


@pytest.mark.parametrize("leaves", [True, False])
def test_a_killed_owner_keeps_a_lock_only_through_processes_that_work_on_what_it_protects(tmp_path, leaves) -> None:
    """As decoding workers of a training process, and those that write the copies of images."""
    log = tmp_path / "log"

    def worker() -> int:
        if leaves:
            locks.leave_to_parent()
        log.write_text("works\n")
        time.sleep(3)
        return 0

    def owner() -> int:
        with lock(tmp_path / "lock", what="this", report=print, with_children=not leaves):
            fork(tmp_path / "worker", worker)
            time.sleep(30)
        return 0

    child = fork(tmp_path / "out", owner)
    wait_until(lambda: lines(log) == ["works"])
    assert is_held(tmp_path / "lock")
    os.kill(child, signal.SIGKILL)
    wait_for(child)
    assert is_held(tmp_path / "lock") is not leaves
