"""The services of a run's process: data, signals, gradients of a batch. By default the run is alone."""

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
    """A process with one run at a time. Executors in which several runs take turns override the shared parts."""

    vectorised = False
    """whether networks of several runs are computed together"""

    def load(self, config: CommonConfig, fmt: BatchFormat) -> datasets.Dataset:
        return datasets.load(config, fmt)

    def close(self, dataset: Any) -> None:
        dataset.close()

    def stop_flag(self) -> contextlib.AbstractContextManager[signals.StopFlag]:
        return signals.stop_flag()

    def pause(self) -> None:
        """Wait half a second, in which another process or run may release what this run waits for."""
        time.sleep(0.5)

    def differentiate(self, training: loop.TrainState, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `loop.differentiate`."""
        return loop.differentiate(training, images, labels)
