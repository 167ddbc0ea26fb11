"""Every recipe in conf/experiment and conf/debug composes, passes a dry run and trains a little."""

from __future__ import annotations

from pathlib import Path

import pytest

from prune_lab.cli import conf_dir, main
from prune_lab.overrides import choices, compose_checked

NAMES = choices(conf_dir(), "experiment")
QUICK = ("demo_rigl", "rigl/resnet50_imagenet_erk_90", "grasp/resnet32_cifar10_95", "l1_filter/resnet56_cifar10_a",
         "lottery_sanity/resnet20_cifar10_lt_imp", "dep_l0/resnet56_cifar10")  # fmt: skip
"""the others are checked too, but take minutes"""
SMALL = ("dataset=fake", "dataset.image_size=16", "model.width=0.25", "debug=tiny", "logger.wandb=disabled")
TINY_OPTIONS = {
    "autosparse": ["schedule.train.lr=0.01"],
    "grasp": ["method.samples_per_class=2", "method.rounds=1"],
    "gmp": ["method.num_cuts=2"],
    "str": ["method.threshold_init=-5", "method.threshold_decay=0", "schedule.train.lr=0.01"],
    "renda": ["method.levels=2", "method.rewind_to=0ep"],
    "stabilizing": ["method.rewind_to=0ep"],
    "lottery_sanity": ["method.levels=2"],
    "l0": ["method.drop_rate=0.95"],
    "constrained_l0": ["method.drop_rate=0.9"],
    "greedy": [
        "method.exclude=[]",
        "method.macs_ratio=null",
        "method.top1_tol=0.9",
        "method.num_evaluate=1",
        "method.eval_images=8",
        "method.batch=8",
    ],
}
"""per folder: what steps of a recipe must be made small with the training"""
RECIPES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_composes_and_says_where_its_numbers_come_from(name: str) -> None:
    (config,) = compose_checked(conf_dir(), [f"experiment={name}"], sweep=False)
    if "/" in name:
        assert config.paper is not None and config.paper.values
        assert set(config.paper.std) <= set(config.paper.values)


@pytest.mark.parametrize("name", RECIPES)
def test_every_experiment_passes_a_dry_run(name: str, tmp_path: Path) -> None:
    assert main([f"experiment={name}", "dry_run=true", f"output_dir={tmp_path}"]) == 0
    assert len(list(tmp_path.glob("*/dry_run.json"))) == 1


@pytest.mark.parametrize("name", RECIPES)
def test_every_experiment_trains_on_fake_data(name: str, tmp_path: Path) -> None:
    (config,) = compose_checked(conf_dir(), [f"experiment={name}"], sweep=False)
    options = [*TINY_OPTIONS.get(name.partition("/")[0], ()), "schedule.multiplier=1"]
    if hasattr(config.method.config, "interval"):
        options.append("method.interval=2")
    assert main([f"experiment={name}", *SMALL, *options, f"output_dir={tmp_path}"]) == 0
    assert len(list(tmp_path.glob("*/summary.json"))) == 1


@pytest.mark.parametrize("schedule", choices(conf_dir(), "schedule"))
def test_debug_tiny_shortens_every_schedule(schedule: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--cfg", "job", "debug=tiny", f"schedule={schedule}"]) == 0
    assert "limit_train_batches: 4" in capsys.readouterr().out


def test_debug_tiny_runs(tmp_path: Path) -> None:
    options = ("method=magnitude", *SMALL)
    assert main([*options, f"output_dir={tmp_path}"]) == 0
    assert len(list(tmp_path.glob("*/summary.json"))) == 1
