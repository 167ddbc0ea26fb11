"""Places in a training schedule, counted in epochs or in optimizer steps. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from prune_lab.schema import ConfigError


@dataclass(frozen=True)
class Position:
    """A place in a training schedule: so many epochs ("ep") or optimizer steps ("it") after its start."""

    count: float
    unit: str

    def __str__(self) -> str:
        return f"{self.count:g}{self.unit}"

    def stretched(self, factor: float) -> Position:
        """Return the place in a schedule `factor` times as long: epochs stretch with it, steps do not."""
        return replace(self, count=self.count * factor) if self.unit == "ep" else self

    def step(self, steps_per_epoch: int) -> int:
        """Return the optimizer step at this place."""
        return round(self.count * steps_per_epoch) if self.unit == "ep" else int(self.count)


START = Position(0.0, "ep")


def parse_position(text: str, option: str) -> Position:
    """Return the position that `text` names, such as 8ep or 500it.

    Raises:
        ConfigError: anything else; `option` is the name to show.
    """
    found = re.fullmatch(r"(\d+)it|(\d+(?:\.\d+)?)ep", text)
    if not found:
        raise ConfigError(f"{option}={text} is no place in the training; write epochs as 8ep or steps as 500it", option)
    steps, epochs = found.groups()
    place = Position(int(steps), "it") if steps else Position(float(epochs), "ep")
    return place if place.count else START  # 0it and 0ep are one place
