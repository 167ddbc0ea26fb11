"""A machine's slots for runs: one per GPU or core, held by one process at a time, shared by all sweeps."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from prune_lab.foundations.errors import UserError
from prune_lab.launch import slots


def never() -> bool:
    return False


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SUBMITIT_EXECUTOR", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS",
                 "PRUNE_LAB_RUNS_PER_GPU"):  # fmt: skip
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)


def test_visible_gpus_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert slots.gpus() == ["2", "5"] and slots.num_slots() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert slots.gpus() == [] and slots.num_slots() == len(os.sched_getaffinity(0))


def test_several_processes_may_share_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    monkeypatch.setenv("PRUNE_LAB_RUNS_PER_GPU", "2")
    assert slots.num_slots() == 4
    with contextlib.ExitStack() as held:
        seen = []
        for _ in range(4):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")  # as other processes see it
            assert held.enter_context(slots.slot(never, tmp_path))
            seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        assert seen == ["3", "4", "3", "4"]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
        asked = []
        with slots.slot(lambda: asked.append(1) or len(asked) > 2, tmp_path) as free:
            assert not free
    monkeypatch.setenv("PRUNE_LAB_RUNS_PER_GPU", "half")
    with pytest.raises(UserError, match="PRUNE_LAB_RUNS_PER_GPU must be a whole number of at least 1, got 'half'"):
        slots.num_slots()


def test_gpus_are_counted_by_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\necho '  MIG 1g'\necho 'GPU 1: NVIDIA H100'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert slots.gpus() == ["0", "1"] and slots.num_gpus() == 2


def test_two_processes_get_different_gpus_and_a_third_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    code = textwrap.dedent(f"""
        import os, sys
        from pathlib import Path
        from prune_lab.launch.slots import slot
        with slot(lambda: False, Path({str(tmp_path)!r})) as free:
            print(free, os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
            sys.stdin.readline()
    """)
    first, second = (subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                      text=True) for _ in range(2))  # fmt: skip
    seen = {process.stdout.readline() for process in (first, second)}
    assert seen == {"True 3\n", "True 4\n"}
    asked = []
    with slots.slot(lambda: asked.append(1) or len(asked) > 2, tmp_path) as free:
        assert not free, "both are taken, and the wait was called off"
    for process in (first, second):
        process.communicate("\n")
    with slots.slot(never, tmp_path) as free:
        assert free and os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_a_process_keeps_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    for _ in range(2):
        with slots.slot(never, tmp_path) as free:
            assert free and slots.gpus() == ["3"]


def test_cores_are_shared_out_among_runs_without_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with slots.slot(never, tmp_path) as free:
        assert free and os.environ["OMP_NUM_THREADS"] == "1" and os.environ["CUDA_VISIBLE_DEVICES"] == ""
        assert [path.name for path in tmp_path.iterdir()] == ["core-0"]


def test_runs_within_an_allocation_share_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(slots.tempfile, "gettempdir", lambda: str(tmp_path))
    with slots.slot(never) as free:
        assert free and slots.gpus() == ["0"]
        assert [path.name for path in tmp_path.iterdir()] == [f"prune-lab-slots-{os.getuid()}-7"]


def test_a_cluster_has_handed_out_its_devices_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    with slots.slot(never, tmp_path) as free:
        assert free and list(tmp_path.iterdir()) == []
