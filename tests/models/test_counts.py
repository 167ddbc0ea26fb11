"""Parameters and MACs of every model against published and hand-checked totals."""

from __future__ import annotations

import pytest

from tests.helpers.models import build, count_macs, count_parameters, count_weights

# Model, changed options, classes, image px, parameters, MACs (None: not published in this form).
SMALL_IMAGES = [
    ("resnet20", {}, 10, 32, 269_722, 40_551_040),
    ("resnet32", {}, 10, 32, 464_154, 68_862_592),
    ("resnet44", {}, 10, 32, 658_586, 97_174_144),
    ("resnet56", {}, 10, 32, 853_018, 125_485_696),
    ("resnet110", {}, 10, 32, 1_727_962, 252_887_680),
    ("resnet20", {"shortcut": "B"}, 10, 32, 269_722 + 2_752, 40_551_040 + 262_144),
    ("resnet32", {"shortcut": "B"}, 10, 32, 464_154 + 2_752, 68_862_592 + 262_144),
    ("resnet44", {"shortcut": "B"}, 10, 32, 658_586 + 2_752, 97_174_144 + 262_144),
    ("resnet56", {"shortcut": "B"}, 10, 32, 855_770, 125_747_840),
    ("resnet110", {"shortcut": "B"}, 10, 32, 1_730_714, 253_149_824),
    ("resnet110", {}, 100, 32, 1_733_812, 252_893_440),
    ("resnet110", {"shortcut": "B"}, 100, 32, 1_736_564, 253_155_584),
    ("resnet18", {}, 10, 32, 11_173_962, 555_422_720),
    ("resnet50", {}, 10, 32, 23_520_842, 1_297_829_888),
    ("vgg16", {}, 10, 32, 14_724_042, 313_201_664),
    ("vgg16", {"conv_bias": True}, 10, 32, 14_728_266, 313_201_664),
    ("vgg16", {"conv_bias": True, "head": "hidden"}, 10, 32, 14_991_946, 313_463_808),
    ("vgg16", {}, 100, 32, 14_770_212, 313_247_744),
    ("vgg19", {}, 10, 32, None, 398_136_320),
    ("mobilenet_v2", {"stem_stride": 2}, 10, 32, 2_236_682, 6_124_928),
    ("mobilenet_v2", {}, 10, 32, 2_236_682, 24_461_312),
    ("mobilenet_v3_small", {"stem_stride": 2}, 10, 32, None, 2_169_792),
    ("mobilenet_v3_small", {}, 10, 32, None, 5_502_720),
    ("mobilenet_v3_large", {"stem_stride": 2}, 10, 32, None, 7_087_040),
    ("mobilenet_v3_large", {}, 10, 32, None, 20_101_760),
    ("wrn_22_2", {}, 10, 32, None, 157_730_048),
    ("wrn_28_10", {}, 10, 32, 36_479_194, None),
    ("wrn_28_10", {}, 100, 32, 36_536_884, None),
]
LARGE_IMAGES = [
    ("resnet18", {}, 1000, 224, 11_689_512, 1_814_073_344),
    ("resnet34", {}, 1000, 224, 21_797_672, 3_663_761_408),
    ("resnet50", {}, 1000, 224, 25_557_032, 4_089_184_256),
    ("vgg16", {}, 1000, 224, 138_365_992, 15_470_264_320),
    ("torchvision", {"name": "vgg16"}, 1000, 224, 138_357_544, 15_470_264_320),
    ("mobilenet_v2", {}, 1000, 224, 3_504_872, 300_774_272),
    ("mobilenet_v3_small", {}, 1000, 224, 2_542_856, 56_510_400),
    ("mobilenet_v3_large", {}, 1000, 224, 5_483_032, 216_589_760),
]


@pytest.mark.parametrize("group, changes, num_classes, image_size, num_parameters, macs", SMALL_IMAGES + LARGE_IMAGES)
def test_totals(group, changes, num_classes, image_size, num_parameters, macs):
    model = build(group, num_classes=num_classes, image_size=image_size, device="meta", **changes)
    if num_parameters is not None:
        assert count_parameters(model) == num_parameters
    if macs is not None:
        assert count_macs(model, image_size) == macs


def test_torchvision_classifier_in_published_digits():
    """WRN-50-2 has 11398.02 million MACs."""
    model = build("torchvision", name="wide_resnet50_2", num_classes=1000, image_size=224, device="meta")
    assert round(count_macs(model, 224) / 1e6, 2) == 11398.02


@pytest.mark.parametrize(
    "group, num_classes, num_weights",
    [
        ("wrn_22_2", 10, 1_076_912),
        ("resnet110", 10, 1_719_856),
        ("resnet50", 100, 23_652_032),
        ("vgg19", 10, 20_024_000),
        ("vgg19", 100, 20_070_080),
        ("vgg19", 200, 20_121_280),
    ],
)
def test_weights_that_can_be_masked(group, num_classes, num_weights):
    """Sources: RigL reproduction (WRN-22-2, ResNet-50 and 110), GraSP's VGG19; 200 classes are Tiny ImageNet."""
    image_size = 64 if num_classes == 200 else 32
    assert count_weights(build(group, num_classes=num_classes, image_size=image_size, device="meta")) == num_weights


def test_wrn_16_8_by_hand():
    """Stem, per stage a projection and 3 more 3x3 convolutions of the stage's width; BN has 2 values per channel."""
    stages = [(16, 128), (128, 256), (256, 512)]
    convs = 3 * 16 * 9 + sum(9 * a * b + 3 * 9 * b * b + a * b for a, b in stages)
    norms = 2 * (sum(a + 3 * b for a, b in stages) + 512)
    model = build("wrn_16_8", num_classes=10, image_size=32, device="meta")
    assert count_parameters(model) == convs + norms + 512 * 10 + 10


def test_resnet_stem_changes_at_65_px():
    assert build("resnet18", num_classes=10, image_size=64, device="meta").conv1.stride == (1, 1)
    assert build("resnet18", num_classes=10, image_size=65, device="meta").conv1.stride == (2, 2)


def test_vgg_head_changes_at_65_px():
    assert count_parameters(build("vgg16", num_classes=10, image_size=64, device="meta")) == 14_724_042
    large = build("vgg16", num_classes=10, image_size=65, device="meta")
    assert count_parameters(large) == 138_365_992 - 990 * 4097


def test_width_scales_every_channel_count():
    """ResNet-20 at width 0.5 has 8/16/32 channels; a width that rounds to 0 channels leaves 1."""
    model = build("resnet20", num_classes=10, image_size=32, width=0.5)
    assert [model.conv1.out_channels, model.layer2[0].conv1.out_channels, model.linear.in_features] == [8, 16, 32]
    tiny = build("resnet20", num_classes=10, image_size=32, width=0.001)
    assert {m.out_channels for m in tiny.modules() if hasattr(m, "out_channels")} == {1}
