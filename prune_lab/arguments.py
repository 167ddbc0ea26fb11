"""Command lines: argparse whose errors are one line, and a ~ that no shell has replaced."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable
from typing import NoReturn

from prune_lab.schema import ConfigError


def with_home(arguments: Iterable[str]) -> list[str]:
    """Return the arguments with the user's own folder for ~ where a path can begin.

    Shells replace a ~ at the beginning of an argument only: not in --out=~/x, nor at all in
    dataset.root=~/a,~/b.
    """
    return [re.sub(r"""(^|[=,\["'])~(?=[/,\]"']|$)""", lambda found: found[1] + os.path.expanduser("~"), argument)
            for argument in arguments]  # fmt: skip


class Arguments(argparse.ArgumentParser):
    """An argument parser that raises ConfigError and never leaves the process on a wrong option."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"prune-lab {command}", description=description, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args(None if args is None else with_home(args), namespace)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}")
