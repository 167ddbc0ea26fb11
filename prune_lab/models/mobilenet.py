"""MobileNetV2 and V3 of torchvision (arXiv 1801.04381, 1905.02244) with a stem stride that suits the images."""

from __future__ import annotations

from torch import nn
from torchvision.models import mobilenet_v2, mobilenet_v3_large, mobilenet_v3_small

from prune_lab.models.common import is_small
from prune_lab.models.configs import MobileNetConfig

_BUILDERS = {
    "mobilenet_v2": mobilenet_v2,
    "mobilenet_v3_small": mobilenet_v3_small,
    "mobilenet_v3_large": mobilenet_v3_large,
}


def build(config: MobileNetConfig, *, num_classes: int, image_size: int) -> nn.Module:
    """Return torchvision's network; only the stride of its first convolution may be changed.

    `width` is torchvision's `width_mult`: channel counts become multiples of 8, and MobileNetV2 keeps at least
    1280 channels before the classifier.
    """
    model = _BUILDERS[config.name](num_classes=num_classes, width_mult=config.width)
    stride = config.stem_stride
    if stride == "auto":
        stride = 1 if is_small(image_size) else 2
    model.features[0][0].stride = (stride, stride)
    return model
