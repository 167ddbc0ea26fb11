"""method.match: budgets solved so that a run costs what a reference layout costs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from prune_lab import datasets
from prune_lab.config.run import RunConfig, as_mapping
from prune_lab.core.method import build_method
from prune_lab.families.weight_pruning import WeightPruning
from prune_lab.foundations.errors import UserError
from prune_lab.pipeline.dry_run import dry_run
from prune_lab.pipeline.matching import matched, nearest, nearest_epochs, reachable, sparsity_of
from prune_lab.pruning.masks.distributions import num_keep_total
from prune_lab.training.device_config import resolve_device_config
from tests.helpers.method_runs import NAMES, method_class, watch
from tests.helpers.runs import (
    METHODS,
    TINY,
    assert_same_run,
    compose,
    composed,
    execute,
    fork_pair,
    run_dir,
    summary,
    wait_for,
)  # fmt: skip

RESNET20 = ("model=resnet20", "dataset=fake", "dataset.num_train=640", "dataset.num_test=10", "dataset.image_size=32",
            "schedule=cifar_short", "schedule.batch_size=8", "logger.wandb=disabled")  # fmt: skip
"""80 steps per epoch, ten epochs"""


def solve(*overrides: str) -> RunConfig:
    config = compose(*overrides)
    device_config = resolve_device_config(config.trainer)
    return matched(config, config.model, datasets.describe(config.dataset), device_config)


def planned(folder: Path, *overrides: str) -> dict:
    """Return the dry run's figures."""
    assert dry_run(composed(*overrides, f"output_dir={folder}", "dry_run=true")) == 0
    (path,) = folder.glob("*/dry_run.json")
    return json.loads(path.read_text())


# Searching


@pytest.mark.parametrize("kept", [1, 2, 333, 4999, 5000, 9999])
def test_a_solved_sparsity_keeps_exactly_the_solved_number(kept: int) -> None:
    assert num_keep_total(10_000, sparsity_of(kept, 10_000)) == kept


def test_a_solved_sparsity_is_as_short_as_it_can_be() -> None:
    assert sparsity_of(100, 1000) == 0.9
    assert sparsity_of(2, 3) == 0.3  # 0.3 of three weights is one


def test_bisection_finds_the_nearest_of_rising_costs() -> None:
    assert nearest(lambda kept: kept * kept, 30, 1, 100) == 5  # 25 is nearer than 36
    assert nearest(lambda kept: kept * kept, 31, 1, 100) == 6
    assert nearest(lambda kept: kept, 7, 1, 100) == 7


def test_a_nearer_cost_beside_the_bisection_is_found() -> None:
    """Costs of rounded layouts go up and down a little: here every seventh is 20 too high."""

    def cost(kept: int) -> int:
        return 10 * kept + 20 * (kept % 7 == 0)

    assert nearest(cost, 655, 1, 1000) in (63, 65, 66)  # 650, 650, 660: each 5 away
    assert nearest(cost, 650, 1, 64) == 63  # 640 is the last below, 63 costs 650


def test_arguments_beside_the_bisection_that_are_refused_are_left_out() -> None:
    def cost(kept: int) -> int:
        if kept == 8:
            raise UserError("no such layout")
        return kept

    assert nearest(cost, 6, 1, 10) == 6


def test_bounds_are_those_between_which_a_layout_exists() -> None:
    def cost(kept: int) -> int:
        if not 13 <= kept <= 71:
            raise UserError("no such layout")
        return kept

    assert reachable(cost, 100, start=40) == (13, 71)
    assert reachable(lambda kept: kept, 100, start=40) == (1, 99)


@pytest.mark.parametrize("guess", [-4, 1, 6, 7, 8, 12])
def test_nearest_epochs_from_any_guess(guess: int) -> None:
    assert nearest_epochs(lambda epochs: 10 * epochs + 3, 70, guess=guess) == 7  # 63 is 7 away, 73 only 3


# Inference cost


def test_erk_as_cheap_as_uniform_is_sparser_and_exact_to_a_weight() -> None:
    """rigl.md 8.9: at equal MACs ERK must be sparser than the uniform layout it is compared with."""
    for density in ("0.1", "0.2", "0.5"):
        config = solve(*RESNET20, "method=static", "method.match=macs", f"method.match_to={density}:uniform")
        found = config.matched
        assert abs(found.planned - found.target) < 32 * 32  # what one weight of the widest layer costs
        assert config.method.sparsity == found.solution > 1 - float(density) + 0.02


def test_the_target_is_the_macs_of_the_reference_run(tmp_path: Path) -> None:
    uniform = planned(tmp_path / "uniform", *RESNET20, "method=static", "method.sparsity=0.8",
                      "method.distribution=uniform")  # fmt: skip
    erk = planned(tmp_path / "erk", *RESNET20, "method=static", "method.match=macs", "method.match_to=0.2:uniform")
    assert erk["match/target"] == uniform["macs/inference"]
    assert erk["match/achieved"] == erk["macs/inference"]
    assert erk["sparsity/requested"] == erk["match/sparsity"]
    assert [erk[f"match/{key}"] for key in ("kind", "to", "by")] == ["macs", "0.2:uniform", "density"]
    assert not any(key.startswith("match/") for key in uniform)


def test_a_method_matched_to_its_own_layout_keeps_its_sparsity() -> None:
    for name, kind in (("rigl", "params"), ("rigl", "macs"), ("static", "train_macs")):
        options = (f"method={name}", f"method.match={kind}", "method.match_to=0.1:erk")
        config = solve(*RESNET20, *options, "method.sparsity=0.5")
        assert config.method.sparsity == 0.9
        assert config.matched.planned == config.matched.target


# Parameters


def test_parameters_of_a_dense_first_layer_are_given_to_all_layers() -> None:
    """Uniform leaves conv1 (3x3x3x16 = 432 weights) dense and outside the budget of the other 267,904 weights."""
    config = solve(*RESNET20, "method=static", "method.match=params", "method.match_to=0.1:uniform")
    kept = num_keep_total(268_336, config.method.sparsity)
    assert kept == 432 + round(0.1 * (268_336 - 432))
    assert config.matched.planned == config.matched.target


def test_nonzero_parameters_of_a_global_cut_are_matched(tmp_path: Path) -> None:
    like = ("method.distribution=uniform", "method.first_layer=dense_uncompensated", "method.sparsity=0.8")
    reference = planned(tmp_path / "uniform", *RESNET20, "method=magnitude", *like)
    options = ("method=magnitude", "method.match=params", "method.match_to=0.2:uniform")
    found = planned(tmp_path / "global", *RESNET20, *options)
    assert found["params/nonzero"] == found["match/achieved"] == found["match/target"] == reference["params/nonzero"]


# Training


def test_rigl_is_stretched_to_the_cost_of_dense_training(tmp_path: Path) -> None:
    options = ("method=rigl", "method.interval=50", "method.match=train_macs", "method.match_to=1:uniform")
    found = planned(tmp_path / "a", *RESNET20, *options, "method.match_by=epochs", "method.sparsity=0.8")
    once = planned(tmp_path / "b", *RESNET20, "method=dense")
    epochs = found["match/epochs"]
    assert found["match/target"] == once["macs/train"] == once["macs/train_dense"]
    assert found["match/achieved"] == found["macs/train"]
    per_epoch = found["macs/train"] / epochs
    assert abs(found["macs/train"] - found["match/target"]) < per_epoch / 2
    assert found["phases"] == [{"name": "train", "epochs": epochs}] and epochs > 20
    assert found["sparsity/requested"] == 0.8
    assert found["macs/train_dense"] == once["macs/train_dense"]  # of the schedule as configured, not as stretched
    assert found["macs/train_ratio"] == pytest.approx(1, abs=0.02)


def test_milestones_and_warm_up_are_stretched_and_the_multiplier_counts_once() -> None:
    schedule = ("schedule=cifar_160", "schedule.multiplier=0.1", "schedule.batch_size=8")
    options = ("method=static", "method.match=train_macs", "method.match_to=1:uniform", "method.match_by=epochs")
    config = solve(*RESNET20, *schedule, "method.distribution=uniform", "method.sparsity=0.5", *options)
    train = config.schedule.phase("train")
    assert train.epochs == config.matched.solution == 32  # half the cost twice as long; the first layer is 1 %
    assert train.milestones == pytest.approx([16.0, 24.0])
    assert config.schedule.phase("finetune").epochs == 4
    assert as_mapping(config)["schedule"]["train"]["epochs"] == 32
    assert config.matched.configured_epochs == 16


def test_fine_tuning_is_part_of_the_training_that_is_matched() -> None:
    """Dense training is 10 epochs; 4 sparse ones at 10 % of the MACs leave about 9.6 dense ones: 10."""
    options = ("method=magnitude", "method.distribution=uniform", "method.match=train_macs",
               "method.match_to=1:uniform", "method.match_by=epochs")  # fmt: skip
    config = solve(*RESNET20, *options)
    assert config.matched.solution == 10
    assert 0 < config.matched.planned - config.matched.target < config.matched.target / 20


def test_methods_with_one_reference_train_at_one_cost(tmp_path: Path) -> None:
    """The reference is a fixed mask, so that dense gradients and scoring passes are paid for by a higher sparsity."""
    wanted = ("method.distribution=erk", "method.match=train_macs", "method.match_to=0.3:uniform")
    fixed = planned(tmp_path, *RESNET20, "method=static", "method.distribution=uniform", "method.sparsity=0.7")
    solved = {}
    for name, *options in (("static",), ("rigl", "method.interval=50"), ("snip",), ("set", "method.interval=50"),
                           ("rigl_structured", "method.interval=50")):  # fmt: skip
        config = solve(*RESNET20, f"method={name}", *options, *wanted)
        assert config.matched.target == fixed["macs/train"]
        assert config.matched.planned == pytest.approx(config.matched.target, rel=1e-3)
        solved[name] = config.method.sparsity
    assert solved["static"] == solved["set"] < min(solved["rigl"], solved["snip"])


def test_a_control_gets_what_is_solved_for_its_method() -> None:
    """Random masks leave the scoring pass out and would otherwise be given more weights, or longer training."""
    options = (*RESNET20, "method=snip", "method.distribution=erk", "method.match=train_macs",
               "method.match_to=0.3:uniform")  # fmt: skip
    own, control = solve(*options), solve(*options, "method.control=random")
    assert control.method.sparsity == own.method.sparsity == control.matched.solution
    assert control.method.control == "random"
    assert as_mapping(control)["method"] == as_mapping(own)["method"] | {"control": "random"}
    assert ", solved for the method itself, training MACs" in control.matched.line()


def test_epochs_of_a_control_are_those_of_its_method() -> None:
    """160 images are scored and four times 160 trained on: a mask without scores would train 44 epochs, not 33."""
    options = (*RESNET20, "method=snip", "method.distribution=erk", "method.sparsity=0.95", "method.match=train_macs",
               "method.match_to=1:uniform", "method.match_by=epochs", "method.samples_per_class=16",
               "trainer.limit_train_batches=20", "schedule.train.epochs=4",
               "schedule.train.warmup_epochs=0")  # fmt: skip
    own, control = solve(*options), solve(*options, "method.control=random")
    assert control.matched.solution == own.matched.solution
    assert control.schedule == own.schedule and as_mapping(control)["schedule"] == as_mapping(own)["schedule"]


MATCHABLE = [
    name for name in METHODS
    if name in NAMES and issubclass(method_class(name), WeightPruning)
]  # fmt: skip


@pytest.mark.thin(4)
@pytest.mark.parametrize("name", MATCHABLE)
def test_the_run_costs_what_was_solved(name: str, tmp_path: Path) -> None:
    erk = ("method.distribution=erk", "method.match_to=0.4:uniform")
    kind = "train_macs"
    try:
        solve(*TINY, *METHODS[name], *erk, "method.match=train_macs")
    except UserError as error:
        reason = str(error)
        if "not known before training; method.match=params is possible" in reason:
            kind = "params"
        else:  # six steps per epoch: dense training or scoring before the masks costs more than the reference in all
            assert "out of reach" in reason and name in ("gmp", "magnitude", "grasp")
            kind = "macs"
    assert execute(tmp_path, *TINY, *METHODS[name], *erk, f"method.match={kind}") == 0
    found, config = summary(tmp_path), solve(*TINY, *METHODS[name], *erk, f"method.match={kind}")
    assert found["match/kind"] == kind
    assert found["match/achieved"] == config.matched.planned
    assert found["match/target"] == config.matched.target
    assert found["sparsity/requested"] == config.method.sparsity != 0.6


# Runs


MATCHED = (*TINY, *METHODS["rigl"], "method.match=macs", "method.match_to=0.3:uniform")


def test_a_matched_run_says_so_first_and_is_done_when_done(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert execute(tmp_path, *MATCHED) == 0
    found = summary(tmp_path)
    layers = json.loads((run_dir(tmp_path) / "layers.json").read_text())
    kept, size = (sum(row[key] for row in layers) for key in ("kept", "weights"))
    line = (
        f"matched macs of 0.3:uniform: sparsity {found['match/sparsity']} (kept {kept} of {size} weights), "
        f"MACs {found['match/achieved']} against {found['match/target']}"
    )
    printed = capsys.readouterr().out
    assert line in printed and printed.index(line) < printed.index("train 1/2")
    assert line in (run_dir(tmp_path) / "log.txt").read_text()
    assert execute(tmp_path, *MATCHED) == 0
    assert "done already" in capsys.readouterr().out


def test_a_matched_run_shares_phases_with_the_solved_sparsity_but_not_its_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert execute(tmp_path, *MATCHED) == 0
    sparsity = summary(tmp_path)["match/sparsity"]
    capsys.readouterr()
    assert execute(tmp_path, *TINY, *METHODS["rigl"], f"method.sparsity={sparsity}") == 0
    assert "phase train: reused" in capsys.readouterr().out
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("*/summary.json")]
    assert sorted("match/kind" in found for found in summaries) == [False, True]


def test_keys_of_runs_without_matching_do_not_know_the_options() -> None:
    config = compose(*TINY, *METHODS["rigl"])
    assert not [key for key in build_method(config).identity() if key.startswith("match")]
    assert config.matched is None and solve(*TINY, *METHODS["rigl"]).matched is None


def test_a_stopped_matched_run_goes_on_bit_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = (*TINY, *METHODS["rigl"], "method.match=train_macs", "method.match_to=0.5:uniform",
               "method.match_by=epochs", "method.sparsity=0.8")  # fmt: skip
    done: list[int] = []

    def look(training, step: int) -> None:
        done.append(step)
        if len(done) == 7:
            monkeypatch.setattr(training, "stop", lambda: True)

    assert execute(tmp_path / "whole", *options) == 0
    watch(monkeypatch, look)
    assert execute(tmp_path / "cut", *options) != 0
    assert execute(tmp_path / "cut", *options) == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_two_processes_solve_alike(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert [wait_for(child) for child in fork_pair(log, lambda: execute(tmp_path / "pair", *MATCHED))] == [0, 0]
    assert execute(tmp_path / "single", *MATCHED) == 0
    for key in ("match/sparsity", "match/achieved", "match/target"):
        assert summary(tmp_path / "pair")[key] == summary(tmp_path / "single")[key]


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["method.match=macs"], r"method\.match=.* goes with method\.match_to=DENSITY:DISTRIBUTION, got match=macs"),
        (["method.match_to=0.1:erk"], r"got match=none and match_to=0\.1:erk"),
        (["method.match=macs", "method.match_to=0.1:erk", "method.match_by=epochs"],
         "method.match_by=epochs goes with method.match=train_macs, got match=macs"),
        (["method.match=macs", "method.match_to=0.1"], "method.match_to must be a text such as 0.1:uniform, got 0.1"),
        (["method.match=macs", "method.match_to=0:erk"], r"method\.match_to=0:erk must be DENSITY:DISTRIBUTION"),
        (["method.match=macs", "method.match_to=1.1:erk"], r"density in \(0, 1\]"),
        (["method.match=macs", "method.match_to=nan:erk"], "such as 0.1:uniform"),
        (["method.match=macs", "method.match_to=0.1:global"], "uniform, er or erk"),
        (["method.match=flops", "method.match_to=0.1:erk"], "method.match=flops is not allowed"),
        (["method.match=macs", "method.match_to=0.1:erk", "method.distribution=file", "method.densities=x"],
         "method.distribution=file fixes the densities"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_one_line(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        compose(*TINY, "method=static", *options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["method=magnitude", "method.match=macs", "method.match_to=0.1:uniform"],
         "magnitude with method.distribution=global are not known before training; method.match=params is possible"),
        (["method=snip", "method.match=train_macs", "method.match_to=0.1:uniform"], "not known before training"),
        (["method=static", "method.match=macs", "method.match_to=1:uniform"],
         r"out of reach: it has 40551040 MACs, static with method.distribution=erk from \d+ to 4055\d+ "),
        (["method=rigl", "method.interval=50", "method.match=train_macs", "method.match_to=1:uniform"],
         "method.match_by=epochs would change the length of training"),
        (["method=static", "method.match=macs", "method.match_to=0.00001:uniform"],
         r"^method\.match_to=0\.00001:uniform: method.sparsity is out of reach"),
        (["method=magnitude", "method.distribution=erk", "method.match=train_macs", "method.match_to=0.1:uniform",
          "method.match_by=epochs", "schedule.train.epochs=0", "schedule.train.warmup_epochs=0"],
         "schedule.train has no steps whose cost could be matched"),
        (["method=static", "method.match=train_macs", "method.match_to=0.1:uniform", "schedule.train.epochs=0",
          "schedule.train.warmup_epochs=0"],
         r"^method\.match_to=0\.1:uniform: schedule.train has no steps whose cost could be matched"),
        (["method=snip", "method.match=params", "method.match_to=0.03:uniform", "method.min_per_layer=3000"],
         r"^method\.match_to=0\.03:uniform: method\.min_per_layer=3000 keeps"),
        (["method=magnitude", "method.distribution=erk", "method.sparsity=0.1", "schedule.finetune.epochs=40",
          "method.match=train_macs", "method.match_to=1:uniform", "method.match_by=epochs"],
         r"training MACs, magnitude \d+ or more with method.sparsity=0.1 \(from 1 epochs on\)"),
    ],
)  # fmt: skip
def test_costs_out_of_reach_are_one_line(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        solve(*RESNET20, *options)
    assert "\n" not in str(caught.value)


def test_a_refused_match_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="out of reach"):
        execute(tmp_path / "out", *TINY, "method=static", "method.match=macs", "method.match_to=1:erk")
    assert not (tmp_path / "out").exists()


def test_a_solved_sparsity_that_only_the_validation_refuses_names_its_reference(tmp_path: Path) -> None:
    """The set-up for solving is done at the default 90 %, which leaves enough weights."""
    options = (*TINY, *METHODS["snip"], "method.match=params", "method.match_to=0.03:uniform",
               "method.min_per_layer=60")  # fmt: skip
    for attempt in (execute, planned):
        with pytest.raises(UserError, match=r"^method\.match_to=0\.03:uniform: method\.min_per_layer=60 keeps"):
            attempt(tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_typed_sparsity_is_not_replaced_without_a_word() -> None:
    options = ("method=static", "method.match=macs", "method.match_to=0.1:uniform", "method.sparsity=0.8")
    config = replace(compose(*RESNET20, *options), overrides=options)
    information = datasets.describe(config.dataset), resolve_device_config(config.trainer)
    with pytest.raises(UserError, match=r"^method\.sparsity=0\.8: method\.match=macs with method\.match_by=density"):
        matched(config, config.model, *information)
    epochs = ("method=static", "method.match=train_macs", "method.match_to=1:uniform", "method.match_by=epochs",
              "method.sparsity=0.8")  # fmt: skip
    config = replace(compose(*RESNET20, *epochs), overrides=epochs)
    assert matched(config, config.model, *information).method.sparsity == 0.8


def test_a_sparsity_that_is_to_be_replaced_may_be_out_of_reach() -> None:
    options = ("method=static", "method.match=macs", "method.match_to=0.1:uniform")
    found = solve(*RESNET20, *options, "method.sparsity=0.999999").matched
    assert found == solve(*RESNET20, *options).matched
