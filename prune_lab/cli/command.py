"""The command prune-lab: finds conf/, checks options, dispatches to Hydra or to a sub-command. Torch-free."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
from importlib import import_module
from pathlib import Path

from prune_lab.cli.completion import COMMANDS, completions, without_run
from prune_lab.compose.choices import conf_dir
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.failure import fail
from prune_lab.foundations.home import with_home
from prune_lab.foundations.schema import suggestion
from prune_lab.foundations.signals import STOPPED, leave_in_peace
from prune_lab.foundations.version import __version__

SWEEP_FLAGS = ("-m", "--multirun")
_PRINT_FLAGS = ("-c", "--cfg", "-p", "--package", "--resolve")
_COMPLETION_FLAGS = ("-sc", "--shell-completion")
_FLAGS_WITH_VALUE = {"-c": ("job", "hydra", "all"), "--cfg": ("job", "hydra", "all"), "-p": None, "--package": None}
_MODULES = {
    "tune": "prune_lab.commands.tune.command",
    "compare": "prune_lab.commands.compare.command",
    "verdict": "prune_lab.commands.verdict.command",
    "connect": "prune_lab.commands.analysis.connect",
    "hessian-projection": "prune_lab.commands.analysis.hessian_projection",
    "export": "prune_lab.commands.export.command",
    "dashboard": "prune_lab.commands.dashboard.command",
    "wandb-sync": "prune_lab.commands.dashboard.wandb_sync",
}
"""sub-command -> module whose `main` runs it"""
FLAGS = (*SWEEP_FLAGS, *_PRINT_FLAGS, *_COMPLETION_FLAGS)

HELP = """prune-lab {version}: trains, prunes and fine-tunes neural networks, and keeps exact accounts.

  prune-lab method=rigl model=resnet20 dataset=cifar10      one run; the same command resumes or says "done"
  prune-lab -m method=rigl,set seed=0,1,2                   a sweep: every combination
  prune-lab dry_run=true method=rigl model=resnet50         the plan, layer by layer; trains nothing
  prune-lab list models|datasets|methods|schedules|experiments
  prune-lab tune OPTIONS                                    search options that have several values, with Optuna
  prune-lab compare outputs                                 table over seeds of the runs found there
  prune-lab verdict OPTIONS | RUNS                          is there a winning ticket? trains what the answer needs
  prune-lab connect RUN RUN                                 loss along a line or a curve between two networks
  prune-lab hessian-projection RUN RUN                      does the way between two runs lie in flat directions?
  prune-lab export RUN                                      to ONNX, OpenVINO ...; checks and times the result
  prune-lab dashboard                                       build the W&B workspace that compares a project's runs
  prune-lab wandb-sync RUNS                                 send runs to W&B from their local files

Groups (GROUP=CHOICE; single options as GROUP.KEY=VALUE):
{groups}
Top level: seed, output_dir, dry_run
Flags: -m, --multirun  sweep     --cfg job  print the composed options     --version     -h, --help
Shell completion: eval "$(prune-lab -sc install=bash)"   (or zsh, fish)
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return the exit code."""
    code = _main(list(sys.argv[1:] if argv is None else argv))
    if argv is None and code > STOPPED:
        leave_in_peace()
    return code


def _main(arguments: list[str]) -> int:
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:  # a run that has started catches the signal itself and writes a checkpoint
        print("prune-lab: interrupted", file=sys.stderr)
        return STOPPED + signal.SIGINT
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return fail(error)


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
    if first.startswith(("-", "+", "~")) or "=" in first:
        return _command("run", arguments)
    raise UserError(
        f"unknown command {first!r}{suggestion(first, COMMANDS)}; allowed: {', '.join(COMMANDS)}, "
        "or options such as method=rigl"
    )


def _command(name: str, arguments: list[str]) -> int:
    if name in ("run", "list") and ("-h" in arguments or "--help" in arguments):
        print(help_text(), end="")
        return 0
    if name == "run":
        return _run(arguments)
    if name == "list":
        from prune_lab.cli.listing import show

        return show(conf_dir(), arguments)
    try:
        return import_module(_MODULES[name]).main(arguments)
    except SystemExit as error:  # argparse after --help
        return int(error.code or 0)


def help_text() -> str:
    from prune_lab.compose.choices import choices, groups, listed

    rows = [
        textwrap.fill(listed(group, choices(conf_dir(), group)), 115, initial_indent=f"  {group:10} ",
                      subsequent_indent=" " * 13)
        for group in groups(conf_dir())
    ]  # fmt: skip
    return HELP.format(version=__version__, groups="\n".join(rows) + "\n")


def _run(arguments: list[str]) -> int:
    """Check every job of the command, then start them."""
    from prune_lab.compose.overrides import compose_checked, launcher_options
    from prune_lab.launch.sweep import run_all

    if arguments and arguments[0].split("=")[0] in _COMPLETION_FLAGS:
        return _complete(arguments)
    flags, typed = split_flags(arguments)
    sweep = any(flag in SWEEP_FLAGS for flag in flags)
    launcher, overrides = launcher_options(typed)
    if launcher and not sweep:
        raise UserError(f"{launcher[0]} is for sweeps: add -m")
    configs = list(compose_checked(conf_dir(), overrides, sweep=sweep))  # all of them, before the first one starts
    if flags and not sweep:
        return hydra_main(conf_dir(), arguments)
    return run_all(configs, conf_dir=conf_dir(), sweep=sweep, launcher=launcher)


def hydra_main(conf_dir: Path, arguments: list[str]) -> int:
    """Run Hydra's own features: composed options and completion."""
    import hydra

    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [argv[0], *with_home(arguments)]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors are raised here instead of printed by Hydra
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir), config_name="config")(lambda node: None)()
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
    return 0


def _complete(arguments: list[str]) -> int:
    """Print or install shell completion; the line typed so far is in the environment variable COMP_LINE."""
    line = os.environ.get("COMP_LINE", "")
    found = completions(line) if arguments[-1].startswith("query=") else None
    if found is None:
        line = without_run(line)
        os.environ |= {"COMP_LINE": line, "COMP_POINT": str(len(line))}
        return hydra_main(conf_dir(), arguments)
    print(" ".join(found))
    return 0


def split_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return (flags, overrides) of a `run` command line.

    Raises:
        UserError: unknown flag, or a flag whose value is missing or wrong.
    """
    flags, overrides, rest = [], [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        name, equals, value = argument.partition("=")
        if name not in FLAGS or name in _COMPLETION_FLAGS or (equals and name not in _FLAGS_WITH_VALUE):
            near = suggestion(name, (*FLAGS, "--help", "--version"))
            raise UserError(f"unknown flag {argument}{near}; allowed: -m, --cfg job, --version, --help")
        if name in _FLAGS_WITH_VALUE:
            value = value if equals else rest.pop(0) if rest else ""
            allowed = _FLAGS_WITH_VALUE[name]
            if not value or (allowed and value not in allowed):
                raise UserError(f"{name} needs one of {', '.join(allowed)}" if allowed else f"{name} needs a name")
        flags.append(name)
    if not {"-c", "--cfg"} & set(flags) and (alone := [flag for flag in flags if flag in _PRINT_FLAGS]):
        raise UserError(f"{alone[0]} goes with --cfg job")
    if {"-c", "--cfg"} & set(flags) and set(SWEEP_FLAGS) & set(flags):
        raise UserError("--cfg shows one run; leave -m and lists of values out")
    return flags, overrides
