"""The export formats, their requirements and runtimes. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import suggestion


@dataclass(frozen=True)
class Format:
    """One file format for a network."""

    name: str
    title: str
    files: tuple[str, ...]
    packages: tuple[str, ...] = ()
    """packages required besides prune-lab itself, by name on the package index and of import"""
    is_graph: bool = True
    """traced: the file holds the operations, not only the tensors"""
    on_request: bool = False
    """written only if requested by name: it suits only some networks"""

    def missing(self) -> list[str]:
        """Return the packages that are not installed."""
        return [package for package in self.packages if find_spec(package) is None]

    def install(self) -> str:
        """Return the command that installs the packages."""
        return f"pip install {' '.join(self.packages)}"


FORMATS = {
    entry.name: entry
    for entry in (
        Format("safetensors", "safetensors", ("model.safetensors", "model.json"), is_graph=False),
        Format("torch_export", "torch.export", ("model.pt2",)),
        Format("onnx", "ONNX", ("model.onnx",), ("onnx", "onnxscript", "onnxruntime")),
        Format("openvino", "OpenVINO", ("model.xml", "model.bin"), ("openvino",)),
        Format("semi_structured", "2:4", ("model_2_4.safetensors",), is_graph=False, on_request=True),
    )
}


@dataclass(frozen=True)
class Runtime:
    """The program that computes an exported network, and its number format."""

    title: str
    format: str
    precision: str = "fp32"


PRECISIONS = ("fp32", "bf16")
_RUNTIMES = (
    Runtime("PyTorch from safetensors", "safetensors"),
    Runtime("torch.export", "torch_export"),
    Runtime("onnxruntime", "onnx"),
    Runtime("OpenVINO fp32", "openvino"),
    Runtime("OpenVINO bf16", "openvino", "bf16"),
    Runtime("PyTorch from 2:4", "semi_structured"),
)


def runtimes(name: str, precisions: Sequence[str]) -> list[Runtime]:
    """Return the runtimes of format `name`; all but OpenVINO compute in fp32 only."""
    wanted = precisions if name == "openvino" else ("fp32",)
    return [runtime for runtime in _RUNTIMES if runtime.format == name and runtime.precision in wanted]


def choose(text: str | None) -> tuple[list[str], dict[str, str]]:
    """Return the formats to write, and for each other format why it is left out.

    Args:
        text: names with commas; None: every installed format that suits all networks.

    Raises:
        UserError: unknown or repeated name, or a package of a requested format is missing.
    """
    if text is None:
        usual = {name: entry for name, entry in FORMATS.items() if not entry.on_request}
        left_out = {name: _needs(entry) for name, entry in usual.items() if entry.missing()}
        return [name for name in usual if name not in left_out], left_out
    names = split(text, "--format")
    for name in names:
        if name not in FORMATS:
            raise UserError(f"--format {name}{suggestion(name, FORMATS)}: allowed are {', '.join(FORMATS)}")
        if FORMATS[name].missing():
            raise UserError(f"--format {name} {_needs(FORMATS[name])}")
    return [name for name in FORMATS if name in names], {}


def _needs(entry: Format) -> str:
    return f"needs {', '.join(entry.missing())}: {entry.install()}"


def split(text: str, option: str) -> list[str]:
    """Return the names between the commas of an option's value.

    Raises:
        UserError: nothing between two commas, or a name twice.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(words) or len(set(words)) < len(words):
        raise UserError(f"{option} must be different values with commas between them, got {text or 'nothing'}")
    return words
