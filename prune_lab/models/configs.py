"""Options of every model family. Torch-free: options are checked before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import Count, FilePath, Positive, Range

RESNET_CIFAR_NAMES = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
RESNET_NAMES = ("resnet18", "resnet34", "resnet50")
VGG_NAMES = ("vgg16", "vgg19")
MOBILENET_NAMES = ("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large")
WIDE_RESNET_NAMES = ("wrn_16_8", "wrn_22_2", "wrn_28_10")
RECURRENT_NAMES = ("gru_lm", "lstm_lm")


@dataclass(frozen=True)
class ModelConfig:
    """Options that every model has."""

    name: str
    """Architecture."""
    weights: FilePath | None
    """null = fresh weights, "torchvision" = official ImageNet weights, otherwise a file."""
    width: Positive
    """Factor on every channel count; 1.0 is the published model."""


@dataclass(frozen=True)
class ResNetCifarConfig(ModelConfig):
    """ResNet in CIFAR form (He et al. 2015, section 4.2)."""

    name: Literal["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]
    shortcut: Literal["A", "B"]
    """Where the width changes: A = stride-2 slice and zero channels (the original), B = 1x1 conv and BN."""


@dataclass(frozen=True)
class ResNetConfig(ModelConfig):
    """ResNet in ImageNet form."""

    name: Literal["resnet18", "resnet34", "resnet50"]


@dataclass(frozen=True)
class VggConfig(ModelConfig):
    """VGG with batch normalisation."""

    name: Literal["vgg16", "vgg19"]
    head: Literal["auto", "single", "hidden", "imagenet"]
    """Classifier; auto = single on images of at most 64 px, imagenet on larger ones."""
    conv_bias: bool | None
    """Bias in the convolutions; null = as the head's usual form (imagenet: yes, the others: no)."""


@dataclass(frozen=True)
class MobileNetConfig(ModelConfig):
    """torchvision's MobileNets."""

    name: Literal["mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"]
    stem_stride: Literal["auto", 1, 2]
    """Stride of the first convolution; auto = 1 on images of at most 64 px, 2 on larger ones."""


@dataclass(frozen=True)
class WideResNetConfig(ModelConfig):
    """Wide ResNet with pre-activation blocks; wrn_D_K has depth D and K times the channels of a ResNet."""

    name: Literal["wrn_16_8", "wrn_22_2", "wrn_28_10"]
    dropout: Annotated[float, Range(0, 1, open_high=True)]
    """Probability of dropping a value between the two convolutions of a block."""


@dataclass(frozen=True)
class RecurrentConfig(ModelConfig):
    """Recurrent language models."""

    name: Literal["gru_lm", "lstm_lm"]
    layers: Count
    embedding: Count
    hidden: Count
    """Size of the recurrent state."""
    readout: tuple[Count, ...]
    """Outputs of the linear layers between state and output, ReLU between them."""
    tied: bool
    """The output matrix is the embedding."""
    dropout: Annotated[float, Range(0, 1, open_high=True)]
    """Of embedded symbols, between layers and of the last states."""

    def check(self, path: str) -> None:
        last = self.readout[-1] if self.readout else self.hidden
        if self.tied and last != self.embedding:
            raise UserError(f"{path}.tied=true needs as many values before the output as in the embedding, "
                            f"{self.embedding}, got {last}")  # fmt: skip


@dataclass(frozen=True)
class ExternalConfig(ModelConfig):
    """Any classifier of torchvision or timm, built unmodified."""

    source: Literal["auto", "torchvision", "timm"]
    """Library of the model; auto = torchvision if it has the name, otherwise timm."""

    def check(self, path: str) -> None:
        if self.width != 1.0:
            raise UserError(f"{path}.width must be 1.0 for {path}=torchvision, got {self.width:g}")
