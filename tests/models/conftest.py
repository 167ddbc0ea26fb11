"""Where the model tests find shared data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Folder with the shared data and checkpoints; skips the test where there is none."""
    folder = Path(os.environ.get("PRUNE_LAB_TEST_DATA", REPO.parent / "shared"))
    if not (folder / "pretrained").is_dir():
        pytest.skip("no shared data: set PRUNE_LAB_TEST_DATA to a folder with pretrained/ and data/")
    return folder
