"""Every recipe in conf/experiment and conf/debug composes, passes a dry run and trains a little."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import yaml

from prune_lab.cli.command import main
from prune_lab.compose.choices import choices, conf_dir
from prune_lab.config.run import RunConfig
from tests.helpers.runs import compose

NAMES = choices(conf_dir(), "experiment")
QUICK = ("demo_rigl", "rigl/resnet50_imagenet_erk_90", "grasp/resnet32_cifar10_95", "l1_filter/resnet56_cifar10_a",
         "dep_l0/resnet56_cifar10")  # fmt: skip
"""the others are checked too, but take minutes"""
SMALL = ("dataset=fake", "dataset.image_size=16", "model.width=0.25", "debug=tiny", "logger.wandb=disabled")
TINY_OPTIONS = {
    "autosparse": ["schedule.train.lr=0.01"],
    "autosparse/resnet50_imagenet": ["schedule.train.lr=0.01", "method.threshold_init=-5"],
    "grasp": ["method.samples_per_class=2", "method.rounds=1"],
    "gmp": ["method.num_cuts=2"],
    "str": ["method.threshold_init=-5", "method.threshold_decay=0", "schedule.train.lr=0.01"],
    "renda": ["method.levels=2", "method.rewind_to=0ep"],
    "stabilizing": ["method.rewind_to=0ep"],
    "lottery_sanity": ["method.levels=2"],
    "lottery_sanity/resnet20_cifar10_small_dense": ["method.sparsity=0.5", "method.tolerance=0.2"],
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
"""per folder or recipe: what steps of a recipe must be made small with the training"""
HEADLINES = [
    ("rigl/resnet50_imagenet_80_small_dense", 72.1, 0.12),
    ("rigl/resnet50_imagenet_erk_80", 75.1, 0.05),
    ("rigl/resnet50_imagenet_erk_80_5x", 77.1, 0.06),
    ("rigl/resnet50_imagenet_erk_90", 73.0, 0.04),
    ("rigl/resnet50_imagenet_erk_90_5x", 76.4, 0.05),
    ("rigl/resnet50_imagenet_erk_90_snfs", 72.9, 0.06),
    ("rigl/resnet50_imagenet_erk_90_static", 67.7, 0.12),
    ("rigl/resnet50_imagenet_erk_95", 69.7, 0.17),
    ("rigl/resnet50_imagenet_uniform_80", 74.6, 0.06),
    ("rigl/resnet50_imagenet_uniform_80_set", 72.9, 0.39),
    ("rigl/resnet50_imagenet_uniform_80_static", 70.6, 0.06),
    ("rigl/resnet50_imagenet_uniform_90", 72.0, 0.05),
    ("rigl/resnet50_imagenet_uniform_95", 67.5, 0.10),
    ("rigl/wrn_22_2_cifar10_erk_90", 92.9, None),
    ("rigl/wrn_22_2_cifar10_erk_90_static", 91.5, None),
    ("rigl/wrn_22_2_cifar10_erk_95", 91.8, None),
    ("rigl_report/resnet50_cifar100_80_small_dense", 72.6, 0.93),
    ("rigl_report/resnet50_cifar100_erk_90", 72.6, 0.37),
    ("rigl_report/resnet50_cifar100_erk_90_set", 72.3, 0.39),
    ("rigl_report/resnet50_cifar100_erk_90_static", 71.5, 0.18),
    ("rigl_report/resnet50_cifar100_uniform_90", 71.8, 0.33),
    ("rigl_report/wrn_22_2_cifar10_80_small_dense", 91.0, 0.07),
    ("rigl_report/wrn_22_2_cifar10_erk_80", 93.1, 0.09),
    ("rigl_report/wrn_22_2_cifar10_erk_90_set", 92.2, 0.04),
    ("rigl_report/wrn_22_2_cifar10_uniform_80", 92.6, 0.10),
    ("rigl_report/wrn_22_2_cifar10_uniform_80_static", 91.2, 0.16),
    ("rigl_report/wrn_22_2_cifar10_uniform_90", 91.7, 0.18),
    ("gmp/resnet50_imagenet_80", 75.6, None),
    ("gmp/resnet50_imagenet_90", 73.9, None),
    ("gmp/wrn_22_2_cifar10_erk_90", 93.3, None),
    ("gmp/wrn_22_2_cifar10_global_90", 92.6, 0.08),
    ("itop/resnet50_imagenet_rigl_80", 75.8, None),
    ("itop/resnet50_imagenet_rigl_90", 73.8, None),
    ("grasp/vgg19_cifar10_95", 93.04, 0.18),
    ("grasp/resnet32_cifar10_95", 91.39, 0.25),
    ("grasp/resnet32_cifar100_95", 66.50, 0.11),
    ("synflow/vgg16_cifar10_90", 93.26, 0.12),
    ("directional/vgg16_cifar10_mu_06", 90.82, 0.24),
    ("directional/wrn_28_10_cifar10_mu_055", 94.43, 0.08),
    ("directional/wrn_28_10_cifar100_mu_0501", 76.92, 0.19),
    ("directional/resnet50_imagenet_mu_055", 73.24, None),
    ("l1_filter/resnet56_cifar10_b", 93.06, None),
    ("l1_filter/resnet34_imagenet_a", 72.56, None),
    ("fpgm/resnet56_cifar10_40", 93.49, 0.13),
    ("slimming/vgg19_cifar10_70", 93.78, None),
    ("stabilizing/resnet50_imagenet_90_epoch_6", 73.61, 0.22),
    ("lottery_sanity/resnet20_cifar10_lt_imp", 87.4, None),
    ("renda/resnet50_imagenet_lr_rewinding", 75.48, None),
]
"""typed from the publications a second time: accuracy and its deviation over seeds"""
RECIPES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


@cache
def recipe(name: str) -> RunConfig:
    return compose(f"experiment={name}")


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_composes_and_says_where_its_numbers_come_from(name: str) -> None:
    config = recipe(name)
    if "/" in name:
        assert config.paper is not None
        assert config.paper.values or config.paper.remark, "says why it has no numbers"


@pytest.mark.thin(4)
@pytest.mark.parametrize("name", [name for name in NAMES if "/" in name])
def test_variants_inherit_no_numbers(name: str) -> None:
    """Hydra merges dictionaries: a number of the recipe below would pass for the variant's own."""
    config = recipe(name)
    own = yaml.safe_load((conf_dir() / "experiment" / f"{name}.yaml").read_text())["paper"]
    assert set(config.paper.values) == set(own.get("values", {}))
    assert set(config.paper.std) == set(own.get("std", {}))


@pytest.mark.parametrize(("name", "top1", "std"), HEADLINES)
def test_headlines_are_the_published_ones(name: str, top1: float, std: float | None) -> None:
    config = recipe(name)
    key = "test/top1" if config.dataset.validation else "final/top1"  # papers score test images
    assert (config.paper.values[key], config.paper.std.get(key)) == (top1, std)


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", RECIPES)
def test_every_experiment_passes_a_dry_run(name: str, tmp_path: Path) -> None:
    assert main([f"experiment={name}", "dry_run=true", f"output_dir={tmp_path}"]) == 0
    assert len(list(tmp_path.glob("*/dry_run.json"))) == 1


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", RECIPES)
def test_every_experiment_trains_on_fake_data(name: str, tmp_path: Path) -> None:
    config = recipe(name)
    options = [*TINY_OPTIONS.get(name, TINY_OPTIONS.get(name.partition("/")[0], ())), "schedule.multiplier=1"]
    if hasattr(config.method, "interval"):
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
