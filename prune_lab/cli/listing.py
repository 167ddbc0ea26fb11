"""prune-lab list: the choices, read from the YAML files and the methods' cards. Torch-free."""

from __future__ import annotations

from pathlib import Path

import yaml

from prune_lab.cli.completion import LISTS
from prune_lab.compose.choices import choices
from prune_lab.core.method import method_class
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import suggestion

WHAT = {name: name.removesuffix("s") for name in LISTS}


def show(conf_dir: Path, arguments: list[str]) -> int:
    """Print the choices of one group, one per line: name and description."""
    if len(arguments) != 1 or arguments[0] not in WHAT:
        typed = arguments[0] if arguments else ""
        near = "" if typed in WHAT else suggestion(typed, WHAT)
        raise UserError(f"{' '.join(['prune-lab list', *arguments])}: give one of {', '.join(WHAT)}{near}")
    group = WHAT[arguments[0]]
    names = choices(conf_dir, group)
    width = max(22, *map(len, names))
    for name in names:
        path = conf_dir / group / f"{name}.yaml"
        print(f"{name:{width}} {_card(path) if group == 'method' else _first_comment(path)}".rstrip())
    return 0


def _first_comment(path: Path) -> str:
    lines = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    return next((line for line in lines if line and not line.startswith("@package")), "")


def _card(path: Path) -> str:
    card = method_class(yaml.safe_load(path.read_text(encoding="utf-8"))["_target_"]).card
    return f"{card.summary} [{card.paper}]"
