"""Networks for one image size are built for the images at hand; what foreign code raises becomes one line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prune_lab import models
from prune_lab.foundations.errors import UserError
from prune_lab.training.phases import layer_costs
from tests.helpers.models import build, node


def config_of(name: str, **changes):
    return models.parse_config(node("torchvision", name=name, **changes))


def refusal(name: str, image_size: int, **changes) -> str:
    with pytest.raises(UserError) as caught:
        layer_costs(config_of(name, **changes), num_classes=3, image_size=image_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_vision_transformer_is_built_for_the_images():
    model = build("torchvision", name="vit_b_32", num_classes=3, image_size=64, device="meta")
    assert model.encoder.pos_embedding.shape == (1, 5, 768)  # 2 x 2 patches of 32 px and the class token
    usual = build("torchvision", name="vit_b_32", num_classes=3, image_size=224, device="meta")
    assert usual.encoder.pos_embedding.shape == (1, 50, 768)
    assert layer_costs(config_of("vit_b_32"), num_classes=3, image_size=64)


@pytest.mark.parametrize(
    "name, image_size, message",
    [
        ("vit_b_32", 48, "Input shape indivisible by patch size!; its usual size is 224 x 224"),
        ("maxvit_t", 32, "Input size (8, 8) of block 0 is not divisible by partition size 7."),
        ("inception_v3", 16, "; its usual size is 299 x 299"),
    ],
)
def test_a_size_that_does_not_work_is_one_line(name, image_size, message):
    text = refusal(name, image_size)
    start = f"model.name={name} does not work with images of {image_size} x {image_size} px (dataset.image_size): "
    assert text.startswith(start) and message in text


def test_timm_networks_for_one_size():
    pytest.importorskip("timm")
    options = {"num_classes": 3, "image_size": 32, "device": "meta", "source": "timm"}
    assert build("torchvision", name="mixer_s32_224", **options).blocks[0].mlp_tokens.fc1.in_features == 1
    assert "eca_halonext26ts" in refusal("eca_halonext26ts", 36, source="timm")
    assert "usual size is 224 x 224" in refusal("maxvit_rmlp_pico_rw_256", 36, source="timm").replace("256", "224")


class Pair(nn.Module):
    """Returns two tensors in training, as networks with an auxiliary classifier do."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, images):
        scores = self.head(images.mean((2, 3)))
        return (scores, scores) if self.training else scores


class Silent(Pair):
    def forward(self, images):
        torch._assert(images.shape[-1] == 7, "")


def test_what_is_no_table_of_class_scores_is_refused():
    sizes = {"num_classes": 3, "image_size": 8}
    with pytest.raises(UserError, match="model.name=pair returns a tuple in training for 2 images, where"):
        models.check_training_pass(Pair().to("meta"), config_of("pair"), **sizes)
    with pytest.raises(UserError, match=r"a tensor of shape \(2, 3, 8, 5\) in training for 2 images, where \(2, 5\)"):
        models.check_training_pass(nn.Linear(8, 5).to("meta"), config_of("map"), num_classes=5, image_size=8)


def test_an_error_without_a_text_shows_its_place():
    with pytest.raises(UserError, match=r"model.name=silent does .*: AssertionError at: torch._assert\(images.shape"):
        models.check_training_pass(Silent().to("meta"), config_of("silent"), num_classes=3, image_size=8)
    assert torch.is_grad_enabled()
