"""Times in a training schedule, counted in epochs or in optimizer steps. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from prune_lab.foundations.errors import UserError


@dataclass(frozen=True)
class Time:
    """A time in a training schedule, as a number of epochs ("ep") or optimizer steps ("it") since its start."""

    count: float
    unit: str
    typed: str = field(default="", compare=False)
    """the option that set it, as typed: messages name it so even when it is stretched"""

    def stretched(self, factor: float) -> Time:
        """Return the time in a schedule `factor` times as long: epochs stretch with it, steps do not."""
        return replace(self, count=self.count * factor) if self.unit == "ep" else self

    def step(self, steps_per_epoch: int) -> int:
        """Return the optimizer step at this time."""
        return round(self.count * steps_per_epoch) if self.unit == "ep" else int(self.count)


def parse_time(text: str, option: str) -> Time:
    """Return the time that `text` names, such as 8ep or 500it.

    Raises:
        UserError: anything else; `option` is the name to show.
    """
    found = re.fullmatch(r"(\d+)it|(\d+(?:\.\d+)?)ep", text)
    if not found:
        raise UserError(f"{option}={text} is no place in the training; write epochs as 8ep or steps as 500it", option)
    steps, epochs = found.groups()
    typed = f"{option}={text}"
    if steps and int(steps):  # 0it and 0ep are the same time
        return Time(int(steps), "it", typed)
    return Time(float(epochs or 0), "ep", typed)
