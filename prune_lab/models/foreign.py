"""Networks of other libraries: any error they raise while a run is planned becomes one line with their name."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.models.configs import ExternalConfig, ModelConfig

if TYPE_CHECKING:
    from torch import nn


_IMAGES = 2
"""images per pass: batch norm refuses a single one in training where its maps have one pixel"""


@contextlib.contextmanager
def one_line(config: ModelConfig, image_size: int) -> Iterator[None]:
    """Convert any error from building or using a network into a UserError with its name and the image size."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # code of other libraries may raise anything
        raise UserError(
            f"model.name={config.name} does not work with images of {image_size} x {image_size} px "
            f"(dataset.image_size): {reason(error)}{_usual(config, image_size)}"
        ) from error


def reason(error: Exception) -> str:
    """Return the first line of an error; if it has no text, its type and the line of code outside torch."""
    if text := str(error).strip():
        return text.splitlines()[0]
    library = str(Path(torch.__file__).parent)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(library)]
    return f"{type(error).__name__} at: {frames[-1].line}" if frames else type(error).__name__


def check_training_pass(model: nn.Module, config: ModelConfig, *, num_classes: int, image_size: int) -> None:
    """Reject a network that does not map images to class scores in training.

    Args:
        model: without memory ("meta" device).

    Raises:
        UserError: naming its actual output.
    """
    if hasattr(model, "example_input"):  # our own, on other inputs than images
        return
    from prune_lab.foundations.shapes import QuickShapes  # its file subclasses a mode of torch

    with one_line(config, image_size), torch.no_grad(), QuickShapes():
        scores = model.train()(torch.zeros(_IMAGES, 3, image_size, image_size, device="meta"))
    model.eval()
    if not torch.is_tensor(scores) or scores.shape != (_IMAGES, num_classes):
        got = f"a tensor of shape {tuple(scores.shape)}" if torch.is_tensor(scores) else f"a {type(scores).__name__}"
        raise UserError(f"model.name={config.name} returns {got} in training for {_IMAGES} images, where "
                          f"({_IMAGES}, {num_classes}) class scores are needed")  # fmt: skip


def _usual(config: ModelConfig, image_size: int) -> str:
    """Return a hint at the image size that a library's network is made for, empty if it is this one or unknown."""
    if not isinstance(config, ExternalConfig):
        return ""
    with contextlib.suppress(Exception):  # not every network has one, and this is only a hint
        from prune_lab.models.external import usual_size  # its file imports torchvision

        size = usual_size(config)
        return f"; its usual size is {size} x {size}" if size != image_size else ""
    return ""
