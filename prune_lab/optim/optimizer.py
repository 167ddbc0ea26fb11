"""Optimizers, parameter groups and learning rates; the learning rate is a pure function of the step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prune_lab.config.optimizer import FrankWolfeConfig, OptimizerConfig, PlainConfig
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimizer over all parameters of `model`; vectors have no weight decay if the options say so."""
    if not isinstance(config, FrankWolfeConfig):
        return _plain_optimizer(model, config)
    from prune_lab.optim.frank_wolfe import FrankWolfe  # its file defines an Optimizer and so imports torch

    outer = _plain_optimizer(model, config.outer)
    return FrankWolfe(outer, radius=config.inner_radius, steps=config.inner_steps, point=config.inner_point)


def _plain_optimizer(model: nn.Module, config: PlainConfig) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]]
    if config.decay_norm_and_bias:
        groups = [{"params": trained}]
    else:
        groups = [
            {"params": [p for p in trained if p.dim() > 1]},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
    groups = [group for group in groups if group["params"]]
    # One fused kernel per step where it exists; a loop over layers otherwise dominates small networks.
    is_fused = trained[0].device.type in ("cpu", "cuda")
    common: dict[str, Any] = {"lr": 0.0, "weight_decay": config.weight_decay, "fused": is_fused}
    if config.name == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.nesterov, **common)
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(groups, betas=(config.beta1, config.beta2), eps=config.eps, **common)


def leave_inner_loop(optimizer: torch.optim.Optimizer) -> None:
    """Put weights back that the optimizer has moved for a while only, at the end of a training."""
    if hasattr(optimizer, "leave_inner_loop"):
        optimizer.leave_inner_loop()


def require_momentum(optimizer: torch.optim.Optimizer, who: str) -> None:
    """Raise UserError if the optimizer keeps no running mean of gradients."""
    if not all(group.get("momentum", group.get("betas", (0,))[0]) for group in optimizer.param_groups):
        raise UserError(f"{who} needs the optimizer's momentum; optimizer.momentum (or beta1) must be above 0")


def momentum(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor:
    """Return the running mean of the parameter's gradients; Adam's is divided by the root of their mean square.

    Raises:
        RuntimeError: the optimizer has not taken a step.

    Source: official code of Dettmers, Zettlemoyer 2019, arXiv 1907.04840.
    """
    state = optimizer.state[parameter]
    if not state:
        raise RuntimeError("no momentum yet: every step so far was left out, because its gradients overflowed")
    if "momentum_buffer" in state:
        return state["momentum_buffer"]
    return state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)
