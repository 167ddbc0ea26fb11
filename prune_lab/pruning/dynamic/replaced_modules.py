"""Modules that replace an architecture's own: listed in model.json, and inserted again before tensors load."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import nn

from prune_lab.foundations.errors import UserError

_HOMES = {"HashedConv2d": "prune_lab.pruning.dynamic.hashed_convolution"}
"""class -> its file. Such a class has `of(module, **options)`, which returns the replacement, and `options()`"""


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return module path -> {"type": class, options}, JSON-able, for every replacement module."""
    named = model.named_modules(remove_duplicate=False)
    return {path: {"type": type(module).__name__, **module.options()} for path, module in named if _is_known(module)}


def replace(model: nn.Module, described: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace modules of `model` by those of `described` (see `describe`), once for a shared one.

    Raises:
        UserError: an unknown class, a path that is not in the model, options that do not fit.
    """
    made: dict[nn.Module, nn.Module] = {}
    for path, entry in described.items():
        options = dict(entry)
        kind = options.pop("type", None)
        if kind not in _HOMES:
            raise UserError(f"model.json: {path} has the type {kind}; known are {', '.join(_HOMES)}")
        try:
            own = model.get_submodule(path)
            if own not in made:
                made[own] = getattr(import_module(_HOMES[kind]), kind).of(own, **options)
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"model.json: {path} cannot become a {kind}: {str(error).splitlines()[0]}") from error
        model.set_submodule(path, made[own])


def _is_known(module: nn.Module) -> bool:
    return _HOMES.get(type(module).__name__) == type(module).__module__
