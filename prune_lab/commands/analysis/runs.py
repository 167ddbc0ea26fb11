"""Finished runs as an analysis needs them, and whether two of them can be compared. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prune_lab import datasets
from prune_lab.config.trainer import TrainerConfig
from prune_lab.datasets import CommonConfig, base
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.files import read_object
from prune_lab.foundations.schema import parse
from prune_lab.models.configs import RECURRENT_NAMES


@dataclass(frozen=True)
class FinishedRun:
    """One finished run, read from its files."""

    directory: Path
    network: dict[str, Any]
    """content of model.json: options of the saved network, number of classes, image size"""
    dataset: CommonConfig
    trainer: TrainerConfig
    seed: int
    summary: dict[str, Any]
    digest: str
    """SHA-256 of the saved tensors"""

    @property
    def name(self) -> str:
        return self.directory.resolve().name


def read_run(directory: str | Path) -> FinishedRun:
    """Return the run in `directory`.

    Raises:
        UserError: no run there, not finished, or unreadable files; the message names the run.
    """
    path = Path(directory)
    if not (path / "run.json").is_file():
        raise UserError(f"{path} is not a run directory (it has no run.json)")
    run, status, summary, network = (
        _read(path, name) for name in ("run.json", "status.json", "summary.json", "model.json")
    )
    if status.get("status") != "finished":
        raise UserError(f"{path} is not finished (status: {status.get('status', 'unknown')}); its command goes on")
    if not network or not (path / "model.safetensors").is_file():
        raise UserError(f"{path} holds no finished model (model.json and model.safetensors)")
    try:
        config = run["config"]
        dataset = datasets.parse_config(config["dataset"])
        trainer = parse(TrainerConfig, config["trainer"], "trainer")
        seed = int(config["seed"])
    except UserError as error:
        raise UserError(f"{path}/run.json: {error}") from error
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}/run.json lacks options of the run ({error})") from error
    if network.get("model", {}).get("name") in RECURRENT_NAMES:
        raise UserError(f"{path} is a network for text; connect, hessian-projection and export need one for images")
    with (path / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FinishedRun(path, network, dataset, trainer, seed, summary, digest)


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        return read_object(path / name)
    except ValueError as error:
        raise UserError(str(error)) from error


def require_comparable(a: FinishedRun, b: FinishedRun) -> None:
    """Raise UserError, naming runs and option, unless both have the same network on the same data set."""
    kinds = (a.dataset.kind, b.dataset.kind)
    data = tuple({"kind": run.dataset.kind, **base.identity(run.dataset)} for run in (a, b))
    if kinds[0] != kinds[1]:
        data = tuple({"kind": kind} for kind in kinds)  # their other options are unrelated
    networks = tuple(_without_weights(run.network) for run in (a, b))
    for what, (mine, theirs) in (("data sets", data), ("networks", networks)):
        for key, (one, other) in _differences(mine, theirs):
            where = f"{key} is {one} in {a.directory}, {other} in {b.directory}"
            raise UserError(f"the runs have different {what}: {where}")


def _without_weights(network: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description without the start weights, which are not part of the architecture."""
    options = {key: value for key, value in network.get("model", {}).items() if key != "weights"}
    return {**network, "model": options}


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, tuple]]:
    for key in dict.fromkeys([*a, *b]):
        one, other = a.get(key), b.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other, f"{prefix}{key}.")
        elif one != other:
            yield f"{prefix}{key}", (one, other)


def data_options(a: FinishedRun, b: FinishedRun, root: str | None) -> CommonConfig:
    """Return the options for reading the runs' data set.

    Args:
        root: replaces dataset.root; None: the one that both runs name.

    Raises:
        UserError: the runs name different paths and `root` is None, or the data set has no path on disk.
    """
    if root is not None:
        options: Any = a.dataset
        if not hasattr(options, "root"):
            raise UserError(f"--data: the data set {options.name} is not read from a folder")
        return replace(options, root=root)
    one, other = (getattr(run.dataset, "root", None) for run in (a, b))
    if one != other:
        raise UserError(
            f"dataset.root is {one} in {a.directory}, {other} in {b.directory}; --data ROOT says which to read"
        )
    return a.dataset
