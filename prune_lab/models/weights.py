"""Start weights: from a file or torchvision's official ones; a mismatch lists the keys. Torch-free at import."""

from __future__ import annotations

import contextlib
import hashlib
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from prune_lab.files import read_json
from prune_lab.lazy import lazy_import
from prune_lab.models.configs import VGG_NAMES, ExternalConfig, ModelConfig, ResNetCifarConfig, WideResNetConfig
from prune_lab.schema import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

torch = lazy_import("torch")

OFFICIAL_VERSION = "IMAGENET1K_V1"
"""torchvision's original recipe: the dense networks that pruning papers start from (ResNet-50: 76.13 %)."""
REACH_TIMEOUT_S = 10
_WRAPPERS = ("state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_SHOWN_KEYS = 3
_NO_OFFICIAL = "model.weights=torchvision: torchvision has no weights for {}; give null or a file"


def weights_digest(config: ModelConfig) -> str | None:
    """Return a SHA-256 that changes when the start weights can change, None for fresh weights. Torch-free.

    A file counts by its content, the official weights by their name.

    Raises:
        ConfigError: the file does not exist.
    """
    if config.weights is None:
        return None
    if config.weights == "torchvision":
        return hashlib.sha256(f"torchvision {official_name(config)} {OFFICIAL_VERSION}".encode()).hexdigest()
    with _existing_file(config.weights).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(model: nn.Module, config: ModelConfig) -> None:
    """Load the start weights named by `config.weights` into `model` in place; nothing to do for null.

    Accepted files: a state dict, or one under the key `state_dict` or `model`, written by torch.save or as
    .safetensors, with or without `module.` and `_orig_mod.` in front of the keys.

    Raises:
        ConfigError: no such file, unreadable, keys or shapes that differ from the model's (nothing is loaded
            then), official weights that do not exist or cannot be fetched.
    """
    if config.weights is None:
        return
    path = official_file(config) if config.weights == "torchvision" else _existing_file(config.weights)
    state = read_state_dict(path)
    if config.weights == "torchvision" and isinstance(config, ExternalConfig):
        # Auxiliary classifiers of GoogLeNet and Inception are built without; their weights have no place.
        state = {key: value for key, value in state.items() if not key.lower().startswith("aux")}
    problems = _compare(model, state)
    if problems:
        raise ConfigError(
            f"model.weights={config.weights} does not fit model {config.name}: {problems}{_removed_channels(path)}"
        )
    # Not strict: files of old torch versions hold no num_batches_tracked; _compare has checked the rest.
    model.load_state_dict(state, strict=False)


def _removed_channels(path: Path) -> str:
    """Return what to add to an error about a run's file whose network has lost channels; empty for other files."""
    with contextlib.suppress(OSError, ValueError):
        if path.name == "model.safetensors" and read_json(path.with_name("model.json")).get("channels"):
            return "; the channels of this run's network were removed, start weights are those of whole networks"
    return ""


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file by plain key, on the CPU.

    Raises:
        ConfigError: the file cannot be read or holds no state dict.
    """
    try:
        if path.suffix == ".safetensors":
            content = lazy_import("safetensors.torch").load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Damaged or foreign files raise many types (pickle, zip, safetensors, runtime); all mean the same here. Their
        # texts do not help: torch's advises unrestricted unpickling.
        raise ConfigError(
            f"model.weights={path} cannot be read as weights ({type(error).__name__}): damaged, or not written by "
            "torch.save or safetensors as plain tensors"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not content or not all(map(torch.is_tensor, content.values())):
        raise ConfigError(
            f"model.weights={path} holds no state dict: expected names with tensors, "
            "plain or under 'state_dict' or 'model'"
        )
    return {_plain_key(key): value for key, value in content.items()}


def official_name(config: ModelConfig) -> str:
    """Return torchvision's name of the architecture whose official weights fit `config`.

    Raises:
        ConfigError: torchvision has no weights for this model.
    """
    if isinstance(config, (ResNetCifarConfig, WideResNetConfig)):
        raise ConfigError(_NO_OFFICIAL.format(config.name))
    # Ours has BN, torchvision's plain name has not. An external vgg16 is torchvision's own, without BN.
    if config.name in VGG_NAMES and not isinstance(config, ExternalConfig):
        return f"{config.name}_bn"
    return config.name


def official_file(config: ModelConfig) -> Path:
    """Return the cached file of the official weights; download it if it is missing and reachable.

    Raises:
        ConfigError: no official weights for this model, or not cached and not reachable.
    """
    models = lazy_import("torchvision.models")
    name = official_name(config)
    try:
        versions = models.get_model_weights(name)
    except ValueError as error:
        raise ConfigError(_NO_OFFICIAL.format(name)) from error
    url = getattr(versions, OFFICIAL_VERSION, versions.DEFAULT).url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.is_file():
        _download(url, path)
    return path


def _download(url: str, path: Path) -> None:
    # torch's own download has no timeout, so a network that swallows packets would hang the run: ask first.
    try:
        request = urllib.request.Request(url, method="HEAD")
        urllib.request.urlopen(request, timeout=REACH_TIMEOUT_S).close()
        path.parent.mkdir(parents=True, exist_ok=True)
        hash_prefix = path.stem.rsplit("-", 1)[-1]
        torch.hub.download_url_to_file(url, str(path), hash_prefix, progress=False)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"model.weights=torchvision: {path.name} is not in {path.parent} and cannot be downloaded "
            f"({_first_line(error)}); put the file there ({url})"
        ) from error


def _existing_file(weights: str) -> Path:
    path = Path(weights).expanduser()
    if not path.is_file():
        raise ConfigError(f"model.weights={weights}: no such file (allowed: null, torchvision, or a weights file)")
    return path


def _plain_key(key: str) -> str:
    while key.startswith(_PREFIXES):
        key = key.split(".", 1)[1]
    return key


def _compare(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Return in one line how `state` differs from what `model` needs, "" if it fits."""
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in wanted]
    reshaped = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({_shorten(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected ({_shorten(unexpected)})")
    if reshaped:
        shown = [f"{key} file {_shape(state[key])} model {_shape(wanted[key])}" for key in reshaped]
        parts.append(f"{len(reshaped)} of another shape ({_shorten(shown)})")
    if reshaped and not missing and not unexpected and _are_head(model, reshaped):
        parts.append("the file was trained for another number of classes")
    return "; ".join(parts)


def _are_head(model: nn.Module, keys: list[str]) -> bool:
    """Return whether all `keys` belong to the last linear layer."""
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return bool(linear) and all(key.rsplit(".", 1)[0] == linear[-1] for key in keys)


def _shorten(items: list[str]) -> str:
    return ", ".join(items[:_SHOWN_KEYS]) + (", ..." if len(items) > _SHOWN_KEYS else "")


def _shape(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "scalar"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
