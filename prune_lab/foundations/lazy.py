"""torch, imported when something of it is first used: options, help and lists are answered without it, in milliseconds.

Files that are read before a run is checked (methods, and what they are made of) write
`from prune_lab.foundations.lazy import torch`. Nothing else is lazy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        """Looks everything up in the module and keeps nothing of it, so that what is patched there is seen here."""

        __slots__ = ()

        def __getattribute__(self, name: str):
            import torch

            return getattr(torch, name)

    torch = _Torch()


def no_grad(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate a function that is no generator as torch.no_grad() does, which would import torch at once."""

    @functools.wraps(function)
    def without_gradients(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with torch.no_grad():
            return function(*args, **kwargs)

    return without_gradients
