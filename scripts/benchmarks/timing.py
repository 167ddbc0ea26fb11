"""Functions timed in turn in one process, ratios paired round by round, and what these say about a goal."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from prune_lab.commands.export.latency import MIN_ROUNDS, Ratio, interleaved

Times = dict[str, list[float]]
"""name -> seconds per call, one number per round"""
_BURST = 20
"""calls per sample on a GPU, which is waited for once per sample, as training does not wait for each step either"""


@dataclass(frozen=True)
class Plan:
    """How long a comparison is measured."""

    rounds: int
    """each round times every function once; at least 8, with fewer no interval of a median reaches 99 %"""
    seconds: float
    """no further round starts once so much has passed, but 8 there are"""


def in_turn(calls: Mapping[str, Callable[[], object]], plan: Plan, device: torch.device) -> Times:
    """Return seconds per call; three calls of each warm up, and the order turns from round to round."""
    burst = _BURST if device.type == "cuda" else 1

    def sample(call: Callable[[], object]) -> Callable[[], object]:
        def several() -> None:
            for _ in range(burst):
                call()
            torch.cuda.synchronize(device)

        return call if burst == 1 else several

    measured = interleaved([sample(call) for call in calls.values()], rounds=max(plan.rounds, MIN_ROUNDS),
                           seconds=plan.seconds)  # fmt: skip
    return {name: [value / burst for value in values] for name, values in zip(calls, measured, strict=True)}


def in_turn_once(calls: Mapping[str, Callable[[], float]], rounds: int) -> Times:
    """Return what the calls return, round by round, for calls that measure themselves, such as child processes."""
    found: Times = {name: [] for name in calls}
    for index in range(rounds):
        for name in list(calls) if index % 2 == 0 else reversed(list(calls)):
            found[name].append(calls[name]())
    return found


def amortised(ordinary: Sequence[float], update: Sequence[float], interval: float) -> list[float]:
    """Return the mean time of a step, round by round, when one step in `interval` is an update."""
    return [((interval - 1) * a + b) / interval for a, b in zip(ordinary, update, strict=True)]


@dataclass(frozen=True)
class Goal:
    """A bound that a ratio should keep."""

    limit: float
    at_most: bool = True
    """False: the ratio should be at least `limit`"""

    def verdict(self, found: Ratio) -> str:
        """Return "holds" or "does not hold" where the whole interval of the median says so."""
        return f"{'<=' if self.at_most else '>='} {self.limit:g}: {self._answer(found)}"

    def _answer(self, found: Ratio) -> str:
        within = (found.high <= self.limit, found.low > self.limit)
        if not self.at_most:
            within = (found.low >= self.limit, found.high < self.limit)
        if within[0]:
            return "holds"
        if within[1]:
            return "does not hold"
        noisy = found.high - found.low > 2 * abs(self.limit - 1)
        return "cannot be told" + (", the noise is larger than the goal" if noisy else "")


def seconds_of(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """Return how long a child process takes.

    Raises:
        RuntimeError: it failed; with its last line.
    """
    begin = time.perf_counter()
    output_of(command, environment)
    return time.perf_counter() - begin


def output_of(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Return what a child process prints; raises as `seconds_of`."""
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {last}")
    return done.stdout


def figures_of(command: Sequence[str], environment: Mapping[str, str]) -> dict[str, float]:
    """Return the JSON object in the last line that a child process prints; raises as `seconds_of`."""
    return json.loads(output_of(command, environment).splitlines()[-1])
