"""Options of the models: YAML against dataclasses, rejections, no torch before a network is built."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest

from prune_lab import models
from prune_lab.foundations.errors import UserError
from tests.helpers.models import REPO, build, node

GROUPS = sorted(path.stem for path in (REPO / "conf" / "model").glob("*.yaml"))


def test_one_yaml_per_model():
    assert sorted([*models.names(), "torchvision"]) == GROUPS


@pytest.mark.parametrize("group", GROUPS)
def test_yaml_holds_every_field_with_a_comment(group):
    options = node(group, **({"name": "resnext50_32x4d"} if group == "torchvision" else {}))
    config = models.parse_config(options)
    assert sorted(options) == sorted(field.name for field in fields(config))
    lines = (REPO / "conf" / "model" / f"{group}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")
    assert all("  # " in line for line in lines[1:])
    if group != "torchvision":
        assert config.name == group


@pytest.mark.parametrize(
    "group, changes, message",
    [
        ("resnet20", {"name": "resnet111"}, "model.name=resnet111 is not a model (did you mean 'resnet110'?)"),
        ("resnet20", {"shortcut": "C"}, "model.shortcut=C is not allowed; allowed: A, B"),
        ("resnet20", {"width": 0}, "model.width must lie in (0, inf), got 0"),
        ("resnet20", {"wdith": 1.0}, "unknown option model.wdith (did you mean 'width'?)"),
        ("resnet20", {"weights": 3}, "model.weights must be a text, got 3"),
        ("vgg16", {"head": "double"}, "model.head=double is not allowed"),
        ("vgg16", {"conv_bias": "yes"}, "model.conv_bias must be true or false, got yes"),
        ("mobilenet_v2", {"stem_stride": 3}, "model.stem_stride=3 is not allowed; allowed: auto, 1, 2"),
        ("wrn_28_10", {"dropout": 1.0}, "model.dropout must lie in [0, 1), got 1.0"),
        ("torchvision", {}, "model.name is missing"),
        ("torchvision", {"name": "vgg11", "width": 0.5}, "model.width must be 1.0 for model=torchvision, got 0.5"),
    ],
)
def test_rejected_options(group, changes, message):
    with pytest.raises(UserError) as caught:
        models.parse_config(node(group, **changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_option_is_named():
    options = node("resnet20")
    del options["width"]
    with pytest.raises(UserError, match="missing option model.width"):
        models.parse_config(options)


def test_unknown_classifier_names_the_nearest():
    with pytest.raises(UserError, match="resnext5 is not a torchvision classifier .nearest: resnet50, "):
        build("torchvision", name="resnext5", source="torchvision", num_classes=10, image_size=32)


@pytest.mark.parametrize("source", ["auto", "timm"])
def test_missing_timm_names_the_package(monkeypatch, source):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        build("torchvision", name="convnextv2_atto", source=source, num_classes=10, image_size=32)


def test_timm_classifier_by_name():
    pytest.importorskip("timm")
    model = build("torchvision", name="resnet10t", num_classes=10, image_size=32)
    assert model.num_classes == 10
    with pytest.raises(UserError, match="resnet10tt is not a timm classifier .nearest: resnet10t"):
        build("torchvision", name="resnet10tt", source="timm", num_classes=10, image_size=32)


def _run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)


def test_options_need_no_torch(tmp_path):
    """Options, description and digest of the weights are ready before torch is imported."""
    file = tmp_path / "weights.pt"
    file.write_bytes(b"any content")
    _run(
        "import sys\n"
        "from prune_lab import models\n"
        f"node = {node('resnet20', weights=str(file))!r}\n"
        "config = models.parse_config(node)\n"
        "models.describe(config, 10, 32), models.weights_digest(config), models.names()\n"
        "assert 'torch' not in sys.modules and 'torchvision' not in sys.modules\n"
    )


def test_own_models_need_no_torchvision():
    _run(
        "import sys\n"
        "from prune_lab import models\n"
        f"for node in {[node(name, width=0.1) for name in ('resnet20', 'resnet18', 'vgg16', 'wrn_16_8')]!r}:\n"
        "    models.build(models.parse_config(node), num_classes=10, image_size=32)\n"
        "assert 'torch' in sys.modules and 'torchvision' not in sys.modules\n"
    )
