"""The command prune-lab: finds conf/, checks options, hands over to Hydra or to a sub-command. Torch-free."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from prune_lab import __version__
from prune_lab.schema import ConfigError, suggestion

COMMANDS = ("run", "list", "compare", "wandb-sync")
_HYDRA_ONLY = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc", "--package", "-p", "--resolve")
_VALUE_FLAGS = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--experimental-rerun")

HELP = """prune-lab {version}: trains, prunes and fine-tunes neural networks, and keeps exact accounts.

  prune-lab method=rigl model=resnet20 dataset=cifar10      one run; the same command resumes or says "done"
  prune-lab -m method=rigl,set seed=0,1,2                   a sweep: every combination
  prune-lab dry_run=true method=rigl model=resnet50         the plan, layer by layer; trains nothing
  prune-lab list models|datasets|methods|schedules|experiments
  prune-lab compare outputs                                 table over seeds of the runs found there
  prune-lab wandb-sync RUN...                               copy finished runs to W&B from their local files

Groups (GROUP=CHOICE; single options as GROUP.KEY=VALUE):
{groups}
Top level: seed, output_dir, dry_run
Flags: -m, --multirun  sweep     --cfg job  print the composed options     --version     -h, --help
Shell completion: eval "$(prune-lab -sc install=bash)"   (or zsh, fish)
"""


def conf_dir() -> Path:
    """Return the folder of the YAML files: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").exists():
            return folder
    raise ConfigError(f"no conf/config.yaml in {package} or beside it; install prune-lab again")


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except ConfigError as error:
        print(f"prune-lab: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text(), end="")
        return 0
    if arguments[0] == "--version":
        print(f"prune-lab {__version__}")
        return 0
    first = arguments[0]
    if first in COMMANDS:
        return _command(first, arguments[1:])
    if first.startswith("-") or "=" in first or first[0] in "+~":
        return _command("run", arguments)
    raise ConfigError(
        f"unknown command {first}{suggestion(first, COMMANDS)}; allowed: {', '.join(COMMANDS)}, or options such as method=rigl"
    )


def _command(name: str, arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        print(help_text(), end="")
        return 0
    if name == "run":
        return _run(arguments)
    if name == "list":
        from prune_lab.listing import main as command
    elif name == "compare":
        from prune_lab.report import main as command
    else:
        from prune_lab.tracking.refill import main as command
    return command(arguments)


def help_text() -> str:
    from prune_lab.overrides import choices, groups

    rows = "".join(f"  {group:10} {', '.join(choices(conf_dir(), group))}\n" for group in groups(conf_dir()))
    return HELP.format(version=__version__, groups=rows)


def _run(arguments: list[str]) -> int:
    """Check every job the command asks for, then let Hydra compose and start them one after the other."""
    for flag in arguments:
        if flag.split("=")[0] in _VALUE_FLAGS:
            raise ConfigError(f"{flag.split('=')[0]} is not supported; put recipes under conf/experiment")
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    sweep = any(flag in arguments for flag in ("-m", "--multirun"))
    if not any(flag in arguments for flag in _HYDRA_ONLY):
        from prune_lab.overrides import compose_checked

        for _ in compose_checked(conf_dir(), overrides, sweep=sweep):
            pass  # every job of a sweep is checked before the first one starts
    return _hydra(arguments)


def _hydra(arguments: list[str]) -> int:
    import hydra

    codes: list[int] = []

    def task(node) -> None:
        codes.append(run_composed(node))

    before, sys.argv = sys.argv, [sys.argv[0], *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(task)()
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        sys.argv = before
    failed = [code for code in codes if code]
    if failed and len(codes) > 1:
        print(f"prune-lab: {len(failed)} of {len(codes)} runs did not finish", file=sys.stderr)
    return failed[0] if failed else 0


def run_composed(node) -> int:
    """Run one composed configuration; torch is imported here for the first time."""
    # Threads of GNU OpenMP wait for each other by spinning. With another program on the same cores that made a ResNet-20
    # step 10 to 30 times as long; after 10,000 turns of sleep instead 4 times, and as fast as ever on idle cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from prune_lab.config import check
    from prune_lab.overrides import plain

    try:
        config = check(plain(node))
        if config.dry_run:
            from prune_lab.dry_run import dry_run as start
        else:
            from prune_lab.pipeline import run as start
        return start(config)
    except ConfigError as error:
        print(f"prune-lab: error: {error}", file=sys.stderr)
        return 1
