"""Start weights: accepted file forms, every refusal in one line, digest."""

from __future__ import annotations

import urllib.error

import pytest
import torch
from model_helpers import build, node
from safetensors.torch import save_file

from prune_lab import models
from prune_lab.models import weights
from prune_lab.schema import ConfigError


def resnet20(*, seed: int, num_classes: int = 10, **changes):
    torch.manual_seed(seed)
    return build("resnet20", num_classes=num_classes, image_size=32, **changes)


def config_of(path, group: str = "resnet20", **changes):
    return models.parse_config(node(group, weights=str(path), **changes))


def refusal(model, path, group: str = "resnet20", **changes) -> str:
    """Return the message of the refusal, after checking that it is one line and that nothing was loaded."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
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
        lambda state: prefixed(state, "module."),
        lambda state: {"state_dict": prefixed(state, "module._orig_mod."), "best_prec1": 90.0},
    ],
    ids=["plain", "state_dict", "model", "module", "compiled and wrapped"],
)
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
    with pytest.raises(ConfigError, match="no such file"):
        models.weights_digest(config_of(tmp_path / "none.pt"))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_damaged_file(tmp_path, suffix):
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(b"not weights at all")
    assert "cannot be read as weights" in refusal(resnet20(seed=0), path)


def test_pickled_module_is_not_executed(tmp_path):
    torch.save(resnet20(seed=0), tmp_path / "module.pt")
    assert "cannot be read as weights (UnpicklingError)" in refusal(resnet20(seed=0), tmp_path / "module.pt")


@pytest.mark.parametrize("content", [[1, 2], {}, {"accuracy": 90.0}, {"state_dict": {"a": 1}}])
def test_file_without_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    assert "holds no state dict" in refusal(resnet20(seed=0), tmp_path / "other.pt")


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
