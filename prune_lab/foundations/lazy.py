"""torch, imported on first use: options, help and lists do without it and take milliseconds.

Files that are imported before a run is checked (methods and their parts) write
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
        """Looks up every attribute in the module and caches none, so that patches to torch are seen here."""

        __slots__ = ()

        def __getattribute__(self, name: str):
            import torch

            return getattr(torch, name)

    torch = _Torch()


def no_grad(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate a function (not a generator) as torch.no_grad() does, which would import torch at once."""

    @functools.wraps(function)
    def without_gradients(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with torch.no_grad():
            return function(*args, **kwargs)

    return without_gradients
