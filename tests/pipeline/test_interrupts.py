"""What breaks into a run from outside ends in one line, and the same command goes on: Ctrl-C twice, a lost decoder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from prune_lab.datasets import worker_pool
from prune_lab.foundations.checkpoint import CheckpointPair
from prune_lab.launch.run_one import run_one
from tests.helpers.folder_runs import FOLDER, write_images
from tests.helpers.runs import METHODS, TINY, compose, execute, fork, run_dir, status, summary, wait_for

TIMEOUT_S = 120
LONG = (*TINY, *METHODS["rigl"], "trainer.device=cpu", "schedule.train.epochs=4000",
        "trainer.checkpoint_interval_s=0.2")  # fmt: skip


def wait_until(there, log) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not there():
        assert time.monotonic() < end, log()
        time.sleep(0.02)


@pytest.mark.thin(3)
@pytest.mark.parametrize("pauses", [(0.0,), (0.02, 0.02, 0.02, 0.02)], ids=str)
def test_more_than_one_ctrl_c_leaves_neither_a_traceback_nor_a_damaged_run(tmp_path, child_environment, pauses):
    log, out = tmp_path / "log", tmp_path / "out"
    with open(log, "w") as file:
        command = [sys.executable, "-m", "prune_lab", *LONG, f"output_dir={out}"]
        child = subprocess.Popen(command, env=child_environment, stdout=file, stderr=subprocess.STDOUT)
    wait_until(lambda: list(out.glob("phases/*/checkpoint.previous.pt")), log.read_text)
    for pause in (0, *pauses):
        time.sleep(pause)
        child.send_signal(signal.SIGINT)
    assert child.wait(TIMEOUT_S) in (130, -signal.SIGINT)
    printed = log.read_text()
    assert "Traceback" not in printed and "Error" not in printed
    assert status(out)["status"] == "interrupted"
    (phase,) = out.glob("phases/*")
    assert CheckpointPair(phase, print).load()["progress"]["step"] > 0


@pytest.mark.parametrize("cached_side", ["null", "18"])
def test_a_killed_decoder_is_one_line_and_the_same_command_goes_on(tmp_path, cached_side):
    options = (*FOLDER, f"dataset.root={write_images(tmp_path / 'images', seed=0)}", "dataset.workers=2",
               f"dataset.cached_side={cached_side}", f"dataset.cache_dir={tmp_path / 'cache'}")  # fmt: skip
    log, out = tmp_path / "log", tmp_path / "out"

    def killed() -> int:
        worker_pool._Answers.__getitems__ = lambda self, request: os.kill(os.getpid(), signal.SIGKILL)
        return run_one(compose(*options, f"output_dir={out}"), Counter())

    assert wait_for(fork(log, killed)) == 1
    printed = log.read_text()
    assert printed.count("prune-lab: error: a process that decodes images was killed") == 1, printed
    assert "Traceback" not in printed
    if cached_side == "null":
        assert status(out)["status"] == "failed"
    assert execute(out, *options) == 0
    assert summary(out)["status"] == "finished" and run_dir(out).is_dir()


