"""Classifiers of torchvision and timm by name, unmodified."""

from __future__ import annotations

import difflib
import inspect
from types import ModuleType

import torchvision
from torch import nn

from prune_lab.foundations.errors import UserError
from prune_lab.models.configs import ExternalConfig

_NUM_NEAREST = 3
# Their training output is a tuple with the auxiliary classifiers unless these are disabled.
_WITH_AUXILIARY = ("googlenet", "inception_v3")
# Constructor arguments of torchvision's classes for one image size: ViT takes a number, MaxViT height and width.
_SIZE_ARGUMENTS = {"image_size": lambda size: size, "input_size": lambda size: (size, size)}


def build(config: ExternalConfig, *, num_classes: int, image_size: int) -> nn.Module:
    """Return the network with fresh weights; one that is made for a fixed image size is built for `image_size`.

    Raises:
        UserError: the library does not have the name, or timm is requested but not installed.
    """
    available = torchvision.models.list_models(module=torchvision.models)
    if config.source != "timm" and config.name in available:
        return _build_torchvision(config, num_classes=num_classes, image_size=image_size)
    if config.source == "torchvision":
        raise UserError(f"model.name={config.name} is not a torchvision classifier{_nearest(config.name, available)}")
    timm = _import_timm(config, available)
    known = timm.list_models()
    if config.name not in known and not timm.is_model(config.name):
        library = "timm" if config.source == "timm" else "torchvision or timm"
        names = known if config.source == "timm" else available + known
        raise UserError(f"model.name={config.name} is not a {library} classifier{_nearest(config.name, names)}")
    known_as = timm.models.get_pretrained_cfg(config.name)
    extra = {"img_size": image_size} if known_as is not None and known_as.fixed_input_size else {}
    return timm.create_model(config.name, pretrained=False, num_classes=num_classes, **extra)


def usual_size(config: ExternalConfig) -> int:
    """Return the image height and width that the library's own weights of the network expect, px.

    Raises:
        Exception: of any type, if the library does not state it.
    """
    if config.source != "timm" and config.name in torchvision.models.list_models(module=torchvision.models):
        return torchvision.models.get_model_weights(config.name).DEFAULT.transforms().crop_size[0]
    import timm

    known_as = timm.models.get_pretrained_cfg(config.name)
    if known_as is None:
        raise LookupError(f"timm has no weights of {config.name}")
    return known_as.input_size[-1]


def _build_torchvision(config: ExternalConfig, *, num_classes: int, image_size: int) -> nn.Module:
    made = inspect.signature(torchvision.models.get_model_builder(config.name)).return_annotation
    accepted = inspect.signature(made).parameters
    extra = {name: form(image_size) for name, form in _SIZE_ARGUMENTS.items() if name in accepted}
    if config.name in _WITH_AUXILIARY:
        # The official weights of these two expect a different normalisation; transform_input converts.
        extra |= {"aux_logits": False, "init_weights": True, "transform_input": config.weights == "torchvision"}
    return torchvision.models.get_model(config.name, weights=None, num_classes=num_classes, **extra)


def _import_timm(config: ExternalConfig, available: list[str]) -> ModuleType:
    try:
        import timm
    except ImportError as error:
        if config.source == "timm":
            raise UserError("model.source=timm needs the package timm: pip install timm") from error
        raise UserError(
            f"model.name={config.name} is not a torchvision classifier{_nearest(config.name, available)}; "
            "for timm's models install the package timm: pip install timm"
        ) from error
    return timm


def _nearest(name: str, available: list[str]) -> str:
    near = difflib.get_close_matches(name, list(dict.fromkeys(available)), n=_NUM_NEAREST, cutoff=0.5)
    return f" (nearest: {', '.join(near)})" if near else ""
