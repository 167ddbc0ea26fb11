"""Checked options: plain mappings into dataclasses, with one-line errors that name the option as typed."""

from __future__ import annotations

import difflib
import math
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union

import yaml

from prune_lab.foundations.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


@dataclass(frozen=True)
class Range:
    """Allowed interval of a number; `open_low` and `open_high` exclude the end points."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def contains(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        left = "(" if self.open_low or self.low == -math.inf else "["
        right = ")" if self.open_high or self.high == math.inf else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


@dataclass(frozen=True)
class Word:
    """Allowed strings: those that can be part of a file name."""

    def contains(self, value: str) -> bool:
        return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", value) is not None

    def __str__(self) -> str:
        return "letters, digits and _.+- (it becomes part of a directory's name)"


@dataclass(frozen=True)
class Example:
    """A string in its own format: the error for anything else, such as half of it read as a number, has an example."""

    text: str


@dataclass(frozen=True)
class Home:
    """A path, in which a leading ~ means the home directory, as in a shell."""


FilePath = Annotated[str, Home()]
Positive = Annotated[float, Range(0, open_low=True)]
NonNegative = Annotated[float, Range(0)]
OpenFraction = Annotated[float, Range(0, 1, open_low=True, open_high=True)]
Momentum = Annotated[float, Range(0, 1, open_high=True)]
Fraction = Annotated[float, Range(0, 1)]
Count = Annotated[int, Range(1)]
Index = Annotated[int, Range(0)]
Name = Annotated[str, Word()]


def suggestion(name: str, allowed: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the nearest of `allowed`, or an empty string."""
    near = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""


def require_one(path: str, options: Mapping[str, Any], *, unset: str = "null") -> None:
    """Raise UserError unless exactly one of the options is set.

    Args:
        path: dotted name of their group as the user types it.
        options: name -> value, None: not set.
        unset: how the user leaves an option unset.
    """
    names = [f"{path}.{name}" for name in options]
    given = [f"{path}.{name}={value:g}" if isinstance(value, float) else f"{path}.{name}"
             for name, value in options.items() if value is not None]
    if len(given) != 1:
        raise UserError(
            f"exactly one of {', '.join(names[:-1])} and {names[-1]} must be set, the others {unset}; got "
            f"{' and '.join(given) or 'none'}"
        )


def parse(cls: type[T], node: Mapping[str, Any], path: str) -> T:
    """Return `cls` built from `node` after checking names, types and ranges.

    Args:
        cls: a dataclass. Every field must be in `node`: YAML files hold the values, dataclasses the rules.
            A nested dataclass is parsed likewise. If `cls` has a method `check(path)`, it is called last and
            may raise UserError for rules across fields. If it has a function `absent(key)`, its text about an
            unknown key (None: no text) replaces the nearest name.
        node: plain mapping, such as OmegaConf.to_container(cfg, resolve=True).
        path: dotted name of the node as the user types it, "" at the root.

    Raises:
        UserError: unknown or missing key, wrong type, NaN, value out of range.
    """
    if not isinstance(node, Mapping):
        raise UserError(f"{path or 'the configuration'} must be a group of options, got {as_typed(node)}", path)
    hints = typing.get_type_hints(cls, include_extras=True)
    names = [field.name for field in fields(cls)]
    absent = getattr(cls, "absent", None)
    for key in node:
        if key not in names:
            note = absent(str(key)) if absent else None
            raise UserError(
                f"unknown option {_join(path, key)}{f': {note}' if note else suggestion(str(key), names)}; "
                f"allowed under {path or 'the top level'}: {', '.join(names)}",
                _join(path, key),
            )
    values = {}
    for field in fields(cls):
        if field.name in node:
            values[field.name] = coerce(hints[field.name], node[field.name], _join(path, field.name))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"missing option {_join(path, field.name)}", _join(path, field.name))
    config = cls(**values)
    if hasattr(config, "check"):
        config.check(path)
    return config


def coerce(hint: Any, value: Any, path: str) -> Any:
    """Return `value` as the type `hint`, or raise UserError naming `path`."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        base, *rules = typing.get_args(hint)
        for rule in rules:
            if isinstance(rule, Example) and not isinstance(value, str):
                raise UserError(f"{path} must be a text such as {rule.text}, got {as_typed(value)}", path)
        result = coerce(base, value, path)
        for rule in rules:
            if isinstance(rule, Range) and not rule.contains(result):
                raise UserError(f"{path} must lie in {rule}, got {value}", path)
            if isinstance(rule, Home):
                result = os.path.expanduser(result)
            if isinstance(rule, Word) and not rule.contains(result):
                raise UserError(f"{path} must consist of {rule}, got {as_typed(value)}", path)
        return result
    if origin in (Union, types.UnionType):
        return _coerce_union(typing.get_args(hint), value, path)
    if origin is Literal:
        allowed = typing.get_args(hint)
        for choice in allowed:  # type too: 1.0 and true equal 1
            if value == choice and type(value) is type(choice):
                return choice
        names = [str(choice) for choice in allowed]
        near = suggestion(value, names) if isinstance(value, str) else _misread(value, allowed)
        raise UserError(f"{path}={as_typed(value)} is not allowed{near}; allowed: {', '.join(names)}", path)
    if origin in (list, tuple):
        return origin(_coerce_list(typing.get_args(hint)[0], value, path))
    if origin is dict:
        item = typing.get_args(hint)[1]
        if not isinstance(value, Mapping):
            raise UserError(f"{path} must be a group of options, got {as_typed(value)}", path)
        return {key: coerce(item, entry, _join(path, key)) for key, entry in value.items()}
    if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__"):
        return parse(hint, value, path)
    return _coerce_scalar(hint, value, path)


def _misread(value: Any, choices: Iterable[Any]) -> str:
    """Return advice if `value` is how YAML reads an unquoted string of `choices`, such as 124 for 2:4."""
    for choice in (choice for choice in choices if isinstance(choice, str)):
        read = yaml.safe_load(choice)
        if read == value and type(read) is type(value):
            return f" (YAML reads {choice} so; write it in quotes: '{choice}')"
    return ""


def _coerce_union(options: tuple, value: Any, path: str) -> Any:
    if value is None and type(None) in options:
        return None
    kept = [option for option in options if option is not type(None)]
    if bool in kept and isinstance(value, bool):
        return value
    last, refused = kept[-1], []
    for option in kept[:-1]:
        try:
            return coerce(option, value, path)
        except UserError as error:
            refused.append(error)
    if refused and bool not in kept and typing.get_origin(last) is Literal:  # a number, or a named choice
        return _number_or_word(last, value, path, refused[0])
    if bool in kept and typing.get_origin(last) is Literal:  # one list of everything allowed
        last = Literal["true", "false", *typing.get_args(last)]
        if value in ("true", "false"):
            raise UserError(f"{path} must be written without quotes, got the text {value!r}", path)
    return coerce(last, value, path)


def _number_or_word(words: Any, value: Any, path: str, refused: UserError) -> str:
    """Return `value` if it is among `words`; else raise UserError that lists them after the text of `refused`."""
    choices = typing.get_args(words)
    if value in choices:
        return value
    near = suggestion(value, choices) if isinstance(value, str) else ""
    raise UserError(f"{refused}{near}; or {', '.join(choices)}", path)


def _coerce_list(item: Any, value: Any, path: str) -> list:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{path} must be a list such as [a,b], got {as_typed(value)}", path)
    return [coerce(item, entry, f"{path}[{index}]") for index, entry in enumerate(value)]


def _coerce_scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is Any:
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not abs(value) <= sys.float_info.max:  # NaN too
            raise UserError(f"{path} must be a finite number, got {str(value)[:20]}", path)
        return float(value)
    if hint is str and isinstance(value, str):
        return value
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    raise UserError(f"{path} must be {words.get(hint, hint)}, got {as_typed(value)}", path)


def as_typed(value: Any) -> str:
    """Return `value` on one line as the user types it on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return repr(value) if value == "" or "\n" in value else value
    return "null" if value is None else str(value)


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
