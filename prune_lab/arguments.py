"""Command lines of the sub-commands: argparse whose errors are one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from prune_lab.schema import ConfigError


class Arguments(argparse.ArgumentParser):
    """An argument parser that raises ConfigError and never leaves the process on a wrong option."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"prune-lab {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}")
