"""Number of runs on a machine at once: one or a chosen number per GPU, or one per core without GPUs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from prune_lab.foundations.errors import UserError

_POLL_S = 0.3


def gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; empty without any."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(r"^GPU (\d+):", listed.stdout, re.MULTILINE)


def num_gpus() -> int:
    return len(gpus())


def runs_per_gpu() -> int:
    """Return the number of processes per GPU: 1, or PRUNE_LAB_RUNS_PER_GPU from the environment.

    Raises:
        UserError: the variable is not a whole number of at least 1.
    """
    text = os.environ.get("PRUNE_LAB_RUNS_PER_GPU", "1")
    if not re.fullmatch(r"[1-9]\d*", text):
        raise UserError(f"PRUNE_LAB_RUNS_PER_GPU must be a whole number of at least 1, got {text!r}")
    return int(text)


def num_slots() -> int:
    """Return the number of runs that this machine should take at once."""
    return num_gpus() * runs_per_gpu() or len(os.sched_getaffinity(0))


@contextlib.contextmanager
def slot(stopped: Callable[[], bool], folder: Path | None = None) -> Iterator[bool]:
    """Hold one of the machine's slots while the block runs; yields False if `stopped` became true while waiting.

    All sweeps of a user on the machine share the slots. A GPU's slot makes that GPU the only visible one; a process
    keeps the GPU of its first run, because CUDA cannot change it later. A separate Slurm job already has its
    devices and does not wait.

    Args:
        folder: location of the lock files; default: a folder of the user in the machine's temporary directory.
    """
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        yield not stopped()
        return
    names = gpus()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_slots())))
    # Inside a Slurm allocation GPUs are counted from 0 again.
    owner = "-".join([str(os.getuid()), *([os.environ["SLURM_JOB_ID"]] if "SLURM_JOB_ID" in os.environ else [])])
    folder = folder or Path(tempfile.gettempdir()) / f"prune-lab-slots-{owner}"
    folder.mkdir(mode=0o700, exist_ok=True)
    owners = names or [str(core) for core in range(num_slots())]
    paths = {folder / f"{'gpu' if names else 'core'}-{name}": name for name in owners}
    for share in range(1, runs_per_gpu() if names else 1):
        paths |= {folder / f"gpu-{name}-{share}": name for name in names}
    with contextlib.ExitStack() as stack:
        waited = False
        while not stopped():
            for path, name in paths.items():
                if _lock(path, stack):
                    if names:
                        os.environ["CUDA_VISIBLE_DEVICES"] = name
                    yield True
                    return
            if not waited:
                print(f"waiting for one of {len(paths)} slots of this machine", flush=True)
            waited = True
            time.sleep(_POLL_S)
        yield False


def _lock(path: Path, stack: contextlib.ExitStack) -> bool:
    """Lock the file until the stack is closed, unless another process holds it."""
    file = open(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    stack.callback(file.close)
    return True
