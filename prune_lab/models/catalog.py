"""Table of the models: from a name to checked options and to a built network. Torch-free until `build`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import parse, suggestion
from prune_lab.models import configs
from prune_lab.models.configs import ExternalConfig, ModelConfig
from prune_lab.models.foreign import one_line

if TYPE_CHECKING:
    from torch import nn


# Family -> names, options, module with `build`. Modules are imported on `build` only.
_FAMILIES = (
    (configs.RESNET_CIFAR_NAMES, configs.ResNetCifarConfig, "resnet_cifar"),
    (configs.RESNET_NAMES, configs.ResNetConfig, "resnet"),
    (configs.VGG_NAMES, configs.VggConfig, "vgg"),
    (configs.MOBILENET_NAMES, configs.MobileNetConfig, "mobilenet"),
    (configs.WIDE_RESNET_NAMES, configs.WideResNetConfig, "wide_resnet"),
    (configs.RECURRENT_NAMES, configs.RecurrentConfig, "recurrent"),
)
_CONFIGS: dict[str, type[ModelConfig]] = {name: config for names, config, _ in _FAMILIES for name in names}
_MODULES: dict[type[ModelConfig], str] = {config: module for _, config, module in _FAMILIES}
_MODULES[ExternalConfig] = "external"


def names() -> list[str]:
    """Return the names of our own models, in the order of the table (torchvision and timm have many more)."""
    return list(_CONFIGS)


def parse_config(node: Mapping[str, Any]) -> ModelConfig:
    """Return the checked options of the group `model`. Imports no torch.

    A node with the key `source` is a torchvision or timm model; `build` checks that the library has the name.

    Raises:
        UserError: unknown model, unknown or missing option, value out of range.
    """
    if not isinstance(node, Mapping):
        raise UserError(f"model must be a group of options, got {node!r}")
    name = node.get("name")
    if "source" in node:
        if name is None:
            raise UserError(
                "model.name is missing: give the name of a torchvision or timm classifier, such as "
                "model.name=resnext50_32x4d"
            )
        return parse(ExternalConfig, node, "model")
    if name not in _CONFIGS:
        raise UserError(
            f"model.name={name} is not a model{suggestion(str(name), _CONFIGS)}; allowed: {', '.join(_CONFIGS)}; "
            "any torchvision or timm classifier: model=torchvision model.name=..."
        )
    return parse(_CONFIGS[name], node, "model")


def build(config: ModelConfig, *, num_classes: int, image_size: int) -> nn.Module:
    """Return the network of `config` with fresh weights drawn from torch's global generator.

    Args:
        config: from `parse_config`. Weights are not loaded here, see `load_weights`.
        num_classes: number of outputs.
        image_size: height and width of the square RGB images, px.

    Returns:
        Module from images [N, 3, image_size, image_size] to logits [N, num_classes].

    Raises:
        UserError: torchvision or timm does not have the name, or cannot build it for these images.
    """
    with one_line(config, image_size):
        return _build(config, num_classes=num_classes, image_size=image_size)


def _build(config: ModelConfig, **sizes: int) -> nn.Module:
    module = importlib.import_module(f"{__package__}.{_MODULES[type(config)]}")
    return module.build(config, **sizes)


def build_on_meta(config: ModelConfig, *, num_classes: int, image_size: int) -> nn.Module:
    """Return the network of `config` on the meta device: shapes without values, which take no memory."""
    sizes = {"num_classes": num_classes, "image_size": image_size}
    try:
        with torch.device("meta"):
            return _build(config, **sizes)
    except UserError:
        raise
    except Exception:
        # torch raises NotImplementedError or RuntimeError on the meta device if a network, such as torchvision's
        # RegNet, computes its widths with tensors. Any other error is raised again by the build with values.
        with torch.random.fork_rng(devices=[]):
            return build(config, **sizes).to("meta")


def describe(config: ModelConfig, num_classes: int, image_size: int) -> dict[str, Any]:
    """Return a JSON-able dict from which `from_description` builds the same architecture."""
    options = asdict(config)
    if options["weights"] != "torchvision":
        # The weights are stored beside the description; a path would mean nothing on another machine.
        options["weights"] = None
    return {"model": options, "num_classes": num_classes, "image_size": image_size}


def from_description(description: Mapping[str, Any]) -> nn.Module:
    """Return the network of a `describe` dict with fresh weights.

    Raises:
        UserError: the description is incomplete or holds unknown options.
    """
    missing = [key for key in ("model", "num_classes", "image_size") if key not in description]
    if missing:
        raise UserError(f"the model description lacks {', '.join(missing)}")
    config = parse_config(description["model"])
    return build(config, num_classes=description["num_classes"], image_size=description["image_size"])
