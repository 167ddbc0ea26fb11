"""A ~ at the beginning of a typed path means the user's home directory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any


def with_home(arguments: Iterable[str]) -> list[str]:
    """Return the arguments with the home directory for ~ where a path can begin.

    Shells expand a ~ at the beginning of an argument only: not in --out=~/x, nor in dataset.root=~/a,~/b.
    """
    return [re.sub(r"""(^|[=,\["'])~(?=[/,\]"']|$)""", lambda found: found[1] + os.path.expanduser("~"), argument)
            for argument in arguments]  # fmt: skip


def without_home(value: Any) -> Any:
    """Return plain containers with ~ for the home directory at the beginning of every path, so they fit other users.

    Options that are paths take the ~ back (see schema.FilePath).
    """
    if isinstance(value, dict):
        return {key: without_home(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_home(entry) for entry in value]
    home = os.path.expanduser("~")
    return f"~{value.removeprefix(home)}" if isinstance(value, str) and value.startswith(home + os.sep) else value
