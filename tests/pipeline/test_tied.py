"""Networks with shared modules and tied weights: saved once, tied again, through a whole run and its files."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_model as load_with_safetensors
from torch import nn

import prune_lab
from prune_lab import models
from prune_lab.commands.export.packed import load_packed, write_packed
from prune_lab.foundations import tied
from prune_lab.foundations.errors import UserError
from prune_lab.models import external
from prune_lab.pipeline.saved_model import load_model, save_model
from prune_lab.pruning.dynamic.hashed_convolution import HashedConv2d
from tests.helpers.runs import TINY, execute, run_dir, summary

SIZES = {"num_classes": 4, "image_size": 16}
OPTIONS = {"name": "tied", "weights": None, "width": 1.0, "source": "auto"}
DESCRIPTION = {"model": OPTIONS, **SIZES}
NAMES = {"conv2.weight": "conv1.weight", "norm2.weight": "norm1.weight", "norm2.bias": "norm1.bias",
         "norm2.running_mean": "norm1.running_mean", "norm2.running_var": "norm1.running_var",
         "norm2.num_batches_tracked": "norm1.num_batches_tracked"}  # fmt: skip


class Tied(nn.Module):
    """A module under two names, and one weight in two modules."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.conv2.weight = self.conv1.weight
        self.norm2 = self.norm1
        self.head = nn.Linear(8, 4)

    def forward(self, images):
        maps = self.norm1(self.conv1(self.stem(images))).relu()
        return self.head(self.norm2(self.conv2(maps)).relu().mean((2, 3)))


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The library has the network by its name."""
    monkeypatch.setattr(external, "build", lambda config, **sizes: Tied())


def assert_tied(model: nn.Module) -> None:
    assert model.norm2 is model.norm1 and model.conv2.weight is model.conv1.weight
    assert len(list(model.parameters())) == 7


def test_a_tensor_is_written_once_and_tied_again(tmp_path):
    model = Tied()
    model(torch.randn(8, 3, 16, 16))
    save_model(model, DESCRIPTION, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == NAMES
        assert sorted(file.keys()) == sorted(set(model.state_dict()) - set(NAMES))
    loaded, other = load_model(tmp_path), Tied()
    # Not strict: that function takes norm2.num_batches_tracked, which batch norm fills in itself, for unexpected.
    load_with_safetensors(other, tmp_path / "model.safetensors", strict=False)
    for network in (loaded, other):
        assert_tied(network)
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in network.state_dict().items())


def test_tensors_are_exchanged_in_every_place_and_put_back():
    model, other = Tied().eval(), Tied().eval()
    own = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    tensors, images = dict(other.named_parameters()) | dict(other.named_buffers()), torch.randn(8, 3, 16, 16)
    for _ in range(2):
        assert torch.equal(tied.call(model, tied.places(model), tensors, images), other(images))
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == own
    assert_tied(model)


@pytest.mark.parametrize("method", ["magnitude", "rigl", "synflow"])
def test_a_whole_run(tmp_path, method):
    """From the first phase over stored results and masks to the network on disk, which starts another run."""
    options = [option for option in TINY if not option.startswith("model")]
    options += ["model=torchvision", "model.name=tied", f"method={method}", "method.sparsity=0.5"]
    options += ["trainer.ema_decay=0.5", "trainer.checkpoint_interval_s=0.01"]
    options += {"rigl": ["method.interval=2"], "synflow": ["method.rounds=3"]}.get(method, [])
    assert execute(tmp_path / "run", *options) == 0
    model = prune_lab.load(run_dir(tmp_path / "run"))
    assert_tied(model)
    weights = [model.stem.weight, model.conv1.weight, model.head.weight]
    assert sum(int((weight == 0).sum()) for weight in weights) == sum(weight.numel() for weight in weights) // 2
    assert summary(tmp_path / "run")["params/total"] == sum(parameter.numel() for parameter in model.parameters())
    start = run_dir(tmp_path / "run") / "model.safetensors"
    assert execute(tmp_path / "next", *options, f"model.weights={start}") == 0


class Twice(Tied):
    """A convolution under two names."""

    def __init__(self):
        super().__init__()
        self.conv2 = self.conv1


def test_a_module_that_took_the_place_of_a_shared_one(tmp_path, monkeypatch):
    monkeypatch.setattr(external, "build", lambda config, **sizes: Twice())
    model = Twice()
    model.conv1 = model.conv2 = HashedConv2d.of(model.conv1, num_hyperplanes=4, zero_fraction=0.5, tile=4, seed=1)
    save_model(model, DESCRIPTION, tmp_path)
    loaded = load_model(tmp_path)
    assert isinstance(loaded.conv1, HashedConv2d) and loaded.conv2 is loaded.conv1
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_a_2_4_network(tmp_path):
    model = Tied()
    with torch.no_grad():
        model.conv1.weight[:, ::2] = 0
    write_packed(model, DESCRIPTION, tmp_path)
    loaded = load_packed(tmp_path)
    assert_tied(loaded)
    assert torch.equal(loaded.conv2.weight, model.conv1.weight)


def test_tensors_that_overlap_are_written_whole():
    values = torch.arange(6.0)
    tensors, names = tied.written({"all": values, "part": values[2:4], "again": values.view(6)})
    assert names == {"again": "all"}
    assert tensors["part"].tolist() == [2, 3] and tensors["all"].tolist() == [0, 1, 2, 3, 4, 5]
    assert tensors["part"].untyped_storage()._cdata != values.untyped_storage()._cdata


class Noted(Tied):
    def get_extra_state(self):
        return {"seen": 3}


def test_what_cannot_be_saved_is_refused_while_planning(tmp_path, monkeypatch):
    monkeypatch.setattr(external, "build", lambda config, **sizes: Noted())
    options = [option for option in TINY if not option.startswith("model")]
    with pytest.raises(UserError, match="model.name=noted cannot be saved as tensors: its state _extra_state is a d"):
        execute(tmp_path, *options, "model=torchvision", "model.name=noted", "method=dense")
    assert list(tmp_path.iterdir()) == []


def test_shared_modules_of_timm(monkeypatch, tmp_path):
    pytest.importorskip("timm")
    monkeypatch.undo()
    description = {"model": OPTIONS | {"name": "coat_lite_tiny", "source": "timm"}, "num_classes": 4, "image_size": 32}
    model = models.from_description(description)
    save_model(model, description, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.serial_blocks1[1].cpe is loaded.cpe1
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
