"""Layers named by patterns, in which * matches any text and ? one character. Imports no torch."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import suggestion


def matches(patterns: Iterable[str], *names: str) -> bool:
    """Return whether a pattern matches a name."""
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def check(option: str, patterns: Iterable[str], names: Sequence[str], what: str) -> None:
    """Raise UserError if a pattern matches none of the names.

    Args:
        option: as the user types it.
        what: kind of the names, such as "layer".
    """
    for pattern in patterns:
        if not matches([pattern], *names):
            raise UserError(
                f"{option}: {pattern!r} matches no {what}{suggestion(pattern, names)}; there are "
                f"{', '.join(names) or 'none'}"
            )
