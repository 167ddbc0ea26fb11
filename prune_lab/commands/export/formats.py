"""Writes a network as safetensors, torch.export program, ONNX or OpenVINO files, with a dynamic batch size."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from prune_lab.commands.export.sparse import replaced
from prune_lab.foundations.bits import clear_sign_of_zeros
from prune_lab.foundations.errors import UserError
from prune_lab.pipeline.saved_model import save_model

INPUT, OUTPUT = "images", "logits"
"""names in ONNX and OpenVINO files"""


class NotExportable(UserError):
    """The network holds something that the format cannot express."""


def refusal(model: nn.Module) -> str | None:
    """Return the reason why a module of `model` (attribute `export_refusal`) cannot become a graph."""
    for path, module in model.named_modules():
        sentence = getattr(module, "export_refusal", None)
        if isinstance(sentence, str):
            return f"{sentence} ({path or 'the network'}: {type(module).__name__})"
    return None


def _for_export(model: nn.Module) -> nn.Module:
    """Return `model` with every module replaced that has a form for graphs (method `for_export`)."""
    paths = [path for path, module in model.named_modules() if hasattr(module, "for_export")]
    return replaced(model, paths, _form_for_export) if paths else model


def _form_for_export(module: Any) -> nn.Module:
    return module.for_export()


def trace(model: nn.Module, image_size: int) -> ExportedProgram:
    """Return the operations of `model` (eval mode) on images [batch, 3, image_size, image_size], batch >= 1.

    Raises:
        NotExportable: a module refuses, or the computation depends on the data or on the batch size.
    """
    sentence = refusal(model)
    if sentence is not None:
        raise NotExportable(sentence)
    model = _for_export(model)
    # A batch of 2: sizes 0 and 1 would be taken as constants.
    images = torch.randn(2, 3, image_size, image_size)
    with _quiet(), _one_line("torch.export cannot trace the network"), torch.no_grad():
        return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))


def write(name: str, folder: Path, *, model: nn.Module, description: dict[str, Any], program: Any) -> None:
    """Write format `name` into `folder`.

    Args:
        description: content of model.json.
        program: from `trace`; unused for safetensors.

    Raises:
        NotExportable: the format lacks an operation.
    """
    if name == "safetensors":
        save_model(model, description, folder)
        return
    writer = {"torch_export": _write_program, "onnx": _write_onnx, "openvino": _write_openvino}[name]
    with _quiet(), _one_line(f"the network cannot be written as {name}"), torch.no_grad():
        writer(program, folder, description["image_size"])


def _write_program(program: ExportedProgram, folder: Path, image_size: int) -> None:
    torch.export.save(program, folder / "model.pt2")


def _write_onnx(program: ExportedProgram, folder: Path, image_size: int) -> None:
    import onnx
    import onnx.numpy_helper

    written = torch.onnx.export(
        program, (torch.randn(2, 3, image_size, image_size),), dynamo=True, verbose=False,
        input_names=[INPUT], output_names=[OUTPUT], dynamic_shapes=({0: "batch"},),
    )  # fmt: skip
    network = written.model_proto
    # Inner shapes may be omitted. They contain "batch", which a runtime with a fixed batch size rejects.
    del network.graph.value_info[:]
    for constant in network.graph.initializer:
        values = onnx.numpy_helper.to_array(constant)
        if values.dtype.kind == "f":
            constant.CopyFrom(onnx.numpy_helper.from_array(_with_positive_zeros(values), constant.name))
    path = folder / "model.onnx"
    onnx.save(network, path)
    onnx.checker.check_model(path, full_check=True)


def _with_positive_zeros(constant: Any) -> Any:
    """Return a copy of a NumPy array without -0.0: exporters multiply zeros by negative scales of batch norms."""
    values = torch.from_numpy(constant.copy())
    clear_sign_of_zeros(values)
    return values.numpy()


def _write_openvino(program: ExportedProgram, folder: Path, image_size: int) -> None:
    openvino = import_openvino()
    network = openvino.convert_model(program)
    for operation in network.get_ops():
        if operation.get_type_name() == "Constant" and operation.data.dtype.kind == "f":
            values = _with_positive_zeros(operation.data)
            operation.output(0).replace(openvino.opset13.constant(values).output(0))
    network.reshape({network.input(0): [-1, 3, image_size, image_size]})
    network.input(0).get_tensor().set_names({INPUT})
    network.output(0).get_tensor().set_names({OUTPUT})
    openvino.save_model(network, folder / "model.xml", compress_to_fp16=False)


def import_openvino() -> Any:
    """Return the module openvino, with its telemetry disabled, which would otherwise use the network."""
    sys.modules.setdefault("openvino_telemetry", None)
    import openvino

    return openvino


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporters' output on the console; errors are exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # exporters raise dozens of types and pages of advice; the first line suffices
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise NotExportable(f"{what}: {lines[0] if lines else type(error).__name__}") from error
