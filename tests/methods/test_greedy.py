"""Greedy forward selection: budgets, stopping, what it leaves in the network, what it refuses."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prune_lab import models
from prune_lab.accounting.costs import count_parameters, dense_macs, profile, sparse_macs
from prune_lab.core import images as scoring_images
from prune_lab.core.context import Context
from prune_lab.foundations.errors import UserError
from prune_lab.pipeline import runner
from prune_lab.pipeline.dry_run import dry_run
from prune_lab.pipeline.saved_model import load_model
from prune_lab.pruning.channels.budget import macs as macs_of
from prune_lab.pruning.channels.groups import channel_groups
from prune_lab.pruning.channels.probe import WeighedNetwork
from tests.helpers.method_runs import configure, finish, make, summary
from tests.helpers.runs import compose

QUICK = {"images": 24, "positions": 4, "batch": 8, "between_batch": 8, "num_evaluate": 3}


class TrainingImages:
    """A data set that has nothing to evaluate on: selection must do without."""

    def __init__(self, num_train: int = 24, image_size: int = 8) -> None:
        source = torch.Generator().manual_seed(0)
        self.images = torch.randn(num_train, 3, image_size, image_size, generator=source)
        self.train_labels = torch.arange(num_train) % 4
        self.info = SimpleNamespace(num_train=num_train, image_size=image_size, num_classes=4)
        self.asked: list[Tensor] = []

    def train_subset(self, batches: Sequence[Tensor], *, augment_seed: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            self.asked.append(batch)
            yield self.images[batch], self.train_labels[batch]


def prepared(**changes: Any) -> tuple[Any, Context]:
    """Return the method and its phase "prune" on a ResNet-20 with a quarter of the channels."""
    method = make("greedy", **(QUICK | changes))
    torch.manual_seed(0)
    model = models.build(compose("model=resnet20", "model.width=0.25").model, num_classes=4, image_size=8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, -0.2, 0.5)
    context = Context(
        model=model, costs=profile(model, 8), layers=method.layers(model), phase="prune", seed=0, total_steps=0,
        steps_per_epoch=0, dataset=TrainingImages(),
    )  # fmt: skip
    return method, context


def kept_channels(context: Context) -> dict[str, int]:
    """Return the rows with any weight left, per producer, as the masks have them."""
    groups = channel_groups(context.model, 8)
    rows = {group.producer: context.masks.masks[f"{group.producer}.weight"].flatten(1).any(1) for group in groups}
    return {name: int(kept.sum()) for name, kept in rows.items()}


# Options


def test_exactly_one_goal_is_asked_for() -> None:
    for changes in ({"top1_tol": 0.02}, {"macs_ratio": None}, {"channels_ratio": 0.5, "top1_tol": 0.1}):
        with pytest.raises(UserError, match=r"exactly one of method\.macs_ratio, method\.params_ratio, "):
            make("greedy", **changes)
    with pytest.raises(UserError, match=r"got method\.macs_ratio=0\.5 and method\.top1_tol=0\.02$"):
        make("greedy", top1_tol=0.02)
    with pytest.raises(UserError, match=r"others null; got none$"):
        make("greedy", macs_ratio=None)


@pytest.mark.parametrize("variant", ["local-refit", "local-line-search", "global"])
def test_repetition_is_refused_where_the_rule_decides(variant: str) -> None:
    with pytest.raises(UserError, match=rf"method\.repeat=true is for method\.variant=.*; {variant} has"):
        make("greedy", variant=variant, repeat=True)


@pytest.mark.parametrize(("option", "value"), [("loss", "output_distance"), ("candidates", "random")])
def test_options_of_the_loss_are_refused_without_one(option: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"method\.{option}={value} is for method\.variant=.*; local-refit does"):
        make("greedy", **{option: value})


@pytest.mark.parametrize("value", [0, 1, 1.5, -0.1, math.nan])
def test_tolerance_outside_its_range_is_refused(value: float) -> None:
    with pytest.raises(UserError, match=r"method\.top1_tol"):
        make("greedy", macs_ratio=None, top1_tol=value)


def test_an_untrained_network_is_refused() -> None:
    with pytest.raises(UserError, match=r"^schedule\.train\.epochs=0 does not go with .* model\.weights$"):
        compose("method=greedy", "schedule.train.epochs=0")
    compose("method=greedy", "schedule.train.epochs=0", "model.weights=trained.pt")


def test_patterns_that_match_nothing_are_refused() -> None:
    method, context = prepared(exclude=["layer1.0.conv2"])
    with pytest.raises(UserError, match=r"method\.exclude: 'layer1\.0\.conv2' matches no .*'layer1\.\d\.conv1'"):
        method.layout(context)
    method, context = prepared(exclude=["*"])
    with pytest.raises(UserError, match=r"^method\.exclude leaves no layer to prune$"):
        method.layout(context)


def test_a_network_without_hidden_channels_is_refused() -> None:
    method, context = prepared()
    context.model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    with pytest.raises(UserError, match="no hidden channels of this network") as caught:
        method.layout(context)
    assert "\n" not in str(caught.value)


def test_a_target_out_of_reach_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"method\.macs_ratio=0\.01 is out of reach: .* has 0\.\d+ of the MACs"):
        runner.run(configure(tmp_path, "greedy", "method.macs_ratio=0.01"))
    assert not list(tmp_path.glob("*/run.json"))


# Budgets


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.77])
def test_macs_come_as_near_to_the_target_as_channels_allow(ratio: float) -> None:
    method, context = prepared(macs_ratio=ratio)
    groups = method.groups(context)
    budget = method.budget(context, groups)
    ((_, layout),) = method.layout(context)
    macs = sparse_macs(context.costs, layout)
    assert macs <= ratio * context.dense_macs
    shares = sorted({Fraction(count, group.size) for group in groups for count in range(1, group.size + 1)})
    floors = [{g.producer: max(1, math.floor(share * g.size)) for g in groups} for share in shares]
    common = [floor for floor in floors if all(floor[name] <= count for name, count in budget.items())][-1]
    assert all(count - common[name] in (0, 1) for name, count in budget.items())
    for name, count in budget.items():
        if count == common[name]:  # one more does not fit
            larger = macs_of(context, groups, budget | {name: count + 1})
            assert larger > ratio * context.dense_macs


VARIANTS = {
    "refit": {"variant": "local-refit"},
    "line search": {"variant": "local-line-search"},
    "uniform": {"variant": "local-uniform"},
    "counts": {"variant": "local-uniform", "repeat": True},
    "official": {"variant": "global-code", "candidates": "random"},
    "slopes": {"variant": "global-code", "loss": "output_distance"},
    "fixed batch": {"variant": "global-code", "loss": "output_distance", "fresh_batch": False},
    "loss, counts": {"variant": "global-code", "repeat": True},
    "loss, steps": {"variant": "global"},
}


@pytest.mark.thin(4)
@pytest.mark.parametrize("case", VARIANTS)
def test_every_variant_keeps_exactly_its_budget(case: str) -> None:
    method, context = prepared(channels_ratio=0.5, macs_ratio=None, **VARIANTS[case])
    groups = method.groups(context)
    figures = method.prune(context)
    assert kept_channels(context) == {group.producer: group.size // 2 for group in groups}
    hidden = sum(group.size for group in groups)
    assert hidden == 84 and figures == {"prune/channels_kept": 0.58}  # the 16 channels of the trunks stay
    ((_, layout),) = method.layout(context)
    assert context.masks.counts() == layout
    for name, mask in context.masks.masks.items():
        assert not context.parameters()[name].detach()[~mask].any(), name
    for group in groups:  # a removed channel is gone on both sides
        gone = ~context.masks.masks[f"{group.producer}.weight"].flatten(1).any(1)
        reader = context.masks.masks[f"{group.consumers[0].path}.weight"]
        assert not reader[:, gone].any() and reader[:, ~gone].any(1).any(1).any()
    known = case not in ("loss, counts", "loss, steps")
    spent, context.validating = method.phase_cost(context), True
    assert method.phase_cost(context) == (spent if known else None)


def test_selection_reads_training_images_only_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    method, context = prepared(channels_ratio=0.99, macs_ratio=None)  # every layer stays whole
    before = copy.deepcopy(context.model.state_dict())
    draws = torch.get_rng_state()
    context.model.train()
    seen: list[bool] = []
    context.model.bn1.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    method.prune(context)
    assert seen and not any(seen)  # batch norm on its running statistics
    assert torch.equal(torch.get_rng_state(), draws)
    for name, tensor in context.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert context.masks.density == 1


def test_training_between_layers_moves_the_network_and_no_removed_channel() -> None:
    still, context = prepared(channels_ratio=0.5, macs_ratio=None, between_epochs=0.0)
    still.prune(context)
    statistics = context.model.bn1.running_mean.clone()
    assert torch.equal(statistics, torch.zeros_like(statistics))
    moving, other = prepared(channels_ratio=0.5, macs_ratio=None, between_epochs=1.0)
    moving.prune(other)
    assert not torch.equal(other.model.bn1.running_mean, statistics)
    assert not torch.equal(other.model.conv1.weight, context.model.conv1.weight)
    assert all(not other.parameters()[name].detach()[~mask].any() for name, mask in other.masks.masks.items())


def test_training_between_layers_that_diverges_is_reported() -> None:
    method, context = prepared(between_lr=1e30, between_epochs=2.0)
    with pytest.raises(UserError, match=r"^the loss between layers became .*: lower method\.between_lr"):
        method.prune(context)


def test_the_same_seed_gives_the_same_network() -> None:
    results = []
    for seed in (0, 0, 1):
        method, context = prepared(variant="global-code", candidates="random")
        context.seed = seed
        torch.manual_seed(len(results))  # the global generator has no say
        method.prune(context)
        results.append(context.masks.digest())
    assert results[0] == results[1] != results[2]


def test_refit_disturbs_the_logits_less_than_uniform_weights() -> None:
    distance = {}
    for variant in ("local-refit", "local-uniform"):
        method, context = prepared(variant=variant, between_epochs=0.0, channels_ratio=0.75, macs_ratio=None)
        context.model.eval()
        images = context.dataset.images
        with torch.no_grad():
            before = context.model(images)
            method.prune(context)
            context.model.eval()
            distance[variant] = float((context.model(images) - before).square().mean())
    assert distance["local-refit"] < distance["local-uniform"]


def test_excluded_layers_stay_whole() -> None:
    method, context = prepared(exclude=["layer1.*", "layer3.2.conv1"], macs_ratio=0.8)
    method.prune(context)
    kept, sizes = kept_channels(context), {g.producer: g.size for g in channel_groups(context.model, 8)}
    for name, count in kept.items():
        whole = name.startswith("layer1.") or name == "layer3.2.conv1"
        assert (count == sizes[name]) == whole, name


# Stopping by accuracy


def script(monkeypatch: pytest.MonkeyPatch, accuracy_of: Any) -> list[int]:
    """Replace the measured accuracy by a function of (share of channels kept, number of images)."""
    asked: list[int] = []

    def accuracy(self: WeighedNetwork, data: Any, weights: Tensor | None) -> float:
        images = sum(len(labels) for _, labels in data)
        share = 1.0 if weights is None else int((weights != 0).sum()) / self.group.size
        asked.append(images)
        return accuracy_of(share, images)

    monkeypatch.setattr(WeighedNetwork, "accuracy", accuracy)
    return asked


@pytest.mark.parametrize("variant", ["local-refit", "global-code"])
def test_layers_grow_until_the_accuracy_is_within_the_tolerance(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, lambda share, images: 0.8 * share)
    options = {"macs_ratio": None, "top1_tol": 0.5, "skip_eval_converge": 0.9, "eval_images": 20}
    method, context = prepared(variant=variant, **options)
    assert method.layout(context) is None
    method.prune(context)
    assert kept_channels(context) == {g.producer: g.size // 2 for g in method.groups(context)}


def test_all_images_are_asked_only_when_a_minibatch_looks_good(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = script(monkeypatch, lambda share, images: share)
    method, context = prepared(macs_ratio=None, top1_tol=0.3, skip_eval_converge=0.5, eval_images=20,
                               between_epochs=0.0, exclude=["layer[23].*", "layer1.[12].*"])  # fmt: skip
    method.prune(context)
    # Of four channels: 1 fails on the minibatch of 8, 2 (one half) fails on 20 images, 3 is within 0.3.
    assert asked == [20, 8, 8, 8, 20, 8, 20]
    assert kept_channels(context)["layer1.0.conv1"] == 3


def test_a_minibatch_of_hard_images_keeps_no_layer_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, lambda share, images: (0.4 if images == 8 else 0.8) if share >= 0.5 else 0.0)
    method, context = prepared(macs_ratio=None, top1_tol=0.02, skip_eval_converge=0.05, eval_images=20)
    method.prune(context)
    assert kept_channels(context) == {g.producer: g.size // 2 for g in method.groups(context)}


def test_a_layer_that_never_comes_within_the_tolerance_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, lambda share, images: 0.5 if share < 1 else 0.4 if images == 8 else 0.9)
    for variant in ("local-refit", "local-line-search", "global-code"):
        method, context = prepared(macs_ratio=None, top1_tol=0.01, eval_images=20, variant=variant)
        before = copy.deepcopy(context.model.state_dict())
        method.prune(context)
        assert context.masks.density == 1
        assert all(torch.equal(t, before[name]) for name, t in context.model.state_dict().items())


# Images


def test_streams_go_through_all_images_before_one_comes_again() -> None:
    _, context = prepared()
    source = scoring_images.DrawnImages(context, "layer", augment=False)
    list(source.stream("word", 8, fresh=True, count=7))
    epochs = [torch.cat(context.dataset.asked[i : i + 3]).tolist() for i in (0, 3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(24)) and epochs[0] != epochs[1]
    fixed = list(source.stream("word", 8, fresh=False, count=5))
    assert len(fixed) == 5 and all(pair is fixed[0] for pair in fixed)
    assert len(next(source.stream("word", 100, fresh=True))[1]) == 24


def test_evenly_spread_positions() -> None:
    assert scoring_images.evenly(10, 4).tolist() == [0, 2, 5, 7]
    assert scoring_images.evenly(3, 8).tolist() == [0, 1, 2]


# Whole runs


def test_run_leaves_fewer_macs_and_reports_each_layer(tmp_path: Path) -> None:
    quick = [f"method.{key}={value}" for key, value in QUICK.items()]
    config = configure(tmp_path, "greedy", *quick, "method.macs_ratio=0.5")
    folder = finish(config)
    written = summary(folder)
    assert 0.4 < written["macs/inference_ratio"] <= 0.5
    assert written["sparsity/requested"] is written["sparsity/achieved"] is written["params/nonzero"] is None
    assert written["prune/channels_kept"] < 0.6
    assert "layer1.0.conv1: 2 of 4 channels kept" in (folder / "log.txt").read_text()
    small = load_model(folder)
    assert written["params/kept"] == written["params/total"] == count_parameters(small)
    assert written["macs/inference"] == dense_macs(profile(small, 16))
    assert small.layer1[0].conv1.out_channels == 2


def test_dry_run_with_a_tolerance_knows_no_cost(tmp_path: Path) -> None:
    config = configure(tmp_path, "greedy", "method.macs_ratio=null", "method.top1_tol=0.1")
    assert dry_run(config) == 0
    planned = json.loads(next(tmp_path.glob("*/dry_run.json")).read_text())
    assert planned["macs/train"] is None and planned["macs/inference"] is None
