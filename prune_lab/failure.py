"""How every command ends that did not work out: one line on standard error, exit code 1. Torch-free."""

from __future__ import annotations

import sys
import traceback

from prune_lab.schema import ConfigError


def fail(error: Exception) -> int:
    """Say in one line what went wrong and return the exit code; a defect's traceback goes before it or into a log."""
    if isinstance(error, ConfigError):
        line = str(error)
    elif isinstance(error, OSError):
        line = f"{error.filename or ''}: {error.strerror or error}".lstrip(": ")
    else:
        line = f"{type(error).__name__}: {error}"
        if not getattr(error, "__notes__", None):
            traceback.print_exception(error)
    line = " ".join([*line.split(), *(f"({note})" for note in getattr(error, "__notes__", ()))])
    print(f"prune-lab: error: {line}", file=sys.stderr)
    return 1
