"""Exported files: written to a temporary folder, checked by their runtimes, then moved to the target or removed."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from prune_lab.commands.export import agreement, formats, packed, runtimes
from prune_lab.commands.export.catalog import FORMATS, Runtime

_CHUNK = 1 << 20
_GZIP_LEVEL = 6  # gzip's default


@dataclass(frozen=True)
class Network:
    """A network to export."""

    model: nn.Module
    """eval mode, on the CPU"""
    description: dict[str, Any]
    """content of model.json"""
    program: Any = None
    """from `formats.trace`; None: only safetensors is written"""

    @property
    def image_size(self) -> int:
        return self.description["image_size"]


@dataclass(frozen=True)
class Check:
    """One runtime's outputs against the run's network."""

    runtime: Runtime
    agreement: agreement.Agreement
    tolerance: float

    @property
    def is_within(self) -> bool:
        return self.agreement.within(self.tolerance)

    def record(self) -> dict[str, Any]:
        return {
            "runtime": self.runtime.title, **asdict(self.agreement), "tolerance": self.tolerance,
            "accepted": self.is_within,
        }  # fmt: skip


def write(name: str, network: Network, folder: Path) -> None:
    """Write format `name` of `network` into `folder`.

    Raises:
        NotExportable: as `formats.write`.
    """
    if name == "semi_structured":
        packed.write_packed(network.model, network.description, folder)
        return
    formats.write(name, folder, model=network.model, description=network.description, program=network.program)


def check(
    engines: Iterable[Runtime], folder: Path, reference: agreement.Reference, tolerances: dict[str, float], *,
    threads: int,
) -> list[Check]:  # fmt: skip
    """Return the agreement of the written network with `reference` in each of its runtimes.

    Args:
        tolerances: by precision, relative to the scale of the reference.
    """
    found = []
    for runtime in engines:
        run = runtimes.open_network(runtime, folder, threads=threads)
        agreed = agreement.compare(reference, run, is_same_arithmetic=not FORMATS[runtime.format].is_graph)
        found.append(Check(runtime, agreed, tolerances[runtime.precision]))
    return found


def move(name: str, source: Path, target: Path) -> None:
    """Put the files of format `name` into `target`, in place of older ones."""
    for file in FORMATS[name].files:
        os.replace(source / file, target / file)


def remove(name: str, folder: Path) -> None:
    """Remove the files of format `name`, so that no unchecked file remains."""
    for file in FORMATS[name].files:
        (folder / file).unlink(missing_ok=True)


def sizes(name: str, folder: Path) -> dict[str, int]:
    """Return the bytes of the files of format `name`, raw and compressed by gzip."""
    paths = [folder / file for file in FORMATS[name].files]
    return {"bytes": sum(path.stat().st_size for path in paths), "gzip_bytes": sum(map(_packed, paths))}


def _packed(path: Path) -> int:
    packer, total = zlib.compressobj(_GZIP_LEVEL, wbits=31), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            total += len(packer.compress(chunk))
    return total + len(packer.flush())
