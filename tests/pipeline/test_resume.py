"""Interrupted, killed, cut short: the same command ends with what an uninterrupted run would have left."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from prune_lab.foundations import checkpoint
from prune_lab.pipeline import results, runner
from prune_lab.training import evaluation, loop, saving
from tests.helpers.runs import (
    METHODS,
    TINY,
    assert_same_run,
    compose,
    execute,
    fork_run,
    records,
    run_dir,
    status,
    wait_for,
)  # fmt: skip

EXTRAS = ("trainer.ema_decay=0.9", "trainer.accumulate=2", "trainer.clip_norm=1", "schedule.train.epochs=3")
OFTEN = "trainer.checkpoint_interval_s=1e-9"


class StopAt:
    """Sends this process a signal after so many training steps of the run, once."""

    def __init__(self, monkeypatch, step: int, number: int) -> None:
        self.left = step
        real = loop.train_step

        def train_step(training, images, labels):
            real(training, images, labels)
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(loop, "train_step", train_step)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a function: options -> folder of their uninterrupted run, made once."""
    made: dict[tuple, Path] = {}

    def make(*options: str) -> Path:
        if options not in made:
            made[options] = tmp_path_factory.mktemp("whole") / "out"
            assert execute(made[options], *options) == 0
        return made[options]

    return make


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_checkpoint_and_the_same_command_ends_bit_equal(tmp_path, monkeypatch, whole, number, code):
    options = (*TINY, *METHODS["rigl"])
    StopAt(monkeypatch, 8, number)
    assert execute(tmp_path, *options) == code
    assert status(tmp_path)["status"] == "interrupted"
    (saved,) = tmp_path.glob("phases/*/checkpoint.pt")
    assert checkpoint.load(saved)["progress"]["step"] == 8
    assert not (run_dir(tmp_path) / "summary.json").exists()
    assert execute(tmp_path, *options) == 0
    assert_same_run(tmp_path, whole(*options))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # handlers are given back


# An eighth of the methods, the contract test resumes each once; all with -m slow.
SOME = [pytest.param(name, marks=[pytest.mark.slow] * (index % 8 > 0)) for index, name in enumerate(METHODS)]


@pytest.mark.thin(4)
@pytest.mark.parametrize("method", SOME)
def test_resume_anywhere_is_bit_exact_with_all_extras(tmp_path, monkeypatch, whole, method):
    """Average, accumulation, clipping, momentum and masks all come back; the cut epoch's loss is complete."""
    options = (*TINY, *EXTRAS, *METHODS[method])
    for step in (5, 6, 3):  # 5; 5 + 6 = 11; 14
        with monkeypatch.context() as patch:
            StopAt(patch, step, signal.SIGTERM)
            assert execute(tmp_path, *options) == 143
    assert execute(tmp_path, *options) == 0
    assert_same_run(tmp_path, whole(*options))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "frank_wolfe"])
def test_resume_with_another_optimizer_and_number_format(tmp_path, monkeypatch, whole, optimizer):
    options = (*TINY, *METHODS["set"], f"optimizer={optimizer}", "schedule.train.lr=0.01", "trainer.precision=bf16",
               "trainer.channels_last=true")  # fmt: skip
    StopAt(monkeypatch, 7, signal.SIGTERM)
    assert execute(tmp_path, *options) == 143
    assert execute(tmp_path, *options) == 0
    assert_same_run(tmp_path, whole(*options))


def test_stop_while_evaluating_and_at_the_end_of_an_epoch(tmp_path, monkeypatch, whole):
    options = (*TINY, *METHODS["rigl"], "trainer.eval_batch_size=5")
    real, calls = evaluation.measure, []

    def measure(*arguments, **kwargs):
        calls.append(None)
        if len(calls) in (1, 3):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **kwargs)

    monkeypatch.setattr(loop, "measure", measure)
    assert execute(tmp_path, *options) == 143
    assert records(run_dir(tmp_path)) == []
    assert execute(tmp_path, *options) == 143
    assert [row["epoch"] for row in records(run_dir(tmp_path))] == [1]
    monkeypatch.undo()
    assert execute(tmp_path, *options) == 0
    assert_same_run(tmp_path, whole(*options))


def test_stop_during_the_last_evaluation(tmp_path, monkeypatch, whole):
    options = (*TINY, *METHODS["rigl"], "trainer.eval_batch_size=5", "dataset.validation=0.25")
    real = results.measure

    def measure(*arguments, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **kwargs)

    monkeypatch.setattr(results, "measure", measure)
    assert execute(tmp_path, *options) == 143
    assert status(tmp_path)["status"] == "interrupted"
    monkeypatch.undo()
    assert execute(tmp_path, *options) == 0
    assert_same_run(tmp_path, whole(*options))


def test_second_interrupt_stops_at_once_and_is_no_failure(tmp_path, monkeypatch):
    real = loop.train_step

    def train_step(*arguments):
        real(*arguments)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop, "train_step", train_step)
    assert execute(tmp_path, *TINY) == 130
    assert status(tmp_path)["status"] == "interrupted"


def test_killed_between_record_and_checkpoint_doubles_no_record(tmp_path, monkeypatch, whole):
    """The checkpoint stands after the last step of the epoch; its record is written; then the process dies."""
    options = (*TINY, *METHODS["rigl"], OFTEN)
    real = loop._end_epoch

    def end_epoch(*arguments, **kwargs):
        real(*arguments, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_end_epoch", end_epoch)
    execute(tmp_path, *options)
    (saved,) = tmp_path.glob("phases/*/checkpoint.pt")
    assert checkpoint.load(saved)["progress"] | {"wall_s": 0} == {"epoch": 0, "batch": 6, "step": 6, "wall_s": 0}
    monkeypatch.undo()
    assert execute(tmp_path, *options) == 0
    assert_same_run(tmp_path, whole(*options))


def test_damaged_newest_checkpoint_goes_on_from_the_one_before(tmp_path, monkeypatch, whole, capsys):
    options = (*TINY, *METHODS["rigl"], OFTEN)
    StopAt(monkeypatch, 8, signal.SIGTERM)
    assert execute(tmp_path, *options) == 143
    (newest,) = tmp_path.glob("phases/*/checkpoint.pt")
    newest.write_bytes(newest.read_bytes()[:-100])
    capsys.readouterr()
    assert execute(tmp_path, *options) == 0
    shown = capsys.readouterr().out
    assert "is damaged" in shown and "resumed at step 8" in shown
    assert_same_run(tmp_path, whole(*options))


def test_tiny_epochs_write_no_checkpoint_each(tmp_path, monkeypatch):
    """`auto`: the first one after ten seconds, at the end of an epoch as within it."""
    taken = []
    monkeypatch.setattr(checkpoint.CheckpointPair, "save", lambda pair, state: taken.append(state["progress"]["step"]))
    assert execute(tmp_path / "short", *TINY) == 0
    assert taken == []
    monkeypatch.setattr(saving, "LEAST_S", 0.0)
    monkeypatch.setattr(saving, "SHARE", 1e9)
    assert execute(tmp_path / "long", *TINY) == 0
    assert taken == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 11, 12, 12]


def test_a_signal_while_a_checkpoint_is_written_waits_for_it_and_for_its_own(tmp_path, monkeypatch, whole):
    options, real, written = (*TINY, *METHODS["rigl"]), checkpoint.CheckpointPair.save, []

    def save(pair, state):
        time.sleep(0.3)  # a slow disk: steps go on meanwhile
        real(pair, state)
        written.append(state["progress"]["step"])

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.CheckpointPair, "save", save)
        StopAt(patch, 8, signal.SIGTERM)
        assert execute(tmp_path, *options, OFTEN) == 143
    assert written[-1] == 8 and status(tmp_path)["status"] == "interrupted"
    assert execute(tmp_path, *options) == 0
    assert_same_run(tmp_path, whole(*options))


def test_a_signal_s_own_checkpoint_that_cannot_be_written_is_a_failure(tmp_path, monkeypatch):
    def full(path, _fill):
        raise checkpoint.SaveError(errno.ENOSPC, f"cannot write {path}: {os.strerror(errno.ENOSPC)}")

    monkeypatch.setattr(checkpoint, "write_file", full)
    StopAt(monkeypatch, 8, signal.SIGTERM)
    assert execute(tmp_path, *TINY) == 1
    assert "No space left on device" in status(tmp_path)["error"]


def kill_until_done(folder: Path, options: tuple[str, ...], *, kills: int, seed: int) -> int:
    """Kill -9 the run that often, each after a random time; then let it finish. Return how often it was really hit."""
    chosen, hits = random.Random(seed), 0
    for _ in range(kills):
        child = fork_run(folder, *options)
        time.sleep(chosen.uniform(0.1, 0.9))
        os.kill(child, signal.SIGKILL)
        hits += wait_for(child) == -signal.SIGKILL
    assert wait_for(fork_run(folder, *options)) == 0
    return hits


@pytest.mark.thin(4)
@pytest.mark.parametrize(
    "method", ["rigl", "magnitude", *(pytest.param(name, marks=pytest.mark.slow) for name in ("set", "gmp"))]
)
def test_kill_9_at_random_moments_on_digits_changes_nothing(tmp_path, whole, method):
    options = ("dataset=digits", "dataset.image_size=16", "model=resnet20", "model.width=0.25",
               "trainer.precision=fp32", "schedule.batch_size=32", "schedule.train.epochs=3",
               "schedule.finetune.epochs=2", "trainer.limit_train_batches=8", "logger.wandb=disabled", OFTEN,
               *METHODS[method])  # fmt: skip
    hits = kill_until_done(tmp_path / "out", options, kills=3, seed=len(method))
    assert hits > 0
    assert_same_run(tmp_path / "out", whole(*options))


def test_kill_9_of_the_real_command(tmp_path, child_environment, whole):
    options = (*TINY, *METHODS["rigl"], "schedule.train.epochs=6", OFTEN)
    command = [sys.executable, "-m", "prune_lab", *options, "output_dir=out"]
    child = subprocess.Popen(command, cwd=tmp_path, env=child_environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while child.poll() is None and not list(tmp_path.glob("out/phases/*/checkpoint.previous.pt")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert execute(tmp_path / "out", *options) == 0
    assert_same_run(tmp_path / "out", whole(*options))


def cifar(shared_folder: Path, child_environment: dict[str, str]) -> tuple[str, ...]:
    archive = shared_folder / "data" / "cifar10-jpeg.tar.xz"
    if not archive.exists():
        pytest.skip(f"no {archive.name} in the shared data")
    return ("dataset=cifar10", f"dataset.root={archive}", "schedule=demo", "model=resnet20", "model.width=0.25",
            "schedule.batch_size=64", "schedule.train.epochs=2", "trainer.limit_train_batches=12",
            "trainer.limit_eval_batches=2", "trainer.precision=fp32", "method=rigl", "method.interval=4",
            "logger.wandb=disabled", OFTEN)  # fmt: skip


@pytest.mark.slow
def test_kill_9_on_real_photographs(tmp_path, shared_folder, child_environment, whole):
    options = cifar(shared_folder, child_environment)
    execute(tmp_path / "warm", *options)  # decodes the images once
    hits = kill_until_done(tmp_path / "out", options, kills=4, seed=1)
    assert hits > 0
    assert_same_run(tmp_path / "out", whole(*options))


def test_resumed_run_counts_time_and_images_of_its_own_call(tmp_path, monkeypatch):
    StopAt(monkeypatch, 8, signal.SIGTERM)
    assert execute(tmp_path, *TINY) == 143
    (saved,) = tmp_path.glob("phases/*/checkpoint.pt")
    before = checkpoint.load(saved)["progress"]["wall_s"]
    assert before > 0
    runs = []
    real = runner.results.complete
    monkeypatch.setattr(runner.results, "complete", lambda run, *a, **k: (runs.append(run), real(run, *a, **k)))
    assert execute(tmp_path, *TINY) == 0
    assert runs[0].images_done == 4 * 8  # 12 steps, 8 done before
    (phase,) = json.loads((run_dir(tmp_path) / "summary.json").read_text())["phases"]
    assert phase["wall_s"] > before  # a phase's time counts both calls


def test_dropout_draws_the_same_after_a_resume():
    """Draws are keyed by the step: no state of a generator is kept or needed."""
    draws = []
    for _ in range(2):
        loop.seed_device(torch.device("cpu"), compose(*TINY).seed, "step", 3, 0)
        draws.append(torch.rand(4))
    assert torch.equal(*draws)
