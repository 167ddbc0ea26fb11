"""What all tests share: one torch thread, no W&B, a cache of their own, the command as a child process."""

from __future__ import annotations

import copy
import gc
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads that share a busy core wait for each other
os.environ.setdefault("WANDB_MODE", "disabled")

REPO = Path(__file__).parents[1]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave all but every n-th repetition of a thin test to the slow ones."""
    seen: Counter[str] = Counter()
    for item in items:
        thin = item.get_closest_marker("thin")
        if thin is not None and item.get_closest_marker("slow") is None:
            test = item.nodeid.partition("[")[0]
            if seen[test] % thin.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[test] += 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep tests that share what they build in one process; with pytest 9.2 the marks of xdist 3.8 do nothing."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return ByGroup(config, log) if config.getvalue("dist") == "loadgroup" else None


def group(nodeid: str) -> str:
    """Return the file of a test, the folder of the recipes, or the method that the contract is tested with."""
    file, _, test = nodeid.partition("::")
    if file.startswith("tests/recipes/"):
        return "tests/recipes"
    if not file.endswith("/test_contract.py"):
        return file
    method = re.search(r"\[(\w+)", test)
    return f"{file}, {method[1]}" if method else file


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Iterator[Any]:
    """Search no garbage in what is made while tests are collected: it stays, and searching it takes seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def files_are_parsed_once() -> Iterator[None]:
    """Keep what a text of YAML says: thousands of compositions read the same files of conf/."""
    known: dict[str, Any] = {}
    load = OmegaConf.load

    def load_once(source: Any) -> Any:
        text = source.read() if hasattr(source, "read") else Path(source).read_text()
        if hasattr(source, "seek"):
            source.seek(0)
        if text not in known:
            known[text] = load(source)
        return copy.deepcopy(known[text])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OmegaConf, "load", load_once)
        yield


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Folder with the shared data and checkpoints; skips the test where there is none."""
    folder = Path(os.environ.get("PRUNE_LAB_TEST_DATA", REPO.parent / "shared"))
    if not (folder / "pretrained").is_dir():
        pytest.skip("no shared data: set PRUNE_LAB_TEST_DATA to a folder with pretrained/ and data/")
    return folder


@pytest.fixture(scope="session")
def child_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of child processes: this checkout on the path, one thread, no W&B, a cache of their own."""
    cache = tmp_path_factory.mktemp("cache")
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    quiet = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "PRUNE_LAB_CACHE": str(cache)}
    return os.environ | quiet | {"PYTHONPATH": path}


@pytest.fixture
def prune_lab(tmp_path: Path, child_environment: dict[str, str]):
    """Return a function that runs `python -m prune_lab ARGUMENTS` in `tmp_path` and returns the finished process."""

    def call(*arguments: str, timeout: float = 300, cwd: Path = tmp_path) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "prune_lab", *arguments]
        return subprocess.run(command, cwd=cwd, env=child_environment, capture_output=True, text=True, timeout=timeout)

    return call


def only_summary(folder: Path) -> dict:
    """Return the summary of the only run below `folder`."""
    (path,) = folder.glob("outputs/*/summary.json")
    return json.loads(path.read_text())
