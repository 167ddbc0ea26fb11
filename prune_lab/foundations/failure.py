"""How a command fails: one line on standard error, exit code 1. Torch-free."""

from __future__ import annotations

import sys
import traceback

from prune_lab.foundations.errors import UserError


def lost_decoder(error: BaseException) -> str | None:
    """Return one line if a process that decodes images has died, None for any other error.

    torch raises this wherever the main process happens to be, and the error has no type of its own.
    """
    if not (isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")):
        return None
    return "a process that decodes images was killed (short of memory?); the same command goes on"


def fail(error: Exception) -> int:
    """Report the error in one line and return the exit code; a defect's traceback goes before it or into a log."""
    if isinstance(error, UserError):
        line = str(error)
    elif isinstance(error, OSError):
        line = f"{error.filename or ''}: {error.strerror or error}".lstrip(": ")
    elif not (line := lost_decoder(error) or ""):
        line = f"{type(error).__name__}: {error}"
        if not getattr(error, "__notes__", None):
            traceback.print_exception(error)
    line = " ".join([*line.split(), *(f"({note})" for note in getattr(error, "__notes__", ()))])
    print(f"prune-lab: error: {line}", file=sys.stderr)
    return 1
