"""Sweeps through Hydra's launchers: failures, kills, signals, requeueing. Each starts processes and takes a while."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prune_lab.cli import command as cli
from tests.helpers.sweeps import TINY, statuses

pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs prune-lab[launchers]")
pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs prune-lab[launchers]")

LONG = (*TINY, "schedule.train.epochs=4000", "trainer.limit_train_batches=null", "trainer.checkpoint_interval_s=1")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*options: str, child_environment: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "prune_lab", "-m", *options], env=child_environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def wait_until(condition, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.2)


def num_training() -> int:
    """Return how many runs have a record of training."""
    return len([path for path in Path("outputs/phases").glob("*/metrics.jsonl") if path.stat().st_size])


def test_several_processes_do_a_sweep_and_a_failed_run_stops_no_other(child_environment: dict[str, str]) -> None:
    command = (*TINY, "method=static", "method.sparsity=0.9,0.99999", "hydra/launcher=local")
    out, err = start(*command, child_environment=child_environment).communicate(timeout=300)
    assert "run 1: method.sparsity=0.9\n" in out and out.endswith("sweep: 1 of 2 runs finished\n")
    (line,) = err.splitlines()
    assert line.startswith("prune-lab: not finished (exit code 1): method.sparsity=0.99999 (method.sparsity is out of")
    assert statuses() == ["finished"]
    (log,) = Path("outputs/sweep").glob("*/run-1.log")
    assert "finished" in log.read_text().splitlines()
    (summary,) = Path("outputs").glob("*/summary.json")
    command = json.loads(summary.read_text())["run/command"]
    assert "method.sparsity=0.9" in command and "hydra" not in command, "how it was launched is no option of the run"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["hydra/launcher=local"], "hydra/launcher=local is for sweeps: add -m"),
        (["-m", "hydra/launcher=locl"], "hydra/launcher=locl is not a choice (did you mean 'local'?); allowed: "),
        (["-m", "hydra.launcher.n_jobs=3"], "hydra.launcher.n_jobs=3: choose a launcher too, hydra/launcher=basic|"),
        (["-m", "hydra/launcher=local", "hydra.launcher.n_job=3"], "Could not override 'hydra.launcher.n_job'"),
        (["-m", "hydra/launcher=local", "hydra.run.dir=x"], "hydra.run.dir=x: Hydra's own options are fixed, but for"),
    ],
)
def test_wrong_launchers_are_refused_before_anything_starts(options, message: str, capsys) -> None:
    assert cli.main([*TINY, *options]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err
    assert not Path("outputs").exists()


def test_the_basic_launcher_is_the_ordinary_sweep(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["-m", *TINY, "seed=0,1", "hydra/launcher=basic"]) == 0
    assert capsys.readouterr().out.endswith("sweep: 2 of 2 runs finished\n")
    assert not Path("outputs/sweep").exists()


def jobs_of_submitit() -> list[int]:
    """Return the processes of this test's jobs, in the order in which they began."""
    found = subprocess.run(["pgrep", "-f", "submitit.core._submit"], capture_output=True, text=True).stdout.split()
    return [int(job) for job in found if str(Path.cwd()) in Path(f"/proc/{job}/cmdline").read_text()]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "number"), [("local", signal.SIGTERM), ("local_jobs", signal.SIGINT)])
def test_a_signal_stops_every_run_after_a_checkpoint(launcher, number, child_environment) -> None:
    process = start(*LONG, "seed=0,1,2", f"hydra/launcher={launcher}", child_environment=child_environment)
    wait_until(lambda: num_training() == min(2, os.cpu_count()))
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "stopping: the runs under way write a checkpoint" in out
    assert err.count(f"not finished (exit code {128 + number})") == 3
    assert set(statuses()) == {"interrupted"} and len(statuses()) < 3, "the last one did not start"
    assert len(list(Path("outputs/phases").glob("*/checkpoint.pt"))) == len(statuses())


@pytest.mark.slow
def test_a_killed_worker_takes_no_other_run_with_it(child_environment: dict[str, str]) -> None:
    process = start(*TINY, "schedule.train.epochs=8", "trainer.limit_train_batches=null", "seed=0,1",
                    "hydra/launcher=local", child_environment=child_environment)  # fmt: skip
    wait_until(lambda: num_training() >= 1)
    workers = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "LokyProcess|popen_loky"], capture_output=True,
                             text=True).stdout.split()  # fmt: skip
    os.kill(int(workers[0]), signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert statuses() == ["finished", "finished"], (out, err)
    assert process.returncode == 0 and out.endswith("sweep: 2 of 2 runs finished\n")


@pytest.mark.slow
def test_a_preempted_job_goes_on_from_its_checkpoint(child_environment: dict[str, str]) -> None:
    """SIGUSR2 is what Slurm sends before a job's time is up; submitit's local jobs know it too."""
    process = start(*TINY, "schedule.train.epochs=8", "trainer.limit_train_batches=null",
                    "trainer.checkpoint_interval_s=1000", "hydra/launcher=local_jobs",
                    child_environment=child_environment)  # fmt: skip
    wait_until(lambda: num_training() == 1)
    os.kill(jobs_of_submitit()[0], signal.SIGUSR2)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, (out, err)
    (log,) = Path("outputs/sweep").glob("*/run-1.log")
    assert "resumed at step" in log.read_text() and statuses() == ["finished"]


@pytest.mark.slow
def test_a_lost_job_leaves_the_others_to_end(child_environment: dict[str, str]) -> None:
    process = start(*TINY, "schedule.train.epochs=8", "trainer.limit_train_batches=null", "seed=0,1",
                    "hydra/launcher=local_jobs", child_environment=child_environment)  # fmt: skip
    wait_until(lambda: num_training() >= 1)
    os.kill(jobs_of_submitit()[0], signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1 and out.endswith("sweep: 1 of 2 runs finished\n"), (out, err)
    assert "its process ended without a word" in err
    assert sorted(statuses())[0] == "finished"


@pytest.mark.slow
def test_a_signal_stops_a_sweep_in_the_launching_process_too(child_environment: dict[str, str]) -> None:
    process = start(*LONG, "seed=0,1", "hydra/launcher=local", "hydra.launcher.n_jobs=1",
                    child_environment=child_environment)  # fmt: skip
    wait_until(lambda: num_training() == 1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143 and statuses() == ["interrupted"]
