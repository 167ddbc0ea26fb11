"""Every method with all its defaults on the built-in digits: planned without a warning, and of use at the end."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from prune_lab import datasets
from prune_lab.cli import command as cli
from prune_lab.config.run import as_mapping
from prune_lab.core.method import build_method
from prune_lab.core.phase import TRAIN
from prune_lab.pipeline import runner
from prune_lab.pipeline.dry_run import dry_run
from prune_lab.pipeline.settling import settled
from tests.helpers.method_runs import NAMES, summary
from tests.helpers.runs import compose

DENSE = ("dense",)
"""prunes nothing"""

LEFT = {"haste": 0.99}
"""What is left of the MACs at most where sparsity or channels are an outcome; 0.8 if not named here. haste with the
paper's 14 hyperplanes merges next to nothing in this network, and says so."""

ACCURACY = {"constrained_l0": 80.0}
"""Top-1 at the least; 90 if not named here. Dense training ends at 99.2, plain SGD, which gRDA is, at 93.6; gates that
are drawn anew in each step learn the slower the more of them are shut."""

DEMO = ("dataset=digits", "logger.wandb=disabled")


@pytest.mark.thin(4)
@pytest.mark.parametrize("name", NAMES)
def test_plan_is_accepted_without_a_warning(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert dry_run(compose(*DEMO, f"method={name}", f"output_dir={tmp_path}")) == 0
    said = capsys.readouterr().out
    assert "plan: " in said and "warning" not in said and "stays above" not in said


def test_a_plan_tells_of_too_few_updates(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dry_run(compose(*DEMO, "method=rigl", "method.interval=60", "model.width=0.25", f"output_dir={tmp_path}"))
    assert "mask updates: 3, at steps 0, 60, 120 of 176; warning: fewer than 10" in capsys.readouterr().out


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all runs, so that they share the dense training."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_demo_prunes_and_learns(name: str, runs: Path) -> None:
    assert runner.run(compose(*DEMO, f"method={name}", f"output_dir={runs}")) == 0
    (folder,) = runs.glob(f"digits-resnet20-{name}-s0-*")
    found = summary(folder)
    assert found["final/top1"] >= ACCURACY.get(name, 90.0)
    assert found.get("target/met", True)
    if "target/met" not in found and name not in DENSE:
        assert found["macs/inference_ratio"] <= LEFT.get(name, 0.8)


# Defaults that follow the length of the training


LONG = [("dataset=imagenet", "schedule=imagenet_100"), ("dataset=imagenet", "schedule=imagenet_90"),
        ("dataset=cifar10", "schedule=cifar_160"), ("dataset=cifar10", "schedule=cifar_250")]  # fmt: skip
PUBLISHED = {
    "str": {"threshold_init": -3200.0, "threshold_decay": None},
    "autosparse": {"threshold_init": -5.0},
    "directional": {"c": 0.001},
    "l0": {"penalty": 1.0},
    "gmp": {"num_cuts": 15},
}


def options_of(*overrides: str) -> dict[str, object]:
    config = compose(*overrides)
    return as_mapping(settled(config, datasets.describe(config.dataset)))["method"]


@pytest.mark.parametrize("schedule", LONG, ids=str)
@pytest.mark.parametrize("name", PUBLISHED)
def test_long_trainings_keep_the_published_values(name: str, schedule: tuple[str, ...]) -> None:
    found = options_of(f"method={name}", *schedule)
    assert {key: found[key] for key in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize(("schedule", "start", "decay"), [
    (DEMO, -100.0, 0.036), ((*DEMO, "schedule.multiplier=4"), -3200.0, 0.024),
    (("dataset=cifar10", "schedule=cifar_short"), -3200.0, 0.0053),
], ids=str)  # fmt: skip
def test_str_wakes_its_thresholds_on_short_trainings(schedule: tuple[str, ...], start: float, decay: float) -> None:
    found = options_of("method=str", *schedule)
    assert (found["threshold_init"], found["threshold_decay"]) == (start, decay)


def test_a_short_ramp_has_a_cut_per_step() -> None:
    assert options_of("method=gmp", *DEMO)["num_cuts"] == 15
    assert options_of("method=gmp", *DEMO, "debug=tiny")["num_cuts"] == 4  # steps 2 to 6 of 8
    assert options_of("method=gmp", *DEMO, "debug=tiny", "method.num_cuts=9")["num_cuts"] == 9


def test_a_handful_of_steps_starts_awake() -> None:
    found = options_of("method=str", *DEMO, "debug=tiny")
    assert (found["threshold_init"], found["threshold_decay"]) == (-10.0, None)


def test_a_typed_value_shares_its_phases_with_the_same_one_found() -> None:
    config = compose(*DEMO, "method=str")
    found = build_method(settled(config, datasets.describe(config.dataset)))
    typed = build_method(compose(*DEMO, "method=str", "method.threshold_init=-100", "method.threshold_decay=0.036"))
    assert found.phase_identity(TRAIN) == typed.phase_identity(TRAIN)


def test_a_typed_start_stays_and_gets_a_decay() -> None:
    found = options_of("method=str", *DEMO, "method.threshold_init=-30")
    assert (found["threshold_init"], found["threshold_decay"]) == (-30.0, 0.022)
    assert options_of("method=str", *DEMO, "method.threshold_decay=0.01")["threshold_init"] == -3200.0


def test_l0_asks_less_for_a_weight_on_few_images() -> None:
    assert options_of("method=l0", *DEMO)["penalty"] == pytest.approx(0.28)
    assert options_of("method=l0", *DEMO, "method.penalty=1")["penalty"] == 1


@pytest.mark.parametrize("name", ["str", "autosparse", "directional", "l0", "constrained_l0"])
def test_a_training_without_steps_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main([f"method={name}", "schedule.train.epochs=0", f"output_dir={tmp_path}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"schedule.train.epochs=0 does not go with method={name}: the " in line


def test_short_trainings_start_at_the_size_of_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The median weight of ResNet-20 is 0.0436."""
    for name in ("autosparse", "directional"):
        dry_run(compose(*DEMO, f"method={name}", f"output_dir={tmp_path / name}"))
    said = capsys.readouterr().out
    start, end = (float(re.search(found, said)[1]) for found in (r"T = (\S+) with", r"threshold: from 0 to (\S+) in"))
    assert 1 / (1 + math.exp(-start)) == pytest.approx(1.5 * 0.0436, rel=0.01)
    assert end == pytest.approx(1.3 * 0.0436, rel=0.01)
