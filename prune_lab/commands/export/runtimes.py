"""Written networks opened by their runtimes: functions from images to logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_lab.commands.export.catalog import Runtime
from prune_lab.commands.export.formats import INPUT, import_openvino
from prune_lab.commands.export.packed import load_packed
from prune_lab.pipeline.saved_model import load_model

Run = Callable[[Tensor], Tensor]


def open_network(runtime: Runtime, folder: Path, *, threads: int, shape: tuple[int, ...] | None = None) -> Run:
    """Return the network in `folder` as a function from fp32 images [N, 3, H, W] to fp32 logits [N, classes].

    Args:
        threads: of onnxruntime and OpenVINO; PyTorch has its own setting.
        shape: shape of all later images, for which the runtime may optimise; None: any batch size.
    """
    if runtime.format == "safetensors":
        return load_model(folder)
    if runtime.format == "semi_structured":
        return load_packed(folder)
    if runtime.format == "torch_export":
        return torch.export.load(folder / "model.pt2").module()
    if runtime.format == "onnx":
        return _open_onnx(folder / "model.onnx", threads, shape)
    return _open_openvino(folder / "model.xml", threads, shape, runtime.precision)


def _open_onnx(path: Path, threads: int, shape: tuple[int, ...] | None) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors
    # As for the other runtimes: denormal numbers are slow, and which network has them is random.
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    if shape is not None:
        options.add_free_dimension_override_by_name("batch", shape[0])
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])

    return run


def _open_openvino(path: Path, threads: int, shape: tuple[int, ...] | None, precision: str) -> Run:
    openvino = import_openvino()
    core = openvino.Core()
    network = core.read_model(path)
    if shape is not None:
        network.reshape(list(shape))
    settings = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,  # two networks timed in turn must not occupy one core each
        "CPU_DENORMALS_OPTIMIZATION": True,
    }
    compiled = core.compile_model(network, "CPU", settings)

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(compiled(images.numpy())[0])

    return run


def openvino_has_bf16() -> bool:
    """Return whether OpenVINO computes in bf16 on this CPU; elsewhere it silently uses fp32."""
    capabilities: Any = import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "BF16" in capabilities
