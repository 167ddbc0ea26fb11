"""Trains the middle of a quadratic Bezier curve between two networks; both ends stay fixed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_lab.commands.analysis.bench import Bench, place, trained
from prune_lab.commands.analysis.curves import Curve, coefficients
from prune_lab.foundations.checkpoint import CheckpointPair
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.seeding import generator, stable_hash


@dataclass(frozen=True)
class Recipe:
    """SGD without weight decay on cross-entropy, over augmented training images."""

    epochs: int
    lr: float
    momentum: float
    batch_size: int


def lr_factor(epoch: int, epochs: int) -> float:
    """Return the factor on the learning rate in `epoch` (from 1) of `epochs`.

    1 in the first half, then falling linearly to 0.01 at nine tenths, 0.01 after.

    Source: official code of Chao et al. 2020, arXiv 2006.09358.
    """
    part = epoch / epochs
    if part <= 0.5:
        return 1.0
    return 1 - (part - 0.5) / 0.4 * 0.99 if part <= 0.9 else 0.01


def train_middle(
    model: nn.Module,
    curve: Curve,
    bench: Bench,
    recipe: Recipe,
    checkpoints: CheckpointPair,
    report: Callable[[str], None],
) -> Curve:
    """Return the curve with a middle trained to minimise the mean loss over t; it starts at the mean of the ends.

    Every batch draws one t uniformly from [0, 1]. A checkpoint is written after each epoch; training resumes from it
    with the same result, because all draws are keyed by seed and position.

    Args:
        model: used for computation; its parameters and statistics are lost.
        curve: defines the ends.

    Raises:
        UserError: the loss is infinite or NaN.

    Source: Garipov et al. 2018, arXiv 1802.10026.
    """
    middle = [nn.Parameter(value) for value in Curve(curve.start, curve.end).at(0.5)]
    curve = replace(curve, middle=[value.detach() for value in middle])  # the same memory
    optimizer = torch.optim.SGD(middle, lr=recipe.lr, momentum=recipe.momentum)
    first = _resume(checkpoints, curve, optimizer)
    if 0 < first < recipe.epochs:
        report(f"curve: resumed after epoch {first}")
    for epoch in range(first, recipe.epochs):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * lr_factor(epoch + 1, recipe.epochs)
        loss, error = _train_epoch(model, curve, bench, optimizer, epoch, recipe.batch_size)
        if not loss < float("inf"):
            raise UserError(f"the loss along the curve is {loss} in epoch {epoch + 1}; lower --lr")
        checkpoints.save({"epoch": epoch + 1, "middle": list(curve.middle), "optimizer": optimizer.state_dict()})
        lr = optimizer.param_groups[0]["lr"]
        report(f"curve {epoch + 1}/{recipe.epochs}  loss {loss:.4f}  error {error:.2f}  lr {lr:.2e}")
    return curve


def _resume(checkpoints: CheckpointPair, curve: Curve, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint, if there is one, and return the number of finished epochs."""
    state = checkpoints.load()
    if state is None:
        return 0
    for value, saved in zip(curve.middle, state["middle"], strict=True):
        value.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    return state["epoch"]


def _train_epoch(
    model: nn.Module, curve: Curve, bench: Bench, optimizer: torch.optim.Optimizer, epoch: int, batch_size: int
) -> tuple[float, float]:
    """Return mean loss and error (percent) over the batches, each at its own t."""
    seed = stable_hash(bench.seed, "curve")
    images = bench.dataset.train_batches(
        epoch=epoch, batch_size=batch_size, start=0, seed=seed, rank=0, world_size=1
    )
    num_batches = bench.dataset.num_batches(batch_size)
    drawn = torch.rand(num_batches, generator=generator(seed, "t", epoch), dtype=torch.float64).tolist()
    sums = torch.zeros(3, dtype=torch.float64, device=bench.device_config.torch_device)
    model.train()
    for index, ((x, y), t) in enumerate(zip(images, drawn, strict=True)):
        torch.manual_seed(stable_hash(seed, "step", epoch, index))  # dropout
        loss, correct = _step(model, curve, bench, optimizer, t, x, y)
        sums += torch.stack([loss.double() * len(y), correct.double(), torch.full_like(correct, len(y)).double()])
    model.eval()
    loss, correct, count = sums.tolist()
    return loss / count, 100 - 100 * correct / count


def _step(
    model: nn.Module, curve: Curve, bench: Bench, optimizer: torch.optim.Optimizer, t: float, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Update the middle once and return (mean loss, number of correct predictions)."""
    place(model, curve.at(t))
    with bench.device_config.autocast():
        logits = model(x).float()
    loss = F.cross_entropy(logits, y)
    gradients = torch.autograd.grad(loss, list(trained(model).values()), allow_unused=True, materialize_grads=True)
    share = coefficients(t, bezier=True)[1]  # d theta(t) / d middle
    for value, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
        value.grad = share * gradient
    optimizer.step()
    return loss.detach(), (logits.detach().argmax(1) == y).sum()
