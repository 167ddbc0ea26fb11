"""One tracker, several sinks: local errors count, errors of copies do not, and nobody waits for a copy."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from prune_lab.tracking import BaseSink, RunInfo, Tracker, open_tracker
from prune_lab.tracking.background import Background


class Recorder(BaseSink):
    def __init__(self, calls=None, name=""):
        self.calls = [] if calls is None else calls
        self.name = name

    def log(self, record, *, replayed=False):
        self.calls.append((self.name, record["epoch"]))

    def message(self, text):
        self.calls.append((self.name, text))

    def finish(self, status, error):
        self.calls.append((self.name, status))


class Broken(BaseSink):
    label = "far away"

    def __init__(self, error):
        self.error = error

    def log(self, record, *, replayed=False):
        raise self.error

    def finish(self, status, error):
        raise self.error


def info_for(run_dir):
    return RunInfo(run_dir, "id1", "run-a", "g")


def test_local_sinks_come_first_and_in_order():
    calls = []
    tracker = Tracker([Recorder(calls, "a"), Recorder(calls, "b")])
    tracker.add_copy(Recorder(calls, "copy"))
    tracker.log({"epoch": 1})
    assert calls == [("a", 1), ("b", 1), ("copy", 1)]


def test_failing_copy_is_reported_once_and_dropped():
    local = Recorder()
    tracker = Tracker([local])
    tracker.add_copy(Broken(RuntimeError("server\nsays no")))
    for epoch in range(3):
        tracker.log({"epoch": epoch})
    tracker.finish("finished")
    messages = [entry for _, entry in local.calls if isinstance(entry, str) and "copy" in entry]
    assert len(messages) == 1
    assert messages[0].startswith("far away copy stopped: server says no. The run goes on")
    assert [entry for _, entry in local.calls if isinstance(entry, int)] == [0, 1, 2]


def test_local_disk_error_reaches_the_caller_and_all_sinks_still_finish():
    other = Recorder()
    tracker = Tracker([Broken(OSError(28, "No space left on device")), other])
    with pytest.raises(OSError, match="No space left"):
        tracker.log({"epoch": 1})
    with pytest.raises(OSError, match="No space left"):
        tracker.finish("failed", "disk full")
    assert other.calls == [("", "failed")]


def test_background_keeps_order_and_shows_notices_on_the_callers_thread(tmp_path):
    shown = []
    sink = Recorder()

    def report(text):
        shown.append((text, threading.current_thread()))

    background = Background(sink, report=report, finish_timeout_s=5)
    background.start(info_for(tmp_path))
    for epoch in range(100):
        background.log({"epoch": epoch})
    background.notice("hello")
    background.finish("finished", None)
    assert [entry for _, entry in sink.calls] == [*range(100), "finished"]
    assert shown == [("hello", threading.main_thread())]


def test_background_raises_the_error_of_its_thread(tmp_path):
    background = Background(Broken(ValueError("no")), report=print, finish_timeout_s=5)
    background.start(info_for(tmp_path))
    background.log({"epoch": 1})
    with pytest.raises(ValueError, match="no"):
        background.finish("finished", None)


def test_background_waits_for_a_silent_server_for_a_bounded_time_only(tmp_path):
    class Silent(BaseSink):
        label = "silent"

        def log(self, record, *, replayed=False):
            release.wait()

    release = threading.Event()
    background = Background(Silent(), report=print, finish_timeout_s=0.2)
    started = time.monotonic()
    background.start(info_for(tmp_path))
    for epoch in range(1000):
        background.log({"epoch": epoch})
    assert time.monotonic() - started < 0.2
    with pytest.raises(TimeoutError, match="not everything was sent within 0.2 s"):
        background.finish("finished", None)
    assert time.monotonic() - started < 2
    release.set()


def test_disabled_copy_never_imports_wandb(tmp_path):
    code = (
        "import pathlib, sys\n"
        "from types import SimpleNamespace\n"
        "from prune_lab.tracking import RunInfo, open_tracker\n"
        "logger = SimpleNamespace(wandb='disabled', project='p', entity=None, tags=[])\n"
        "tracker = open_tracker(logger)\n"
        "tracker.start(RunInfo(pathlib.Path(sys.argv[1]), 'i', 'n', 'g'))\n"
        "tracker.finish('finished')\n"
        "assert not {'wandb', 'torch', 'rich'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert not (tmp_path / "wandb").exists()


def test_online_without_a_key_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="logger.wandb=online needs a W&B key"):
        open_tracker(SimpleNamespace(wandb="online", project="p", entity=None, tags=[]))
