"""The finished network on disk: a description, and tensors as safetensors; rebuilt from code, never unpickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from prune_lab import models
from prune_lab.foundations import tied
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.files import read_json, write_bytes, write_json
from prune_lab.pruning.channels import surgery
from prune_lab.pruning.dynamic import replaced_modules


def save_model(model: nn.Module, description: dict[str, Any], run_dir: Path) -> None:
    """Write model.safetensors and model.json; each file appears whole or not at all, each tensor once."""
    tensors, other_names = tied.written(model.state_dict())
    write_bytes(run_dir / "model.safetensors", save(tensors, other_names))
    modules = replaced_modules.describe(model)
    write_json(run_dir / "model.json", description | ({"modules": modules} if modules else {}))


def load_model(run_dir: str | Path) -> nn.Module:
    """Return the finished network in eval mode on the CPU.

    Raises:
        UserError: the directory holds no finished model, or its tensors do not match the description.
    """
    directory = Path(run_dir)
    if not (directory / "model.json").exists() or not (directory / "model.safetensors").exists():
        raise UserError(f"{directory} holds no finished model (model.json and model.safetensors)")
    description = read_json(directory / "model.json")
    model = models.from_description(description)
    surgery.narrow(model, description.get("channels", {}))
    replaced_modules.replace(model, description.get("modules", {}))
    try:
        model.load_state_dict(tied.completed(load_file(directory / "model.safetensors"), model))
    except (RuntimeError, OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{directory}/model.safetensors does not fit model.json: {reason}") from error
    return model.eval()
