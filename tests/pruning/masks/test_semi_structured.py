"""2:4 sparsity: hand-computed groups, invariants of every method that has it, and options that do not go with it."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import typing
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from prune_lab import models
from prune_lab.accounting.eligibility import has_groups, select_layers
from prune_lab.compose.overrides import compose_checked
from prune_lab.core.context import Context
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.seeding import generator
from prune_lab.pipeline import runner
from prune_lab.pruning.masks import top_k
from prune_lab.pruning.masks.semi_structured import (
    from_groups,
    grow,
    is_semi_structured,
    keep_top,
    pack,
    random_mask,
    to_groups,
    unpack,
)
from prune_lab.training.loop import TrainState
from tests.helpers.method_runs import (
    CONF,
    NAMES,
    TINY,
    configure,
    finish,
    last_result,
    make,
    method_class,
    option_names,
    run_folder,
    summary,
    watch,
)
from tests.helpers.toys import OneLayer, mask_of, one_step, open_phase

METHODS = [
    name for name in NAMES
    if "2:4" in typing.get_args(typing.get_type_hints(method_class(name).Config).get("distribution"))
]  # fmt: skip
GRADUAL = ("gmp", "lottery", "synflow")
"""methods that keep more than two of four on their way"""


def row(*scores: float) -> Tensor:
    """Return the scores of one output channel."""
    return torch.tensor([scores])


def ints(mask: Tensor) -> list:
    return mask.int().tolist()


def per_group(mask: Tensor) -> set[int]:
    """Return how many weights the groups keep."""
    return set(to_groups(mask).sum(-1).flatten().tolist())


# Choosing


def test_groups_are_four_input_channels_at_one_place_of_the_kernel() -> None:
    weight = torch.arange(2 * 8 * 3 * 3).view(2, 8, 3, 3)
    for layout in (weight, weight.contiguous(memory_format=torch.channels_last)):
        groups = to_groups(layout)
        assert groups.shape == (2, 2, 3, 3, 4)
        assert torch.equal(groups[1, 0, 2, 1], weight[1, :4, 2, 1])
        assert torch.equal(groups[0, 1, 0, 2], weight[0, 4:, 0, 2])
        assert torch.equal(from_groups(groups), weight)
    assert [has_groups(shape) for shape in ((8, 3, 3, 3), (8, 1, 3, 3), (8, 6), (8, 4), (8, 12, 1, 1), (8,))] == [
        False, False, False, True, True, False,
    ]  # fmt: skip


def test_best_two_of_each_group_stay_and_ties_go_to_the_lower_channel() -> None:
    score = row(4, 1, 3, 2, 5, 5, 5, 5, 0, 9, 0, 0)
    assert ints(keep_top(score, 6)) == [[1, 0, 1, 0, 1, 1, 0, 0, 1, 1, 0, 0]]


def test_more_than_half_goes_to_the_best_of_what_is_left() -> None:
    score = row(4, 1, 3, 2, 5, 5, 5, 5)
    assert ints(keep_top(score, 5)) == [[1, 0, 1, 0, 1, 1, 1, 0]]
    assert ints(keep_top(score, 7)) == [[1, 0, 1, 1, 1, 1, 1, 1]]
    assert keep_top(score, 8).all()


def test_candidates_come_before_all_others() -> None:
    candidates = row(1, 0, 1, 1, 0, 1, 0, 1).bool()
    score = row(1, float("nan"), 2, 3, 9, -float("inf"), 9, 0)
    assert ints(keep_top(score, 4, candidates=candidates)) == [[0, 0, 1, 1, 0, 1, 0, 1]]
    assert torch.equal(keep_top(score, 5, candidates=candidates), candidates)


def test_each_group_grows_what_it_lost() -> None:
    kept = row(1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0).bool()
    score = row(0, 2, 7, 7, 1, 4, 3, 4, 9, 9, 9, 9)
    assert ints(grow(kept, score, 6)) == [[1, 0, 1, 0, 0, 1, 0, 1, 1, 0, 1, 0]]
    assert ints(grow(kept, score, 7)) == [[1, 0, 1, 0, 0, 1, 0, 1, 1, 1, 1, 0]]


@pytest.mark.parametrize(
    ("score", "num_keep", "candidates", "words"),
    [
        (row(1, 2, float("nan"), 4), 2, None, "NaN at a candidate"),
        (row(1, 2, 3, 4), 1, None, "cannot keep 1 of 4 weights with two in every group"),
        (row(1, 2, 3, 4), 5, None, "cannot keep 3 of 2 candidates"),
        (row(1, 2, 3, 4), 2, row(0, 0, 1, 0).bool(), "fewer than two candidates"),
    ],
)
def test_impossible_choices_raise(score: Tensor, num_keep: int, candidates: Tensor | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        keep_top(score, num_keep, candidates=candidates)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 8), (5, 12, 3, 3), (4, 16, 1, 1)])
def test_choice_equals_a_stable_sort_of_each_group(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    score = torch.randint(0, 6, shape, generator=generator(0, "scores")).to(dtype)  # many ties
    order = to_groups(score).sort(dim=-1, descending=True, stable=True).indices
    wanted = torch.zeros(order.shape, dtype=torch.bool).scatter_(-1, order[..., :2], True)
    assert torch.equal(to_groups(keep_top(score, score.numel() // 2)), wanted)
    if len(shape) == 4:
        as_stored = score.contiguous(memory_format=torch.channels_last)
        assert torch.equal(to_groups(keep_top(as_stored, score.numel() // 2)), wanted)


@pytest.mark.parametrize("extra", [0, 1, 17, 40])
def test_rounds_shrink_within_one_another(extra: int) -> None:
    score = torch.rand(8, 16, 3, 3, generator=generator(0, "rounds"))
    half = score.numel() // 2
    wide = keep_top(score, half + 2 * extra)
    narrow = keep_top(score, half + extra, candidates=wide)
    assert int(wide.sum()) == half + 2 * extra and int(narrow.sum()) == half + extra
    assert not (narrow & ~wide).any() and min(per_group(narrow)) >= 2
    assert torch.equal(keep_top(score, half, candidates=narrow), keep_top(score, half))


def test_random_masks_draw_all_six_pairs_alike() -> None:
    mask = random_mask((64, 600), 64 * 300, generator(3))
    pairs = Counter(map(tuple, to_groups(mask).reshape(-1, 4).int().tolist()))
    assert len(pairs) == 6 and all(1450 < count < 1750 for count in pairs.values())  # 1600, 4 sigma 146
    assert torch.equal(mask, random_mask((64, 600), 64 * 300, generator(3)))


# What the kernels take


def test_packed_weights_hold_two_values_and_their_places() -> None:
    weight = row(0, 1.5, 0, -2, 7, 0, 0, 0, 0, 0, 0, 0)
    values, places = pack(weight)
    assert values.tolist() == [[1.5, -2, 7, 0, 0, 0]]
    assert places.tolist() == [[1 | 3 << 2, 0 | 1 << 2, 0 | 1 << 2]]
    assert torch.equal(unpack(values, places), weight)
    with pytest.raises(ValueError, match="not 2:4"):
        pack(row(1, 2, 3, 0))


@pytest.mark.parametrize("shape", [(6, 8), (5, 12, 3, 3), (4, 16, 1, 1)])
def test_packing_and_unpacking_gives_the_weights_back(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=generator(0, "weights"))
    weight *= keep_top(weight.abs(), weight.numel() // 2)
    values, places = pack(weight)
    assert values.shape == (shape[0], shape[1] // 2, *shape[2:]) and places.shape[1] == shape[1] // 4
    assert torch.equal(unpack(values, places), weight)
    assert is_semi_structured(weight) and not is_semi_structured(weight + 1)


def test_packed_values_are_those_of_pytorch() -> None:
    conversions = pytest.importorskip("torch.sparse._semi_structured_conversions", reason="not in this PyTorch")
    weight = torch.randn(64, 128, generator=generator(0, "kernels")).bfloat16()
    weight *= keep_top(weight.abs(), weight.numel() // 2)
    values, meta = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(pack(weight)[0], values)
    assert torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(values, meta), unpack(*pack(weight)))


# Layers and options


def test_layers_without_groups_stay_dense_with_the_reason() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 6, 1),
        nn.Flatten(), nn.Linear(6, 4), nn.Linear(4, 2),
    )  # fmt: skip
    layers = {layer.name: layer for layer in select_layers(model, grouped=True)}
    assert [name for name, layer in layers.items() if layer.eligible] == ["2", "3", "6"]
    assert layers["0"].reason == "3 input channels are no multiple of 4 (2:4)"
    assert layers["5"].reason == "6 input channels are no multiple of 4 (2:4)"
    assert "depthwise" in layers["1"].reason
    with pytest.raises(UserError, match=r"distribution=2:4: no layer that may be pruned has a multiple of 4"):
        select_layers(model[:1], grouped=True)


@pytest.mark.parametrize(
    "name", ["resnet20", "resnet50", "vgg16", "mobilenet_v2", "mobilenet_v3_small", "wrn_28_10"]
)
def test_half_of_every_eligible_layer_is_kept_whatever_the_network(name: str) -> None:
    (config,) = compose_checked(CONF, [f"model={name}", "dataset=imagenet", "dataset.root=none"], sweep=False)
    model = models.build_on_meta(config.model, num_classes=1000, image_size=224)
    method = make("gmp", distribution="2:4", sparsity=0.5)
    layers = method.layers(model)
    context = Context(model=model, costs=[], layers=layers, phase="", seed=0, total_steps=0, steps_per_epoch=0)
    sizes = {layer.parameter: layer.size for layer in layers if layer.eligible}
    assert method.allocate(context, 0.5) == {path: size // 2 for path, size in sizes.items()}
    assert sum(sizes.values()) > 0.8 * sum(layer.size for layer in layers if layer.kind != "depthwise conv")


def test_training_can_be_as_long_as_a_reference_s(tmp_path: Path) -> None:
    options = ("method.match=train_macs", "method.match_to=1:uniform", "method.match_by=epochs")
    folder = finish(configure(tmp_path, "static", "method.distribution=2:4", "method.sparsity=0.5", *options))
    written = summary(folder)
    assert written["match/epochs"] == 6 and written["sparsity/achieved"] == 0.5  # half the cost, but for the rest


def test_all_methods_with_budgets_per_layer_have_it() -> None:
    with_budgets = {name for name in NAMES if "distribution" in option_names(name)}
    assert set(METHODS) == with_budgets >= {"magnitude", "rigl", "gmp", "lottery", "snip", "autosparse_topk"}


def compose(name: str, *overrides: str, conf: Path = CONF) -> typing.Any:
    (config,) = compose_checked(conf, [*TINY, f"method={name}", *overrides], sweep=False)
    return config.method


def test_command_line_takes_it_as_it_is_written() -> None:
    assert compose("static", "method.distribution=2:4", "method.sparsity=0.5").distribution == "2:4"


@pytest.mark.parametrize("written", ['"2:4"', "2:4"])
def test_recipes_need_quotes(written: str, tmp_path: Path) -> None:
    shutil.copytree(CONF, tmp_path / "conf")
    recipe = tmp_path / "conf" / "experiment" / "halved.yaml"
    recipe.write_text(f"# @package _global_\nmethod:\n  sparsity: 0.5\n  distribution: {written}\n")
    if written.startswith('"'):
        assert compose("static", "experiment=halved", conf=tmp_path / "conf").distribution == "2:4"
        return
    with pytest.raises(UserError) as caught:
        compose("static", "experiment=halved", conf=tmp_path / "conf")
    assert "method.distribution=124 is not allowed (YAML reads 2:4 so; write it in quotes: '2:4')" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("magnitude", ("method.sparsity=0.9",), r"method\.sparsity must be 0\.5 with .*=2:4, got 0\.9"),
        ("lottery", ("method.sparsity=null",), r"method\.sparsity must be 0\.5 with .*=2:4, got null"),
        ("lottery", ("method.arm=random-global",), r"method\.arm=random-global .*use random-layerwise"),
        ("gmp", ("method.first_layer=sparse",), r"method\.first_layer must be auto with .*=2:4, got sparse"),
        ("rigl", ("method.include=[a,b]",), r"method\.include must be \[\] with .*=2:4, got \[a,b\]"),
        ("set", ("method.power=2",), r"method\.power=2 is for er and erk; with 2:4"),
        ("snip", ("method.min_per_layer=3",), r"method\.min_per_layer=3 is for distribution=global; with 2:4"),
        ("static", ("method.densities=file.yaml",), r"method\.densities=FILE goes with .*distribution=file, got 2:4"),
        ("rigl", ("method.redistribution=gradient",), r"method\.redistribution must be none with .*=2:4"),
        ("snfs", (), r"method\.redistribution must be none with .*=2:4"),
        (
            "magnitude", ("method.match=macs", "method.match_to=0.5:uniform"),
            r"method\.match_by=density: method\.distribution=2:4 fixes the densities",
        ),
    ],
)
def test_options_that_do_not_go_with_it_are_refused(name: str, options: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        compose(name, "method.distribution=2:4", "method.sparsity=0.5", *options)
    assert "\n" not in str(caught.value)


# Methods


def test_rigl_moves_weights_within_their_groups() -> None:
    weight = torch.tensor([[0.9, -0.1, 0, 0, 0.5, 0, 0.6, 0], [0, 0, 0.05, 0.4, -0.7, 0.8, 0, 0]])
    gradient = torch.tensor([[0, 0.1, 0.2, -0.3, 0, 9, 0, 9], [0.9, -0.1, 0.2, 0, 0, 9, 9, 0]])
    method = make("rigl", distribution="2:4", sparsity=0.5, alpha=0.25, decay="constant", interval=5, begin=5)
    context = open_phase(OneLayer(weight), method, masks={"fc.weight": weight != 0})
    context.parameters()["fc.weight"].grad = gradient
    assert not one_step(context, method, 5)
    # Of eight weights the two smallest leave, -0.1 and 0.05; each group takes its largest gradient, not the nines.
    assert mask_of(context) == [[1, 0, 0, 1, 1, 0, 1, 0], [1, 0, 0, 1, 1, 1, 0, 0]]


def test_gradual_cuts_keep_two_of_four_on_their_way() -> None:
    weight = torch.tensor([[8.0, 7, 6, 5, 1, 2, 3, 4]])
    method = make("gmp", distribution="2:4", sparsity=0.5, initial_sparsity=0.25, num_cuts=1, begin=0, end=0.5)
    context = open_phase(OneLayer(weight), method)
    seen = []
    for step in range(10):
        context.optimizer.zero_grad()
        one_step(context, method, step)
        seen.append(mask_of(context)[0])
    # The smallest two of all first (1 and 2), then those of the other group although 3 and 4 are smaller.
    assert seen[0] == [1, 1, 1, 1, 0, 0, 1, 1] and seen[-1] == [1, 1, 0, 0, 0, 0, 1, 1]


def awkward(name: str) -> tuple[str, ...]:
    """Return options of a run in which hidden momentum or decay would show."""
    options = ["method.distribution=2:4", "method.sparsity=0.5", "optimizer.nesterov=true", "trainer.clip_norm=1",
               "optimizer.weight_decay=0.05", "trainer.ema_decay=0.8"]  # fmt: skip
    extra = {
        "snfs": ["method.redistribution=none"],
        "lottery": ["method.arm=IMP-rewind", "method.rewind_to=4it", "method.fraction=0.3"],
        "synflow": ["method.rounds=5"],
    }
    return (*options, *extra.get(name, []))


def assert_two_of_four(training: TrainState, *, exactly: bool) -> None:
    context = training.context
    assert context.masks is not None or not exactly
    for path, mask in ({} if context.masks is None else context.masks.masks).items():
        assert per_group(mask) == {2} if exactly else min(per_group(mask)) >= 2, path
        for parameters in (dict(training.evaluated.named_parameters()), context.parameters()):
            assert not parameters[path][~mask].any(), path


# Every run takes part of a second and is done once more with three stops; half of them with -m slow only.
@pytest.mark.thin(4)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (index % 5 > 0)) for index, name in enumerate(METHODS)]
)
def test_two_of_four_stay_in_every_step_and_a_resumed_run_is_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    stops: set[int] = set()

    def look(training: TrainState, step: int) -> None:
        waits = name in GRADUAL or training.context.phase == "train" and not training.method.chain()[0].active
        assert_two_of_four(training, exactly=not waits)
        steps.append(step)
        if len(steps) in stops:
            monkeypatch.setattr(training, "stop", lambda: True)

    watch(monkeypatch, look)
    straight = finish(configure(tmp_path / "straight", name, *awkward(name)))
    result, num_steps = last_result(straight), len(steps)
    assert all(per_group(mask) == {2} for mask in result["masks"].values())
    assert all(not result["model"][path][~mask].any() for path, mask in result["masks"].items())
    assert summary(straight)["sparsity/achieved"] == summary(straight)["sparsity/requested"] == 0.5

    stops = set(random.Random(name).sample(range(1, num_steps), 3))
    steps.clear()
    codes = [1]
    while codes[-1]:
        codes.append(runner.run(configure(tmp_path / "resumed", name, *awkward(name))))
    assert len(codes) > 3 and len(steps) == num_steps  # a stop at a phase's last step stops nothing
    resumed = run_folder(configure(tmp_path / "resumed", name, *awkward(name)))
    for part in ("masks", "model"):
        ours, theirs = last_result(resumed)[part], result[part]
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[path], theirs[path]) for path in theirs)


def test_structured_rigl_keeps_whole_kernels(tmp_path: Path) -> None:
    folder = finish(configure(tmp_path, "rigl_structured", *awkward("rigl_structured")))
    for mask in last_result(folder)["masks"].values():
        assert set(mask.flatten(2).sum(-1).flatten().tolist()) <= {0, mask[0, 0].numel()}


def test_random_layerwise_tickets_are_shuffled_within_groups(tmp_path: Path) -> None:
    options = ("method.arm=random-layerwise", "method.sparsity=0.5", "method.distribution=2:4", "method.fraction=0.5")
    result = last_result(finish(configure(tmp_path, "lottery", *options)))
    assert all(per_group(mask) == {2} for mask in result["masks"].values())


@pytest.mark.parametrize("control", ["shuffle", "invert", "random"])
def test_controls_keep_two_of_four(control: str, tmp_path: Path) -> None:
    options = ("method.distribution=2:4", "method.sparsity=0.5", f"method.control={control}")
    assert runner.run(configure(tmp_path, "magnitude_init", *options)) == 0
    (path,) = tmp_path.glob("*/layers.json")
    assert all(per_group(mask) == {2} for mask in last_result(path.parent)["masks"].values())
    assert {layer["density"] for layer in json.loads(path.read_text()) if layer["eligible"]} == {0.5}


def test_a_mask_by_magnitude_is_the_best_of_all_of_its_kind() -> None:
    score = torch.rand(2, 4, generator=generator(1, "best"))
    kept = float(score[keep_top(score, 4)].sum())
    pairs = [torch.tensor(pair) for pair in itertools.combinations(range(4), 2)]
    assert kept == pytest.approx(max(float(score[0, a].sum() + score[1, b].sum()) for a in pairs for b in pairs))
    assert kept <= float(score[top_k.keep_top(score, 4)].sum()) + 1e-6
