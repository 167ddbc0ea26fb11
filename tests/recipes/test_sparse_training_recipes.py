"""Recipes of sparse training and of pruning before training: what a dry run knows agrees with the papers."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

from prune_lab import datasets, models
from prune_lab.accounting.costs import dense_macs, sparse_macs
from prune_lab.accounting.training import training_macs
from prune_lab.cli.command import main
from prune_lab.compose.choices import choices, conf_dir
from prune_lab.config.run import RunConfig
from prune_lab.core.context import Context
from prune_lab.core.method import build_method
from prune_lab.pipeline.phase_plan import PhasePlan
from prune_lab.training.phases import layer_costs
from tests.helpers.runs import compose

INFERENCE = {
    "rigl/resnet50_imagenet_erk_80": 0.4138,
    "rigl/resnet50_imagenet_erk_80_5x": 0.4138,
    "rigl/resnet50_imagenet_erk_90": 0.2418,
    "rigl/resnet50_imagenet_erk_90_5x": 0.2418,
    "rigl/resnet50_imagenet_erk_90_static": 0.2418,
    "rigl/resnet50_imagenet_erk_95": 0.1217,
    "rigl/resnet50_imagenet_uniform_80": 0.2231,
    "rigl/resnet50_imagenet_uniform_80_set": 0.2231,
    "rigl/resnet50_imagenet_uniform_80_static": 0.2231,
    "rigl/resnet50_imagenet_uniform_90": 0.1260,
    "rigl/resnet50_imagenet_uniform_95": 0.0774,
    "rigl/wrn_22_2_cifar10_erk_90": 0.1736,
    "rigl/wrn_22_2_cifar10_erk_95": 0.0881,
    "rigl_report/wrn_22_2_cifar10_uniform_80": 0.2022,
    "rigl_report/wrn_22_2_cifar10_uniform_80_static": 0.2022,
    "rigl_report/wrn_22_2_cifar10_uniform_90": 0.1025,
    "rigl_report/wrn_22_2_cifar10_erk_80": 0.3521,
    "rigl_report/wrn_22_2_cifar10_erk_90_set": 0.1736,
    "rigl_report/resnet50_cifar100_uniform_90": 0.1012,
    "rigl_report/resnet50_cifar100_erk_90": 0.2247,
    "gmp/resnet50_imagenet_80": 0.2231,
    "gmp/resnet50_imagenet_90": 0.1260,
    "gmp/wrn_22_2_cifar10_erk_90": 0.1736,
    "itop/resnet50_imagenet_rigl_80": 0.4138,
    "itop/resnet50_imagenet_rigl_90": 0.2418,
    "dst_ee/resnet50_imagenet_90": 0.2418,
}
"""multipliers in MACs that were computed without this program, to four decimals"""


@dataclass(frozen=True)
class Recipe:
    """A recipe on a network without memory: budgets are integers, so costs need no weights."""

    config: RunConfig

    @cached_property
    def sizes(self) -> dict[str, int]:
        info = datasets.describe(self.config.dataset)
        return info.sizes

    @cached_property
    def steps_per_epoch(self) -> int:
        return datasets.describe(self.config.dataset).num_train // self.config.schedule.batch_size

    @cached_property
    def context(self) -> Context:
        method = build_method(self.config)
        phase = method.chain()[-1]
        model_config = method.adapt_model(self.config.model, **self.sizes)
        model = models.build_on_meta(model_config, **self.sizes)
        epochs = self.config.schedule.phase("train").epochs
        return Context(
            model=model, costs=list(layer_costs(model_config, **self.sizes)), layers=method.layers(model),
            phase=phase.name, seed=0, total_steps=epochs * self.steps_per_epoch, steps_per_epoch=self.steps_per_epoch,
        )  # fmt: skip

    @cached_property
    def dense(self) -> int:
        """MACs of the network that the recipe names."""
        return dense_macs(layer_costs(self.config.model, **self.sizes))

    @cached_property
    def inference(self) -> float:
        """`macs/inference_ratio` of a dry run."""
        _, kept = build_method(self.config).layout(self.context)[-1]
        return sparse_macs(self.context.costs, kept) / self.dense

    @cached_property
    def training(self) -> float:
        """`macs/train_ratio` of a dry run."""
        method = build_method(self.config)
        phase = method.chain()[-1]
        if hasattr(method, "update_steps"):  # what its set-up finds out without drawing masks
            method.updates = method.update_steps(self.context)
        spent = PhasePlan(phase, method, self.context, self.config.schedule.batch_size).macs()
        return spent / training_macs(self.config, self.dense, self.steps_per_epoch)

    @cached_property
    def by_formula(self) -> float:
        """`macs/train_ratio_paper` of a run."""
        context = copy.copy(self.context)
        _, kept = build_method(self.config).layout(self.context)[-1]
        context._macs = sparse_macs(context.costs, kept)
        return build_method(self.config).paper_train_ratio(context)

    @property
    def eligible(self) -> int:
        return sum(layer.size for layer in self.context.eligible())


@cache
def recipe(name: str) -> Recipe:
    return Recipe(compose(f"experiment={name}"))


NARROW = ("rigl/resnet50_imagenet_80_small_dense", "rigl_report/wrn_22_2_cifar10_80_small_dense",
          "rigl_report/resnet50_cifar100_80_small_dense")  # fmt: skip
TRAINING = (
    "rigl/resnet50_imagenet_erk_80", "rigl/resnet50_imagenet_erk_90", "rigl/resnet50_imagenet_erk_90_static",
    "rigl/resnet50_imagenet_uniform_80", "rigl/resnet50_imagenet_uniform_80_set",
    "rigl_report/wrn_22_2_cifar10_uniform_80", "rigl_report/wrn_22_2_cifar10_erk_90_set",
    "rigl_report/resnet50_cifar100_erk_90", "rigl_report/resnet50_cifar100_erk_90_set",
    "rigl_report/resnet50_cifar100_erk_90_static", "gmp/resnet50_imagenet_80", "gmp/resnet50_imagenet_90",
)  # fmt: skip


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", INFERENCE)
def test_masks_cost_what_was_computed_elsewhere(name: str) -> None:
    assert recipe(name).inference == pytest.approx(INFERENCE[name], abs=5.1e-5)  # four decimals


@pytest.mark.parametrize("name", INFERENCE)
def test_masks_cost_what_is_printed(name: str) -> None:
    """Rounded to 0.005, and up to 0.003 more for additions and larger maps that the papers count."""
    printed = recipe(name).config.paper.values.get("macs/inference_ratio")
    if printed is not None:
        assert recipe(name).inference == pytest.approx(printed, abs=0.008)


@pytest.mark.parametrize("name", [*TRAINING, "itop/resnet50_imagenet_rigl_80", "itop/resnet50_imagenet_rigl_90"])
def test_training_costs_what_is_printed(name: str) -> None:
    """As above; 0.01 for RigL-ITOP, printed with RigL's updates, and for gradual pruning's other mean (see below)."""
    printed = recipe(name).config.paper.values["macs/train_ratio_paper"]
    assert recipe(name).by_formula == pytest.approx(printed, abs=0.01)


@pytest.mark.parametrize("name", TRAINING)
def test_the_formulas_cost_little_more_than_the_steps(name: str) -> None:
    """They have mask updates until the end, which is a quarter of a 303rd of what is sparse."""
    assert 0 <= recipe(name).by_formula - recipe(name).training < 0.001


@pytest.mark.parametrize("name", NARROW)
def test_narrow_networks_cost_about_what_is_printed(name: str) -> None:
    """Parameters match here, sizes of files (RigL) or squared widths (the report) there: 0.02."""
    assert recipe(name).inference == pytest.approx(recipe(name).config.paper.values["macs/inference_ratio"], abs=0.02)


def test_momentum_growth_needs_dense_gradients_up_to_the_last_update() -> None:
    """The paper's (2 f_S + f_D) / 3 f_D has them until the end; updates end after 25,000 of 32,000 steps."""
    found = recipe("rigl/resnet50_imagenet_erk_90_snfs")
    assert found.inference == pytest.approx(0.2418, abs=5.1e-5)
    assert (2 * found.inference + 1) / 3 == pytest.approx(found.config.paper.values["macs/train_ratio_paper"], abs=0.01)
    assert found.training == pytest.approx(found.inference + 0.78125 * (1 - found.inference) / 3, abs=0.002)


@pytest.mark.parametrize(("name", "ratio"), [("resnet50_imagenet_80", 0.5603), ("resnet50_imagenet_90", 0.5053)])
def test_gradual_pruning_is_dense_for_a_third_of_the_run(name: str, ratio: float) -> None:
    """The known means are over the 33 points 0, 1000 ... 32000, of which the last has no steps: up to 0.011 less."""
    here = recipe(f"gmp/{name}").training
    assert ratio < here < ratio + 0.011


@pytest.mark.parametrize(
    ("name", "weights", "macs"),
    [
        ("rigl/resnet50_imagenet_erk_90", 25_502_912, 4_089_184_256),
        ("rigl_report/wrn_22_2_cifar10_erk_80", 1_076_912, 157_730_048),
        ("rigl_report/resnet50_cifar100_erk_90", 23_652_032, 1_298_014_208),
    ],
)
def test_networks_are_the_papers(name: str, weights: int, macs: int) -> None:
    assert sum(cost.weights for cost in recipe(name).context.costs) == weights
    assert recipe(name).dense == macs


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("vgg19_cifar10_95", 20_024_000), ("vgg19_cifar100_98", 20_070_080), ("vgg19_tiny_imagenet_95", 20_121_280),
        ("resnet32_cifar10_95", 1_855_584), ("resnet32_cifar100_95", 1_867_104),
        ("resnet32_tiny_imagenet_90", 1_879_904),
    ],
)  # fmt: skip
def test_grasp_prunes_as_many_weights_as_the_official_networks_have(name: str, weights: int) -> None:
    assert recipe(f"grasp/{name}").eligible == weights


def test_str_starts_from_the_published_cost() -> None:
    """4.09 G are printed: three digits."""
    values = recipe("str/resnet50_imagenet_90").config.paper.values
    assert recipe("str/resnet50_imagenet_90").dense == pytest.approx(values["macs/dense"], rel=0.005)


def milestones(name: str) -> list[int]:
    """Return the optimizer steps at which the learning rate falls."""
    train = recipe(name).config.schedule.phase("train")
    return [round(epoch * recipe(name).steps_per_epoch) for epoch in train.milestones]


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("rigl/wrn_22_2_cifar10_erk_90", [29_952, 59_904, 89_856]),  # 30,000 of 390.6 steps an epoch, here of 390
        ("rigl_report/wrn_22_2_cifar10_uniform_90", [30_000, 60_000]),
        ("rigl_report/resnet50_cifar100_uniform_90", [20_000, 40_000, 60_000, 80_000]),
        ("snip/vgg16_cifar10_95", [30_000, 60_000, 90_000, 120_000]),
    ],
)
def test_learning_rates_fall_at_the_published_steps(name: str, steps: list[int]) -> None:
    assert milestones(name) == steps


def test_the_warm_up_of_the_report_has_its_1760_steps() -> None:
    found = recipe("rigl_report/resnet50_cifar100_uniform_90")
    assert round(found.config.schedule.train.warmup_epochs * found.steps_per_epoch) == 1760


@pytest.mark.parametrize(
    ("name", "total", "cuts"),
    [
        ("resnet50_imagenet_80", 32_000, (10_000, 25_000, 1_000)),
        ("wrn_22_2_cifar10_erk_90", 97_656, (20_000, 75_000, 1_000)),
        ("wrn_22_2_cifar10_global_90", 87_891, (700, 65_918, 100)),
    ],
)
def test_cuts_come_where_the_papers_have_them(name: str, total: int, cuts: tuple[int, int, int]) -> None:
    method, (begin, end, interval) = recipe(f"gmp/{name}").config.method, cuts
    assert [round(method.begin * total, -1), round(method.end * total, -1)] == [begin, round(end, -1)]
    assert (end - begin) / method.num_cuts == pytest.approx(interval, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "density"),
    [("renda/resnet20_cifar10_lr_rewinding", 0.168), ("renda/resnet110_cifar10_lr_rewinding", 0.107),
     ("renda/resnet50_imagenet_lr_rewinding", 0.107), ("lottery_sanity/resnet20_cifar10_lt_imp", 0.086)],
)  # fmt: skip
def test_rounds_of_a_fifth_end_at_the_published_density(name: str, density: float) -> None:
    method = build_method(recipe(name).config)
    assert (1 - method.config.fraction) ** method.levels == pytest.approx(density, abs=5e-4)


def test_ma_et_al_leave_the_first_and_the_last_layer_out() -> None:
    layers = recipe("lottery_sanity/resnet20_cifar10_lt_imp").context.layers
    assert [layer.name for layer in layers if not layer.eligible] == ["conv1", "linear"]


UNREAD = [name for name in choices(conf_dir(), "experiment") if name.startswith(("grasp/", "snip/", "dst_ee/"))]
NO_ACCURACY = [name for name in choices(conf_dir(), "experiment") if name.startswith(("dst_ee/", "autosparse/"))]


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_recalled_says_so(name: str) -> None:
    assert recipe(name).config.paper.certainty == "memory"


@pytest.mark.parametrize("name", NO_ACCURACY)
def test_no_accuracy_is_given_where_none_could_be_read(name: str) -> None:
    assert not any(key.endswith("top1") for key in recipe(name).config.paper.values)


def test_a_dry_run_finds_the_same(tmp_path: Path) -> None:
    name = "rigl_report/wrn_22_2_cifar10_uniform_90"
    assert main([f"experiment={name}", "dry_run=true", f"output_dir={tmp_path}"]) == 0
    (path,) = tmp_path.glob("*/dry_run.json")
    found = json.loads(path.read_text())
    assert found["macs/inference_ratio"] == recipe(name).inference
    assert found["macs/train_ratio"] == recipe(name).training
