"""A ~ at the beginning of a typed path stands for the user's own folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable


def with_home(arguments: Iterable[str]) -> list[str]:
    """Return the arguments with the user's own folder for ~ where a path can begin.

    Shells replace a ~ at the beginning of an argument only: not in --out=~/x, nor at all in
    dataset.root=~/a,~/b.
    """
    return [re.sub(r"""(^|[=,\["'])~(?=[/,\]"']|$)""", lambda found: found[1] + os.path.expanduser("~"), argument)
            for argument in arguments]  # fmt: skip
