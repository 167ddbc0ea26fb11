"""A user of W&B in the tests: the variables of an account on the local server, and commands in a child process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.wandb_server import API_KEY, WandbServer

ROOT = Path(__file__).parents[2]


def user_environment(folder: Path) -> dict[str, str]:
    """Return the variables of a user without any W&B account or settings; what W&B writes goes below `folder`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    folders = {f"WANDB_{name}_DIR": str(folder / "w" / name) for name in ("CONFIG", "CACHE", "DATA")}
    python_path = os.pathsep.join([str(ROOT), kept.get("PYTHONPATH", "")])
    return kept | folders | {"NETRC": str(folder / "none"), "PYTHONPATH": python_path}


def online(environment: dict[str, str], server: WandbServer) -> dict[str, str]:
    """Return the variables of a user with an account on `server`."""
    return environment | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": API_KEY}


def call(*arguments: object, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run one command line in a process of its own."""
    command = [sys.executable, "-m", "prune_lab", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
