"""prune-lab export of 2:4 networks: the packed file, what is refused, and layers for a GPU's kernels."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import prune_lab
from prune_lab.commands.export import command, packed, table, tensor_cores, timing
from prune_lab.commands.export.formats import NotExportable
from prune_lab.foundations.errors import UserError
from prune_lab.pruning.masks.semi_structured import keep_top
from tests.helpers.method_runs import configure, finish


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished 2:4 run, which tests only read."""
    folder = tmp_path_factory.mktemp("halved")
    return finish(configure(folder, "static", "method.distribution=2:4", "method.sparsity=0.5"))


@pytest.fixture(autouse=True)
def flushed():
    """Undo the arithmetic setting of an export."""
    yield
    torch.set_flush_denormal(False)


def export(run: Path, out: Path, *arguments: str) -> dict:
    assert command.main([str(run), "--out", str(out), "--format", "semi_structured", "--threads", "1", *arguments]) == 0
    return json.loads((out / "export.json").read_text())


def halve(*layers: nn.Module) -> None:
    """Make weights 2:4 by magnitude."""
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(keep_top(layer.weight.abs(), layer.weight.numel() // 2))


# The file


def test_the_packed_file_is_the_network_in_less_space(run: Path, tmp_path: Path) -> None:
    record = export(run, tmp_path, "--no-latency")
    entry = record["formats"]["semi_structured"]
    assert entry["checks"][0]["max_difference"] == 0 and entry["checks"][0]["accepted"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export.json", "model_2_4.safetensors"]
    ours, theirs = packed.load_packed(tmp_path).state_dict(), prune_lab.load(run).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(packed.layers_2_4(prune_lab.load(run))) == 19  # of 20: the images have three channels
    # Four bytes a weight become two and a quarter of one: 7/16 of the packed weights are saved.
    saved = entry["size"]["dense"]["bytes"] - entry["size"]["pruned"]["bytes"]
    weights = sum(4 * value.numel() for name, value in theirs.items() if value.ndim in (2, 4) and value.shape[1] != 3)
    assert saved == pytest.approx(7 / 16 * weights, abs=6000)  # two names for one in the file's head


def test_it_is_written_only_if_it_is_asked_for(run: Path, tmp_path: Path) -> None:
    assert command.main([str(run), "--out", str(tmp_path), "--format", "safetensors", "--no-latency"]) == 0
    assert "semi_structured" not in command.catalog.choose(None)[0]
    assert "semi_structured" not in json.loads((tmp_path / "export.json").read_text())["left_out"]


def test_without_a_gpu_a_line_says_why_the_kernels_are_left_out(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    record = export(run, tmp_path, "--batch", "1", "--repeats", "8")
    said = capsys.readouterr().out
    line = "2:4 kernels are left out: they need a CUDA device of compute capability 8.0 or above, and PyTorch finds no"
    assert said.count(line) == 1
    assert record["latency"]["kernels"] == []


def test_an_older_gpu_is_named(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert tensor_cores.left_out().endswith("and Some GPU has 7.5")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert tensor_cores.left_out() is None


def test_another_network_is_refused_by_a_layer_s_name(tmp_path: Path) -> None:
    run = finish(configure(tmp_path / "runs", "static", "method.sparsity=0.7"))
    with pytest.raises(UserError, match=r"the network is not 2:4: layer\S+ has groups of four") as e:
        export(run, tmp_path / "out", "--no-latency")
    assert "\n" not in str(e.value)
    assert not list((tmp_path / "out").glob("model*"))


def test_layers_that_were_kept_dense_do_not_matter() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 16, 1), nn.Flatten(), nn.Linear(16, 6))
    with pytest.raises(NotExportable, match="not 2:4: 1 has groups"):
        packed.check(model)
    halve(model[1], model[4])
    packed.check(model)
    assert packed.layers_2_4(model) == ["1", "4"]
    with torch.no_grad():
        model[2].weight[:, 2:] = 0  # three in four are zero, the first two channels of each output stay: 2:4 as well
        packed.check(model)
        model[2].weight[:, 2] = 1
    with pytest.raises(NotExportable, match="not 2:4: 2 has groups"):
        packed.check(model)
    with pytest.raises(NotExportable, match="no layer has a multiple of four input channels"):
        packed.check(model[:1])


# Layers for kernels


@pytest.fixture
def dense_kernels(monkeypatch):
    """Stand-ins for the device and its kernels: weights stay as they are, so that layouts can be checked."""
    monkeypatch.setattr(tensor_cores, "to_sparse_semi_structured", lambda weight: weight)
    monkeypatch.setattr(tensor_cores, "on_device", copy.deepcopy)
    monkeypatch.setattr(tensor_cores, "images_on_device", lambda images: images)
    monkeypatch.setattr(tensor_cores, "finished", lambda call: call)
    monkeypatch.setattr(tensor_cores, "device_name", lambda: "Some GPU")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_layer_as_a_product_over_channels_computes_the_same(bias: bool, memory_format, dense_kernels) -> None:
    conv, linear = nn.Conv2d(8, 12, 1, bias=bias), nn.Linear(8, 12, bias=bias)
    x = torch.randn(3, 8, 5, 4).contiguous(memory_format=memory_format)
    with torch.no_grad():
        torch.testing.assert_close(tensor_cores.SemiStructuredLayer(conv)(x), conv(x))
        for rows in (torch.randn(7, 8), torch.randn(2, 3, 8)):
            torch.testing.assert_close(tensor_cores.SemiStructuredLayer(linear)(rows), linear(rows))


def test_kinds_of_layers_that_kernels_take() -> None:
    halved = [nn.Linear(64, 32), nn.Conv2d(64, 32, 1), nn.Linear(64, 48), nn.Linear(96, 32), nn.Conv2d(64, 32, 3),
              nn.Conv2d(64, 32, 1, stride=2), nn.Conv2d(64, 32, 1, padding=1), nn.Conv2d(128, 32, 1, groups=2)]
    halve(*halved)
    assert [tensor_cores.can_use_kernels(layer) for layer in halved] == [True, True, *[False] * 6]
    assert not tensor_cores.can_use_kernels(nn.Linear(64, 32)) and not tensor_cores.can_use_kernels(nn.ReLU())


@pytest.mark.parametrize("layers", [["linear"], []])
def test_kernels_are_timed_beside_the_same_network(layers: list[str], run: Path, dense_kernels, monkeypatch) -> None:
    asked = {}

    def faster_layers(model: nn.Module, images: torch.Tensor, **options) -> list[str]:
        asked.update(options)
        return layers if options else []

    monkeypatch.setattr(timing.sparse, "faster_layers", faster_layers)
    network = timing.Timed(prune_lab.load(run), run)
    setting = timing.Setting([2], 8, 1, 16, {"fp32": 1e-4, "bf16": 0.05})
    report = {"try_sparse": False, "try_kernels": True, "report": lambda line: None}
    found = timing.measure({"dense": network, "pruned": network}, [], setting, **report)
    assert asked["make"] is tensor_cores.SemiStructuredLayer and asked["can_be"] is tensor_cores.can_use_kernels
    assert found["kernels"] == [{"batch": 2, "layers": layers, "device": "Some GPU"}]
    titles = [row["runtime"] for row in found["rows"]]
    assert titles == ["PyTorch", *[tensor_cores.TITLE] * len(layers)]
    (line,) = table.kernel_lines(found["kernels"])
    assert line == "2:4 kernels on Some GPU, batch 2: " + (
        "used in 1 layers (export.json)" if layers else "not faster; not used"
    )
    assert (tensor_cores.TITLE in table.latency_table(found["rows"])) == bool(layers)


def test_wrong_kernels_are_not_used(run: Path, dense_kernels, monkeypatch) -> None:
    monkeypatch.setattr(tensor_cores, "to_sparse_semi_structured", lambda weight: 2 * weight)
    monkeypatch.setattr(timing.sparse, "faster_layers", lambda model, images, **options: ["linear"])
    setting = timing.Setting([2], 8, 1, 16, {"fp32": 1e-4, "bf16": 0.05})
    assert timing._kernels(prune_lab.load(run), torch.randn(2, 3, 16, 16), setting) == ([], [])


@pytest.mark.gpu
def test_kernels_compute_what_the_dense_layer_does() -> None:
    if tensor_cores.left_out() is not None:
        pytest.skip(tensor_cores.left_out())
    model = nn.Sequential(nn.Conv2d(64, 128, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128 * 16, 64))
    halve(model[0], model[3])
    dense = tensor_cores.on_device(model)
    images = tensor_cores.images_on_device(torch.randn(8, 64, 4, 4))
    changed = timing.sparse.replaced(dense, ["0", "3"], tensor_cores.SemiStructuredLayer)
    with torch.inference_mode():
        wanted, found = dense(images).float(), changed(images).float()
    assert float((found - wanted).abs().max()) <= 0.02 * float(wanted.abs().max())
