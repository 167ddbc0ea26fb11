"""Small finished runs for analyses, and an analysis called in an empty folder. Holds no tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.helpers.runs import TINY, execute

SMALL = (*TINY, "schedule.train.epochs=1", "dataset.augment=true")


def make_run(folder: Path, *overrides: str) -> Path:
    """Do a small run with its outputs in `folder` and return its directory."""
    before = set(folder.glob("*/run.json"))
    assert execute(folder, *SMALL, *overrides) == 0
    (path,) = set(folder.glob("*/run.json")) - before
    return path.parent


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below `folder` with what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def only_result(folder: Path) -> dict[str, Any]:
    """Return what the only analysis in `folder` found."""
    (path,) = folder.rglob("result.json")
    return json.loads(path.read_text())
