"""Exported files in tools from outside: what they refuse is not written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from prune_lab.commands.export import formats
from prune_lab.models.resnet_cifar import ResNetCifar, ZeroPadShortcut

SIZE = 9
"""odd: the shortcut's last pixel has no neighbour"""


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    model = ResNetCifar(1, num_classes=4, width=0.25, shortcut="A").eval()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        for tensor, low, high in (
            (norm.running_mean, -0.3, 0.3), (norm.running_var, 0.5, 1.5),
            (norm.weight, 0.5, 1.5), (norm.bias, -0.3, 0.3),
        ):  # fmt: skip
            nn.init.uniform_(tensor, low, high)
        with torch.no_grad():
            norm.weight[1::2] *= -1
    for kernel in (parameter for parameter in model.parameters() if parameter.dim() == 4):
        kernel.data[:, ::2] = 0
    return model


@pytest.fixture(scope="module")
def program(network: nn.Module):
    return formats.trace(network, SIZE)


@pytest.fixture(scope="module")
def onnx_file(network: nn.Module, program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    folder = tmp_path_factory.mktemp("onnx")
    formats.write("onnx", folder, model=network, description={"image_size": SIZE}, program=program)
    return folder / "model.onnx"


@pytest.fixture(params=[1, 3, 5])
def images(request: pytest.FixtureRequest) -> Tensor:
    return torch.randn(request.param, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def is_near(found, wanted: Tensor) -> bool:
    return bool((torch.as_tensor(found) - wanted).abs().max() <= 1e-5 * wanted.abs().max())


def test_no_inner_shape_speaks_of_the_batch(onnx_file: Path) -> None:
    import onnx

    graph = onnx.load(onnx_file).graph
    assert len(graph.value_info) == 0
    assert {node.op_type for node in graph.node} >= {"Conv", "AveragePool"}
    onnx.checker.check_model(onnx_file, full_check=True)


def test_pruned_weights_are_positive_zeros_in_onnx(onnx_file: Path) -> None:
    """Kernels are written times the scale of the batch norm behind them, which may be negative."""
    import onnx

    constants = [onnx.numpy_helper.to_array(constant) for constant in onnx.load(onnx_file).graph.initializer]
    zeros = [constant.view("int32")[constant == 0] for constant in constants if constant.dtype == "float32"]
    assert sum(map(len, zeros)) > 100 and not any(bits.any() for bits in zeros)


def test_pruned_weights_are_positive_zeros_in_openvino(network: nn.Module, program, images: Tensor, tmp_path: Path):
    pytest.importorskip("openvino", reason="openvino is not installed")
    formats.write("openvino", tmp_path, model=network, description={"image_size": SIZE}, program=program)
    core = formats.import_openvino().Core()
    read = core.read_model(tmp_path / "model.xml")
    constants = [operation.data for operation in read.get_ops() if operation.get_type_name() == "Constant"]
    zeros = [constant.view("int32")[constant == 0] for constant in constants if constant.dtype == "float32"]
    assert sum(map(len, zeros)) > 100 and not any(bits.any() for bits in zeros)
    compiled = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert is_near(compiled([images.numpy()])[0], network(images))


@pytest.mark.parametrize("is_fixed", [False, True])
def test_onnxruntime_takes_any_batch(onnx_file: Path, network: nn.Module, images: Tensor, is_fixed: bool) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    options = onnxruntime.SessionOptions()
    if is_fixed:
        options.add_free_dimension_override_by_name("batch", len(images))
    session = onnxruntime.InferenceSession(onnx_file, options)
    assert is_near(session.run(None, {"images": images.numpy()})[0], network(images))


def test_tract_takes_any_batch(onnx_file: Path, network: nn.Module, images: Tensor) -> None:
    """Tract unifies what it is told with inner shapes: "Impossible to unify Sym(batch) with Val(3)"."""
    tract = pytest.importorskip("tract", reason="tract is not installed")
    read = tract.onnx().load(str(onnx_file))
    read.set_input_fact(0, f"{len(images)},3,{SIZE},{SIZE},f32")
    found = read.into_model().into_runnable().run([images.numpy()])[0].to_numpy()
    assert is_near(found, network(images))


def test_opencv_takes_any_batch(onnx_file: Path, network: nn.Module, images: Tensor) -> None:
    cv2 = pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    read = cv2.dnn.readNetFromONNX(str(onnx_file))
    read.setInput(images.numpy())
    assert is_near(read.forward(), network(images))


@pytest.mark.parametrize("size", [8, 9])
def test_a_shortcut_without_parameters_has_a_form_without_slices(size: int) -> None:
    shortcut = ZeroPadShortcut(3, 8)
    x = torch.randn(2, 3, size, size)
    assert torch.equal(shortcut.for_export()(x), shortcut(x))


def test_no_slice_with_steps_is_exported(network: nn.Module, program) -> None:
    """Ncnn has none, so that pnnx wrote what it cannot load; the network itself keeps its slices."""
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.avg_pool2d.default" in called and not any("slice" in name for name in called)
    assert sum(isinstance(module, ZeroPadShortcut) for module in network.modules()) == 2
    images = torch.randn(3, 3, SIZE, SIZE)
    assert torch.equal(program.module()(images), network(images))
