"""Places in a training schedule, counted in epochs or in optimizer steps. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from prune_lab.foundations.schema import ConfigError


@dataclass(frozen=True)
class Position:
    """A place in a training schedule: so many epochs ("ep") or optimizer steps ("it") after its start."""

    count: float
    unit: str
    typed: str = field(default="", compare=False)
    """the option that asked for it, as typed: stretched or not, messages name it so"""

    def stretched(self, factor: float) -> Position:
        """Return the place in a schedule `factor` times as long: epochs stretch with it, steps do not."""
        return replace(self, count=self.count * factor) if self.unit == "ep" else self

    def step(self, steps_per_epoch: int) -> int:
        """Return the optimizer step at this place."""
        return round(self.count * steps_per_epoch) if self.unit == "ep" else int(self.count)


def parse_position(text: str, option: str) -> Position:
    """Return the position that `text` names, such as 8ep or 500it.

    Raises:
        ConfigError: anything else; `option` is the name to show.
    """
    found = re.fullmatch(r"(\d+)it|(\d+(?:\.\d+)?)ep", text)
    if not found:
        raise ConfigError(f"{option}={text} is no place in the training; write epochs as 8ep or steps as 500it", option)
    steps, epochs = found.groups()
    typed = f"{option}={text}"
    if steps and int(steps):  # 0it and 0ep are one place
        return Position(int(steps), "it", typed)
    return Position(float(epochs or 0), "ep", typed)
