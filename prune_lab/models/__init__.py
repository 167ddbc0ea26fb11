"""Networks by name: options without torch, then plain modules."""

from prune_lab.models.catalog import build, build_on_meta, describe, from_description, names, parse_config
from prune_lab.models.configs import (
    ExternalConfig,
    MobileNetConfig,
    ModelConfig,
    RecurrentConfig,
    ResNetCifarConfig,
    ResNetConfig,
    VggConfig,
    WideResNetConfig,
)
from prune_lab.models.foreign import check_training_pass, one_line
from prune_lab.models.weights import load_weights, weights_digest

__all__ = [
    "ExternalConfig",
    "MobileNetConfig",
    "ModelConfig",
    "RecurrentConfig",
    "ResNetCifarConfig",
    "ResNetConfig",
    "VggConfig",
    "WideResNetConfig",
    "build",
    "build_on_meta",
    "check_training_pass",
    "describe",
    "from_description",
    "load_weights",
    "names",
    "one_line",
    "parse_config",
    "weights_digest",
]
