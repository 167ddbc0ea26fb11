"""Determines whether W&B can be used online, from the environment and files alone: no network, no prompt, no wandb."""

from __future__ import annotations

import configparser
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from prune_lab.foundations.errors import UserError

Mode = Literal["online", "offline", "disabled"]

_DEFAULT_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
"""W&B's own server under its old and its new name; `wandb login` may have stored the key under either."""

_WANDB_MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}


def resolve_mode(setting: Mode | Literal["auto"], environ: Mapping[str, str] = os.environ) -> Mode:
    """Return the mode that `logger.wandb=setting` selects here.

    `auto` follows the variable WANDB_MODE if it is set; else it is online when a key is configured (WANDB_API_KEY,
    WANDB_IDENTITY_TOKEN_FILE, or a netrc entry for the server), and offline otherwise.

    Raises:
        UserError: online is chosen and no key is configured. W&B would stop and prompt for one.
    """
    mode = _WANDB_MODES.get(environ.get("WANDB_MODE", "")) if setting == "auto" else setting
    if mode is None:
        return "online" if _is_configured(environ) else "offline"
    if mode == "online" and not _is_configured(environ):
        raise UserError(
            "logger.wandb=online needs a W&B key (wandb login, or WANDB_API_KEY); "
            "allowed without one: auto, offline, disabled"
        )
    return mode


def require_key(command: str, *, hint: str = "", environ: Mapping[str, str] = os.environ) -> None:
    """Raise UserError unless a key is configured that `command` can use; `hint` ends the message."""
    if not _is_configured(environ):
        raise UserError(f"{command} needs a W&B key (wandb login, or WANDB_API_KEY){hint}")


def find_key(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the API key for the configured server, or None."""
    if environ.get("WANDB_API_KEY"):
        return environ["WANDB_API_KEY"]
    try:
        entries = netrc.netrc(_netrc_path(environ))
    except (OSError, netrc.NetrcParseError):
        return None
    base_url = environ.get("WANDB_BASE_URL") or _base_url_setting(environ)
    hosts = (urlsplit(base_url).netloc,) if base_url else _DEFAULT_HOSTS
    if hosts[0] in _DEFAULT_HOSTS:
        hosts = _DEFAULT_HOSTS
    found = (entries.hosts.get(host) for host in hosts)  # the `default` entry is not a W&B key
    return next((entry[2] for entry in found if entry and entry[2]), None)


def _is_configured(environ: Mapping[str, str]) -> bool:
    return bool(find_key(environ) or environ.get("WANDB_IDENTITY_TOKEN_FILE"))


def _netrc_path(environ: Mapping[str, str]) -> Path:
    if environ.get("NETRC"):
        return Path(environ["NETRC"]).expanduser()
    home = Path("~/.netrc").expanduser()
    return home if home.exists() else Path("~/_netrc").expanduser()


def _base_url_setting(environ: Mapping[str, str]) -> str | None:
    """Return the server set with `wandb login --host`, which W&B keeps in its settings file."""
    folder = Path(environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    parser = configparser.ConfigParser()
    try:
        parser.read(folder / "settings")
    except configparser.Error:
        return None
    return parser.get("default", "base_url", fallback=None)
