"""Faults of runs over several processes: one killed, a whole group started again, a node lost and replaced."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from prune_lab.foundations import distributed
from prune_lab.training import loop
from tests.helpers.runs import METHODS, TINY, assert_same_run, compose, execute, fork_pair, status, wait_for

OPTIONS = (*TINY, *METHODS["rigl"], "trainer.checkpoint_interval_s=1e-9")
LONG = (*OPTIONS, "schedule.train.epochs=40", "trainer.eval_interval=20")
TIMEOUT_S = 240


def pair(folder: Path, *options: str) -> str:
    """Run one command with two processes to its end and return what they printed."""
    log = folder.with_name(f"{folder.name}.log")
    compose(*options)  # both know the options then
    assert [wait_for(child) for child in fork_pair(log, lambda: execute(folder, *options))] == [0, 0], log.read_text()
    return log.read_text()


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_other_and_the_same_command_goes_on(tmp_path, rank):
    def killed() -> int:
        real = loop.train_step

        def train_step(training, images, labels):
            real(training, images, labels)
            if training.progress.step == 11 and distributed.rank() == rank:  # a checkpoint was due at step 10
                if rank == 0:
                    training.saves.wait()
                os.kill(os.getpid(), signal.SIGKILL)

        loop.train_step = train_step
        return execute(tmp_path / "cut", *OPTIONS)

    log = tmp_path / "killed.log"
    begun = time.monotonic()
    codes = [wait_for(child) for child in fork_pair(log, killed)]
    assert time.monotonic() - begun < 60
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1, log.read_text()
    assert "another process of this run is gone; the same command goes on" in log.read_text()
    if rank == 1:
        assert status(tmp_path / "cut")["status"] == "failed"
    assert "resumed at step 10" in pair(tmp_path / "cut", *OPTIONS)
    pair(tmp_path / "whole", *OPTIONS)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def torchrun(folder: Path, log: Path, environment: dict[str, str], *launch: str) -> subprocess.Popen:
    """Start the long run with `folder` as its outputs under torchrun with the options `launch`."""
    command = [sys.executable, "-m", "torch.distributed.run", *launch, "-m", "prune_lab", *LONG, f"output_dir={folder}"]
    with open(log, "a") as file:
        return subprocess.Popen(command, cwd=log.parent, env=environment, stdout=file, stderr=subprocess.STDOUT)


def workers(agent: int) -> dict[int, int]:
    """Return rank -> process of what torchrun's process `agent` has started."""
    found = {}
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    for child in map(int, children):
        variables = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
        found |= {int(value.removeprefix("RANK=")): child for value in variables if value.startswith("RANK=")}
    return found


def wait_for_checkpoint(folder: Path, log: Path) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not list(folder.glob("phases/*/checkpoint.previous.pt")):
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.02)


def test_processes_started_again_do_not_meet_the_dead_ones():
    """Three times on one store, as under torchrun; the second process arrives late and the first sees its old word."""
    store, words = torch.distributed.HashStore(), []
    for late in (0.0, 0.3, 0.0):
        found: dict[int, str] = {}

        def join(rank: int, wait_s: float, found: dict[int, str] = found) -> None:
            time.sleep(wait_s)
            found[rank] = distributed.meet(store, rank, 3)

        members = [threading.Thread(target=join, args=[rank, late * (rank == 1)]) for rank in range(3)]
        for member in members:
            member.start()
        for member in members:
            member.join(20)
        assert len(found) == 3 and len(set(found.values())) == 1
        words.append(found[0])
    assert len(set(words)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_starts_a_killed_group_again_by_itself(tmp_path, child_environment, rank):
    log = tmp_path / "log"
    agent = torchrun(tmp_path / "cut", log, child_environment, "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    wait_for_checkpoint(tmp_path / "cut", log)
    os.kill(workers(agent.pid)[rank], signal.SIGKILL)
    assert agent.wait(TIMEOUT_S) == 0, log.read_text()
    assert "resumed at step" in log.read_text()
    pair(tmp_path / "whole", *LONG)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
def test_a_lost_node_is_replaced(tmp_path, child_environment):
    """Two torchrun agents, of which one dies with all it started; a third takes its place.

    torchrun's agents share a store by default, and one that stayed does not tell a new one where it is (torch 2.15).
    """
    apart = child_environment | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}",
              "--rdzv-id=run", "--local-addr=127.0.0.1", "--max-restarts=3")  # fmt: skip
    logs = [tmp_path / f"{name}.log" for name in ("stays", "lost", "new")]
    stays = torchrun(tmp_path / "cut", logs[0], apart, *launch)
    end = time.monotonic() + TIMEOUT_S
    while socket.socket().connect_ex(("127.0.0.1", port)):  # the first agent keeps the meeting point, and must live
        assert time.monotonic() < end
        time.sleep(0.1)
    lost = torchrun(tmp_path / "cut", logs[1], apart, *launch)
    wait_for_checkpoint(tmp_path / "cut", logs[0])
    started = workers(lost.pid)
    lost.kill()
    for worker in started.values():
        os.kill(worker, signal.SIGKILL)
    lost.wait()
    new = torchrun(tmp_path / "cut", logs[2], apart, *launch)
    codes = stays.wait(TIMEOUT_S), new.wait(TIMEOUT_S)
    shown = "\n".join(log.read_text() for log in logs)
    assert codes == (0, 0) and "resumed at step" in shown, shown
    pair(tmp_path / "whole", *LONG)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
