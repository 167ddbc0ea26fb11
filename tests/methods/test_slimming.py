"""Slimming: the penalty to the bit, the official cut by hand, removed channels against zeroed scales and shifts."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from prune_lab.core.phase import FINETUNE, PRUNE, TRAIN
from prune_lab.pruning.batch_norm.penalty import ScalePenalty
from prune_lab.pruning.batch_norm.thresholds import above_quantile, absolute_scales, class_means, with_least
from prune_lab.pruning.channels.groups import channel_map
from tests.helpers.method_runs import configure, finish, summary
from tests.helpers.scale_phases import (
    IMAGE_SIZE,
    backward,
    bits,
    gradients,
    method,
    network,
    norms,
    phase_of,
    plain,
    refused,
    set_scales,
    unfit,
)  # fmt: skip

SCALES = [0.9, 0.05, 0.3, 0.01, 0.6, 0.2, 0.02, 0.7, 0.4, 0.1]

# The cut


def test_the_official_threshold_is_a_scale_and_goes_itself() -> None:
    assert above_quantile(torch.tensor(SCALES), 0.3).nonzero().flatten().tolist() == [0, 7]
    for percent in (1, 10, 20, 29, 70, 80, 90, 100):  # without ties: int(N p) + 1 go
        values = torch.randperm(100, generator=torch.Generator().manual_seed(1)).double()
        assert int(above_quantile(values, percent / 100).sum()) == percent - 1
    assert not above_quantile(torch.tensor([1.0, 1.0, 0.5]), 0.5).any()  # ties at the threshold go, too


@pytest.mark.parametrize(("official", "kept"), [(True, [0, 7]), (False, [0, 4, 7])])
def test_pruning_30_percent_kept_of_ten_scales(official: bool, kept: list[int]) -> None:
    model = plain(10)
    set_scales(model[1], [value * (-1) ** index for index, value in enumerate(SCALES)])  # signs do not count
    context = phase_of(model, "prune")
    figures = method("slimming", channels_ratio=0.3, official_threshold=official).prune(context)
    mask = context.masks.masks["0.weight"].flatten(1)
    assert mask.any(1).nonzero().flatten().tolist() == kept and torch.equal(mask.any(1), mask.all(1))
    assert figures["prune/channels_kept"] == len(kept) / 10
    assert (model[0].weight[[i for i in range(10) if i not in kept]] == 0).all()


def test_scales_of_all_layers_compete_as_they_are_and_every_layer_keeps_one() -> None:
    model = plain(4, 4, 4)
    set_scales(model[1], [0.004, 0.001, 0.003, 0.002])
    set_scales(model[4], [0.9, 0.5, 0.6, 0.8])
    set_scales(model[7], [7.0, 5.0, 6.0, 8.0])
    for official in (False, True):
        context = phase_of(copy.deepcopy(model), "prune")
        method("slimming", channels_ratio=0.5, official_threshold=official).prune(context)
        kept = [context.masks.masks[f"{index}.weight"].flatten(1).any(1).tolist() for index in (0, 3, 6)]
        # Six of twelve; the official threshold, 0.8, leaves five and none of them in the first layer.
        assert kept == [[True, False, False, False], [True, False, False, False], [True, True, True, True]]


def test_a_class_counts_by_the_mean_over_the_norms_it_passes() -> None:
    model = network("model=resnet20", "model.width=0.5")
    channels = channel_map(model, IMAGE_SIZE)
    means = class_means(channels, absolute_scales(model, channels))
    found = {path: norm.weight.abs().double() for path, norm in norms(model).items()}
    first = next(lane for lane in channels.lanes if lane.name == "conv1")  # runs through all three stages
    members = [found["bn1"], *(found[f"layer1.{i}.bn2"] for i in range(3)),
               *(found[f"layer2.{i}.bn2"][4:12] for i in range(3)),
               *(found[f"layer3.{i}.bn2"][12:20] for i in range(3))]  # fmt: skip
    assert torch.allclose(means[first.classes], torch.stack(members).mean(0))
    inner = next(lane for lane in channels.lanes if lane.name == "layer2.1.conv1")
    assert torch.equal(means[inner.classes], found["layer2.1.bn1"])


@pytest.mark.parametrize(("residual", "cut"), [(False, False), (True, True)])
def test_trunks_stay_unless_residual_is_set(residual: bool, cut: bool) -> None:
    model = network("model=resnet20", "model.width=0.5")
    for norm in (model.bn1, *(block.bn2 for block in (*model.layer1, *model.layer2, *model.layer3))):
        norm.weight.data.mul_(1e-6)
    context = phase_of(model, "prune")
    method("slimming", macs_ratio=0.7, residual=residual).prune(context)
    masks = context.masks.masks
    kept = masks["conv1.weight"].flatten(1).any(1) if "conv1.weight" in masks else torch.ones(8, dtype=torch.bool)
    assert bool(kept.all()) is not cut


def test_layers_that_pass_no_batch_norm_keep_all_channels() -> None:
    model = network("model=mobilenet_v3_small", "model.width=0.35")
    context = phase_of(model, "prune")
    method("slimming", macs_ratio=0.5, residual=True).prune(context)
    squeezed = [path for path in context.masks.masks if path.endswith("fc1.weight")]
    assert squeezed and all(context.masks.masks[path].flatten(1).any(1).all() for path in squeezed)


def test_at_least_so_many_channels_stay() -> None:
    kept = with_least(torch.tensor([False, False, False, False]), torch.tensor([1.0, 3.0, 3.0, 2.0]), 2)
    assert kept.tolist() == [False, True, True, False]
    assert with_least(torch.tensor([True, False]), torch.tensor([0.0, 9.0]), 1).tolist() == [True, False]


def test_removed_channels_equal_scales_and_shifts_of_zero() -> None:
    """The official code zeroes both before it copies what is kept."""
    model = network("model=resnet20", "model.width=0.5").eval()
    zeroed, context = copy.deepcopy(model), phase_of(model, "prune")
    chosen = method("slimming", macs_ratio=0.5)
    chosen.prune(context)
    channels = channel_map(model, IMAGE_SIZE)
    dead = channels.dead(context.masks.masks)
    assert dead.sum() > 20
    for path, rows in channels.norms.items():
        gone = dead[rows] & (rows >= 0)
        zeroed.get_submodule(path).weight.data[gone] = 0
        zeroed.get_submodule(path).bias.data[gone] = 0
    context.optimizer = None
    chosen.remove(context)
    images = torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(context.model(images), zeroed(images), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in context.model.parameters()) < sum(p.numel() for p in zeroed.parameters())


# The penalty


def official_update(model: nn.Module, strength: float) -> None:
    """updateBN of the official code, one norm after the other."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.grad.data.add_(strength * torch.sign(module.weight.data))


@pytest.mark.parametrize("family", ["resnet20", "mobilenet_v2"])
def test_gradients_are_the_official_ones_to_the_bit_and_shifts_are_left_alone(family: str) -> None:
    model = network(f"model={family}", "model.width=0.25")
    next(iter(norms(model).values())).weight.data[0] = 0  # sign(0) is 0
    context, chosen = phase_of(model, "train"), method("slimming", macs_ratio=0.5, scale_init=None)
    chosen.setup(context)
    backward(model)
    before = gradients(model)
    assert chosen.after_backward(context, 0)
    after = gradients(model)
    for name, gradient in before.items():
        model.get_parameter(name).grad = gradient.clone()
    official_update(model, 1e-4)
    expected = gradients(model)
    scales = {f"{path}.weight" for path in norms(model)}
    for name in before:
        assert torch.equal(after[name], expected[name]), name
        assert name in scales or torch.equal(bits(after[name]), bits(before[name])), name
    moved = torch.cat([(after[name] != before[name]).flatten() for name in sorted(scales)])
    assert int((~moved).sum()) == 1


def test_a_penalty_of_zero_changes_nothing() -> None:
    model = network("model=resnet20", "model.width=0.25")
    backward(model)
    before = gradients(model)
    ScalePenalty(model, 0.0).add(lr=0.1)
    assert all(torch.equal(gradient, before[name]) for name, gradient in gradients(model).items())


def test_norms_that_no_loss_reaches_are_left_alone() -> None:
    model = plain(4, 4)
    model.append(nn.Identity())
    model[7].unused = nn.BatchNorm2d(3)
    backward(model)
    ScalePenalty(model, 0.5).add(lr=0.1)
    assert model[7].unused.weight.grad is None and model[4].weight.grad is not None


@pytest.mark.parametrize("phase", ["prune", "finetune", "scratch"])
def test_only_the_training_is_penalised(phase: str) -> None:
    model = network("model=resnet20", "model.width=0.25")
    context, chosen = phase_of(model, phase), method("slimming", macs_ratio=0.5)
    started = copy.deepcopy(model.state_dict())
    chosen.setup(context)
    assert all(torch.equal(value, started[name]) for name, value in model.state_dict().items())
    backward(model)
    before = gradients(model)
    chosen.after_backward(context, 0)
    assert all(torch.equal(gradient, before[name]) for name, gradient in gradients(model).items())
    assert chosen.end_epoch(context, 0) == {}


def test_scales_of_an_untrained_network_start_as_asked_and_trained_ones_stay() -> None:
    model = plain(4, 4)
    context = phase_of(model, "train")
    method("slimming", macs_ratio=0.5).setup(context)
    assert all((norm.weight == 0.5).all() for norm in norms(model).values()) and context.said == []
    set_scales(model[1], [0.3, 1.0, 1.0, 1.0])
    chosen = method("slimming", macs_ratio=0.5, scale_init=2.0)
    chosen.setup(context)
    assert (model[4].weight == 0.5).all()
    assert context.said == ["method.scale_init=2 is left out: these weights are trained"]
    assert chosen.end_epoch(context, 0) == {"scales/mean": pytest.approx((3.3 + 2) / 8), "scales/near_zero": 0}


# What is refused, shared and left behind


@pytest.mark.parametrize("message", unfit())
def test_networks_without_scales_to_train_are_refused(message: str) -> None:
    model = unfit()[message]
    refused(lambda: method("slimming", macs_ratio=0.5).setup(phase_of(model, "train")), message)
    if "evaluation" not in message:
        refused(lambda: method("slimming", macs_ratio=0.5).layout(phase_of(model, "train")), message)


@pytest.mark.parametrize("changes", [{"macs_ratio": 0.5}, {"channels_ratio": 0.5, "scope": "layer"}])
def test_the_official_threshold_needs_a_ratio_of_all_channels(changes: dict) -> None:
    refused(lambda: method("slimming", official_threshold=True, **changes),
            r"method\.official_threshold=true goes with method\.channels_ratio and method\.scope=global")


def test_a_budget_below_what_the_trunk_costs_is_refused_before_training() -> None:
    model = network("model=resnet20", "model.width=0.5")
    refused(lambda: method("slimming", macs_ratio=0.01).layout(phase_of(model, "train")),
            r"method\.macs_ratio=0\.01 is out of reach")


def test_layers_that_keep_alike_are_known_beforehand_and_the_training_is_dense() -> None:
    model = network("model=resnet20", "model.width=0.5")
    chosen = method("slimming", channels_ratio=0.5, scope="layer")
    ((start, kept),) = chosen.layout(phase_of(model, "prune"))
    assert (start, kept["layer1.0.conv1.weight"], kept["conv1.weight"]) == (0, 4 * 8 * 9, 8 * 3 * 9)
    assert chosen.layout(phase_of(model, "train")) == [(0, {})]
    assert method("slimming", channels_ratio=0.5).layout(phase_of(model, "prune")) is None


def test_targets_share_the_penalised_training() -> None:
    half, less = method("slimming", macs_ratio=0.5), method("slimming", params_ratio=0.3, residual=True)
    other = method("slimming", macs_ratio=0.5, scale_penalty=1e-5)
    assert half.phase_identity(TRAIN) == less.phase_identity(TRAIN) != other.phase_identity(TRAIN)
    assert half.phase_identity(PRUNE) != less.phase_identity(PRUNE)
    assert half.phase_identity(FINETUNE) != less.phase_identity(FINETUNE)


def test_a_run_tells_how_scales_fall_and_ends_in_a_smaller_network(tmp_path: Path) -> None:
    folder = finish(configure(tmp_path, "slimming", "method.scale_penalty=0.05", "method.macs_ratio=0.6"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    means = [row["scales/mean"] for row in rows if row["phase"] == "train"]
    assert 0.5 > means[0] > means[1] > means[2]
    assert all("scales/mean" not in row for row in rows if row["phase"] != "train")
    written = summary(folder)
    assert 0.5 < written["macs/inference_ratio"] <= 0.6
    assert written["params/total"] == written["params/kept"] < written["params/dense"]
    assert written["prune/macs_kept"] == pytest.approx(written["macs/inference_ratio"], abs=1e-12)
