"""Shell completion of the sub-commands; Hydra completes options. Torch-free."""

from __future__ import annotations

COMMANDS = ("run", "list", "tune", "compare", "verdict", "connect", "hessian-projection", "export", "dashboard",
            "wandb-sync")  # fmt: skip
LISTS = ("models", "datasets", "methods", "schedules", "experiments")


def completions(line: str) -> list[str] | None:
    """Return what may follow the command line `line` up to the cursor, or None where options follow.

    With an empty list the shell offers file names.
    """
    words = line.split()
    if not line or line[-1].isspace():
        words.append("")
    if len(words) == 2 and words[1] and "=" not in words[1]:
        return [command for command in COMMANDS if command.startswith(words[1])] or None
    if len(words) > 2 and words[1] == "list":
        return [name for name in LISTS if name.startswith(words[2])] if len(words) == 3 else []
    takes_runs = len(words) > 2 and words[1] in COMMANDS and words[1] not in ("run", "list", "tune")
    return [] if takes_runs and "=" not in words[-1] else None


def without_run(line: str) -> str:
    """Return the command line as Hydra, which knows no sub-commands, can complete it."""
    words = line.split(maxsplit=2)
    return f"{words[0]} {words[2] if len(words) > 2 else ''}" if words[1:2] in (["run"], ["tune"]) else line
