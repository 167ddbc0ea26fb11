"""Files of weights in common formats: what can be read safely, and every state dict within. Torch-free."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import pathlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


_NESTING = 3
"""levels of nested mappings that are searched"""
_WRAPPED = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""parts that torch.compile, FSDP and activation checkpointing insert into names, at any level"""
_MASKED = (("_orig", "_mask"), (".original", ".0.mask"))
"""weight and mask of torch.nn.utils.prune, and of a parametrization by a mask (torch.ao.pruning)"""
_PARAMETRIZED = re.compile(r"(.*?)parametrizations\.([^.]+)$")
_RENAMED = (
    (re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)"), r"\1\2"),
    (re.compile(r"(.*encoder_layer_\d+\.mlp\.)linear_1(\.\w+)"), r"\g<1>0\2"),
    (re.compile(r"(.*encoder_layer_\d+\.mlp\.)linear_2(\.\w+)"), r"\g<1>3\2"),
)
"""names in torchvision's older files, renamed as its densenet.py and vision_transformer.py do"""
_COMPUTED = re.compile(r"(?:_g|_v|_u|_orig|parametrizations\.\w+\.(?:original|0\.).*)$")
"""name endings of tensors from which weight norm, spectral norm and other parametrizations compute a weight"""
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
_AVERAGES = re.compile(r"ema|averag|avg|swa|shadow", re.IGNORECASE)
_SHOWN = 8


@dataclass(frozen=True)
class Found:
    """One state dict of a file."""

    place: str
    """keys that lead to it, with dots; empty: the file itself"""
    prefix: str
    """prefix of each of its names in the file"""
    tensors: dict[str, Tensor]
    versions: dict[str, Any] | None = field(default=None, repr=False)
    """module path -> version of its layout, as torch stores them; None: unknown"""

    @property
    def is_average(self) -> bool:
        """Whether the file marks it as a running average of weights."""
        return bool(_AVERAGES.search(f"{self.place}.{self.prefix}"))

    def __str__(self) -> str:
        place = f"'{self.place}'" if self.place else "the file"
        return f"'{self.prefix}*' of {place}" if self.prefix else place


def read(path: Path) -> Any:
    """Return the content of a file of weights on the CPU, without running code from the file.

    Raises:
        UserError: damaged, or with objects of types that cannot be read safely.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_safe_types()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Damaged or foreign files raise many types (pickle, zip, safetensors, runtime); all mean the same here. Their
        # messages do not help: torch's advises unrestricted unpickling.
        raise UserError(f"model.weights={path} cannot be read as weights ({type(error).__name__}): "
                          f"{_unsafe(path)}") from error  # fmt: skip


def _safe_types() -> list[Any]:
    """Return types that checkpoints hold beside weights and that can do nothing but hold values."""
    import numpy

    arrays = importlib.import_module(f"numpy.{'_core' if int(numpy.__version__[0]) > 1 else 'core'}.multiarray")
    makers = {name: getattr(arrays, name) for name in ("scalar", "_reconstruct")}
    named = [(made, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name, made in makers.items()]
    kinds = {type(numpy.dtype(code)) for code in "?bBhHiIlLqQefd"}
    # Python 3.13 renamed the module of the paths, and a Windows path cannot be created elsewhere.
    paths = [(pathlib.PurePath, f"{module}.{name}") for module in ("pathlib", "pathlib._local") for name in _PATHS]
    return [*named, numpy.ndarray, numpy.dtype, *kinds, argparse.Namespace, *paths]


def _unsafe(path: Path) -> str:
    """Return why a file was rejected: the unsafe types in it, if torch can list them."""
    with contextlib.suppress(Exception), torch.serialization.safe_globals(_safe_types()):
        if names := torch.serialization.get_unsafe_globals_in_checkpoint(path):
            return f"it holds objects of {_shown(names)}; save the network's state_dict() alone"
    return "damaged, or not written by torch.save or safetensors as plain tensors"


def state_dicts(content: Any, wanted: Mapping[str, Any]) -> Iterator[Found]:
    """Yield every group of tensors in a file's content that may be the weights of a network.

    Args:
        content: from `read`.
        wanted: names of the network's tensors; a prefix in the file counts if most of them follow it.
    """
    for place, mapping in _mappings(content):
        tensors = {key: _strided(value.detach()) for key, value in mapping.items() if torch.is_tensor(value)}
        if not tensors or not all(isinstance(key, str) for key in tensors):
            continue
        tensors, versions = _plain(tensors), getattr(mapping, "_metadata", None)
        for prefix in _prefixes(tensors, wanted):
            inside = {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}
            yield Found(place, prefix, inside, _behind(prefix, versions))


def describe(content: Any) -> str:
    """Describe what a file holds."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    return _shown([f"{key} ({type(value).__name__})" for key, value in content.items()]) or "nothing"


def _mappings(content: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, Mapping]]:
    if not isinstance(content, Mapping) or depth > _NESTING:
        return
    yield place, content
    for key, value in content.items():
        if isinstance(key, str):
            yield from _mappings(value, f"{place}.{key}" if place else key, depth + 1)


def _strided(tensor: Tensor) -> Tensor:
    """Return a tensor stored by its nonzero values in dense form."""
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def is_computed(name: str) -> bool:
    """Return whether another program computes a weight from a tensor of this name."""
    return bool(_COMPUTED.search(name))


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the names of a plain network: without wrappers, with masks applied, old names replaced."""
    tensors = {_WRAPPED.sub("", key): value for key, value in tensors.items()}
    for weight, mask in _MASKED:
        for key in [key for key in tensors if key.endswith(weight)]:
            stem = key.removesuffix(weight)
            if stem + mask in tensors:
                kept = tensors.pop(stem + mask) != 0
                # Not a product: infinity or NaN under a mask must become 0, and no zero may get a sign.
                tensors[_PARAMETRIZED.sub(r"\1\2", stem)] = torch.where(kept, tensors.pop(key), 0)
    for old, new in _RENAMED:
        tensors = {old.sub(new, key): value for key, value in tensors.items()}
    return tensors


def _prefixes(tensors: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return the prefixes of the names of `wanted`, the file's own names first."""
    found: Counter[str] = Counter()
    for key in tensors:
        starts = [0, *(match.end() for match in re.finditer(r"\.", key))]
        found.update(key[:start] for start in starts if key[start:] in wanted)
    most = [prefix for prefix, count in found.items() if 2 * count > len(wanted)]
    return ["", *(prefix for prefix in most if prefix)]


def _behind(prefix: str, versions: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if versions is None:
        return None
    named = {f"{_WRAPPED.sub('', path + '.')}": version for path, version in versions.items()}
    return {path[len(prefix):].rstrip("."): value for path, value in named.items() if path.startswith(prefix)}


def _shown(items: list[str]) -> str:
    return ", ".join(map(str, items[:_SHOWN])) + (", ..." if len(items) > _SHOWN else "")
