"""Data parallelism on the CPU: two processes are one process with the joined batch."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prune_lab.cli import command as cli
from prune_lab.foundations import checkpoint, distributed
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.files import SaveError
from prune_lab.training import loop
from tests.helpers.distributed_worker import CHECKS, run_checks
from tests.helpers.runs import (
    METHODS,
    TINY,
    assert_same_run,
    compose,
    execute,
    fork_pair,
    records,
    run_dir,
    status,
    summary,
    wait_for,
)  # fmt: skip


def pair(folder: Path, *overrides: str) -> tuple[list[int], str]:
    """Run one command with two processes; return their exit codes and what they printed."""
    log = folder.with_name(f"{folder.name}.pair.log")
    compose(*overrides)  # both know the options then
    codes = [wait_for(child) for child in fork_pair(log, lambda: execute(folder, *overrides))]
    return codes, log.read_text()


@pytest.fixture(scope="module")
def checks(tmp_path_factory) -> str:
    """What the checks inside two processes printed."""
    log = tmp_path_factory.mktemp("pair") / "checks.log"
    for child in fork_pair(log, run_checks):
        wait_for(child)
    return log.read_text()


@pytest.mark.parametrize("name", CHECKS)
def test_inside_two_processes(checks, name):
    assert f"{name} passed" in checks, checks[-3000:]


def assert_same_network(double: Path, single: Path) -> None:
    mine, theirs = load_file(run_dir(double) / "model.safetensors"), load_file(run_dir(single) / "model.safetensors")
    for name in mine:
        assert torch.equal(mine[name] == 0, theirs[name] == 0), f"zeros of {name}"
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4)
    for one, other in zip(records(run_dir(double)), records(run_dir(single)), strict=True):
        assert one.pop("phase") == other.pop("phase")
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
    for key in ("macs/train", "macs/inference", "params/nonzero", "sparsity/achieved"):
        assert summary(double)[key] == summary(single)[key]


# Batch norm after almost empty layers magnifies rounding; small steps keep that from adding up.
SLOW_LR = ("schedule.train.lr=0.002", "schedule.finetune.lr=0.002")


# An eighth of the methods; all with -m slow.
SOME = [pytest.param(name, marks=[pytest.mark.slow] * (index % 8 > 0)) for index, name in enumerate(METHODS)]


@pytest.mark.thin(4)
@pytest.mark.parametrize("method", SOME)
def test_two_processes_equal_one_with_the_joined_batch(tmp_path, method):
    options = (*TINY, *METHODS[method], *SLOW_LR, "dataset.num_test=21", "trainer.eval_batch_size=4")
    assert execute(tmp_path / "single", *options) == 0
    codes, shown = pair(tmp_path / "double", *options)
    assert codes == [0, 0], shown
    assert_same_network(tmp_path / "double", tmp_path / "single")
    assert shown.count("finished") == 1  # the second process says and writes nothing
    assert {path.name for path in run_dir(tmp_path / "double").iterdir()} == {
        path.name for path in run_dir(tmp_path / "single").iterdir()
    }


def test_two_processes_are_a_run_of_their_own_and_done_is_done(tmp_path):
    assert execute(tmp_path, *TINY) == 0
    codes, shown = pair(tmp_path, *TINY)
    assert codes == [0, 0] and "done already" not in shown
    codes, shown = pair(tmp_path, *TINY)
    assert codes == [0, 0] and shown.count("done already") == 1


def test_two_processes_sweep_and_go_on_after_a_refused_run(tmp_path):
    options = (*TINY, "method=static", "method.sparsity=0.8,0.99999,0.7", f"output_dir={tmp_path}")
    log = tmp_path / "sweep.log"
    children = fork_pair(log, lambda: cli.main(["-m", *options]))
    assert [wait_for(child) for child in children] == [1, 1], log.read_text()
    assert log.read_text().count("sweep: 2 of 3 runs finished") == 2
    assert len(list(tmp_path.glob("*/summary.json"))) == 2


def test_bf16_and_average_in_two_processes(tmp_path):
    options = (*TINY, *METHODS["rigl"], "trainer.precision=bf16", "trainer.ema_decay=0.9", "trainer.clip_norm=1")
    codes, shown = pair(tmp_path / "double", *options, "trainer.accumulate=2")
    assert codes == [0, 0], shown


@pytest.mark.parametrize("sync_bn", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_a_stopped_pair_goes_on_bit_equal(tmp_path, sync_bn):
    options = (*TINY, *METHODS["rigl"], f"trainer.sync_bn={sync_bn}", "schedule.train.epochs=3",
               "trainer.checkpoint_interval_s=1e-9")  # fmt: skip

    def stopped() -> int:
        real = loop.train_step

        def train_step(training, images, labels):
            real(training, images, labels)
            if training.progress.step == 13 and distributed.is_main():
                os.kill(os.getpid(), signal.SIGTERM)  # only one process notices; both have to stop

        loop.train_step = train_step
        return execute(tmp_path / "cut", *options)

    log = tmp_path / "stopped.log"
    assert [wait_for(child) for child in fork_pair(log, stopped)] == [143, 143], log.read_text()
    assert status(tmp_path / "cut")["status"] == "interrupted"
    codes, shown = pair(tmp_path / "cut", *options)
    assert codes == [0, 0] and "resumed at step" in shown
    assert pair(tmp_path / "whole", *options)[0] == [0, 0]
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_an_option_that_fits_no_pair_ends_both(tmp_path):
    def refused() -> int:
        try:
            return execute(tmp_path / "out", *TINY, "schedule.batch_size=7")
        except UserError as error:  # as the command line does
            print(error)
            return 1

    codes = [wait_for(child) for child in fork_pair(tmp_path / "log", refused)]
    shown = (tmp_path / "log").read_text()
    assert codes == [1, 1]
    assert "schedule.batch_size=7 must be a multiple of" in shown


def test_a_full_disk_ends_both(tmp_path):
    def full() -> int:
        def refuse(path, _fill):
            raise SaveError(errno.ENOSPC, f"cannot write {path}: No space left on device")

        checkpoint.write_file = refuse
        return execute(tmp_path / "out", *TINY)

    codes = [wait_for(child) for child in fork_pair(tmp_path / "log", full)]
    assert codes[0] == 1 and codes[1] != 0
    assert "No space left" in status(tmp_path / "out")["error"]


@pytest.mark.slow
def test_torchrun_starts_the_same_run(tmp_path, child_environment):
    options = (*TINY, *METHODS["rigl"], *SLOW_LR, f"output_dir={tmp_path / 'double'}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "prune_lab"]
    done = subprocess.run([*command, *options], cwd=tmp_path, env=child_environment, capture_output=True, text=True,
                          timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes, shown = pair(tmp_path / "double", *options[:-1])
    assert codes == [0, 0] and "done already" in shown
