"""Our MACs beside those of tools from outside; why others differ is in outputs/reference/outside_tools."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prune_lab.accounting.costs import dense_macs, profile, sparse_macs
from prune_lab.commands.export import formats
from prune_lab.models.resnet_cifar import ResNetCifar


def counted(call) -> int:
    """Return the MACs that torch's counter sees: it gives two for each."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2


def test_mobilenet_v3_is_what_torch_counts() -> None:
    model = torchvision.models.mobilenet_v3_small().eval()
    ours = dense_macs(profile(model, 224))
    assert ours == 56_510_400
    with torch.device("meta"):
        ghost = torchvision.models.mobilenet_v3_small().eval()
        assert counted(lambda: ghost(torch.randn(1, 3, 224, 224))) == ours


def test_mobilenet_v3_is_what_calflops_counts() -> None:
    calflops = pytest.importorskip("calflops", reason="calflops is not installed")
    quiet = {"print_results": False, "print_detailed": False, "output_as_string": False}
    model = torchvision.models.mobilenet_v3_small().eval()
    assert calflops.calculate_flops(model, input_shape=(1, 3, 224, 224), **quiet)[1] == 56_510_400


def test_mobilenet_v3_is_what_torch_kirigami_counts() -> None:
    measurement = pytest.importorskip("torch_kirigami.measurement", reason="torch-kirigami is not installed")
    model = torchvision.models.mobilenet_v3_small().eval()
    assert measurement.calculate_model_complexity(model, torch.randn(1, 3, 224, 224)).macs == 56_510_400


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_torch_counts_too_much_for_the_backward_pass_of_groups(groups: int) -> None:
    """A backward pass is twice the forward one; torch gives 1 + G times: it counts the weight's gradient ungrouped."""
    layer = nn.Conv2d(8, 8, 3, groups=groups, bias=False)
    images = torch.randn(1, 8, 6, 6, requires_grad=True)
    forward = counted(lambda: layer(images))
    assert forward == 8 * (8 // groups) * 9 * 4 * 4
    total = layer(images).sum()
    assert counted(total.backward) == (1 + groups) * forward


def test_torch_counts_no_attention_in_evaluation() -> None:
    """Its fused kernel is no operation that the counter knows; our count is of both modes."""
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(1, 5, 16)
    with torch.no_grad():
        trained = counted(lambda: attention.train()(x, x, x))
        assert counted(lambda: attention.eval()(x, x, x)) == 0
    assert trained == 5 * 4 * 16 * 16 + 2 * 5 * 5 * 16  # four products with weights, two of activations


def test_qonnx_counts_the_dense_and_the_masked_network(tmp_path: Path) -> None:
    cost = pytest.importorskip("qonnx.util.inference_cost", reason="qonnx is not installed")
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    torch.manual_seed(0)
    model = ResNetCifar(1, num_classes=4, width=0.25, shortcut="A").eval()
    costs = profile(model, 8)
    kept = {}
    with torch.no_grad():
        for entry in costs:
            weight = model.get_parameter(entry.parameter)
            weight.mul_(torch.rand_like(weight) > 0.8)
            kept[entry.parameter] = int(weight.count_nonzero())
    program = formats.trace(model, 8)
    formats.write("onnx", tmp_path, model=model, description={"image_size": 8}, program=program)
    found = {}
    for discount in (False, True):
        network = onnx.load(tmp_path / "model.onnx")
        network.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        wrapped = cost.ModelWrapper(network)
        found[discount] = cost.inference_cost(wrapped, discount_sparsity=discount)["total_cost"]["total_macs"]
    assert found == {False: dense_macs(costs), True: sparse_macs(costs, kept)}
