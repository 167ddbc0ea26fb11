"""Lottery tickets: which weights go in each round, where the rest starts again, and what runs share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from prune_lab.cli import command as cli
from prune_lab.config.time import parse_time
from prune_lab.foundations import checkpoint
from prune_lab.foundations.errors import UserError
from prune_lab.methods.lottery import ARMS
from prune_lab.pipeline import runner, stored_phases
from prune_lab.pruning.scores.weight_overlap import overlap_of_largest
from prune_lab.training.loop import TrainState
from tests.helpers.contexts import context_of
from tests.helpers.method_runs import configure, finish, last_result, make, run_folder, summary, watch

# The cut


def one_layer(*weights: float) -> nn.Module:
    layer = nn.Sequential(nn.Flatten(), nn.Linear(len(weights), 1, bias=False))
    layer[1].weight.data = torch.tensor([weights])
    return layer


def cut(model: nn.Module, method, level: int, width: int, masks: dict | None = None) -> torch.Tensor:
    """Return the mask after pruning round `level`."""
    context = context_of(model, masks or {}, 1, channels=width)
    context.phase = f"prune_{level}"
    method.prune(context)
    return context.masks.masks["1.weight"].flatten()


def test_rounds_remove_exactly_the_rounded_fraction_of_the_survivors() -> None:
    method = make("lottery", levels=2)
    model = one_layer(0.9, -0.1, 0.5, 0.05, -0.7)
    assert cut(model, method, 1, 5).tolist() == [True, True, True, False, True]
    model[1].weight.data = torch.tensor([[0.8, -0.2, 0.1, 0.0, -0.6]])
    mask = {"1.weight": torch.tensor([[True, True, True, False, True]])}
    assert cut(model, method, 2, 5, mask).tolist() == [True, True, False, False, True]


def test_kept_counts_of_a_thousand_weights() -> None:
    """open_lth removes one more per round: 799, 638, 509 ..."""
    context = context_of(one_layer(*[1.0] * 1000), {}, 1, channels=1000)
    method = make("lottery", levels=5)
    assert [method.counts_at(context, level)["all"] for level in range(1, 6)] == [800, 640, 512, 410, 328]
    at_once = make("lottery", levels=5, arm="LT-OMP")
    assert at_once.counts_at(context, 5) == {"all": 328}


def test_equal_weights_go_from_the_end() -> None:
    assert cut(one_layer(*[1.0] * 5), make("lottery", levels=1), 1, 5).tolist() == [True] * 4 + [False]


@pytest.mark.parametrize(
    ("sparsity", "rounds"), [(0.2, 1), (0.5904, 4), (0.83222784, 8), (0.832, 8), (0.9, 11), (0.956, 14)]
)
def test_rounds_that_a_target_needs(sparsity: float, rounds: int) -> None:
    assert make("lottery", sparsity=sparsity).levels == rounds


def test_the_last_round_prunes_less_to_meet_the_target() -> None:
    context = context_of(one_layer(*[1.0] * 1000), {}, 1, channels=1000)
    method = make("lottery", sparsity=0.5)
    assert [method.counts_at(context, level)["all"] for level in range(1, 5)] == [800, 640, 512, 500]


def test_a_target_just_beyond_whole_rounds_never_asks_for_more_than_is_left() -> None:
    """Two rounds leave 30 + 4 + 5 of 48 + 6 + 7 weights; equal shares of 39 would be 31 in the first layer."""
    sizes, left = {"a": 48, "b": 6, "c": 7}, {"a": 30, "b": 4, "c": 5}
    method = make("lottery", sparsity=0.3601, distribution="uniform")
    assert method.levels == 3 and method._at_target(left, sizes) == {"a": 30, "b": 4, "c": 5}


def test_a_target_that_rounding_has_passed_already_is_refused() -> None:
    context = context_of(one_layer(*[1.0] * 48), {}, 1, channels=48)  # 38, 30, 24; 0.512 * 48 is 24.6
    assert make("lottery", levels=3).counts_at(context, 3) == {"all": 24}
    with pytest.raises(UserError, match="method.sparsity=0.4881 is what 3 rounds leave .* use method.levels=3"):
        make("lottery", sparsity=0.4881).layout(context)


# The chain


def names(**options) -> list[str]:
    return [phase.name for phase in make("lottery", **options).chain()]


def test_chains_of_the_arms() -> None:
    imp = ["early", "train", "prune_1", "rewind_1", "train_1", "prune_2"]
    assert names(levels=2) == [*imp, "rewind_2", "train_2"]
    assert names(levels=2, arm="RR-IMP") == [*imp, "reinit_2", "train_2"]
    assert names(levels=2, arm="random-global") == [*imp, "shuffle_2", "train_2"]
    assert names(levels=2, arm="LT-OMP") == ["early", "train", "prune_2", "rewind_2", "train_2"]
    assert names(levels=2, arm="LR-rewinding-IMP") == ["train", "prune_1", "train_1", "prune_2", "train_2"]
    assert names(levels=2, arm="fine-tune-IMP") == ["train", "prune_1", "finetune_1", "prune_2", "finetune_2"]
    assert names(levels=2, arm="fine-tune-OMP") == ["train", "prune_2", "finetune_2"]
    assert names(levels=0) == ["train"]
    assert names(levels=0, copy=1) == ["early", "train_0"]
    zero = {"arm": "IMP-rewind", "rewind_to": "4it", "optimizer_state": "zero"}
    assert names(levels=0, copy=1, **zero) == ["early", "rewind_0", "train_0"]


def test_schedules_start_again_where_the_arm_says() -> None:
    def begin(arm: str) -> str:
        last = make("lottery", levels=2, arm=arm, rewind_to="8ep").chain()[-1]
        return f"{last.schedule} from {last.begin.count if last.begin else 0:g}"

    for arm in ("IMP-rewind", "OMP-rewind", "LR-rewinding-IMP", "LR-rewinding-OMP", "random-layerwise"):
        assert begin(arm) == "train from 8"
    rounds = make("lottery", levels=2, arm="RR-IMP", rewind_to="8ep").chain()
    begins = {phase.name: phase.begin and phase.begin.count for phase in rounds}
    assert (begins["train_1"], begins["train_2"]) == (8, None)
    for arm in ("LT-IMP", "RR-IMP", "LT-OMP", "RR-OMP"):
        last = make("lottery", levels=2, arm=arm).chain()[-1]
        assert (last.schedule, last.begin) == ("train", None)
    assert make("lottery", levels=2, arm="fine-tune-IMP").chain()[-1].schedule == "finetune"


@pytest.mark.thin(4)
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_runs_to_its_sparsity_and_says_which_it_is(arm: str, tmp_path: Path) -> None:
    folder = finish(configure(tmp_path, "lottery", "method.levels=2", f"method.arm={arm}", short={}))
    written = summary(folder)
    assert written["lottery/arm"] == arm and written["lottery/levels"] == 2
    total = sum(mask.numel() for mask in last_result(folder)["masks"].values())
    kept = total - round(0.2 * total)
    kept -= round(0.2 * kept)
    assert sum(int(mask.sum()) for mask in last_result(folder)["masks"].values()) == kept
    assert written["sparsity/achieved"] == 1 - kept / total


def test_a_run_of_shared_phases_says_its_own_arm_and_rounds(tmp_path: Path) -> None:
    said = []
    for options in (("method.levels=2",), ("method.levels=1",), ("method.levels=1", "method.arm=LT-OMP")):
        before = set(tmp_path.glob("*/summary.json"))
        assert runner.run(configure(tmp_path, "lottery", *options, short={})) == 0
        (path,) = set(tmp_path.glob("*/summary.json")) - before
        said.append((summary(path.parent)["lottery/arm"], summary(path.parent)["lottery/levels"]))
    assert said == [("LT-IMP", 2), ("LT-IMP", 1), ("LT-OMP", 1)]


# Rewinding


def stored(folder: Path, phase: str) -> dict:
    (path,) = (folder / "phases").glob(f"*-{phase}")
    return checkpoint.load(path / "result.pt")


def test_the_early_network_is_the_dense_training_at_that_step(tmp_path: Path, monkeypatch) -> None:
    seen: dict[str, torch.Tensor] = {}

    def look(training: TrainState, step: int) -> None:
        if training.context.phase == "train" and step == 3:  # four are done
            seen.update({name: tensor.clone() for name, tensor in training.context.model.state_dict().items()})

    watch(monkeypatch, look)
    folder = finish(
        configure(tmp_path, "lottery", "method.levels=1", "method.arm=IMP-rewind", "method.rewind_to=4it", short={})
    )
    early = stored(folder, "early")
    assert seen and all(torch.equal(early["model"][name], tensor) for name, tensor in seen.items())
    assert any(bool(state["momentum_buffer"].any()) for state in early["optimizer"]["state"].values())


def test_every_round_restores_the_momentum_of_the_early_network(tmp_path: Path) -> None:
    options = ("method.levels=2", "method.arm=IMP-rewind", "method.rewind_to=4it")
    folder = finish(configure(tmp_path, "lottery", *options, short={}))
    early = stored(folder, "early")["optimizer"]["state"]
    for phase in ("rewind_1", "rewind_2"):  # the training between the two must not move what the second restores
        state = stored(folder, phase)["optimizer"]["state"]
        assert state.keys() == early.keys()
        assert all(torch.equal(state[key]["momentum_buffer"], early[key]["momentum_buffer"]) for key in early)


@pytest.mark.parametrize("place", ["4it", "1ep", "0ep"])
def test_a_round_starts_from_the_masked_early_network(place: str, tmp_path: Path, monkeypatch) -> None:
    first: dict[str, list] = {}

    def look(training: TrainState, step: int) -> None:
        first.setdefault(training.context.phase, []).append(step)

    watch(monkeypatch, look)
    options = ("method.levels=2", "method.arm=IMP-rewind", f"method.rewind_to={place}")
    folder = finish(configure(tmp_path, "lottery", *options, "trainer.ema_decay=0.8", short={}))
    early = stored(folder, "early")
    for level in (1, 2):
        start, masks = stored(folder, f"rewind_{level}"), stored(folder, f"prune_{level}")["masks"]
        for name, tensor in early["model"].items():
            wanted = tensor * masks[name] if name in masks else tensor
            assert torch.equal(start["model"][name], wanted), name
        assert all(torch.equal(start["masks"][name], mask) for name, mask in masks.items())
    begin = {"4it": 4, "1ep": 3, "0ep": 0}[place]
    assert first["train_1"] == first["train_2"] == list(range(begin, 9))
    assert first["train"] == list(range(9))


def test_the_cost_counts_the_steps_before_the_rewinding_point_once(tmp_path: Path) -> None:
    options = ("method.levels=1", "method.arm=IMP-rewind", "method.rewind_to=4it")
    written = summary(finish(configure(tmp_path, "lottery", *options, short={})))
    dense, sparse = written["macs/dense"], written["macs/inference"]
    assert written["macs/train"] == 3 * 8 * (9 * dense + 5 * sparse)


@pytest.mark.parametrize(
    "options",
    [("arm=IMP-rewind", "levels=1"), ("arm=random-global", "levels=1"), ("arm=IMP-rewind", "levels=0", "copy=1")],
)
def test_optimizer_state_after_rewinding(options: tuple[str, ...], tmp_path: Path, monkeypatch) -> None:
    """Both choices share one folder: what differs in this option alone must not share the phases after it."""
    norms: list[float] = []
    original = stored_phases.perform

    def perform(task):
        if task.phase.begin is not None:
            states = (task.previous.optimizer or {"state": {}})["state"].values()
            norms.append(sum(float(state["momentum_buffer"].norm()) for state in states))
        return original(task)

    monkeypatch.setattr(stored_phases, "perform", perform)
    for choice in ("restore", "zero"):
        typed = [f"method.{option}" for option in (*options, "rewind_to=4it", f"optimizer_state={choice}")]
        assert runner.run(configure(tmp_path, "lottery", *typed, short={})) == 0
    assert norms[0] > 0 and norms[1:] == [0]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_running_means_of_pruned_weights_stay_zero(optimizer: str, tmp_path: Path, monkeypatch) -> None:
    checked = []

    def look(training: TrainState, step: int) -> None:
        context = training.context
        for name, mask in ({} if context.masks is None else context.masks.masks).items():
            state = context.optimizer.state[context.parameters()[name]]
            means = [value for value in state.values() if value.shape == mask.shape]
            assert means and not any(value[~mask].any() for value in means)
            checked.append(name)

    watch(monkeypatch, look)
    options = ("method.levels=2", "method.arm=IMP-rewind", "method.rewind_to=4it", f"optimizer={optimizer}")
    finish(configure(tmp_path, "lottery", *options, short={}))
    assert checked


def test_lr_rewinding_keeps_the_trained_weights(tmp_path: Path) -> None:
    folder = finish(configure(tmp_path, "lottery", "method.levels=1", "method.arm=LR-rewinding-OMP", short={}))
    trained, cut_down = stored(folder, "train")["model"], stored(folder, "prune_1")
    for name, tensor in trained.items():
        mask = cut_down["masks"].get(name)
        assert torch.equal(cut_down["model"][name], tensor if mask is None else tensor * mask)


def test_lr_rewinding_without_epochs_is_magnitude_pruning(tmp_path: Path) -> None:
    options = ("method.sparsity=0.8", "method.arm=fine-tune-OMP", "schedule.finetune.epochs=0")
    ours = finish(configure(tmp_path / "a", "lottery", *options, short={}))
    theirs = finish(configure(tmp_path / "b", "magnitude", "schedule.finetune.epochs=0", short={"sparsity": 0.8}))
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()


def test_a_rewound_ticket_and_its_control_share_the_mask(tmp_path: Path) -> None:
    """The definition compares one mask with two starts."""
    masks = []
    for arm in ("IMP-rewind", "RR-IMP"):
        options = ("method.levels=2", "method.rewind_to=4it", f"method.arm={arm}")
        masks.append(last_result(finish(configure(tmp_path / arm, "lottery", *options, short={})))["masks"])
    assert all(torch.equal(masks[0][name], mask) for name, mask in masks[1].items())


def test_random_reinitialisation_keeps_the_mask_and_changes_every_layer(tmp_path: Path) -> None:
    options = ("method.levels=2", "method.arm=RR-IMP")
    folder = finish(configure(tmp_path, "lottery", *options, short={}))
    start, masks, early = stored(folder, "reinit_2"), stored(folder, "prune_2")["masks"], stored(folder, "early")
    assert all(torch.equal(start["masks"][name], mask) for name, mask in masks.items())
    for name, mask in masks.items():
        assert not start["model"][name][~mask].any()
        assert not torch.equal(start["model"][name], early["model"][name] * mask)


@pytest.mark.parametrize("arm", ["random-layerwise", "random-global"])
def test_random_masks_keep_counts_and_start_early(arm: str, tmp_path: Path) -> None:
    folder = finish(configure(tmp_path, "lottery", "method.levels=2", f"method.arm={arm}", short={}))
    start, ticket, early = stored(folder, "shuffle_2"), stored(folder, "prune_2")["masks"], stored(folder, "early")
    counts = [{name: int(mask.sum()) for name, mask in masks.items()} for masks in (start["masks"], ticket)]
    assert sum(counts[0].values()) == sum(counts[1].values())
    assert (counts[0] == counts[1]) == (arm == "random-layerwise")
    assert any(not torch.equal(start["masks"][name], mask) for name, mask in ticket.items())
    assert all(torch.equal(start["model"][name], early["model"][name] * mask) for name, mask in start["masks"].items())


def test_copies_differ_in_nothing_but_the_order_of_the_last_training(tmp_path: Path) -> None:
    ends = []
    for copy in (0, 1, 2):
        config = configure(tmp_path / str(copy), "lottery", "method.levels=1", f"method.copy={copy}", short={})
        folder = finish(config)
        ends.append((stored(folder, "rewind_1")["model"], last_result(folder)["model"]))
    for start, _ in ends[1:]:
        assert all(torch.equal(tensor, ends[0][0][name]) for name, tensor in start.items())
    assert len({float(end["conv1.weight"].sum()) for _, end in ends}) == 3


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> dict:
    options = ("method.levels=2", "method.arm=IMP-rewind", "method.rewind_to=4it")
    return last_result(finish(configure(tmp_path_factory.mktemp("usual"), "lottery", *options, short={})))["model"]


@pytest.mark.thin(4)
@pytest.mark.parametrize(
    "option",
    ["arm=OMP-rewind", "levels=3", "fraction=0.3", "distribution=uniform", "rewind_to=5it", "optimizer_state=zero",
     "copy=1", "exclude=[conv1]"],
)  # fmt: skip
def test_every_option_changes_the_run(option: str, usual: dict, tmp_path: Path) -> None:
    options = ("method.levels=2", "method.arm=IMP-rewind", "method.rewind_to=4it", f"method.{option}")
    changed = last_result(finish(configure(tmp_path, "lottery", *options, short={})))["model"]
    assert any(not torch.equal(changed[name], tensor) for name, tensor in usual.items())


# Sharing


def test_levels_arms_and_dense_training_share_their_phases(tmp_path: Path) -> None:
    for level in (1, 2, 3):
        assert runner.run(configure(tmp_path, "lottery", f"method.levels={level}", short={})) == 0
    trained = [path for path in (tmp_path / "phases").iterdir() if not path.name.startswith(".")]
    assert len(trained) == 2 + 3 * 3  # early, train, and three per round; 5 + 8 + 11 = 24 without sharing
    for overrides, new in (
        (("method=dense",), 0),
        (("method=lottery", "method.arm=RR-IMP", "method.levels=3"), 2),
        (("method=lottery", "method.arm=random-global", "method.levels=3"), 2),
        (("method=lottery", "method.arm=LR-rewinding-OMP", "method.levels=3"), 2),
        (("method=lottery", "method.arm=LT-OMP", "method.levels=3"), 2),  # the cut is there already
        (("method=lottery", "method.arm=IMP-rewind", "method.levels=3", "method.rewind_to=0it"), 0),
        (("method=lottery", "method.levels=3", "method.optimizer_state=zero"), 0),  # it has none at the start
    ):
        before = set((tmp_path / "phases").iterdir())
        name = overrides[0].partition("=")[2]
        assert runner.run(configure(tmp_path, name, *overrides[1:], short={})) == 0
        assert len(set((tmp_path / "phases").iterdir()) - before) == new, overrides


def test_a_sweep_says_how_many_phases_sharing_saved(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny = ["dataset=fake", "dataset.image_size=16", "dataset.num_train=24", "dataset.num_test=8", "model=resnet20",
            "model.width=0.25", "schedule.batch_size=8", "schedule.train.epochs=2", "trainer.device=cpu",
            "logger.wandb=disabled", f"output_dir={tmp_path}"]  # fmt: skip
    assert cli.main(["-m", "method=lottery", "method.levels=1,2", "dry_run=true", *tiny]) == 0
    assert "phases with training" not in capsys.readouterr().out, "a dry run trains nothing"
    assert cli.main(["-m", "method=lottery", "method.levels=1,2", "seed=0,1", *tiny]) == 0
    assert "phases with training: 6 done, 10 without sharing\n" in capsys.readouterr().out


# The diagnostic


def test_overlap_of_the_largest_weights() -> None:
    first, second = {"a": torch.tensor([4.0, -3, 2, 1])}, {"a": torch.tensor([1.0, 5, -6, 2])}
    assert overlap_of_largest(first, second, 0.5) == 0.5
    assert overlap_of_largest(first, first, 0.5) == 1
    random = [{"a": torch.randn(100_000, generator=torch.Generator().manual_seed(seed))} for seed in (0, 1)]
    assert overlap_of_largest(*random, 0.1) == pytest.approx(0.1, abs=0.01)


def test_overlap_counts_surviving_weights_only() -> None:
    first, second = {"a": torch.tensor([4.0, 3, 2, 1])}, {"a": torch.tensor([9.0, 1, 5, 4])}
    masks = {"a": torch.tensor([False, True, True, False])}
    assert overlap_of_largest(first, second, 0.5, masks) == 0  # 3 against 5
    assert overlap_of_largest(first, second, 0.25) == 1  # 4 and 9


def test_overlap_is_logged_in_every_epoch_of_a_ticket(tmp_path: Path) -> None:
    folder = finish(configure(tmp_path, "lottery", "method.levels=1", short={}))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shown = {row["phase"] for row in rows if "weights/overlap" in row}
    assert shown == {"train_1"}
    assert all(0 <= row["weights/overlap"] <= 1 for row in rows if row["phase"] == "train_1")


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["method.levels=2", "method.sparsity=0.5"], "method.levels=2 and method.sparsity=0.5: give one of them"),
        (["method.rewind_to=8ep"], "method.rewind_to=8ep: method.arm=LT-IMP starts at the beginning"),
        (["method.arm=RR-OMP", "method.rewind_to=5it"], "method.rewind_to=5it: method.arm=RR-OMP starts"),
        (["method.arm=IMP-rewind", "method.rewind_to=soon"], "method.rewind_to=soon is no place in the training"),
        (["method.arm=IMP-rewind", "method.rewind_to=9ep"], "method.rewind_to=9ep lies beyond schedule.train.epochs=8"),
        (["method.arm=IMP-rewind", "method.rewind_to=0.5ep"], "method.rewind_to=0.5ep lies within the warm-up"),
        (["method.arm=IMP-rewind", "method.rewind_to=999it"], "method.rewind_to=999it lies beyond the 176 steps"),
        (["method.arm=LR-rewinding-OMP", "method.rewind_to=999it"], "method.rewind_to=999it lies beyond the 176 steps"),
        (["method.arm=LR-rewinding-OMP", "method.rewind_to=10it"], "method.rewind_to=10it lies within the warm-up"),
        (["method.arm=RR-IMP", "method.levels=0"], "method.levels=0 prunes nothing"),
        (["method.fraction=1"], "method.fraction must lie in (0, 1), got 1"),
        (["method.fraction=0"], "method.fraction must lie in (0, 1), got 0"),
        (["method.arm=LT"], "method.arm=LT"),
        (["method.arm=IMP-rewind", "method.rewind_to=5"], "method.rewind_to"),
    ],
)
def test_bad_options_are_named(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["method=lottery", f"output_dir={tmp_path}", "logger.wandb=disabled", *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


def test_a_loss_that_explodes_in_a_round_names_the_option(tmp_path: Path, monkeypatch, capsys) -> None:
    def spoil(training: TrainState, step: int) -> None:
        if training.context.phase == "finetune_1":
            training.context.parameters()["conv1.weight"].data.fill_(float("inf"))

    watch(monkeypatch, spoil)
    config = configure(tmp_path, "lottery", "method.levels=1", "method.arm=fine-tune-IMP", short={})
    assert runner.run(config) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "in phase finetune_1" in line and "lower schedule.finetune.lr" in line


def test_a_place_beyond_a_stretched_schedule_is_named_as_typed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["method.arm=IMP-rewind", "method.rewind_to=999it", "schedule.multiplier=0.5"]
    assert cli.main(["method=lottery", f"output_dir={tmp_path}", "logger.wandb=disabled", *options]) == 1
    assert "method.rewind_to=999it lies beyond the 88 steps of schedule.train" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "steps"), [("8ep", 80), ("0.5ep", 5), ("500it", 500), ("0ep", 0)])
def test_positions(text: str, steps: int) -> None:
    assert parse_time(text, "x").step(10) == steps


def test_positions_in_epochs_stretch_with_the_schedule() -> None:
    assert parse_time("8ep", "x").stretched(0.5).step(10) == 40
    assert parse_time("500it", "x").stretched(0.5).step(10) == 500
    with pytest.raises(UserError, match="x=-1ep"):
        parse_time("-1ep", "x")


@pytest.mark.parametrize("stop", [4, 6, 8])
def test_a_round_stopped_midway_goes_on_within_the_schedule(stop: int, tmp_path: Path, monkeypatch) -> None:
    options = ("method.levels=1", "method.arm=IMP-rewind", "method.rewind_to=4it")
    straight = finish(configure(tmp_path / "a", "lottery", *options, short={}))

    def look(training: TrainState, step: int) -> None:
        if training.context.phase == "train_1" and step == stop:
            monkeypatch.setattr(training, "stop", lambda: True)

    with monkeypatch.context() as patch:
        watch(patch, look)
        assert runner.run(configure(tmp_path / "b", "lottery", *options, short={})) != 0
    resumed = configure(tmp_path / "b", "lottery", *options, short={})
    assert runner.run(resumed) == 0
    files = [(folder / "model.safetensors").read_bytes() for folder in (straight, run_folder(resumed))]
    assert files[0] == files[1]
    rows = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            for folder in (straight, run_folder(resumed))]
    steps, again = ([row["global_step"] for row in run] for run in rows)
    assert steps == again == sorted(steps) and steps[-1] == 4 + 9 + 5
