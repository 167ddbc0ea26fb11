"""What can be chosen: the files of conf/, by group. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from prune_lab.foundations.errors import UserError


def conf_dir() -> Path:
    """Return the folder of the YAML files: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").exists():
            return folder
    raise UserError(f"no conf/config.yaml in {package} or beside it; install prune-lab again")


def choices(conf_dir: Path, group: str) -> list[str]:
    """Return the file names of a group without their ending; those in folders as folder/name.

    Files that begin with _ hold options for others to inherit and cannot be chosen.
    """
    folder = conf_dir / group
    files = (path for path in folder.rglob("*.yaml") if not path.name.startswith("_"))
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in files)


def own_options(path: Path) -> dict[str, Any]:
    """Return a file's own options, including its defaults list."""
    node: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)  # reads 1e-8 as a number, unlike YAML 1.1
    return node


def options_of(path: Path) -> dict[str, Any]:
    """Return the options of a file that is not a recipe, with those that it inherits from others of its folder."""
    own = own_options(path)
    parents = [name for name in own.pop("defaults", ()) if isinstance(name, str) and name != "_self_"]
    inherited: dict[str, Any] = {}
    for name, _, group in (parent.partition("@") for parent in parents):
        found = options_of(path.with_name(f"{name}.yaml"))
        inherited |= {group: found} if group else found
    return inherited | own


def groups(conf_dir: Path) -> list[str]:
    return sorted(path.name for path in conf_dir.iterdir() if path.is_dir() and path.name != "hydra")


def listed(group: str, allowed: list[str]) -> str:
    """Return all choices on one line, or the command that lists them if they are too many."""
    return ", ".join(allowed) if len(allowed) <= 40 else f"the {len(allowed)} of prune-lab list {group}s"
