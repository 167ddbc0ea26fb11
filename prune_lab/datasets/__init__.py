"""Data sets by name: options in, batches out. Importing this package imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from prune_lab.datasets.base import BatchFormat, CommonConfig, Dataset, DatasetInfo, Split, identity
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import parse, suggestion

__all__ = [
    "BatchFormat",
    "CommonConfig",
    "Dataset",
    "DatasetInfo",
    "Split",
    "content",
    "describe",
    "identity",
    "load",
    "parse_config",
]

# kind -> module with `Config`, `describe(config)`, `content(config)` and `load(config, fmt)`.
_KINDS = {
    "digits": "prune_lab.datasets.digits",
    "cifar": "prune_lab.datasets.cifar",
    "imagefolder": "prune_lab.datasets.imagefolder",
    "fake": "prune_lab.datasets.fake",
    "text": "prune_lab.datasets.text",
}


def parse_config(node: Mapping[str, Any]) -> CommonConfig:
    """Return the checked options of the group `dataset`.

    Raises:
        UserError: unknown `dataset.kind`, or a missing, unknown or wrong option.
    """
    kind = node.get("kind")
    if kind not in _KINDS:
        raise UserError(
            f"dataset.kind={kind} is not allowed{suggestion(str(kind), _KINDS)}; allowed: {', '.join(_KINDS)}"
        )
    return parse(_module(kind).Config, node, "dataset")


def describe(config: CommonConfig) -> DatasetInfo:
    """Return the sizes of the data set, from the options alone wherever they state them.

    Raises:
        UserError: an image folder whose options leave sizes open is not on disk.
    """
    return _module(config.kind).describe(config)


def content(config: CommonConfig) -> str | None:
    """Return `Dataset.content` without loading; None too where the data are not there, or not as they should be."""
    try:
        return _module(config.kind).content(config)
    except UserError:
        return None


def load(config: CommonConfig, fmt: BatchFormat) -> Dataset:
    """Return the data set, ready to yield batches.

    Raises:
        UserError: data missing, incomplete or damaged; the message names the file and the remedy.
    """
    return _module(config.kind).load(config, fmt)


def _module(kind: str) -> ModuleType:
    return importlib.import_module(_KINDS[kind])
