"""What a run needs from its process: data, signals, gradients of a batch. By default it is alone."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from torch import Tensor

from prune_lab import datasets
from prune_lab.datasets import BatchFormat, CommonConfig
from prune_lab.foundations import signals
from prune_lab.training import loop


class Executor:
    """A process with one run at a time. Others, where several runs take turns, override what these share."""

    vectorised = False
    """whether networks of several runs are computed together"""

    def load(self, config: CommonConfig, fmt: BatchFormat) -> datasets.Dataset:
        return datasets.load(config, fmt)

    def close(self, dataset: Any) -> None:
        dataset.close()

    def stop_flag(self) -> contextlib.AbstractContextManager[signals.StopFlag]:
        return signals.stop_flag()

    def pause(self) -> None:
        """Let half a second pass, in which another process or run may give back what this run waits for."""
        time.sleep(0.5)

    def differentiate(self, training: loop.TrainState, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `loop.differentiate`."""
        return loop.differentiate(training, images, labels)
