"""Networks whose channels are removed, batch norms that pass something else than 0 for 0, and choices of channels.

Holds no tests.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torchvision
from torch import Tensor, nn

from prune_lab import models
from prune_lab.accounting.costs import profile
from prune_lab.accounting.eligibility import select_layers
from prune_lab.core.context import Context
from prune_lab.families.channel_pruning import ChannelPruning, Problem
from prune_lab.pruning.channels.groups import ChannelMap
from tests.helpers.runs import compose


def ours(name: str, *options: str, num_classes: int = 10, image_size: int = 32) -> nn.Module:
    config = compose(f"model={name}", *options).model
    return models.build(config, num_classes=num_classes, image_size=image_size)


def torchvisions(name: str, **options: bool) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, **options)


# name -> (how to build it, image size, classes of channels). The counts are those of the full networks.
FULL: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet50": (lambda: ours("resnet50", num_classes=1000, image_size=224), 224, 11_456),
    "resnet110-A": (lambda: ours("resnet110"), 32, 2_080),
    "resnet110-B": (lambda: ours("resnet110", "model.shortcut=B"), 32, 2_128),
    "vgg16": (lambda: ours("vgg16"), 32, 4_224),
    "vgg16-imagenet": (lambda: ours("vgg16", num_classes=1000, image_size=224), 224, 12_416),
    "mobilenet_v2": (lambda: ours("mobilenet_v2", num_classes=1000, image_size=224), 224, 9_128),
    "mobilenet_v3_small": (lambda: ours("mobilenet_v3_small", num_classes=1000, image_size=224), 224, 4_872),
    "mobilenet_v3_large": (lambda: ours("mobilenet_v3_large", num_classes=1000, image_size=224), 224, 8_696),
    "densenet121": (lambda: torchvisions("densenet121"), 224, 10_240),
    "googlenet": (lambda: torchvisions("googlenet", init_weights=False, aux_logits=False), 224, 7_280),
}

# The same families, narrow: every kind of tie in a fraction of a second.
NARROW: dict[str, Callable[[], nn.Module]] = {
    "resnet20-A": lambda: ours("resnet20", "model.width=0.5"),
    "resnet20-B": lambda: ours("resnet20", "model.width=0.5", "model.shortcut=B"),
    "resnet18": lambda: ours("resnet18", "model.width=0.125"),
    "resnet50": lambda: ours("resnet50", "model.width=0.125"),
    "vgg16": lambda: ours("vgg16", "model.width=0.125"),
    "vgg16-imagenet": lambda: ours("vgg16", "model.width=0.03", "model.head=imagenet"),
    "mobilenet_v2": lambda: ours("mobilenet_v2", "model.width=0.25"),
    "mobilenet_v3_small": lambda: ours("mobilenet_v3_small", "model.width=0.5"),
    "wrn_16_8": lambda: ours("wrn_16_8", "model.width=0.0625"),
}


def disturb(model: nn.Module) -> nn.Module:
    """Give every batch norm random statistics, scales and shifts; return `model` in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5),
                                      (module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 1.5)):
                nn.init.uniform_(tensor, low, high)
    return model.eval()


def thinned(channels: ChannelMap, removed: float = 0.4, seed: int = 0) -> Tensor:
    """Return a choice that leaves out each class with this chance, but for the first of each lane."""
    drawn = torch.rand(channels.num_classes, generator=torch.Generator().manual_seed(seed))
    alive = drawn >= removed
    for lane in channels.lanes:
        alive[lane.classes[0]] = True
    return alive


@torch.no_grad()
def outputs(model: nn.Module, image_size: int = 32, num_images: int = 2) -> Tensor:
    return model(torch.randn(num_images, 3, image_size, image_size, generator=torch.Generator().manual_seed(1)))


def phase(model: nn.Module, image_size: int, name: str = "prune", **options: int) -> Context:
    """Return a phase on `model` and images of `image_size`, as far as methods that rank channels look at it."""
    info = SimpleNamespace(image_size=image_size, num_classes=2, num_train=8)
    return Context(
        model=model, costs=profile(model, image_size), layers=select_layers(model, include=["*"]), phase=name, seed=0,
        total_steps=8, steps_per_epoch=2, dataset=SimpleNamespace(info=info), **options,
    )  # fmt: skip


def chosen(method: ChannelPruning, context: Context) -> dict[str, list[int]]:
    """Return the channels that a method keeps: lane -> indices within the lane."""
    problem = Problem(method, context)
    alive = method.choose(context, problem)
    return {lane.name: alive[lane.classes].nonzero().flatten().tolist() for lane in problem.channels.lanes}


def one_layer(filters: Tensor) -> nn.Sequential:
    """Return 1x1 convolutions 3 -> channels -> 2, the first with these filters [channels, up to 3]."""
    model = nn.Sequential(nn.Conv2d(3, len(filters), 1, bias=False), nn.Conv2d(len(filters), 2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.zero_()[:, : filters.shape[1], 0, 0] = filters
    return model
