"""Pruning before training: controls, floors, layouts, reports; random and magnitude scores."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prune_lab.cli import command as cli
from prune_lab.core.context import Context
from prune_lab.foundations.errors import UserError
from prune_lab.pipeline import runner
from prune_lab.pruning.masks.distributions import LayerSize, allocate, num_keep_total, smart_ratio
from prune_lab.training.loop import Interrupted
from prune_lab.training.task import PhaseTask
from tests.helpers.method_runs import configure, finish, last_result, make, run_folder
from tests.helpers.score_phases import Images, Net, Row, one_image, phase

LAYERS = [
    LayerSize("conv1", (2, 5, 1, 1)), LayerSize("conv2", (4, 5, 1, 1)), LayerSize("conv3", (6, 5, 1, 1)),
    LayerSize("fc", (2, 5)),
]  # fmt: skip
"""10, 20, 30 and 10 weights"""


def pruned(name: str, *, seed: int = 0, **options) -> Context:
    """Return the phase after pruning `Net` (162, 432, 40, 15 weights) to 65 of 649."""
    method = make(name, **({"samples_per_class": 6} | options))
    context = phase(Net(), method, seed=seed)
    context.figures = method.prune(context)
    return context


def same(one: Context, other: Context) -> list[bool]:
    """Return per layer whether both masks are alike."""
    return [torch.equal(mask, other.masks.masks[name]) for name, mask in one.masks.masks.items()]


# Controls


@pytest.mark.parametrize("name", ["snip", "grasp", "magnitude_init"])
def test_shuffled_masks_keep_the_counts_at_other_positions(name):
    def control(kind: str, seed: int = 0) -> Context:
        return pruned(name, control=kind, seed=seed, sparsity=0.5)  # no layer is empty

    plain, shuffled = control("none"), control("shuffle")
    assert shuffled.masks.counts() == plain.masks.counts()
    assert not any(same(plain, shuffled))
    assert all(same(shuffled, control("shuffle")))
    assert not any(same(shuffled, control("shuffle", seed=1)))


@pytest.mark.parametrize("name", ["snip", "grasp", "magnitude_init", "random"])
def test_new_weights_lie_under_the_same_mask(name):
    plain, renewed = pruned(name), pruned(name, control="reinit")
    assert all(same(plain, renewed))
    fresh = Net(seed=len("control reinit")).state_dict()
    for path, value in renewed.model.state_dict().items():
        mask = renewed.masks.masks.get(path, torch.ones_like(value))
        assert torch.equal(value, fresh[path] * mask), path
    assert not torch.equal(plain.model[0].weight, renewed.model[0].weight)


@pytest.mark.parametrize("name", ["snip", "grasp", "magnitude_init"])
@pytest.mark.parametrize("distribution", ["global", "uniform"])
def test_inverted_scores_keep_the_lowest(name, distribution):
    options = {"samples_per_class": 6, "distribution": distribution, "first_layer": "auto"}
    method = make(name, control="invert", **options)
    context = phase(Net(), method)
    found = method.scores(context)
    method.prune(context)
    groups = [[path] for path in found] if distribution == "uniform" else [list(found)]
    for group in groups:
        score = torch.cat([found[path].flatten() for path in group])
        kept = torch.cat([context.masks.masks[path].flatten() for path in group])
        assert score[kept].max() <= score[~kept].min()


def test_random_scores_ignore_the_methods_own():
    first, second = pruned("snip", control="random"), pruned("magnitude_init", control="random")
    assert all(same(first, second)) and all(same(first, pruned("random")))
    assert not all(same(first, pruned("snip", control="random", seed=1)))


@pytest.mark.parametrize("control", ["none", "shuffle", "reinit", "invert", "random"])
def test_every_control_keeps_the_exact_total(control):
    context = pruned("snip", control=control)
    assert context.masks.num_kept == num_keep_total(649, 0.9) == 65
    for path, mask in context.masks.masks.items():
        assert not context.parameters()[path][~mask].any()


@pytest.mark.parametrize("control", ["shuffle", "invert", "random"])
def test_random_masks_have_no_control_that_draws_at_random(control, capsys):
    assert cli.main(["method=random", f"method.control={control}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "method.control" in line and "none, reinit" in line


# Empty layers and floors


def tiny_last_layer() -> Net:
    """Return a network whose layers have weights of the same size, but for the last one."""
    model = Net()
    with torch.no_grad():
        for index, size in ((0, 1), (3, 1), (8, 1), (11, 1e-6)):
            model[index].weight *= size / model[index].weight.abs().max()
    return model


def test_an_empty_layer_is_reported_and_counted():
    method = make("magnitude_init", samples_per_class=1)
    context = phase(tiny_last_layer(), method)
    figures = method.prune(context)
    assert context.masks.counts()["11.weight"] == 0
    assert context.reports[0] == "layers without any weight left: 11"
    assert "this network cannot learn" in context.reports[1]
    assert figures["prune/empty_layers"] == 1
    assert figures["prune/gradient_norm_after"] == 0 < figures["prune/gradient_norm_before"]  # nothing flows back


def test_a_floor_keeps_the_best_of_each_layer_and_the_exact_total():
    method = make("magnitude_init", samples_per_class=1, min_per_layer=2)
    context = phase(tiny_last_layer(), method)
    weight = context.parameters()["11.weight"].detach().abs().flatten()
    figures = method.prune(context)
    mask = context.masks.masks["11.weight"].flatten()
    assert set(mask.nonzero().flatten().tolist()) == set(weight.topk(2).indices.tolist())
    assert context.masks.num_kept == 65 and figures["prune/empty_layers"] == 0 and context.reports == []


def test_a_floor_needs_one_ranking_over_all_layers():
    with pytest.raises(UserError, match="method.min_per_layer=1 is for distribution=global"):
        make("snip", distribution="erk", min_per_layer=1)


def test_fewer_weights_than_layers_are_refused():
    method = make("random", samples_per_class=1, sparsity=0.996)
    with pytest.raises(UserError, match="leaves 3 weights for 4 layers"):
        method.layout(phase(Net(), method))


# Scores


def test_magnitude_keeps_the_largest_weights_of_either_sign():
    method = make("magnitude_init", sparsity=0.5, samples_per_class=1)
    context = phase(Row(0.1, -3.0, 0.0, 2.0, -0.2, 0.2), method, one_image())
    assert method.choose(context)["fc.weight"].int().tolist() == [[0, 1, 0, 1, 1, 0]]


def test_a_random_layer_keeps_its_share_on_average():
    """Global draws: the first layer, 162 of 649 weights, gets a quarter of the 65 kept on average."""
    counts = [pruned("random", samples_per_class=1, seed=seed).masks.counts()["0.weight"] for seed in range(40)]
    assert len(set(counts)) > 5
    assert sum(counts) / 40 == pytest.approx(65 * 162 / 649, abs=2)


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk", "balanced", "smart_ratio", "smart_ratio_vgg"])
def test_random_layouts_are_exact_per_layer(distribution):
    context = pruned("random", distribution=distribution, first_layer="sparse", sparsity=0.8)
    sizes = [LayerSize(layer.parameter, layer.shape) for layer in context.eligible()]
    assert context.masks.counts() == allocate(distribution, sizes, num_keep_total(649, 0.8))


# Layouts


def test_balanced_layers_keep_alike_and_small_ones_all():
    assert allocate("balanced", LAYERS, 20) == {"conv1": 5, "conv2": 5, "conv3": 5, "fc": 5}
    assert allocate("balanced", LAYERS, 46) == {"conv1": 10, "conv2": 13, "conv3": 13, "fc": 10}
    assert allocate("balanced", LAYERS, 69) == {"conv1": 10, "conv2": 20, "conv3": 29, "fc": 10}


def test_smart_ratios_of_a_worked_example():
    """L = 4: shares 20, 12, 6 of convolutions 1 to 3; 0.3 of the linear layer: 3 of 23, the rest 20 x share / 620."""
    targets = smart_ratio(LAYERS, 23)
    assert targets == pytest.approx({"conv1": 200 / 31, "conv2": 240 / 31, "conv3": 180 / 31, "fc": 3})
    assert allocate("smart_ratio", LAYERS, 23) == {"conv1": 6, "conv2": 8, "conv3": 6, "fc": 3}


def test_what_exceeds_a_layer_goes_to_the_following_ones():
    """43: the first would keep 12.9 of 10, so the second keeps 2.9 more."""
    assert smart_ratio(LAYERS, 43) == pytest.approx({"conv1": 10, "conv2": 570 / 31, "conv3": 360 / 31, "fc": 3})
    assert smart_ratio(LAYERS, 53) == pytest.approx({"conv1": 10, "conv2": 20, "conv3": 20, "fc": 3})
    assert smart_ratio(LAYERS, 66) == pytest.approx({"conv1": 10, "conv2": 20, "conv3": 30, "fc": 6})


def test_steep_smart_ratios_are_divided_by_the_squared_depth():
    """Shares 20, 12 / 4, 6 / 9 times sizes: 200, 60, 20 of 280; the first overflows by 4 2/7."""
    assert smart_ratio(LAYERS, 23, steep=True) == pytest.approx(
        {"conv1": 10, "conv2": 60 / 7, "conv3": 10 / 7, "fc": 3}
    )
    assert allocate("smart_ratio_vgg", LAYERS, 23) == {"conv1": 10, "conv2": 9, "conv3": 1, "fc": 3}


@pytest.mark.parametrize("distribution", ["balanced", "smart_ratio", "smart_ratio_vgg"])
def test_layouts_add_up_at_every_budget(distribution):
    for num_keep in range(25, 71):
        counts = allocate(distribution, LAYERS, num_keep)
        assert sum(counts.values()) == num_keep
        assert all(0 < counts[layer.name] <= layer.size for layer in LAYERS)


def test_a_budget_that_linear_layers_use_up_is_refused_with_the_reachable_one():
    layers = [LayerSize("conv1", (2, 5, 1, 1)), LayerSize("conv2", (2, 5, 1, 1)), LayerSize("fc", (10, 100))]
    with pytest.raises(UserError, match="reachable maximum is") as caught:
        allocate("smart_ratio", layers, 200)
    highest = float(str(caught.value).split("maximum is ")[1].split()[0])
    assert all(allocate("smart_ratio", layers, num_keep_total(1020, highest)).values())


def test_smart_ratios_leave_no_choice_for_the_first_layer(capsys):
    options = ["method=random", "method.distribution=smart_ratio", "method.first_layer=dense_compensated"]
    assert cli.main(options) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "method.first_layer=dense_compensated: smart_ratio says what the first layer keeps" in line


# Gradient norms are only reported


def few_images(*counts: int) -> Images:
    """Return as many images of each class."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return Images(torch.randn(len(labels), 3, 6, 6, generator=torch.Generator().manual_seed(3)), labels, len(counts))


@pytest.mark.parametrize("name", ["random", "magnitude_init", "synflow"])
def test_methods_that_need_no_images_take_what_there_is_for_their_figures(name):
    method = make(name, samples_per_class=10)
    few, fewer, none = few_images(2, 3, 4), few_images(2, 2, 2), few_images(0, 3, 4)
    contexts = [phase(Net(), method, data) for data in (few, fewer, none)]
    for context in contexts:
        method.setup(context)
    with_few, with_fewer, without = (method.prune(context) for context in contexts)
    assert 0 < with_few["prune/gradient_norm_before"] < math.inf and with_few["prune/gradient_norm_after"] >= 0
    assert [len(batch) for batch in few.seen] == [len(batch) for batch in fewer.seen] == [6, 6]
    assert with_few.keys() == with_fewer.keys()
    assert without == {"prune/empty_layers": with_few["prune/empty_layers"]}
    assert all(same(contexts[0], contexts[2]))


@pytest.mark.parametrize("name", ["snip", "grasp"])
def test_scores_from_too_few_images_are_refused_but_not_drawn_ones(name):
    context = phase(Net(), make(name, samples_per_class=3), few_images(2, 3, 4))
    with pytest.raises(UserError, match="method.samples_per_class=3 exceeds the 2 training images of class 0"):
        make(name, samples_per_class=3).setup(context)
    drawn = make(name, samples_per_class=3, control="random")
    drawn.setup(context)
    assert drawn.prune(context)["prune/gradient_norm_before"] > 0


def test_a_norm_that_is_not_finite_is_left_out():
    model = Net()
    model[11].bias.data[0] = math.inf
    method = make("magnitude_init", samples_per_class=2)
    assert method.prune(phase(model, method)).keys() == {"prune/empty_layers"}


# Real runs


def prune_record(folder: Path) -> dict:
    (record,) = [
        row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if row["phase"] == "prune"
    ]
    return record


@pytest.mark.parametrize("name", ["snip", "grasp", "random", "magnitude_init"])
def test_record_of_the_prune_phase(name, tmp_path: Path):
    record = prune_record(finish(configure(tmp_path, name)))
    assert math.isfinite(record["prune/gradient_norm_before"]) and record["prune/gradient_norm_before"] > 0
    assert record["prune/gradient_norm_after"] != record["prune/gradient_norm_before"]
    assert record["prune/empty_layers"] >= 0 and record["sparsity"] == pytest.approx(0.8, abs=1e-4)
    assert (record["macs/train"] == 0) is (name in ("random", "magnitude_init"))


@pytest.mark.parametrize("control", ["shuffle", "reinit"])
def test_a_control_is_reproducible_from_the_seed(control, tmp_path: Path):
    def result(folder: str, seed: int) -> dict[str, dict[str, Tensor]]:
        options = (
            f"method.control={control}",
            f"seed={seed}",
            "schedule.train.epochs=1",
            "schedule.train.warmup_epochs=0",
        )
        return last_result(finish(configure(tmp_path / folder, "snip", *options)))

    one, again, other = result("one", 0), result("again", 0), result("other", 1)
    for kind in ("model", "masks"):
        assert all(torch.equal(one[kind][name], again[kind][name]) for name in one[kind])
        assert not all(torch.equal(one[kind][name], other[kind][name]) for name in one[kind])


# Runs


def test_new_weights_are_compared_with_themselves(tmp_path: Path):
    """Before and after the cut, the gradient norm is that of the network that is trained."""
    folders = (finish(configure(tmp_path / kind, "snip", f"method.control={kind}")) for kind in ("none", "reinit"))
    plain, renewed = (json.loads((folder / "metrics.jsonl").open().readline()) for folder in folders)
    assert plain["prune/gradient_norm_before"] != renewed["prune/gradient_norm_before"]
    assert plain["macs/inference"] == renewed["macs/inference"]  # the same mask


def test_a_batch_that_does_not_fit_is_refused_before_anything_is_scored(tmp_path: Path):
    with pytest.raises(UserError, match=r"schedule\.batch_size must lie in \[1, 24\]"):
        runner.run(configure(tmp_path, "snip", "schedule.batch_size=5000"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["snip", "synflow"])
def test_a_signal_stops_the_scoring(name, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    polled: list[int] = []

    def poll(self) -> None:
        polled.append(1)
        if len(polled) == 2:
            raise Interrupted

    monkeypatch.setattr(PhaseTask, "poll", poll)
    options = ("method.scoring_batch=5", "method.rounds=50") if name == "synflow" else ("method.scoring_batch=5",)
    config = configure(tmp_path, name, *options)
    runner.run(config)
    assert json.loads((run_folder(config) / "status.json").read_text())["status"] == "interrupted"
    assert len(polled) == 2
