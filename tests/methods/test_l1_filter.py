"""Filters ranked by L1 norm under every kind of target: the networks of the paper, exact counts, controls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from prune_lab.cli import command as cli
from prune_lab.families.channel_pruning import Problem, parse_kept, reinitialise
from prune_lab.foundations.errors import UserError
from prune_lab.pipeline.control_runs import in_order
from prune_lab.pipeline.runner import run
from prune_lab.pipeline.saved_model import load_model
from prune_lab.pruning.channels.filter_scores import l1_norms, per_class
from prune_lab.pruning.channels.groups import channel_map
from tests.helpers.channel_networks import NARROW, chosen, one_layer, ours, phase
from tests.helpers.method_runs import configure, finish, make, summary

# The networks of the paper: the first convolution of each block, by stages; sensitive layers stay. Convolutions are
# counted from 1, the stem's; the first of a block has an even number.


def blocks(*stages: int) -> list[str]:
    return [f"layer{stage}.{index}.conv1" for stage, count in enumerate(stages, 1) for index in range(count)]


def named(sensitive: tuple[int, ...], *stages: int) -> list[str]:
    return [blocks(*stages)[number // 2 - 1] for number in sensitive]


def by_stage(*removed: float) -> list[str]:
    kept = [round(1 - fraction, 6) for fraction in removed]
    return [f"layer{stage}.*.conv1:{fraction}" for stage, fraction in enumerate(kept, 1) if fraction < 1]


PAPER = {
    "ResNet-56-A": ("resnet56", by_stage(0.1, 0.1, 0.1), named((16, 20, 38, 54), 9, 9, 9), 112_435_840, 9.3),
    "ResNet-56-B": ("resnet56", by_stage(0.6, 0.3, 0.1), named((16, 18, 20, 34, 38, 54), 9, 9, 9), 90_907_264, 13.8),
    "ResNet-110-A": ("resnet110", by_stage(0.5, 0, 0), named((36,), 18, 18, 18), 212_779_648, 2.3),
    "ResNet-110-B": ("resnet110", by_stage(0.5, 0.4, 0.3), named((36, 38, 74), 18, 18, 18), 155_124_352, 32.4),
    "ResNet-34-A": ("resnet34", by_stage(0.3, 0.3, 0.3, 0), named((2, 8, 14, 16, 26, 28, 30, 32), 3, 4, 6, 3),
                    3_100_184_576, 7.6),
    "ResNet-34-B": ("resnet34", by_stage(0.5, 0.6, 0.4, 0), named((2, 8, 14, 16, 26, 28, 30, 32), 3, 4, 6, 3),
                    2_782_269_440, 10.7),
}  # fmt: skip


def problem(model: nn.Module, image_size: int, **options) -> Problem:
    return Problem(make("l1_filter", **options), phase(model, image_size))


def counts(found: Problem) -> list[int]:
    """Return the channels that lanes keep whatever the scores."""
    return found.counts(torch.zeros(found.channels.num_classes, dtype=torch.float64))


@pytest.mark.parametrize("name", PAPER)
def test_networks_of_the_paper(name: str) -> None:
    model_name, kept, exclude, macs, params_percent = PAPER[name]
    sizes = {"num_classes": 1000, "image_size": 224} if model_name == "resnet34" else {"image_size": 32}
    with torch.device("meta"):
        model = ours(model_name, **sizes)
    found = problem(model, sizes["image_size"], macs_ratio=None, layer_channels=kept, exclude=exclude)
    kept = counts(found)
    assert found.costs.at("macs", kept) == macs
    removed = 1 - found.costs.at("params", kept) / found.costs.at("params", found.costs.sizes)
    assert round(100 * removed, 1) == params_percent


def test_vgg_of_the_paper() -> None:
    with torch.device("meta"):
        model = ours("vgg16", "model.head=hidden", "model.conv_bias=true")
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    widths = (32, 64, 128, 128, *[256] * 9)
    wanted = [f"{name}:{width}" for name, width in zip(convolutions, widths, strict=True)]
    found = problem(model, 32, macs_ratio=None, layer_channels=wanted)
    assert counts(found).tolist() == [*widths, 512]
    assert found.costs.at("macs", found.costs.sizes) == 313_463_808
    assert found.costs.at("macs", counts(found)) == 206_279_680
    assert found.costs.at("params", found.costs.sizes) == 14_991_946
    assert round(100 * (1 - found.costs.at("params", counts(found)) / 14_991_946), 1) == 64.0


# Scores


def test_norms_by_hand() -> None:
    filters = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 0.0], [-1.0, -1.0, -1.0], [4.0, 0.0, -4.0]])
    assert l1_norms(filters).tolist() == [3.5, 3.0, 3.0, 8.0]
    for ratio, left in ((0.75, [0, 1, 3]), (0.5, [0, 3]), (0.25, [3])):  # equal ones: the first stays longer
        method = make("l1_filter", macs_ratio=None, channels_ratio=ratio)
        assert chosen(method, phase(one_layer(filters), 2))["0"] == left


def test_a_trunk_counts_by_the_mean_of_all_that_write_it() -> None:
    model = NARROW["resnet20-B"]()
    channels = channel_map(model, 32)
    trunk = next(lane for lane in channels.lanes if lane.name == "layer2.0.conv2")
    # The projection meets the first block's sum, in the order of the forward pass.
    paths = [*(f"layer2.{index}.conv2" for index in range(3)), "layer2.0.shortcut.0"]
    assert sorted(trunk.producers) == sorted(paths)
    expected = sum(model.get_submodule(path).weight.detach().abs().sum((1, 2, 3)) for path in paths) / 4
    torch.testing.assert_close(per_class(model, channels, l1_norms)[trunk.classes], expected.double())


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_factors_of_whole_layers_do_not_change_what_is_kept(scope: str) -> None:
    model, method = NARROW["vgg16"](), make("l1_filter", scope=scope)
    before = chosen(method, phase(model, 32))
    for index, module in enumerate(model.modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.data *= 10 ** (index % 5 - 2)
    assert chosen(method, phase(model, 32)) == before


# Targets


@pytest.mark.parametrize(("size", "ratio", "expected"), [(16, 0.4, 6), (100, 0.57, 57), (100, 0.29, 29), (4, 0.1, 1)])
def test_fractions_of_channels_are_rounded_down_as_typed(size: int, ratio: float, expected: int) -> None:
    assert make("l1_filter", macs_ratio=None, channels_ratio=ratio).count(size) == expected
    found = problem(one_layer(torch.ones(size, 1)), 2, macs_ratio=None, layer_channels=[f"0:{ratio}"])
    assert counts(found).tolist() == [expected]


def resnet20(**options) -> dict[str, int]:
    """Return what is left of a narrow ResNet-20 (8, 16 and 32 channels): lane -> channels."""
    found = problem(NARROW["resnet20-A"](), 32, macs_ratio=None, **options)
    return dict(zip((lane.name for lane in found.channels.lanes), counts(found).tolist(), strict=True))


def test_later_patterns_win_and_other_layers_keep_all() -> None:
    kept = resnet20(layer_channels=["layer1.*:0.5", "layer1.1.*:3", "layer2.0.conv1:16"])
    assert kept["layer1.0.conv1"] == 4 and kept["layer1.1.conv1"] == 3
    assert kept["conv1"] == 3  # the trunk is also layer1.1's second convolution's
    assert kept["layer2.0.conv1"] == 16 and kept["layer3.0.conv1"] == 32


def test_trunks_stay_on_demand_and_by_any_of_their_layers() -> None:
    whole = {"conv1": 8, "layer2.0.conv2": 8, "layer3.0.conv2": 16}
    kept = resnet20(channels_ratio=0.5, residual=False)
    assert {name: kept[name] for name in whole} == whole and kept["layer1.0.conv1"] == 4
    kept = resnet20(channels_ratio=0.5, exclude=["layer1.2.conv2", "layer3.*.conv1"])
    assert [kept["conv1"], kept["layer2.0.conv2"], kept["layer3.0.conv1"]] == [8, 4, 32]


def test_counts_are_rounded_up_to_multiples_and_floors() -> None:
    kept = resnet20(channels_ratio=0.3, round_to=4)
    assert [kept["conv1"], kept["layer2.0.conv1"], kept["layer3.0.conv1"]] == [4, 4, 12]
    kept = resnet20(channels_ratio=0.3, least_channels=6, round_to=4)
    assert [kept["conv1"], kept["layer2.0.conv1"], kept["layer3.0.conv1"]] == [8, 8, 12]


@pytest.mark.parametrize(("options", "message"), [
    ({"channels_ratio": 0.99, "round_to": 64}, r"^method\.channels_ratio=0\.99: nothing to remove"),
    ({"layer_channels": ["layer1.0.conv1:8"]}, r"^method\.layer_channels: nothing to remove"),
    ({"layer_channels": ["layer2.0.conv1:4", "layer1.0.conv1:99"]},
     r"^method\.layer_channels: 'layer1\.0\.conv1:99' asks for more channels than layer1\.0\.conv1 has; .* up to 8$"),
    ({"layer_channels": ["layer1.*:4", "conv1:4"], "residual": False},
     r"^method\.layer_channels: the channels of 'conv1' have to stay; .* may go those of layer1\.0\.conv1, layer1\.1"),
    ({"layer_channels": ["layer1.*:4", "layer2.0.conv1:4"], "exclude": ["layer2.*"]}, "'layer2.0.conv1' have to stay"),
    ({"layer_channels": ["layer1.*:4", "linear:4"]}, "the channels of 'linear' have to stay"),
    ({"channels_ratio": 0.5, "exclude": ["*"]}, "no channels of this network may be removed under method.exclude and"),
    ({"channels_ratio": 0.5, "exclude": ["layer1.0.con1"]},
     r"^method\.exclude: 'layer1\.0\.con1' matches no layer that makes channels \(did you mean 'layer1\.0\.conv1'\?\)"),
    ({"layer_channels": ["stem:4"]}, r"^method\.layer_channels: 'stem' matches no layer"),
    ({"macs_ratio": 0.01}, r"^method\.macs_ratio=0\.01 is out of reach: the smallest network that the options allow"),
])  # fmt: skip
def test_targets_that_cannot_be_met_are_refused(options: dict, message: str) -> None:
    method = make("l1_filter", **({"macs_ratio": None} | options))
    with pytest.raises(UserError, match=message):
        method.layout(phase(NARROW["resnet20-A"](), 32))


WRONG = ["conv1", "conv1:", ":0.5", "conv1:0", "conv1:1.5", "conv1:-1", "conv1:much", "conv1:nan"]


@pytest.mark.parametrize("entry", WRONG)
def test_targets_of_layers_have_one_form(entry: str) -> None:
    with pytest.raises(UserError, match=r"^method\.layer_channels: .* must be PATTERN:KEPT with a fraction in"):
        parse_kept(entry, "method.layer_channels")
    assert parse_kept("a:b.*:0.25", "") == ("a:b.*", 0.25) and parse_kept("conv1:1", "") == ("conv1", 1)


@pytest.mark.parametrize(("changes", "message"), [
    ({"channels_ratio": 0.5}, r"must be set, .* got method\.macs_ratio=0\.5 and method\.channels_ratio=0\.5$"),
    ({"macs_ratio": None}, r"^exactly one of method\.macs_ratio, .* and method\.layer_channels must be set.*got none$"),
    ({"macs_ratio": None, "layer_channels": ["conv1:4"], "scope": "global"}, r"method\.scope=layer, got global$"),
])
def test_one_target_is_asked_for(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make("l1_filter", **changes)


def test_an_untrained_network_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["method=l1_filter", "model=resnet20", "schedule.train.epochs=0"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "schedule.train.epochs=0 does not go with method=l1_filter, which needs a trained network" in line


# Whole runs


def test_the_line_of_a_run_tells_the_target_and_what_came_of_it(tmp_path: Path) -> None:
    folder = finish(configure(tmp_path, "l1_filter", "method.round_to=2"))
    written, log = summary(folder), (folder / "log.txt").read_text()
    assert "method.macs_ratio=0.8: keeps" in log and ", in multiples of 2" in log
    assert written["macs/inference_ratio"] == written["prune/macs_kept"] <= 0.8
    assert written["params/total"] == round(written["prune/params_kept"] * written["params/dense"])
    widths = json.loads((folder / "model.json").read_text())["channels"]
    assert all(size[0] % 2 == 0 for path, size in widths.items() if path.endswith((".conv1", ".bn1")))


def test_controls_cost_the_same_and_share_what_they_can(tmp_path: Path) -> None:
    for control in ("random", "scratch"):
        config = configure(tmp_path, "l1_filter", f"method.control={control}")
        assert run(*in_order(config)) == 0
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("*/summary.json")]
    assert len(summaries) == 3
    own, random, scratch = sorted(summaries, key=lambda flat: flat.get("control/kind", ""))
    for key in ("macs/inference", "params/total", "remove/channels_kept"):
        assert own[key] == random[key] == scratch[key]
    keys = [{entry["name"]: entry["key"] for entry in flat["phases"]} for flat in (own, random, scratch)]
    assert list(keys[2]) == ["train", "prune", "remove", "reinitialise", "scratch"]
    assert keys[0]["train"] == keys[1]["train"] and keys[0]["prune"] != keys[1]["prune"]
    assert [keys[0][name] == keys[2][name] for name in ("train", "prune", "remove")] == [True] * 3
    assert scratch["macs/train"] > own["macs/train"] and "control/method_minus_control" in random
    mine, other = (load_model(path.parent) for path in sorted(tmp_path.glob("*/model.json"))[:2])
    assert not torch.equal(mine.conv1.weight, other.conv1.weight)


@pytest.mark.parametrize(("family", "linear_std"), [("resnet20-A", None), ("vgg16", 0.01), ("mobilenet_v2", 0.01)])
def test_new_weights_of_the_small_network_are_drawn_for_its_widths(family: str, linear_std: float | None) -> None:
    torch.manual_seed(0)
    method, context = make("l1_filter", macs_ratio=None, channels_ratio=0.25), phase(NARROW[family](), 32)
    method.prune(context)
    method.remove(context)
    old = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
    context.fresh_model = lambda word: NARROW[family]()
    reinitialise(method, context)
    weights = {name: weight for name, weight in context.model.named_parameters() if weight.dim() > 1}
    assert not any(torch.equal(weight, old[name]) for name, weight in weights.items())
    ratios = []
    for module in context.model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 300:
            fan_out = module.out_channels * module.kernel_size[0] ** 2  # groups or not, as PyTorch counts
            ratios.append(float(module.weight.detach().std()) / (2 / fan_out) ** 0.5)
    assert len(ratios) >= 3 and sum(ratios) / len(ratios) == pytest.approx(1, abs=0.05)
    last = [module for module in context.model.modules() if isinstance(module, nn.Linear)][-1]
    expected = linear_std or (3 * last.in_features) ** -0.5  # uniform up to 1 / sqrt(inputs)
    assert float(last.weight.detach().std()) == pytest.approx(expected, rel=0.25)
    assert context.model(torch.randn(2, 3, 32, 32)).isfinite().all()
