"""Command lines: argparse with one-line errors, and a ~ that no shell has expanded."""

from __future__ import annotations

import argparse
from typing import NoReturn

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.home import with_home


class Arguments(argparse.ArgumentParser):
    """An argument parser that raises UserError and never exits on a wrong option."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"prune-lab {command}", description=description, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args(None if args is None else with_home(args), namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}")
