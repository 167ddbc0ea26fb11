"""Data sets by name: options in, batches out. Importing this package imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict
from types import ModuleType
from typing import Any

from prune_lab.datasets.base import BatchFormat, CommonConfig, Dataset, DatasetInfo, Split
from prune_lab.schema import ConfigError, parse, suggestion

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
}

# Options that say where data lies or how fast it is read. They cannot change a result.
_NOT_IDENTITY = ("root", "cache_dir", "download", "workers", "check_counts")

# Options that count once they are set: what was trained before they existed keeps its name.
_IDENTITY_IF_SET = ("cached_side",)


def parse_config(node: Mapping[str, Any]) -> CommonConfig:
    """Return the checked options of the group `dataset`.

    Raises:
        ConfigError: unknown `dataset.kind`, or a missing, unknown or wrong option.
    """
    kind = node.get("kind")
    if kind not in _KINDS:
        raise ConfigError(
            f"dataset.kind={kind} is not allowed{suggestion(str(kind), _KINDS)}; allowed: {', '.join(_KINDS)}"
        )
    return parse(_module(kind).Config, node, "dataset")


def describe(config: CommonConfig) -> DatasetInfo:
    """Return the sizes of the data set, from the options alone wherever they state them.

    Raises:
        ConfigError: an image folder whose options leave sizes open is not on disk.
    """
    return _module(config.kind).describe(config)


def content(config: CommonConfig) -> str | None:
    """Return `Dataset.content` without loading; None too where the data are not there, or not as they should be."""
    try:
        return _module(config.kind).content(config)
    except ConfigError:
        return None


def load(config: CommonConfig, fmt: BatchFormat) -> Dataset:
    """Return the data set, ready to hand out batches.

    Raises:
        ConfigError: data missing, incomplete or damaged; the line says which file and how to mend it.
    """
    return _module(config.kind).load(config, fmt)


def identity(config: CommonConfig) -> dict[str, Any]:
    """Return the options that can change a result: no paths, workers or checks."""
    options = {key: value for key, value in asdict(config).items() if key not in _NOT_IDENTITY}
    return {key: value for key, value in options.items() if value is not None or key not in _IDENTITY_IF_SET}


def _module(kind: str) -> ModuleType:
    return importlib.import_module(_KINDS[kind])
