"""Submits the runs of a sweep to one of Hydra's launchers: processes of this machine, or a cluster. Torch-free."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

from prune_lab.compose.overrides import LAUNCHER
from prune_lab.config.run import RunConfig
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.files import write_text
from prune_lab.foundations.schema import suggestion
from prune_lab.launch.outcome import STOP, Outcome, log_path, read_outcome
from prune_lab.launch.slots import num_gpus, num_slots
from prune_lab.launch.worker import note_launcher, run_in_worker

VECTORISED = "prune_lab.launch.vectorised.run_together"
"""target in conf/hydra/launcher/vectorised.yaml: not a launcher of Hydra's kind, the runs stay in this process"""
_LOST = "its process ended without a word: killed, perhaps for lack of memory"


def launch(
    conf_dir: Path, configs: Sequence[RunConfig], names: Sequence[str], options: Sequence[str], folder: Path
) -> list[Outcome]:
    """Return the outcomes of the runs, in order, once all have ended.

    Args:
        options: Hydra's options about the launcher, such as hydra/launcher=joblib.
        folder: of this sweep, for the output and the outcome of each run.

    Raises:
        UserError: the launcher's package is not installed, or it rejects its options.
    """
    _register_resolvers()
    chosen = _checked_choice(conf_dir, options)
    in_this_process = chosen["_target_"] == VECTORISED
    at_once = _runs_at_once(chosen, configs) if in_this_process else 0
    print(f"{len(configs)} runs; what each prints is in {folder}/run-N.log", flush=True)
    for number, name in enumerate(names, start=1):
        print(f"  run {number}: {name}", flush=True)
    folder.mkdir(parents=True)
    if in_this_process:
        from prune_lab.launch.vectorised import run_together

        return run_together(configs, at_once, folder)
    note_launcher(folder)
    pending, why = [list(range(len(configs)))], _LOST
    with _stopped_by_a_file(folder / STOP):
        while pending and not (folder / STOP).exists():
            numbers = pending.pop(0)
            error = _launch_once(conf_dir, [configs[number] for number in numbers], options, folder, numbers[0])
            if isinstance(error, BrokenExecutor) and len(numbers) > 1:
                pending += _again([number for number in numbers if read_outcome(folder, number) is None], folder)
            elif error is not None and not isinstance(error, BrokenExecutor):
                why = f"the launcher failed: {_reason(error)}"
    return [read_outcome(folder, number) or Outcome(number, 1, why) for number in range(len(configs))]


def _again(left: Sequence[int], folder: Path) -> list[list[int]]:
    """Return the runs to restart after a process died and took others with it: running ones alone, the rest together.

    A running one may have killed the process, for lack of memory. The rest is in ranges of adjacent numbers.
    """
    begun = [number for number in left if log_path(folder, number).exists()]
    stretches: list[list[int]] = []
    for number in (number for number in left if number not in begun):
        if stretches and stretches[-1][-1] == number - 1:
            stretches[-1].append(number)
        else:
            stretches.append([number])
    return [*stretches, *([number] for number in begun)] if begun else []


def _launch_once(
    conf_dir: Path, configs: Sequence[RunConfig], options: Sequence[str], folder: Path, first: int
) -> Exception | None:
    """Start runs, numbered from `first`, and wait; return the launcher's error: our own runs leave an outcome."""
    from hydra import initialize_config_dir
    from hydra._internal.callbacks import Callbacks
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext, RunMode

    with initialize_config_dir(str(conf_dir), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        if hydra is None:
            raise RuntimeError("Hydra has not begun")
        place = f'hydra.sweep.dir="{folder.absolute()}"'
        config = hydra.compose_config("config", [*options, place], run_mode=RunMode.MULTIRUN, from_shell=False)
        # Callbacks has no public name, and the HydraContext that every launcher takes must have one.
        context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks())
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=run_in_worker, config=config
        )
        try:
            with _lost_jobs_as_results():
                launcher.launch([list(config.overrides) for config in configs], first)
        except Exception as error:
            return error
    return None


@contextlib.contextmanager
def _lost_jobs_as_results() -> Iterator[None]:
    """Make Hydra's launcher for submitit wait for every job: it would stop at the first lost one."""
    submitit = importlib.import_module("submitit") if importlib.util.find_spec("submitit") else None
    if submitit is None:
        yield
        return
    results = submitit.Job.results

    def or_what_was_raised(job: Any) -> list[Any]:
        try:
            return results(job)
        except Exception as error:
            return [error]

    submitit.Job.results = or_what_was_raised
    try:
        yield
    finally:
        submitit.Job.results = results


def _runs_at_once(chosen: Mapping[str, Any], configs: Sequence[RunConfig]) -> int:
    """Return the option of conf/hydra/launcher/vectorised.yaml.

    Raises:
        UserError: a wrong value, runs that cannot share a process, torchrun, or greenlet is not installed.
    """
    at_once = chosen["at_once"]
    if isinstance(at_once, bool) or not isinstance(at_once, int) or at_once < 1:
        raise UserError(f"hydra.launcher.at_once must be a whole number of at least 1, got {at_once}")
    if len({config.trainer.threads for config in configs}) > 1:
        raise UserError(f"trainer.threads must be the same for all runs of {LAUNCHER}=vectorised")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{LAUNCHER}=vectorised shares one process among runs; start it without torchrun")
    if importlib.util.find_spec("greenlet") is None:
        raise UserError(f"{LAUNCHER}=vectorised: it needs a package: pip install greenlet")
    return at_once


def _checked_choice(conf_dir: Path, options: Sequence[str]) -> Mapping[str, Any]:
    """Return the launcher's own options.

    Raises:
        UserError: none is chosen, its package is not installed, or it does not have one of the options.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    named = [line.partition("=")[2] for line in options if line.startswith(f"{LAUNCHER}=")]
    with initialize_config_dir(str(conf_dir), version_base="1.3"):
        allowed = GlobalHydra.instance().config_loader().get_group_options(LAUNCHER)
        if not named:
            raise UserError(f"{options[0]}: choose a launcher too, {LAUNCHER}={'|'.join(allowed)}")
        if named[-1] not in allowed:
            near = suggestion(named[-1], allowed)
            raise UserError(f"{LAUNCHER}={named[-1]} is not a choice{near}; allowed: {', '.join(allowed)}")
        try:
            return compose("config", list(options), return_hydra_config=True).hydra.launcher
        except Exception as error:  # one of Hydra's many types
            missing = re.search(r"Could not load '(?:\w+/)*([a-z]+)", str(error))
            hint = f"it needs a package: pip install hydra-{missing[1]}-launcher" if missing else _reason(error)
            raise UserError(f"{' '.join(options)}: {hint}") from error


def _register_resolvers() -> None:
    """Provide the machine's resources to the presets in conf/hydra/launcher."""
    from omegaconf import OmegaConf

    for name, count in (("prune_lab.slots", num_slots), ("prune_lab.gpus", num_gpus)):
        if not OmegaConf.has_resolver(name):
            OmegaConf.register_new_resolver(name, count)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


@contextlib.contextmanager
def _stopped_by_a_file(path: Path) -> Iterator[None]:
    """Convert the first SIGINT or SIGTERM into a file that every worker watches; a second Ctrl-C stops at once."""

    def stop(number: int, _frame: object) -> None:
        write_text(path, str(number))
        print("stopping: the runs under way write a checkpoint, the others do not start", flush=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
