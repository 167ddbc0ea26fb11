"""MaskSparsity: votes and thresholds by hand, the penalty on marked scales only, official masks, the whole chain."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from prune_lab import models
from prune_lab.accounting.costs import count_parameters, dense_macs, profile
from prune_lab.core.phase import TRAIN_DENSE
from prune_lab.families.channel_pruning import Problem
from prune_lab.foundations import checkpoint
from prune_lab.pruning.batch_norm.penalty import ScalePenalty, gradient
from prune_lab.pruning.batch_norm.thresholds import agreed, energy_threshold, lane_values
from prune_lab.pruning.channels import surgery
from prune_lab.pruning.channels.costs import ChannelCosts
from prune_lab.pruning.channels.groups import ChannelMap, channel_map
from tests.helpers.method_runs import configure, finish, run_folder, summary
from tests.helpers.runs import compose
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

# Votes and thresholds

VOTES = {
    "A": ([[1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0]], [0, 1, 4]),
    "B": ([[1, 0, 0, 1], [0, 0, 0, 0]], []),
    "C": ([[1, 1, 0, 0], [0, 0, 1, 1]], [0, 1, 2, 3]),
    "one member": ([[0, 1, 1]], [1, 2]),
    "all agree": ([[0, 1, 1], [0, 1, 1]], [1, 2]),
    "nobody prunes": ([[0, 0], [0, 0]], []),
}


@pytest.mark.parametrize("case", VOTES)
def test_norms_whose_outputs_are_added_vote(case: str) -> None:
    pruned, gone = VOTES[case]
    assert (~agreed(torch.tensor(pruned, dtype=torch.bool))).nonzero().flatten().tolist() == gone


def test_a_vote_that_would_empty_a_trunk_keeps_its_best_channel() -> None:
    """Example C as a network: the official code leaves no channel of the trunk."""

    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm_a = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.b, self.norm_b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.head = nn.Conv2d(4, 4, IMAGE_SIZE)

        def forward(self, x: Tensor) -> Tensor:
            out = self.norm_a(self.a(x))
            return self.head(out + self.norm_b(self.b(out))).flatten(1)

    model = Trunk()
    set_scales(model.norm_a, [0.001, 0.002, 0.5, 0.4])
    set_scales(model.norm_b, [0.4, 0.5, 0.003, 0.001])
    context, chosen = phase_of(model, "mask"), method("masksparsity", threshold=0.01)
    assert chosen.mask(context) == {"scales/marked": 6 / 8}
    assert chosen.alive.tolist() == [False, False, True, False]  # |scales| of 0.503 together, before 0.502
    assert context.said == ["mask: 6 of 8 scales are marked, those of 3 of 4 channels"]


def test_energy_thresholds() -> None:
    assert energy_threshold(torch.tensor([0.5, 0.001, 0.8, 0.002]), 1e-4) == pytest.approx(0.251)
    assert energy_threshold(torch.tensor([0.3, 0.4, 0.5]), 1e-4) == 0
    assert energy_threshold(torch.tensor([9e-4, 1e-5]), 1e-4) == 1
    assert energy_threshold(torch.tensor([0.0, 0.0, 0.5]), 1e-4) == pytest.approx(0.25)


@pytest.mark.parametrize(("options", "kept"), [
    ({"threshold": 0.3}, [[False, False, True, True], [False, False, True]]),  # 0.3 itself goes
    ({"energy": 1e-4}, [[False, False, True, True], [True, True, True]]),
    ({"threshold": 0.3, "round_to": 3}, [[False, True, True, True], [True, True, True]]),
    ({"threshold": 0.3, "exclude": ["0"]}, [[True, True, True, True], [False, False, True]]),
    ({"threshold": 2.0, "least_channels": 2}, [[False, False, True, True], [False, True, True]]),
])  # fmt: skip
def test_scales_up_to_the_threshold_are_marked(options: dict, kept: list[list[bool]]) -> None:
    model = plain(4, 3)
    set_scales(model[1], [0.001, -0.002, -0.5, 0.8])
    set_scales(model[4], [0.1, -0.3, 0.5])
    chosen = method("masksparsity", **options)
    chosen.mask(phase_of(model, "mask"))
    assert chosen.alive.tolist() == kept[0] + kept[1]


def test_the_random_control_draws_as_many_channels_of_each_layer() -> None:
    model, drawn = network("model=resnet20", "model.width=0.5"), []
    channels = channel_map(model, IMAGE_SIZE)
    for control in ("none", "random"):
        chosen = method("masksparsity", threshold=0.8, control=control)
        chosen.mask(phase_of(model, "mask"))
        drawn.append(chosen.alive)
    counts = [[int(alive[lane.classes].sum()) for lane in channels.lanes] for alive in drawn]
    assert counts[0] == counts[1] and not torch.equal(*drawn)


def official_vote(pruned: list[Tensor]) -> Tensor:
    """The second half of the official liu2017, on the members' indicators; True: goes."""
    votes, fewest = torch.stack(pruned).sum(0), min(int(member.sum()) for member in pruned)
    for asked in range(len(pruned), 0, -1):
        candidate = votes >= asked
        if int(candidate.sum()) >= fewest:
            return candidate
    return candidate


@pytest.mark.parametrize("options", [("model=resnet20", "model.width=0.5"), ("model=mobilenet_v2", "model.width=0.25")])
def test_members_share_one_mask_and_no_layer_ends_empty(options: tuple[str, ...]) -> None:
    model = network(*options)
    channels, chosen = channel_map(model, IMAGE_SIZE), method("masksparsity", threshold=0.8)
    scales = {path: norm.weight.detach().abs() for path, norm in norms(model).items()}
    chosen.mask(phase_of(model, "mask"))
    shared = 0
    for lane in channels.lanes:
        members, gone = lane_values(channels, lane, scales), ~chosen.alive[lane.classes]
        shared += len(members) > 1
        assert not gone.all(), lane.name
        expected = official_vote(list(members <= 0.8))
        assert torch.equal(gone, expected) or (expected.all() and int((~gone).sum()) == 1), lane.name
        fewest = int((members <= 0.8).sum(1).min())
        assert int(gone.sum()) >= min(fewest, lane.size - 1), lane.name
    assert shared > 2


# The penalty


def test_the_added_gradient_by_hand() -> None:
    norm = nn.BatchNorm2d(3)
    set_scales(norm, [0.5, -0.2, 0.0])
    norm.weight.grad = torch.zeros(3)
    ScalePenalty(norm, 1e-3, "l1", {"": torch.tensor([False, True, True])}).add(lr=0.1)
    assert torch.equal(norm.weight.grad, torch.tensor([0.0, -1e-3, 0.0]))


def test_kinds_of_penalty() -> None:
    values = torch.tensor([0.5, -0.04, 0.01, 0.0], dtype=torch.float64)
    added = {kind: gradient(values, 0.5, kind, lr=0.1).tolist() for kind in ("l1", "l2", "smooth_l1")}
    assert added["l1"] == [0.5, -0.5, 0.5, 0.0]
    assert added["l2"] == [0.25, -0.02, 0.005, 0.0]
    assert added["smooth_l1"] == [0.5, -0.02, 0.005, 0.0]  # linear below lr x strength = 0.05


def test_gradients_of_unmarked_scales_are_those_of_plain_training_to_the_bit() -> None:
    model = network("model=resnet20", "model.width=0.5")
    backward(model)
    for norm in norms(model).values():
        norm.weight.grad[0] = -0.0
    before, channels = gradients(model), channel_map(model, IMAGE_SIZE)
    chosen, context = method("masksparsity", macs_ratio=0.6, scale_penalty=0.25), phase_of(model, "masked")
    chosen.alive = torch.rand(channels.num_classes, generator=torch.Generator().manual_seed(3)) < 0.7
    chosen.setup(context)
    chosen.after_backward(context, 0)
    kept = 0
    for name, after in gradients(model).items():
        stays = torch.ones_like(after, dtype=torch.bool)
        if (path := name.removesuffix(".weight")) in channels.norms:
            stays = channels.kept(channels.norms[path], chosen.alive)
            moved = (before[name] + 0.25 * model.get_parameter(name).detach().sign())[~stays]
            assert torch.equal(after[~stays], moved)
            kept += int(stays.sum())
        assert torch.equal(bits(after)[stays], bits(before[name])[stays]), name
    assert 0 < kept < sum(len(rows) for rows in channels.norms.values())


@pytest.mark.parametrize(("nesterov", "factor"), [(False, 1), (True, 1.9)])
def test_the_first_step_moves_marked_scales_by_the_penalty(nesterov: bool, factor: float) -> None:
    norm = nn.BatchNorm2d(3)
    set_scales(norm, [0.5, -0.2, 0.7])
    norm.weight.grad = torch.zeros(3)
    optimizer = torch.optim.SGD([norm.weight], lr=0.1, momentum=0.9, nesterov=nesterov)
    ScalePenalty(norm, 0.01, "l1", {"": torch.tensor([True, True, False])}).add(lr=0.1)
    optimizer.step()
    assert torch.allclose(norm.weight, torch.tensor([0.5 - 1e-3 * factor, -0.2 + 1e-3 * factor, 0.7]), atol=1e-8)
    assert norm.weight[2] == torch.tensor(0.7)


def test_steps_until_scales_are_small_and_how_far_they_swing_then() -> None:
    """SGD with Nesterov 0.9, lr 0.1, no other gradient: from 1 below 0.01, which they never leave, nor reach zero."""
    # Step n adds lr x strength x (10 - 9 x 0.9^n), so T steps 10 T - 81 of these: 0.99 is passed at T = 1988.1, ...
    strengths = torch.tensor([5e-4, 2e-4, 1e-4], dtype=torch.float64)
    scales = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.SGD([scales], lr=0.1, momentum=0.9, nesterov=True)
    small, swing = {}, torch.zeros(3, dtype=torch.float64)
    for step in range(1, 10_400):
        scales.grad = gradient(scales.detach(), strengths, "l1", lr=0.1)
        optimizer.step()
        if step in (1988, 1989, 4958, 4959, 9908, 9909):
            small[step] = (scales.detach().abs() < 0.01).tolist()
        if step >= 10_200:
            swing = torch.maximum(swing, scales.detach().abs())
    assert [small[step][index] for index, step in enumerate((1988, 4958, 9908))] == [False] * 3
    assert [small[step][index] for index, step in enumerate((1989, 4959, 9909))] == [True] * 3
    assert 1e-5 < swing[0] <= 9.2e-5 and (swing > 0).all()


# The masks of the official code


@functools.cache
def resnet50() -> tuple[nn.Module, ChannelMap]:
    with torch.device("meta"):
        model = models.build(compose("model=resnet50").model, num_classes=1000, image_size=224)
    return model, channel_map(model, 224)


UNIFORM = dict(stem=43, trunk=(171, 341, 681, 1362), inner=[(43, 43)] * 3 + [(86, 86)] * 4 + [(171, 171)] * 6
               + [(341, 341)] * 3)  # fmt: skip
HALF = dict(stem=61, trunk=(188, 139, 528, 2048), inner=[
    (29, 50), (48, 49), (60, 63), (124, 127), (74, 71), (111, 123), (87, 80), (250, 248), (155, 150), (164, 180),
    (130, 151), (149, 140), (114, 112), (509, 500), (184, 207), (506, 511),
])  # fmt: skip


def kept_channels(channels: ChannelMap, widths: dict) -> list[int]:
    """Return the channels per lane: of the stem, of each stage's trunk, and of both inner layers of each block."""
    blocks = [f"layer{stage}.{index}" for stage, count in enumerate((3, 4, 6, 3), 1) for index in range(count)]
    counts = {"conv1": widths["stem"]} | {f"layer{stage}.0.conv3": n for stage, n in enumerate(widths["trunk"], 1)}
    for block, (first, second) in zip(blocks, widths["inner"], strict=True):
        counts |= {f"{block}.conv1": first, f"{block}.conv2": second}
    assert counts.keys() == {lane.name for lane in channels.lanes}
    return [counts[lane.name] for lane in channels.lanes]


@pytest.mark.parametrize(("widths", "macs", "params"), [
    (UNIFORM, 1_853_261_483, 11_817_195), (HALF, 2_043_216_402, 15_477_796),
], ids=["uniform", "half"])  # fmt: skip
def test_the_official_masks_leave_a_resnet50_of_the_published_size(widths: dict, macs: int, params: int) -> None:
    model, channels = resnet50()
    costs, counts = ChannelCosts(model, channels, profile(model, 224)), kept_channels(channels, widths)
    assert (costs.at("macs", costs.sizes), costs.at("params", costs.sizes)) == (4_089_184_256, 25_557_032)
    assert (costs.at("macs", counts), costs.at("params", counts)) == (macs, params)
    alive = torch.zeros(channels.num_classes, dtype=torch.bool)
    for lane, count in zip(channels.lanes, counts, strict=True):
        alive[lane.classes[:count]] = True
    small = surgery.remove_channels(model, channels, alive)
    assert (dense_macs(profile(small, 224)), count_parameters(small)) == (macs, params)


# Masks from a file


def masked_by(path: Path, content: object, model: nn.Module) -> list[bool]:
    path.write_text(json.dumps(content))
    chosen = method("masksparsity", mask_file=str(path))
    chosen.mask(phase_of(model, "mask"))
    return chosen.alive.tolist()


def test_a_file_says_which_channels_stay(tmp_path: Path) -> None:
    model = plain(3, 2)
    kept = masked_by(tmp_path / "mask.json", {"1": [True, False, True]}, model)
    assert kept == [True, False, True, True, True]  # a norm that is missing keeps all
    chosen = method("masksparsity", mask_file=str(tmp_path / "mask.json"))
    assert [phase.name for phase in chosen.chain()][:3] == ["train", "mask", "masked"]
    other = method("masksparsity", mask_file=str(tmp_path / "copy.json"))
    (tmp_path / "copy.json").write_bytes((tmp_path / "mask.json").read_bytes())
    assert chosen.identity() == other.identity()  # content counts, not the name
    (tmp_path / "copy.json").write_text('{"1": [true, true, false]}')
    assert chosen.identity() != other.identity()


BAD_FILES = {
    "another network": ({"bn9": [True] * 3}, r"mask_file=.*: bn9 is no batch norm of this network"),
    "another shape": (
        {"1": [True, False]}, r"1 has 2 entries, the batch norm has 3 channels; is the mask that of a network that was"
    ),
    "numbers": ({"1": [1, 0, 1]}, r"1 must be a list of true \(stays\) and false"),
    "an empty layer": ({"1": [False] * 3}, r"1 leaves no channel"),
    "a list": ([True], r"must hold a mapping of batch norm"),
    "nothing pruned": ({"1": [True] * 3}, r"method\.mask_file marks no channel that may go$"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_masks_that_do_not_fit_are_refused(case: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[case]
    refused(lambda: masked_by(tmp_path / "mask.json", content, plain(3, 2)), message)


def test_masks_that_are_no_file_or_disagree_are_refused(tmp_path: Path) -> None:
    chosen = method("masksparsity", mask_file=str(tmp_path / "none.json"))
    refused(chosen.identity, r"method\.mask_file=.*none\.json cannot be read: No such file")
    refused(lambda: chosen.layout(phase_of(plain(3, 2), "train")), "cannot be read")
    (tmp_path / "half.json").write_text('{"1": [true')
    refused(lambda: method("masksparsity", mask_file=str(tmp_path / "half.json")).mask(phase_of(plain(3), "mask")),
            "half.json cannot be read")  # fmt: skip
    model = network("model=resnet20", "model.width=0.25")
    disagreeing = {"bn1": [False, True, True, True], "layer1.0.bn2": [True, False, True, True]}
    refused(lambda: masked_by(tmp_path / "mask.json", disagreeing, model),
            "bn1 keeps channels that another batch norm leaves out")
    agreeing = {"bn1": [False, True, True, True], "layer1.0.bn2": [False, True, True, True]}
    assert masked_by(tmp_path / "mask.json", agreeing, model).count(False) == 1


# Options and phases

REFUSED = {
    "two targets": ({"macs_ratio": 0.5, "threshold": 0.01},
                    r"exactly one of method\.macs_ratio, .*method\.energy and method\.mask_file must be set.*; got "
                    r"method\.macs_ratio=0\.5 and method\.threshold=0\.01"),
    "no target": ({}, "exactly one of .* got none"),
    "a threshold below 0": ({"threshold": -0.1}, r"method\.threshold must lie in \[0"),
    "a threshold per layer": ({"threshold": 0.1, "scope": "layer"}, r"method\.threshold goes with method\.scope=glob"),
    "norms of filters": ({"energy": 0.1, "criterion": "l1_norm"}, r"method\.energy goes with method\.criterion=spars"),
    "a file and norms of filters": ({"mask_file": "mask.json", "criterion": "l1_norm"},
                                    r"method\.mask_file goes with method\.criterion=sparsified, got l1_norm"),
    "no penalty": ({"macs_ratio": 0.5, "scale_penalty": 0}, r"method\.scale_penalty must lie in \(0"),
    "no sparsified network": ({"macs_ratio": 0.5, "criterion": "l1_norm", "start": "sparsified"},
                              r"method\.start=sparsified needs the training under the penalty on all scales"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_do_not_go_together_are_refused(case: str) -> None:
    options, message = REFUSED[case]
    refused(lambda: method("masksparsity", **options), message)


@pytest.mark.parametrize("message", unfit())
def test_networks_without_scales_to_train_are_refused(message: str) -> None:
    chosen, model = method("masksparsity", threshold=0.01), unfit()[message]
    refused(lambda: chosen.setup(phase_of(model, "sparsify")), message)
    if "evaluation" not in message:
        refused(lambda: chosen.layout(phase_of(model, "train")), message)


def test_no_training_and_no_small_scale_are_told(tmp_path: Path) -> None:
    config = configure(tmp_path, "masksparsity")
    assert config.schedule.train.epochs == 3
    refused(lambda: configure(tmp_path, "masksparsity", "schedule.train.epochs=0"),
            r"schedule\.train\.epochs=0 does not go with method=masksparsity")
    refused(lambda: method("masksparsity", threshold=0.01).mask(phase_of(plain(4), "mask")),
            r"method\.threshold marks no channel \(the smallest scale is 1\)")


def test_targets_share_the_first_trainings() -> None:
    half, named = method("masksparsity", macs_ratio=0.5), method("masksparsity", threshold=0.01, control="scratch")
    chains = [{phase.name: phase for phase in chosen.chain()} for chosen in (half, named)]
    assert chains[0]["train"] == chains[1]["train"] == TRAIN_DENSE
    identities = [chosen.phase_identity(chain["sparsify"]) for chosen, chain in zip((half, named), chains, strict=True)]
    assert identities[0] == identities[1]
    assert half.phase_identity(chains[0]["mask"]) != named.phase_identity(chains[1]["mask"])
    assert named.phase_identity(chains[1]["masked"])["control"] == "none"  # shared with the method's own run


def results(folder: Path) -> dict[str, dict]:
    return {path.name.partition("-")[2]: checkpoint.load(path / "result.pt") for path in (folder / "phases").iterdir()}


def test_the_training_under_the_mask_starts_as_asked() -> None:
    for start, origin in (("dense", "train"), ("sparsified", None)):
        chosen = method("masksparsity", macs_ratio=0.6, start=start)
        chain = {phase.name: phase for phase in chosen.chain()}
        assert list(chain) == ["train", "sparsify", "mask", "masked", "prune", "remove", "finetune"]
        assert chain["mask"].origin == origin


def test_a_run_marks_starts_again_from_the_dense_network_and_removes_what_was_marked(tmp_path: Path) -> None:
    config = configure(tmp_path, "masksparsity", "method.scale_penalty=0.2", "method.macs_ratio=null",
                       "method.energy=0.3", "schedule.train.epochs=2", "schedule.finetune.epochs=1")
    folder = finish(config)
    found = results(run_folder(config))
    for name, tensor in found["mask"]["model"].items():
        assert torch.equal(tensor, found["train"]["model"][name]), name
    alive = found["mask"]["method"]["alive"]
    assert 0 < int((~alive).sum()) and torch.equal(alive, found["prune"]["method"]["alive"])
    kept = found["prune"]["masks"]["layer2.1.conv1.weight"].flatten(1).any(1)
    assert not kept.all() and found["remove"]["widths"]["layer2.1.conv1"][0] == int(kept.sum())
    scales = found["masked"]["model"]["layer2.1.bn1.weight"].abs()
    assert scales[~kept].max() < scales[kept].min()
    written = summary(folder)
    assert written["macs/inference"] < written["macs/dense"] and written["dense/top1"] is not None
    assert written["prune/removed_scale"] < written["prune/kept_scale"] and 0 < written["scales/marked"] < 1


def test_filter_norms_of_the_dense_network_save_the_first_sparse_training() -> None:
    model = network("model=resnet20", "model.width=0.5")
    chosen = method("masksparsity", macs_ratio=0.6, criterion="l1_norm")
    assert [phase.name for phase in chosen.chain()] == ["train", "mask", "masked", "prune", "remove", "finetune"]
    context = phase_of(model, "mask")
    chosen.mask(context)
    other = method("l1_filter", macs_ratio=0.6, scope="global")
    assert torch.equal(chosen.alive, other.choose(context, Problem(other, context)))
