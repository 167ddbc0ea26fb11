"""Modules that load on first use, so that configuration is checked without torch."""

from __future__ import annotations

import importlib
from types import ModuleType


class _LazyModule(ModuleType):
    def __getattr__(self, name: str):
        module = importlib.import_module(self.__name__)
        self.__dict__.update(module.__dict__)
        return getattr(module, name)


def lazy_import(name: str) -> ModuleType:
    """Return a stand-in for module `name` that imports it on the first attribute access.

    Method, model and data-set files carry both the options (checked in milliseconds) and the code that
    needs torch (seconds to import). They take torch through this stand-in and keep both in one file.

    Raises:
        ImportError: on the first attribute access, if the module cannot be imported.
    """
    return _LazyModule(name)
