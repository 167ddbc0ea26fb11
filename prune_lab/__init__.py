"""prune-lab: one command trains, prunes and fine-tunes neural networks.

The rooms, from the top down; a room imports itself and those after it (tests/test_architecture.py). The first lines of
each state its purpose:
cli, commands, launch, pipeline, compose, training, tracking, methods, families, core, pruning, optim, accounting,
datasets, models, config, foundations.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prune_lab.foundations.version import __version__

if TYPE_CHECKING:
    from torch import nn

__all__ = ["__version__", "load"]


def load(run_dir: str | Path) -> nn.Module:
    """Return the finished network of a run as a plain module in eval mode, on the CPU.

    Args:
        run_dir: directory of a finished run (holds model.json and model.safetensors).

    Raises:
        UserError: no finished model there, or the files do not fit together.
    """
    from prune_lab.pipeline.saved_model import load_model

    return load_model(run_dir)
