"""Sweeps, and mistakes that only show when a run starts: exit codes, one line, nothing half-written."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prune_lab.cli import command as cli
from prune_lab.training import phases
from tests.helpers.sweeps import TINY, statuses


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_sweep_runs_every_combination_and_a_second_one_finds_them_done(capsys: pytest.CaptureFixture) -> None:
    command = ["-m", *TINY, "method=static,magnitude", "seed=0,1"]
    assert cli.main(command) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "run 1: method=static seed=0\n" in captured.out and "run 4: method=magnitude seed=1\n" in captured.out
    assert captured.out.endswith("sweep: 4 of 4 runs finished\n")
    assert statuses() == ["finished"] * 4
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("done already: outputs/") == 4
    assert {path.name for path in Path().iterdir()} == {"outputs"}, "everything lies inside output_dir"
    assert {path.name for path in Path().iterdir()} == {"outputs"}, "everything lies inside output_dir"
    assert {path.name for path in Path("outputs").iterdir() if path.is_dir()} == {
        "phases", *(path.parent.name for path in Path("outputs").glob("*/status.json"))
    }


def test_an_option_of_the_swept_methods_needs_not_be_the_default_methods(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["-m", *TINY, "method=static,magnitude", "method.sparsity=0.8"]) == 0
    assert capsys.readouterr().out.endswith("sweep: 2 of 2 runs finished\n")
    summaries = [json.loads(path.read_text()) for path in Path("outputs").glob("*/summary.json")]
    assert sorted(summary["config/method"] for summary in summaries) == ["magnitude", "static"]
    assert {summary["sparsity/requested"] for summary in summaries} == {0.8}
    commands = {summary["run/command"] for summary in summaries}
    assert all("-m" not in command and "method.sparsity=0.8" in command for command in commands)


def test_a_failed_run_does_not_stop_the_others(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["-m", *TINY, "method=static", "method.sparsity=0.99999,0.9"]) == 1
    captured = capsys.readouterr()
    assert captured.out.endswith("sweep: 1 of 2 runs finished\n")
    lines = captured.err.splitlines()
    assert lines[0].startswith("prune-lab: error: method.sparsity is out of reach")
    assert lines[1:] == ["prune-lab: not finished (exit code 1): method.sparsity=0.99999"]
    assert statuses() == ["finished"]


def test_a_defect_in_one_run_does_not_stop_the_others(capsys: pytest.CaptureFixture, monkeypatch) -> None:
    fit, calls = phases.fit, []

    def breaks_once(training) -> None:
        calls.append(training)
        if len(calls) == 1:
            raise ZeroDivisionError("two\nlines")
        fit(training)

    monkeypatch.setattr(phases, "fit", breaks_once)
    assert cli.main(["-m", *TINY, "seed=0,1"]) == 1
    error = capsys.readouterr().err.splitlines()[0]
    (log,) = (path for path in Path("outputs").glob("*-s0-*/log.txt"))
    assert error == f"prune-lab: error: ZeroDivisionError: two lines (traceback in {log})"
    assert "Traceback" in log.read_text() and "raise ZeroDivisionError" in log.read_text()
    assert json.loads(log.with_name("status.json").read_text()) == {
        "status": "failed", "error": "ZeroDivisionError: two",
    }  # fmt: skip
    assert statuses() == ["failed", "finished"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["method=rigl", "method.interval=2", "method.sparsity=0.99999"], "the reachable maximum is 0.99"),
        (["method=magnitude", "method.distribution=erk", "method.sparsity=0.99999"], "the reachable maximum is 0.99"),
        (["method=rigl", "method.interval=1000"], "method.interval=1000 with method.begin=0 leaves no mask update"),
        (["schedule.batch_size=128"], "schedule.batch_size must lie in [1, 64] (training images), got 128"),
        (["trainer.accumulate=3"], "schedule.batch_size=8 must be a multiple of processes x trainer.accumulate"),
        (["dataset=cifar10"], "dataset.root=data/cifar10 holds no cifar10; add dataset.download=true"),
        (["dataset=cifar10", "dataset.root=damaged.tar.xz"], "damaged.tar.xz is damaged"),
        (["dataset=imagefolder"], "data/imagefolder"),
        (["model.weights=missing.pt"], "model.weights=missing.pt: no such file"),
        (["model.weights=damaged.tar.xz"], "model.weights=damaged.tar.xz cannot be read as weights"),
        (["model.weights=other.pt"], "model.weights=other.pt"),
        (["trainer.device=cuda:99"], "trainer.device=cuda:99: this machine has"),
        (["method=static", "method.exclude=[nothing]"], "nothing"),
        (["method=static", "method.distribution=file", "method.densities=missing.yaml"], "missing.yaml"),
        (["model=torchvision", "model.name=resnetx", "model.width=1.0"], "resnetx"),
    ],
)
def test_mistakes_found_on_the_real_model_or_data_leave_nothing(
    options: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    import torch

    Path("damaged.tar.xz").write_bytes(b"\xfd7zXZ\x00" + bytes(range(256)) * 4)
    torch.save({"state_dict": {"other.weight": torch.zeros(2, 2)}}, "other.pt")
    common = [option for option in TINY if not any(given.startswith("dataset=") for given in options) or
              not option.startswith("dataset")]  # fmt: skip
    assert cli.main([*common, *options]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("prune-lab: error: ") and message in captured.err
    assert not Path("outputs").exists()


def test_a_place_that_cannot_hold_outputs_is_named(capsys: pytest.CaptureFixture) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("needs a place where nobody can write")
    assert cli.main([*TINY, "output_dir=/proc/outputs"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "/proc/outputs" in captured.err


def test_ctrl_c_stops_the_whole_sweep(child_environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "prune_lab", "-m", *TINY, "schedule.train.epochs=5000", "seed=0,1"]
    child = subprocess.Popen(command, cwd=tmp_path, env=child_environment, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)  # fmt: skip
    records = tmp_path / "outputs"
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in records.glob("*/metrics.jsonl")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "run 1: seed=0" in out and "run 2" not in out and "Traceback" not in err
    assert statuses() == ["interrupted"]
