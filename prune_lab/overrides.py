"""Command-line overrides checked before Hydra runs: one line with the nearest name instead of a page. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prune_lab.config import RunConfig, check
from prune_lab.schema import ConfigError, suggestion


def compose_checked(conf_dir: Path, overrides: list[str], *, sweep: bool) -> Iterator[RunConfig]:
    """Yield the checked options of every run that `overrides` ask for (several only with `sweep`).

    Raises:
        ConfigError: naming the option as typed, the nearest valid name and what is allowed.
    """
    parsed = parse_overrides(overrides)
    for override in parsed:
        _check_name(conf_dir, override)
        if override.is_sweep_override() and not sweep:
            raise ConfigError(f"{override.input_line} gives several values: add -m to run them all, or choose one")
    with initialize_config_dir(str(conf_dir), version_base="1.3"):
        for job in _jobs(parsed, sweep=sweep):
            yield _compose_one(conf_dir, job)


def parse_overrides(overrides: list[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        raise ConfigError(f"cannot read the option {error.override!r}; write it as name=value") from error


def choices(conf_dir: Path, group: str) -> list[str]:
    """Return the file names of a group without their ending."""
    return sorted(path.stem for path in (conf_dir / group).glob("*.yaml"))


def groups(conf_dir: Path) -> list[str]:
    return sorted(path.name for path in conf_dir.iterdir() if path.is_dir())


def _check_name(conf_dir: Path, override: Override) -> None:
    key = override.key_or_group
    if key.startswith("hydra"):
        return
    if key not in groups(conf_dir):
        if "." not in key and "/" not in key and not (conf_dir / "config.yaml").read_text().count(f"\n{key}:"):
            known = groups(conf_dir) + ["seed", "output_dir", "dry_run"]
            raise ConfigError(f"unknown option {key}{suggestion(key, known)}; allowed: {', '.join(known)}")
        return
    allowed = choices(conf_dir, key)
    for value in _group_values(override):
        if value == "null" and key in ("experiment", "debug"):
            continue
        if value not in allowed:
            raise ConfigError(f"{key}={value} is not a choice{suggestion(value, allowed)}; allowed: {', '.join(allowed)}")


def _group_values(override: Override) -> list[str]:
    if override.is_sweep_override():
        return [str(value) for value in override.sweep_string_iterator()]
    value = override.value()
    if value is None:
        return ["null"]
    return [str(entry) for entry in value] if isinstance(value, list) else [str(value)]


def _jobs(parsed: list[Override], *, sweep: bool) -> list[list[str]]:
    if not sweep:
        return [[override.input_line for override in parsed]]
    return [list(job) for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None) for job in batch]


def _compose_one(conf_dir: Path, overrides: list[str]) -> RunConfig:
    try:
        node = compose("config", overrides)
        return check(plain(node))
    except ConfigCompositionException as error:
        raise _explained(conf_dir, overrides, error) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from error


def plain(node: Any) -> dict[str, Any]:
    """Return a composed configuration as plain containers, without Hydra's own part."""
    container = OmegaConf.to_container(node, resolve=True)
    return {key: value for key, value in container.items() if key != "hydra"}


def _explained(conf_dir: Path, overrides: list[str], error: Exception) -> ConfigError:
    """Return the error for an override of a key that does not exist, naming the nearest one that does."""
    parsed = parse_overrides(overrides)
    values = [override for override in parsed if override.key_or_group not in groups(conf_dir)]
    others = [override.input_line for override in parsed if override not in values]
    try:
        node = plain(compose("config", others))
    except (HydraException, OmegaConfBaseException):
        return ConfigError(_one_line(error))
    known = list(_keys(node))
    for override in values:
        key = override.key_or_group
        if key not in known and not override.is_add():
            parent = key.rpartition(".")[0]
            near = [name for name in known if name.rpartition(".")[0] == parent] or [n for n in known if "." not in n]
            return ConfigError(f"unknown option {key}{suggestion(key, known)}; allowed: {', '.join(near)}")
    return ConfigError(_one_line(error))


def _keys(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])
