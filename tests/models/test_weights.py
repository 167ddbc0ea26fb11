"""Start weights: accepted file forms, every refusal in one line, digest."""

from __future__ import annotations

import argparse
import re
import sys
import types
import urllib.error
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

from prune_lab import models
from prune_lab.foundations.errors import UserError
from prune_lab.models import weights
from tests.helpers.models import build, node


def resnet20(*, seed: int, num_classes: int = 10, **changes):
    torch.manual_seed(seed)
    return build("resnet20", num_classes=num_classes, image_size=32, **changes)


def config_of(path, group: str = "resnet20", **changes):
    return models.parse_config(node(group, weights=str(path), **changes))


def refusal(model, path, group: str = "resnet20", **changes) -> str:
    """Return the message of the refusal, after checking that it is one line and that nothing was loaded."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        models.load_weights(model, config_of(path, group, **changes))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    message = str(caught.value)
    assert "\n" not in message and message.startswith("model.weights=")
    return message


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {"net": state, "acc": 90.0},
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {0: {"step": torch.ones(())}}}},
        lambda state: {"model_ema": state},
        lambda state: {"ema": {"module": state, "updates": 3}},
        lambda state: prefixed(state, "module."),
        lambda state: {"state_dict": prefixed(state, "module._orig_mod."), "best_prec1": 90.0},
        lambda state: {"state_dict": prefixed(state, "net.") | {"criterion.weight": torch.ones(10)}},
        lambda state: {"state_dict": prefixed(state, "model._orig_mod."), "pytorch-lightning_version": "2.5"},
        lambda state: {key.replace("conv1.", "_orig_mod.conv1."): value for key, value in state.items()},
        lambda state: {"n_averaged": torch.tensor(7)} | prefixed(state, "module."),
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1, out=Path("runs")), "best": numpy.float64(9)},
        lambda state: {"model": state, "losses": numpy.arange(3.0), "epoch": numpy.int64(3)},
    ],
    ids=["plain", "state_dict", "model", "net", "model_state_dict", "model_ema", "ema", "module",
         "compiled and wrapped", "Lightning", "Lightning, compiled", "compiled in part", "averaged", "arguments",
         "arrays"],
)  # fmt: skip
def test_accepted_forms(tmp_path, wrap):
    source, target = resnet20(seed=0), resnet20(seed=1)
    torch.save(wrap(source.state_dict()), tmp_path / "weights.pt")
    models.load_weights(target, config_of(tmp_path / "weights.pt"))
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in target.state_dict().items())


def test_safetensors(tmp_path):
    source, target = resnet20(seed=0), resnet20(seed=1)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    models.load_weights(target, config_of(tmp_path / "weights.safetensors"))
    assert torch.equal(target.conv1.weight, source.conv1.weight)


def test_old_files_without_batch_counters(tmp_path):
    source, target = resnet20(seed=0), resnet20(seed=1)
    state = {key: value for key, value in source.state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "old.pt")
    models.load_weights(target, config_of(tmp_path / "old.pt"))
    assert torch.equal(target.linear.weight, source.linear.weight)


def test_null_changes_nothing():
    model = resnet20(seed=0)
    models.load_weights(model, models.parse_config(node("resnet20")))
    assert torch.equal(model.conv1.weight, resnet20(seed=0).conv1.weight)


def test_missing_file(tmp_path):
    message = refusal(resnet20(seed=0), tmp_path / "none.pt")
    assert "none.pt: no such file (allowed: null, torchvision, or a weights file)" in message
    with pytest.raises(UserError, match="no such file"):
        models.weights_digest(config_of(tmp_path / "none.pt"))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_damaged_file(tmp_path, suffix):
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(b"not weights at all")
    assert "cannot be read as weights" in refusal(resnet20(seed=0), path)


def test_pickled_module_is_not_executed(tmp_path):
    torch.save(resnet20(seed=0), tmp_path / "module.pt")
    message = refusal(resnet20(seed=0), tmp_path / "module.pt")
    assert "cannot be read as weights (UnpicklingError): it holds objects of " in message
    assert "prune_lab.models.resnet_cifar." in message and "state_dict() alone" in message


@pytest.mark.parametrize(
    "content, found",
    [([1, 2], "a list"), ({}, "nothing"), ({"accuracy": 90.0}, "accuracy (float)"),
     ({"state_dict": {"a": 1}}, "state_dict (dict)")],
)  # fmt: skip
def test_file_without_state_dict(tmp_path, content, found):
    torch.save(content, tmp_path / "other.pt")
    message = refusal(resnet20(seed=0), tmp_path / "other.pt")
    assert message.endswith(f"holds no state dict, names with tensors; found: {found}")


def test_weights_are_preferred_to_their_average_and_this_is_said(tmp_path):
    source, average, target = resnet20(seed=0), resnet20(seed=2), resnet20(seed=1)
    torch.save({"state_dict_ema": average.state_dict(), "state_dict": source.state_dict()}, tmp_path / "both.pt")
    (line,) = models.load_weights(target, config_of(tmp_path / "both.pt"))
    assert torch.equal(target.conv1.weight, source.conv1.weight)
    assert line.startswith("start weights: 'state_dict' is taken; 'state_dict_ema', a running average, fits as well")


def test_two_networks_in_one_file_are_told_apart_by_nobody(tmp_path):
    states = prefixed(resnet20(seed=0).state_dict(), "student.") | prefixed(resnet20(seed=2).state_dict(), "teacher.")
    torch.save({"state_dict": states}, tmp_path / "pair.pt")
    message = refusal(resnet20(seed=1), tmp_path / "pair.pt")
    assert "holds 2 sets of weights that fit and differ: 'student.*' of 'state_dict', 'teacher.*' of" in message
    same = resnet20(seed=0).state_dict()
    torch.save({"net": same, "model": dict(same)}, tmp_path / "twice.pt")
    assert models.load_weights(resnet20(seed=1), config_of(tmp_path / "twice.pt")) == []


@pytest.mark.parametrize("kind", ["torch.nn.utils.prune", "parametrization"])
def test_masks_beside_weights_are_applied(tmp_path, kind):
    source, target = resnet20(seed=0), resnet20(seed=1)
    weight = source.layer1[0].conv1.weight.detach().clone()
    mask = (torch.arange(weight.numel()) % 3 == 0).view_as(weight)
    if kind == "parametrization":
        masked = nn.Module()
        masked.register_buffer("mask", mask)
        masked.forward = lambda weight: weight * masked.mask
        nn.utils.parametrize.register_parametrization(source.layer1[0].conv1, "weight", masked)
        assert "layer1.0.conv1.parametrizations.weight.0.mask" in source.state_dict()
    else:
        prune.custom_from_mask(source.layer1[0].conv1, "weight", mask.float())
        assert "layer1.0.conv1.weight_orig" in source.state_dict()
    torch.save({"net": source.state_dict()}, tmp_path / "masked.pt")
    models.load_weights(target, config_of(tmp_path / "masked.pt"))
    loaded = target.layer1[0].conv1.weight
    assert torch.equal(loaded, torch.where(mask, weight, 0)) and not torch.signbit(loaded[~mask]).any()
    assert torch.equal(target.conv1.weight, source.conv1.weight)


def test_weights_stored_as_their_nonzero_values_are_loaded(tmp_path):
    source, target = resnet20(seed=0), resnet20(seed=1)
    source.linear.weight.detach()[:, ::2] = 0
    state = source.state_dict()
    state["conv1.weight"] = state["conv1.weight"].to_sparse()
    state["linear.weight"] = state["linear.weight"].to_sparse_csr()
    torch.save({"net": state}, tmp_path / "sparse.pt")
    models.load_weights(target, config_of(tmp_path / "sparse.pt"))
    assert torch.equal(target.conv1.weight, source.conv1.weight)
    assert torch.equal(target.linear.weight, source.linear.weight)


@pytest.mark.parametrize(
    "change, held",
    [
        (lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8), "qint8"),
        (lambda weight: weight.to(torch.int8), "int8"),
        (lambda weight: weight.to(torch.complex64), "complex64"),
    ],
)
def test_values_that_are_no_weights_are_refused_by_name(tmp_path, change, held):
    state = resnet20(seed=0).state_dict()
    state["conv1.weight"] = change(state["conv1.weight"])
    torch.save(state, tmp_path / "codes.pt")
    assert refusal(resnet20(seed=1), tmp_path / "codes.pt").endswith(
        f"codes.pt cannot be a start: conv1.weight holds {held}, not floating-point numbers"
    )


def test_floats_of_8_bits_are_loaded(tmp_path):
    source, target = resnet20(seed=0), resnet20(seed=1)
    state = source.state_dict()
    small = state["conv1.weight"] = state["conv1.weight"].to(torch.float8_e4m3fn)
    torch.save(state, tmp_path / "small.pt")
    models.load_weights(target, config_of(tmp_path / "small.pt"))
    assert torch.equal(target.conv1.weight, small.float())
    state["conv1.weight"] = torch.full((16, 3, 3, 3), float("nan")).to(torch.float8_e4m3fn)
    torch.save(state, tmp_path / "nan.pt")
    assert "432 of 432 values of conv1.weight are NaN" in refusal(resnet20(seed=1), tmp_path / "nan.pt")


@pytest.mark.parametrize(
    "apply", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, nn.utils.weight_norm,
              nn.utils.spectral_norm]
)  # fmt: skip
def test_weights_that_are_computed_from_others_are_called_so(tmp_path, apply):
    source = resnet20(seed=0)
    apply(source.layer1[0].conv1)
    torch.save(source.state_dict(), tmp_path / "norm.pt")
    message = refusal(resnet20(seed=1), tmp_path / "norm.pt")
    assert "1 missing (layer1.0.conv1.weight)" in message
    assert "weight is computed from (weight norm, spectral norm, parametrizations); remove them" in message


@pytest.mark.parametrize("name", ["pathlib.WindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath"])
def test_paths_of_other_systems_beside_the_weights(tmp_path, name):
    class Elsewhere:
        """Pickled as a path of another system or Python is."""

        def __reduce__(self):
            return (Elsewhere, ("runs", "a"))

    module, _, Elsewhere.__qualname__ = name.rpartition(".")
    Elsewhere.__module__, Elsewhere.__name__ = module, Elsewhere.__qualname__
    source, target = resnet20(seed=0), resnet20(seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module, types.SimpleNamespace(**{Elsewhere.__name__: Elsewhere}))
        torch.save({"model": source.state_dict(), "out": Elsewhere()}, tmp_path / "paths.pt")
    models.load_weights(target, config_of(tmp_path / "paths.pt"))
    assert torch.equal(target.conv1.weight, source.conv1.weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(tmp_path, value):
    state = resnet20(seed=0).state_dict()
    state["layer2.0.bn1.running_var"][3] = value
    torch.save({"net": prefixed(state, "module.")}, tmp_path / "nan.pt")
    assert refusal(resnet20(seed=1), tmp_path / "nan.pt").endswith(
        "nan.pt cannot be a start: 1 of 32 values of module.layer2.0.bn1.running_var are NaN or infinite"
    )


def _old_names(key: str) -> str:
    """Return the name that torchvision's official files, or their older versions, have for a tensor."""
    key = re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", key)
    return re.sub(r"(encoder_layer_\d+\.mlp\.)(0|3)\.", lambda m: f"{m[1]}linear_{1 if m[2] == '0' else 2}.", key)


def check_old_names(name: str) -> bool:
    """Check that old names, also behind a prefix, lead to the right tensors; return whether there are any.

    Auxiliary heads have no place.
    """
    model = models.build_on_meta(config_of("torchvision", "torchvision", name=name), num_classes=1000, image_size=224)
    state = model.state_dict()
    old = {_old_names(key): value for key, value in state.items()}
    aux = {"aux1.fc1.weight": torch.ones(2, device="meta"), "AuxLogits.fc.bias": torch.ones(2, device="meta")}
    found, notes = weights.choose(model, {"state_dict": prefixed(old | aux, "model._orig_mod.")}, auxiliary=True)
    assert notes == [] and found.tensors.keys() == state.keys(), name
    storages = [(value.untyped_storage()._cdata, found.tensors[key].untyped_storage()._cdata)
                for key, value in state.items()]  # fmt: skip
    assert all(mine == theirs for mine, theirs in storages), name
    return old.keys() != state.keys()


@pytest.mark.parametrize(
    "name, has_old_names",
    [("densenet121", True), ("vit_b_16", True), ("googlenet", False), ("mnasnet0_5", False), ("squeezenet1_1", False)],
)
def test_old_names_of_torchvision_classifiers(name, has_old_names):
    assert check_old_names(name) == has_old_names


@pytest.mark.slow
def test_old_names_of_all_torchvision_classifiers():
    import torchvision

    renamed = [name for name in torchvision.models.list_models(module=torchvision.models) if check_old_names(name)]
    assert {name[:3] for name in renamed} == {"den", "vit"} and len(renamed) == 9


def test_other_architecture(tmp_path):
    torch.save(resnet20(seed=0, shortcut="B").state_dict(), tmp_path / "b.pt")
    message = refusal(resnet20(seed=0), tmp_path / "b.pt")
    assert "does not fit model resnet20: 12 unexpected (layer2.0.shortcut.0.weight, " in message
    assert ", ...)" in message


def test_missing_keys(tmp_path):
    state = resnet20(seed=0).state_dict()
    del state["linear.bias"], state["conv1.weight"]
    torch.save(state, tmp_path / "part.pt")
    assert refusal(resnet20(seed=0), tmp_path / "part.pt").endswith("2 missing (conv1.weight, linear.bias)")


def test_other_number_of_classes(tmp_path):
    torch.save(resnet20(seed=0, num_classes=100).state_dict(), tmp_path / "c100.pt")
    assert refusal(resnet20(seed=0), tmp_path / "c100.pt").endswith(
        "2 of another shape (linear.weight file 100x64 model 10x64, linear.bias file 100 model 10); "
        "the file was trained for another number of classes"
    )


def test_other_width(tmp_path):
    torch.save(resnet20(seed=0, width=0.5).state_dict(), tmp_path / "half.pt")
    message = refusal(resnet20(seed=0), tmp_path / "half.pt")
    assert "of another shape (conv1.weight file 8x3x3x3 model 16x3x3x3, " in message
    assert "classes" not in message


def test_no_official_weights():
    message = refusal(resnet20(seed=0), "torchvision")
    assert "torchvision has no weights for resnet20; give null or a file" in message
    model = build("torchvision", name="resnet18", num_classes=2, image_size=32)
    assert "has no weights for nonsense" in refusal(model, "torchvision", "torchvision", name="nonsense")


def test_official_weights_out_of_reach(tmp_path, monkeypatch):
    def unreachable(request, timeout):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(weights.urllib.request, "urlopen", unreachable)
    model = build("resnet18", num_classes=1000, image_size=224)
    message = refusal(model, "torchvision", "resnet18")
    assert f"resnet18-f37072fd.pth is not in {tmp_path / 'checkpoints'} and cannot be downloaded" in message


@pytest.mark.parametrize(
    "group, changes, file",
    [
        ("resnet50", {}, "resnet50-0676ba61.pth"),
        ("vgg16", {}, "vgg16_bn-6c64b313.pth"),
        ("torchvision", {"name": "vgg16"}, "vgg16-397923af.pth"),
        ("mobilenet_v2", {}, "mobilenet_v2-b0353104.pth"),
    ],
)
def test_official_weights_from_the_cache(tmp_path, monkeypatch, group, changes, file):
    """The file of the original recipe is taken where it lies; no network is asked."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / file).touch()
    path = weights.official_file(config_of("torchvision", group, **changes))
    assert path == tmp_path / "checkpoints" / file


def test_official_auxiliary_classifiers_are_left_out(tmp_path, monkeypatch):
    import torchvision

    source = torchvision.models.googlenet(init_weights=False)
    torch.save(source.state_dict(), tmp_path / "googlenet.pth")
    monkeypatch.setattr(weights, "official_file", lambda config: tmp_path / "googlenet.pth")
    config = config_of("torchvision", "torchvision", name="googlenet")
    model = models.build(config, num_classes=1000, image_size=224)
    models.load_weights(model, config)
    assert model.transform_input and torch.equal(model.fc.weight, source.fc.weight)


def test_digest_follows_the_content(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"abc")
    (tmp_path / "b.pt").write_bytes(b"abc")
    (tmp_path / "c.pt").write_bytes(b"abd")
    digest = models.weights_digest(config_of(tmp_path / "a.pt"))
    assert digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert models.weights_digest(config_of(tmp_path / "b.pt")) == digest
    assert models.weights_digest(config_of(tmp_path / "c.pt")) != digest


def test_digest_of_names():
    assert models.weights_digest(models.parse_config(node("resnet20"))) is None
    own = models.weights_digest(config_of("torchvision", "vgg16"))
    external = models.weights_digest(config_of("torchvision", "torchvision", name="vgg16"))
    assert len({own, external, models.weights_digest(config_of("torchvision", "vgg19"))}) == 3
