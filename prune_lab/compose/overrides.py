"""Command-line overrides, checked before Hydra runs: errors take one line with the nearest name. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prune_lab.compose.check import check
from prune_lab.compose.choices import choices, groups, listed, options_of, own_options
from prune_lab.config.run import RunConfig
from prune_lab.core.method import MethodConfig, method_class
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.home import with_home
from prune_lab.foundations.schema import suggestion

RECIPES = ("experiment", "debug")
"""groups whose files set options of other groups"""


LAUNCHER = "hydra/launcher"
"""the only group of Hydra's own that a command may choose from"""


def launcher_options(overrides: list[str]) -> tuple[list[str], list[str]]:
    """Return (options about Hydra's launcher, all others)."""
    chosen = [line for line in overrides if line.startswith((f"{LAUNCHER}=", "hydra.launcher."))]
    return chosen, [line for line in overrides if line not in chosen]


def compose_checked(conf_dir: Path, overrides: list[str], *, sweep: bool) -> Iterator[RunConfig]:
    """Yield the checked options of every run of `overrides` (several only with `sweep`).

    Raises:
        UserError: naming the option as typed, the nearest valid name and the allowed values.
    """
    with initialize_config_dir(str(conf_dir), version_base="1.3"):
        parsed = parse_overrides(overrides)
        for override in parsed:
            if override.is_sweep_override() and not sweep:
                raise UserError(f"{override.input_line} gives several values: add -m to run them all, or choose one")
            _check_name(conf_dir, override)
        for job in _jobs(parsed, sweep=sweep):
            yield _compose_one(conf_dir, job)


def plain(node: Any) -> dict[str, Any]:
    """Return a composed configuration as plain containers, without Hydra's own part."""
    own = OmegaConf.masked_copy(node, [key for key in node if key != "hydra"])
    containers: Any = OmegaConf.to_container(own, resolve=True)
    return containers


def parse_overrides(overrides: list[str]) -> list[Override]:
    """Return the overrides as Hydra reads them; needs an initialised Hydra for `glob(...)`."""
    try:
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        return parser.parse_overrides(with_home(overrides))
    except OverrideParseException as error:
        name, equals, value = error.override.partition("=")
        if not equals or not name or not value:
            raise UserError(f"cannot read {error.override!r}; options are written as name=value") from error
        raise UserError(
            f"cannot read {error.override!r}; a text with special characters needs quotes of its own: "
            f"""'{name}="{value.strip("'" + '"')}"'"""
        ) from error


def _check_name(conf_dir: Path, override: Override) -> None:
    """Reject an override that is wrong by itself, whatever the others are."""
    key, line = override.key_or_group, override.input_line
    if not key:
        raise UserError(f"{line}: the name before = is missing")
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        raise UserError(f"{line}: Hydra's own options are fixed, but for {LAUNCHER} and hydra.launcher.*; use -m "
                          "for a sweep and output_dir for the place")
    if key not in groups(conf_dir):
        return
    allowed = choices(conf_dir, key)
    if override.is_delete():
        raise UserError(f"{line}: a run needs {key}=...; allowed: {', '.join(allowed)}")
    if override.is_add() or override.is_force_add() or override.package is not None:
        raise UserError(f"{line}: a choice is written {key}=NAME; allowed: {', '.join(allowed)}")
    for value in _group_values(override, allowed):
        if value in ("", "null") and key in RECIPES:
            raise UserError(f"{line}: leave {key}=... out to have none; allowed: {', '.join(allowed)}")
        if value not in allowed:
            near = suggestion(value, allowed)
            raise UserError(f"{key}={value} is not a choice{near}; allowed: {listed(key, allowed)}")


def _group_values(override: Override, allowed: list[str]) -> list[str]:
    value = override.value()
    if isinstance(value, Glob):
        found = value.filter(allowed)
        if not found:
            raise UserError(f"{override.input_line} matches nothing; allowed: {', '.join(allowed)}")
        return found
    if override.is_sweep_override():
        return [str(entry) for entry in override.sweep_string_iterator()]
    if isinstance(value, (list, dict)):
        raise UserError(f"{override.input_line}: one choice at a time; allowed: {', '.join(allowed)}")
    return ["null" if value is None else str(value)]


def _line(override: Override) -> str:
    """Return the text that an override was parsed from."""
    return override.input_line or ""


def _jobs(parsed: list[Override], *, sweep: bool) -> list[list[str]]:
    if not sweep:
        return [[_line(override) for override in parsed]]
    for override in parsed:
        if override.is_interval_sweep():
            raise UserError(f"{override.input_line} has no end of values; write a,b,c or range(start,stop,step)")
    texts = {override.get_key_element(): _texts(override) for override in parsed}  # the last of equal names counts
    return [list(job) for job in product(*texts.values())]


def _texts(override: Override) -> list[str]:
    """Return the override for each of its values; without a sweep there is one."""
    swept = override.is_sweep_override()
    values = override.sweep_string_iterator() if swept else [override.get_value_element_as_str()]
    return [f"{override.get_key_element()}={value}" for value in values]


def _compose_one(conf_dir: Path, overrides: list[str]) -> RunConfig:
    try:
        composed = compose("config", overrides, return_hydra_config=True)
        node = plain(composed)
        chosen = composed.hydra.runtime.choices
        _check_names(conf_dir, node, chosen)
        _drop_default_goals(conf_dir, node, overrides, chosen["method"])
        return replace(check(node), overrides=tuple(overrides))
    except UserError as error:
        raise _located(conf_dir, overrides, error) from error
    except yaml.YAMLError as error:
        raise UserError(_one_line(error)) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise _explained(conf_dir, overrides, error) from error


def _check_names(conf_dir: Path, node: dict[str, Any], chosen: Mapping[str, str | None]) -> None:
    """Raise UserError if a choice is renamed to another choice: every table shows the name.

    Only a file that leaves its name open, such as model/torchvision.yaml, lets the command set it.
    """
    for group in groups(conf_dir):
        own = own_options(conf_dir / group / f"{chosen[group]}.yaml").get("name") if chosen.get(group) else None
        name = node[group].get("name") if own is not None else None
        if name != own:
            near = f"{group}={name}" if name in choices(conf_dir, group) else f"{group}=NAME"
            raise UserError(f"{group}.name={name}: the name of {group}={chosen[group]} is no option; choose another "
                              f"{group} with {near}", f"{group}.name")  # fmt: skip


def _drop_default_goals(conf_dir: Path, node: dict[str, Any], overrides: list[str], method: str) -> None:
    """Remove the goals of a method's file from `node` where the command or a recipe chooses others."""
    own, options = options_of(conf_dir / "method" / f"{method}.yaml"), node["method"]
    goals = [goal for goal in _method_options(options.get("_target_")).GOALS if goal in options]
    typed = {override.key_or_group for override in parse_overrides(overrides)}
    named = [goal for goal in goals if f"method.{goal}" in typed or options[goal] != own.get(goal)]
    if any(options[goal] not in (None, []) for goal in named):
        options.update({goal: [] if isinstance(own[goal], list) else None for goal in goals if goal not in named})


def _method_options(target: Any) -> type[MethodConfig]:
    return method_class(target).Config


def _located(conf_dir: Path, overrides: list[str], error: UserError) -> UserError:
    """Return `error` with the recipe file that sets its option, unless the command line sets it."""
    parsed = parse_overrides(overrides)
    if error.option is None or any(override.key_or_group == error.option for override in parsed):
        return error
    for override in parsed:
        if override.key_or_group in RECIPES:
            name = f"{override.key_or_group}/{override.value()}.yaml"
            if error.option in _keys(own_options(conf_dir / name)):
                return UserError(f"{error} (set in conf/{name})", error.option)
    return error


def _explained(conf_dir: Path, overrides: list[str], error: Exception) -> UserError:
    """Return the error for an override of an unknown key, naming the nearest valid one."""
    parsed = parse_overrides(overrides)
    values = [override for override in parsed if override.key_or_group not in groups(conf_dir)]
    others = [_line(override) for override in parsed if override not in values]
    try:
        node = plain(compose("config", others))
    except (HydraException, OmegaConfBaseException):
        return UserError(_one_line(error))
    known = [key for key in _keys(node) if not key.endswith("_target_")]
    for override in values:
        key = override.key_or_group
        if key not in known and not override.is_add():
            return UserError(_unknown(conf_dir, node, known, key))
    return UserError(_one_line(error))


def _unknown(conf_dir: Path, node: dict[str, Any], known: list[str], key: str) -> str:
    """Return the message for an option missing from the composed `node`, whose dotted names are `known`."""
    parent, _, last = key.rpartition(".")
    while parent and parent not in known:
        parent = parent.rpartition(".")[0]
    siblings = [name for name in known if name.rpartition(".")[0] == parent]
    note = _method_options(node["method"].get("_target_")).absent(last) if parent == "method" else None
    if note:
        return f"unknown option {key}: {note}; allowed: {', '.join(siblings)}"
    if parent in groups(conf_dir) and key == f"{parent}.{last}":
        owners = [name for name in choices(conf_dir, parent) if last in options_of(conf_dir / parent / f"{name}.yaml")]
        if owners:
            chosen = f"{parent}={node[parent].get('name')}"
            return (
                f"unknown option {key}: {chosen} has none, only {parent}={'|'.join(owners)}; "
                f"allowed: {', '.join(siblings)}"
            )
    same_last = [name for name in known if name.rpartition(".")[2] == last]
    near = f" (did you mean {' or '.join(map(repr, same_last))}?)" if same_last and "." not in key else ""
    near = near or suggestion(key, same_last) or suggestion(key, siblings) or suggestion(key, known)
    return f"unknown option {key}{near}; allowed: {', '.join(siblings)}"


def _keys(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


def _one_line(error: Exception) -> str:
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:4])
