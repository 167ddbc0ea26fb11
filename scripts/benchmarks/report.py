"""What the sections found: one line per ratio as it comes, and all of it as JSON at the end."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Goal
from prune_lab.commands.export.latency import MIN_ROUNDS, ratio, spread
from prune_lab.commands.export.machine import machine, versions
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.files import write_json


def reason(error: Exception) -> str:
    """Return an error in one line; of defects with their type."""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())


def load_warning(load: float | None, cores: int) -> str | None:
    """Return a warning where other work takes more cores than there are, else None."""
    if load is None or load <= cores:
        return None
    return f"WARNING: a load of {load:.2f} on {cores} cores: figures of several threads mean nothing now"


@dataclass
class Report:
    """Prints ratios and keeps them."""

    section: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)

    def head(self) -> dict[str, Any]:
        """Return machine, versions and date; the load average tells how busy the machine was with other work."""
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return machine(torch.get_num_threads()) | versions() | {"gpu": gpu, "date": date}

    def begin(self, section: str, line: str) -> None:
        self.section = section
        load = f", load {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""
        print(f"\n{section}: {line}{load}", flush=True)

    def note(self, line: str) -> None:
        """Keep a line, such as what was not measured and why."""
        print(f"  {line}", flush=True)
        self.rows.append({"section": self.section, "note": line})

    def compare(self, name: str, values: Sequence[float], base: Sequence[float], goal: Goal | None = None) -> None:
        """Print the median of values / base over rounds: 99 % interval, quartiles, rounds, and the goal's verdict."""
        ratios = [a / b for a, b in zip(values, base, strict=True)]
        middle = spread(ratios)
        row = {"section": self.section, "name": name, "median": middle.median, "quartiles": [middle.low, middle.high],
               "rounds": len(ratios)}  # fmt: skip
        text = f"{name:63} {middle.median:8.4f}"
        if len(ratios) >= MIN_ROUNDS:
            found = ratio(values, base)
            row["interval_99"] = [found.low, found.high]
            row["verdict"] = goal.verdict(found) if goal else None
            text += f"  [{found.low:.4f}, {found.high:.4f}]"
        text += f"  quartiles {middle.low:.4f} {middle.high:.4f}  n {len(ratios)}"
        if goal:
            row["goal"] = asdict(goal)
            text += f"  {row.get('verdict') or 'too few rounds for a verdict'}"
        print(f"  {text}", flush=True)
        self.rows.append(row)

    def figure(self, name: str, value: float, unit: str) -> None:
        """Print one number that is no ratio of times, such as an accuracy or images per second of a GPU."""
        print(f"  {name:63} {value:10.4g} {unit}", flush=True)
        self.rows.append({"section": self.section, "name": name, "value": value, "unit": unit})

    def write(self, path: Path, command: Sequence[str], head: dict[str, Any]) -> None:
        write_json(path, {"command": list(command), **head, "rows": self.rows})
