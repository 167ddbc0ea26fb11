"""Start weights: from a file or torchvision's official ones; errors list mismatched keys. Torch-free at import."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import re
import urllib.error
import urllib.request
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_lab.foundations import tied
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.files import read_json
from prune_lab.foundations.lazy import torch
from prune_lab.models.configs import VGG_NAMES, ExternalConfig, ModelConfig, ResNetCifarConfig, WideResNetConfig
from prune_lab.models.foreign import reason
from prune_lab.models.weight_files import Found, describe, is_computed, read, state_dicts

if TYPE_CHECKING:
    from torch import Tensor, nn


OFFICIAL_VERSION = "IMAGENET1K_V1"
"""torchvision's original recipe: the dense networks that pruning papers start from (ResNet-50: 76.13 %)."""
REACH_TIMEOUT_S = 10
_SHOWN_KEYS = 3
_NO_OFFICIAL = "model.weights=torchvision: torchvision has no weights for {}; give null or a file"


def weights_digest(config: ModelConfig) -> str | None:
    """Return a SHA-256 that changes when the start weights can change, None for fresh weights. Torch-free.

    A file is identified by its content, the official weights by their name.

    Raises:
        UserError: the file does not exist.
    """
    if config.weights is None:
        return None
    if config.weights == "torchvision":
        return hashlib.sha256(f"torchvision {official_name(config)} {OFFICIAL_VERSION}".encode()).hexdigest()
    with _existing_file(config.weights).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(model: nn.Module, config: ModelConfig) -> list[str]:
    """Load the start weights named by `config.weights` into `model` in place; nothing to do for null.

    Accepted files are written by torch.save or as .safetensors. They hold a state dict, plain or within nested
    mappings, with or without a common prefix; exactly one of those must fit. Where an average of the weights fits too
    (`state_dict_ema` beside `state_dict`), the weights themselves are taken.

    Returns:
        Lines for the user: what was chosen and left out, if there was a choice.

    Raises:
        UserError: no such file; unreadable; keys or shapes that differ from the model's, or values that are not
            finite (nothing is loaded then); official weights that do not exist or cannot be downloaded.
    """
    if config.weights is None:
        return []
    path = official_file(config) if config.weights == "torchvision" else _existing_file(config.weights)
    try:
        found, notes = choose(model, read(path), auxiliary=isinstance(config, ExternalConfig))
        _check_values(found, model)
    except _Unfit as error:
        what = f"model.weights={config.weights} "
        if error.fits_not:
            what += f"does not fit model {config.name}: "
        raise UserError(f"{what}{error}{_removed_channels(path)}") from None
    # Not strict: files of old torch versions hold no num_batches_tracked; `choose` has checked the rest.
    model.load_state_dict(_with_versions(found, model), strict=False)
    return [f"start weights: {note}" for note in notes]


class _Unfit(Exception):
    """Why the content of a file cannot be start weights; `fits_not`: it has weights, but of another network."""

    def __init__(self, reason: str, *, fits_not: bool = False) -> None:
        super().__init__(reason)
        self.fits_not = fits_not


def choose(model: nn.Module, content: Any, *, auxiliary: bool = False) -> tuple[Found, list[str]]:
    """Return the state dict of a file's content that fits `model`, and a remark on the choice.

    Args:
        content: from weight_files.read.
        auxiliary: leave out weights of auxiliary classifiers (GoogLeNet, Inception), which `model` is built without.
    """
    wanted = model.state_dict()
    all_found = [_without_auxiliary(found) if auxiliary else found for found in state_dicts(content, wanted)]
    if not all_found:
        raise _Unfit(f"holds no state dict, names with tensors; found: {describe(content)}")
    problems = [_compare(model, found) for found in all_found]
    fits = [found for found, problem in zip(all_found, problems, strict=True) if not problem]
    if not fits:
        nearest = min(range(len(problems)), key=lambda index: problems[index].count)
        where = f"{all_found[nearest]}: " if str(all_found[nearest]) != "the file" else ""
        raise _Unfit(f"{where}{problems[nearest]}", fits_not=True)
    plain = [found for found in fits if not found.is_average] or fits
    if any(not _equal(plain[0], other) for other in plain[1:]):
        raise _Unfit(f"holds {len(plain)} sets of weights that fit and differ: {', '.join(map(str, plain))}; "
                     "save one of them in a file of its own")  # fmt: skip
    return plain[0], _choices(plain[0], [found for found in fits if found.is_average and found is not plain[0]])


def _choices(taken: Found, averages: list[Found]) -> list[str]:
    if not averages:
        return []
    return [f"{taken} is taken; {', '.join(map(str, averages))}, a running average, fits as well: to start from it, "
            "save it in a file of its own"]  # fmt: skip


def _removed_channels(path: Path) -> str:
    """Return a note for an error about a run's file whose channels were removed; empty for other files."""
    with contextlib.suppress(OSError, ValueError):
        if path.name == "model.safetensors" and read_json(path.with_name("model.json")).get("channels"):
            return "; the channels of this run's network were removed, start weights are those of whole networks"
    return ""


def official_name(config: ModelConfig) -> str:
    """Return torchvision's name of the architecture whose official weights fit `config`.

    Raises:
        UserError: torchvision has no weights for this model.
    """
    if isinstance(config, (ResNetCifarConfig, WideResNetConfig)):
        raise UserError(_NO_OFFICIAL.format(config.name))
    # Ours has BN, torchvision's plain name has not. An external vgg16 is torchvision's own, without BN.
    if config.name in VGG_NAMES and not isinstance(config, ExternalConfig):
        return f"{config.name}_bn"
    return config.name


def official_file(config: ModelConfig) -> Path:
    """Return the cached file of the official weights; download it if it is missing and reachable.

    Raises:
        UserError: no official weights for this model, or not cached and not reachable.
    """
    from torchvision.models import get_model_weights

    name = official_name(config)
    try:
        versions = get_model_weights(name)
    except ValueError as error:
        raise UserError(_NO_OFFICIAL.format(name)) from error
    url = getattr(versions, OFFICIAL_VERSION, versions.DEFAULT).url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.is_file():
        _download(url, path)
    return path


def _download(url: str, path: Path) -> None:
    # torch's own download has no timeout, so a network that swallows packets would hang the run: connect first.
    try:
        request = urllib.request.Request(url, method="HEAD")
        urllib.request.urlopen(request, timeout=REACH_TIMEOUT_S).close()
        path.parent.mkdir(parents=True, exist_ok=True)
        hash_prefix = path.stem.rsplit("-", 1)[-1]
        torch.hub.download_url_to_file(url, str(path), hash_prefix, progress=False)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"model.weights=torchvision: {path.name} is not in {path.parent} and cannot be downloaded "
            f"({reason(error)}); put the file there ({url})"
        ) from error


def _existing_file(weights: str) -> Path:
    path = Path(weights)
    if not path.is_file():
        raise UserError(f"model.weights={weights}: no such file (allowed: null, torchvision, or a weights file)")
    return path


def _without_auxiliary(found: Found) -> Found:
    return replace(found, tensors={k: v for k, v in found.tensors.items() if not k.lower().startswith("aux")})


def _equal(one: Found, other: Found) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(value, other.tensors[key]) for key, value in one.tensors.items()
    )


def _check_values(found: Found, model: nn.Module) -> None:
    """Raise _Unfit for values that are not finite, or for integer codes of weights (quantised networks)."""
    wanted = model.state_dict()
    for name, tensor in found.tensors.items():
        what = f"{found.prefix}{name}"
        if name in wanted and wanted[name].is_floating_point() and not tensor.is_floating_point():
            raise _Unfit(f"cannot be a start: {what} holds {str(tensor.dtype).removeprefix('torch.')}, not "
                         "floating-point numbers")  # fmt: skip
        # In float32, because 8-bit floats do not support the check.
        values = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
        wrong = int((~torch.isfinite(values)).sum()) if tensor.is_floating_point() else 0
        if wrong:
            raise _Unfit(f"cannot be a start: {wrong} of {tensor.numel()} values of {what} are NaN or infinite")


class _State(OrderedDict[str, "Tensor"]):
    """Tensors by name, with the versions of their modules where torch looks for them."""

    _metadata: Mapping[str, Any]


def _with_versions(found: Found, model: nn.Module) -> _State:
    """Return the tensors with the versions of their modules, which modules need to rename old keys.

    A file without versions counts as written by the modules at hand.
    """
    state = _State(found.tensors)
    state._metadata = OrderedDict(found.versions) if found.versions else vars(model.state_dict())["_metadata"]
    return state


@dataclass(frozen=True)
class _Problems:
    """How a state dict differs from what a model needs; false where it fits."""

    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]
    only_head: bool

    @property
    def count(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.reshaped)

    def __bool__(self) -> bool:
        return self.count > 0

    def __str__(self) -> str:
        named = [("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", self.reshaped)]
        parts = [f"{len(items)} {what} ({_shorten(items)})" for what, items in named if items]
        hints = ["the file was trained for another number of classes"] * self.only_head
        if any(map(is_computed, self.unexpected)):
            hints.append("it holds what a weight is computed from (weight norm, spectral norm, parametrizations); "
                         "remove them from the network before saving it")  # fmt: skip
        return "; ".join(parts + hints)


def _compare(model: nn.Module, found: Found) -> _Problems:
    """Return how a state dict differs from what `model` needs, after its modules have renamed old keys."""
    wanted, state = model.state_dict(), _with_versions(found, model)
    reshaped = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    shown = [f"{key} file {_shape(state[key])} model {_shape(wanted[key])}" for key in reshaped]
    for key in reshaped:
        del state[key]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loading tensors without memory does nothing, which is intended here
        try:
            absent, unexpected = copy.deepcopy(model).to("meta").load_state_dict(state, strict=False)
        except RuntimeError as error:  # renamed ones of another shape
            absent, unexpected = [], []
            shown += re.findall(r"size mismatch for ([\w.]+)", str(error))
    # A file may hold only once a tensor that the model has under several names.
    there = tied.completed(state, model)
    missing = [key for key in absent if not key.endswith("num_batches_tracked") and key not in {*reshaped, *there}]
    only_head = bool(reshaped) and not missing and not unexpected and _are_head(model, reshaped)
    return _Problems(missing, list(unexpected), shown, only_head)


def _are_head(model: nn.Module, keys: list[str]) -> bool:
    """Return whether all `keys` belong to the last linear layer."""
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return bool(linear) and all(key.rsplit(".", 1)[0] == linear[-1] for key in keys)


def _shorten(items: list[str]) -> str:
    return ", ".join(items[:_SHOWN_KEYS]) + (", ..." if len(items) > _SHOWN_KEYS else "")


def _shape(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "scalar"
